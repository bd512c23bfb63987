"""Does an order of the shown ads agree with what they were worth: nDCG and OPR against final_value (GPR Table 3).

The paper does not define the two; our reading (gpr_spec.md §7): nDCG of a request's candidates ordered by the model, gains = value; OPR
= share of pairs with different values that the model orders alike. In a log the candidates with a known value are the ads that were
shown together, and final_value is the value logged for them.
"""

from typing import NamedTuple

import numpy as np

from gpr_dist.evaluation.journey_log import ranges

# N shown ads with a value  Q requests with two different values  M pairs

PAIRS_PER_CHUNK = 1 << 22


class ValueOrder(NamedTuple):
    """Per request with at least two different values."""

    request_Q: np.ndarray  # int64
    ndcg_Q: np.ndarray  # float64
    agreeing_Q: np.ndarray  # float64 pairs ordered alike, equal scores count one half
    pairs_Q: np.ndarray  # float64 pairs with different values; OPR = sum of agreeing / sum of pairs


def order_by_value(score_N: np.ndarray, value_N: np.ndarray, request_N: np.ndarray) -> ValueOrder:
    """Compare an order with the values, request by request.

    Ads with equal scores count as their mean over all orders of them, so that a ranker gains nothing from ties.

    Args:
        score_N: larger = earlier; -inf is allowed. value_N: finite; below 0 counts as 0 in the gains. request_N: ascending.
    """
    starts = np.flatnonzero(np.r_[True, request_N[1:] != request_N[:-1]]) if len(request_N) else np.zeros(0, dtype=np.int64)
    ends = np.append(starts[1:], len(request_N))
    agreeing, pairs = _count_pairs(score_N, value_N, starts, ends)
    kept = pairs > 0
    place_N = np.arange(len(request_N)) - np.repeat(starts, ends - starts)
    discount_N = 1 / np.log2(place_N + 2.0)
    gain_N = np.maximum(value_N, 0)
    by_score = np.lexsort((-score_N, request_N))
    is_new = np.ones(len(by_score), dtype=bool)  # another request or another score
    is_new[1:] = (request_N[by_score][1:] != request_N[by_score][:-1]) | (score_N[by_score][1:] != score_N[by_score][:-1])
    tie = np.cumsum(is_new) - 1
    mean_discount = np.bincount(tie, discount_N) / np.bincount(tie) if len(tie) else np.zeros(0)
    dcg = np.add.reduceat(gain_N[by_score] * mean_discount[tie], starts) if len(starts) else np.zeros(0)
    ideal = np.add.reduceat(gain_N[np.lexsort((-gain_N, request_N))] * discount_N, starts) if len(starts) else np.zeros(0)
    kept &= ideal > 0
    return ValueOrder(request_N[starts][kept], dcg[kept] / ideal[kept], agreeing[kept], pairs[kept])


def _count_pairs(score_N: np.ndarray, value_N: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each request: pairs with a larger and a smaller value that the score orders alike, and all of them."""
    agreeing, pairs = np.zeros(len(starts)), np.zeros(len(starts))
    size = (ends - starts) ** 2
    chunk_of = np.cumsum(size) // PAIRS_PER_CHUNK
    for chunk in np.unique(chunk_of):
        of_chunk = np.flatnonzero(chunk_of == chunk)
        owner, better = ranges(starts[of_chunk], ends[of_chunk])
        pair_of, worse_M = ranges(starts[of_chunk][owner], ends[of_chunk][owner])
        better_M, owner_M = better[pair_of], owner[pair_of]
        counts = value_N[better_M] > value_N[worse_M]
        better_M, worse_M, owner_M = better_M[counts], worse_M[counts], owner_M[counts]
        alike = (score_N[better_M] > score_N[worse_M]) + 0.5 * (score_N[better_M] == score_N[worse_M])
        agreeing[of_chunk] += np.bincount(owner_M, alike, minlength=len(of_chunk))
        pairs[of_chunk] += np.bincount(owner_M, minlength=len(of_chunk))
    return agreeing, pairs
