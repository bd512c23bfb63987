"""The value regression ignores what was not logged; the negative log-likelihood is exact in float32 whatever the model's precision."""

import pytest
import torch

from gpr_dist.objectives.mtp import uniform_head_weights, value_loss
from gpr_dist.ops.cross_entropy import nll_of_logits

HEAD = torch.tensor([0, 1, 0, 1])
WEIGHTS = torch.tensor([0.75, 0.25])


def test_is_huber_on_log1p_averaged_over_levels():
    values = torch.tensor([[0.0, 1.0], [2.0, 2.0], [5.0, 0.5], [0.0, 0.0]], requires_grad=True)
    logged = torch.tensor([0.0, 6.3890561, 1.0, float("nan")])  # log1p: 0, 2, log 2
    log2 = 0.6931472
    expected = (0.75 * (0 + 0.5) / 2 + 0.25 * 0 + 0.75 * ((5 - log2 - 0.5) + 0.5 * (log2 - 0.5) ** 2) / 2) / 3
    loss = value_loss(values, logged, HEAD, WEIGHTS, 3)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward()
    assert values.grad.isfinite().all() and not values.grad[3].any() and values.grad[2].all()


@pytest.mark.parametrize("unknown", [float("nan"), float("inf"), -float("inf")])
def test_values_that_were_not_logged_count_nothing(unknown):
    values = torch.randn(4, 3, requires_grad=True)
    loss = value_loss(values, torch.full((4,), unknown), HEAD, WEIGHTS, 3)
    loss.backward()
    assert loss == 0 and not values.grad.any()


def test_a_negative_value_counts_as_none_earned():
    values = torch.randn(4, 3)
    assert value_loss(values, torch.full((4,), -5.0), HEAD, WEIGHTS, 3) == value_loss(values, torch.zeros(4), HEAD, WEIGHTS, 3)


def test_nll_is_float32_per_level_and_empty_without_targets():
    logits, codes = torch.randn(5, 3, 7).bfloat16(), torch.randint(7, (5, 3))
    nll = nll_of_logits(logits, codes)
    assert nll.dtype == torch.float32 and nll.shape == (5, 3)
    for n in range(5):
        for level in range(3):
            expected = -logits[n, level].double().softmax(0)[codes[n, level]].log()
            assert float(nll[n, level]) == pytest.approx(float(expected), rel=1e-5)
    assert nll_of_logits(logits[:0], codes[:0]).shape == (0, 3)


@pytest.mark.parametrize("heads", [1, 3, 4])
def test_uniform_weights_are_a_simplex(heads):
    weights = uniform_head_weights(heads)
    assert weights.shape == (heads,) and (weights == weights[0]).all() and float(weights.sum()) == pytest.approx(1)
