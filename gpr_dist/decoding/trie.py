"""The trie of legal semantic IDs (GPR Fig. 2d) as static CSR arrays, and the bitmaps that switch parts of it off.

Owns the structure: which codes may follow a prefix, which items share a leaf, which nodes remain when only some items are eligible.
Scores are `beam_search.py`'s business.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from gpr_dist.errors import TokenizerError

# N items in the trie  L levels  Gr eligibility groups  B requests  n_l nodes at level l (n_{L-1} leaves, n_L = N item slots)


class Trie:
    """Prefix tree over the semantic IDs of N items. Level l holds the distinct prefixes of l+1 codes, sorted by their codes.

    Items are kept as one more level below the leaves: slot s is the s-th item in (semantic ID, item index) order. So the
    children of every node, leaves included, are contiguous. All tensors are int32: 8 bytes per node and 12 per item.

    Attributes:
        code: per level l < L, [n_l]: the last code of each prefix.
        parent: per level l <= L, [n_l]: node of level l-1 (0, the root, at level 0); at level L the leaf of each slot.
        child_offset: per level l <= L, [n_{l-1}+1]: the children of node p are child_offset[l][p] : child_offset[l][p+1] of level l.
        slot_item: [N] catalogue index of each slot. slot_of_item: [largest item + 1], -1 where the item is not in the trie.
    """

    def __init__(self, code: list[Tensor], parent: list[Tensor], child_offset: list[Tensor], slot_item: Tensor, slot_of_item: Tensor,
                 codebook_size: int):
        self.code, self.parent, self.child_offset = code, parent, child_offset
        self.slot_item, self.slot_of_item = slot_item, slot_of_item
        self.codebook_size = codebook_size

    @classmethod
    def from_codes(cls, codes_NL: np.ndarray | Tensor, codebook_size: int, items: np.ndarray | Tensor | None = None) -> "Trie":
        """Build by one sort of the semantic IDs.

        Args:
            codes_NL: codes in 0..codebook_size-1. items: catalogue index of each row; default 0..N-1.
        Raises: TokenizerError when there is no item, a code is out of range, or an item is listed twice.
        """
        codes_NL = np.asarray(codes_NL)
        items_N = np.arange(len(codes_NL)) if items is None else np.asarray(items)
        if codes_NL.ndim != 2 or not codes_NL.size or len(items_N) != len(codes_NL):
            raise TokenizerError(f"a trie needs codes [N, L] for N > 0 items, found {codes_NL.shape} for {len(items_N)} items")
        if codes_NL.min() < 0 or codes_NL.max() >= codebook_size:
            row = int(np.flatnonzero(((codes_NL < 0) | (codes_NL >= codebook_size)).any(axis=1))[0])
            raise TokenizerError(f"item {items_N[row]} has codes {codes_NL[row].tolist()}, expected 0..{codebook_size - 1}; "
                                 "encode every ad with this tokenizer first")
        # 16-bit keys sort by radix: several times faster on millions of items
        keys_LN = codes_NL.T.astype(np.uint16 if codebook_size <= 1 << 16 else np.int64)
        order_N = np.lexsort((items_N, *keys_LN[::-1]))
        codes_NL, items_N = codes_NL[order_N], items_N[order_N].astype(np.int32)
        slot_of_item = np.full(int(items_N.max()) + 1, -1, dtype=np.int32)
        slot_of_item[items_N] = np.arange(len(items_N), dtype=np.int32)
        if (slot_of_item >= 0).sum() != len(items_N):
            raise TokenizerError(f"{len(items_N) - int((slot_of_item >= 0).sum())} items are listed twice in the codes of the trie")

        code, parent, child_offset = [], [], []
        is_new_N = np.zeros(len(items_N), dtype=bool)  # first slot of a new prefix, of a growing length
        is_new_N[0] = True
        node_of_slot_N = np.zeros(len(items_N), dtype=np.int32)  # the root
        num_parents = 1
        for level in range(codes_NL.shape[1]):
            is_new_N[1:] |= codes_NL[1:, level] != codes_NL[:-1, level]
            first_slot = np.flatnonzero(is_new_N)
            code.append(codes_NL[first_slot, level])
            parent.append(node_of_slot_N[first_slot])
            child_offset.append(np.searchsorted(parent[-1], np.arange(num_parents + 1)))
            node_of_slot_N = np.cumsum(is_new_N, dtype=np.int32) - 1
            num_parents = len(first_slot)
        parent.append(node_of_slot_N)
        child_offset.append(np.append(first_slot, len(items_N)))
        code, parent, child_offset = ([torch.from_numpy(array.astype(np.int32)) for array in arrays]
                                      for arrays in (code, parent, child_offset))
        return cls(code, parent, child_offset, torch.from_numpy(items_N), torch.from_numpy(slot_of_item), codebook_size)

    @property
    def num_levels(self) -> int:
        return len(self.code)

    @property
    def num_leaves(self) -> int:
        return self.code[-1].numel()

    @property
    def num_items(self) -> int:
        return self.slot_item.numel()

    @property
    def device(self) -> torch.device:
        return self.slot_item.device

    def to(self, device: torch.device | str) -> "Trie":
        """A copy on `device`."""
        lists = ([tensor.to(device) for tensor in tensors] for tensors in (self.code, self.parent, self.child_offset))
        return Trie(*lists, self.slot_item.to(device), self.slot_of_item.to(device), self.codebook_size)

    def slot_weights(self, weight_I: Tensor, smoothing: float = 0.1) -> Tensor:
        """Weight of each slot's item, float64 [slots], for `expand_items`.

        Args: weight_I: non-negative weight of every catalogue item, e.g. its popularity. smoothing: so that new items are not ruled out.
        """
        return weight_I.to(self.device).double()[self.slot_item.long()] + smoothing

    def log_weights(self, legal_slots: Tensor, item_weight_M: Tensor) -> list[Tensor]:
        """Log of the eligible weight below every node: per level 0..L-1 float32 [Gr, n_l], -inf where nothing is eligible.

        Args: legal_slots: bool [Gr, slots]. item_weight_M: [slots], from `slot_weights`.
        """
        weight = legal_slots * item_weight_M
        logs = []
        for level in range(self.num_levels, 0, -1):
            above = weight.new_zeros(len(weight), self.code[level - 1].numel())
            weight = above.index_add_(1, self.parent[level].long(), weight)
            logs.insert(0, weight.log().float())
        return logs

    def contains(self, items_N: Tensor) -> Tensor:
        """Whether each catalogue index has a semantic ID in the trie, bool [N]."""
        return self._slots(items_N) >= 0

    def legal_nodes(self, item_lists: Sequence[np.ndarray | Tensor | None]) -> list[Tensor]:
        """Which nodes lead to an eligible item, for several eligibility groups at once.

        Args: item_lists: catalogue indices eligible in each group, None = every item of the trie. Items that are not in the trie
            are ignored.
        Returns: per level 0..L (L = item slots), bool [Gr, n_l].
        """
        legal = [torch.zeros(len(item_lists), level.numel(), dtype=torch.bool, device=self.device) for level in self.parent]
        for group, items in enumerate(item_lists):
            if items is None:
                for bitmap in legal:
                    bitmap[group] = True
                continue
            node = self._slots(torch.tensor(items))
            node = node[node >= 0]
            for level in range(self.num_levels, -1, -1):
                legal[level][group, node] = True
                node = self.parent[level][node].long()
        return legal

    def _slots(self, items_N: Tensor) -> Tensor:
        items_N = items_N.to(self.device).long()
        is_known_N = (items_N >= 0) & (items_N < self.slot_of_item.numel())
        return torch.where(is_known_N, self.slot_of_item[torch.where(is_known_N, items_N, 0)].long(), -1)


class LegalCache:
    """Bitmaps of eligibility groups, the recently used ones kept: many requests share one group."""

    def __init__(self, trie: Trie, items_of_group: Callable[[int], np.ndarray], capacity: int = 256):
        """Args: items_of_group: e.g. `Eligibility.items`. capacity: groups kept, each one byte per node and item of the trie."""
        self._trie, self._items_of_group, self._capacity = trie, items_of_group, capacity
        self._rows: OrderedDict[int, list[Tensor]] = OrderedDict()

    def __call__(self, groups_B: Tensor) -> tuple[list[Tensor], Tensor]:
        """Bitmaps for B requests: (per level 0..L bool [Gr, n_l], request_group_B int64 into Gr). Gr = distinct groups, 0 if B = 0."""
        groups, request_group_B = torch.unique(groups_B.to(self._trie.device), return_inverse=True)
        rows = [self._row(group) for group in groups.tolist()]
        legal = [torch.stack(bitmaps) for bitmaps in zip(*rows, strict=True)] if rows else self._trie.legal_nodes([])
        return legal, request_group_B

    def _row(self, group: int) -> list[Tensor]:
        row = self._rows.pop(group, None)
        if row is None:
            row = [bitmap[0] for bitmap in self._trie.legal_nodes([self._items_of_group(group)])]
        self._rows[group] = row  # newest last
        if len(self._rows) > self._capacity:
            self._rows.popitem(last=False)
        return row
