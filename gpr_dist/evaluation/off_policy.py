"""What a policy would have earned, estimated from the logs of another one whose propensities were logged.

Owns the estimators (IPS, SNIPS, the direct method, doubly robust), the reward model that the last two need, and their intervals.
Reading logs is the caller's. A policy is a table of probabilities per policy context, e.g. per slot; weights and predictions of the
logged rows are all the estimators see, so any other policy can be handed to `estimate` directly.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field
from scipy import sparse
from sklearn.linear_model import LogisticRegression, Ridge

from gpr_dist.config import Config
from gpr_dist.errors import DataError
from gpr_dist.evaluation.intervals import BootstrapConfig, interval, replicate
from gpr_dist.evaluation.measures import MAX_GROUPS, UserSums

# N logged impressions  F categorical fields of a context  A actions  C policy contexts

VALUES_PER_CHUNK = 1 << 23


class OffPolicyConfig(Config):
    """How a policy's value is estimated from another one's logs."""

    max_weight: float | None = Field(None, gt=0)
    """importance weights are cut here (less variance, biased downwards for rewards >= 0); none = not cut"""
    folds: int = Field(3, ge=2)
    """parts of the logs; each is predicted by a reward model fitted on the others"""
    regularisation: float = Field(10.0, gt=0)
    """L2 penalty of the reward model: pseudo-observations per category"""
    bootstrap: BootstrapConfig = BootstrapConfig()
    """intervals, over users where they are known, else over impressions"""


class Logged(NamedTuple):
    """Impressions of the logging policy."""

    action_N: np.ndarray  # int64 in 0 .. A - 1
    reward_N: np.ndarray  # float64, finite
    propensity_N: np.ndarray  # float64 in (0, 1], of the action under the logging policy
    context_NF: np.ndarray  # int64 >= 0, categories the reward may depend on
    user_N: np.ndarray  # int64, whose impressions are alike; row numbers where users are unknown


class Policy(NamedTuple):
    """Probabilities of every action in each policy context, and the context of each logged row."""

    probability_CA: np.ndarray  # float64, rows sum to 1
    context_N: np.ndarray  # int64 into C


def policy_of(context_M: np.ndarray, action_M: np.ndarray, num_contexts: int, num_actions: int) -> np.ndarray:
    """The average policy of M impressions, float64 [C, A]: how often each action was taken in each policy context.

    Right for a policy that looks at nothing but the policy context, averaged over the time of its logs.
    Raises: DataError for a context without an impression.
    """
    count_CA = np.bincount(context_M * num_actions + action_M, minlength=num_contexts * num_actions).reshape(num_contexts, num_actions)
    total_C = count_CA.sum(axis=1)
    if not total_C.all():
        raise DataError(f"policy context {int(np.flatnonzero(total_C == 0)[0])} does not occur in the target policy's logs; leave it out")
    return count_CA / total_C[:, None]


def importance_weights(logged: Logged, policy: Policy, max_weight: float | None = None) -> np.ndarray:
    """pi(a|x) / pi_0(a|x) of each logged impression, float64 [N]. Raises: DataError for a propensity outside (0, 1]."""
    wrong = ~((logged.propensity_N > 0) & (logged.propensity_N <= 1))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"logged impression {row} has propensity {logged.propensity_N[row]}, not in (0, 1]; {int(wrong.sum())} rows are "
                        "like that: leave them out, or log what the policy drew with")
    weight_N = policy.probability_CA[policy.context_N, logged.action_N] / logged.propensity_N
    return weight_N if max_weight is None else np.minimum(weight_N, max_weight)


def predict_rewards(logged: Logged, policy: Policy, config: OffPolicyConfig) -> tuple[np.ndarray, np.ndarray]:
    """The direct model, learned from the logs: mean reward = link(sum of an effect per context category + one per (policy context,
    action) + one per action), logistic for rewards 0 and 1, linear otherwise. Every impression is predicted by a model that has not seen
    its user.

    Returns: (of the logged action [N], expected under the policy [N]), float64.
    """
    num_actions, num_rows = policy.probability_CA.shape[1], len(logged.action_N)
    sizes = [int(column.max(initial=0)) + 1 for column in logged.context_NF.T]
    action_N, pair_N = logged.action_N, policy.context_N * num_actions + logged.action_N
    columns = [*logged.context_NF.T, action_N, pair_N]
    starts = np.cumsum([0, *sizes, num_actions, policy.probability_CA.size])
    rows = np.repeat(np.arange(num_rows), len(columns))
    hot = np.stack([column + start for column, start in zip(columns, starts, strict=False)], axis=1).ravel()
    features = sparse.csr_matrix((np.ones(len(hot)), (rows, hot)), shape=(num_rows, starts[-1]))
    binary = bool(np.isin(logged.reward_N, (0, 1)).all())
    fold_N = np.random.default_rng(config.bootstrap.seed).permutation(int(logged.user_N.max()) + 1)[logged.user_N] % config.folds
    predicted_N, expected_N = np.empty(num_rows), np.empty(num_rows)
    for fold in range(config.folds):
        inside, outside = np.flatnonzero(fold_N == fold), np.flatnonzero(fold_N != fold)
        effect, constant = _fit(features[outside], logged.reward_N[outside], binary, config.regularisation)
        link = _sigmoid if binary else (lambda x: x)
        context_n = features[inside][:, : starts[-3]] @ effect[: starts[-3]] + constant
        effect_CA = effect[starts[-2] :].reshape(policy.probability_CA.shape) + effect[starts[-3] : starts[-2]]
        predicted_N[inside] = link(context_n + effect_CA[policy.context_N[inside], action_N[inside]])
        for part in np.array_split(np.arange(len(inside)), max(1, len(inside) * num_actions // VALUES_PER_CHUNK)):
            of_part = policy.context_N[inside[part]]
            expected_N[inside[part]] = (policy.probability_CA[of_part] * link(context_n[part, None] + effect_CA[of_part])).sum(axis=1)
    return predicted_N, expected_N


def _fit(features: sparse.csr_matrix, reward: np.ndarray, binary: bool, penalty: float) -> tuple[np.ndarray, float]:
    """Effects and constant; an effect without an impression is 0."""
    if binary and len(np.unique(reward)) < 2:  # no click at all, or nothing else
        rate = (reward.sum() + 0.5) / (len(reward) + 1)
        return np.zeros(features.shape[1]), float(np.log(rate / (1 - rate)))
    if binary:  # the curvature of one impression is rate (1 - rate), which makes `penalty` count impressions
        curvature = reward.mean() * (1 - reward.mean())
        model = LogisticRegression(C=1 / (penalty * curvature), max_iter=1000).fit(features, reward)
        return model.coef_[0], float(model.intercept_[0])
    model = Ridge(alpha=penalty).fit(features, reward)
    return model.coef_, float(model.intercept_)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(x / 2))


def estimate(reward_N: np.ndarray, weight_N: np.ndarray, predicted_N: np.ndarray, expected_N: np.ndarray, user_N: np.ndarray,
             bootstrap: BootstrapConfig) -> dict[str, Any]:
    """The policy's mean reward per impression by each estimator.

        ips   = mean(w r)                        unbiased (Horvitz & Thompson 1952)
        snips = sum(w r) / sum(w)                Swaminathan & Joachims 2015; bounded by the rewards, biased by O(1/N)
        dm    = mean(E_pi q(x, a))               as good as the reward model, whose own error its interval leaves out
        dr    = mean(E_pi q + w (r - q))         Dudik et al. 2011; unbiased where w or q is right

    Args:
        weight_N: pi / pi_0 of each logged action. predicted_N: q of the logged action, not fitted on it. expected_N: E_pi q.
        user_N: >= 0, drawn together.
    Returns: estimators -> {name: [value, low, high]} (`logging` = the logs' own mean); mean_weight (1 where the logs cover the policy);
        effective_samples = sum(w)^2 / sum(w^2); max_weight; impressions.
    """
    sums, row_N = _sums_by_user(user_N, bootstrap), np.arange(len(reward_N))
    sums.add("ips", row_N, weight_N * reward_N)
    sums.add("snips", row_N, weight_N * reward_N, weight_N)
    sums.add("dm", row_N, expected_N)
    sums.add("dr", row_N, expected_N + weight_N * (reward_N - predicted_N))
    sums.add("logging", row_N, reward_N)
    return {"estimators": _with_intervals(sums, bootstrap), "mean_weight": float(weight_N.mean()), "max_weight": float(weight_N.max()),
            "effective_samples": float(weight_N.sum() ** 2 / np.square(weight_N).sum()), "impressions": len(reward_N)}


def mean_reward(reward_N: np.ndarray, user_N: np.ndarray, bootstrap: BootstrapConfig) -> list[float]:
    """[mean, low, high] of a policy in its own logs."""
    sums = _sums_by_user(user_N, bootstrap)
    sums.add("mean", np.arange(len(reward_N)), reward_N)
    return _with_intervals(sums, bootstrap)["mean"]


def _sums_by_user(user_N: np.ndarray, bootstrap: BootstrapConfig) -> UserSums:
    """Many users are joined at random: intervals need no more groups."""
    users, group_N = np.unique(user_N, return_inverse=True)
    if len(users) > MAX_GROUPS:
        group_N = np.random.default_rng(bootstrap.seed).integers(0, MAX_GROUPS, len(users))[group_N]
    return UserSums(group_N, min(len(users), MAX_GROUPS))


def _with_intervals(sums: UserSums, bootstrap: BootstrapConfig) -> dict[str, list[float]]:
    found = sums.result()
    ends = interval(replicate({"": found}, bootstrap)[""], bootstrap.level)
    return {name: [mean, *ends[:, column].tolist()] for column, (name, mean) in enumerate(found.means().items())}


def evaluate_policy(logged: Logged, policy: Policy, config: OffPolicyConfig) -> dict[str, Any]:
    """`estimate` with weights and reward model made here. Raises: DataError when the logs never show what the policy would."""
    weight_N = importance_weights(logged, policy, config.max_weight)
    if not weight_N.any():
        raise DataError("no logged action has a probability above 0 under the target policy; nothing can be estimated from these logs")
    return estimate(logged.reward_N, weight_N, *predict_rewards(logged, policy, config), logged.user_N, config.bootstrap)


def format_estimates(found: Mapping[str, Any], level: float, own: list[float] | None = None) -> str:
    """A small text table. Args: own: [value, low, high] of the target policy's own logs, where there are any."""
    names = {"logging": "logging policy, own mean", "ips": "IPS", "snips": "SNIPS", "dm": "direct method", "dr": "doubly robust"}
    lines = [f"{'estimate of the target policy':<30}{'value':>10}  {level:.0%} interval"]
    lines += [f"{names[name]:<30}{value:>10.5f}  {low:.5f} .. {high:.5f}" for name, (value, low, high) in found["estimators"].items()]
    if own:
        lines.append(f"{'target policy, own mean':<30}{own[0]:>10.5f}  {own[1]:.5f} .. {own[2]:.5f}")
    return "\n".join([*lines, f"weights: mean {found['mean_weight']:.3f}, largest {found['max_weight']:.1f}; {found['impressions']:,} "
                      f"impressions are worth {found['effective_samples']:,.0f}"])
