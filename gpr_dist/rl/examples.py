"""Labelled (request, ad) pairs for the rankers, from the batches of the journey loader.

Two kinds of logs: with `labels=actions` every logged ad is an example, clicked or not. With `labels=sampled_negatives` (logs that hold
only what was taken) the logged ads stand against a sample of the eligible ads that were not taken; pCTR is then the probability that an
eligible ad is taken at a request, and the sampling rate is divided out again.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from gpr_dist.config import Config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.errors import DataError
from gpr_dist.hashing import mix_tensor, row_keys
from gpr_dist.schema import EVERY_AD, Action, Batch

# R requests  N examples  S draws per request  G eligibility groups

DRAW_STEP = 0x2545F4914F6CDD1D
Labels = Literal["actions", "sampled_negatives"]


class LabelConfig(Config):
    """What the rankers learn to predict."""

    kind: Labels = "actions"
    """actions: a logged ad was clicked or not, converted or not. sampled_negatives: the logged ads were taken, other eligible ones not"""
    negatives: int = Field(10, ge=1)
    """sampled_negatives: eligible ads drawn uniformly per request"""
    unshown: int = Field(4, ge=0)
    """actions: eligible ads that were not shown, drawn uniformly per request, for the third task of the rankers"""
    shown_weight: float = Field(0.25, ge=0)
    """actions: weight of telling shown from unshown ads beside telling clicks. Clicks are few, and the log has them for shown ads only;
    what makes an ad worth showing is learned from every impression, and shares its features with pCTR"""
    pessimism: float = Field(0.25, ge=0)
    """actions: where an ad is shown r < 1 times as often as a random eligible ad, the odds of its click are multiplied by r^pessimism: the
    log has hardly tried such ads, and a policy would look for the ones that are overrated. 0 = trust the rankers everywhere"""
    conversions: bool = True
    """learn pCVR; false = the logs know no conversions, and pCVR is 0"""
    maturity_s: float = Field(0.0, ge=0)
    """clicks younger than so long before the split's last event teach pCTR but not pCVR: conversions may be still to come, seconds"""


class Examples(NamedTuple):
    """Labelled pairs of one batch."""

    request_N: Tensor  # int64 into the batch's requests
    item_N: Tensor  # int64
    click_N: Tensor  # float32, 0 or 1
    convert_N: Tensor  # float32, 0 or 1; NaN where unknown: not clicked, or too young
    weight_N: Tensor  # float32, how many pairs of the full data an example stands for; 0 = only of the task shown or not
    logged_N: Tensor  # bool, false: a drawn ad


@dataclass
class Labeller:
    """Makes examples of batches. Pairs of one request come from its own log, its eligible ads and the seed; other requests play no part."""

    config: LabelConfig
    eligibility: Eligibility
    last_timestamp: int  # of the split, seconds
    seed: int = 0
    training: bool = True  # false: without unshown ads

    def __call__(self, batch: Batch) -> Examples:
        """Raises: DataError when a group of the batch has no eligible ad to draw."""
        head_0 = batch.target_head_N == 0
        request_N, item_N, action_N = batch.target_request_N[head_0], batch.target_item_N[head_0], batch.target_action_N[head_0]
        taken = self.config.kind == "sampled_negatives"
        num_items = self.eligibility.num_items
        key_N = request_N * num_items + item_N
        if taken:  # an ad taken twice at a request, e.g. two in one basket, is one example with its strongest action
            key_N, which = torch.unique(key_N, return_inverse=True)
            action_N = torch.zeros_like(key_N).scatter_reduce_(0, which, action_N, "amax")
        drawn_D, size_D = self._draw(batch, self.config.negatives if taken else self.config.unshown if self.training else 0, key_N)
        request_N, item_N = torch.cat([key_N, drawn_D]) // num_items, torch.cat([key_N, drawn_D]) % num_items
        action_N = torch.cat([action_N, torch.zeros_like(drawn_D)])
        logged_N = torch.arange(len(action_N)) < len(key_N)
        click_N = (logged_N if taken else action_N >= Action.CLICK).float()
        known_N = (click_N > 0) & (batch.request_time_R[request_N] <= self.last_timestamp - self.config.maturity_s)
        convert_N = torch.where(known_N, (action_N == Action.CONVERSION).float(), torch.nan)
        weight_N = torch.cat([torch.ones(len(key_N)), size_D / self.config.negatives if taken else torch.zeros(len(drawn_D))])
        return Examples(request_N, item_N, click_N, convert_N, weight_N, logged_N)

    def _draw(self, batch: Batch, draws: int, logged_N: Tensor) -> tuple[Tensor, Tensor]:
        """Keys request x items + item of eligible ads drawn uniformly, less those that were logged, and how many each was drawn from."""
        if not draws or not len(batch.request_token_R):
            return logged_N.new_empty(0), torch.empty(0)
        groups, which_R = np.unique(batch.request_eligibility_R.numpy(), return_inverse=True)
        lists = [self.eligibility.items(group) for group in groups.tolist()]
        sizes = np.array([len(items) for items in lists])
        if not sizes.all():
            raise DataError(f"eligibility group {groups[sizes == 0][0]} is empty, but a request has it: no ad could have been shown; "
                            "rebuild the data with launch/build_data.py")
        size_R = sizes[which_R]
        place_RS = (self._uniform(batch, draws).numpy() * size_R[:, None]).astype(np.int64)
        drawn_RS = np.empty_like(place_RS)
        of_group = np.split(np.argsort(which_R, kind="stable"), np.cumsum(np.bincount(which_R))[:-1])
        for items, rows in zip(lists, of_group, strict=True):
            drawn_RS[rows] = items[place_RS[rows]]
        key_D = torch.from_numpy((np.arange(len(size_R))[:, None] * self.eligibility.num_items + drawn_RS).reshape(-1))
        key_D = key_D[~torch.isin(key_D, logged_N)]
        return key_D, torch.from_numpy(size_R).float()[key_D // self.eligibility.num_items]

    def _uniform(self, batch: Batch, draws: int) -> Tensor:
        """Numbers in [0, 1) that depend on the seed and the request alone, float64 [R, S]: however its row is packed."""
        place_R = batch.request_token_R - batch.offsets_B1[batch.request_row_R]
        key_R = row_keys(batch.row_ids_B[batch.request_row_R], place_R, self.seed)
        bits_RS = mix_tensor(key_R[:, None] + torch.arange(1, draws + 1) * DRAW_STEP)
        return ((bits_RS >> 11) & ((1 << 53) - 1)).double() / 2.0**53


def group_sizes(eligibility: Eligibility) -> Tensor:
    """Eligible ads of each group, float32 [G + 1]; the last entry, index EVERY_AD, counts all ads."""
    groups = [*range(eligibility.num_groups), EVERY_AD]
    return torch.tensor([len(eligibility.items(group)) for group in groups], dtype=torch.float32)


def log_doubt(config: LabelConfig, shown_N: Tensor) -> Tensor:
    """What to add to the logit of a click for an ad whose logit of being shown, against `unshown` random ads, is `shown_N`; [N], <= 0."""
    if config.kind != "actions" or not config.unshown or not config.shown_weight:
        return torch.zeros_like(shown_N)
    return config.pessimism * (shown_N + math.log(config.unshown)).clamp_max(0)


def log_sampling_rate(config: LabelConfig, size_R: Tensor) -> Tensor:
    """What to add to a logit learned from `negatives` draws so that it is that of all `size_R` eligible ads, [R]; 0 for labels=actions."""
    if config.kind == "actions":
        return torch.zeros_like(size_R)
    return (config.negatives / size_R.clamp_min(1)).log()
