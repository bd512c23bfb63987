"""Dropout: the share it drops, what it multiplies by, and that its gradient has the same mask."""

import pytest
import torch

from gpr_dist.ops.noise import dropout


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_keeps_the_mean_and_drops_a_share(p):
    torch.manual_seed(0)
    x = torch.ones(1001, 333, requires_grad=True)
    out = dropout(x, p, training=True)
    out.sum().backward()
    out = out.detach()
    kept = out[out != 0]
    assert float((out == 0).float().mean()) == pytest.approx(p, abs=0.003)
    assert float(kept.min()) == float(kept.max()) == pytest.approx(1 / (1 - p), rel=1e-4)
    assert torch.equal(x.grad, out)
    dropped = (out == 0).float()  # neighbours come from one random number and do not know of each other
    assert float((dropped[:, 1:] * dropped[:, :-1]).mean()) == pytest.approx(p**2, rel=0.05)


def test_repeats_with_the_seed_and_does_nothing_else():
    x = torch.randn(5, 7)
    torch.manual_seed(1)
    first = dropout(x, 0.3, training=True)
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.3, training=True), first)
    assert torch.equal(dropout(x, 0.3, training=False), x) and torch.equal(dropout(x, 0.0, training=True), x)
    assert dropout(x[:0], 0.3, training=True).shape == (0, 7)
