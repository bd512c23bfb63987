"""Is the value head right? Its predictions calibrated on one split and compared with the logged values of a later one.

The head regresses log1p of the value, whose mean is not the log of the mean; an isotonic regression on the validation split turns each
level's prediction into an expected value in the log's own units, and keeps the order.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from sklearn.isotonic import IsotonicRegression
from tqdm import tqdm

from gpr_dist.model.gpr import GPROutput
from gpr_dist.schema import Batch, Candidates

# N targets of head 0 whose value was logged  L levels  Q steps of a calibration curve

_DECILES = 10


class Values(NamedTuple):
    """What the head says and what was logged."""

    predicted_NL1: np.ndarray  # float64 [N, L+1], V_0 … V_L, log1p units
    logged_N: np.ndarray  # float64, units of the log


class Calibration(NamedTuple):
    """Expected value as a step-wise linear function of a prediction, rising; outside its range the nearest end."""

    predicted_Q: np.ndarray
    value_Q: np.ndarray

    def __call__(self, predicted: np.ndarray) -> np.ndarray:
        return np.interp(predicted, self.predicted_Q, self.value_Q)


@torch.no_grad()
def predict_values(model: Callable[[Batch], GPROutput], batches: Iterable[Batch], device: torch.device) -> Values:
    """V_0 … V_L of every ad that was shown (head 0), given the codes it has, where its value was logged."""
    predicted, logged = [], []
    for batch in tqdm(batches, desc="values", unit="batch", mininterval=0.5):
        keep_N = (batch.target_head_N == 0) & batch.target_value_N.isfinite()
        if not keep_N.any():
            continue
        kept = _with_candidates(batch.keep_targets(keep_N))
        predicted.append(model(kept.to(device)).values_NL1.double().cpu().numpy())
        logged.append(kept.target_value_N.double().numpy())
    return Values(np.concatenate(predicted), np.concatenate(logged)) if predicted else Values(np.zeros((0, 1)), np.zeros(0))


def _with_candidates(batch: Batch) -> Batch:
    """An item head's loss is worked out along with the values; the smallest softmax will do, over the targets themselves."""
    item_C, column_N = torch.unique(batch.target_item_N, return_inverse=True)
    codes_CL = batch.target_codes_NL.new_empty(len(item_C), batch.target_codes_NL.shape[1])
    codes_CL[column_N] = batch.target_codes_NL
    return replace(batch, candidates=Candidates(item_C, codes_CL), target_column_N=column_N)


def calibrate(values: Values) -> list[Calibration]:
    """One curve per level V_0 … V_L; empty when no value was logged."""
    if not len(values.logged_N):
        return []
    curves = []
    for predicted_N in values.predicted_NL1.T:
        fitted = IsotonicRegression(out_of_bounds="clip").fit(predicted_N, values.logged_N)
        curves.append(Calibration(fitted.X_thresholds_, fitted.y_thresholds_))
    return curves


def measure_values(values: Values, curves: list[Calibration], constant: float) -> dict[str, list]:
    """How well calibrated predictions meet the log, per level V_0 … V_L, and V_L by decile of its prediction.

    Args: constant: mean value of the split the curves were fitted on, the baseline of `skill`.
    Returns:
        bias: mean prediction over mean logged value (1 is right). skill: 1 - squared error over that of the constant (0 = no better).
        rank_correlation: Spearman's. deciles: (mean prediction, mean logged value, targets) from the lowest predictions to the highest.
    """
    expected = [curve(predicted_N) for curve, predicted_N in zip(curves, values.predicted_NL1.T, strict=True)]
    error_of_constant = float(np.square(values.logged_N - constant).sum())
    order = np.argsort(expected[-1], kind="stable")
    return {
        "bias": [float(e.mean() / values.logged_N.mean()) for e in expected],
        "skill": [1 - float(np.square(values.logged_N - e).sum()) / error_of_constant for e in expected],
        "rank_correlation": [_spearman(predicted_N, values.logged_N) for predicted_N in values.predicted_NL1.T],
        "deciles": [(float(expected[-1][part].mean()), float(values.logged_N[part].mean()), len(part))
                    for part in np.array_split(order, _DECILES) if len(part)],
    }


def format_values(measured: dict[str, list]) -> str:
    """Two small text tables."""
    levels = zip(measured["bias"], measured["skill"], measured["rank_correlation"], strict=True)
    lines = ["value head, calibrated on validation", "level    bias   skill   rank correlation"]
    lines += [f"V_{level}   {bias:7.3f} {skill:7.3f}   {rank:16.3f}" for level, (bias, skill, rank) in enumerate(levels)]
    lines += ["decile of V_L   predicted      logged"]
    lines += [f"{number:13}   {predicted:9.3f}   {logged:9.3f}" for number, (predicted, logged, _) in enumerate(measured["deciles"], 1)]
    return "\n".join(lines)


def _spearman(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Rank correlation with mean ranks for ties; 0 when one side is constant."""
    ranks = [_ranks(values_N) for values_N in (a_N, b_N)]
    if min(float(r.std()) for r in ranks) == 0:
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])


def _ranks(values_N: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values_N, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
