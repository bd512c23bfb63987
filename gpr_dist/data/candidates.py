"""Which items the item head's softmax runs over: every ad of a small catalogue, or a sample of a large one with its log-q correction.

Drawn where batches are made, as a function of seed and step, so that neither the number of ranks nor of micro-batches changes them.
Where requests have eligibility groups the columns are what the batch's groups allow, and each request is told which are its own.
"""

import threading
from dataclasses import replace

import numpy as np
import torch

from gpr_dist.config import Config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.schema import EVERY_AD, Batch, Candidates

# M catalogue items  C candidates  G eligibility groups of the batch  R requests  N targets

SMOOTHING = 1.0  # events every ad has when the sampling weights are made


class CandidatesConfig(Config):
    """Size of the item head's softmax."""

    full_softmax_items: int = 200_000
    """catalogues with at most so many ads are never sampled"""
    num_sampled: int = 8192
    """draws per step from a larger catalogue, in proportion to the ads' popularity"""


class ItemCandidates:
    """Columns of the item softmax, for every batch of one data set."""

    def __init__(self, codes_ML: np.ndarray, eligibility: Eligibility, config: CandidatesConfig, item_weight_M: np.ndarray,
                 seed: int = 0) -> None:
        """Args: item_weight_M: events of each item in the training split, the sampling weights. Memory when sampling: 8 bytes per ad."""
        self._codes_ML, self._eligibility, self._seed = codes_ML, eligibility, seed
        self._ads = eligibility.items(EVERY_AD)
        self._column_of_item = np.full(len(codes_ML), -1, np.int32)
        self._lock = threading.Lock()  # the training loader goes on prefetching while validation reads
        self._points = config.num_sampled if len(self._ads) > config.full_softmax_items else 0
        if self._points:
            self._mass = np.cumsum(item_weight_M[self._ads] + SMOOTHING)
        else:
            self._all = Candidates(torch.from_numpy(self._ads.astype(np.int64)), torch.from_numpy(codes_ML[self._ads].astype(np.int64)))

    def add_to(self, batch: Batch, draw: int) -> Batch:
        """The batch with `candidates` and `target_column_N`; targets are always candidates of their own request.

        Args: draw: number of the step.
        """
        target_N, group_R = batch.target_item_N.numpy(), batch.request_eligibility_R.numpy()
        if not self._points and (group_R == EVERY_AD).all():
            column_N = np.searchsorted(self._ads, target_N)
            return replace(batch, candidates=self._all, target_column_N=torch.from_numpy(column_N))
        items, offset = (self._ads, np.zeros(len(self._ads), np.float32)) if not self._points else self._sample(draw)
        groups, group_R = np.unique(group_R, return_inverse=True)
        lists = [self._eligibility.items(int(group)) for group in groups]
        if EVERY_AD not in groups:
            allowed = np.zeros(len(self._codes_ML), bool)
            for of_group in lists:
                allowed[of_group] = True
            kept = allowed[items]
            items, offset = items[kept], offset[kept]
        columns = np.union1d(items, target_N)
        offset_C = np.full(len(columns), -np.inf, np.float32)  # a target that was not drawn counts for its own request alone
        offset_C[np.searchsorted(columns, items)] = offset
        legal_GC = np.zeros((len(groups), len(columns)), bool)
        with self._lock:
            self._column_of_item[columns] = np.arange(len(columns))
            for legal_C, of_group in zip(legal_GC, lists, strict=True):
                column = self._column_of_item[of_group]
                legal_C[column[column >= 0]] = True
            self._column_of_item[columns] = -1
        candidates = Candidates(torch.from_numpy(columns.astype(np.int64)), torch.from_numpy(self._codes_ML[columns].astype(np.int64)),
                                torch.from_numpy(offset_C), torch.from_numpy(legal_GC), torch.from_numpy(group_R))
        return replace(batch, candidates=candidates, target_column_N=torch.from_numpy(np.searchsorted(columns, target_N)))

    def _sample(self, draw: int) -> tuple[np.ndarray, np.ndarray]:
        """Sorted distinct ads and log(draws / expected draws) of each: exp(score + that) sums to an unbiased estimate over all ads.

        One point in each of equal strata of the popularity mass: no ad is drawn much more often than expected.
        """
        random = np.random.default_rng((self._seed, draw))
        step = self._mass[-1] / self._points
        at, times = np.unique(np.searchsorted(self._mass, (np.arange(self._points) + random.random(self._points)) * step, side="right"),
                              return_counts=True)
        at = np.minimum(at, len(self._ads) - 1)
        expected = (self._mass[at] - np.where(at > 0, self._mass[at - 1], 0)) / step
        return self._ads[at], np.log(times / expected).astype(np.float32)
