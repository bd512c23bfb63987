"""HEPO's objectives against numbers worked out by hand, and the laws that hold for any input."""

import pytest
import torch

from gpr_dist.objectives.dpo import best_and_worst, dpo_loss
from gpr_dist.objectives.hepo import (
    clipped_share,
    critic_loss,
    group_kl,
    grpo_advantages,
    hepo_advantages,
    is_constant,
    policy_loss,
    policy_ratios,
    returns,
    z_scores,
)

GROUPS = torch.tensor([0, 0, 0, 1, 1, 3])  # group 2 is empty, group 3 has one candidate
ALL = torch.ones(6, dtype=torch.bool)


def test_advantages_of_three_levels_by_hand():
    gamma, lam = 0.9, 0.5
    terminal, process = torch.tensor([3.0, 1.0]), torch.tensor([[0.2, 0.4], [0.0, 0.1]])
    value = torch.tensor([[1.0, 2.0, 0.5], [1.0, 0.0, 3.0]])
    delta_1 = torch.tensor([0.2 + 0.9 * 2.0 - 1.0, 0.0 + 0.9 * 0.0 - 1.0])
    delta_2 = torch.tensor([0.4 + 0.9 * 0.5 - 2.0, 0.1 + 0.9 * 3.0 - 0.0])
    found = hepo_advantages(terminal, process, value, torch.tensor([0, 0]), 1, gamma, lam)
    torch.testing.assert_close(found, torch.stack((delta_1 + gamma * lam * delta_2, delta_2, torch.tensor([1.0, -1.0])), 1))


def test_a_path_ends_with_its_last_choice():
    gamma, lam = 0.9, 0.5
    terminal, process, value = torch.tensor([3.0, 1.0, 3.0, 1.0]), torch.rand(4, 2), torch.rand(4, 3)
    choice = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [True, False, True]])
    group = torch.zeros(4, dtype=torch.long)
    delta = process + gamma * value[:, 1:] - value[:, :-1]
    found = hepo_advantages(terminal, process, value, group, 1, gamma, lam, choice)
    long = delta[:, 0] + gamma * lam * delta[:, 1]
    expected = torch.tensor([[long[0], delta[0, 1], 1], [delta[1, 0], -1, 0], [1, 0, 0], [long[3], delta[3, 1], -1]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    everything = torch.ones(4, 3, dtype=torch.bool)
    assert torch.equal(hepo_advantages(terminal, process, value, group, 1, gamma, lam, everything),
                       hepo_advantages(terminal, process, value, group, 1, gamma, lam))


def test_returns_by_hand():
    found = returns(torch.tensor([4.0]), torch.tensor([[1.0, 2.0]]), 0.5)
    assert found.tolist() == [[1.0 + 0.5 * (2.0 + 0.5 * 4.0), 2.0 + 0.5 * 4.0, 4.0]]


def test_a_single_level_has_no_recursion():
    terminal, none = torch.tensor([1.0, 3.0]), torch.empty(2, 0)
    assert hepo_advantages(terminal, none, torch.zeros(2, 1), torch.tensor([0, 0]), 1, 1.0, 0.95)[:, 0] == pytest.approx([-1, 1], abs=1e-5)
    assert returns(terminal, none, 1.0).tolist() == [[1.0], [3.0]]


def test_advantages_do_not_depend_on_a_shift_of_rewards_and_values():
    torch.manual_seed(0)
    terminal, process, value = torch.rand(6), torch.rand(6, 2), torch.rand(6, 3)
    a, b = (hepo_advantages(terminal + shift, process, value + shift, GROUPS, 4, 1.0, 0.95) for shift in (0.0, 5.0))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_z_scores_of_a_group_have_mean_0_and_deviation_1_and_are_0_where_rewards_are_equal():
    reward = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 7.0])
    z = z_scores(reward, GROUPS, 4)
    assert z[:3].mean().abs() < 1e-6 and z[:3].square().mean() == pytest.approx(1, abs=1e-5)
    assert z[3:].tolist() == [0, 0, 0]
    assert grpo_advantages(reward, 3, GROUPS, 4).T.tolist() == [z.tolist()] * 3


def test_constant_groups_are_named_whatever_their_size_and_scale():
    reward = torch.tensor([1.0, 2.0, 6.0, 5e8, 5e8, 7.0])
    assert is_constant(reward, GROUPS, 4).tolist() == [False, True, True, True]
    assert is_constant(reward * 1e-12, GROUPS, 4).tolist() == [False, True, True, True]


def surrogate(ratio: float, advantage: float) -> tuple[float, float]:
    """Loss and its gradient by log p of one candidate with one level."""
    log_p = torch.tensor([[ratio]]).log().requires_grad_()
    loss = policy_loss(log_p, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1), 0.2, torch.tensor([True]), 1)
    loss.backward()
    return float(loss.detach()), float(log_p.grad)


def test_clipping_stops_the_gradient_only_where_the_ratio_has_gone_far_enough():
    for ratio, advantage, loss, gradient in [(1.0, 2.0, -2.0, -2.0), (1.0, -2.0, 2.0, 2.0), (1.5, 2.0, -2.4, 0.0), (0.5, -2.0, 1.6, 0.0),
                                             (0.5, 2.0, -1.0, -1.0), (1.5, -2.0, 3.0, 3.0)]:
        assert surrogate(ratio, advantage) == (pytest.approx(loss, rel=1e-6), pytest.approx(gradient, rel=1e-6))


def test_clipped_pairs_are_counted_where_there_is_no_gradient():
    log_p = torch.tensor([1.5, 0.5, 1.5, 0.5, 1.0, 1.5]).log()[:, None]
    advantage = torch.tensor([2.0, -2.0, -2.0, 2.0, 2.0, 2.0])[:, None]
    counts = torch.tensor([True] * 5 + [False])
    assert int(clipped_share(log_p, torch.zeros(6, 1), advantage, 0.2, counts)) == 2


def test_a_fresh_policy_has_ratio_exactly_1_and_the_plain_policy_gradient():
    torch.manual_seed(1)
    log_p, advantage = (-torch.rand(6, 3) * 9).requires_grad_(), torch.randn(6, 3)
    assert (policy_ratios(log_p, log_p.detach()) == 1).all()
    policy_loss(log_p, log_p.detach(), advantage, torch.tensor([0.2, 0.3, 0.5]), 0.2, ALL, 6).backward()
    torch.testing.assert_close(log_p.grad, -advantage * torch.tensor([0.2, 0.3, 0.5]) / 6)


def test_groups_that_do_not_count_change_nothing():
    torch.manual_seed(2)
    log_p, old, advantage, value, target = (torch.randn(6, 3) for _ in range(5))
    counts = torch.tensor([True, True, True, False, False, True])
    weights = torch.full((3,), 1 / 3)
    whole = policy_loss(log_p, old, advantage, weights, 0.2, counts, 4), critic_loss(value, target, counts, 4)
    kept = policy_loss(log_p[counts], old[counts], advantage[counts], weights, 0.2, counts[counts], 4)
    torch.testing.assert_close(whole[0], kept)
    torch.testing.assert_close(whole[1], ((value - target)[counts] ** 2).sum() / 4)


def test_a_ratio_of_any_size_stays_finite():
    log_p = torch.tensor([[0.0, -200.0]], requires_grad=True)
    loss = policy_loss(log_p, torch.tensor([[-200.0, 0.0]]), torch.tensor([[-1.0, 1.0]]), torch.ones(2), 0.2, ALL[:1], 1)
    loss.backward()
    assert loss.isfinite() and log_p.grad.isfinite().all()


def test_kl_is_0_for_equal_policies_and_that_of_the_renormalised_ones_otherwise():
    torch.manual_seed(3)
    log_p, reference = torch.randn(6), torch.randn(6)
    assert group_kl(log_p, log_p + 3, GROUPS, 4).abs().max() < 1e-6, "a shift is the mass outside the group"
    expected = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x[:3]) for x in (log_p, reference)))
    torch.testing.assert_close(group_kl(log_p, reference, GROUPS, 4)[0], expected)
    assert group_kl(log_p, reference, GROUPS, 4)[2:].tolist() == [0, 0]


def test_best_and_worst_of_every_group():
    best, worst = best_and_worst(torch.tensor([1.0, 6.0, 2.0, 5.0, 5.0, -7.0]), GROUPS, 4)
    assert best.tolist() == [1, 3, 5] and worst.tolist() == [0, 3, 5]


def test_dpo_gradient_is_that_of_the_paper():
    beta = 0.1
    best, worst = torch.tensor([-3.0, -1.0], requires_grad=True), torch.tensor([-2.0, -4.0], requires_grad=True)
    reference = torch.tensor([-2.0, -2.0]), torch.tensor([-5.0, -2.5])
    dpo_loss(best, worst, *reference, beta, 2).backward()
    margin = beta * ((best - reference[0]) - (worst - reference[1])).detach()
    expected = -beta * torch.sigmoid(-margin) / 2
    torch.testing.assert_close(best.grad, expected)
    torch.testing.assert_close(worst.grad, -expected)
    assert float(dpo_loss(*reference, *reference, beta, 2)) == pytest.approx(0.693147, rel=1e-5), "equal policies: log 2"


@pytest.mark.parametrize("algorithm", ["hepo", "grpo", "dpo"])
def test_two_armed_trie_converges_to_the_better_arm(algorithm):
    """Level 1 has two codes, and below each lie two of the second: the best path is (1, 0), the worst (0, 0)."""
    reward = torch.tensor([[0.0, 0.2], [1.0, 0.1]])
    paths = torch.cartesian_prod(torch.arange(2), torch.arange(2))
    first, second, critic = torch.zeros(2), torch.zeros(2, 2), torch.zeros(3)  # logits, and V_0, V(z_1 = 0), V(z_1 = 1)
    for x in (first, second, critic):
        x.requires_grad_()
    group, terminal = torch.zeros(4, dtype=torch.long), reward[paths[:, 0], paths[:, 1]]
    optimizer = torch.optim.Adam([first, second, critic], lr=0.05)

    def log_p() -> torch.Tensor:
        return torch.stack((first.log_softmax(0)[paths[:, 0]], second.log_softmax(1)[paths[:, 0], paths[:, 1]]), 1)

    start, counts = log_p().detach(), torch.ones(4, dtype=torch.bool)
    for step in range(200):
        if step % 4 == 0:
            old = log_p().detach()
        now, value = log_p(), torch.stack((critic[0].expand(4), critic[1 + paths[:, 0]]), 1)
        if algorithm == "dpo":
            best, worst = best_and_worst(terminal, group, 1)
            loss = dpo_loss(now[best].sum(1), now[worst].sum(1), start[best].sum(1), start[worst].sum(1), 0.1, 1)
        elif algorithm == "grpo":
            loss = policy_loss(now, old, grpo_advantages(terminal, 2, group, 1), torch.full((2,), 0.5), 0.2, counts, 4)
        else:
            advantage = hepo_advantages(terminal, torch.zeros(4, 1), value.detach(), group, 1, 1.0, 0.95)
            loss = policy_loss(now, old, advantage, torch.full((2,), 0.5), 0.2, counts, 4)
            loss = loss + 0.5 * critic_loss(value, returns(terminal, torch.zeros(4, 1), 1.0), counts, 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    probability = log_p().detach().sum(1).exp()
    assert probability.argmax() == 2 and probability[2] > 0.8, probability
    if algorithm == "hepo":
        assert critic[2] > critic[1], "the critic knows the better first code"
