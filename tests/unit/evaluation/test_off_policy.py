"""Off-policy estimates on bandits whose truth is known: unbiased, covered by their intervals, and consistent with each other."""

import numpy as np
import pytest

from gpr_dist.errors import DataError
from gpr_dist.evaluation.intervals import BootstrapConfig
from gpr_dist.evaluation.off_policy import (
    Logged,
    OffPolicyConfig,
    Policy,
    estimate,
    evaluate_policy,
    importance_weights,
    mean_reward,
    policy_of,
    predict_rewards,
)

NUM_CONTEXTS, NUM_ACTIONS = 4, 6
SETTINGS = OffPolicyConfig(bootstrap=BootstrapConfig(replicates=200))
CLUSTER = 2  # impressions of a user


def bandit(seed: int, num_rows: int = 2000) -> tuple[Logged, Policy, float]:
    """A logged bandit with clicks, a target policy far from the logging one, and the target's true value."""
    fixed = np.random.default_rng(99)
    rate_CA = fixed.uniform(0.05, 0.6, (NUM_CONTEXTS, NUM_ACTIONS))
    logging_CA = fixed.dirichlet(np.full(NUM_ACTIONS, 2.0), NUM_CONTEXTS)
    target_CA = np.exp(6 * rate_CA) / np.exp(6 * rate_CA).sum(axis=1, keepdims=True)
    random = np.random.default_rng(seed)
    context = random.integers(0, NUM_CONTEXTS, num_rows)
    action = (random.random((num_rows, 1)) > np.cumsum(logging_CA, axis=1)[context]).sum(axis=1).clip(0, NUM_ACTIONS - 1)
    reward = (random.random(num_rows) < rate_CA[context, action]).astype(float)
    logged = Logged(action, reward, logging_CA[context, action], context[:, None], np.arange(num_rows) // CLUSTER)
    return logged, Policy(target_CA, context), float((rate_CA * target_CA).sum(axis=1).mean())


def test_unbiased_and_covered_on_a_known_bandit() -> None:
    found = [evaluate_policy(*bandit(seed)[:2], SETTINGS)["estimators"] for seed in range(60)]
    truth = bandit(0)[2]
    for name in ("ips", "snips", "dr"):
        values = np.array([each[name][0] for each in found])
        assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / np.sqrt(len(values)), name
        covered = np.mean([each[name][1] <= truth <= each[name][2] for each in found])
        assert covered >= 0.85, f"{name}: {covered}"  # 0.95 nominal; 60 draws make less than .86 a 1-in-1000 event
    logging = np.array([each["logging"][0] for each in found])
    assert abs(logging.mean() - truth) > 10 * logging.std() / np.sqrt(len(logging))  # the question is not trivial
    assert np.std([each["dr"][0] for each in found]) < np.std([each["ips"][0] for each in found])


def test_the_logging_policy_itself_is_its_mean() -> None:
    logged, _, _ = bandit(1)
    same = estimate(logged.reward_N, np.ones(len(logged.reward_N)), logged.reward_N * 0 + 0.3, logged.reward_N * 0 + 0.3, logged.user_N,
                    SETTINGS.bootstrap)
    mean = mean_reward(logged.reward_N, logged.user_N, SETTINGS.bootstrap)
    for name in ("ips", "snips", "dr", "logging"):
        assert same["estimators"][name] == pytest.approx(mean)
    assert same["effective_samples"] == pytest.approx(len(logged.reward_N))


def test_doubly_robust_is_right_when_the_propensities_are_not() -> None:
    """With the true reward model, wrong propensities cost IPS its truth, not DR."""
    fixed = np.random.default_rng(99)
    rate_CA = fixed.uniform(0.05, 0.6, (NUM_CONTEXTS, NUM_ACTIONS))
    errors = {"ips": [], "dr": []}
    for seed in range(40):
        logged, policy, truth = bandit(seed)
        weight_N = importance_weights(logged._replace(propensity_N=np.full(len(logged.reward_N), 0.4)), policy)
        predicted_N = rate_CA[policy.context_N, logged.action_N]
        expected_N = (rate_CA * policy.probability_CA).sum(axis=1)[policy.context_N]
        found = estimate(logged.reward_N, weight_N, predicted_N, expected_N, logged.user_N, SETTINGS.bootstrap)["estimators"]
        for name, error in errors.items():
            error.append(found[name][0] - truth)
    assert abs(np.mean(errors["dr"])) < 4 * np.std(errors["dr"]) / np.sqrt(40)
    assert abs(np.mean(errors["ips"])) > 10 * np.std(errors["ips"]) / np.sqrt(40)


def test_no_prediction_sees_its_own_user() -> None:
    logged, policy, _ = bandit(2, 300)
    before, _ = predict_rewards(logged, policy, SETTINGS)
    own = logged.user_N == logged.user_N[0]
    changed = logged._replace(reward_N=np.where(own, 1 - logged.reward_N, logged.reward_N))
    after, _ = predict_rewards(changed, policy, SETTINGS)
    assert np.array_equal(before[own], after[own])
    assert not np.allclose(before[~own], after[~own])


@pytest.mark.parametrize("scale", [1.0, 25.0])  # clicks: logistic; revenue: linear
def test_the_direct_model_learns_the_rates(scale: float) -> None:
    logged, policy, truth = bandit(3, 40_000)
    found = evaluate_policy(logged._replace(reward_N=logged.reward_N * scale), policy, SETTINGS)["estimators"]
    assert found["dm"][0] == pytest.approx(truth * scale, rel=0.05)
    assert abs(found["logging"][0] / scale - truth) > 0.1 * truth


def test_cut_weights_lower_the_estimate() -> None:
    logged, policy, _ = bandit(4)
    cut = evaluate_policy(logged, policy, SETTINGS.model_copy(update={"max_weight": 1.0}))
    whole = evaluate_policy(logged, policy, SETTINGS)
    assert cut["max_weight"] == 1.0 < whole["max_weight"]
    assert cut["estimators"]["ips"][0] < whole["estimators"]["ips"][0]
    assert cut["effective_samples"] > whole["effective_samples"]


def test_a_policy_from_its_logs() -> None:
    policy_CA = policy_of(np.array([0, 0, 0, 1]), np.array([2, 2, 0, 1]), 2, 3)
    assert policy_CA.tolist() == [[1 / 3, 0, 2 / 3], [0, 1, 0]]
    with pytest.raises(DataError, match="policy context 1 does not occur"):
        policy_of(np.array([0]), np.array([0]), 2, 3)


def test_impossible_propensities_are_named() -> None:
    logged, policy, _ = bandit(5, 50)
    logged.propensity_N[7] = 0
    with pytest.raises(DataError, match=r"impression 7 has propensity 0\.0.* 1 rows"):
        importance_weights(logged, policy)


def test_no_overlap_is_refused() -> None:
    logged, policy, _ = bandit(6, 50)
    never = np.zeros_like(policy.probability_CA)
    never[:, 0] = 1
    logged = logged._replace(action_N=np.ones_like(logged.action_N))
    with pytest.raises(DataError, match="nothing can be estimated"):
        evaluate_policy(logged, Policy(never, policy.context_N), SETTINGS)


def test_rewards_of_one_value() -> None:
    logged, policy, _ = bandit(7, 200)
    found = evaluate_policy(logged._replace(reward_N=np.zeros(200)), policy, SETTINGS)["estimators"]
    assert found["ips"] == [0, 0, 0] and 0 <= found["dm"][0] < 0.01
