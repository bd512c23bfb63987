"""What a model must beat: popularity, personal frequency, and a first-order Markov chain, under the model's eligibility.

Owns recovering the events from the journeys and ranking every request of one split with what was known strictly before it. Counts
shared by all users come from the earlier splits only (with leave-one-out splits those may hold other users' later events, as in the
published protocols). Finding and reading the shards is the caller's. All events are held in memory, about 30 bytes each: for a
larger log, hand in a sample of its users.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.errors import DataError
from gpr_dist.evaluation.metrics import ranking_metrics, ranking_sums
from gpr_dist.schema import TokenType

# X events  R requests  N target events  r requests scored together  E eligible items, most popular first  M gathered entries

SPLITS = ("train", "validation", "test")
SCORES_PER_CHUNK = 1 << 23  # r x E scores held at once
DAY_S = 86_400

ScoreRequests = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""(request numbers [r], column of each catalogue item or -1, E) -> scores [r, E]; equal scores are ordered by popularity."""


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


@dataclass
class JourneyLog:
    """The events of all users in (user, time, item) order, and the requests of the evaluated split with their ads."""

    user_X: np.ndarray  # int32
    item_X: np.ndarray  # int32
    time_X: np.ndarray  # int64, seconds
    is_ad_X: np.ndarray  # bool
    is_counted_X: np.ndarray  # bool: of a split before the evaluated one
    request_user_R: np.ndarray  # int32
    request_time_R: np.ndarray  # int64, seconds
    request_group_R: np.ndarray  # int32, eligibility group
    target_request_N: np.ndarray  # int64 into R
    target_item_N: np.ndarray  # int32
    user_ids: np.ndarray  # user_id of each user number


def read_log(batches: Mapping[str, Iterable[pa.RecordBatch]], evaluated: str = "test", max_rows: int | None = None) -> JourneyLog:
    """Recover the events and the requests of split `evaluated` from the journeys of it and of every earlier split.

    Each split lists its own part of a journey once (positions from num_context up to the lookahead), so nothing counts twice.
    Requests without a prediction site have no targets for the model and none here; their events remain history.

    Args:
        batches: split -> record batches of JOURNEY_SCHEMA, e.g. every `ShardReader.read_batch(number)` of its folder, in order.
        max_rows: requests come from the first so many rows of the evaluated split only, as with `iter_once`; none = all.
    Raises: DataError when a split is missing or has no request.
    """
    needed = SPLITS[: SPLITS.index(evaluated) + 1]
    if missing := [split for split in needed if split not in batches]:
        raise DataError(f"baselines on split {evaluated} need the splits {', '.join(needed)}; missing: {', '.join(missing)}")
    user_ids, parts = [], []
    num_rows = num_requests = 0
    for split in needed:
        is_evaluated = split == evaluated
        rows_left = (np.iinfo(np.int64).max if max_rows is None else max_rows) if is_evaluated else 0
        for batch in batches[split]:
            part = _read_batch(batch, not is_evaluated, rows_left, num_rows, num_requests)
            rows_left = max(0, rows_left - batch.num_rows)
            user_ids.append(batch.column("user_id"))
            parts.append(part)
            num_rows, num_requests = num_rows + batch.num_rows, num_requests + len(part["request_row"])
    if not num_requests:
        raise DataError(f"split {evaluated} holds no request with targets; rebuild the shards with another cut")
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    encoded = pa.chunked_array(user_ids, pa.string()).combine_chunks().dictionary_encode()
    user_of_row = encoded.indices.to_numpy()
    user_X = user_of_row[columns["row"]]
    order_X = np.lexsort((columns["item"], columns["time"], user_X))
    return JourneyLog(user_X[order_X], *(columns[name][order_X] for name in ("item", "time", "is_ad", "is_counted")),
                      request_user_R=user_of_row[columns["request_row"]], request_time_R=columns["request_time"],
                      request_group_R=columns["request_group"], target_request_N=columns["target_request"],
                      target_item_N=columns["target_item"], user_ids=encoded.dictionary.to_numpy(zero_copy_only=False))


def popularity(log: JourneyLog, num_items: int, config: BaselineConfig) -> np.ndarray:
    """Weighted event counts of each catalogue item before the evaluated split, float64 [num_items]; also an item's weight in its leaf."""
    counted = log.is_counted_X
    item, is_ad, time = log.item_X[counted], log.is_ad_X[counted], log.time_X[counted]
    is_recent = time > time.max(initial=0) - config.recent_days * DAY_S
    weight = config.organic_weight + is_ad * (1.0 + config.recent_weight * is_recent)
    return np.bincount(item, weights=weight, minlength=num_items)


def rank_by_popularity(log: JourneyLog, eligibility: Eligibility, popularity_I: np.ndarray, k: int, progress: bool = True) -> np.ndarray:
    """The k most popular eligible items of each request, int32 [R, k], -1 where fewer are eligible."""
    return _rank(log, eligibility, popularity_I, lambda rows, _, width: np.zeros((len(rows), width)), k, progress and "popularity")


def rank_by_personal_frequency(log: JourneyLog, eligibility: Eligibility, popularity_I: np.ndarray, k: int,
                               progress: bool = True) -> np.ndarray:
    """Eligible items by how often the user met them (as ads or organically) before the request, then by popularity; int32 [R, k]."""
    first_R, end_R = _histories(log)

    def score(rows: np.ndarray, column_of_item: np.ndarray, width: int) -> np.ndarray:
        owner_M, event_M = _ranges(first_R[rows], end_R[rows])
        return _add_up(owner_M, column_of_item[log.item_X[event_M]], None, len(rows), width)

    return _rank(log, eligibility, popularity_I, score, k, progress and "personal frequency")


def rank_by_markov_chain(log: JourneyLog, eligibility: Eligibility, popularity_I: np.ndarray, config: BaselineConfig, k: int,
                         progress: bool = True) -> np.ndarray:
    """Eligible items by first-order transitions from the user's last items, smoothed by popularity; int32 [R, k].

    The predecessors of a request are the user's items at the last moment strictly before it. With n(p, i) the transitions from p to
    an ad i counted in the earlier splits, n(p) their sum, a the smoothing and q the share of popularity, an item scores
    sum_p (n(p, i) + a q(i)) / (n(p) + a); popularity alone without predecessors.
    """
    num_items = len(popularity_I)
    share_I = popularity_I / max(popularity_I.sum(), 1e-300)
    offset_I, next_item, count = _count_transitions(log, num_items, config)
    total_I = np.diff(np.append(0, np.cumsum(count))[offset_I])
    first_R, end_R = _last_items(log, *_histories(log), config.markov_items)

    def score(rows: np.ndarray, column_of_item: np.ndarray, width: int) -> np.ndarray:
        owner_M, event_M = _ranges(first_R[rows], end_R[rows])
        item_M = log.item_X[event_M]
        back_off_r = np.bincount(owner_M, config.markov_smoothing / (total_I[item_M] + config.markov_smoothing), minlength=len(rows))
        back_off_r[end_R[rows] == first_R[rows]] = 1.0
        pair_M, transition_M = _ranges(offset_I[item_M], offset_I[item_M + 1])
        probability_M = count[transition_M] / (total_I[item_M] + config.markov_smoothing)[pair_M]
        scores_rE = _add_up(owner_M[pair_M], column_of_item[next_item[transition_M]], probability_M, len(rows), width)
        share_E = np.empty(width)
        is_eligible = column_of_item >= 0
        share_E[column_of_item[is_eligible]] = share_I[is_eligible]
        return scores_rE + back_off_r[:, None] * share_E

    return _rank(log, eligibility, popularity_I, score, k, progress and "Markov chain")


def evaluate_baselines(log: JourneyLog, eligibility: Eligibility, num_items: int, config: BaselineConfig,
                       ks: Sequence[int] = (10, 100), progress: bool = True) -> dict[str, dict[str, float]]:
    """HitR@K and NDCG@K of the three baselines on the requests of the log, by name."""
    popularity_I, k = popularity(log, num_items, config), max(ks)
    ranked = {
        "popularity": rank_by_popularity(log, eligibility, popularity_I, k, progress),
        "personal frequency": rank_by_personal_frequency(log, eligibility, popularity_I, k, progress),
        "Markov chain": rank_by_markov_chain(log, eligibility, popularity_I, config, k, progress),
    }
    targets = torch.from_numpy(log.target_request_N), torch.from_numpy(log.target_item_N)
    return {name: ranking_metrics(ranking_sums(torch.from_numpy(ranked_RK), *targets, ks)) for name, ranked_RK in ranked.items()}


def _read_batch(batch: pa.RecordBatch, is_counted: bool, asking_rows: int, first_row: int, first_request: int) -> dict[str, np.ndarray]:
    """The events a batch lists for its split, and the requests of its first `asking_rows` rows; row and request numbers continue."""
    length_B = np.diff(batch.column("item").offsets.to_numpy())
    row_T = np.repeat(np.arange(batch.num_rows), length_B)
    position_T = np.arange(len(row_T)) - (np.cumsum(length_B) - length_B)[row_T]
    type_T, block_T, item_T, time_T = (batch.column(name).flatten().to_numpy() for name in ("token_type", "block", "item", "timestamp"))
    num_context_B, num_lookahead_B = (batch.column(name).to_numpy() for name in ("num_context", "num_lookahead"))
    is_fresh_T = (position_T >= num_context_B[row_T]) & (position_T < (length_B - num_lookahead_B)[row_T])
    is_ad_T = type_T == TokenType.I

    event = np.flatnonzero(is_fresh_T & (is_ad_T | (type_T == TokenType.O)))
    target = np.flatnonzero(is_fresh_T & is_ad_T & (row_T < asking_rows))
    row, block = row_T[target], block_T[target]
    starts = np.ones(len(target), dtype=bool)  # the first ad of a request
    starts[1:] = (row[1:] != row[:-1]) | (block[1:] != block[:-1])
    request = np.cumsum(starts) - 1
    has_site = position_T[target[starts]] > 0
    kept = has_site[request]
    request_row, request_block = row[starts][has_site], block[starts][has_site]
    group_offset_B = batch.column("eligibility").offsets.to_numpy()
    group_offset_B = group_offset_B[:-1] - group_offset_B[0]
    return {
        "row": row_T[event] + first_row,
        "item": item_T[event],
        "time": time_T[event],
        "is_ad": is_ad_T[event],
        "is_counted": np.full(len(event), is_counted),
        "request_row": request_row + first_row,
        "request_time": time_T[target[starts][has_site]],
        "request_group": batch.column("eligibility").flatten().to_numpy()[group_offset_B[request_row] + request_block],
        "target_request": (np.cumsum(has_site) - 1)[request[kept]] + first_request,
        "target_item": item_T[target[kept]],
    }


def _moments(log: JourneyLog) -> tuple[np.ndarray, np.ndarray]:
    """(user, time) as one ascending int64 per event [X], and per request on the same scale [R]."""
    times, rank = np.unique(np.concatenate([log.time_X, log.request_time_R]), return_inverse=True)
    user = np.concatenate([log.user_X, log.request_user_R]).astype(np.int64)
    moment = user * len(times) + rank
    return moment[: len(log.user_X)], moment[len(log.user_X) :]


def _histories(log: JourneyLog) -> tuple[np.ndarray, np.ndarray]:
    """Of each request, the user's events strictly before it: first [R] and end [R] into X."""
    moment_X, moment_R = _moments(log)
    return np.searchsorted(log.user_X, log.request_user_R), np.searchsorted(moment_X, moment_R)


def _last_items(log: JourneyLog, first: np.ndarray, end: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Of histories first:end, the part at the last moment, at most `limit` events (the highest item indices)."""
    moment_X, _ = _moments(log)
    start = np.searchsorted(moment_X, moment_X[np.maximum(end - 1, 0)])
    return np.where(end > first, np.maximum(start, end - limit), end), end


def _count_transitions(log: JourneyLog, num_items: int, config: BaselineConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR of the counted ad events by predecessor: (offset [num_items + 1], next item, count)."""
    ad_X = np.flatnonzero(log.is_ad_X & log.is_counted_X)
    moment_X, _ = _moments(log)
    end = np.searchsorted(moment_X, moment_X[ad_X])
    first, end = _last_items(log, np.searchsorted(log.user_X, log.user_X[ad_X]), end, config.markov_items)
    owner_M, event_M = _ranges(first, end)
    pairs, count = np.unique(log.item_X[event_M].astype(np.int64) * num_items + log.item_X[ad_X[owner_M]], return_counts=True)
    return np.searchsorted(pairs, np.arange(num_items + 1) * num_items), pairs % num_items, count


def _rank(log: JourneyLog, eligibility: Eligibility, popularity_I: np.ndarray, score: ScoreRequests, k: int,
          label: str | bool) -> np.ndarray:
    """Rank the eligible items of every request, one eligibility group after the other; `label` names the progress bar, False = none."""
    place_I = np.empty(len(popularity_I), dtype=np.int64)
    place_I[np.argsort(-popularity_I, kind="stable")] = np.arange(len(popularity_I))
    column_of_item = np.full(len(popularity_I), -1, dtype=np.int32)
    ranked_RK = np.full((len(log.request_user_R), k), -1, dtype=np.int32)
    order = np.argsort(log.request_group_R, kind="stable")
    groups, starts = np.unique(log.request_group_R[order], return_index=True)
    with tqdm(total=len(order), desc=str(label), unit="request", mininterval=0.5, disable=not label) as bar:
        for group, rows in zip(groups.tolist(), np.split(order, starts[1:]), strict=True):
            items_E = eligibility.items(group)
            items_E = items_E[np.argsort(place_I[items_E])]
            column_of_item[items_E] = np.arange(len(items_E))
            for chunk in np.array_split(rows, -(-len(rows) * len(items_E) // SCORES_PER_CHUNK) or 1):
                top_rK = _top_columns(score(chunk, column_of_item, len(items_E)), k)
                ranked_RK[chunk, : top_rK.shape[1]] = items_E[top_rK]
            column_of_item[items_E] = -1
            bar.update(len(rows))
    return ranked_RK


def _top_columns(score_rE: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest scores (all of them if E < k), best first, equal scores in column order; int64 [r, min(k, E)]."""
    num_rows, width = score_rE.shape
    if k < width:
        threshold_r1 = np.partition(score_rE, width - k, axis=1)[:, width - k, None]
        above_rE, level_rE = score_rE > threshold_r1, score_rE == threshold_r1
        room_r1 = k - above_rE.sum(axis=1, keepdims=True)
        chosen_rE = above_rE | (level_rE & (np.cumsum(level_rE, axis=1) <= room_r1))
        column_rK = np.nonzero(chosen_rE)[1].reshape(num_rows, k)
    else:
        column_rK = np.broadcast_to(np.arange(width), (num_rows, width))
    order_rK = np.argsort(-np.take_along_axis(score_rE, column_rK, axis=1), axis=1, kind="stable")
    return np.take_along_axis(column_rK, order_rK, axis=1)


def _ranges(first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The integers of every range first:end one after the other: (which range [M], integer [M])."""
    length = end - first
    owner_M = np.repeat(np.arange(len(length)), length)
    return owner_M, np.arange(len(owner_M)) + (first - np.cumsum(length) + length)[owner_M]


def _add_up(owner_M: np.ndarray, column_M: np.ndarray, weight_M: np.ndarray | None, num_rows: int, width: int) -> np.ndarray:
    """Sum weights (default 1) by owner and column, [num_rows, width]; columns of -1 are not eligible and dropped."""
    kept = column_M >= 0
    weight = None if weight_M is None else weight_M[kept]
    return np.bincount(owner_M[kept] * width + column_M[kept], weight, minlength=num_rows * width).reshape(num_rows, width)
