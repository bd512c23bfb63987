"""What a candidate earns: the terminal reward from a reward model, and process rewards for its first codes (GPR Eq. 5 to 7).

Owns the interface to whatever values ads (the simulator, a table in tests), the popularity of codes in a user's own history, and the
scale that makes rewards comparable with the advantages made from them. What is done with rewards is objectives/hepo.py's business.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from gpr_dist.config import Config
from gpr_dist.schema import Action, Batch

# R requests  N candidates, by request  L levels  V codes per level  M pairs (request, earlier event)

SUCCESS = {"consume": Action.CONSUME, "click": Action.CLICK, "conversion": Action.CONVERSION}


class Valued(Protocol):
    """What a reward model says about (request, ad) pairs, float32 [N] each; `gpr_dist.rl.simulator.Rewards` is one."""

    pctr_N: Tensor
    pcvr_N: Tensor
    ecpm_N: Tensor
    final_value_N: Tensor


class RewardModel(Protocol):
    """Values ads at requests."""

    def rewards(self, batch: Batch, request_N: Tensor, item_N: Tensor) -> Valued:
        """Args: batch: on the device of the policy. request_N: requests of the batch. item_N: catalogue indices."""


class ProcessRewardConfig(Config):
    """Process rewards (Eq. 6 and 7): a code that the user's own successful history favours earns a little before the ad is known."""

    weight: float = Field(0.1, ge=0)
    """alpha, in standard deviations of the terminal reward within a request; 0 = none"""
    half_life_days: float = Field(7.0, gt=0)
    """time after which a success counts half"""
    successes: tuple[Literal["consume", "click", "conversion"], ...] = ("consume", "click", "conversion")
    """events that count: consume = organic content"""


def code_popularity(batch: Batch, codebook_size: int, config: ProcessRewardConfig) -> Tensor:
    """P_l(t) of Eq. 6 for the levels below the last, float32 [R, L-1, V]: decayed share of code t among the codes of level l in the
    successes of the request's row up to its site; all 0 where there is none."""
    levels, device = batch.codes_TL.shape[1] - 1, batch.codes_TL.device
    num_requests = len(batch.request_row_R)
    good = torch.zeros(len(Action), dtype=torch.bool, device=device)
    good[[int(SUCCESS[name]) for name in config.successes]] = True
    event_S = (good[batch.action_T] & (batch.item_T >= 0)).nonzero().squeeze(1)
    first_R = torch.searchsorted(event_S, batch.offsets_B1[batch.request_row_R])
    count_R = torch.searchsorted(event_S, batch.request_token_R, right=True) - first_R
    request_M = torch.repeat_interleave(count_R)
    place_M = torch.arange(len(request_M), device=device) + (first_R - count_R.cumsum(0) + count_R).index_select(0, request_M)
    event_M = event_S.index_select(0, place_M)
    age_M = (batch.request_time_R[request_M] - batch.timestamp_T[event_M]).clamp_min(0)
    weight_M = torch.exp2(-age_M.double() / (86_400 * config.half_life_days)).float()
    total_R = torch.zeros(num_requests, device=device).index_add_(0, request_M, weight_M)
    share_M = weight_M / total_R.clamp_min(torch.finfo(torch.float32).tiny).index_select(0, request_M)
    popularity = torch.zeros(num_requests * levels * codebook_size, device=device)
    for level in range(levels):
        cell_M = (request_M * levels + level) * codebook_size + batch.codes_TL[event_M, level]
        popularity.index_add_(0, cell_M, share_M)
    return popularity.view(num_requests, levels, codebook_size)


def process_rewards(popularity_RlV: Tensor, request_N: Tensor, codes_NL: Tensor, offset_NLV: Tensor, alpha: float) -> Tensor:
    """r_l = alpha max(0, P_l(z_l) - mean of P_l over the codes legal after z_1..l-1) for l < L (Eq. 6, 7), float32 [N, L-1].

    Args: offset_NLV: -inf where a code is not legal after the candidate's own prefix.
    """
    gains = []
    for level in range(popularity_RlV.shape[1]):
        share_NV = popularity_RlV[:, level].index_select(0, request_N)
        legal_NV = offset_NLV[:, level] > -torch.inf
        mean_N = (share_NV * legal_NV).sum(1) / legal_NV.sum(1).clamp_min(1)
        gains.append(share_NV.gather(1, codes_NL[:, level, None])[:, 0] - mean_N)
    gain_Nl = torch.stack(gains, 1) if gains else popularity_RlV.new_zeros(len(request_N), 0)
    return alpha * gain_Nl.clamp_min(0)


@dataclass
class RewardScale:
    """Running mean and deviation of terminal rewards, by which they become (R - mean) / deviation: the critic and the process rewards
    then live in the units of the z-score beside them (Eq. 8 mixes them), whatever the currency. The deviation is that within requests.
    """

    decay: float = 0.99
    mean: float = 0.0
    variance: float = 0.0
    weight: float = 0.0  # 1 - decay^updates: corrects the start

    def update(self, mean: float, variance: float) -> None:
        """Take in a step's mean, and mean variance within a request, over all ranks."""
        self.mean = self.decay * self.mean + (1 - self.decay) * mean
        self.variance = self.decay * self.variance + (1 - self.decay) * variance
        self.weight = self.decay * self.weight + (1 - self.decay)

    def __call__(self, reward_N: Tensor) -> Tensor:
        if not self.weight:
            return reward_N
        deviation = max((self.variance / self.weight) ** 0.5, 1e-12)
        return (reward_N - self.mean / self.weight) / deviation

    def state(self) -> dict[str, float]:
        return dict(vars(self))

    @classmethod
    def of(cls, state: Mapping[str, float]) -> "RewardScale":
        return cls(**state)
