"""The item softmax against plain cross-entropy over all logits: value and gradients, however it is cut into chunks."""

import pytest
import torch
import torch.nn.functional as F

from gpr_dist.ops.cross_entropy import item_nll

R, C, D, G = 23, 37, 8, 3


def inputs(dtype=torch.float64, seed=0, num_targets=40):
    torch.manual_seed(seed)
    state, weight, bias = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((R, D), (C, D), (C,)))
    return state, weight, bias, torch.randint(R - 2, (num_targets,)), torch.randint(C, (num_targets,))  # some requests without targets


def gradients(loss, tensors):
    return torch.autograd.grad(3.0 * loss, tensors)  # a step divides the loss: the incoming gradient is not 1


@pytest.mark.parametrize("chunk_bytes", [1, 4 * C * 5, 1 << 20])
def test_equals_cross_entropy_over_all_candidates(chunk_bytes):
    state, weight, bias, request, column = inputs()
    loss = item_nll(state, weight, bias, request, column, chunk_bytes=chunk_bytes)
    plain = F.cross_entropy((state @ weight.T + bias)[request], column, reduction="sum")
    torch.testing.assert_close(loss, plain)
    for found, expected in zip(gradients(loss, (state, weight, bias)), gradients(plain, (state, weight, bias)), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("chunk_bytes", [1, 4 * C * 5, 1 << 20])
def test_weights_of_the_targets(chunk_bytes):
    state, weight, bias, request, column = inputs(seed=2)
    of_target = torch.rand(len(request), dtype=torch.float64) * (torch.arange(len(request)) % 5 > 0)  # some count nothing
    loss = item_nll(state, weight, bias, request, column, chunk_bytes=chunk_bytes, weight_N=of_target)
    plain = (of_target * F.cross_entropy((state @ weight.T + bias)[request], column, reduction="none")).sum()
    torch.testing.assert_close(loss, plain)
    for found, expected in zip(gradients(loss, (state, weight, bias)), gradients(plain, (state, weight, bias)), strict=True):
        torch.testing.assert_close(found, expected)
    ones, none = (item_nll(state, weight, bias, request, column, chunk_bytes=chunk_bytes, weight_N=w) for w in (torch.ones(40), None))
    assert ones.equal(none)
    assert all(a.equal(b) for a, b in zip(gradients(ones, (state, weight, bias)), gradients(none, (state, weight, bias)), strict=True))


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_offsets_and_legality_leave_a_requests_own_targets_alone(chunk_bytes):
    state, weight, bias, request, column = inputs(seed=1)
    offset, group = torch.randn(C, dtype=torch.float64), torch.randint(G, (R,))
    offset[::4] = -torch.inf
    legal = torch.rand(G, C) < 0.5
    loss = item_nll(state, weight, bias, request, column, offset, legal, group, chunk_bytes)
    added = offset + torch.where(legal, 0.0, -torch.inf).double()[group]
    added[request, column] = 0
    plain = F.cross_entropy((state @ weight.T + bias + added)[request], column, reduction="sum")
    torch.testing.assert_close(loss, plain)
    for found, expected in zip(gradients(loss, (state, weight, bias)), gradients(plain, (state, weight, bias)), strict=True):
        torch.testing.assert_close(found, expected)


def test_bf16_products_with_a_float32_softmax():
    state, weight, bias, request, column = inputs(torch.float32)
    loss = item_nll(state, weight, bias, request, column)
    low = [x.detach().bfloat16().requires_grad_() for x in (state, weight, bias)]
    rounded = item_nll(*low, request, column, chunk_bytes=4 * C * 3)
    assert rounded.dtype == torch.float32 and rounded.item() == pytest.approx(loss.item(), rel=0.01)
    for found, expected in zip(gradients(rounded, low), gradients(loss, (state, weight, bias)), strict=True):
        assert found.dtype == torch.bfloat16
        assert float((found.float() - expected).norm() / expected.norm()) < 0.02


def test_without_targets_or_gradients():
    state, weight, bias, request, column = inputs()
    none = torch.empty(0, dtype=torch.long)
    loss = item_nll(state, weight, bias, none, none)
    assert loss.item() == 0
    for gradient in gradients(loss, (state, weight, bias)):
        assert not gradient.any()  # zeros, not None: every rank uses every parameter
    with torch.no_grad():
        torch.testing.assert_close(item_nll(state, weight, bias, request, column), item_nll(*inputs()).detach())
    assert item_nll(state[:0], weight, bias, none, none).item() == 0
