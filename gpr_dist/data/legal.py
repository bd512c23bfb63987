"""Which codes are legal at each level of a target: the set the training softmax runs over ("softmax over the legal codes", GPR Eq. 3).

A code is legal after a prefix if some ad that was eligible at the request has it there. Trained this way the model spends nothing on
guessing what may be shown, and training and constrained decoding share one normalisation. Vectorised over the targets of a batch.
"""

import threading
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import torch

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.errors import ConfigError
from gpr_dist.schema import Batch

# N targets  L levels  V codes per level  M catalogue items


class LegalCodes:
    """Sorted prefixes of the eligible semantic IDs of each group, kept for the groups used last."""

    def __init__(self, codes_ML: np.ndarray, codebook_size: int, eligibility: Eligibility, cache_bytes: int = 512 << 20) -> None:
        """Args: cache_bytes: memory for prefixes of groups; a group costs about 16 bytes per eligible semantic ID."""
        self.num_levels, self.codebook_size = codes_ML.shape[1], codebook_size
        if self.num_levels * np.log2(codebook_size) > 46:  # the rest of an int64 numbers the groups of a batch
            raise ConfigError(f"{self.num_levels} levels of {codebook_size} codes do not fit the packed keys of the legal softmax; "
                              "set data.legal_softmax=false or use a smaller codebook")
        self._codes_ML, self._eligibility = codes_ML, eligibility
        self._cache: OrderedDict[int, list[np.ndarray]] = OrderedDict()
        self._cache_bytes, self._used_bytes = cache_bytes, 0
        self._lock = threading.Lock()  # the training loader goes on prefetching while validation reads

    def add_to(self, batch: Batch) -> Batch:
        """The batch with `target_legal_NLV`: what was legal at the request of each target, whichever head it belongs to.

        Head j is decoded under the same request's constraints at inference, though its ad may have been shown at a later one.
        """
        group_N = batch.request_eligibility_R[batch.target_request_N].numpy()
        return replace(batch, target_legal_NLV=torch.from_numpy(self.masks(group_N, batch.target_codes_NL.numpy())))

    def masks(self, group_N: np.ndarray, codes_NL: np.ndarray) -> np.ndarray:
        """Legal codes at every level of the targets' own prefixes.

        Args: group_N: eligibility group of the request at which each target was shown. codes_NL: its codes.
        Returns: bool [N, L, V]; a target's own codes are always legal, also where the log shows an ad that was not eligible.
        """
        n, v = len(group_N), self.codebook_size
        legal_NLV = np.zeros((n, self.num_levels, v), dtype=bool)
        groups, rank_N = np.unique(group_N, return_inverse=True)
        with self._lock:
            prefixes = [self._prefixes(int(group)) for group in groups]
        prefix_N = rank_N.astype(np.int64)  # the group's rank is the leading digit of every key
        for level in range(self.num_levels):
            span = v ** (level + 1)
            keys = np.concatenate([p[level] + rank * span for rank, p in enumerate(prefixes)]) if prefixes else np.empty(0, np.int64)
            first = np.searchsorted(keys, prefix_N * v)
            count = np.searchsorted(keys, (prefix_N + 1) * v) - first
            owner = np.repeat(np.arange(n), count)
            child = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
            legal_NLV[owner, level, keys[child] % v] = True
            prefix_N = prefix_N * v + codes_NL[:, level]
        np.put_along_axis(legal_NLV, codes_NL[:, :, None].astype(np.int64), True, axis=2)
        return legal_NLV

    def _prefixes(self, group: int) -> list[np.ndarray]:
        """Per level, the sorted distinct prefixes of that length as packed integers."""
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        codes_EL = self._codes_ML[self._eligibility.items(group)].astype(np.int64)
        key = np.zeros(len(codes_EL), np.int64)
        for level in range(self.num_levels):
            key = key * self.codebook_size + codes_EL[:, level]
        prefixes = [np.unique(key)]
        for _ in range(self.num_levels - 1):
            shorter = prefixes[0] // self.codebook_size
            prefixes.insert(0, shorter[np.diff(shorter, prepend=-1) != 0])
        self._cache[group] = prefixes
        self._used_bytes += sum(p.nbytes for p in prefixes)
        while self._used_bytes > self._cache_bytes and len(self._cache) > 1:
            self._used_bytes -= sum(p.nbytes for p in self._cache.popitem(last=False)[1])
        return prefixes
