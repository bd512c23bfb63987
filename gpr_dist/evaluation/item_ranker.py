"""The item head as a ranker: items scored one by one at the prediction site, beside the beam search over semantic IDs.

It decides which items are candidates and which are not; the scores are `model.items`. Every batch is one call of the model, whatever
it holds, so that all ranks run the same forwards.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.evaluation.journey_log import Lists
from gpr_dist.schema import EVERY_AD, Batch, Candidates

# R requests  C candidates  G eligibility groups of the batch  L levels  M catalogue items  K ranked items


class ItemRanker:
    """Ranks the requests of batch after batch (an `evaluation.rankings.Ranker`)."""

    def __init__(self, model: Callable[..., Any], device: torch.device | str, codes_ML: np.ndarray, eligibility: Eligibility,
                 k: int) -> None:
        """Args: model: a GPR with an item head, or an engine around it. codes_ML: semantic IDs. k: length of the lists."""
        self.model, self.device, self.k = model, device, k
        self._codes_ML, self._eligibility = codes_ML, eligibility
        self._every_ad = self._candidates(eligibility.items(EVERY_AD))

    @torch.no_grad()
    def __call__(self, batch: Batch, seen: Lists | None = None) -> tuple[Tensor, Tensor]:
        """(item_RK int64, score_RK float32 log-probabilities over the eligible ads), on the CPU; -1 and -inf where a list ends.

        Args: seen: items that are not ranked, per request; they stay in the softmax, as in training.
        """
        groups, group_R = np.unique(batch.request_eligibility_R.cpu().numpy(), return_inverse=True)
        lists = [self._eligibility.items(int(group)) for group in groups]
        if EVERY_AD in groups or not lists:
            candidates = self._every_ad
        else:
            candidates = self._candidates(np.unique(np.concatenate(lists)))
        item_C = candidates.item_C.cpu().numpy()
        legal_GC = np.ones((max(1, len(lists)), len(item_C)), bool)
        for legal_C, group, items in zip(legal_GC, groups, lists, strict=False):
            if group != EVERY_AD:
                legal_C[:] = False
                legal_C[np.searchsorted(item_C, items)] = True
        excluded = None
        if seen is not None:
            request_M, item_M = np.repeat(np.arange(len(group_R)), np.diff(seen.offset_R1)), seen.item_M
            column_M = np.minimum(np.searchsorted(item_C, item_M), max(len(item_C) - 1, 0))
            known_M = item_C[column_M] == item_M if len(item_C) else np.zeros(len(item_M), bool)
            excluded = self._tensor(request_M[known_M]), self._tensor(column_M[known_M])
        item_RK, score_RK = self.model(batch.to(self.device), task="rank_items", candidates=candidates, legal_GC=self._tensor(legal_GC),
                                       group_R=self._tensor(group_R), k=self.k, excluded=excluded)
        return item_RK.cpu(), score_RK.cpu()

    def _candidates(self, items: np.ndarray) -> Candidates:
        return Candidates(self._tensor(items.astype(np.int64)), self._tensor(self._codes_ML[items].astype(np.int64)))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)
