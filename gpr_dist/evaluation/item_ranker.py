"""The item head as an `evaluation.rankings.Ranker`: the eligibility groups of a split's requests, and the items to leave out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.decoding.item_ranking import ItemRanking
from gpr_dist.evaluation.journey_log import Lists
from gpr_dist.schema import EVERY_AD, Batch

# R requests  K ranked items


class ItemRanker:
    """Ranks the requests of batch after batch."""

    def __init__(self, model: Callable[..., Any], device: torch.device | str, codes_ML: np.ndarray, eligibility: Eligibility,
                 k: int) -> None:
        """Args: model: a GPR with an item head, or an engine around it. codes_ML: semantic IDs. k: length of the lists."""
        self.k, self._eligibility = k, eligibility
        self._rank = ItemRanking(model, device, codes_ML, eligibility.items(EVERY_AD))

    def __call__(self, batch: Batch, seen: Lists | None = None) -> tuple[Tensor, Tensor]:
        """(item_RK int64, score_RK float32 log-probabilities over the eligible ads), on the CPU; -1 and -inf where a list ends.

        Args: seen: items that are not ranked, per request; they stay in the softmax, as in training.
        """
        groups, group_R = np.unique(batch.request_eligibility_R.cpu().numpy(), return_inverse=True)
        lists = [self._eligibility.items(int(group)) for group in groups]
        exclude = None
        if seen is not None:
            exclude = np.repeat(np.arange(len(group_R)), np.diff(seen.offset_R1)), seen.item_M.astype(np.int64)
        item_RK, score_RK = self._rank(batch, lists, group_R, self.k, exclude)
        return item_RK.cpu(), score_RK.cpu()
