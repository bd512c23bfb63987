"""Labelled (request, ad) pairs for the rankers, from the batches of the journey loader.

Two kinds of logs: with `labels=actions` every logged ad is an example, clicked or not. With `labels=sampled_negatives` (logs that hold
only what was taken) the logged ads stand against a sample of the eligible ads that were not taken; pCTR is then the probability that an
eligible ad is taken at a request, and the sampling rate is divided out again.
"""

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
    negatives: int = Field(20, ge=1)
    """sampled_negatives: eligible ads drawn uniformly per request"""
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
    weight_N: Tensor  # float32, how many pairs of the full data an example stands for; for measuring, not for training


@dataclass
class Labeller:
    """Makes examples of batches. Pairs of one request come from its own log, its eligible ads and the seed; other requests play no part."""

    config: LabelConfig
    eligibility: Eligibility
    last_timestamp: int  # of the split, seconds
    seed: int = 0

    def __call__(self, batch: Batch) -> Examples:
        """Raises: DataError when a group of the batch has no eligible ad to draw."""
        head_0 = batch.target_head_N == 0
        request_N, item_N, action_N = batch.target_request_N[head_0], batch.target_item_N[head_0], batch.target_action_N[head_0]
        click_N = (action_N >= Action.CLICK).float()
        if self.config.kind == "sampled_negatives":
            request_N, item_N, click_N, action_N, weight_N = self._with_negatives(batch, request_N, item_N, action_N)
        else:
            weight_N = torch.ones_like(click_N)
        mature_N = batch.request_time_R[request_N] <= self.last_timestamp - self.config.maturity_s
        known_N = (click_N > 0) & mature_N
        convert_N = torch.where(known_N, (action_N == Action.CONVERSION).float(), torch.nan)
        return Examples(request_N, item_N, click_N, convert_N, weight_N)

    def _with_negatives(self, batch: Batch, request_N: Tensor, item_N: Tensor, action_N: Tensor) -> tuple[Tensor, ...]:
        """The ads taken (each once per request, with its strongest action), then the draws of every request less those that were taken.

        Returns: request, item, click, action, weight of each.
        """
        num_items, draws = self.eligibility.num_items, self.config.negatives
        taken, which = torch.unique(request_N * num_items + item_N, return_inverse=True)
        action = torch.zeros_like(taken).scatter_reduce_(0, which, action_N, "amax")
        group_R = batch.request_eligibility_R.numpy()
        groups, which_R = np.unique(group_R, return_inverse=True)
        sizes = np.array([len(self.eligibility.items(int(group))) for group in groups], np.int64)
        if len(sizes) and not sizes.all():
            raise DataError(f"eligibility group {groups[sizes == 0][0]} is empty, but a request has it: no ad could have been shown; "
                            "rebuild the data with launch/build_data.py")
        size_R = sizes[which_R]
        place_RS = (self._uniform(batch).numpy() * size_R[:, None]).astype(np.int64)
        drawn_RS = np.empty_like(place_RS)
        order = np.argsort(which_R, kind="stable")
        for group, rows in zip(groups.tolist(), np.split(order, np.cumsum(np.bincount(which_R, minlength=len(groups)))[:-1]), strict=True):
            drawn_RS[rows] = self.eligibility.items(group)[place_RS[rows]]
        key = torch.from_numpy((np.arange(len(size_R))[:, None] * num_items + drawn_RS).reshape(-1))
        key = key[~torch.isin(key, taken)]
        request = torch.cat([taken, key]) // num_items
        weight = torch.cat([torch.ones(len(taken)), torch.from_numpy(size_R).float()[key // num_items] / draws])
        is_taken = torch.cat([torch.ones(len(taken)), torch.zeros(len(key))])
        return request, torch.cat([taken, key]) % num_items, is_taken, torch.cat([action, torch.zeros_like(key)]), weight

    def _uniform(self, batch: Batch) -> Tensor:
        """Numbers in [0, 1) that depend on the seed and the request alone, float64 [R, S]: however its row is packed."""
        place_R = batch.request_token_R - batch.offsets_B1[batch.request_row_R]
        key_R = row_keys(batch.row_ids_B[batch.request_row_R], place_R, self.seed)
        bits_RS = mix_tensor(key_R[:, None] + torch.arange(1, self.config.negatives + 1) * DRAW_STEP)
        return ((bits_RS >> 11) & ((1 << 53) - 1)).double() / 2.0**53


def group_sizes(eligibility: Eligibility) -> Tensor:
    """Eligible ads of each group, float32 [G + 1]; the last entry, index EVERY_AD, counts all ads."""
    groups = [*range(eligibility.num_groups), EVERY_AD]
    return torch.tensor([len(eligibility.items(group)) for group in groups], dtype=torch.float32)


def log_sampling_rate(config: LabelConfig, size_R: Tensor) -> Tensor:
    """What to add to a logit learned from `negatives` draws so that it is that of all `size_R` eligible ads, [R]; 0 for labels=actions."""
    if config.kind == "actions":
        return torch.zeros_like(size_R)
    return (config.negatives / size_R.clamp_min(1)).log()
