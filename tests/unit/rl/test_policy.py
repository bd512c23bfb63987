"""The update on rollouts of a small catalogue: it does not depend on the split, and pushes where the rewards say."""

import dataclasses

import pytest
import torch
from rl_market import joined, market_batch, sampler
from tiny_model import L, V, tiny_model

from gpr_dist.model.gpr import PolicyOutput
from gpr_dist.objectives.hepo import is_constant
from gpr_dist.rl.policy import PolicyConfig, Rolled, policy_share
from gpr_dist.rl.rewards import RewardScale

ALGORITHMS = ["hepo", "grpo", "dpo"]


def rolled(batch, noise=0.0, **settings):
    """A rollout with its reference, and its policy's output as leaves."""
    torch.manual_seed(0)
    model = tiny_model(critic=True)
    rollout = sampler(model, num_candidates=6, **settings)(batch, 0)
    constant_R = is_constant(rollout.value_N, rollout.group_N, len(rollout.batch.request_row_R))
    with torch.no_grad():
        output = model(rollout.batch, task="policy")
    key_N = rollout.batch.target_item_N.float()  # noise that belongs to the candidate
    old = -output.nll_NL + noise * torch.sin(key_N)[:, None]
    value_NL = torch.cos(key_N)[:, None] * torch.arange(1, L + 1) / L
    leaves = PolicyOutput(output.nll_NL.requires_grad_(), value_NL.requires_grad_())
    return Rolled(rollout, ~constant_R, old, old.sum(1) + 0.1 * torch.cos(key_N)), leaves


def scale():
    found = RewardScale()
    found.update(0.4, 0.05)
    return found


def last_choice(one):
    """Level at which each candidate's ad is decided, from 0."""
    choices_NL = (one.rollout.batch.target_offset_NLV > -torch.inf).sum(2) > 1
    return torch.where(choices_NL, torch.arange(L), 0).amax(1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_shares_of_a_split_sum_to_the_whole(algorithm):
    config = PolicyConfig(algorithm=algorithm, kl_weight=0.2)
    one, two = market_batch(1), market_batch(2)
    parts, losses = [rolled(one, 0.3), rolled(two, 0.3), rolled(joined(one, two), 0.3)], []
    groups, candidates = (float(getattr(parts[2][0], name).sum()) for name in ("counts_R", "counts_N"))
    for rolled_out, output in parts:
        loss, sums = policy_share(output, rolled_out, scale(), config, V, groups, candidates)
        loss.backward()
        losses.append((float(loss.detach()), {name: float(value) for name, value in sums.items()}))
    assert losses[0][0] + losses[1][0] == pytest.approx(losses[2][0], rel=1e-4)
    assert {name: losses[0][1][name] + losses[1][1][name] for name in losses[2][1]} == pytest.approx(losses[2][1], rel=1e-4, abs=1e-5)
    whole = torch.cat([output.nll_NL.grad for _, output in parts[:2]])
    torch.testing.assert_close(whole, parts[2][1].nll_NL.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_best_candidate_becomes_more_likely_and_the_worst_less(algorithm):
    one, output = rolled(market_batch(3))
    loss, _ = policy_share(output, one, scale(), PolicyConfig(algorithm=algorithm), V, 1.0, 1.0)
    loss.backward()
    gradient_N = output.nll_NL.grad.gather(1, last_choice(one)[:, None])[:, 0]
    for request in one.counts_R.nonzero().flatten().tolist():
        mine = (one.rollout.group_N == request).nonzero().flatten()
        value = one.rollout.value_N[mine]
        assert gradient_N[mine[value.argmax()]] > 0 > gradient_N[mine[value.argmin()]], "descent lowers the first -log p"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_groups_of_equal_rewards_get_no_gradient(algorithm):
    one, output = rolled(market_batch(3))
    flat = one.rollout.group_N == one.rollout.group_N[0]
    value_N = torch.where(flat, 0.5, one.rollout.value_N)
    constant_R = is_constant(value_N, one.rollout.group_N, len(one.counts_R))
    one = dataclasses.replace(one, rollout=dataclasses.replace(one.rollout, value_N=value_N), counts_R=~constant_R)
    loss, _ = policy_share(output, one, scale(), PolicyConfig(algorithm=algorithm, kl_weight=1.0), V, 3.0, 9.0)
    loss.backward()
    assert not output.nll_NL.grad[flat].any() and output.nll_NL.grad[~flat].any()
    if algorithm == "hepo":
        assert not output.value_NL.grad[flat].any() and output.value_NL.grad[~flat].any()


def test_the_critic_changes_the_early_levels_alone():
    gradients = []
    for factor in (1.0, 3.0):
        one, output = rolled(market_batch(3))
        with torch.no_grad():
            output.value_NL.mul_(factor)
        policy_share(output, one, scale(), PolicyConfig(critic_weight=0), V, 1.0, 1.0)[0].backward()
        gradients.append(output.nll_NL.grad)
        assert not output.value_NL.grad.any()
    early_NL = torch.arange(L) < last_choice(one)[:, None]
    assert torch.equal(gradients[0][~early_NL], gradients[1][~early_NL])
    assert not torch.allclose(gradients[0][early_NL], gradients[1][early_NL])


def test_without_rollouts_there_is_a_loss_of_zero_with_a_gradient():
    one, output = rolled(market_batch(1, groups=(3,)))
    assert len(one.rollout.group_N) == 0
    for algorithm in ALGORITHMS:
        loss, sums = policy_share(output, one, scale(), PolicyConfig(algorithm=algorithm), V, 1.0, 1.0)
        loss.backward()
        assert float(loss.detach()) == 0 and all(float(value) == 0 for value in sums.values())
