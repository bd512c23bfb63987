"""A weighted sum of the probabilities of several rankers' lists: p(item) = sum_c w_c p_c(item), 0 for an item that c does not list.

Where the weights come from is `evaluation/mix.py`'s business; what is ranked by them here is also what a bundle answers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# R requests  C rankers  K ranked items  D distinct (request, item) pairs of all lists, ordered by request

Ranked = tuple[np.ndarray, np.ndarray]
"""(item_RK integer, -1 where a list ends; score_RK float log-probabilities in nats), best first."""


class Pooled(NamedTuple):
    """The lists of all rankers as one table."""

    request_D: np.ndarray  # int64, ascending
    item_D: np.ndarray  # int64, ascending within a request
    probability_DC: np.ndarray  # float64, 0 where a ranker does not list the item

    def starts(self, num_requests: int) -> np.ndarray:
        """First entry of each request, int64 [R + 1]."""
        return np.searchsorted(self.request_D, np.arange(num_requests + 1))


def pool(rankings: Sequence[Ranked], num_requests: int | None = None) -> Pooled:
    """Bring the lists of several rankers together. Args: num_requests: only the first so many."""
    parts = []
    for number, (item_RK, score_RK) in enumerate(rankings):
        request, column = np.nonzero(item_RK[:num_requests] >= 0)
        probability = np.exp(score_RK[request, column].astype(np.float64))
        parts.append((request, item_RK[request, column].astype(np.int64), probability, np.full(len(request), number)))
    request, item, probability, ranker = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    width = int(item.max(initial=0)) + 1
    pairs, entry = np.unique(request * width + item, return_inverse=True)
    probability_DC = np.zeros((len(pairs), len(rankings)))
    probability_DC[entry, ranker] = probability
    return Pooled(pairs // width, pairs % width, probability_DC)


def mix_lists(rankings: Sequence[Ranked], weight_C: Sequence[float], k: int) -> Ranked:
    """The k items with the largest weighted probability of every request; ties go to the smaller item index. int32 and float32 [R, k]."""
    num_requests = len(rankings[0][0])
    pooled = pool(rankings)
    probability_D = pooled.probability_DC @ np.asarray(weight_C)
    order = np.lexsort((-probability_D, pooled.request_D))
    starts = pooled.starts(num_requests)
    place = np.arange(len(order)) - starts[pooled.request_D[order]]
    kept = (place < k) & (probability_D[order] > 0)
    item_RK, score_RK = np.full((num_requests, k), -1, np.int32), np.full((num_requests, k), -np.inf, np.float32)
    rows = pooled.request_D[order][kept], place[kept]
    item_RK[rows], score_RK[rows] = pooled.item_D[order][kept], np.log(probability_D[order][kept])
    return item_RK, score_RK
