"""Items inserted into a trie since it was built: a few new nodes and slots numbered after the static ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

# L levels  n_l static nodes at level l, n_L static slots  X inserted items  M entries of a flat list


@dataclass(frozen=True)
class Overlay:
    """Inserted items, and the nodes they needed; those of level l are numbered from n_l on, in the order (parent, code)."""

    codes_XL: Tensor  # int32; in the order of their slots
    item_X: Tensor  # int64
    code: list[Tensor]  # per level l < L, int32: of the new nodes
    parent: list[Tensor]  # per level l <= L, int64, ascending: of the new nodes
    ancestor: list[Tensor]  # per level l <= L, int64 [X]: node of each inserted item

    def to(self, device: torch.device | str) -> "Overlay":
        lists = ([tensor.to(device) for tensor in tensors] for tensors in (self.code, self.parent, self.ancestor))
        return Overlay(self.codes_XL.to(device), self.item_X.to(device), *lists)


def build_overlay(code: list[Tensor], child_offset: list[Tensor], codebook_size: int, codes_XL: Tensor, item_X: Tensor) -> Overlay:
    """Args: code, child_offset, codebook_size: of the static `Trie`. codes_XL, item_X: all inserted items that are alive, int32, int64."""
    order_X = item_X.argsort()
    for level in range(len(code) - 1, -1, -1):
        order_X = order_X[codes_XL[order_X, level].argsort(stable=True)]
    codes_XL, item_X = codes_XL[order_X], item_X[order_X]
    new_code, parent, ancestor = [], [], []
    node_X = torch.zeros_like(item_X)  # the root
    for level, static_code in enumerate(code):
        found_X = _static_child(static_code, child_offset[level], codebook_size, node_X, codes_XL[:, level])
        key_X = node_X * codebook_size + codes_XL[:, level]
        new = torch.unique(key_X[found_X < 0])
        node_X = torch.where(found_X < 0, static_code.numel() + torch.searchsorted(new, key_X), found_X)
        new_code.append((new % codebook_size).int())
        parent.append(new // codebook_size)
        ancestor.append(node_X)
    order_X = node_X.argsort(stable=True)  # the slots of a leaf together
    ancestor = [nodes[order_X] for nodes in ancestor]
    slot_X = int(child_offset[-1][-1]) + torch.arange(len(item_X), device=item_X.device)
    return Overlay(codes_XL[order_X], item_X[order_X], new_code, [*parent, ancestor[-1]], [*ancestor, slot_X])


def _static_child(code: Tensor, offset: Tensor, codebook_size: int, parent_X: Tensor, code_X: Tensor) -> Tensor:
    """Node of each (parent, code) among the static ones, -1 where there is none: a binary search in all children lists at once."""
    static_X = parent_X.clamp(max=offset.numel() - 2)
    low_X, end_X = offset[static_X].long(), offset[static_X + 1].long()
    end_X = torch.where(static_X == parent_X, end_X, low_X)
    high_X = end_X
    for _ in range(codebook_size.bit_length() + 1):
        middle_X = (low_X + high_X) // 2
        below_X = (low_X < high_X) & (code[middle_X.clamp(max=code.numel() - 1)] < code_X)
        low_X, high_X = torch.where(below_X, middle_X + 1, low_X), torch.where(below_X, high_X, torch.maximum(low_X, middle_X))
    found_X = (low_X < end_X) & (code[low_X.clamp(max=code.numel() - 1)] == code_X)
    return torch.where(found_X, low_X, -1)


def either(static: Tensor, extra: Tensor | None, index_M: Tensor) -> Tensor:
    """Entries of one array continued by another, int64."""
    if extra is None or not extra.numel():
        return static.index_select(0, index_M).long()
    in_extra_M = index_M - static.numel()
    values_M = static.index_select(0, index_M.clamp(max=static.numel() - 1))
    return torch.where(in_extra_M >= 0, extra.index_select(0, in_extra_M.clamp(min=0)), values_M).long()
