"""The events and requests of a data set, recovered from its journeys: what baselines count, and what every ranking is measured against.

Owns what was known strictly before a request (the history of its user) and the facts about it that reports are broken down by. Finding
and reading the shards is the caller's. All events are held in memory, about 30 bytes each: for a larger log, hand in a sample of users.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from gpr_dist.errors import DataError
from gpr_dist.schema import TokenType

# X events  R requests  N target events  M gathered entries  F categorical fields

SPLITS = ("train", "validation", "test")


class Lists(NamedTuple):
    """A list of integers per request, end to end."""

    offset_R1: np.ndarray  # int64, request r has entries offset[r]:offset[r + 1]
    item_M: np.ndarray  # int32

    def of(self, first: int, end: int) -> "Lists":
        """Requests first .. end - 1."""
        offset = self.offset_R1[first : end + 1]
        return Lists(offset - offset[0], self.item_M[offset[0] : offset[-1]])

    @property
    def longest(self) -> int:
        return int(np.diff(self.offset_R1).max(initial=0))


@dataclass
class JourneyLog:
    """The events of all users in (user, time, item) order, and the requests of the evaluated split with their ads."""

    user_X: np.ndarray  # int32
    item_X: np.ndarray  # int32
    time_X: np.ndarray  # int64, seconds
    is_ad_X: np.ndarray  # bool
    split_X: np.ndarray  # uint8, position in SPLITS
    evaluated: int  # position in SPLITS
    request_user_R: np.ndarray  # int32
    request_time_R: np.ndarray  # int64, seconds
    request_group_R: np.ndarray  # int32, eligibility group
    user_features_RF: np.ndarray  # int32, of the first U token of the request's row; -1 = none
    env_features_RF: np.ndarray  # int32, of the last E token before the site; -1 = none
    target_request_N: np.ndarray  # int64 into R, ascending
    target_item_N: np.ndarray  # int32
    target_scene_N: np.ndarray  # int32, 0 = unknown
    target_value_N: np.ndarray  # float32, NaN = not logged
    user_ids: np.ndarray  # user_id of each user number

    @property
    def num_requests(self) -> int:
        return len(self.request_user_R)

    @property
    def is_counted_X(self) -> np.ndarray:
        """Events of a split before the evaluated one."""
        return self.split_X < self.evaluated

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """(user, time) as one ascending int64 per event [X], and per request on the same scale [R]."""
        times, rank = np.unique(np.concatenate([self.time_X, self.request_time_R]), return_inverse=True)
        user = np.concatenate([self.user_X, self.request_user_R]).astype(np.int64)
        moment = user * len(times) + rank
        return moment[: len(self.user_X)], moment[len(self.user_X) :]

    @cached_property
    def histories(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each request, the user's events strictly before it: first [R] and end [R] into X."""
        moment_X, moment_R = self.moments
        return np.searchsorted(self.user_X, self.request_user_R), np.searchsorted(moment_X, moment_R)

    def head(self, num_requests: int) -> "JourneyLog":
        """The same events with only the first requests."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        kept = np.searchsorted(self.target_request_N, num_requests)
        return JourneyLog(**{name: value[:num_requests] if name.endswith(("_R", "_RF")) else value[:kept] if name.startswith("target_")
                             else value for name, value in columns.items()})

    def last_items(self, first: np.ndarray, end: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """Of histories first:end, the part at the last moment, at most `limit` events (the highest item indices)."""
        moment_X, _ = self.moments
        start = np.searchsorted(moment_X, moment_X[np.maximum(end - 1, 0)])
        return np.where(end > first, np.maximum(start, end - limit), end), end

    def seen(self) -> Lists:
        """The distinct items of each request's history, ascending: what `exclude_seen` takes from the candidates."""
        first_R, end_R = self.histories
        owner_M, event_M = ranges(first_R, end_R)
        num_items = int(self.item_X.max(initial=-1)) + 1
        pairs = np.unique(owner_M * num_items + self.item_X[event_M])
        offset = np.searchsorted(pairs, np.arange(self.num_requests + 1) * num_items)
        return Lists(offset, (pairs % max(num_items, 1)).astype(np.int32))

    def is_repeat(self) -> np.ndarray:
        """Whether the user met each target's item before the request, bool [N]."""
        user_N = self.request_user_R[self.target_request_N].astype(np.int64)
        num_items = int(max(self.item_X.max(initial=-1), self.target_item_N.max(initial=-1))) + 1
        pair_X = self.user_X.astype(np.int64) * num_items + self.item_X
        order = np.argsort(pair_X, kind="stable")  # by time within a pair, as the log is
        pairs, first = np.unique(pair_X[order], return_index=True)
        pair_N = user_N * num_items + self.target_item_N
        found = np.minimum(np.searchsorted(pairs, pair_N), len(pairs) - 1)
        return (pairs[found] == pair_N) & (self.time_X[order][first[found]] < self.request_time_R[self.target_request_N])


def read_log(batches: Mapping[str, Iterable[pa.RecordBatch]], evaluated: str = "test", max_rows: int | None = None,
             num_features: tuple[int, int] = (0, 0)) -> JourneyLog:
    """Recover the events and the requests of split `evaluated` from the journeys of it and of every earlier split.

    Each split lists its own part of a journey once (positions from num_context up to the lookahead), so nothing counts twice.
    Requests without a prediction site have no targets for the model and none here; their events remain history.

    Args:
        batches: split -> record batches of JOURNEY_SCHEMA, e.g. every `ShardReader.read_batch(number)` of its folder, in order.
        max_rows: requests come from the first so many rows of the evaluated split only, as with `iter_once`; none = all.
        num_features: Fu, Fe of the manifest; (0, 0) leaves the features out.
    Returns: the log; its requests are in the order in which `iter_once` lists them.
    Raises: DataError when a split is missing or has no request.
    """
    needed = SPLITS[: SPLITS.index(evaluated) + 1]
    if missing := [split for split in needed if split not in batches]:
        raise DataError(f"evaluating split {evaluated} needs the splits {', '.join(needed)}; missing: {', '.join(missing)}")
    user_ids, parts = [], []
    num_rows = num_requests = 0
    for number, split in enumerate(needed):
        is_evaluated = split == evaluated
        rows_left = (np.iinfo(np.int64).max if max_rows is None else max_rows) if is_evaluated else 0
        for batch in batches[split]:
            part = _read_batch(batch, number, rows_left, num_rows, num_requests, num_features)
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
    return JourneyLog(user_X[order_X], *(columns[name][order_X] for name in ("item", "time", "is_ad", "split")),
                      evaluated=SPLITS.index(evaluated), request_user_R=user_of_row[columns["request_row"]],
                      request_time_R=columns["request_time"], request_group_R=columns["request_group"],
                      user_features_RF=columns["user_features"], env_features_RF=columns["env_features"],
                      **{f"target_{name}_N": columns[f"target_{name}"] for name in ("request", "item", "scene", "value")},
                      user_ids=encoded.dictionary.to_numpy(zero_copy_only=False))


def _read_batch(batch: pa.RecordBatch, split: int, asking_rows: int, first_row: int, first_request: int,
                num_features: tuple[int, int]) -> dict[str, np.ndarray]:
    """The events a batch lists for its split, and the requests of its first `asking_rows` rows; row and request numbers continue."""
    length_B = np.diff(batch.column("item").offsets.to_numpy())
    row_T = np.repeat(np.arange(batch.num_rows), length_B)
    start_B = np.cumsum(length_B) - length_B
    position_T = np.arange(len(row_T)) - start_B[row_T]
    type_T, block_T, item_T, time_T, scene_T, value_T = (
        batch.column(name).flatten().to_numpy() for name in ("token_type", "block", "item", "timestamp", "scene", "value"))
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
    first_ad = target[starts][has_site]
    request_row, request_block = row[starts][has_site], block[starts][has_site]
    group_offset_B = batch.column("eligibility").offsets.to_numpy()
    group_offset_B = group_offset_B[:-1] - group_offset_B[0]
    return {
        "row": row_T[event] + first_row,
        "item": item_T[event],
        "time": time_T[event],
        "is_ad": is_ad_T[event],
        "split": np.full(len(event), split, dtype=np.uint8),
        "request_row": request_row + first_row,
        "request_time": time_T[first_ad],
        "request_group": batch.column("eligibility").flatten().to_numpy()[group_offset_B[request_row] + request_block],
        "user_features": _features(batch, "user_features", num_features[0], type_T == TokenType.U, start_B[request_row], first_ad, True),
        "env_features": _features(batch, "env_features", num_features[1], type_T == TokenType.E, start_B[request_row], first_ad, False),
        "target_request": (np.cumsum(has_site) - 1)[request[kept]] + first_request,
        "target_item": item_T[target[kept]],
        "target_scene": scene_T[target[kept]],
        "target_value": value_T[target[kept]],
    }


def _features(batch: pa.RecordBatch, name: str, width: int, is_kind_T: np.ndarray, begin_R: np.ndarray, end_R: np.ndarray,
              first: bool) -> np.ndarray:
    """Features of the first or last token of a kind among the tokens begin:end of each request, -1 without one; int32 [R, width]."""
    values = batch.column(name).flatten().to_numpy()
    features_RF = np.full((len(begin_R), width), -1, dtype=np.int32)
    count_T1 = np.concatenate([[0], np.cumsum(is_kind_T)])
    before_R, until_R = count_T1[begin_R], count_T1[end_R]
    found = np.flatnonzero(until_R > before_R)
    if width and len(found):
        features_RF[found] = values.reshape(-1, width)[before_R[found] if first else until_R[found] - 1]
    return features_RF


def ranges(first: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The integers of every range first:end one after the other: (which range [M], integer [M])."""
    length = end - first
    owner_M = np.repeat(np.arange(len(length)), length)
    return owner_M, np.arange(len(owner_M)) + (first - np.cumsum(length) + length)[owner_M]
