"""The trie of legal semantic IDs (GPR Fig. 2d) as static CSR arrays, with a small overlay for ads that came or went since.

Owns the structure: which codes may follow a prefix, which items share a leaf. Who may see which part of it is `legality.py`'s
business, scores are the search's. A trie never changes: `insert` and `delete` give a new one that shares the large arrays, so a
search that is under way goes on undisturbed.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gpr_dist.decoding.trie_overlay import Overlay, build_overlay, either
from gpr_dist.errors import TokenizerError
from gpr_dist.schema import write_atomic

# N items  L levels  n_l nodes at level l, n_L item slots  X inserted items

TRIE_FILE = "trie.safetensors"


class Trie:
    """Prefix tree over the semantic IDs of N items. Level l holds the distinct prefixes of l+1 codes, sorted by their codes.

    Items are kept as one more level below the leaves: slot s is the s-th item in (semantic ID, item index) order. So the
    children of every node, leaves included, are contiguous, and so are the slots below it. All tensors are int32.
    Nodes and slots of the overlay follow after the static ones; ask `children`, `codes_of` and `num_nodes`, which know both.

    Attributes:
        code: per level l < L, [n_l]: the last code of each prefix.
        parent: per level l <= L, [n_l]: node of level l-1 (0, the root, at level 0); at level L the leaf of each slot.
        child_offset: per level l <= L, [n_{l-1}+1]: the children of node p are child_offset[l][p] : child_offset[l][p+1] of level l.
        first_slot: per level l < L, [n_l + 1]: the slots below node p are first_slot[l][p] : first_slot[l][p+1].
        slot_item: [slots] catalogue index of each slot. slot_of_item: [largest static item + 1], -1 where the item is not in it.
        alive: bool [slots], None = all: False for a deleted item.
    """

    def __init__(self, code: list[Tensor], child_offset: list[Tensor], slot_item: Tensor, codebook_size: int) -> None:
        """Args: code, child_offset, slot_item: the attributes; the others follow from them."""
        self.code, self.child_offset, self.codebook_size = code, child_offset, codebook_size
        self.parent = [torch.repeat_interleave(torch.diff(offset)).int() for offset in child_offset]
        self.first_slot = [child_offset[-1]]
        for offset in child_offset[-2:0:-1]:
            self.first_slot.insert(0, self.first_slot[0].index_select(0, offset))
        self.slot_item = slot_item
        self.slot_of_item = torch.full((int(slot_item.max()) + 1,), -1, dtype=torch.int32, device=slot_item.device)
        self.slot_of_item[slot_item.long()] = torch.arange(slot_item.numel(), dtype=torch.int32, device=slot_item.device)
        self.alive: Tensor | None = None
        self.overlay: Overlay | None = None

    @classmethod
    def from_codes(cls, codes_NL: np.ndarray | Tensor, codebook_size: int, items: np.ndarray | Tensor | None = None) -> "Trie":
        """Build by one sort of the semantic IDs.

        Args:
            codes_NL: codes in 0..codebook_size-1. items: catalogue index of each row; default 0..N-1.
        Raises: TokenizerError when there is no item, a code is out of range, or an item is listed twice.
        """
        codes_NL, items_N = _checked(codes_NL, codebook_size, items)
        if not (np.diff(items_N) > 0).all():  # by item first: the sort below is stable
            row_I = np.full(int(items_N.max()) + 1, -1, dtype=np.int64)
            row_I[items_N] = np.arange(len(items_N))
            by_item = row_I[row_I >= 0]
            if len(by_item) < len(items_N):
                raise TokenizerError(f"{len(items_N) - len(by_item)} items are listed twice in the codes of the trie")
            codes_NL, items_N = codes_NL[by_item], items_N[by_item]
        # 16-bit keys sort by radix: several times faster on millions of items
        keys_LN = codes_NL.T.astype(np.uint16 if codebook_size <= 1 << 16 else np.int64)
        order_N = np.lexsort(keys_LN[::-1])
        keys_LN, items_N = keys_LN[:, order_N], items_N[order_N].astype(np.int32)

        code, child_offset = [], []
        is_new_N = np.zeros(len(items_N), dtype=bool)  # first slot of a new prefix, of a growing length
        is_new_N[0] = True
        above = np.array([0, len(items_N)])  # first slot of each node one level up
        for key_N in keys_LN:
            is_new_N[1:] |= key_N[1:] != key_N[:-1]
            first_slot = np.append(np.flatnonzero(is_new_N), len(items_N))
            code.append(key_N[first_slot[:-1]])
            child_offset.append(np.searchsorted(first_slot, above))
            above = first_slot
        child_offset.append(above)
        code, child_offset = ([torch.from_numpy(array.astype(np.int32)) for array in arrays] for arrays in (code, child_offset))
        return cls(code, child_offset, torch.from_numpy(items_N), codebook_size)

    @property
    def num_levels(self) -> int:
        return len(self.code)

    @property
    def num_leaves(self) -> int:
        return self.num_nodes(self.num_levels - 1)

    @property
    def num_items(self) -> int:
        """Items that are in the trie, without the deleted ones."""
        return self.slot_item.numel() if self.alive is None else int(self.alive.sum())

    @property
    def device(self) -> torch.device:
        return self.slot_item.device

    def num_nodes(self, level: int) -> int:
        """Nodes of level 0..L, L being the slots; those of deleted items count."""
        if level == self.num_levels:
            return self.slot_item.numel()
        return self.code[level].numel() + (self.overlay.code[level].numel() if self.overlay else 0)

    def children(self, level: int, node_N: Tensor) -> tuple[Tensor, Tensor]:
        """The children, nodes of `level` 0..L, of every node of the level above, end to end.

        `index_select` on flat tensors here and elsewhere: on CPU it is several times faster than indexing with brackets.
        Returns: (which of the N each child belongs to, ascending; child), int64 [M].
        """
        offset, extra = self.child_offset[level], self.overlay.parent[level] if self.overlay else None
        if extra is None:
            first_N = offset.index_select(0, node_N).long()
            count_N = offset.index_select(0, node_N + 1).long() - first_N
        else:
            static_N = node_N.clamp(max=offset.numel() - 2)
            first_N = offset.index_select(0, static_N).long()
            count_N = torch.where(node_N == static_N, offset.index_select(0, static_N + 1).long() - first_N, 0)
            extra_N = torch.searchsorted(extra, node_N)
            static_count_N, count_N = count_N, count_N + torch.searchsorted(extra, node_N, right=True) - extra_N
        owner_M = torch.repeat_interleave(count_N)
        child_M = torch.arange(owner_M.numel(), device=self.device)
        child_M += (first_N - count_N.cumsum(0) + count_N).index_select(0, owner_M)
        if extra is not None:  # past the static children of a node come its new ones
            past_M = child_M - (first_N + static_count_N).index_select(0, owner_M)
            new_M = past_M + (extra_N + self.parent[level].numel()).index_select(0, owner_M)
            child_M = torch.where(past_M >= 0, new_M, child_M)
        return owner_M, child_M

    def codes_of(self, level: int, node_M: Tensor) -> Tensor:
        """Last code of each prefix, int64 [M]."""
        return either(self.code[level], self.overlay.code[level] if self.overlay else None, node_M)

    def ancestors(self, slot_M: Tensor) -> list[Tensor]:
        """Node of each slot at every level 0..L, int64."""
        static = self.parent[-1].numel()
        nodes = [torch.where(slot_M < static, slot_M, 0) if self.overlay else slot_M]
        for parent in self.parent[:0:-1]:
            nodes.insert(0, parent.index_select(0, nodes[0]).long())
        if self.overlay and len(self.overlay.item_X):
            new_M = (slot_M - static).clamp(min=0)
            nodes = [torch.where(slot_M < static, node_M, ancestor.index_select(0, new_M))
                     for node_M, ancestor in zip(nodes, self.overlay.ancestor, strict=True)]
        return nodes

    def slots(self, items_N: Tensor) -> Tensor:
        """Slot of each catalogue index, int64; -1 = not in the trie, or deleted."""
        items_N = items_N.to(self.device).long().contiguous()
        is_known_N = (items_N >= 0) & (items_N < self.slot_of_item.numel())
        slot_N = torch.where(is_known_N, self.slot_of_item[torch.where(is_known_N, items_N, 0)].long(), -1)
        if self.alive is not None:
            slot_N = torch.where(self.alive[slot_N.clamp(min=0)], slot_N, -1)
        if self.overlay and len(self.overlay.item_X):
            sorted_X, order_X = self.overlay.item_X.sort()
            place_N = torch.searchsorted(sorted_X, items_N).clamp(max=len(sorted_X) - 1)
            new_N = order_X[place_N] + self.parent[-1].numel()
            slot_N = torch.where(sorted_X[place_N] == items_N, new_N, slot_N)
            if self.alive is not None:
                slot_N = torch.where((slot_N >= 0) & self.alive[slot_N.clamp(min=0)], slot_N, -1)
        return slot_N

    def contains(self, items_N: Tensor) -> Tensor:
        """Whether each catalogue index has a semantic ID in the trie, bool [N]."""
        return self.slots(items_N) >= 0

    def slot_weights(self, weight_I: Tensor, smoothing: float = 0.1) -> Tensor:
        """Weight of each slot's item, float64 [slots], for ranking the items of a leaf.

        Args: weight_I: non-negative weight of every catalogue item, e.g. its popularity. smoothing: so that new items are not ruled out.
        """
        return weight_I.to(self.device).double()[self.slot_item.long()] + smoothing

    def log_weights(self, legal_slots: Tensor, item_weight_M: Tensor) -> list[Tensor]:
        """Log of the eligible weight below every node: per level 0..L-1 float32 [Gr, n_l], -inf where nothing is eligible.

        Args: legal_slots: bool [Gr, slots]. item_weight_M: [slots], from `slot_weights`.
        """
        return [weight.log().float() for weight in self.weights(legal_slots, item_weight_M)]

    def weights(self, legal_slots: Tensor, item_weight_M: Tensor) -> list[Tensor]:
        """The eligible weight below every node itself, per level 0..L-1 float64 [Gr, n_l]."""
        weight = legal_slots * item_weight_M
        sums = []
        for level in range(self.num_levels, 0, -1):
            above = weight.new_zeros(len(weight), self.num_nodes(level - 1))
            weight = above.index_add_(1, self.parents(level), weight)
            sums.insert(0, weight)
        return sums

    def parents(self, level: int) -> Tensor:
        """Node of the level above of every node of level 0..L, int64 [n_level]."""
        static = self.parent[level].long()
        return torch.cat((static, self.overlay.parent[level])) if self.overlay else static

    def parents_of(self, level: int, node_M: Tensor) -> Tensor:
        """Node of the level above of some nodes of level 0..L, int64 [M]."""
        return either(self.parent[level], self.overlay.parent[level] if self.overlay else None, node_M)

    def legal_nodes(self, item_lists: Sequence[np.ndarray | Tensor | None]) -> list[Tensor]:
        """Which nodes lead to an eligible item, for several eligibility groups at once.

        Args: item_lists: catalogue indices eligible in each group, None = every item of the trie. Items that are not in the trie
            are ignored.
        Returns: per level 0..L (L = item slots), bool [Gr, n_l].
        """
        sizes = [self.num_nodes(level) for level in range(self.num_levels + 1)]
        legal = [torch.zeros(len(item_lists), size, dtype=torch.bool, device=self.device) for size in sizes]
        for group, items in enumerate(item_lists):
            if items is None and self.alive is None:
                for bitmap in legal:
                    bitmap[group] = True
                continue
            slots = self.alive.nonzero().squeeze(1) if items is None else self.slots(torch.as_tensor(np.array(items)))
            for bitmap, nodes in zip(legal, self.ancestors(slots[slots >= 0]), strict=True):
                bitmap[group, nodes] = True
        return legal

    def insert(self, codes_XL: np.ndarray | Tensor, items_X: np.ndarray | Tensor) -> "Trie":
        """A trie that also holds new items, at the cost of the items inserted since the last `compact`.

        Raises: TokenizerError for a code out of range, an item listed twice or one that is in the trie already (delete it first).
        """
        codes_XL, items_X = _checked(codes_XL, self.codebook_size, items_X)
        if codes_XL.shape[1] != self.num_levels:
            raise TokenizerError(f"inserted items have {codes_XL.shape[1]} codes, the trie has {self.num_levels} levels")
        items = torch.from_numpy(items_X.astype(np.int64)).to(self.device)
        known = self.contains(items)
        if known.any() or len(np.unique(items_X)) != len(items_X):
            found = f"item {int(items[known][0])} is in the trie already" if known.any() else "an item is listed twice"
            raise TokenizerError(f"{found}; insert each item once, and delete it before its codes change")
        codes = torch.from_numpy(codes_XL.astype(np.int32)).to(self.device)
        if self.overlay:
            kept_X = self._alive_overlay()
            codes, items = torch.cat((self.overlay.codes_XL[kept_X], codes)), torch.cat((self.overlay.item_X[kept_X], items))
        overlay = build_overlay(self.code, self.child_offset, self.codebook_size, codes, items)
        static = self.parent[-1].numel()
        alive = None if self.alive is None else torch.cat((self.alive[:static], torch.ones_like(overlay.item_X, dtype=torch.bool)))
        return self._replaced(overlay=overlay, slot_item=torch.cat((self.slot_item[:static], overlay.item_X.int())), alive=alive)

    def delete(self, items: np.ndarray | Tensor) -> "Trie":
        """A trie without these items; those that are not in it are ignored."""
        slot = self.slots(torch.as_tensor(np.asarray(items)))
        alive = torch.ones(self.slot_item.numel(), dtype=torch.bool, device=self.device) if self.alive is None else self.alive.clone()
        alive[slot[slot >= 0]] = False
        return self._replaced(alive=alive)

    def compact(self) -> "Trie":
        """The same items without overlay and deleted slots, built anew. Raises: TokenizerError when every item was deleted."""
        if self.overlay is None and self.alive is None:
            return self
        slots = torch.arange(self.slot_item.numel(), device=self.device)
        slots = slots if self.alive is None else slots[self.alive]
        codes_NL = torch.stack([self.codes_of(level, node) for level, node in enumerate(self.ancestors(slots)[:-1])], dim=1)
        return Trie.from_codes(codes_NL.cpu().numpy(), self.codebook_size, self.slot_item[slots].cpu().numpy()).to(self.device)

    def _alive_overlay(self) -> Tensor:
        first = self.parent[-1].numel()
        return torch.ones(len(self.overlay.item_X), dtype=torch.bool, device=self.device) if self.alive is None else self.alive[first:]

    def _replaced(self, **changes: "Tensor | Overlay | list[Tensor] | None") -> "Trie":
        trie = object.__new__(Trie)
        trie.__dict__.update(self.__dict__ | changes)
        return trie

    def to(self, device: torch.device | str) -> "Trie":
        """A copy on `device`."""
        lists = {name: [tensor.to(device) for tensor in getattr(self, name)] for name in ("code", "parent", "child_offset", "first_slot")}
        return self._replaced(**lists, slot_item=self.slot_item.to(device), slot_of_item=self.slot_of_item.to(device),
                              alive=None if self.alive is None else self.alive.to(device),
                              overlay=self.overlay.to(device) if self.overlay else None)

    def to_arrays(self) -> dict[str, Tensor]:
        """What `from_arrays` needs, about 12 bytes per item. Raises: TokenizerError when every item was deleted."""
        trie = self.compact().to("cpu")
        arrays = {"slot_item": trie.slot_item, "codebook_size": torch.tensor(trie.codebook_size)}
        arrays |= {f"code_{level}": code for level, code in enumerate(trie.code)}
        return arrays | {f"child_offset_{level}": offset for level, offset in enumerate(trie.child_offset)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, Tensor], where: str = "the arrays of a trie") -> "Trie":
        """Raises: TokenizerError when they do not describe a trie. Args: where: their origin, for the message."""
        try:
            num_levels = sum(name.startswith("code_") for name in arrays)
            code = [arrays[f"code_{level}"] for level in range(num_levels)]
            child_offset = [arrays[f"child_offset_{level}"] for level in range(num_levels + 1)]
            slot_item, codebook_size = arrays["slot_item"], int(arrays["codebook_size"])
        except KeyError as error:
            raise TokenizerError(f"{where}: no tensor {error}; export the trie again") from None
        sizes = [1, *(level.numel() for level in code), slot_item.numel()]
        for level, offset in enumerate(child_offset):
            covers = offset.numel() == sizes[level] + 1 and offset[0] == 0 and offset[-1] == sizes[level + 1]
            if not covers or (torch.diff(offset) <= 0).any():
                raise TokenizerError(f"{where}: children of level {level} do not match its {sizes[level + 1]} nodes; export the trie again")
        if not num_levels or slot_item.min() < 0 or any(level.min() < 0 or level.max() >= codebook_size for level in code):
            raise TokenizerError(f"{where}: codes outside 0..{codebook_size - 1} or items below 0; export the trie again")
        return cls(code, child_offset, slot_item, codebook_size)

    def save(self, folder: str | Path) -> Path:
        """Write the compacted trie; returns its file."""
        path = Path(folder) / TRIE_FILE
        write_atomic(path, save(self.to_arrays()))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "Trie":
        """Raises: TokenizerError when there is none or it is damaged."""
        path = Path(folder) / TRIE_FILE
        try:
            with safe_open(path, "pt") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise TokenizerError(f"cannot read {path}: {error}; export the trie again") from None
        return cls.from_arrays(arrays, str(path))


def _checked(codes_NL: np.ndarray | Tensor, codebook_size: int, items: np.ndarray | Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    codes_NL = np.asarray(codes_NL)
    items_N = np.arange(len(codes_NL)) if items is None else np.asarray(items)
    if codes_NL.ndim != 2 or not codes_NL.size or len(items_N) != len(codes_NL):
        raise TokenizerError(f"a trie needs codes [N, L] for N > 0 items, found {codes_NL.shape} for {len(items_N)} items")
    if codes_NL.min() < 0 or codes_NL.max() >= codebook_size:
        row = int(np.flatnonzero(((codes_NL < 0) | (codes_NL >= codebook_size)).any(axis=1))[0])
        raise TokenizerError(f"item {items_N[row]} has codes {codes_NL[row].tolist()}, expected 0..{codebook_size - 1}; "
                             "encode every ad with this tokenizer first")
    return codes_NL, items_N
