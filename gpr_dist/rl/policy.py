"""A policy's update on one micro-batch of rollouts: HEPO (GPR Eq. 8 to 10), GRPO and DPO from the same candidates, chosen by config.

The formulas are in objectives/; which numbers are sums of the whole step, and where the candidates come from, is hepo_step.py's business.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gpr_dist.config import Config
from gpr_dist.model.gpr import PolicyOutput
from gpr_dist.objectives.dpo import best_and_worst, dpo_loss
from gpr_dist.objectives.hepo import (
    clipped_share,
    critic_loss,
    group_kl,
    grpo_advantages,
    hepo_advantages,
    policy_loss,
    policy_ratios,
    returns,
)
from gpr_dist.rl.rewards import ProcessRewardConfig, RewardScale, code_popularity, process_rewards
from gpr_dist.rl.rollout import Rollout

# N candidates, by request  R requests  L levels  l levels below the last


class PolicyConfig(Config):
    """The policy update."""

    algorithm: Literal["hepo", "grpo", "dpo"] = "hepo"
    """hepo | grpo = terminal reward alone, at every level | dpo = best against worst candidate"""
    gamma: float = Field(1.0, gt=0, le=1)
    """hepo: discount per level"""
    lam: float = Field(0.95, ge=0, le=1)
    """hepo: lambda of the generalised advantage estimate"""
    clip: float = Field(0.2, gt=0, lt=1)
    """hepo, grpo: epsilon, how far a ratio counts"""
    level_weights: tuple[float, ...] | None = None
    """hepo, grpo: c_l of each level; none = 1/L"""
    critic_weight: float = Field(0.5, ge=0)
    """hepo: weight of the critic's loss, which reaches the critic alone: with AdamW it only matters where gradients are clipped"""
    critic_lr: float = Field(10.0, gt=0)
    """hepo: learning rate of the critic over that of the policy; below the last level only the critic's judgement tells codes apart"""
    dpo_beta: float = Field(0.1, gt=0)
    """dpo: beta"""
    process: ProcessRewardConfig = ProcessRewardConfig()
    """hepo: rewards of the first codes"""
    stabiliser_weight: float = Field(0.1, ge=0)
    """weight of the value-aware loss (stage 2) on the logged ads of the same journeys; 0 = none"""
    kl_weight: float = Field(0.0, ge=0)
    """weight of the KL from the start weights, over each request's candidates; 0 = none"""
    refresh_every_steps: int = Field(10, ge=1)
    """steps that the old policy, which makes the rollouts, is kept; checkpoints fall on its renewal"""

    @model_validator(mode="after")
    def _check(self) -> "PolicyConfig":
        if self.level_weights is not None and min(self.level_weights, default=0) < 0:
            raise ValueError(f"level_weights={list(self.level_weights)} must be >= 0, one for each level")
        return self


@dataclass
class Rolled:
    """A micro-batch on its way through the step."""

    rollout: Rollout
    counts_R: Tensor  # bool, requests whose candidates differ in reward
    old_log_p_NL: Tensor | None = None  # None = pi is pi_old: the update's own numbers
    reference_N: Tensor | None = None  # log-probability of the whole path with the start weights

    @property
    def counts_N(self) -> Tensor:
        return self.counts_R[self.rollout.group_N]


def policy_share(output: PolicyOutput, one: Rolled, scale: RewardScale, config: PolicyConfig, codebook_size: int, groups: float,
                 candidates: float) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the step's policy loss, and float64 sums behind it.

    Args: groups, candidates: that count in the whole step.
    """
    rollout, counts_N = one.rollout, one.counts_N
    group_N, num_requests, batch = rollout.group_N, len(one.counts_R), rollout.batch
    log_p_NL = -output.nll_NL
    reward_N = scale(rollout.value_N)
    sums: dict[str, Tensor] = {}
    if config.algorithm == "dpo":
        best, worst = best_and_worst(reward_N, group_N, num_requests)
        best, worst = best[counts_N[best]], worst[counts_N[worst]]
        path_N = log_p_NL.sum(1)
        loss = dpo_loss(path_N[best], path_N[worst], one.reference_N[best], one.reference_N[worst], config.dpo_beta, groups)
        sums["policy_loss"] = loss
    else:
        old_log_p_NL = log_p_NL.detach() if one.old_log_p_NL is None else one.old_log_p_NL
        weights = config.level_weights or (1 / log_p_NL.shape[1],) * log_p_NL.shape[1]
        if config.algorithm == "grpo":
            advantage_NL = grpo_advantages(reward_N, log_p_NL.shape[1], group_N, num_requests)
        else:
            popularity = code_popularity(batch, codebook_size, config.process)
            process_Nl = process_rewards(popularity, group_N, batch.target_codes_NL, batch.target_offset_NLV, config.process.weight)
            is_choice_NL = (batch.target_offset_NLV > -torch.inf).sum(2) > 1
            advantage_NL = hepo_advantages(reward_N, process_Nl, output.value_NL.detach(), group_N, num_requests, config.gamma, config.lam,
                                           is_choice_NL)
        loss = policy_loss(log_p_NL, old_log_p_NL, advantage_NL, log_p_NL.new_tensor(weights), config.clip, counts_N, candidates)
        ratio_NL = policy_ratios(log_p_NL.detach(), old_log_p_NL)
        sums |= {"policy_loss": loss, "ratio_deviation": ((ratio_NL - 1).abs().mean(1) * counts_N).sum(),
                 "clipped": clipped_share(log_p_NL.detach(), old_log_p_NL, advantage_NL, config.clip, counts_N)}
        if config.algorithm == "hepo":
            return_NL = returns(reward_N, process_Nl, config.gamma)
            critic = critic_loss(output.value_NL, return_NL, counts_N, candidates)
            loss = loss + config.critic_weight * critic
            sums |= {"critic_loss": critic, "process_reward": (process_Nl.sum(1) * counts_N).sum(),
                     "return_square": (return_NL.square().sum(1) * counts_N).sum()}
    if one.reference_N is not None:
        kl = (group_kl(log_p_NL.sum(1), one.reference_N, group_N, num_requests) * one.counts_R).sum()
        sums["kl"] = kl
        if config.kl_weight:
            loss = loss + config.kl_weight * kl / groups
    return loss, {"loss": loss.detach().double(), **{name: value.detach().double() for name, value in sums.items()}}
