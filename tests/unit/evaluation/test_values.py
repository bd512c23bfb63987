"""Calibration of the value head: order kept, means met, measured against what is known, and no peeking at the evaluated split."""

import numpy as np
import pytest
import torch
from random_batches import concat_batches, empty_batch, random_batch
from scipy.stats import spearmanr
from tiny_model import tiny_model

from gpr_dist.evaluation.values import Values, calibrate, format_values, measure_values, predict_values


def drawn(seed: int, n: int = 4000) -> Values:
    """Log-normal values whose logarithm the last level knows well, the first one not at all."""
    random = np.random.default_rng(seed)
    mean = random.normal(1.0, 0.6, n)
    logged = np.expm1(np.maximum(mean + random.normal(0, 0.5, n), 0))
    return Values(np.stack((random.normal(size=n), mean), 1), logged)


def test_calibrated_predictions_are_expected_values_in_the_order_of_the_head():
    train, test = drawn(0), drawn(1)
    curves = calibrate(train)
    measured = measure_values(test, curves, float(train.logged_N.mean()))
    raw = np.expm1(np.maximum(test.predicted_NL1[:, 1], 0)).mean() / test.logged_N.mean()
    assert raw < 0.93 and abs(measured["bias"][1] - 1) < 0.05  # the log's mean is too low a value
    assert measured["skill"][1] > 0.3 and abs(measured["skill"][0]) < 0.02
    for predicted, logged, count in measured["deciles"]:
        assert count == 400 and predicted == pytest.approx(logged, rel=0.2)
    grid = np.linspace(-5, 5, 1000)
    assert (np.diff(curves[1](grid)) >= 0).all()
    assert "V_1" in format_values(measured)


def test_rank_correlation_is_spearmans_with_ties():
    values = drawn(2, 300)
    tied = Values(values.predicted_NL1.round(1), values.logged_N.round(0))
    measured = measure_values(tied, calibrate(tied), 1.0)
    for level in range(2):
        assert measured["rank_correlation"][level] == pytest.approx(spearmanr(tied.predicted_NL1[:, level], tied.logged_N).statistic)
    constant = Values(np.ones((50, 1)), values.logged_N[:50])
    assert measure_values(constant, calibrate(constant), float(constant.logged_N.mean()))["skill"][0] == pytest.approx(0, abs=1e-12)


def test_the_ads_shown_with_a_logged_value_are_predicted_as_in_training():
    model, parts = tiny_model(), [random_batch(seed) for seed in (1, 2)]
    values = predict_values(model, [*parts, empty_batch()], torch.device("cpu"))
    whole = concat_batches(parts)
    with torch.no_grad():
        everything = model(whole).values_NL1
    keep = (whole.target_head_N == 0) & whole.target_value_N.isfinite()
    order = np.lexsort(values.predicted_NL1.T)
    expected = everything[keep].double().numpy()
    np.testing.assert_allclose(values.predicted_NL1[order], expected[np.lexsort(expected.T)], atol=1e-5)
    assert sorted(values.logged_N) == sorted(whole.target_value_N[keep].double().tolist()) and 0 < len(values.logged_N) < len(keep)


def test_an_item_head_changes_no_value_and_needs_no_candidates():
    items = {"buckets": 64, "num_items": 50, "input": False}
    values = predict_values(tiny_model(items=items), [random_batch(1)], torch.device("cpu"))
    assert len(values.logged_N) and np.isfinite(values.predicted_NL1).all()


def test_without_logged_values_there_is_nothing_to_calibrate():
    batch = random_batch(1)
    batch.target_value_N = torch.full_like(batch.target_value_N, float("nan"))
    assert calibrate(predict_values(tiny_model(), [batch], torch.device("cpu"))) == []
