"""A weighted sum of the probabilities of several rankers' lists, with weights chosen on the validation split.

The sum itself is decoding/mixture.py's. The weights come from a grid over the simplex and then from
moving weight between two rankers while that helps: deterministic, and never on the split that is reported.
"""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from pydantic import Field
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.decoding.mixture import Pooled, mix_lists, pool
from gpr_dist.evaluation.baselines import Ranking
from gpr_dist.evaluation.journey_log import JourneyLog, ranges

# R requests  C rankers  K ranked items  N targets  D distinct (request, item) pairs of all lists, ordered by request  M pairs of N and D

PAIRS_PER_CHUNK = 1 << 22


class MixConfig(Config):
    """How weights are searched."""

    metric: str = "ndcg@10"
    """what is maximised on the validation split: hitr@K or ndcg@K per target"""
    grid: float = Field(0.1, gt=0, le=0.5)
    """step of the weights on the first grid"""
    finest: float = Field(0.02, gt=0)
    """smallest weight moved between two rankers afterwards; moves start at half the grid and are halved"""
    max_requests: int = Field(2000, ge=1)
    """validation requests that are used, the first ones"""


def mix(rankings: Sequence[Ranking], weight_C: Sequence[float], k: int) -> Ranking:
    """The k items with the largest weighted probability of every request; ties go to the smaller item index."""
    return Ranking(*mix_lists(rankings, weight_C, k))


def choose_weights(log: JourneyLog, rankings: Sequence[Ranking], config: MixConfig, progress: bool = True) -> tuple[list[float], float]:
    """The weights that maximise `config.metric` on these requests, adding up to 1, and what they reach.

    Of equally good ones the first in order counts: the grid goes from all weight on the first ranker to all on the last one.
    """
    num_requests = min(log.num_requests, config.max_requests)
    score = _Objective(log, pool(rankings, num_requests), num_requests, config.metric)
    best, reached = None, -1.0
    points = list(_simplex(len(rankings), round(1 / config.grid)))
    for weight_C in tqdm(points, desc="mix", unit="weights", mininterval=0.5, disable=not progress):
        found = score(weight_C)
        if found > reached + 1e-12:
            best, reached = weight_C, found
    step = config.grid / 2
    while step >= config.finest:
        moved = False
        for taken, given in itertools.permutations(range(len(rankings)), 2):
            weight_C = best.copy()
            weight_C[taken], weight_C[given] = weight_C[taken] - step, weight_C[given] + step
            if weight_C[taken] >= -1e-9 and (found := score(weight_C)) > reached + 1e-12:
                best, reached, moved = weight_C, found, True
        step = step if moved else step / 2
    return [round(float(weight), 6) for weight in np.maximum(best, 0)], reached


class _Objective:
    """The metric as a function of the weights: the rank of a target is 1 + the items of its request that score higher."""

    def __init__(self, log: JourneyLog, pooled: Pooled, num_requests: int, metric: str) -> None:
        self._name, _, k = metric.partition("@")
        self._k = int(k)
        inside = np.flatnonzero(log.target_request_N < num_requests)
        self._num_targets = len(inside)
        request_N, item_N = log.target_request_N[inside], log.target_item_N[inside].astype(np.int64)
        width = int(max(pooled.item_D.max(initial=0), item_N.max(initial=0))) + 1
        key_D, key_N = pooled.request_D * width + pooled.item_D, request_N * width + item_N
        entry_N = np.minimum(np.searchsorted(key_D, key_N), max(len(key_D) - 1, 0))
        listed = np.flatnonzero(key_D[entry_N] == key_N) if len(key_D) else np.zeros(0, dtype=np.int64)
        starts = pooled.starts(num_requests)
        self._pooled, self._entry_N = pooled, entry_N[listed]
        self._begin_N, self._end_N = starts[request_N[listed]], starts[request_N[listed] + 1]
        self._chunks = np.array_split(np.arange(len(listed)), max(1, int((self._end_N - self._begin_N).sum()) // PAIRS_PER_CHUNK))
        self._pairs = ranges(self._begin_N, self._end_N) if len(self._chunks) == 1 else None

    def __call__(self, weight_C: np.ndarray) -> float:
        probability_D = self._pooled.probability_DC @ weight_C
        total = sum(self._chunk(probability_D, chunk) for chunk in self._chunks)
        return total / max(self._num_targets, 1)

    def _chunk(self, probability_D: np.ndarray, chunk: np.ndarray) -> float:
        target_M, entry_M = self._pairs if self._pairs is not None else ranges(self._begin_N[chunk], self._end_N[chunk])
        own_n = probability_D[self._entry_N[chunk]]
        other_M = probability_D[entry_M]
        is_before_M = (other_M > own_n[target_M]) | ((other_M == own_n[target_M]) & (entry_M < self._entry_N[chunk][target_M]))
        rank_n = 1 + np.bincount(target_M, is_before_M, minlength=len(chunk))
        hit_n = (rank_n <= self._k) & (own_n > 0)
        return float(hit_n.sum() if self._name == "hitr" else (hit_n / np.log2(rank_n + 1)).sum())


def _simplex(num: int, steps: int) -> Iterator[np.ndarray]:
    """Every way to give `steps` equal shares to `num` rankers."""
    for bars in itertools.combinations(range(steps + num - 1), num - 1):
        counts = np.diff([-1, *bars, steps + num - 1]) - 1
        yield counts[::-1] / steps if num > 1 else np.ones(1)
