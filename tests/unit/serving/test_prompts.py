"""A request's tokens are those that the journey builder makes of the same events, whatever the order and the rubbish around them."""

import json
import random
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import torch
from journeys_fixture import stored_rows

from data_pipeline.events import AD, ORGANIC, encode_events
from data_pipeline.journeys import JourneyConfig, SplitConfig, Users, build_journeys
from gpr_dist.data.collate import collate
from gpr_dist.hashing import feature_id, hash_strings, time_feature
from gpr_dist.schema import Action
from gpr_dist.serving.prompts import build_prompts
from gpr_dist.serving.requests import parse_lines
from gpr_dist.serving.settings import BundleSettings, RequestSettings

ITEMS = [f"item-{n}" for n in range(40)]
HASHES = hash_strings(pa.array(ITEMS))
ORDER = np.argsort(HASHES)
CODES = np.stack([np.arange(40) % 7, np.arange(40) // 7], axis=1).astype(np.int32)
PROFILE, EVENT_USER, ENV = ("age",), ("mood",), ("store", "hour")
ACTIONS = {"impression": Action.IMPRESSION, "click": Action.CLICK, "conversion": Action.CONVERSION}


def index_of(hashes):
    at = np.minimum(np.searchsorted(HASHES[ORDER], hashes), 39)
    return np.where(HASHES[ORDER][at] == hashes, ORDER[at], -1).astype(np.int32)


def random_log(rng, num_events, span, request_ids):
    """Events of one user, with many ties: the same second, the same item twice, several ads of one request."""
    events = []
    for _ in range(num_events):
        kind, when = rng.choice(["ad", "organic"]), 1_500_000_000 + rng.randrange(span) * 1800
        events.append({
            "item_id": rng.choice(ITEMS), "type": kind, "time": when, "scene": rng.choice([None, "left", "right"]),
            "action": rng.choice(list(ACTIONS)) if kind == "ad" else None, "value": rng.choice([None, 1.5, 2.0]),
            "request": f"r{when % 7}" if request_ids else None, "group": rng.choice([-1, 0, 1]),
            "env": {"store": rng.choice(["a", "b", None])}, "user_features": {"mood": rng.choice(["good", "bad", None])}})
    return events


def log_table(user, events):
    """The same events as the journey builder's sources give them."""
    time = pa.array([e["time"] for e in events], pa.int64())
    return pa.table({
        "user_id": [user] * len(events), "item_id": [e["item_id"] for e in events], "timestamp": time,
        "kind": pa.array([AD if e["type"] == "ad" else ORGANIC for e in events], pa.uint8()),
        "request_id": pa.array([e["request"] for e in events], pa.string()),
        "action": pa.array([ACTIONS.get(e["action"], Action.CONSUME) for e in events], pa.uint8()),
        "value": pa.array([float("nan") if e["value"] is None else e["value"] for e in events], pa.float32()),
        "pctr": pa.array([float("nan")] * len(events), pa.float32()), "pcvr": pa.array([float("nan")] * len(events), pa.float32()),
        "scene": pa.array([e["scene"] for e in events], pa.string()), "eligibility": pa.array([e["group"] for e in events], pa.int32()),
        "user.mood": pa.array([e["user_features"]["mood"] for e in events], pa.string()),
        "env.store": pa.array([e["env"]["store"] for e in events], pa.string()), "env.hour": time_feature("hour", time)})


def settings_of(config, **changes):
    return RequestSettings(**{
        "user_features": PROFILE + EVENT_USER, "env_features": ENV, "num_event_user_features": 1, "time_features": ("hour",),
        "user_tokens": config.user_tokens, "env_tokens": config.env_tokens, "max_tokens": config.max_tokens,
        "context_tokens": config.context_tokens, "max_organic_per_block": config.max_organic_per_block} | changes)


def prompt_of(line, settings):
    bundle = BundleSettings(requests=settings, search={"width": 10}, num_items=40, catalogue_fingerprint="f")
    parsed = parse_lines([json.dumps(line).encode()], bundle, 5)
    assert not parsed.errors, parsed.errors
    return build_prompts(parsed.requests, settings, index_of)


def is_before(event, now, events):
    """Whether the journey of `now` may hold the event: it belongs to an earlier moment, or to an earlier request."""
    if event["type"] == "organic" or now["request"] is None:
        return event["time"] < now["time"]
    begins = min(e["time"] for e in events if e["type"] == "ad" and e["request"] == event["request"])
    key, own = hash_strings(pa.array([event["request"], now["request"]]))
    return (begins, key) < (now["time"], own)


@pytest.mark.parametrize("user_tokens", ["row", "block", "none"])
@pytest.mark.parametrize("request_ids", [False, True])
def test_tokens_are_those_of_the_journey_builder(user_tokens, request_ids):
    rng, compared = random.Random(1), 0
    for trial in range(90):
        config = JourneyConfig(max_tokens=rng.choice([12, 40, 512]), context_tokens=rng.choice([0, 5, 9]), lookahead_ads=0,
                               user_tokens=user_tokens, env_tokens=rng.random() < 0.8 or user_tokens == "none",
                               max_organic_per_block=rng.choice([2, 4, 9]), split=SplitConfig(method="leave_one_out"))
        user, span = f"user-{trial}", rng.choice([4, 40])
        events = random_log(rng, rng.randrange(4, 40), span, request_ids)
        now = {"time": 1_500_000_000 + rng.randrange(span) * 1800 + 900 * rng.randrange(2), "item_id": "item-3", "type": "ad",
               "action": "click", "scene": None, "value": None, "request": f"zz-{trial}" if request_ids else None, "group": 1,
               "env": {"store": "b"}, "user_features": {"mood": "good"}}
        # The request's own ad makes it the last request of the log: what came later is cut from the log, and left in the request.
        log = [e for e in events if is_before(e, now, events)] + [now]
        records = encode_events(log_table(user, log), EVENT_USER, ENV)
        users = Users(np.unique(records["user"]), pa.array([user]), feature_id(pa.array(["old"]), "age")[:, None])
        journeys = build_journeys(records, index_of(records["item"]), users, 2, config, Counter())
        rows = [batch for split, batch in journeys if split == "test"]
        if not rows or not sum(batch.num_rows for batch in rows):
            continue
        columns = stored_rows(pa.Table.from_batches(rows).combine_chunks().to_batches()[0].slice(0, 1)).take(np.array([0]))
        expected = collate(columns, np.array([0]), CODES, 1, 2, 2)
        rng.shuffle(events)
        line = {"id": now["request"], "user": user, "user_features": {"age": "old", "mood": "good"}, "time": now["time"],
                "env": {"store": "b"}, "history": [*events, {**events[0], "item_id": "never seen", "time": 5}]}
        prompts = prompt_of(line, settings_of(config))
        if not prompts.lengths[0]:
            assert len(expected.request_token_R) == 0
            continue
        found, end = prompts.batch(np.array([0]), CODES), int(expected.request_token_R[0]) + 1
        compared += 1
        for name in ("token_type_T", "block_T", "item_T", "codes_TL", "action_T", "scene_T", "timestamp_T", "value_T"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name)[:end], rtol=0, atol=0, equal_nan=True,
                                       msg=lambda text, name=name, trial=trial: f"{name} of trial {trial}: {text}")
        assert torch.equal(found.user_features_UF, expected.user_features_UF)
        assert torch.equal(found.env_features_EF, expected.env_features_EF)
        assert int(found.request_token_R[0]) == end - 1 and prompts.skipped["unknown_items"][0] == 1
    assert compared > 40


def test_knowledge_and_older_events():
    config = JourneyConfig(max_tokens=8, context_tokens=4, max_organic_per_block=4)
    settings = settings_of(config, num_knowledge_vectors=2, knowledge_width=2, history_events=3)
    history = [{"item_id": f"item-{n}", "type": "ad", "action": "click", "time": 1000 + n} for n in range(9)]
    prompts = prompt_of({"time": 2000, "history": history, "knowledge": [[1, 2], [3, 4]]}, settings)
    batch = prompts.batch(np.array([0]), CODES)
    assert batch.knowledge_BmE.tolist() == [[[1, 2], [3, 4]]]
    read = [item for item in batch.item_T.tolist() if item >= 0]  # the latest ads that fit, each with its request's E
    assert read == [7, 8] and batch.past_item_X.tolist() == [4, 5, 6] and batch.past_time_X.tolist() == [1004, 1005, 1006]
    assert torch.equal(batch.past_codes_XL, torch.from_numpy(CODES[[4, 5, 6]]).long()) and batch.past_offsets_B1.tolist() == [0, 3]
    assert not prompt_of({"time": 2000}, settings).batch(np.array([0]), CODES).knowledge_BmE.any()
