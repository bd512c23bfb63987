"""Curves from logits to probabilities, and measures of probabilities."""

import json

import numpy as np
import pytest
import torch
from scipy.special import expit

from gpr_dist.rl.calibration import CalibrationConfig, Curve, calibrate, measure

METHODS = ("platt", "isotonic")


def wrong_logits(num=4000, seed=0, scale=0.4, shift=-2.0):
    """Logits that are too flat and too low, labels drawn from the true probabilities, weights."""
    rng = np.random.default_rng(seed)
    true_N = rng.normal(-1.5, 1.2, num)
    return scale * true_N + shift, (rng.random(num) < expit(true_N)).astype(float), rng.choice([1.0, 3.0], num), expit(true_N)


def predict(curve, logit_N):
    return curve(torch.from_numpy(logit_N).float()).sigmoid().double().numpy()


@pytest.mark.parametrize("method", METHODS)
def test_probabilities_add_up_to_the_labels(method):
    logit_N, label_N, weight_N, _ = wrong_logits()
    curve, warning = calibrate(logit_N, label_N, weight_N, CalibrationConfig(method=method))
    assert warning == ""
    assert weight_N @ predict(curve, logit_N) == pytest.approx(weight_N @ label_N, rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_sums_match_on_held_out_examples_in_every_third_of_the_predictions(method):
    logit_N, label_N, weight_N, _ = wrong_logits(20_000)
    curve, _ = calibrate(logit_N, label_N, weight_N, CalibrationConfig(method=method))
    other_N, other_label_N, other_weight_N, true_N = wrong_logits(20_000, seed=1)
    probability_N = predict(curve, other_N)
    for part in np.array_split(np.argsort(other_N), 3):
        assert probability_N[part].mean() == pytest.approx(true_N[part].mean(), rel=0.1)
    assert measure(probability_N, other_label_N, other_weight_N)["calibration"] == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("method", METHODS)
def test_no_two_logits_become_equal(method):
    logit_N, label_N, weight_N, _ = wrong_logits(500)
    curve, _ = calibrate(logit_N, label_N, weight_N, CalibrationConfig(method=method))
    grid = torch.linspace(-8, 4, 500)
    assert (curve(grid).diff() > 0).all() and curve(grid).isfinite().all()


def test_platt_finds_the_line():
    logit_N, label_N, _, true_N = wrong_logits(40_000)
    curve, _ = calibrate(logit_N, label_N, np.ones_like(label_N), CalibrationConfig())
    np.testing.assert_allclose(predict(curve, logit_N), true_N, atol=0.03)


def test_few_positives_set_the_level_only():
    logit_N, label_N, weight_N, _ = wrong_logits()
    kept = np.flatnonzero((label_N == 0) | (np.cumsum(label_N) <= 10))
    logit_N, label_N, weight_N = logit_N[kept], label_N[kept], weight_N[kept]
    curve, warning = calibrate(logit_N, label_N, weight_N, CalibrationConfig())
    assert "10 held-out positives" in warning and curve.calibrated_Q[1] - curve.calibrated_Q[0] == pytest.approx(2)
    assert weight_N @ predict(curve, logit_N) == pytest.approx(weight_N @ label_N, rel=1e-5)


def test_a_ranker_that_orders_backwards_predicts_the_mean_and_says_so():
    logit_N, label_N, weight_N, _ = wrong_logits()
    curve, warning = calibrate(-logit_N, label_N, weight_N, CalibrationConfig())
    assert "chance" in warning
    np.testing.assert_allclose(predict(curve, -logit_N), np.average(label_N, weights=weight_N), rtol=1e-5)


def test_a_curve_is_plain_numbers_and_goes_on_straight_outside():
    curve = Curve(*json.loads(json.dumps(Curve((0.0, 1.0, 3.0), (0.0, 2.0, 3.0)))))
    torch.testing.assert_close(curve(torch.tensor([-1.0, 0.5, 2.0, 5.0])), torch.tensor([-2.0, 1.0, 2.5, 4.0]))


def test_measures_by_hand():
    label_N, probability_N = np.array([0.0, 1, 0, 1]), np.array([0.1, 0.3, 0.4, 0.8])
    found = measure(probability_N, label_N, np.ones(4))
    assert found["auc"] == 0.75 and found["calibration"] == pytest.approx(0.8)
    loss = -np.log([0.9, 0.3, 0.6, 0.8]).mean()
    assert found["log_loss"] == pytest.approx(loss) and found["skill"] == pytest.approx(1 - loss / np.log(2))
    assert found["deciles"] == [(0.1, 0.0, 1), (0.3, 1.0, 1), (0.4, 0.0, 1), (0.8, 1.0, 1)]
    weighted = measure(np.array([0.1, 0.3, 0.4]), np.array([0.0, 1, 0]), np.array([1.0, 1, 3]))
    twice = measure(np.array([0.1, 0.3, 0.4, 0.4, 0.4]), np.array([0.0, 1, 0, 0, 0]), np.ones(5))
    assert {key: weighted[key] for key in ("auc", "log_loss", "calibration")} == pytest.approx(
        {key: twice[key] for key in ("auc", "log_loss", "calibration")})
    assert measure(probability_N, np.zeros(4), np.ones(4)) == {}
