"""Events of some users → journeys: request blocks in time order, cut into rows (segments) per split. Pure functions on arrays.

Owns what a model may know when (the prompt of a request is strictly older than it), the splits, and the cutting of long journeys
without losing or repeating a target. All events of a user must come in one call; nothing depends on the order of the events.
Reading logs, hashing and item indices belong to others.
"""

# N events  K requests (blocks)  T tokens of all journeys, end to end  S segments (rows)

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from data_pipeline.events import AD, ORGANIC, event_fingerprint
from gpr_dist.config import Config
from gpr_dist.errors import ConfigError
from gpr_dist.hashing import combine64
from gpr_dist.schema import JOURNEY_SCHEMA, NO_ITEM, Action, TokenType

SPLITS = ("train", "validation", "test")
_TIME_BITS = 33  # events.MAX_TIME; leaves 30 bits for the users of one call


class SplitConfig(Config):
    """Which request belongs to train, validation or test."""

    method: Literal["time", "leave_one_out"] = "time"
    """time: by the dates below; leave_one_out: a user's last request tests, the one before validates; users with fewer than 3 only train"""
    validation_from: datetime | None = None
    """first moment of validation, ISO date or time, UTC; none = no validation split"""
    test_from: datetime | None = None
    """first moment of test, ISO date or time, UTC; none = no test split"""

    @model_validator(mode="after")
    def _check(self) -> "SplitConfig":
        if self.method == "leave_one_out" and (self.validation_from or self.test_from):
            raise ValueError("leave_one_out takes no dates; remove validation_from and test_from, or choose method: time")
        if self.validation_from and self.test_from and _seconds(self.validation_from) > _seconds(self.test_from):
            raise ValueError("validation_from is later than test_from")
        return self


class JourneyConfig(Config):
    """How events become rows of tokens."""

    max_tokens: int = Field(default=512, ge=4)
    """most tokens of a row that are fed to the model (lookahead labels come on top)"""
    context_tokens: int = Field(default=256, ge=0)
    """most tokens of history before the target region of a row (a row-level U comes on top)"""
    lookahead_ads: int = Field(default=7, ge=0)
    """ads after the target region kept as labels of the multi-token heads; number of heads - 1 is enough"""
    user_tokens: Literal["row", "block", "none"] = "row"
    """one U token at the start of each row, of each block, or none; data without user features has none either way"""
    env_tokens: bool = True
    """an E token in every block; data without env features has none either way"""
    max_organic_per_block: int = Field(default=128, ge=0)
    """organic events kept in the prompt of one request, the most recent ones; the others are dropped and counted"""
    min_requests: int = Field(default=1, ge=1)
    """users with fewer requests are left out"""
    split: SplitConfig = SplitConfig()
    """train / validation / test"""

    @model_validator(mode="after")
    def _check(self) -> "JourneyConfig":
        if self.max_organic_per_block + 3 > self.max_tokens:
            raise ValueError(f"max_organic_per_block={self.max_organic_per_block} leaves no room in max_tokens={self.max_tokens} for "
                             f"U, E and one ad; at most {self.max_tokens - 3}")
        if self.context_tokens + 3 > self.max_tokens:
            raise ValueError(f"context_tokens={self.context_tokens} leaves no room in max_tokens={self.max_tokens} for new tokens; "
                             f"at most {self.max_tokens - 3}")
        return self


@dataclass(frozen=True)
class Users:
    """The users of one call: `hashes` uint64 [M] sorted, `ids` their strings, `profiles` int32 [M, F] static feature ids (0 = unknown)."""

    hashes: np.ndarray
    ids: pa.Array
    profiles: np.ndarray


@dataclass
class _Requests:
    """Blocks of all users, sorted by user and time. All arrays [K] unless said otherwise."""

    user: np.ndarray  # row of Users
    time: np.ndarray
    split: np.ndarray  # 0 train, 1 validation, 2 test
    first_ad: np.ndarray  # [K+1] offsets into ads
    ads: np.ndarray  # event numbers in block order
    first_organic: np.ndarray  # [K+1] offsets into organics
    organics: np.ndarray


@dataclass
class _Tokens:
    """All journeys as one run of tokens; block k is tokens start[k]:start[k+1], its ads start at ads_start[k]."""

    start: np.ndarray  # [K+1]
    ads_start: np.ndarray  # [K]
    type: np.ndarray  # [T] uint8
    block: np.ndarray  # [T]
    event: np.ndarray  # [T], -1 at U and E
    time: np.ndarray  # [T]


@dataclass
class _Segments:
    """Rows: tokens context_start:context_end, then target_start:target_end, then `lookahead` ads. All arrays [S].

    context_end < target_start only where a request is larger than a row: its prompt is repeated before each piece of its ads.
    """

    context_start: np.ndarray
    context_end: np.ndarray
    target_start: np.ndarray
    target_end: np.ndarray
    first_ad: np.ndarray  # position, among all ads, of the first ad after the target region
    lookahead: np.ndarray

    def sort_by_start(self) -> "_Segments":
        order = np.argsort(self.target_start, kind="stable")
        return _Segments(**{f.name: getattr(self, f.name)[order] for f in fields(self)})


def build_journeys(events: np.ndarray, items: np.ndarray, users: Users, num_user_features: int, config: JourneyConfig, counts: Counter,
                   tokens_per_batch: int = 1 << 20) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Journeys of JOURNEY_SCHEMA, split by split, users in the order of their hash, rows of a user in time order.

    Args:
        events: structured array [N] of `events.event_dtype`, in any order, all events of every user in it.
        items: catalogue index of each event's item, int32 [N].
        users: every user that occurs. A U token has `users.profiles` first, then the events' user features.
        num_user_features: Fu of the data set; 0 = no U tokens.
        counts: receives how many users, requests and organic events were used or left out, and why.
        tokens_per_batch: size of the batches, which changes nothing in their content.
    Raises: ConfigError when rows would have neither U, E nor history, so that targets were lost.
    """
    requests = _find_requests(events, users, config, counts)
    if not len(requests.time):
        return
    user_tokens = config.user_tokens if num_user_features else "none"
    env_tokens = config.env_tokens and events["env_features"].shape[1] > 0
    if user_tokens == "none" and not env_tokens and config.context_tokens == 0:
        raise ConfigError("journeys.context_tokens=0 with neither U nor E tokens: the first ad of a row has no token to be predicted from "
                          "and would be lost as a target; set context_tokens to at least 1")
    tokens = _lay_out(events, requests, user_tokens == "block", env_tokens)
    for split, name in enumerate(SPLITS):
        segments = _cut(requests, tokens, split, config, row_prefix=int(user_tokens == "row"))
        for first, last in _chunks(segments, tokens_per_batch):
            yield name, _to_rows(events, items, users, requests, tokens, segments, slice(first, last), user_tokens)


def split_of(time: np.ndarray, config: SplitConfig) -> np.ndarray:
    """Split (index into SPLITS) of requests at these times, for the time method."""
    split = np.zeros(len(time), np.int8)
    if config.validation_from is not None:
        split[time >= _seconds(config.validation_from)] = 1
    if config.test_from is not None:
        split[time >= _seconds(config.test_from)] = 2
    return split


def _find_requests(events: np.ndarray, users: Users, config: JourneyConfig, counts: Counter) -> _Requests:
    user = np.searchsorted(users.hashes, events["user"])
    assert len(users.hashes) < 1 << 63 - _TIME_BITS, len(users.hashes)
    assert not len(user) or (users.hashes[np.minimum(user, len(users.hashes) - 1)] == events["user"]).all(), "event of an unknown user"
    tie = combine64(events["user"], events["timestamp"], events["item"])
    fingerprint = event_fingerprint(events)

    ads = np.flatnonzero(events["kind"] == AD)
    key = np.where(events["request"][ads] != 0, events["request"][ads], combine64(events["timestamp"][ads]))
    ads_by_request = np.lexsort((events["timestamp"][ads], key, user[ads]))
    ads, key = ads[ads_by_request], key[ads_by_request]
    is_first = _changes(user[ads], key)
    request_of_ad = np.cumsum(is_first) - 1
    head = np.flatnonzero(is_first)
    r_user, r_time = user[ads[head]], events["timestamp"][ads[head]]  # the time of a request is that of its earliest ad
    counts["users without a request"] += len(users.hashes) - len(np.unique(r_user))

    num_requests = np.bincount(r_user, minlength=len(users.hashes))
    enough = num_requests[r_user] >= config.min_requests
    counts["users with fewer than min_requests"] += int(((num_requests > 0) & (num_requests < config.min_requests)).sum())
    order = np.lexsort((key[head], r_time, r_user))
    order = order[enough[order]]
    block_of_request = np.full(len(head), -1)
    block_of_request[order] = np.arange(len(order))
    r_user, r_time = r_user[order], r_time[order]
    counts["users"] += len(np.unique(r_user))
    counts["requests"] += len(order)

    block_of_ad = block_of_request[request_of_ad]
    ads, block_of_ad = ads[block_of_ad >= 0], block_of_ad[block_of_ad >= 0]
    in_block = np.lexsort((fingerprint[ads], tie[ads], block_of_ad))
    ads, block_of_ad = ads[in_block], block_of_ad[in_block]

    organics = np.flatnonzero(events["kind"] == ORGANIC)
    moment = (r_user.astype(np.int64) << _TIME_BITS) + r_time
    own = (user[organics].astype(np.int64) << _TIME_BITS) + events["timestamp"][organics]
    block = np.searchsorted(moment, own, side="right")  # the first request strictly later ...
    known = block < len(moment)
    known[known] = r_user[block[known]] == user[organics[known]]  # ... of the same user
    counts["organic events after the last request"] += int((~known).sum())
    organics, block = organics[known], block[known]
    order = np.lexsort((fingerprint[organics], tie[organics], events["timestamp"][organics], block))
    organics, block = organics[order], block[order]
    from_end = np.searchsorted(block, block, side="right") - np.arange(len(block))
    recent = from_end <= config.max_organic_per_block
    counts["organic events beyond max_organic_per_block"] += int((~recent).sum())
    organics, block = organics[recent], block[recent]

    split = split_of(r_time, config.split)
    if config.split.method == "leave_one_out":
        left = np.searchsorted(r_user, r_user, side="right") - np.arange(len(r_user))  # 1 = the user's last request
        split = np.where((left <= 2) & (np.bincount(r_user)[r_user] >= 3), 3 - left, 0).astype(np.int8)
    return _Requests(r_user, r_time, split, _offsets(block_of_ad, len(r_time)), ads, _offsets(block, len(r_time)), organics)


def _lay_out(events: np.ndarray, requests: _Requests, block_u: bool, block_e: bool) -> _Tokens:
    num_organics, num_ads = np.diff(requests.first_organic), np.diff(requests.first_ad)
    prompt = block_u + num_organics + block_e
    start = np.concatenate([[0], np.cumsum(prompt + num_ads)])
    ads_start = start[:-1] + prompt
    block = np.repeat(np.arange(len(num_ads)), prompt + num_ads)
    kind = np.full(start[-1], TokenType.U, np.uint8)
    event = np.full(start[-1], -1)
    organic_at = np.repeat(start[:-1] + block_u - requests.first_organic[:-1], num_organics) + np.arange(len(requests.organics))
    ad_at = np.repeat(ads_start - requests.first_ad[:-1], num_ads) + np.arange(len(requests.ads))
    kind[organic_at], event[organic_at] = TokenType.O, requests.organics
    kind[ad_at], event[ad_at] = TokenType.I, requests.ads
    time = requests.time[block]  # ads and E carry the time of the request
    time[organic_at] = events["timestamp"][requests.organics]
    if block_e:
        kind[ads_start - 1] = TokenType.E
    if block_u:
        time[start[:-1]] = time[start[:-1] + 1]  # U opens the block: the time of what follows
    return _Tokens(start, ads_start, kind, block, event, time)


def _cut(requests: _Requests, tokens: _Tokens, split: int, config: JourneyConfig, row_prefix: int) -> _Segments:
    """Cut each user's requests of a split into rows.

    A row takes as much history as allowed (whole blocks; if not even the last block fits, its end), then as many new blocks as fit.
    A request that does not fit into a row even without history is cut into pieces of its ads; each piece is a row's first unit and
    sees the request's whole prompt again, but none of the other pieces' ads.
    """
    room = config.max_tokens - row_prefix
    reserve = int(row_prefix == 0 and config.context_tokens > 0)  # without a U, an ad needs one token before it to be predicted from
    mine = np.flatnonzero(requests.split == split)
    prompt = (tokens.ads_start - tokens.start[:-1])[mine]
    num_ads = np.diff(requests.first_ad)[mine]
    per_piece = np.where(prompt + num_ads <= room - reserve * (prompt == 0), num_ads, room - prompt - reserve * (prompt == 0))
    num_pieces = -(-num_ads // per_piece)
    unit_block = np.repeat(mine, num_pieces)
    piece = np.arange(len(unit_block)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    ads_start = tokens.ads_start[unit_block] + piece * np.repeat(per_piece, num_pieces)
    unit_start = np.where(piece == 0, tokens.start[unit_block], ads_start)
    unit_end = np.minimum(ads_start + np.repeat(per_piece, num_pieces), tokens.start[unit_block + 1])
    repeated = np.where(piece > 0, np.repeat(prompt, num_pieces), 0)  # prompt tokens shown again before a later piece
    unit_size = unit_end - unit_start
    filled = np.concatenate([[0], np.cumsum(unit_size)])
    # A row must stop before a later piece of a request, and after the last unit of a user.
    user = requests.user[unit_block]
    stops = np.flatnonzero(np.append((piece > 0) | _changes(user), True))
    first_block = np.searchsorted(requests.user, requests.user)  # of the user, per block
    rows = []
    current = np.flatnonzero(_changes(user))
    while len(current):  # one pass cuts the next row of every user
        block = unit_block[current]
        journey_start = tokens.start[first_block[block]]
        history = np.minimum(config.context_tokens, room - unit_size[current] - repeated[current])
        wanted = np.maximum(tokens.start[block] - history, journey_start)
        whole = tokens.start[np.searchsorted(tokens.start, wanted)]
        context_start = np.where(whole < tokens.start[block], whole, wanted)
        left = room - (tokens.start[block] - context_start) - repeated[current]
        stop = stops[np.searchsorted(stops, current, side="right")]
        following = np.clip(np.searchsorted(filled, filled[current] + left, side="right") - 1, current + 1, stop)
        context_end = np.where(piece[current] > 0, tokens.ads_start[block], unit_start[current])
        rows.append(np.stack([context_start, context_end, unit_start[current], unit_end[following - 1]]))
        current = following[(following < len(user)) & (user[np.minimum(following, len(user) - 1)] == user[current])]
    context_start, context_end, target_start, target_end = np.concatenate(rows, axis=1) if rows else np.zeros((4, 0), np.int64)
    ads_before = np.concatenate([[0], np.cumsum(tokens.type == TokenType.I)])
    first_ad = ads_before[target_end]
    last_block_of = np.zeros(len(requests.user), np.int64)  # last block of the same user and split, per block
    last_block_of[mine] = mine[np.searchsorted(requests.user[mine], requests.user[mine], side="right") - 1]
    last_ad = requests.first_ad[last_block_of[tokens.block[target_start]] + 1]
    lookahead = np.minimum(config.lookahead_ads, last_ad - first_ad)
    return _Segments(context_start, context_end, target_start, target_end, first_ad, lookahead).sort_by_start()


def _to_rows(events: np.ndarray, items: np.ndarray, users: Users, requests: _Requests, tokens: _Tokens, segments: _Segments, rows: slice,
             user_tokens: str) -> pa.RecordBatch:
    context_start, context_end = segments.context_start[rows], segments.context_end[rows]
    target_start, target_end, lookahead = segments.target_start[rows], segments.target_end[rows], segments.lookahead[rows]
    num_rows, prefix = len(context_start), int(user_tokens == "row")
    ad_token = np.flatnonzero(tokens.type == TokenType.I) if lookahead.any() else np.zeros(0, np.int64)
    target_block = tokens.block[target_start]
    # Three runs of tokens per row, one after another: history, target region, lookahead; a row-level U stands before them.
    lengths = np.stack([context_end - context_start, target_end - target_start, lookahead], axis=1)
    starts = np.stack([context_start, target_start, segments.first_ad[rows]], axis=1)
    index = _ranges(starts.ravel(), lengths.ravel())
    part = np.repeat(np.tile(np.arange(3), num_rows), lengths.ravel())
    index[part == 2] = ad_token[index[part == 2]]
    row = np.repeat(np.arange(num_rows), lengths.sum(1))

    block = tokens.block[index]
    first_block = tokens.block[np.where(context_start < context_end, context_start, target_start)]
    last_block = tokens.block[target_end - 1]
    # Lookahead ads of a request that was cut belong to a later row's piece: they count as further blocks.
    goes_on = (target_end < len(tokens.block)) & (tokens.block[np.minimum(target_end, len(tokens.block) - 1)] == last_block)
    shift = goes_on & (lookahead > 0)
    local_block = block - first_block[row] + (shift[row] & (part == 2))
    offsets = np.concatenate([[0], np.cumsum(lengths.sum(1))])
    num_blocks = local_block[offsets[1:] - 1] + 1

    event = tokens.event[index]
    has_event = event >= 0
    event = np.where(has_event, event, 0)
    time = tokens.time[index]
    columns = {
        "token_type": tokens.type[index],
        "block": local_block.astype(np.int32),
        "item": np.where(has_event, items[event], NO_ITEM).astype(np.int32),
        "action": np.where(has_event, events["action"][event], Action.NONE).astype(np.uint8),
        "scene": np.where(has_event, events["scene"][event], 0).astype(np.int32),
        "timestamp": time,
        "value": np.where(has_event, events["value"][event], np.float32(np.nan)),
        "pctr": np.where(has_event, events["pctr"][event], np.float32(np.nan)),
        "pcvr": np.where(has_event, events["pcvr"][event], np.float32(np.nan)),
    }
    if prefix:  # the first token's time; block 0; no item
        at = offsets[:-1]
        fill = {"token_type": TokenType.U, "block": 0, "item": NO_ITEM, "action": Action.NONE, "scene": 0, "timestamp": time[at],
                "value": np.nan, "pctr": np.nan, "pcvr": np.nan}
        columns = {name: np.insert(values, at, fill[name]) for name, values in columns.items()}
        offsets = offsets + np.arange(num_rows + 1)

    # U shows what was known of the user at its own block (row-level: at the first new block of the row).
    head_event = requests.ads[requests.first_ad[:-1]]
    is_u, is_e = columns["token_type"] == TokenType.U, columns["token_type"] == TokenType.E
    u_block = target_block if prefix else block[is_u]
    u_features = np.concatenate([users.profiles[requests.user[u_block]], events["user_features"][head_event[u_block]]], axis=1)
    e_features = events["env_features"][head_event[block[tokens.type[index] == TokenType.E]]]
    block_row = np.repeat(np.arange(num_rows), num_blocks)
    nth = np.arange(len(block_row)) - np.repeat(np.cumsum(num_blocks) - num_blocks, num_blocks)
    request = first_block[block_row] + nth
    request -= shift[block_row] & (request > last_block[block_row])
    lists = {name: _list_array(values, offsets) for name, values in columns.items()}
    lists["user_features"] = _list_array(u_features.ravel(), _count_offsets(is_u, offsets) * u_features.shape[1])
    lists["env_features"] = _list_array(e_features.ravel(), _count_offsets(is_e, offsets) * e_features.shape[1])
    lists["eligibility"] = _list_array(events["eligibility"][head_event[request]], np.concatenate([[0], np.cumsum(num_blocks)]))
    scalars = {"user_id": users.ids.take(pa.array(requests.user[target_block])),
               "num_context": pa.array((lengths[:, 0] + prefix).astype(np.int32)), "num_lookahead": pa.array(lookahead.astype(np.int32))}
    everything = scalars | lists
    return pa.RecordBatch.from_arrays([everything[name] for name in JOURNEY_SCHEMA.names], schema=JOURNEY_SCHEMA)


def _chunks(segments: _Segments, tokens_per_batch: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of about `tokens_per_batch` tokens."""
    size = segments.context_end - segments.context_start + segments.target_end - segments.target_start + segments.lookahead
    filled = np.cumsum(size)
    first = 0
    while first < len(size):
        before = filled[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(filled, before + tokens_per_batch, side="right")))
        yield first, last
        first = last


def _changes(*keys: np.ndarray) -> np.ndarray:
    """True where a sorted run of equal keys begins."""
    first = np.ones(len(keys[0]), bool)
    if len(first):
        first[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return first


def _offsets(sorted_groups: np.ndarray, num_groups: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(np.bincount(sorted_groups, minlength=num_groups))])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start+1, ... of every run, end to end."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _count_offsets(mask: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(mask)])[offsets]


def _list_array(values: np.ndarray, offsets: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(np.ascontiguousarray(values)))


def _seconds(moment: datetime) -> int:
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
