"""Rollouts on a small catalogue: candidates are eligible, distinct and the policy's own, and show the best ad of their semantic ID."""

import pytest
import torch
from random_batches import empty_batch
from rl_market import CODES, ELIGIBILITY, TableReward, joined, market_batch, prepared, sampler
from tiny_model import tiny_model

from gpr_dist.errors import TrainingError
from gpr_dist.objectives.hepo import policy_ratios
from gpr_dist.rl.rollout import choose_requests, take_requests

KINDS = {"legal": {}, "prior": {"softmax": "prior"}, "pointer": {"pointer": True},
         "pointer and prior": {"softmax": "prior", "pointer": True}}


def model_of(kind):
    pointer = {"pointer": {"width": 8}} if KINDS[kind].get("pointer") else {}
    return tiny_model(ptd={"num_thinking": 2, "refining": True}, critic=True, **pointer)


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_sees_the_policy_that_was_searched_and_a_fresh_ratio_is_exactly_1(kind):
    model = model_of(kind)
    batch = prepared(market_batch(1), "pointer" in kind)
    rollout = sampler(model, **KINDS[kind], num_candidates=10, requests_per_row=3)(batch, step=0)
    assert len(rollout.group_N) > 20
    now, again = (-model(rollout.batch, task="policy").nll_NL for _ in range(2))
    assert now.requires_grad and (policy_ratios(now, again.detach()) == 1).all()
    torch.testing.assert_close(now.detach(), rollout.steps_NL, rtol=0, atol=1e-5)
    with torch.no_grad():  # PyTorch's attention takes another kernel without gradients: close, not equal
        torch.testing.assert_close(-model(rollout.batch, task="policy").nll_NL, now, rtol=0, atol=1e-5)


def test_every_eligible_semantic_id_is_found_and_shows_its_best_ad():
    reward, batch = TableReward(), market_batch(2)
    rollout = sampler(tiny_model(), reward=reward, num_candidates=60)(batch, step=0, every_request=True)
    shown = rollout.batch.target_item_N
    assert torch.equal(rollout.value_N, reward.value_M[shown]) and torch.equal(rollout.ecpm_N, 10 * reward.value_M[shown])
    assert torch.equal(rollout.batch.target_codes_NL, torch.from_numpy(CODES)[shown]) and (rollout.group_N.diff() >= 0).all()
    skipped = 0
    for request, group in enumerate(batch.request_eligibility_R.tolist()):
        best = {}
        for item in ELIGIBILITY.items(group).tolist():
            path = tuple(CODES[item].tolist())
            best[path] = max(item, best.get(path, item), key=lambda one: float(reward.value_M[one]))
        skipped += len(best) < 2
        assert sorted(shown[rollout.group_N == request].tolist()) == (sorted(best.values()) if len(best) > 1 else [])
    assert rollout.num_skipped == skipped > 2 and rollout.num_requests == len(batch.request_row_R) - skipped


def test_a_request_draws_the_same_in_any_company_and_others_in_another_step():
    model, many, few = tiny_model(), market_batch(3), market_batch(4)
    sample = sampler(model, num_candidates=5, requests_per_row=2)
    alone, again, later = (sample(few, step) for step in (7, 7, 8))
    chunked = sampler(model, num_candidates=5, requests_per_row=2, chunk_requests=1)
    for together in (sample(joined(many, few), 7), chunked(joined(many, few), 7)):
        mine = together.batch.request_row_R[together.group_N] >= many.num_rows
        assert together.batch.target_codes_NL[mine].tolist() == alone.batch.target_codes_NL.tolist()
        torch.testing.assert_close(together.steps_NL[mine], alone.steps_NL, rtol=0, atol=1e-5)
    assert torch.equal(alone.batch.target_codes_NL, again.batch.target_codes_NL)
    assert later.batch.target_codes_NL.tolist() != alone.batch.target_codes_NL.tolist()


def test_requests_are_chosen_by_row():
    batch = market_batch(6, num_rows=12)
    for per_row in (1, 2, 100):
        keep = choose_requests(batch, per_row, seed=0)
        count = torch.bincount(batch.request_row_R, minlength=12)
        assert torch.bincount(batch.request_row_R[keep], minlength=12).tolist() == count.clamp_max(per_row).tolist()
    assert not torch.equal(choose_requests(batch, 1, 0), choose_requests(batch, 1, 1))


def test_taking_requests_keeps_what_they_may_copy():
    batch = prepared(market_batch(1), True)
    keep = choose_requests(batch, 1, 0)
    taken = take_requests(batch, keep)
    expected = prepared(take_requests(market_batch(1), keep), True)
    assert torch.equal(taken.copy_request_M, expected.copy_request_M) and torch.equal(taken.copy_source_M, expected.copy_source_M)
    assert len(taken.target_request_N) == 0 and len(taken.request_row_R) == int(keep.sum())


def test_every_rank_calls_the_model_equally_often():
    model, counts = tiny_model(), []

    def counting(*args, **kwargs):
        counts[-1].append(kwargs["task"])
        return model(*args, **kwargs)

    for batch in (market_batch(1), market_batch(1, groups=(3,)), empty_batch()):
        counts.append([])
        rollout = sampler(counting)(batch, step=0)
        model(rollout.batch, task="policy")
    assert counts[0] == counts[1] == counts[2] == ["encode", "decode", "decode", "decode"]
    assert len(rollout.group_N) == 0


def test_a_reward_that_is_not_finite_names_the_ad():
    reward = TableReward()
    reward.value_M[6] = torch.nan
    with pytest.raises(TrainingError, match="item 6 at nan"):
        sampler(tiny_model(), reward=reward, num_candidates=60)(market_batch(2, groups=(0,)), step=0)
