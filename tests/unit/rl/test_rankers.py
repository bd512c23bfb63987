"""Features and network of the rankers: only the request's own past counts, however it is packed."""

import dataclasses

import numpy as np
import pytest
import torch
from journeys_fixture import NUM_ITEMS, random_journeys, stored_rows
from random_batches import random_batch

from gpr_dist.data.collate import collate
from gpr_dist.rl.rankers import ACTIONS, RankerConfig, Rankers, recent_past
from gpr_dist.schema import Action, TokenType

LEVELS, CODES = 3, 16
CODES_ML = np.random.default_rng(0).integers(0, 4, (NUM_ITEMS, LEVELS)).astype(np.int32)
CONFIG = RankerConfig(width=4, hidden=(8,), item_buckets=32, feature_buckets=64, history_events=5, half_lives_s=(3000.0, 1e6))


def batch_of(rows, num_rows=24):
    rows = np.asarray(rows)
    return collate(stored_rows(random_journeys(num_rows)).take(rows), rows, CODES_ML, 1, 2, 3)


@pytest.fixture
def rankers():
    torch.manual_seed(0)
    rankers = Rankers(CONFIG, LEVELS, CODES, 2, 3)
    rankers.set_content(torch.randn(LEVELS, CODES, 6))
    for parameter in rankers.parameters():  # biases and tables that start at 0 would hide a mistake
        torch.nn.init.normal_(parameter, std=0.3)
    return rankers.eval().requires_grad_(False)


def candidates(batch, per_request=4, seed=0):
    item_N = torch.randint(NUM_ITEMS, (len(batch.request_token_R) * per_request,), generator=torch.Generator().manual_seed(seed))
    return torch.arange(len(batch.request_token_R)).repeat_interleave(per_request), item_N, torch.from_numpy(CODES_ML).long()[item_N]


def test_tokens_after_a_site_targets_and_other_rows_play_no_part(rankers):
    batch = batch_of(range(24))
    request_N, item_N, codes_NL = candidates(batch)
    expected_N3 = rankers(batch, request_N, item_N, codes_NL)
    position_T, changed = torch.arange(batch.num_tokens), 0
    for request in range(0, len(batch.request_token_R), 3):
        row = batch.request_row_R[request]
        seen_T = (position_T >= batch.offsets_B1[row]) & (position_T <= batch.request_token_R[request])
        is_item_T = batch.item_T >= 0
        other = torch.randint(NUM_ITEMS, (batch.num_tokens,))
        hide = (~seen_T) & is_item_T
        changed += int(hide.sum())
        item_T = torch.where(hide, other, batch.item_T)
        future = dataclasses.replace(
            batch, item_T=item_T, codes_TL=torch.where(hide[:, None], torch.from_numpy(CODES_ML).long()[item_T], batch.codes_TL),
            action_T=torch.where(hide, int(Action.CONVERSION), batch.action_T), value_T=torch.where(hide, 1e6, batch.value_T),
            timestamp_T=torch.where(seen_T, batch.timestamp_T, batch.timestamp_T + 977), target_item_N=batch.target_item_N.flip(0),
            target_action_N=batch.target_action_N.flip(0), target_value_N=batch.target_value_N + 1)
        mine = request_N == request
        torch.testing.assert_close(rankers(future, request_N, item_N, codes_NL)[mine], expected_N3[mine], rtol=0, atol=1e-6)
    assert changed > 1000


def test_what_came_before_the_site_does_play_a_part(rankers):
    batch = batch_of(range(24))
    request_N, item_N, codes_NL = candidates(batch)
    logits_N3 = rankers(batch, request_N, item_N, codes_NL)
    for change in ({"action_T": torch.where(batch.item_T >= 0, int(Action.CONSUME), batch.action_T)},
                   {"user_features_UF": batch.user_features_UF + 1}, {"env_features_EF": batch.env_features_EF + 1},
                   {"request_time_R": batch.request_time_R + 7000}, {"item_T": torch.where(batch.item_T >= 0, 3, batch.item_T)}):
        assert not torch.allclose(rankers(dataclasses.replace(batch, **change), request_N, item_N, codes_NL), logits_N3, atol=1e-3)


def test_packing_and_the_order_and_number_of_candidates_change_nothing(rankers):
    batch = batch_of(range(24))
    request_N, item_N, codes_NL = candidates(batch)
    together_N3 = rankers(batch, request_N, item_N, codes_NL)
    shuffled = torch.randperm(len(item_N))
    torch.testing.assert_close(rankers(batch, request_N[shuffled], item_N[shuffled], codes_NL[shuffled]), together_N3[shuffled])
    kept = torch.arange(0, len(item_N), 7)
    torch.testing.assert_close(rankers(batch, request_N[kept], item_N[kept], codes_NL[kept]), together_N3[kept])
    found = 0
    for row in range(24):
        alone, mine = batch_of([row]), batch.request_row_R[request_N] == row
        number_N = request_N[mine] - (request_N[mine].min() if mine.any() else 0)
        torch.testing.assert_close(rankers(alone, number_N, item_N[mine], codes_NL[mine]), together_N3[mine])
        found += int(mine.sum())
    assert found == len(item_N)


def test_large_inputs_are_compared_in_parts(rankers, monkeypatch):
    batch = batch_of(range(24))
    arguments = candidates(batch)
    expected_N3 = rankers(batch, *arguments)
    monkeypatch.setattr("gpr_dist.rl.rankers.COMPARED_AT_ONCE", 50)
    torch.testing.assert_close(rankers(batch, *arguments), expected_N3)


def test_the_past_is_weighted_by_action_and_age():
    batch = batch_of(range(24))
    past = recent_past(batch, CONFIG, torch.tensor(CONFIG.half_lives_s))
    lengths = set()
    for request, (site, row) in enumerate(zip(batch.request_token_R.tolist(), batch.request_row_R.tolist(), strict=True)):
        seen = [t for t in range(int(batch.offsets_B1[row]), site + 1) if batch.item_T[t] >= 0][::-1][: CONFIG.history_events]
        lengths.add(len(seen))
        assert past.token_RH[request][past.known_RH[request]].tolist() == seen
        assert not past.weight_RHW[request][~past.known_RH[request]].any()
        for number, token in enumerate(seen):
            age = int(batch.request_time_R[request] - batch.timestamp_T[token])
            weights = [2 ** (-age / half_life) * (batch.action_T[token] == action)
                       for action in ACTIONS for half_life in CONFIG.half_lives_s]
            torch.testing.assert_close(past.weight_RHW[request, number], torch.tensor(weights, dtype=torch.float32))
    assert {0, CONFIG.history_events} < lengths


def test_conversions_younger_than_their_delay_are_read_as_clicks():
    batch = dataclasses.replace(batch_of(range(24)))
    batch.action_T[batch.token_type_T == TokenType.I] = int(Action.CONVERSION)
    config = CONFIG.model_copy(update={"conversion_delay_s": 4000.0})
    past = recent_past(batch, config, torch.tensor([1e12]))
    age_RH = batch.request_time_R[:, None] - batch.timestamp_T[past.token_RH]
    is_ad_RH = past.known_RH & (batch.token_type_T[past.token_RH] == TokenType.I)
    weight_RHC = past.weight_RHW.round().bool()
    assert torch.equal(weight_RHC[:, :, 2], is_ad_RH & (age_RH < 4000)) and weight_RHC[:, :, 2].any()
    assert torch.equal(weight_RHC[:, :, 3], is_ad_RH & (age_RH >= 4000)) and weight_RHC[:, :, 3].any()


def test_matches_are_those_of_a_slow_search(rankers):
    batch = batch_of(range(8))
    request_N, item_N, codes_NL = candidates(batch, 6)
    requests = rankers.encode(batch)
    match_NZW = rankers._matches(requests, request_N, item_N, codes_NL).unflatten(1, (LEVELS + 2, -1)).expm1()
    content = torch.nn.functional.normalize(rankers._content(torch.from_numpy(CODES_ML).long()), dim=1)
    for n, (request, item) in enumerate(zip(request_N.tolist(), item_N.tolist(), strict=True)):
        expected_ZW = torch.zeros(LEVELS + 2, match_NZW.shape[2])
        for token, known, weight_W in zip(*(x[request] for x in requests.past[:3]), strict=True):
            if known:
                past_item = int(batch.item_T[token])
                for depth in range(LEVELS):
                    expected_ZW[depth] += weight_W * (CODES_ML[past_item, : depth + 1] == CODES_ML[item, : depth + 1]).all().item()
                expected_ZW[LEVELS] += weight_W * (past_item == item)
                expected_ZW[LEVELS + 1] += weight_W * torch.exp(CONFIG.sharpness * (content[past_item] @ content[item] - 1))
        torch.testing.assert_close(match_NZW[n], expected_ZW, rtol=1e-4, atol=1e-5)
    assert (match_NZW[:, LEVELS] > 0).any() and (match_NZW[:, LEVELS - 1] > 0).any()


def test_a_batch_without_features_past_or_requests_is_fine(rankers):
    bare = Rankers(CONFIG, LEVELS, CODES, 0, 0)
    batch = random_batch(0, num_levels=LEVELS, codebook_size=CODES, num_fields=2)
    first = (batch.token_type_T != TokenType.O) & (batch.token_type_T != TokenType.I)
    empty = dataclasses.replace(batch, item_T=torch.where(first, batch.item_T, -1), user_features_UF=torch.zeros((0, 0), dtype=torch.int64),
                                env_features_EF=torch.zeros((0, 0), dtype=torch.int64))
    logits_N3 = bare(empty, *candidates(empty))
    assert logits_N3.isfinite().all() and len(logits_N3) == 4 * len(batch.request_token_R)
    none = dataclasses.replace(batch, **{name: getattr(batch, name)[:0] for name in ("request_token_R", "request_row_R", "request_time_R")})
    assert bare(none, *(x[:0] for x in candidates(batch))).shape == (0, 3)
