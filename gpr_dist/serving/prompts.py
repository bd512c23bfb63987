"""Requests → the tokens the model reads: exactly those that data_pipeline/journeys.py makes of the same events for the same request.

A second, smaller implementation on purpose (serving does not depend on the data pipeline); tests/unit/serving/test_prompts.py holds
it against the first. Owns what is in a prompt and in which order; numpy columns over all requests of a chunk, no Python per event.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from gpr_dist.hashing import combine64, feature_id, hash_strings, time_feature
from gpr_dist.schema import EVERY_AD, NO_ITEM, Action, Batch, TokenType
from gpr_dist.serving.requests import AD_ACTIONS, flat
from gpr_dist.serving.settings import RequestSettings

# R requests  N events of their histories  K blocks (earlier requests and, last of each user, the request itself)  T tokens
# m knowledge vectors  E their width

_ORGANIC, _AD = 0, 1
_TIME_BITS = 33
_KEY_BITS = 31
IndexOf = Callable[[np.ndarray], np.ndarray]
"""hashes of item ids, uint64 -> catalogue indices int32, NO_ITEM where unknown."""


@dataclass
class Prompts:
    """Prompts of R requests end to end; tokens of r are offsets[r]:offsets[r + 1]."""

    offsets: np.ndarray  # int64 [R+1]
    tokens: dict[str, np.ndarray]  # type, block, item, action, scene, timestamp, value; [T]
    user_features: np.ndarray  # int32 [U tokens, Fu]
    env_features: np.ndarray  # int32 [E tokens, Fe]
    time: np.ndarray  # int64 [R]
    key: np.ndarray  # int64 [R], 0..2^31-1, a number of the request wherever it is computed
    knowledge: np.ndarray | None  # float32 [R, m, E], 0 = unknown user
    older_offsets: np.ndarray  # int64 [R+1]
    older: dict[str, np.ndarray] | None  # item, time, action of the events before each prompt, oldest first; None = the model reads none
    skipped: dict[str, np.ndarray] = field(default_factory=dict)  # reason -> int64 [R], events of the history left out

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def batch(self, rows: np.ndarray, codes_ML: np.ndarray) -> Batch:
        """The prompts of `rows`, none of them empty, as a micro-batch without targets; each is predicted from its last token."""
        lengths = self.lengths[rows]
        index = ranges(self.offsets[rows], lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        kind, item = self.tokens["type"][index].astype(np.int64), self.tokens["item"][index].astype(np.int64)
        codes_TL = np.where(item[:, None] >= 0, codes_ML[np.maximum(item, 0)], -1).astype(np.int64)
        sides = {}
        for name, features, token_type in (("user", self.user_features, TokenType.U), ("env", self.env_features, TokenType.E)):
            first = np.concatenate([[0], np.cumsum(self.tokens["type"] == token_type)])
            lo, hi = first[self.offsets[rows]], first[self.offsets[rows + 1]]
            sides[name] = torch.from_numpy(features[ranges(lo, hi - lo)].astype(np.int64))
        past = {}
        if self.older is not None:
            count = np.diff(self.older_offsets)[rows]
            place = ranges(self.older_offsets[rows], count)
            older = {name: torch.from_numpy(values[place].astype(np.int64)) for name, values in self.older.items()}
            past = {"past_offsets_B1": torch.from_numpy(np.concatenate([[0], np.cumsum(count)])), "past_item_X": older["item"],
                    "past_codes_XL": torch.from_numpy(codes_ML[older["item"].numpy()].astype(np.int64)), "past_time_X": older["time"],
                    "past_action_X": older["action"]}
        whole = {name: torch.from_numpy(self.tokens[name][index].astype(np.int64)) for name in ("block", "action", "scene", "timestamp")}
        ids, numbers, codes_NL = torch.zeros(0, dtype=torch.int64), torch.zeros(0), torch.zeros(0, codes_ML.shape[1], dtype=torch.int64)
        return Batch(
            offsets_B1=torch.from_numpy(offsets), row_ids_B=torch.from_numpy(self.key[rows]), token_type_T=torch.from_numpy(kind),
            block_T=whole["block"], item_T=torch.from_numpy(item), codes_TL=torch.from_numpy(codes_TL), action_T=whole["action"],
            scene_T=whole["scene"], timestamp_T=whole["timestamp"],
            value_T=torch.from_numpy(self.tokens["value"][index].astype(np.float32)), user_features_UF=sides["user"],
            env_features_EF=sides["env"], request_token_R=torch.from_numpy(offsets[1:] - 1), request_row_R=torch.arange(len(rows)),
            request_eligibility_R=torch.full((len(rows),), EVERY_AD), request_time_R=torch.from_numpy(self.time[rows]),
            target_request_N=ids, target_head_N=ids, target_item_N=ids, target_codes_NL=codes_NL,
            target_action_N=ids, target_value_N=numbers, target_pctr_N=numbers, target_pcvr_N=numbers,
            knowledge_BmE=None if self.knowledge is None else torch.from_numpy(self.knowledge[rows]), **past)


def build_prompts(requests: pa.RecordBatch, settings: RequestSettings, index_of: IndexOf) -> Prompts:
    """Args: requests: well-formed, of `request_schema`. Items the catalogue does not have are left out and counted."""
    num_requests = requests.num_rows
    time = requests["time"].to_numpy(zero_copy_only=False).astype(np.int64)
    name = hash_strings(requests["id"])
    key = np.where(name != 0, name, combine64(time))
    user = hash_strings(requests["user"])
    own = _features(requests, settings, pa.array(time))
    events, owner = _read_events(requests, settings, user)

    skipped = {}

    def drop(reason: str, wrong: np.ndarray) -> None:
        nonlocal events, owner
        skipped[reason] = np.bincount(owner[wrong], minlength=num_requests)
        events, owner = {n: values[~wrong] for n, values in events.items()}, owner[~wrong]

    events["index"] = index_of(events["item"])
    drop("unknown_items", events["index"] == NO_ITEM)
    is_ad = events["kind"] == _AD
    drop("not_before_the_request", np.where(is_ad, False, events["timestamp"] >= time[owner]))
    is_ad = events["kind"] == _AD

    # Earlier requests: ads by their request, in the order of time; the request itself comes last.
    ads = np.flatnonzero(is_ad)
    ads = ads[np.lexsort((events["timestamp"][ads], events["key"][ads], owner[ads]))]
    is_first = _changes(owner[ads], events["key"][ads])
    head = ads[is_first]
    earlier = (events["timestamp"][head] < time[owner[head]]) | ((events["timestamp"][head] == time[owner[head]])
                                                                & (events["key"][head] < key[owner[head]]))
    earlier &= events["key"][head] != key[owner[head]]
    of_ad = np.cumsum(is_first) - 1
    late = ads[~earlier[of_ad]]
    skipped["not_before_the_request"] += np.bincount(owner[late], minlength=num_requests)
    ads, of_ad = ads[earlier[of_ad]], (np.cumsum(earlier) - 1)[of_ad[earlier[of_ad]]]
    head = head[earlier]
    block_owner = np.concatenate([owner[head], np.arange(num_requests)])
    block_time = np.concatenate([events["timestamp"][head], time])
    is_own = np.repeat([False, True], [len(head), num_requests])
    order = np.lexsort((np.concatenate([events["key"][head], key]), is_own, block_time, block_owner))
    block_owner, block_time, is_own = block_owner[order], block_time[order], is_own[order]
    block_of = np.empty(len(order), np.int64)
    block_of[order] = np.arange(len(order))
    ads, ad_block = _sorted(ads, block_of[of_ad], [events["fingerprint"][ads], events["tie"][ads]])

    organics = np.flatnonzero(~is_ad)
    moment = (block_owner << _TIME_BITS) + block_time
    block = np.searchsorted(moment, (owner[organics] << _TIME_BITS) + events["timestamp"][organics], side="right")
    keys = [events[n][organics] for n in ("fingerprint", "tie", "timestamp")]
    organics, block = _sorted(organics, block, keys)
    from_end = np.searchsorted(block, block, side="right") - np.arange(len(block))
    recent = from_end <= settings.max_organic_per_block
    skipped["beyond_max_organic_per_block"] = np.bincount(owner[organics[~recent]], minlength=num_requests)
    organics, block = organics[recent], block[recent]

    # Lay out: [U] organics [E] ads of every block; the request's own block ends where its ads would begin.
    num_blocks = len(block_owner)
    block_u, block_e = int(settings.user_tokens == "block" and bool(settings.user_features)), int(settings.env_tokens)
    num_organics, num_ads = np.bincount(block, minlength=num_blocks), np.bincount(ad_block, minlength=num_blocks)
    prompt = block_u + num_organics + block_e
    start = np.concatenate([[0], np.cumsum(prompt + num_ads)])
    token_block = np.repeat(np.arange(num_blocks), prompt + num_ads)
    kind, event = np.full(start[-1], TokenType.U, np.uint8), np.full(start[-1], -1)
    organic_at = start[block] + block_u + _rank(block)
    ad_at = start[ad_block] + prompt[ad_block] + _rank(ad_block)
    kind[organic_at], event[organic_at], kind[ad_at], event[ad_at] = TokenType.O, organics, TokenType.I, ads
    token_time = block_time[token_block]
    token_time[organic_at] = events["timestamp"][organics]
    if block_e:
        kind[(start[:-1] + prompt - 1)] = TokenType.E
    if block_u:
        follows = np.minimum(start[:-1] + 1, max(len(token_time) - 1, 0))
        inside = follows < start[1:]
        token_time[start[:-1][inside]] = token_time[follows[inside]]

    # Cut: as much history as leaves room for the request's prompt and one ad; whole blocks, or the end of the last one.
    prefix = int(settings.user_tokens == "row" and bool(settings.user_features))
    own_block = np.flatnonzero(is_own)
    first_block = np.searchsorted(block_owner, np.arange(num_requests))
    history = np.clip(settings.max_tokens - prefix - prompt[own_block] - 1, 0, settings.context_tokens)
    wanted = np.maximum(start[own_block] - history, start[first_block])
    whole = start[np.searchsorted(start, wanted)]
    begin = np.where(whole < start[own_block], whole, wanted)
    end = start[own_block + 1]
    skipped["beyond_max_tokens"] = _count(kind[:len(event)] % 2 == 1, start[first_block], begin)

    index, lengths = ranges(begin, end - begin), end - begin
    older_offsets, older = np.zeros(num_requests + 1, np.int64), None
    if settings.history_events:
        opens = np.append(token_time, 0)[begin]
        opens = np.where(lengths > 0, opens, time)
        of_token = block_owner[token_block]
        before = np.flatnonzero((event >= 0) & (np.arange(len(event)) < begin[of_token]) & (token_time < opens[of_token]))
        from_end = np.searchsorted(of_token[before], of_token[before], side="right") - np.arange(len(before))
        before = before[from_end <= settings.history_events]
        older_offsets = np.searchsorted(of_token[before], np.arange(num_requests + 1))
        older = {"item": events["index"][event[before]], "time": token_time[before], "action": events["action"][event[before]]}
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    first = token_block[np.minimum(begin, max(len(token_block) - 1, 0))] if len(token_block) else np.zeros(num_requests, np.int64)
    shown, has_event = event[index], event[index] >= 0
    shown = np.where(has_event, shown, 0)
    columns = {"type": kind[index], "block": token_block[index] - np.repeat(first, lengths), "timestamp": token_time[index]}
    for column, source, fill in (("item", "index", NO_ITEM), ("action", "action", Action.NONE), ("scene", "scene", 0),
                                 ("value", "value", np.nan)):
        columns[column] = np.where(has_event, events[source][shown], fill) if len(events[source]) else np.full(len(index), fill)
    if prefix:
        at = offsets[:-1]
        opens = np.where(lengths > 0, columns["timestamp"][np.minimum(at, max(len(index) - 1, 0))] if len(index) else time, time)
        fill = {"type": TokenType.U, "block": 0, "timestamp": opens, "item": NO_ITEM, "action": Action.NONE, "scene": 0, "value": np.nan}
        columns = {n: np.insert(values, at, fill[n]) for n, values in columns.items()}
        offsets = offsets + np.arange(num_requests + 1)

    block_head = np.full(num_blocks, -1)
    block_head[ad_block[::-1]] = ads[::-1]  # the first ad of each block tells its features
    profile = len(settings.user_features) - settings.num_event_user_features
    u_block = own_block if prefix else token_block[index][kind[index] == TokenType.U]
    u_features = own["user_features"][block_owner[u_block]]
    from_event = _brings(u_block, block_head, is_own, events["user_given"])
    u_features[from_event, profile:] = events["user_features"][block_head[u_block[from_event]], profile:]
    e_block = token_block[index][kind[index] == TokenType.E]
    e_features = own["env"][block_owner[e_block]]
    from_event = ~is_own[e_block]
    e_features[from_event] = events["env"][block_head[e_block[from_event]]]
    knowledge = _knowledge(requests, settings) if settings.num_knowledge_vectors else None
    number = (combine64(user, key) >> np.uint64(64 - _KEY_BITS)).astype(np.int64)
    return Prompts(offsets, columns, u_features, e_features, time, number, knowledge, older_offsets, older, skipped)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start+1, ... of every run, end to end."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _read_events(requests: pa.RecordBatch, settings: RequestSettings, user_R: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Columns [N] of all histories and the request each event belongs to [N]; strings have become hashes."""
    rows, owner = flat(requests["history"])
    column = {name: pc.struct_field(rows, name) for name in
              ("item_id", "type", "time", "action", "scene", "value", "pctr", "pcvr", "request", "group")}
    is_ad = np.asarray(pc.equal(column["type"], "ad").to_numpy(zero_copy_only=False), bool)
    actions = np.array([Action.CONSUME, *AD_ACTIONS.values()], np.uint8)
    place = pc.fill_null(pc.index_in(column["action"], pa.array(list(AD_ACTIONS))), -1).to_numpy(zero_copy_only=False)
    time = column["time"].to_numpy(zero_copy_only=False).astype(np.int64)
    request = hash_strings(column["request"])
    events = {
        "item": hash_strings(column["item_id"]), "kind": np.where(is_ad, _AD, _ORGANIC).astype(np.uint8), "timestamp": time,
        "action": np.where(is_ad, actions[place + 1], Action.CONSUME).astype(np.uint8), "scene": feature_id(column["scene"], "scene"),
        "request": request, "key": np.where(request != 0, request, combine64(time)),
        "group": pc.fill_null(column["group"], EVERY_AD).to_numpy(zero_copy_only=False),
        **{name: pc.fill_null(column[name], float("nan")).to_numpy(zero_copy_only=False) for name in ("value", "pctr", "pcvr")},
        **_features(rows, settings, pa.array(time)),
    }
    events["user_given"] = _given(rows, "user_features", settings.user_features)
    # Events of one second are in the order of these two, whatever the order in the log (data_pipeline/events.py: event_fingerprint).
    events["tie"] = combine64(user_R[owner], time, events["item"])
    columns = [events[name] for name in ("request", "value", "pctr", "pcvr", "scene", "group", "kind", "action")]
    profile = len(settings.user_features) - settings.num_event_user_features
    columns += [*events["user_features"][:, profile:].T, *events["env"].T]
    events["fingerprint"] = combine64(*columns)
    return events, owner


def _features(rows: pa.RecordBatch | pa.StructArray, settings: RequestSettings, time: pa.Array) -> dict[str, np.ndarray]:
    """int32 [rows, fields] of the user's and the environment's features; 0 = unknown."""
    out = {}
    for name, features in (("user_features", settings.user_features), ("env", settings.env_features)):
        ids = np.zeros((len(time), len(features)), np.int32)
        column = _column(rows, name) if features else None
        for place, feature in enumerate(features):
            ids[:, place] = feature_id(pc.struct_field(column, feature), feature)
            if name == "env" and feature in settings.time_features and len(time):
                made = feature_id(time_feature(feature, time), feature)
                ids[:, place] = np.where(ids[:, place] == 0, made, ids[:, place])
        out[name] = ids
    return out


def _given(rows: pa.StructArray, name: str, features: tuple[str, ...]) -> np.ndarray:
    """Whether an event brings its own features, bool [N]."""
    return pc.is_valid(_column(rows, name)).to_numpy(zero_copy_only=False) if features else np.zeros(len(rows), bool)


def _column(rows: pa.RecordBatch | pa.StructArray, name: str) -> pa.Array:
    return rows[name] if isinstance(rows, pa.RecordBatch) else pc.struct_field(rows, name)


def _brings(blocks: np.ndarray, block_head: np.ndarray, is_own: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Whether each block is an earlier request whose first ad brings the user's features of that time, bool."""
    earlier = ~is_own[blocks]
    earlier[earlier] = given[block_head[blocks[earlier]]]
    return earlier


def _knowledge(requests: pa.RecordBatch, settings: RequestSettings) -> np.ndarray:
    column = requests["knowledge"]
    given = pc.is_valid(column).to_numpy(zero_copy_only=False)
    vectors_RmE = np.zeros((requests.num_rows, settings.num_knowledge_vectors, settings.knowledge_width), np.float32)
    numbers = column.flatten().flatten().to_numpy(zero_copy_only=False)
    vectors_RmE[given] = numbers.reshape(-1, *vectors_RmE.shape[1:])
    return vectors_RmE


def _sorted(events: np.ndarray, block: np.ndarray, keys: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Events and their blocks by block, then by the keys, the last one first (as np.lexsort)."""
    order = np.lexsort((*keys, block))
    return events[order], block[order]


def _rank(sorted_groups: np.ndarray) -> np.ndarray:
    """Place of each entry within its run of equal numbers."""
    return np.arange(len(sorted_groups)) - np.searchsorted(sorted_groups, sorted_groups)


def _count(mask: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
    """How many of mask[begin:end] are set, of every range."""
    total = np.concatenate([[0], np.cumsum(mask)])
    return total[end] - total[begin]


def _changes(*keys: np.ndarray) -> np.ndarray:
    """True where a sorted run of equal keys begins."""
    first = np.ones(len(keys[0]), bool)
    if len(first):
        first[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return first
