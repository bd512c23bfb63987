"""What the softmax of a target runs over: the codes legal at its request ("softmax over the legal codes", GPR Eq. 3), and their prior.

A code is legal after a prefix if some ad that was eligible at the request has it there. Trained this way the model spends nothing on
guessing what may be shown, and training and constrained decoding share one normalisation. With item weights, the log of the eligible
weight below each code is added to its logit: a model that knows nothing then ranks by popularity, and what it learns is the rest.
Vectorised over the targets of a batch.
"""

import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import torch

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.errors import ConfigError
from gpr_dist.schema import Batch

# N targets  L levels  V codes per level  M catalogue items

SMOOTHING = 0.1  # weight every item has before any event


@dataclass(frozen=True)
class GroupPrefixes:
    """Per level, the sorted distinct prefixes of a group's eligible semantic IDs as packed integers, and the weight below each."""

    keys: list[np.ndarray]  # int64
    weights: list[np.ndarray]  # float64

    @property
    def num_bytes(self) -> int:
        return sum(array.nbytes for array in (*self.keys, *self.weights))


class LegalCodes:
    """Logit offsets of targets; prefixes are kept for the eligibility groups used last."""

    def __init__(self, codes_ML: np.ndarray, codebook_size: int, eligibility: Eligibility, item_weight_M: np.ndarray | None = None,
                 cache_bytes: int = 512 << 20) -> None:
        """Args: item_weight_M: events of each item before the training targets end, >= 0; None = no prior, legal codes get 0.
        cache_bytes: memory for prefixes of groups; a group costs about 32 bytes per eligible semantic ID.
        """
        self.num_levels, self.codebook_size = codes_ML.shape[1], codebook_size
        if self.num_levels * np.log2(codebook_size) > 46:  # the rest of an int64 numbers the groups of a batch
            raise ConfigError(f"{self.num_levels} levels of {codebook_size} codes do not fit the packed keys of the legal softmax; "
                              "set data.softmax=all or use a smaller codebook")
        self._codes_ML, self._eligibility, self._item_weight_M = codes_ML, eligibility, item_weight_M
        self._cache: OrderedDict[int, GroupPrefixes] = OrderedDict()
        self._cache_bytes, self._used_bytes = cache_bytes, 0
        self._lock = threading.Lock()  # the training loader goes on prefetching while validation reads

    @property
    def item_weight_M(self) -> np.ndarray | None:
        """As given."""
        return self._item_weight_M

    def add_to(self, batch: Batch, counted: bool) -> Batch:
        """The batch with `target_offset_NLV`: legality and prior at the request of each target, whichever head it belongs to.

        Head j is decoded under the same request's constraints at inference, though its ad may have been shown at a later one.

        Args: counted: the targets' own events are part of item_weight_M (training); each is left out of its own prior.
        """
        group_N = batch.request_eligibility_R[batch.target_request_N].numpy()
        offset_NLV = self.offsets(group_N, batch.target_codes_NL.numpy(), counted)
        return replace(batch, target_offset_NLV=torch.from_numpy(offset_NLV))

    def offsets(self, group_N: np.ndarray, codes_NL: np.ndarray, counted: bool = False) -> np.ndarray:
        """Logit offsets at every level, along the targets' own prefixes.

        Args: group_N: eligibility group of the request of each target. codes_NL: the target's codes. counted: as in `add_to`.
        Returns: float32 [N, L, V]: -inf where not legal, else 0 or the log weight. A target's own codes are always legal, also where
            the log shows an ad that was not eligible.
        """
        n, v = len(group_N), self.codebook_size
        weight_NLV = np.zeros((n, self.num_levels, v), dtype=np.float32)
        groups, rank_N = np.unique(group_N, return_inverse=True)
        with self._lock:
            prefixes = [self._prefixes(int(group)) for group in groups]
        prefix_N = rank_N.astype(np.int64)  # the group's rank is the leading digit of every key
        for level in range(self.num_levels):
            span = v ** (level + 1)
            keys = np.concatenate([p.keys[level] + rank * span for rank, p in enumerate(prefixes)] or [np.empty(0, np.int64)])
            weights = np.concatenate([p.weights[level] for p in prefixes] or [np.empty(0)])
            first = np.searchsorted(keys, prefix_N * v)
            count = np.searchsorted(keys, (prefix_N + 1) * v) - first
            owner = np.repeat(np.arange(n), count)
            child = np.arange(len(owner)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
            weight_NLV[owner, level, keys[child] % v] = weights[child]
            prefix_N = prefix_N * v + codes_NL[:, level]
        own = codes_NL[:, :, None].astype(np.int64)
        least = 1.0 if self._item_weight_M is None else SMOOTHING
        own_weight = np.take_along_axis(weight_NLV, own, axis=2) - (1.0 if counted and self._item_weight_M is not None else 0.0)
        np.put_along_axis(weight_NLV, own, np.maximum(own_weight, least), axis=2)
        with np.errstate(divide="ignore"):
            return np.log(weight_NLV, out=weight_NLV)

    def _prefixes(self, group: int) -> GroupPrefixes:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        items = self._eligibility.items(group)
        codes_EL = self._codes_ML[items].astype(np.int64)
        key = np.zeros(len(items), np.int64)
        for level in range(self.num_levels):
            key = key * self.codebook_size + codes_EL[:, level]
        order = np.argsort(key, kind="stable")
        key, weight = key[order], None if self._item_weight_M is None else self._item_weight_M[items[order]] + SMOOTHING
        keys, weights = [], []
        for _ in range(self.num_levels):  # from full semantic IDs to first codes
            starts = np.flatnonzero(np.diff(key, prepend=-1))
            key = key[starts]
            if weight is not None:
                weight = np.add.reduceat(weight, starts) if len(starts) else weight
            keys.insert(0, key)
            weights.insert(0, np.ones(len(key)) if weight is None else weight)
            key = key // self.codebook_size
        found = self._cache[group] = GroupPrefixes(keys, weights)
        self._used_bytes += found.num_bytes
        while self._used_bytes > self._cache_bytes and len(self._cache) > 1:
            self._used_bytes -= self._cache.popitem(last=False)[1].num_bytes
        return found
