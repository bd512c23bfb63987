"""Stage 2, value-aware fine-tuning (GPR Eq. 4): how much each target counts in the loss of `mtp_loss`. Pure functions.

What a step knows as a whole, the running means and the mean of its weights over all ranks, is kept by training/value_weights.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gpr_dist.config import Config
from gpr_dist.schema import Action

# N targets  A what the user did with an ad: impression, click, conversion

ACTIONS = ("impression", "click", "conversion")


class VaftConfig(Config):
    """How much the value of an ad counts."""

    weights: Literal["ones", "raw", "clipped"] = "clipped"
    """ones = 1, which is pretraining's loss; raw = the ad's worth (Eq. 4); clipped = weight of the action times worth / its running mean"""
    action_weights: tuple[float, float, float] = (1.0, 2.0, 4.0)
    """clipped: weights of impression, click and conversion, relative to each other (Fig. 4b)"""
    ratio_range: tuple[float, float] = (0.25, 4.0)
    """clipped: least and largest worth, in running means of its action"""
    memory: float = Field(default=0.99, ge=0, lt=1)
    """share of the running means' past that a step keeps, 0..1"""
    maturity_seconds: int = Field(default=0, ge=0)
    """ads shown later than this before the end of the training split are left out, s: their conversions may not be known yet"""

    @model_validator(mode="after")
    def _check(self) -> "VaftConfig":
        low, high = self.ratio_range
        if min(self.action_weights) < 0 or max(self.action_weights) == 0:
            raise ValueError(f"action_weights={list(self.action_weights)} must be >= 0 and not all 0")
        if not 0 <= low <= 1 <= high:
            raise ValueError(f"ratio_range={list(self.ratio_range)} must be 0 <= least <= 1 <= largest")
        return self


@dataclass(frozen=True)
class RunningMeans:
    """Mean worth of each action: sums and counts that fade together, so that rare actions weigh by how often they came."""

    sum_A: Tensor  # float64
    count_A: Tensor  # float64

    @classmethod
    def empty(cls) -> "RunningMeans":
        return cls(torch.zeros(len(ACTIONS), dtype=torch.float64), torch.zeros(len(ACTIONS), dtype=torch.float64))

    def updated(self, sum_A: Tensor, count_A: Tensor, memory: float) -> "RunningMeans":
        """With one step's sums over all ranks; an action that did not occur keeps its mean as it is."""
        keep_A = torch.where(count_A > 0, memory, 1.0)
        return RunningMeans(self.sum_A * keep_A + sum_A, self.count_A * keep_A + count_A)

    @property
    def mean_A(self) -> Tensor:
        """float64, NaN for an action that never had a known worth."""
        return self.sum_A / self.count_A


def action_index(action_N: Tensor) -> Tensor:
    """Place of each target's action in ACTIONS, int64 0..2."""
    return (action_N - int(Action.IMPRESSION)).clamp(0, len(ACTIONS) - 1)


def ad_worth(action_N: Tensor, value_N: Tensor, pctr_N: Tensor, pcvr_N: Tensor, divided_A: Tensor) -> Tensor:
    """The value of what the user did (w^V of Eq. 4 before it is normalised), float64 [N]; NaN where it was not logged.

    eCPM at an impression, eCPM / pCTR at a click, eCPM / (pCTR · pCVR) at a conversion.

    Args:
        value_N, pctr_N, pcvr_N: as logged when the ad was shown; NaN = not logged. Negative values count as 0.
        divided_A: bool, whether this action's value is divided; where not, the value is taken alone.
    """
    kind_N = action_index(action_N)
    chance_N = torch.where(kind_N >= 1, pctr_N.double(), 1.0) * torch.where(kind_N == 2, pcvr_N.double(), 1.0)
    chance_N = torch.where(divided_A[kind_N], chance_N, 1.0)
    worth_N = value_N.double().clamp_min(0) / chance_N
    return torch.where(worth_N.isfinite() & (chance_N > 0), worth_N, torch.nan)


def vaft_weights(action_N: Tensor, worth_N: Tensor, mean_A: Tensor, config: VaftConfig) -> Tensor:
    """w^V of each target up to the step's constant, which makes their mean 1 (GPR, arXiv 2511.10138, Eq. 4); float64 [N], >= 0.

        raw:      w = worth
        clipped:  w = action_weight · clip(worth / mean worth of the action, ratio_range)

    Args:
        worth_N: from `ad_worth`; a target whose worth is not known counts as the mean of its action.
        mean_A: `RunningMeans.mean_A`; where NaN the action's targets count alike (raw: as the mean of the other actions).
    Differs from the paper: it is silent on the normalisation. Raw ratios span 1e1 to 1e5; PAPER.md.
    """
    kind_N = action_index(action_N)
    if config.weights == "ones":
        return torch.ones_like(worth_N)
    if config.weights == "raw":
        anywhere = mean_A.nanmean().nan_to_num(1.0)
        return torch.where(worth_N.isnan(), torch.where(mean_A.isnan(), anywhere, mean_A)[kind_N], worth_N)
    ratio_N = (worth_N / mean_A[kind_N]).nan_to_num(nan=1.0, posinf=config.ratio_range[1])
    return torch.tensor(config.action_weights, dtype=torch.float64)[kind_N] * ratio_N.clamp(*config.ratio_range)
