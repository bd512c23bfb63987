"""Chunks change neither the loss nor its gradients, and bound the memory."""

import pytest
import torch

from gpr_dist.ops.cross_entropy import code_logits, code_nll, nll_of_logits

N, L, V, D = 37, 3, 11, 8


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    state, weight, bias = (torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
                           for shape in ((N, L, D), (L, V, D), (L, V)))
    offset = torch.where(torch.rand(N, L, V, generator=g) < 0.3, -torch.inf, 0.5)
    codes = torch.randint(V, (N, L), generator=g)
    return state, weight, bias, codes, offset.scatter(2, codes[:, :, None], 0.0)


@pytest.mark.parametrize("rows", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_any_chunk_gives_the_loss_and_gradients_of_the_whole(rows, masked):
    state, weight, bias, codes, offset = inputs()
    offset = offset if masked else None
    expected = nll_of_logits(code_logits(state, weight, bias), codes, offset)
    wanted = torch.autograd.grad(expected.square().sum(), (state, weight, bias))
    found = code_nll(state, weight, bias, codes, offset, chunk_bytes=rows * 4 * L * V)
    torch.testing.assert_close(found, expected)
    for gradient, exact in zip(torch.autograd.grad(found.square().sum(), (state, weight, bias)), wanted, strict=True):
        torch.testing.assert_close(gradient, exact)


def test_a_large_codebook_never_has_all_its_logits_at_once():
    sizes = []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))
            return out

    state, weight, bias = torch.randn(64, 2, 4, requires_grad=True), torch.randn(2, 1000, 4), torch.zeros(2, 1000)
    with Spy():
        code_nll(state, weight, bias, torch.zeros(64, 2, dtype=torch.int64), chunk_bytes=8 * 4 * 2 * 1000).sum().backward()
    assert max(sizes) == 8 * 2 * 1000


def test_bf16_states_are_scored_in_float32():
    state, weight, bias, codes, _ = inputs(torch.bfloat16)
    found = code_nll(state, weight, bias, codes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, -code_logits(state, weight, bias).float().log_softmax(-1).gather(2, codes[:, :, None])[:, :, 0])
