"""Rows of record batches where they lie in memory, and copies of any of them laid end to end: one memcpy for each list of a row.

The batches are never joined: a window of a memory-mapped split takes no memory of its own, and a row's bytes are moved once. Which rows
are wanted is `loader.py`'s business, what is made of them `collate.py`'s.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from operator import itemgetter

import numpy as np
import pyarrow as pa

from gpr_dist.data.collate import SIDE_COLUMNS, STORED, TOKEN_COLUMNS, JourneyColumns
from gpr_dist.errors import DataError

# Q record batches  R their rows, one batch after another  C list columns  G token lists, and each of the side lists  n rows to copy

_NUM_BUFFERS = {"string": 3, "list": 4}  # of a column in Arrow's flat order: validity, offsets, validity of the values, values
_OUTSIDE = "a list of a record batch lies outside its bytes; rebuild the shards"


@dataclass(frozen=True)
class StoredRows:
    """Where the lists of rows lie in memory."""

    batches: Sequence[pa.RecordBatch]
    """keep the memory"""
    batch_R: np.ndarray
    num_context: np.ndarray
    num_lookahead: np.ndarray
    names: tuple[str, ...]
    """list columns, those of the widest values first: copied end to end, all are aligned"""
    values_CQ: np.ndarray
    """address of the first value of each column and batch"""
    offsets: np.ndarray
    """int32 [G, R + Q]: of each batch one more than rows, from 0"""

    @classmethod
    def of(cls, batches: Sequence[pa.RecordBatch], columns: Collection[str]) -> "StoredRows":
        """Args: batches: whole ones as Arrow IPC decodes them, no slices; columns: those to copy, token_type among them.

        Raises: DataError when the per-token lists of a row differ in length, or a list lies outside its batch.
        """
        batches = [batch for batch in batches if batch.num_rows]
        names = _names(columns)
        if not batches:
            none = np.zeros(0, np.int32)
            return cls([], none, none, none, names, np.zeros((len(names), 0), np.int64),
                       np.zeros((len(_groups(names)), 0), np.int32))
        num_rows_Q = np.array([batch.num_rows for batch in batches])
        batch_R = np.repeat(np.arange(len(batches)), num_rows_Q)
        address_XQ, size_XQ = _buffers(batches, names)
        offsets_at_CQ, values_CQ, size_CQ = address_XQ[2::2], address_XQ[3::2], size_XQ[3::2]
        num_context, num_lookahead = (np.frombuffer(_copy(at_Q, 4 * num_rows_Q, batches), np.int32) for at_Q in address_XQ[:2])
        offsets = np.frombuffer(_copy(offsets_at_CQ, np.broadcast_to(4 * num_rows_Q + 4, offsets_at_CQ.shape), batches), np.int32)
        offsets = offsets.reshape(len(names), -1)
        last_Q = np.cumsum(num_rows_Q + 1) - 1
        first_CQ, last_CQ = offsets[:, last_Q - num_rows_Q], offsets[:, last_Q]
        itemsize_C1 = _layout(names)[2]
        if (first_CQ < 0).any() or (last_CQ.astype(np.int64) * itemsize_C1 > size_CQ).any():
            raise DataError(_OUTSIDE)
        if first_CQ.any():
            values_CQ, offsets = values_CQ + first_CQ * itemsize_C1, offsets - np.repeat(first_CQ, num_rows_Q + 1, axis=1)
        tokens = offsets[names.index("token_type")]
        for name, of_column in zip(names, offsets, strict=True):
            if name in TOKEN_COLUMNS and not np.array_equal(of_column, tokens):
                at = int(np.flatnonzero(of_column != tokens)[0])
                row = at - int((last_Q - num_rows_Q)[np.searchsorted(last_Q, at)]) - 1
                raise DataError(f"row {row} of a record batch: {name} and token_type differ in length; rebuild the shards")
        offsets = offsets[[names.index(name) for name in _groups(names)]]
        growing = np.diff(offsets) >= 0
        growing[:, last_Q[:-1]] = True  # from the end of one batch to the start of the next
        if not growing.all():
            raise DataError(_OUTSIDE)
        return cls(batches, batch_R, num_context, num_lookahead, names, values_CQ, offsets)

    def take(self, rows: np.ndarray) -> JourneyColumns:
        """A copy of these rows (int64 positions) in this order, in the types they are stored in."""
        batch_n = self.batch_R.take(rows)
        at_n = rows + batch_n
        begin_Gn = self.offsets.take(at_n, axis=1).astype(np.int64)
        length_Gn = self.offsets.take(at_n + 1, axis=1) - begin_Gn
        groups, group_C, itemsize_C1 = _layout(self.names)
        address_Cn = self.values_CQ.take(batch_n, axis=1) + begin_Gn.take(group_C, axis=0) * itemsize_C1
        content = _copy(address_Cn, length_Gn.take(group_C, axis=0) * itemsize_C1, self.batches)
        offsets_Gn1 = np.zeros((len(groups), len(rows) + 1), np.int64)
        np.cumsum(length_Gn, axis=1, out=offsets_Gn1[:, 1:])
        counts_G = offsets_Gn1[:, -1].tolist()
        values, end = {}, 0
        for name, group in zip(self.names, group_C.tolist(), strict=True):
            values[name] = np.frombuffer(content, STORED[name], counts_G[group], end)
            end += values[name].nbytes
        offsets = dict(zip(groups, offsets_Gn1, strict=True))
        return JourneyColumns(self.num_context.take(rows).astype(np.int64), self.num_lookahead.take(rows).astype(np.int64),
                              offsets["token_type"], {name: values[name] for name in TOKEN_COLUMNS if name in values},
                              {name: (offsets[name], values[name]) for name in SIDE_COLUMNS if name in values})


def _names(columns: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted((name for name in STORED if name in columns), key=lambda name: -STORED[name].itemsize))


def _groups(names: Sequence[str]) -> list[str]:
    """Columns whose offsets are kept: all lists of tokens share theirs."""
    return ["token_type", *(name for name in SIDE_COLUMNS if name in names)]


@cache
def _layout(names: tuple[str, ...]) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Groups, group of each column [C], bytes of its values [C, 1]."""
    groups = _groups(names)
    group_C = np.array([groups.index(name if name in groups else "token_type") for name in names])
    return groups, group_C, np.array([[STORED[name].itemsize] for name in names])


def _buffers(batches: Sequence[pa.RecordBatch], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Address and size of the buffers, [2 + 2 C, Q]: values of num_context and num_lookahead, then offsets and values of each list."""
    first, position = {}, 1  # the struct's own validity comes first
    for field in batches[0].schema:
        first[field.name] = position
        position += _NUM_BUFFERS.get("list" if pa.types.is_list(field.type) else str(field.type), 2)
    wanted = itemgetter(first["num_context"] + 1, first["num_lookahead"] + 1, *(first[name] + k for name in names for k in (1, 3)))
    found = [wanted(batch.to_struct_array().buffers()) for batch in batches]
    shape, nothing = (len(batches), -1), pa.py_buffer(b"")
    address = np.fromiter(((buffer or nothing).address for of_batch in found for buffer in of_batch), np.int64).reshape(shape)
    size = np.fromiter(((buffer or nothing).size for of_batch in found for buffer in of_batch), np.int64).reshape(shape)
    return address.T, size.T


def _copy(address: np.ndarray, num_bytes: np.ndarray, keep: object) -> memoryview:
    """The bytes of these ranges of memory, in the order of the arrays, end to end.

    Arrow's `take` copies elements of a binary array with a memcpy each. Here the array's bytes are all memory from the lowest range on,
    every second element is a range, and the elements between, which mean nothing, are not taken.
    """
    address, num_bytes = address.ravel(), num_bytes.ravel()
    total = int(num_bytes.sum())
    if total == 0:
        return memoryview(bytearray())
    used = num_bytes > 0
    if not used.all():
        address, num_bytes = address[used], num_bytes[used]
    low = int(address.min())
    count = len(address)
    offsets = np.zeros(2 * count + 2, np.int64)
    offsets[1:-1:2] = address - low
    np.add(offsets[1:-1:2], num_bytes, out=offsets[2:-1:2])
    offsets[-1] = 2 * total + 2 * total // count  # by the mean length of the elements Arrow guesses what to allocate
    everything = pa.foreign_buffer(low, int(offsets[2:].max()), keep)
    ranges = pa.Array.from_buffers(pa.large_binary(), 2 * count + 1, [None, pa.py_buffer(offsets), everything])
    return memoryview(ranges.take(pa.array(np.arange(1, 2 * count, 2))).buffers()[2])[:total]
