"""Eligibility from what ads and requests are: targeting, placement, budget and pacing, audit, frequency caps, as Boolean algebra on
packed bitmaps.

A `Table` has one packed row of slots per value of a request's field; `&`, `|` and `~` combine tables to a rule, and `audiences`
evaluates it once per distinct combination of values in a batch. A row costs a bit per slot: 1.25 MB at ten million ads. What depends on
the single user (frequency caps) is no bitmap but a list of exclusions, see `capped`. Tables never change: budgets that run out give a
new table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gpr_dist.decoding.legality import pack_slots, unpack_slots
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import DataError
from gpr_dist.ops.noise import hashed_uniform

# B requests  Gr distinct audiences  I catalogue items  R rows of a table  Y bytes of packed slots  X (item, value) pairs


class Rule:
    """An expression over tables."""

    def __and__(self, other: "Rule") -> "Rule":
        return _Operation(torch.bitwise_and, (self, other))

    def __or__(self, other: "Rule") -> "Rule":
        return _Operation(torch.bitwise_or, (self, other))

    def __invert__(self) -> "Rule":
        return _Operation(torch.bitwise_not, (self,))

    def tables(self) -> list["Table"]:
        """Those of the expression, from left to right."""
        raise NotImplementedError

    def evaluate(self, rows: list[Tensor]) -> Tensor:
        """uint8 [Gr, Y]. Args: rows: per table of `tables()`, int64 [Gr]; consumed from the front."""
        raise NotImplementedError

    def audiences(self, fields: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Packed slots of the distinct audiences among B requests, for `Legal.from_slots`.

        Args: fields: int64 [B] per field the tables name.
        Returns: (uint8 [Gr, Y], int64 [B] audience of each request).
        Raises: DataError when a field is missing.
        """
        tables = self.tables()
        missing = sorted({table.field for table in tables if table.field is not None} - set(fields))
        if missing or not fields:
            raise DataError(f"requests have the fields {sorted(fields)}, the eligibility rules need {missing or 'at least one'}")
        num_requests = len(next(iter(fields.values())))
        row_BT = torch.stack([table.row(fields, num_requests) for table in tables], dim=1)
        combination_GT, group_B = torch.unique(row_BT, dim=0, return_inverse=True)
        return self.evaluate(list(combination_GT.unbind(1))), group_B


@dataclass(frozen=True)
class _Operation(Rule):
    combine: Callable[..., Tensor]
    parts: tuple[Rule, ...]

    def tables(self) -> list["Table"]:
        return [table for part in self.parts for table in part.tables()]

    def evaluate(self, rows: list[Tensor]) -> Tensor:
        return self.combine(*[part.evaluate(rows) for part in self.parts])


@dataclass(frozen=True, eq=False)
class Table(Rule):
    """Slots that a value of a request's field allows."""

    trie: Trie
    rows_RY: Tensor  # uint8; the last row is for values that no ad names
    field: str | None = None  # None: the same for every request
    num_buckets: int = 0  # > 0: the row is a hash of the field

    def tables(self) -> list["Table"]:
        return [self]

    def evaluate(self, rows: list[Tensor]) -> Tensor:
        return self.rows_RY.index_select(0, rows.pop(0))

    def row(self, fields: Mapping[str, Tensor], num_requests: int) -> Tensor:
        """Which row holds for each request, int64 [B]."""
        last = len(self.rows_RY) - 1
        if self.field is None:
            return torch.zeros(num_requests, dtype=torch.long, device=self.rows_RY.device)
        value_B = fields[self.field].to(self.rows_RY.device)
        if self.num_buckets:
            return (hashed_uniform(value_B, 1)[:, 0] * self.num_buckets).long().clamp(max=last)
        return torch.where((value_B >= 0) & (value_B < last), value_B, last)

    def with_items(self, items: Tensor, allowed: bool, rows: Tensor | None = None) -> "Table":
        """A table in which these ads are allowed or not, e.g. a budget that ran out. Args: rows: values concerned; None = all rows."""
        slots = self.trie.slots(items)
        slots = slots[slots >= 0]
        mask = torch.zeros(self.trie.slot_item.numel(), dtype=torch.bool, device=slots.device)
        mask[slots] = True
        packed, rows_RY = pack_slots(mask), self.rows_RY.clone()
        which = slice(None) if rows is None else rows
        rows_RY[which] = rows_RY[which] | packed if allowed else rows_RY[which] & ~packed
        return replace(self, rows_RY=rows_RY)

    def moved(self, trie: Trie, allow_new: bool = False) -> "Table":
        """The table over a trie in which ads were inserted, deleted or compacted. Args: allow_new: for ads that the old one lacks."""
        old = self.trie.slots(trie.slot_item)
        rows = []
        for row_Y in self.rows_RY:  # one at a time: unpacked, a row is a byte per slot
            bits = unpack_slots(row_Y, self.trie.slot_item.numel())
            rows.append(pack_slots(torch.where(old >= 0, bits[old.clamp(min=0)], allow_new)))
        return replace(self, trie=trie, rows_RY=torch.stack(rows))


def flag(trie: Trie, allowed_I: Tensor) -> Table:
    """Ads that are on for everybody: audited, with budget left. Args: allowed_I: bool per catalogue item."""
    return Table(trie, pack_slots(allowed_I.to(trie.device)[trie.slot_item.long()])[None])


def listed(trie: Trie, field: str, num_values: int, item_X: Tensor, value_X: Tensor) -> Table:
    """Ads that name the request's value, e.g. blocked placements as `~listed(...)`. Args: item_X, value_X: pairs, values from 0."""
    slot_X = trie.slots(item_X)
    known_X = (slot_X >= 0) & (value_X.to(slot_X.device) >= 0) & (value_X.to(slot_X.device) < num_values)
    slot_X, value_X = slot_X[known_X], value_X.to(slot_X.device)[known_X]
    num_bytes = -(-trie.slot_item.numel() // 8)
    place = torch.unique((value_X * num_bytes + (slot_X >> 3)) * 8 + (slot_X & 7))
    rows = torch.zeros((num_values + 1) * num_bytes, dtype=torch.uint8, device=slot_X.device)
    rows.index_add_(0, place >> 3, (1 << (place & 7)).to(torch.uint8))  # distinct bits, so their sum is their union
    return Table(trie, rows.view(num_values + 1, num_bytes), field)


def targeting(trie: Trie, field: str, num_values: int, item_X: Tensor, value_X: Tensor) -> Rule:
    """Ads that name the request's value, or no value at all: targeting attributes, placements."""
    mask = torch.ones(trie.slot_item.numel(), dtype=torch.bool, device=trie.device)
    slot_X = trie.slots(item_X)
    mask[slot_X[slot_X >= 0]] = False
    table = listed(trie, field, num_values, item_X, value_X)
    return replace(table, rows_RY=table.rows_RY | pack_slots(mask))


def pacing(trie: Trie, rate_I: Tensor, field: str = "request_id", num_buckets: int = 32) -> Table:
    """Ads that take part in a share of the requests only, so that a budget lasts its day; which ones is a hash of the field.

    Args: rate_I: share per catalogue item, 0..1, kept to 1 / num_buckets (stochastically rounded by item).
    """
    item = trie.slot_item.long()
    on = rate_I.to(trie.device).float().index_select(0, item) * num_buckets  # buckets in which the ad takes part
    phase = hashed_uniform(item, 1, seed=1)[:, 0] * num_buckets
    rows = []
    for bucket in range(num_buckets):
        turn = phase + bucket
        rows.append(pack_slots(torch.where(turn < num_buckets, turn, turn - num_buckets) < on))
    return Table(trie, torch.stack([*rows, rows[0]]), field, num_buckets)


def capped(request_X: Tensor, item_X: Tensor, count_X: Tensor, cap_I: Tensor) -> tuple[Tensor, Tensor]:
    """Exclusions by frequency cap, for `Eligible.of`. Args: count_X: times the request's user saw the ad; cap_I: most times, per item."""
    over_X = count_X >= cap_I.to(item_X.device)[item_X]
    return request_X[over_X], item_X[over_X]
