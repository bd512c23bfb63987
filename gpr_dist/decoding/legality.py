"""What each request of a batch may be shown: the slots its audience may see, minus the items excluded for this request alone.

A node of the trie is legal when a legal item lies below it. Audiences (requests that share their eligibility) are bitmaps; a level
with few nodes keeps one bit per node, a large one is answered from the slots: those below a node are contiguous, so the number of
legal ones is a difference of two running counts, kept per byte of slots. Exclusions (frequency caps, items already seen) stay sparse:
only the nodes that lose their last legal item are listed.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np
import torch
from torch import Tensor

from gpr_dist.decoding.segments import NodePairs
from gpr_dist.decoding.trie import Trie

# B requests  Gr audiences  L levels  n_l nodes at level l, n_L slots  Y bytes of packed slots  M entries of a flat list

DENSE_NODES = 1 << 13  # up to here a level keeps a bool per node and audience of `Legal.from_slots`


class Legal(Sequence[Tensor]):
    """Legal nodes of Gr audiences. `legal[level]` is bool [Gr, n_l], 0..L; large levels are worked out when asked for that way."""

    def __init__(self, trie: Trie, bitmaps: Sequence[Tensor | None], slots_GY: Tensor | None = None) -> None:
        """Args: bitmaps: per level 0..L bool [Gr, n_l], None = answer from `slots_GY` (uint8, from `pack_slots`)."""
        self._trie, self._bitmaps = trie, list(bitmaps)
        self._is_all = [bitmap is not None and bool(bitmap.all()) for bitmap in bitmaps]
        self._weights: tuple[Tensor, list[Tensor], list[Tensor]] | None = None
        self._slots_GY = slots_GY

    @classmethod
    def from_slots(cls, trie: Trie, slots_GY: Tensor, dense_nodes: int = DENSE_NODES) -> "Legal":
        """Args: slots_GY: uint8 [Gr, ceil(slots / 8)], from `pack_slots`; bits of deleted items are ignored."""
        if trie.alive is not None:
            slots_GY = slots_GY & pack_slots(trie.alive)
        levels = range(trie.num_levels + 1)
        legal = cls(trie, [None for _ in levels], slots_GY)
        group = torch.arange(len(slots_GY), device=trie.device)
        for level in levels[:-1]:
            nodes = trie.num_nodes(level)
            if nodes <= dense_nodes:
                group_M, node_M = group.repeat_interleave(nodes), torch.arange(nodes, device=trie.device).repeat(len(group))
                legal._bitmaps[level] = legal.mask(level, group_M, node_M).view(-1, nodes)
                legal._is_all[level] = bool(legal._bitmaps[level].all())
        return legal

    def __len__(self) -> int:
        return len(self._bitmaps)

    @overload
    def __getitem__(self, level: int) -> Tensor: ...
    @overload
    def __getitem__(self, level: slice) -> list[Tensor]: ...
    def __getitem__(self, level: int | slice) -> Tensor | list[Tensor]:
        if isinstance(level, slice):
            return [self[number] for number in range(*level.indices(len(self)))]
        level = range(len(self))[level]
        if self._bitmaps[level] is not None:
            return self._bitmaps[level]
        nodes, groups = self._trie.num_nodes(level), len(self._bytes)
        if level == self._trie.num_levels:
            return unpack_slots(self._bytes, nodes)
        group_M = torch.arange(groups, device=self._bytes.device).repeat_interleave(nodes)
        return self.mask(level, group_M, torch.arange(nodes, device=self._bytes.device).repeat(groups)).view(groups, nodes)

    def bitmap(self, level: int) -> Tensor | None:
        """bool [Gr, n_level] where it is at hand."""
        return self._bitmaps[level]

    @property
    def num_audiences(self) -> int:
        return len(self._slots_GY) if self._bitmaps[-1] is None else len(self._bitmaps[-1])

    def is_all(self, level: int) -> bool:
        """Whether every audience may reach every node of the level."""
        return self._is_all[level]

    def mask(self, level: int, group_M: Tensor, node_M: Tensor) -> Tensor:
        """Whether each node is legal for the audience beside it, bool [M]."""
        bitmap = self._bitmaps[level]
        if bitmap is not None:
            return bitmap.reshape(-1).index_select(0, group_M * bitmap.shape[1] + node_M)
        if level == self._trie.num_levels:
            byte_M = self._bytes.view(-1).index_select(0, group_M * self._bytes.shape[1] + (node_M >> 3))
            return ((byte_M >> (node_M & 7).to(torch.uint8)) & 1).bool()
        return self.count(level, group_M, node_M) > 0

    def count(self, level: int, group_M: Tensor, node_M: Tensor) -> Tensor:
        """Legal items below each node of level 0..L-1, for the audience beside it, int32 [M]."""
        first = self._trie.first_slot[level]
        static_M = node_M.clamp(max=first.numel() - 2)
        count_M = self._before_slot(group_M, first.index_select(0, static_M + 1))
        count_M -= self._before_slot(group_M, first.index_select(0, static_M))
        if self._trie.overlay is not None:
            count_M = torch.where(static_M == node_M, count_M, 0)
            pairs, inserted_X = self._overlay_counts[level]
            place_M, pair = pairs.find(group_M, node_M)
            count_M[place_M] += inserted_X[pair]
        return count_M

    @cached_property
    def _bytes(self) -> Tensor:
        """Packed slots, filled up to whole words of eight bytes with at least one empty byte, so that every slot has one after it."""
        packed = pack_slots(self._bitmaps[-1]) if self._slots_GY is None else self._slots_GY
        return torch.nn.functional.pad(packed, (0, 8 - packed.shape[1] % 8))

    @cached_property
    def _before(self) -> tuple[Tensor, Tensor]:
        """Legal slots before each word, int32, and before each byte within its word, uint8."""
        pairs = self._bytes - ((self._bytes >> 1) & 0x55)
        nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
        ones = ((nibbles + (nibbles >> 4)) & 0x0F).view(torch.int64)
        up_to = ones * 0x0101010101010101  # byte i of the product: the ones of bytes 0..i
        word = (up_to >> 56) & 0xFF
        return (word.cumsum(1) - word).int(), (up_to - ones).view(torch.uint8)

    def _before_slot(self, group_M: Tensor, slot_M: Tensor) -> Tensor:
        """Legal static slots before each slot."""
        words, bytes_ = self._before
        place_M = group_M * self._bytes.shape[1] + (slot_M >> 3)
        byte_M = self._bytes.view(-1).index_select(0, place_M) & _table("low bits", slot_M.device).index_select(0, slot_M & 7)
        count_M = bytes_.view(-1).index_select(0, place_M) + _table("ones", slot_M.device).index_select(0, byte_M.int())
        return words.view(-1).index_select(0, place_M >> 3) + count_M

    @cached_property
    def _overlay_counts(self) -> list[tuple[NodePairs, Tensor]]:
        """Nodes above legal inserted items, and the number of those, per level."""
        static, count = self._trie.parent[-1].numel(), len(self._trie.overlay.item_X)
        new = torch.arange(count, device=self._bytes.device)
        group_M, new_M = torch.arange(len(self._bytes), device=new.device).repeat_interleave(count), new.repeat(len(self._bytes))
        kept = self.mask(self._trie.num_levels, group_M, static + new_M)
        group_M, new_M = group_M[kept], new_M[kept]
        counts = []
        for level, node_X in enumerate(self._trie.overlay.ancestor[:-1]):
            key, number = torch.unique(group_M * self._trie.num_nodes(level) + node_X[new_M], return_counts=True)
            counts.append((NodePairs.of(key, self._trie.num_nodes(level)), number.int()))
        return counts

    def weights(self, item_weight_M: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Legal weight below every node, per level 0..L-1: (float64 [Gr, n_l], its log as float32). Kept for the next search.

        Costs 12 bytes per node and audience: at millions of items share audiences, or search without a prior.
        """
        if self._weights is None or self._weights[0] is not item_weight_M:
            weights = self._trie.weights(self[-1], item_weight_M)
            self._weights = item_weight_M, weights, [weight.log().float() for weight in weights]
        return self._weights[1:]


@dataclass(frozen=True)
class Excluded:
    """Nodes that single requests may not reach though their audience may: per level 0..L, and the slots that make them so."""

    pairs: list[NodePairs]
    request_X: Tensor  # int64, of each excluded slot
    slot_X: Tensor  # int64

    def lost_weight(self, trie: Trie, item_weight_M: Tensor) -> list[tuple[NodePairs, Tensor]]:
        """Excluded weight below every node that has any, per level 0..L-1: the pairs and float64 weights [X]."""
        weight_X, lost = item_weight_M.index_select(0, self.slot_X).double(), []
        for level, node_X in enumerate(trie.ancestors(self.slot_X)[:-1]):
            key, place_X = torch.unique(self.request_X * trie.num_nodes(level) + node_X, return_inverse=True)
            total = torch.zeros(len(key), dtype=torch.double, device=key.device).index_add_(0, place_X, weight_X)
            lost.append((NodePairs.of(key, trie.num_nodes(level)), total))
        return lost


@dataclass(frozen=True)
class Eligible:
    """What B requests may be shown."""

    trie: Trie
    legal: Legal
    group_B: Tensor  # int64, audience of each request
    excluded: Excluded | None = None

    @classmethod
    def of(cls, trie: Trie, legal: Sequence[Tensor], group_B: Tensor, exclude: tuple[Tensor, Tensor] | None = None) -> "Eligible":
        """Args: legal: `Legal`, or bitmaps of every level. exclude: (request_X int64, item_X catalogue indices) in any order, items
        that a request may not be shown; those it could not be shown anyway are ignored."""
        legal = legal if isinstance(legal, Legal) else Legal(trie, legal)
        eligible = cls(trie, legal, group_B)
        return eligible if exclude is None or not exclude[0].numel() else cls(trie, legal, group_B, eligible._exclude(*exclude))

    @property
    def num_requests(self) -> int:
        return self.group_B.numel()

    def keep(self, level: int, request_M: Tensor, node_M: Tensor) -> Tensor | None:
        """Positions in M of the legal nodes, ascending; None = all of them."""
        kept = None
        if not self.legal.is_all(level):
            kept = self.legal.mask(level, self.group_B.index_select(0, request_M), node_M)
        if self.excluded is not None:
            place_M, _ = self.excluded.pairs[level].find(request_M, node_M)
            if place_M.numel():
                kept = torch.ones_like(node_M, dtype=torch.bool) if kept is None else kept
                kept[place_M] = False
        return None if kept is None else kept.nonzero().squeeze(1)

    def children(self, level: int, request_N: Tensor, node_N: Tensor) -> tuple[Tensor, Tensor]:
        """The legal children of every node, end to end: (which of the N, child), int64 [M]."""
        owner_M, child_M = self.trie.children(level, node_N)
        bitmap, gone = self.legal.bitmap(level), self.excluded is not None and self.excluded.pairs[level].key_X.numel() > 0
        if bitmap is None or gone:
            kept = self.keep(level, request_N.index_select(0, owner_M), child_M)
        elif self.legal.is_all(level):
            kept = None
        else:
            kept = bitmap.view(-1).index_select(0, self.place(level, request_N, owner_M, child_M)).nonzero().squeeze(1)
        return (owner_M, child_M) if kept is None else (owner_M.index_select(0, kept), child_M.index_select(0, kept))

    def place(self, level: int, request_N: Tensor, owner_M: Tensor, child_M: Tensor) -> Tensor:
        """Where each child stands in a flat [Gr, n_level], int64 [M]."""
        if self.legal.num_audiences == 1:
            return child_M
        return (self.group_B * self.trie.num_nodes(level)).index_select(0, request_N).index_select(0, owner_M).add_(child_M)

    def _exclude(self, request_X: Tensor, item_X: Tensor) -> Excluded:
        """A node is gone when every legal item below it is excluded."""
        trie, slots = self.trie, self.trie.num_nodes(self.trie.num_levels)
        slot_X = trie.slots(item_X)
        request_X, slot_X = request_X.to(slot_X.device)[slot_X >= 0], slot_X[slot_X >= 0]
        legal_X = self.legal.mask(trie.num_levels, self.group_B[request_X], slot_X)
        key_X = torch.unique(request_X[legal_X] * slots + slot_X[legal_X])
        request_X, slot_X = key_X // slots, key_X % slots
        pairs = []
        for level, node_X in enumerate(trie.ancestors(slot_X)[:-1]):
            key, excluded = torch.unique(request_X * trie.num_nodes(level) + node_X, return_counts=True)
            legal = self.legal.count(level, self.group_B[key // trie.num_nodes(level)], key % trie.num_nodes(level))
            pairs.append(NodePairs.of(key[excluded == legal], trie.num_nodes(level)))
        pairs.append(NodePairs.of(key_X, slots))
        return Excluded(pairs, request_X, slot_X)


class LegalCache:
    """Bitmaps of eligibility groups, the recently used ones kept: many requests share one group."""

    def __init__(self, trie: Trie, items_of_group: Callable[[int], np.ndarray], capacity: int = 256) -> None:
        """Args: items_of_group: e.g. `Eligibility.items`. capacity: groups kept, each one byte per node and item of the trie."""
        self._trie, self._items_of_group, self._capacity = trie, items_of_group, capacity
        self._rows: OrderedDict[int, list[Tensor]] = OrderedDict()
        self._last: tuple[list[int], Legal] | None = None

    def __call__(self, groups_B: Tensor) -> tuple[Legal, Tensor]:
        """Bitmaps for B requests: (legal nodes of Gr audiences, request_group_B int64 into Gr). Gr = distinct groups, 0 if B = 0."""
        distinct, request_group_B = torch.unique(groups_B.to(self._trie.device), return_inverse=True)
        groups = distinct.tolist()
        if self._last is None or self._last[0] != groups:  # the next chunk often asks for the same groups
            rows = [self._row(group) for group in groups]
            bitmaps = [torch.stack(level) for level in zip(*rows, strict=True)] if rows else self._trie.legal_nodes([])
            self._last = groups, Legal(self._trie, bitmaps)
        return self._last[1], request_group_B

    def _row(self, group: int) -> list[Tensor]:
        row = self._rows.pop(group, None)
        if row is None:
            row = [bitmap[0] for bitmap in self._trie.legal_nodes([self._items_of_group(group)])]
        self._rows[group] = row  # newest last
        if len(self._rows) > self._capacity:
            self._rows.popitem(last=False)
        return row


def pack_slots(bits: Tensor) -> Tensor:
    """bool [..., slots] → uint8 [..., ceil(slots / 8)]; slot s is bit s % 8 of byte s // 8."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    packed = padded[..., 0].clone()
    for bit in range(1, 8):
        packed |= padded[..., bit] << bit
    return packed


def unpack_slots(packed: Tensor, num_slots: int) -> Tensor:
    """The opposite of `pack_slots`, bool [..., slots]."""
    bit = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> bit) & 1).bool().flatten(-2)[..., :num_slots]


_TABLES: dict[tuple[str, torch.device], Tensor] = {}


def _table(name: str, device: torch.device) -> Tensor:
    """ones: uint8 [256], ones in each byte. low bits: uint8 [8], the mask of the bits below each bit."""
    if (name, device) not in _TABLES:
        values = [number.bit_count() for number in range(256)] if name == "ones" else [(1 << bit) - 1 for bit in range(8)]
        _TABLES[name, device] = torch.tensor(values, dtype=torch.uint8, device=device)
    return _TABLES[name, device]
