"""Dropout by key: a row's mask follows its key wherever the row is computed, and looks like independent draws."""

import pytest
import torch

from gpr_dist.hashing import row_keys
from gpr_dist.ops.noise import dropout


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_share_scale_and_gradient(p):
    keys = row_keys(torch.arange(3000), torch.zeros(3000, dtype=torch.long), 7)
    x = torch.ones(3000, 96, requires_grad=True)
    out = dropout(x, p, True, keys)
    out.sum().backward()
    assert torch.equal(x.grad, out)
    dropped = (out == 0).float()
    assert float(dropped.mean()) == pytest.approx(p, abs=0.003)
    assert float(out.max()) == pytest.approx(1 / (1 - p), rel=1e-4)
    for pair in ((dropped[:, 1:], dropped[:, :-1]), (dropped[1:], dropped[:-1])):  # neighbours know nothing of each other
        assert float((pair[0] * pair[1]).mean()) == pytest.approx(p**2, rel=0.05)
    assert len(torch.unique(dropped, dim=0)) > (2990 if p == 0.5 else 2900)


def test_a_row_keeps_its_mask_in_any_batch_and_every_use_has_its_own():
    row, position = torch.arange(50).repeat_interleave(4), torch.arange(4).repeat(50)
    keys, x = row_keys(row, position, 3), torch.randn(200, 16)
    out = dropout(x, 0.4, True, keys)
    order = torch.randperm(200)
    assert torch.equal(dropout(x[order], 0.4, True, keys[order]), out[order])
    assert torch.equal(dropout(x.view(50, 4, 16), 0.4, True, keys.view(50, 4)).view(200, 16), out)
    for other in (dropout(x, 0.4, True, keys, salt=1), dropout(x, 0.4, True, row_keys(row, position, 4))):
        assert 0.4 < float(((other == 0) == (out == 0)).float().mean()) < 0.65  # 0.52 by chance
    assert torch.equal(dropout(x, 0.4, False, keys), x) and torch.equal(dropout(x, 0.0, True, keys), x)
    assert len(torch.unique(torch.cat([keys, row_keys(row, position, -5)]))) == 400
