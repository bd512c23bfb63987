"""From a ranker's logit to a probability: monotone curves fitted on held-out rows, kept as plain numbers, and how good probabilities are.

Owns curves and measures. Curves map logits to logits, piecewise linear and going on with the last slope at either end, so that applying
one needs torch only and keeps the order of candidates.
"""

from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy.special import expit, logit
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor

from gpr_dist.config import Config

# N examples  Q knots of a curve

DECILES = 10
NO_PENALTY = 1e12  # inverse strength of the regularisation
LEVEL_STEPS = 100


class CalibrationConfig(Config):
    """How logits become probabilities."""

    method: Literal["platt", "isotonic"] = "platt"
    """platt: a straight line through the logits. isotonic: any rising curve; needs more held-out examples"""
    min_positives: int = Field(30, ge=1)
    """with fewer held-out positives only the level is matched, not the slope"""


class Curve(NamedTuple):
    """logit -> calibrated logit."""

    raw_Q: tuple[float, ...]  # rising
    calibrated_Q: tuple[float, ...]  # not falling

    def __call__(self, logit_N: Tensor) -> Tensor:
        """Args: logit_N: float32. Returns: calibrated logits, float32."""
        raw_Q, calibrated_Q = (torch.tensor(knots, dtype=torch.float64, device=logit_N.device) for knots in self)
        slope_Q = calibrated_Q.diff() / raw_Q.diff()
        x_N = logit_N.double()
        piece_N = (torch.searchsorted(raw_Q, x_N, right=True) - 1).clamp(0, len(slope_Q) - 1)
        return (calibrated_Q[piece_N] + slope_Q[piece_N] * (x_N - raw_Q[piece_N])).float()


class Calibration(NamedTuple):
    """A fitted curve, and in one line what had to be said about it ("" = nothing)."""

    curve: Curve
    warning: str


def calibrate(logit_N: np.ndarray, label_N: np.ndarray, weight_N: np.ndarray, config: CalibrationConfig) -> Calibration:
    """Fit a curve; over its examples the weighted sums of probabilities and labels are equal.

    Args: logit_N: float64. label_N: 0 or 1, both present. weight_N: >= 0.
    """
    positives = int(label_N.sum())
    if positives < config.min_positives:
        return Calibration(_line(1.0, _level(logit_N, label_N, weight_N)),
                           f"{positives} held-out positives (fewer than {config.min_positives}): only the level is calibrated")
    centre, scale = float(np.average(logit_N, weights=weight_N)), float(logit_N.std()) or 1.0
    fitted = LogisticRegression(C=NO_PENALTY, tol=1e-10, max_iter=1000)
    fitted.fit(((logit_N - centre) / scale)[:, None], label_N, sample_weight=weight_N)
    slope = float(fitted.coef_[0, 0]) / scale
    if slope <= 0:
        return Calibration(_line(0.0, _level(np.zeros_like(logit_N), label_N, weight_N)),
                           "does not order held-out examples better than chance: predicts the mean for every ad")
    if config.method == "platt":
        return Calibration(_line(slope, _level(slope * logit_N, label_N, weight_N)), "")
    return Calibration(_isotonic(logit_N, label_N, weight_N), "")


def measure(probability_N: np.ndarray, label_N: np.ndarray, weight_N: np.ndarray) -> dict[str, Any]:
    """How good probabilities are on examples they were not fitted on; empty when there are none of one class.

    Returns:
        auc: 0.5 = chance. log_loss: nats per example. skill: 1 - log loss over that of the mean label (0 = knows the rate only).
        calibration: mean prediction over mean label (1 is right). deciles: (mean prediction, mean label, examples), lowest first, of
        equal weight. positives, examples.
    """
    if not 0 < label_N.sum() < len(label_N):
        return {}
    rate = float(np.average(label_N, weights=weight_N))
    loss = float(log_loss(label_N, probability_N, sample_weight=weight_N))
    order = np.argsort(probability_N, kind="stable")
    mass = np.cumsum(weight_N[order]) - weight_N[order] / 2
    part = np.minimum((mass / weight_N.sum() * DECILES).astype(int), DECILES - 1)
    groups = [order[part == number] for number in range(DECILES)]
    return {
        "auc": float(roc_auc_score(label_N, probability_N, sample_weight=weight_N)),
        "log_loss": loss,
        "skill": 1 - loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)),
        "calibration": float(np.average(probability_N, weights=weight_N)) / rate,
        "deciles": [(*(float(np.average(x[g], weights=weight_N[g])) for x in (probability_N, label_N)), len(g)) for g in groups if len(g)],
        "positives": int(label_N.sum()),
        "examples": len(label_N),
    }


def _line(slope: float, intercept: float) -> Curve:
    return Curve((-1.0, 1.0), (intercept - slope, intercept + slope))


def _level(logit_N: np.ndarray, label_N: np.ndarray, weight_N: np.ndarray) -> float:
    """b for which the probabilities expit(logit + b) add up to the labels; by bisection."""
    wanted = float(weight_N @ label_N)
    low, high = -60.0 - logit_N.max(), 60.0 - logit_N.min()
    for _ in range(LEVEL_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if weight_N @ expit(logit_N + middle) < wanted else (low, middle)
    return (low + high) / 2


def _isotonic(logit_N: np.ndarray, label_N: np.ndarray, weight_N: np.ndarray) -> Curve:
    """Straight lines between the middles of the isotonic regression's steps: rising everywhere, so that no two candidates become equal."""
    step_N = IsotonicRegression(y_min=0, y_max=1).fit_transform(logit_N, label_N, sample_weight=weight_N)
    _, which_N = np.unique(step_N, return_inverse=True)
    mass_Q = np.bincount(which_N, weight_N)
    raw_Q = np.bincount(which_N, weight_N * logit_N) / mass_Q
    taken_Q = np.bincount(which_N, weight_N * label_N)
    smoothed_Q = logit((taken_Q + 0.5) / (mass_Q + 1))  # a step without a positive is rare, not impossible
    kept = np.flatnonzero(np.append(True, np.diff(np.maximum.accumulate(smoothed_Q)) > 0))
    if len(kept) < 2:
        return _line(1.0, _level(logit_N, label_N, weight_N))
    curve = Curve(tuple(raw_Q[kept].tolist()), tuple(np.maximum.accumulate(smoothed_Q)[kept].tolist()))
    shift = _level(curve(torch.from_numpy(logit_N)).double().numpy(), label_N, weight_N)
    return Curve(curve.raw_Q, tuple(knot + shift for knot in curve.calibrated_Q))
