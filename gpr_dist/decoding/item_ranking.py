"""The item head as a ranker: items scored one by one at the prediction site, beside the beam search over semantic IDs.

It decides which items are candidates and which are not; the scores are `model.items`. Every batch is one call of the model, whatever
it holds, so that all ranks run the same forwards.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpr_dist.schema import Batch, Candidates

# R requests  C candidates  G audiences of the batch  L levels  M catalogue items  K ranked items  X (request, item) pairs


class ItemRanking:
    """Ranks the requests of batch after batch."""

    def __init__(self, model: Callable[..., Any], device: torch.device | str, codes_ML: np.ndarray, ads: np.ndarray,
                 frozen: bool = False) -> None:
        """Args: model: a GPR with an item head, or an engine around it. codes_ML: semantic IDs. ads: sorted indices of all ads.
        frozen: the weights stay as they are, so that the output vectors of all ads are gathered once (ads x width numbers)."""
        self.model, self.device = model, device
        self._codes_ML, self._num_ads = codes_ML, len(ads)
        self._every_ad, self._outputs = self._candidates(ads), None
        if frozen:
            with torch.no_grad():
                self._outputs = model(None, task="item_outputs", candidates=self._every_ad)

    @torch.no_grad()
    def __call__(self, batch: Batch, lists: Sequence[np.ndarray], audience_R: np.ndarray, k: int,
                 exclude: tuple[np.ndarray, np.ndarray] | None = None, opening: Any = None) -> tuple[Tensor, Tensor]:
        """(item_RK int64, score_RK float32 log-probabilities over the eligible ads); -1 and -inf where a list ends.

        Args:
            lists: sorted catalogue indices of the ads that each audience may be shown. audience_R: which of them each request is.
            exclude: (request_X, item_X), items that are not ranked; they stay in the softmax, as in training.
            opening: the batch as the model has encoded it already, if it has.
        """
        if not lists or any(len(items) == self._num_ads for items in lists):
            candidates = self._every_ad
        else:
            candidates = self._candidates(np.unique(np.concatenate(lists)))
        item_C = candidates.item_C.cpu().numpy()
        legal_GC = np.ones((max(1, len(lists)), len(item_C)), bool)
        for legal_C, items in zip(legal_GC, lists, strict=False):
            if len(items) < len(item_C):
                legal_C[:] = False
                legal_C[np.searchsorted(item_C, items)] = True
        excluded = None
        if exclude is not None:
            request_X, item_X = exclude
            column_X = np.minimum(np.searchsorted(item_C, item_X), max(len(item_C) - 1, 0))
            known_X = item_C[column_X] == item_X if len(item_C) else np.zeros(len(item_X), bool)
            excluded = self._tensor(request_X[known_X]), self._tensor(column_X[known_X])
        return self.model(batch.to(self.device), task="rank_items", candidates=candidates, legal_GC=self._tensor(legal_GC),
                          group_R=self._tensor(audience_R), k=k, excluded=excluded, opening=opening,
                          outputs=self._outputs if candidates is self._every_ad else None)

    def _candidates(self, items: np.ndarray) -> Candidates:
        return Candidates(self._tensor(items.astype(np.int64)), self._tensor(self._codes_ML[items].astype(np.int64)))

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)
