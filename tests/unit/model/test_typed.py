"""Token-aware layers against a loop over tokens; a token's output and gradient touch its own type's weights only."""

import pytest
import torch
import torch.nn.functional as F

from gpr_dist.model.typed import NUM_TYPES, TypedFFN, TypedNorm, TypeGroups

D = 6
MIXES = {"all": [3, 0, 2, 2, 1, 3, 0, 1, 3], "some": [1, 3, 1, 3, 3], "one": [2, 2, 2], "none": []}


def layers():
    torch.manual_seed(0)
    norm, ffn, of_types = TypedNorm(D).double(), JoinedFFN(D, 10).double(), NormOfTypes(D).double()
    with torch.no_grad():
        for layer in (norm, of_types):
            layer.weight_CD.normal_()
            layer.bias_CD.normal_()
    return norm, ffn, of_types


class JoinedFFN(TypedFFN):
    """With the outputs of all types in token order."""

    def forward(self, x, groups):
        return groups.join(super().forward(x, groups))


class NormOfTypes(TypedNorm):
    """Given the tokens of each type, as after an FFN."""

    def forward(self, x, groups):
        return super().forward(groups.split(x), groups)


def slow_norm(norm, x, c):
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * norm.weight_CD[c] + norm.bias_CD[c]


def slow_ffn(ffn, x, c):
    return F.silu(x @ ffn.up_CDF[c]) @ ffn.down_CFD[c]


@pytest.mark.parametrize("mix", ["all", "some", "one"])
@pytest.mark.parametrize(("which", "slow"), [(0, slow_norm), (1, slow_ffn), (2, slow_norm)])
def test_equals_a_loop_over_tokens(mix, which, slow):
    layer, types = layers()[which], torch.tensor(MIXES[mix], dtype=torch.long)
    x = torch.randn(len(types), D, dtype=torch.float64, requires_grad=True)
    out = layer(x, TypeGroups.build(types, x.dtype))
    direction = torch.randn_like(out)
    found = torch.autograd.grad(out, [x, *layer.parameters()], direction)
    expected_out = torch.stack([slow(layer, x[i], c) for i, c in enumerate(types.tolist())])
    expected = torch.autograd.grad(expected_out, [x, *layer.parameters()], direction)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_types_that_are_absent_get_a_zero_gradient_and_not_none(mix, which):
    layer, types = layers()[which], torch.tensor(MIXES[mix], dtype=torch.long)
    layer(torch.randn(len(types), D, dtype=torch.float64), TypeGroups.build(types, torch.float64)).square().sum().backward()
    for parameter in layer.parameters():
        used = [bool(parameter.grad[c].any()) for c in range(NUM_TYPES)]
        assert used == [c in MIXES[mix] for c in range(NUM_TYPES)]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_weights_of_a_type_change_its_tokens_only(which):
    layer, types = layers()[which], torch.tensor(MIXES["all"])
    x = torch.randn(len(types), D, dtype=torch.float64)
    before = layer(x, TypeGroups.build(types, x.dtype))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter[1] += 1.0
    changed = (layer(x, TypeGroups.build(types, x.dtype)) != before).any(1)
    assert changed.tolist() == (types == 1).tolist()
