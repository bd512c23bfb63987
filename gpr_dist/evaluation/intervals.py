"""How sure a metric and a difference between two rankers are: bootstrap over users.

A user's requests are alike, so users are drawn, not requests; every replicate gives a user a Poisson(1) weight (Chamandy et al. 2012,
"Estimating uncertainty for massive data streams"), which costs one matrix product for all metrics. All rankers share the weights, so
that differences are paired.
"""

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from gpr_dist.config import Config
from gpr_dist.evaluation.measures import Sums

# U groups of users  M metrics  S replicates  A rankers

REPLICATES_PER_CHUNK = 64


class BootstrapConfig(Config):
    """Intervals."""

    replicates: int = Field(1000, ge=20)
    """draws of the users"""
    level: float = Field(0.95, gt=0, lt=1)
    """probability the interval covers; its ends are quantiles of the replicates"""
    seed: int = 0
    """of the draws"""


def replicate(sums: Mapping[str, Sums], config: BootstrapConfig) -> dict[str, np.ndarray]:
    """Every metric under every draw, by ranker, float64 [S, M]; NaN where the draw has nothing to count.

    Args: sums: of each ranker, with the same metrics and denominators.
    """
    first = next(iter(sums.values()))
    assert all(each.names == first.names and np.array_equal(each.denominator_MU, first.denominator_MU) for each in sums.values())
    random = np.random.default_rng(config.seed)
    num_users = first.denominator_MU.shape[1]
    drawn: dict[str, list[np.ndarray]] = {name: [] for name in sums}
    for begin in range(0, config.replicates, REPLICATES_PER_CHUNK):
        weight_SU = random.poisson(1.0, (min(REPLICATES_PER_CHUNK, config.replicates - begin), num_users)).astype(np.float64)
        denominator_SM = weight_SU @ first.denominator_MU.T
        for name, each in sums.items():
            with np.errstate(invalid="ignore", divide="ignore"):
                drawn[name].append(weight_SU @ each.numerator_MU.T / denominator_SM)
    return {name: np.concatenate(parts) for name, parts in drawn.items()}


def interval(drawn_SM: np.ndarray, level: float) -> np.ndarray:
    """Lower and upper end per metric, [2, M]; NaN where no draw has anything to count."""
    tails = [(1 - level) / 2, (1 + level) / 2]
    ends = np.quantile(drawn_SM, tails, axis=0)
    for column in np.flatnonzero(np.isnan(drawn_SM).any(axis=0)):
        finite = drawn_SM[np.isfinite(drawn_SM[:, column]), column]
        ends[:, column] = np.quantile(finite, tails) if len(finite) else np.nan
    return ends
