"""Popularity of codes in a user's own history, and what it pays, against a slow walk; and the running scale of rewards."""

from collections import Counter

import pytest
import torch
from rl_market import market_batch, sampler
from tiny_model import L, V, tiny_model

from gpr_dist.rl.rewards import ProcessRewardConfig, RewardScale, code_popularity, process_rewards
from gpr_dist.schema import Action

SUCCESSES = {"consume": Action.CONSUME, "click": Action.CLICK, "conversion": Action.CONVERSION}


def walk(batch, request, level, config):
    """Decayed share of each code of a level among the successes before a request's site."""
    row, site = int(batch.request_row_R[request]), int(batch.request_token_R[request])
    weights = Counter()
    for token in range(int(batch.offsets_B1[row]), site + 1):
        if batch.item_T[token] >= 0 and int(batch.action_T[token]) in [SUCCESSES[name] for name in config.successes]:
            age_days = float(batch.request_time_R[request] - batch.timestamp_T[token]) / 86_400
            weights[int(batch.codes_TL[token, level])] += 0.5 ** (max(age_days, 0) / config.half_life_days)
    total = sum(weights.values())
    return [weights[code] / total if total else 0.0 for code in range(V)]


@pytest.mark.parametrize("config", [ProcessRewardConfig(half_life_days=0.05), ProcessRewardConfig(successes=("click",), half_life_days=1)])
def test_popularity_equals_a_walk_over_the_row(config):
    batch = market_batch(1, num_rows=6)
    found = code_popularity(batch, V, config)
    assert found.shape == (len(batch.request_row_R), L - 1, V)
    for request in range(len(found)):
        for level in range(L - 1):
            assert found[request, level].tolist() == pytest.approx(walk(batch, request, level, config), abs=1e-5)
    assert set(found.sum(2).round(decimals=4).flatten().tolist()) <= {0.0, 1.0} and found.any()


def test_tokens_after_the_site_pay_nothing():
    batch = market_batch(1)
    before = code_popularity(batch, V, ProcessRewardConfig())
    last = torch.zeros(batch.num_rows, dtype=torch.long).scatter_reduce(0, batch.request_row_R, batch.request_token_R, "amax")
    later = torch.arange(batch.num_tokens) > last[torch.repeat_interleave(batch.offsets_B1.diff())]
    batch.codes_TL[later & (batch.item_T >= 0)] = 0
    assert later.any() and torch.equal(before, code_popularity(batch, V, ProcessRewardConfig()))


def test_a_code_earns_what_it_is_more_popular_than_the_legal_codes_are_on_average():
    batch, config = market_batch(2, num_rows=6), ProcessRewardConfig()
    rollout = sampler(tiny_model(), num_candidates=8)(batch, 0).batch
    popularity = code_popularity(rollout, V, config)
    found = process_rewards(popularity, rollout.target_request_N, rollout.target_codes_NL, rollout.target_offset_NLV, alpha=0.5)
    for n, request in enumerate(rollout.target_request_N.tolist()):
        for level in range(L - 1):
            share = popularity[request, level]
            legal = rollout.target_offset_NLV[n, level] > -torch.inf
            expected = 0.5 * max(0.0, float(share[rollout.target_codes_NL[n, level]] - share[legal].mean()))
            assert float(found[n, level]) == pytest.approx(expected, abs=1e-6)
    assert (found > 0).any() and (found == 0).any() and not process_rewards(
        popularity, rollout.target_request_N, rollout.target_codes_NL, rollout.target_offset_NLV, 0.0).any()


def test_scaled_rewards_have_unit_deviation_and_do_not_know_the_currency():
    def scaled(factor, shift):
        scale = RewardScale()
        for step in range(5):
            scale.update(factor * (2 + 0.1 * step) + shift, (factor * 3) ** 2)
        again = RewardScale.of(scale.state())
        reward = factor * torch.tensor([-1.0, 2.0, 5.0]) + shift
        assert torch.equal(again(reward), scale(reward))
        return scale(reward)

    torch.testing.assert_close(scaled(1, 0), scaled(1000, 5000), rtol=0, atol=1e-5)
    assert scaled(1, 0).diff().tolist() == pytest.approx([1, 1], abs=1e-6)
    scale = RewardScale()
    scale.update(4.0, 9.0)
    assert scale(torch.tensor([4.0, 7.0])).tolist() == pytest.approx([0, 1], abs=1e-6), "from the first step on"
