"""Anticipated requests: nothing of what comes later, the loader's layout, tiers of the clock, deterministic draws, the share asked for."""

from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from journeys_fixture import ENV_FEATURES, NUM_ITEMS, random_journeys, stored_rows

from gpr_dist.data.collate import collate
from gpr_dist.hashing import feature_id, time_feature
from gpr_dist.rl.arr import HOUR_S, ArrConfig, Rehearsal, anticipate, choose_anchors, ticks
from gpr_dist.schema import JOURNEY_SCHEMA, Batch, TokenType

CODES = np.arange(NUM_ITEMS * 3).reshape(NUM_ITEMS, 3) % 7
ALWAYS = ArrConfig(share=0.75)  # as many as rows


def batch_of(journeys: pa.RecordBatch) -> Batch:
    stored = stored_rows(journeys)
    rows = np.arange(journeys.num_rows)
    return collate(stored.take(rows), rows, CODES, 2, 2, len(ENV_FEATURES))


@pytest.fixture(scope="module")
def batch() -> Batch:
    return batch_of(random_journeys(120, seed=5))


def same(a: Batch, b: Batch, but: tuple[str, ...] = ()) -> None:
    for f in fields(Batch):
        left, right = getattr(a, f.name), getattr(b, f.name)
        if f.name not in but and left is not None:
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=f.name)


def made_of(batch: Batch, config: ArrConfig = ALWAYS, step: int = 0) -> tuple[torch.Tensor, torch.Tensor, Batch]:
    anchors = choose_anchors(batch, config, 4, step)
    tick = ticks(batch, anchors, config)
    return anchors, tick, anticipate(batch, anchors, tick, ENV_FEATURES)


def test_nothing_at_or_after_the_tick_is_seen(batch: Batch) -> None:
    """Every token at or after the tick, and every answer of the log, replaced: the requests stay the same bit for bit."""
    anchors, tick, made = made_of(batch)
    row_T = torch.repeat_interleave(batch.offsets_B1.diff())
    tick_B = torch.full((batch.num_rows,), -1).index_put_((batch.request_row_R[anchors],), tick)
    later_T = batch.timestamp_T >= tick_B[row_T]
    assert later_T.any() and (later_T & (tick_B[row_T] > 0)).any()
    is_later_env = later_T[batch.token_type_T == TokenType.E]
    other = replace(
        batch, item_T=torch.where(later_T & (batch.item_T >= 0), (batch.item_T + 1) % NUM_ITEMS, batch.item_T),
        codes_TL=torch.where(later_T[:, None], 3, batch.codes_TL), action_T=torch.where(later_T, 4, batch.action_T),
        scene_T=torch.where(later_T, 9, batch.scene_T), value_T=torch.where(later_T, 1e9, batch.value_T),
        env_features_EF=torch.where(is_later_env[:, None], 7, batch.env_features_EF),
        **{f.name: torch.zeros_like(getattr(batch, f.name)) for f in fields(Batch)
           if f.name.startswith("target_") and getattr(batch, f.name) is not None})
    same(made, anticipate(other, anchors, tick, ENV_FEATURES))
    assert len(made.request_row_R) > 20


def test_it_is_the_batch_of_a_journey_that_ends_with_the_request() -> None:
    """The loader's batch of journeys cut at the tick and continued by U, E and an ad, built from dictionaries."""
    journeys = random_journeys(60, seed=8)
    batch = batch_of(journeys)
    anchors, tick, made = made_of(batch)
    kept = made.row_ids_B.tolist()
    when = dict(zip(batch.row_ids_B[batch.request_row_R[anchors]].tolist(), tick.tolist(), strict=True))
    rows = [continued(journeys.slice(number, 1).to_pylist()[0], when[number]) for number in kept]
    expected = batch_of(pa.RecordBatch.from_pylist(rows, JOURNEY_SCHEMA))
    num_ads = int((expected.token_type_T == TokenType.I).sum())
    site, row = made.request_token_R, torch.arange(len(kept))
    for name in ("token_type_T", "block_T", "item_T", "codes_TL", "action_T", "timestamp_T", "value_T"):
        values = getattr(expected, name)
        last = torch.zeros(expected.num_tokens, dtype=torch.bool)
        last[expected.offsets_B1[1:] - 1] = True
        torch.testing.assert_close(getattr(made, name), values[~last], rtol=0, atol=0, equal_nan=True, msg=name)
    torch.testing.assert_close(made.user_features_UF, expected.user_features_UF, rtol=0, atol=0)
    torch.testing.assert_close(made.env_features_EF, expected.env_features_EF, rtol=0, atol=0)
    of_row = [(expected.request_row_R == number).nonzero()[-1, 0] for number in range(len(kept))]  # each row's last request
    assert torch.equal(expected.request_token_R[of_row] - row, site) and num_ads > len(kept)
    assert torch.equal(expected.request_time_R[of_row], made.request_time_R)
    assert torch.equal(expected.request_eligibility_R[of_row], made.request_eligibility_R)


def continued(journey: dict, tick: int) -> dict:
    """The journey before the tick with one more request, the obvious way."""
    types, times = journey["token_type"], journey["timestamp"]
    length = len(types) - journey["num_lookahead"]
    count = sum(time < tick for time in times[:length])
    kinds = types[:count]
    fu, fe = 2, len(ENV_FEATURES)
    users = [journey["user_features"][i * fu : (i + 1) * fu] for i in range(kinds.count(TokenType.U))]
    envs = [journey["env_features"][i * fe : (i + 1) * fe] for i in range(kinds.count(TokenType.E))]
    closed = kinds[-1] in (TokenType.I, TokenType.E)
    block = journey["block"][count - 1] + closed
    added = [TokenType.U] * (closed and TokenType.U in kinds[1:]) + [TokenType.E, TokenType.I]
    hour = feature_id(time_feature("hour", pa.chunked_array([[tick]])), "hour")[0]
    env = [*envs[-1][:2], int(hour)]
    groups = [group for group, number in zip(journey["eligibility"], range(len(journey["eligibility"])), strict=True)]
    requests = [b for b, kind, time in zip(journey["block"][:length], types, times, strict=False) if kind == TokenType.I and time < tick]
    sited = [b for b in requests if types.index(TokenType.I) != 0 or b > journey["block"][0]]
    out = {name: [*journey[name][:count], *([fill] * len(added))] for name, fill in
           (("token_type", 0), ("item", -1), ("action", 0), ("scene", 0), ("value", float("nan")), ("pctr", float("nan")),
            ("pcvr", float("nan")))}
    out["token_type"][count:], out["item"][-1], out["action"][-1] = added, 0, 2
    out["block"] = [*journey["block"][:count], *([block] * len(added))]
    out["timestamp"] = [*times[:count], *([tick] * len(added))]
    out["user_features"] = [x for user in (users + users[-1:] if added[0] == TokenType.U else users) for x in user]
    out["env_features"] = [x for each in [*envs, env] for x in each]
    out["eligibility"] = [*groups[:block], groups[sited[-1]]]
    return {"user_id": "u", "num_context": 1 if count else 0, "num_lookahead": 0, **out}


def test_the_clock_ticks_by_tier() -> None:
    batch = batch_of(random_journeys(200, seed=3))
    config = ArrConfig(share=0.75, active_events=12)
    anchors, tick, _ = made_of(batch, config)
    row, time = batch.request_row_R[anchors], batch.request_time_R[anchors]
    tiers = set()
    for r, t, at in zip(row.tolist(), time.tolist(), tick.tolist(), strict=True):
        part = slice(*batch.offsets_B1[r : r + 2].tolist())
        when = batch.timestamp_T[part][batch.item_T[part] >= 0]
        period = (2 if int(((when <= t) & (when > t - 86_400)).sum()) >= 12 else 4) * HOUR_S
        assert at % period == 0 and 0 < at - t <= period
        tiers.add(period)
    assert tiers == {2 * HOUR_S, 4 * HOUR_S}


def test_draws_belong_to_the_row_the_step_and_the_seed(batch: Batch) -> None:
    rehearse = Rehearsal(ArrConfig(share=0.2), 2, ENV_FEATURES)
    whole = rehearse(batch, 3)
    same(whole, rehearse(batch, 3))
    assert whole.row_ids_B.tolist() != rehearse(batch, 4).row_ids_B.tolist()
    assert whole.row_ids_B.tolist() != Rehearsal(ArrConfig(share=0.2, seed=1), 2, ENV_FEATURES)(batch, 3).row_ids_B.tolist()
    journeys = random_journeys(120, seed=5)  # however the rows are split into micro-batches
    halves = []
    for rows in (np.arange(50), np.arange(50, 120)):
        half = collate(stored_rows(journeys).take(rows), rows, CODES, 2, 2, len(ENV_FEATURES))
        halves.append(rehearse(half, 3))
    for name in ("row_ids_B", "token_type_T", "timestamp_T", "item_T", "request_time_R", "env_features_EF", "request_eligibility_R"):
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name)), name


def test_the_share_is_what_was_asked_for(batch: Batch) -> None:
    count = torch.bincount(batch.request_row_R, minlength=batch.num_rows)
    logged = int(count.clamp(max=2).sum())
    config = ArrConfig(share=0.2)
    found = np.mean([len(choose_anchors(batch, config, 2, step)) for step in range(200)])
    assert found / (found + logged) == pytest.approx(0.2, abs=0.01)
    places = torch.cat([choose_anchors(batch, config, 2, step) for step in range(400)])
    assert len(places.unique()) > 0.95 * len(batch.request_row_R)  # any request of a journey may be the anchor


def test_no_request_is_a_batch_too(batch: Batch) -> None:
    made = Rehearsal(ArrConfig(share=1e-9), 2, ENV_FEATURES)(batch, 0)
    assert made.num_rows == made.num_tokens == len(made.request_row_R) == made.num_targets == 0


def test_older_events_go_with_their_rows(batch: Batch) -> None:
    lengths = torch.arange(batch.num_rows) % 4
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    owner = torch.repeat_interleave(lengths)
    old = replace(batch, past_offsets_B1=offsets, past_item_X=owner, past_codes_XL=owner[:, None].expand(-1, 3), past_time_X=owner,
                  past_action_X=owner, knowledge_BmE=torch.arange(batch.num_rows).float()[:, None, None])
    _, _, made = made_of(old)
    assert torch.equal(made.past_offsets_B1.diff(), lengths[made.row_ids_B])
    assert torch.equal(made.past_item_X, made.row_ids_B.repeat_interleave(lengths[made.row_ids_B]))
    assert made.knowledge_BmE[:, 0, 0].tolist() == made.row_ids_B.tolist()
