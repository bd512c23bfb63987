"""Laws of journeys, checked on random events against a slow reference that lays out one user at a time."""

from collections import Counter, defaultdict

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.events import AD, ORGANIC, event_dtype
from data_pipeline.journeys import SPLITS, JourneyConfig, Users, build_journeys
from data_pipeline.shards import row_stats
from gpr_dist.errors import ConfigError
from gpr_dist.hashing import combine64
from gpr_dist.schema import JOURNEY_SCHEMA, NO_ITEM, Action, TokenType

VALIDATION, TEST = 60, 80
TIME_SPLIT = {"validation_from": "1970-01-01T00:01:00", "test_from": "1970-01-01T00:01:20"}
GRID = [  # max_tokens, context_tokens, user_tokens, env features, user features, organics kept, split
    (512, 256, "row", 2, 1, 128, TIME_SPLIT),
    (12, 6, "row", 2, 1, 4, TIME_SPLIT),
    (8, 3, "block", 1, 2, 3, TIME_SPLIT),
    (6, 2, "none", 0, 0, 2, TIME_SPLIT),
    (5, 0, "row", 0, 1, 2, TIME_SPLIT),
    (4, 1, "none", 0, 0, 0, {"method": "leave_one_out"}),
    (16, 8, "block", 1, 0, 5, {"method": "leave_one_out"}),
    (7, 4, "none", 2, 0, 3, {}),
]


def random_events(seed: int, num_users: int = 12, num_events: int = 600, num_env: int = 2, num_user: int = 1):
    """Few users, few distinct times: many ties, large requests, users without ads."""
    rng = np.random.default_rng(seed)
    events = np.zeros(num_events, event_dtype(num_user, num_env))
    hashes = np.sort(rng.integers(1, 1 << 63, num_users, dtype=np.uint64))
    user = rng.choice(num_users, num_events, p=rng.dirichlet(np.ones(num_users)))
    events["user"] = hashes[user]
    events["timestamp"] = rng.integers(0, 100, num_events)
    events["kind"] = np.where((rng.random(num_events) < 0.5) & (user != 0), AD, ORGANIC)
    named = (rng.random(num_events) < 0.5) & (events["kind"] == AD)
    events["request"][named] = (events["timestamp"][named] // 7 + 1).astype(np.uint64)  # spans several times
    events["item"] = rng.integers(1, 1 << 63, num_events, dtype=np.uint64)
    events["action"] = np.where(events["kind"] == AD, rng.integers(2, 5, num_events), Action.CONSUME)
    events["value"], events["pctr"], events["pcvr"] = rng.random((3, num_events))
    events["scene"] = rng.integers(0, 5, num_events)
    events["eligibility"] = events["timestamp"] % 3
    events["env_features"] = rng.integers(0, 9, (num_events, num_env))
    events["user_features"] = rng.integers(0, 9, (num_events, num_user))
    present = np.unique(events["user"])
    ids = pa.array([f"user-{h}" for h in present])
    return events, Users(present, ids, np.zeros((len(present), 0), np.int32))


def build(events, users, config, items=None, num_user=1, **kwargs):
    counts = Counter()
    batches = defaultdict(list)
    items = np.arange(len(events), dtype=np.int32) if items is None else items
    for split, batch in build_journeys(events, items, users, num_user, config, counts, **kwargs):
        assert batch.schema == JOURNEY_SCHEMA
        batch.validate(full=True)
        batches[split].append(batch)
    return {split: pa.Table.from_batches(batches[split], JOURNEY_SCHEMA) for split in SPLITS}, counts


def same(one, other):
    """Equal tables; NaN equals NaN."""
    return repr(one.to_pylist()) == repr(other.to_pylist())


def reference(events, config, split_config):
    """Per user: requests as (time, split, organics, ads) in order; event numbers; no tie order inside ads."""
    journeys = {}
    for user in np.unique(events["user"]):
        mine = np.flatnonzero(events["user"] == user)
        requests = defaultdict(list)  # requests of the same time are ordered by the hash that names them
        for e in mine[events["kind"][mine] == AD]:
            key = int(events["request"][e]) or int(combine64(events["timestamp"][e:e + 1])[0])
            requests[key].append(int(e))
        times = {key: min(int(events["timestamp"][e]) for e in ads) for key, ads in requests.items()}
        organics = sorted((int(events["timestamp"][e]), int(e)) for e in mine[events["kind"][mine] == ORGANIC])
        blocks = [{"time": times[key], "ads": set(requests[key])} for key in sorted(requests, key=lambda key: (times[key], key))]
        previous = -1
        for number, block in enumerate(blocks):
            mine_now = [(t, e) for t, e in organics if previous <= t < block["time"]]
            block["candidates"] = {e for _, e in mine_now}
            block["organic_times"] = sorted(t for t, _ in mine_now)[max(0, len(mine_now) - config.max_organic_per_block):]
            if split_config.get("method") == "leave_one_out":
                left = len(blocks) - number
                block["split"] = 3 - left if left <= 2 and len(blocks) >= 3 else 0
            elif split_config:
                block["split"] = (block["time"] >= VALIDATION) + (block["time"] >= TEST)
            else:
                block["split"] = 0
            previous = block["time"]
        journeys[f"user-{user}"] = blocks
    return journeys


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("setting", GRID, ids=lambda s: f"{s[0]}-{s[1]}-{s[2]}-{s[3]}")
def test_laws(setting, seed):
    max_tokens, context, user_tokens, num_env, num_user, max_organic, split_config = setting
    config = JourneyConfig(max_tokens=max_tokens, context_tokens=context, user_tokens=user_tokens, max_organic_per_block=max_organic,
                           lookahead_ads=3, split=split_config)
    events, users = random_events(seed, num_env=num_env, num_user=num_user)
    tables, counts = build(events, users, config, num_user=num_user)
    journeys = reference(events, config, split_config)
    time, kind = events["timestamp"], events["kind"]
    fresh = Counter()
    ads_total = targets_total = 0
    for number, split in enumerate(SPLITS):
        table = tables[split]
        for row in table.to_pylist():
            blocks = journeys[row["user_id"]]
            block_of = {e: k for k, b in enumerate(blocks) for e in b["ads"]}
            types, items, length = row["token_type"], row["item"], len(row["item"])
            end = length - row["num_lookahead"]
            assert end <= max_tokens and 0 <= row["num_context"] < end
            assert row["timestamp"] == sorted(row["timestamp"])
            assert row["block"] == sorted(row["block"]) and set(row["block"]) == set(range(len(row["eligibility"])))
            assert len(row["user_features"]) == num_user * types.count(TokenType.U)
            assert len(row["env_features"]) == num_env * types.count(TokenType.E)
            assert (types.count(TokenType.U) == 1) if user_tokens == "row" and num_user else True
            request_of_block = {}
            for position in range(length):
                e, is_ad = items[position], types[position] == TokenType.I
                if e == NO_ITEM:
                    assert types[position] in (TokenType.U, TokenType.E) and row["action"][position] == Action.NONE
                    continue
                assert kind[e] == (AD if is_ad else ORGANIC) and row["action"][position] == events["action"][e]
                assert row["value"][position] == events["value"][e]
                if is_ad:
                    k = block_of[e]
                    request_of_block.setdefault(row["block"][position], k)
                    assert request_of_block[row["block"][position]] == k
                    assert row["timestamp"][position] == blocks[k]["time"]
                    # nothing of a later split, not even as a label; labels and targets are of this split only
                    assert blocks[k]["split"] <= number
                    if position >= row["num_context"]:
                        assert blocks[k]["split"] == number
                if row["num_context"] <= position < end:
                    fresh[e] += 1
            for position in range(length):  # the prompt of a request is strictly older than the request
                if types[position] == TokenType.O and row["block"][position] in request_of_block:
                    k = request_of_block[row["block"][position]]
                    assert items[position] in blocks[k]["candidates"] and time[items[position]] < blocks[k]["time"]
                if types[position] == TokenType.E and position + 1 < end:
                    assert types[position + 1] == TokenType.I
            assert all(t == TokenType.I for t in types[end:])
        if table.num_rows:
            targets_total += int(row_stats(table.combine_chunks().to_batches()[0])[:, 1].sum())
    lost = 0
    for blocks in journeys.values():
        for k, block in enumerate(blocks):
            ads_total += len(block["ads"])
            assert all(fresh[e] == 1 for e in block["ads"])
            kept = [e for e in block["candidates"] if fresh[e]]
            assert all(fresh[e] == 1 for e in kept) and sorted(time[e] for e in kept) == block["organic_times"]
            if k == 0 and not kept and not num_env and (user_tokens == "none" or not num_user):
                lost += len(block["ads"])  # nothing precedes the first ad of the journey: no token to predict it from
    assert ads_total == sum(kind == AD) and targets_total == ads_total - lost
    left_out = counts["organic events after the last request"] + counts["organic events beyond max_organic_per_block"]
    assert sum(fresh.values()) + left_out == len(events)


@pytest.mark.parametrize("setting", GRID, ids=lambda s: f"{s[0]}-{s[1]}-{s[2]}-{s[3]}")
def test_context_and_lookahead_continue_the_journey(setting):
    """With the row-level U taken off, a row is a piece of the uncut journey; what follows its targets in the journey is its lookahead."""
    max_tokens, context, user_tokens, num_env, num_user, max_organic, split_config = setting
    events, users = random_events(7, num_env=num_env, num_user=num_user)
    shared = {"user_tokens": user_tokens, "max_organic_per_block": max_organic, "lookahead_ads": 3}
    rows, _ = build(events, users, JourneyConfig(max_tokens=max_tokens, context_tokens=context, split=split_config, **shared),
                    num_user=num_user)
    whole, _ = build(events, users, JourneyConfig(max_tokens=100_000, context_tokens=50_000, **shared), num_user=num_user)
    prefix = int(user_tokens == "row" and num_user > 0)
    journeys = {row["user_id"]: row["item"][prefix:] for row in whole["train"].to_pylist()}
    blocks = {row["user_id"]: row["block"][prefix:] for row in whole["train"].to_pylist()}
    assert len(journeys) == whole["train"].num_rows
    split_requests = 0
    for split in SPLITS:
        for row in rows[split].to_pylist():
            journey = journeys[row["user_id"]]
            items = row["item"][prefix:len(row["item"]) - row["num_lookahead"]]
            num_context = row["num_context"] - prefix
            real = [p for p, e in enumerate(items) if e != NO_ITEM]
            at = journey.index(items[real[-1]])
            start = at - real[-1]
            if start >= 0 and journey[start:at + 1] == items[:real[-1] + 1]:
                first_block = row["block"][row["num_context"]:len(row["item"]) - row["num_lookahead"]]
                limit = min(context, max_tokens - prefix - first_block.count(first_block[0]))
                assert num_context <= limit
                if start > 0 and blocks[row["user_id"]][start] == blocks[row["user_id"]][start - 1]:
                    # Not even the last block fits: its end is taken. (Or a later piece of the very first request, without a prompt.)
                    assert num_context == limit or (num_context == 0 and blocks[row["user_id"]][start] == 0)
                elif start > 0:
                    assert num_context + blocks[row["user_id"]].count(blocks[row["user_id"]][start - 1]) > limit
            else:  # a later piece of a request larger than a row: its prompt, then ads further on
                split_requests += 1
                first = journey.index(next(e for e in items[num_context:] if e != NO_ITEM))
                assert journey[first:first + len(items) - num_context] == items[num_context:]
                head = [e for e in items[:num_context] if e != NO_ITEM]
                assert all(journey.index(e) < first for e in head)
            ads_after = [e for e in journey[at + 1:] if e != NO_ITEM and events["kind"][e] == AD]
            assert row["item"][len(row["item"]) - row["num_lookahead"]:] == ads_after[:row["num_lookahead"]]
    assert split_requests > 0 or max_tokens > 8


def test_permuting_the_log_changes_nothing():
    events, users = random_events(3)
    config = JourneyConfig(max_tokens=12, context_tokens=6, max_organic_per_block=4, split=TIME_SPLIT)
    items = (np.arange(len(events)) % 50).astype(np.int32)
    events["item"] = items.astype(np.uint64) + 1  # repeated items: ties that only the other fields break
    expected, _ = build(events, users, config, items)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(events))
        found, _ = build(events[order], users, config, items[order])
        assert all(same(found[split], expected[split]) for split in SPLITS)


def test_batch_size_and_company_change_nothing():
    """Rows depend on their user only: small batches, or one user at a time, give the same rows."""
    events, users = random_events(4)
    items = np.arange(len(events), dtype=np.int32)
    config = JourneyConfig(max_tokens=12, context_tokens=6, max_organic_per_block=4, split=TIME_SPLIT)
    expected, _ = build(events, users, config)
    small, _ = build(events, users, config, tokens_per_batch=1)
    one_by_one = defaultdict(list)
    for number, h in enumerate(users.hashes):
        mine = events["user"] == h
        alone = Users(users.hashes[number:number + 1], users.ids[number:number + 1], users.profiles[number:number + 1])
        for split, table in build(events[mine], alone, config, items[mine])[0].items():
            one_by_one[split].append(table)
    for split in SPLITS:
        assert same(small[split], expected[split])
        assert same(pa.concat_tables(one_by_one[split]), expected[split])


def test_a_day_by_hand():
    """O at the time of the request waits for the next one; the last O is left out; E and I carry the request's time."""
    events = np.zeros(6, event_dtype(0, 1))
    events["user"], events["item"] = 5, np.arange(1, 7)
    events["timestamp"] = [10, 20, 20, 20, 30, 40]
    events["kind"] = [ORGANIC, ORGANIC, AD, AD, AD, ORGANIC]
    events["env_features"][:, 0] = [0, 0, 7, 7, 8, 0]
    events["eligibility"] = [-1, -1, 3, 3, 4, -1]
    users = Users(np.array([5], np.uint64), pa.array(["ann"]), np.array([[42, 0]], np.int32))
    tables, counts = build(events, users, JourneyConfig(), num_user=2)
    (row,) = tables["train"].to_pylist()
    u, o, e, i = TokenType.U, TokenType.O, TokenType.E, TokenType.I
    assert row["token_type"] == [u, o, e, i, i, o, e, i] and row["block"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert row["item"][1] == 0 and set(row["item"][3:5]) == {2, 3} and row["item"][5:] == [1, NO_ITEM, 4]
    assert row["timestamp"] == [10, 10, 20, 20, 20, 20, 30, 30]
    assert row["user_features"] == [42, 0] and row["env_features"] == [7, 8] and row["eligibility"] == [3, 4]
    assert (row["num_context"], row["num_lookahead"]) == (1, 0) and counts["organic events after the last request"] == 1


def test_few_requests_and_impossible_settings():
    events, users = random_events(5)
    tables, counts = build(events, users, JourneyConfig(min_requests=10**6))
    assert not any(table.num_rows for table in tables.values()) and counts["users with fewer than min_requests"] > 0
    with pytest.raises(ValueError, match="at most 9"):
        JourneyConfig(max_tokens=12, context_tokens=6, max_organic_per_block=10)
    with pytest.raises(ValueError, match="validation_from is later"):
        JourneyConfig(split={"validation_from": "2020-01-02", "test_from": "2020-01-01"})
    with pytest.raises(ConfigError, match="context_tokens=0"):
        build(events, users, JourneyConfig(user_tokens="none", env_tokens=False, context_tokens=0))
    assert build(events[:0], Users(np.zeros(0, np.uint64), pa.array([], pa.string()), np.zeros((0, 0), np.int32)), JourneyConfig())[0][
        "train"].num_rows == 0
