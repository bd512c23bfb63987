"""What a model must beat: popularity, personal frequency, and a first-order Markov chain, under the model's eligibility.

Owns ranking every request of one split with what was known strictly before it. Counts shared by all users come from the earlier splits
only (with leave-one-out splits those may hold other users' later events, as in the published protocols). The events are
journey_log.py's, a trained baseline is sasrec.py's.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
from pydantic import Field
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.evaluation.journey_log import JourneyLog, Lists, ranges

# X events  R requests  r requests scored together  I catalogue items  E eligible items, most popular first  M gathered entries

SCORES_PER_CHUNK = 1 << 23  # r x E scores held at once
DAY_S = 86_400
TINY = 1e-30

ScoreRequests = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(request numbers [r], eligible items [E], column of each catalogue item or -1) -> masses >= 0 [r, E], float64; a ranker's probability
of an item is its share of the row. Equal masses are ordered by popularity."""


class Ranking(NamedTuple):
    """The first K items of every request under one ranker, best first."""

    item_RK: np.ndarray  # int32 catalogue indices, -1 where the list ends
    score_RK: np.ndarray  # float32 log-probabilities among the candidates, nats; -inf where the list ends


class BaselineConfig(Config):
    """Weights of the baselines. Popularity = ad events + recent_weight x recent ad events + organic_weight x all events."""

    recent_weight: float = Field(3.0, ge=0)
    """additional weight of an ad event of the last recent_days before the evaluated split, dimensionless"""
    recent_days: float = Field(28.0, ge=0)
    """length of the recent period, days"""
    organic_weight: float = Field(0.1, ge=0)
    """additional weight of every event, ad or organic, dimensionless"""
    markov_smoothing: float = Field(300.0, gt=0)
    """pseudo-transitions from every item, distributed like popularity; chosen on November of The Complete Journey"""
    markov_items: int = Field(64, ge=1)
    """at most so many items of the user's last earlier moment predict the next ad"""
    personal_smoothing: float = Field(0.1, gt=0, lt=1)
    """pseudo-events of every user, distributed like popularity: what personal frequency gives to items the user has not met, and less than
    one event, so that those come after all others"""


def popularity(log: JourneyLog, num_items: int, config: BaselineConfig) -> np.ndarray:
    """Weighted event counts of each catalogue item before the evaluated split, float64 [num_items]; also an item's weight in its leaf."""
    counted = log.is_counted_X
    item, is_ad, time = log.item_X[counted], log.is_ad_X[counted], log.time_X[counted]
    is_recent = time > time.max(initial=0) - config.recent_days * DAY_S
    return weigh_counts(np.stack([np.bincount(x, minlength=num_items) for x in (item, item[is_ad], item[is_ad & is_recent])]), config)


def weigh_counts(counts_3I: np.ndarray, config: BaselineConfig) -> np.ndarray:
    """Popularity of each item from its events, ads and recent ads, float64 [num_items]."""
    return np.array([config.organic_weight, 1.0, config.recent_weight]) @ counts_3I


def popularity_scorer(log: JourneyLog, popularity_I: np.ndarray, config: BaselineConfig) -> ScoreRequests:
    """Probability in proportion to popularity."""
    return lambda rows, items_E, _: np.broadcast_to(popularity_I[items_E] + 1e-9, (len(rows), len(items_E)))


def personal_scorer(log: JourneyLog, popularity_I: np.ndarray, config: BaselineConfig) -> ScoreRequests:
    """By how often the user met an item (as an ad or organically) before the request, then by popularity."""
    first_R, end_R = log.histories
    share_I = popularity_I / max(popularity_I.sum(), 1e-300)

    def score(rows: np.ndarray, items_E: np.ndarray, column_of_item: np.ndarray) -> np.ndarray:
        owner_M, event_M = ranges(first_R[rows], end_R[rows])
        met_rE = _add_up(owner_M, column_of_item[log.item_X[event_M]], None, len(rows), len(items_E))
        return met_rE + config.personal_smoothing * share_I[items_E]

    return score


def markov_scorer(log: JourneyLog, popularity_I: np.ndarray, config: BaselineConfig) -> ScoreRequests:
    """First-order transitions from the user's last items, smoothed by popularity.

    The predecessors of a request are the user's items at the last moment strictly before it. With n(p, i) the transitions from p to
    an ad i counted in the earlier splits, n(p) their sum, a the smoothing and q the share of popularity, an item scores
    sum_p (n(p, i) + a q(i)) / (n(p) + a); popularity alone without predecessors.
    """
    num_items = len(popularity_I)
    share_I = popularity_I / max(popularity_I.sum(), 1e-300)
    offset_I, next_item, count = _count_transitions(log, num_items, config)
    total_I = np.diff(np.append(0, np.cumsum(count))[offset_I])
    first_R, end_R = log.last_items(*log.histories, config.markov_items)

    def score(rows: np.ndarray, items_E: np.ndarray, column_of_item: np.ndarray) -> np.ndarray:
        owner_M, event_M = ranges(first_R[rows], end_R[rows])
        item_M = log.item_X[event_M]
        back_off_r = np.bincount(owner_M, config.markov_smoothing / (total_I[item_M] + config.markov_smoothing), minlength=len(rows))
        back_off_r[end_R[rows] == first_R[rows]] = 1.0
        pair_M, transition_M = ranges(offset_I[item_M], offset_I[item_M + 1])
        probability_M = count[transition_M] / (total_I[item_M] + config.markov_smoothing)[pair_M]
        columns_M = column_of_item[next_item[transition_M]]
        return _add_up(owner_M[pair_M], columns_M, probability_M, len(rows), len(items_E)) + back_off_r[:, None] * share_I[items_E]

    return score


BASELINES: dict[str, Callable[[JourneyLog, np.ndarray, BaselineConfig], ScoreRequests]] = {
    "popularity": popularity_scorer, "personal frequency": personal_scorer, "Markov chain": markov_scorer}


def rank_requests(log: JourneyLog, eligibility: Eligibility, popularity_I: np.ndarray, score: ScoreRequests, k: int,
                  seen: Lists | None = None, label: str | None = None) -> Ranking:
    """Rank the eligible items of every request, one eligibility group after the other.

    Args:
        seen: of every request, items taken from its candidates; none = all eligible items are candidates.
        label: of the progress bar; none = no bar.
    """
    place_I = np.empty(len(popularity_I), dtype=np.int64)
    place_I[np.argsort(-popularity_I, kind="stable")] = np.arange(len(popularity_I))
    column_of_item = np.full(len(popularity_I), -1, dtype=np.int32)
    ranked = Ranking(np.full((log.num_requests, k), -1, dtype=np.int32), np.full((log.num_requests, k), -np.inf, dtype=np.float32))
    order = np.argsort(log.request_group_R, kind="stable")
    groups, starts = np.unique(log.request_group_R[order], return_index=True)
    with tqdm(total=len(order), desc=label, unit="request", mininterval=0.5, disable=label is None) as bar:
        for group, rows in zip(groups.tolist(), np.split(order, starts[1:]), strict=True):
            items_E = eligibility.items(group)
            items_E = items_E[np.argsort(place_I[items_E])]
            column_of_item[items_E] = np.arange(len(items_E))
            for chunk in np.array_split(rows, -(-len(rows) * len(items_E) // SCORES_PER_CHUNK) or 1):
                mass_rE = score(chunk, items_E, column_of_item)
                if seen is not None:
                    mass_rE = _without(mass_rE, chunk, column_of_item, seen)
                column_rK, mass_rK = _top_columns(mass_rE, k)
                total_r1 = np.maximum(mass_rE, 0).sum(axis=1, keepdims=True)
                log_share_rK = np.log(np.maximum(mass_rK, TINY)) - np.log(np.maximum(total_r1, TINY))
                is_candidate, width = mass_rK >= 0, column_rK.shape[1]
                ranked.item_RK[chunk, :width] = np.where(is_candidate, items_E[column_rK], -1)
                ranked.score_RK[chunk, :width] = np.where(is_candidate, log_share_rK, -np.inf)
            column_of_item[items_E] = -1
            bar.update(len(rows))
    return ranked


def rank_baselines(names: tuple[str, ...], log: JourneyLog, eligibility: Eligibility, popularity_I: np.ndarray, config: BaselineConfig,
                   k: int, seen: Lists | None = None, progress: bool = True) -> dict[str, Ranking]:
    """Rankings of baselines of `BASELINES`, by name."""
    rank = partial(rank_requests, log, eligibility, popularity_I, k=k, seen=seen)
    return {name: rank(BASELINES[name](log, popularity_I, config), label=name if progress else None) for name in names}


def _count_transitions(log: JourneyLog, num_items: int, config: BaselineConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR of the counted ad events by predecessor: (offset [num_items + 1], next item, count)."""
    ad_X = np.flatnonzero(log.is_ad_X & log.is_counted_X)
    moment_X, _ = log.moments
    end = np.searchsorted(moment_X, moment_X[ad_X])
    first, end = log.last_items(np.searchsorted(log.user_X, log.user_X[ad_X]), end, config.markov_items)
    owner_M, event_M = ranges(first, end)
    pairs, count = np.unique(log.item_X[event_M].astype(np.int64) * num_items + log.item_X[ad_X[owner_M]], return_counts=True)
    return np.searchsorted(pairs, np.arange(num_items + 1) * num_items), pairs % num_items, count


def _without(mass_rE: np.ndarray, rows: np.ndarray, column_of_item: np.ndarray, seen: Lists) -> np.ndarray:
    """A copy with the mass -1 at seen items, which are no candidates."""
    owner_M, entry_M = ranges(seen.offset_R1[rows], seen.offset_R1[rows + 1])
    column_M = column_of_item[seen.item_M[entry_M]]
    kept = column_M >= 0
    mass_rE = np.array(mass_rE)
    mass_rE[owner_M[kept], column_M[kept]] = -1
    return mass_rE


def _top_columns(score_rE: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k largest scores (all of them if E < k), best first, equal scores in column order: (columns int64, scores), [r, min(k, E)]."""
    num_rows, width = score_rE.shape
    if k < width:
        threshold_r1 = np.partition(score_rE, width - k, axis=1)[:, width - k, None]
        above_rE, level_rE = score_rE > threshold_r1, score_rE == threshold_r1
        room_r1 = k - above_rE.sum(axis=1, keepdims=True)
        chosen_rE = above_rE | (level_rE & (np.cumsum(level_rE, axis=1) <= room_r1))
        column_rK = np.nonzero(chosen_rE)[1].reshape(num_rows, k)
    else:
        column_rK = np.broadcast_to(np.arange(width), (num_rows, width))
    score_rK = np.take_along_axis(score_rE, column_rK, axis=1)
    order_rK = np.argsort(-score_rK, axis=1, kind="stable")
    return np.take_along_axis(column_rK, order_rK, axis=1), np.take_along_axis(score_rK, order_rK, axis=1)


def _add_up(owner_M: np.ndarray, column_M: np.ndarray, weight_M: np.ndarray | None, num_rows: int, width: int) -> np.ndarray:
    """Sum weights (default 1) by owner and column, [num_rows, width]; columns of -1 are not eligible and dropped."""
    kept = column_M >= 0
    weight = None if weight_M is None else weight_M[kept]
    return np.bincount(owner_M[kept] * width + column_M[kept], weight, minlength=num_rows * width).reshape(num_rows, width)
