"""Rows of record batches where they lie in memory, and copies of any of them laid end to end: one memcpy for each list of a row.

The batches are never joined: a window of a memory-mapped split takes no memory of its own, and a row's bytes are moved once. Which rows
are wanted is `loader.py`'s business, what is made of them `collate.py`'s.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import pyarrow as pa

from gpr_dist.data.collate import SIDE_COLUMNS, STORED, TOKEN_COLUMNS, JourneyColumns
from gpr_dist.errors import DataError

# Q record batches  R their rows, one batch after another  C list columns  n rows to copy

_NUM_BUFFERS = {"string": 3, "list": 4}  # of a column in Arrow's flat order: validity, offsets, validity of the values, values


@dataclass(frozen=True)
class StoredRows:
    """Where each list of each row begins, and how long it is."""

    batches: Sequence[pa.RecordBatch]
    """keep the memory"""
    num_context: np.ndarray
    num_lookahead: np.ndarray
    names: Sequence[str]
    """list columns, those of the widest values first: copied end to end, all are aligned"""
    address_CR: np.ndarray
    num_bytes_CR: np.ndarray

    @classmethod
    def of(cls, batches: Sequence[pa.RecordBatch], columns: Collection[str]) -> "StoredRows":
        """Args: batches: whole ones as Arrow IPC decodes them, no slices; columns: those to copy, token_type among them.

        Raises: DataError when the per-token lists of a row differ in length, or a list lies outside its batch.
        """
        batches = [batch for batch in batches if batch.num_rows]
        names = sorted((name for name in STORED if name in columns), key=lambda name: -STORED[name].itemsize)
        if not batches:
            none = np.zeros(0, np.int32)
            return cls([], none, none, names, np.zeros((len(names), 0), np.int64), np.zeros((len(names), 0), np.int64))
        num_rows_Q = np.array([batch.num_rows for batch in batches])
        address_XQ, size_XQ = _buffers(batches, names)
        offsets_at_CQ, values_at_CQ, values_size_CQ = address_XQ[2::2], address_XQ[3::2], size_XQ[3::2]
        num_context, num_lookahead = (np.frombuffer(_copy(at_Q, 4 * num_rows_Q, batches), np.int32) for at_Q in address_XQ[:2])
        offsets = np.frombuffer(_copy(offsets_at_CQ, np.broadcast_to(4 * num_rows_Q + 4, offsets_at_CQ.shape), batches), np.int32)
        offsets = offsets.reshape(len(names), -1)  # of a batch one more than rows
        batch_R = np.repeat(np.arange(len(batches)), num_rows_Q)
        first_R = np.arange(len(batch_R)) + batch_R
        begin_CR, length_CR = offsets[:, first_R].astype(np.int64), np.diff(offsets)[:, first_R]
        itemsize_C1 = np.array([[STORED[name].itemsize] for name in names])
        last_Q = np.cumsum(num_rows_Q) - 1
        if (length_CR < 0).any() or (begin_CR < 0).any() or ((begin_CR + length_CR)[:, last_Q] * itemsize_C1 > values_size_CQ).any():
            raise DataError("a list of a record batch lies outside its bytes; rebuild the shards")
        for name, length_R in zip(names, length_CR, strict=True):
            different = np.flatnonzero(length_R != length_CR[names.index("token_type")]) if name in TOKEN_COLUMNS else ()
            if len(different):
                row = int(first_R[different[0]] - first_R[last_Q[batch_R[different[0]]]] + num_rows_Q[batch_R[different[0]]]) - 1
                raise DataError(f"row {row} of a record batch: {name} and token_type differ in length; rebuild the shards")
        return cls(batches, num_context, num_lookahead, names, values_at_CQ[:, batch_R] + begin_CR * itemsize_C1, length_CR * itemsize_C1)

    def take(self, rows: np.ndarray) -> JourneyColumns:
        """A copy of these rows (int64 positions) in this order, in the types they are stored in."""
        num_bytes_Cn = self.num_bytes_CR[:, rows]
        content = _copy(self.address_CR[:, rows], num_bytes_Cn, self.batches)
        offsets, values, end = {}, {}, 0
        for name, num_bytes_n in zip(self.names, num_bytes_Cn, strict=True):
            begin, end = end, end + int(num_bytes_n.sum())
            values[name] = np.frombuffer(content[begin:end], STORED[name])
            if name in SIDE_COLUMNS or name == "token_type":
                offsets[name] = np.append(0, np.cumsum(num_bytes_n)) // STORED[name].itemsize
        return JourneyColumns(self.num_context[rows].astype(np.int64), self.num_lookahead[rows].astype(np.int64), offsets["token_type"],
                              {name: values[name] for name in TOKEN_COLUMNS if name in values},
                              {name: (offsets[name], values[name]) for name in SIDE_COLUMNS if name in values})


def _buffers(batches: Sequence[pa.RecordBatch], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Address and size of the buffers, [2 + 2 C, Q]: values of num_context and num_lookahead, then offsets and values of each list."""
    first, position = {}, 1  # the struct's own validity comes first
    for field in batches[0].schema:
        first[field.name] = position
        position += _NUM_BUFFERS.get("list" if pa.types.is_list(field.type) else str(field.type), 2)
    wanted = itemgetter(first["num_context"] + 1, first["num_lookahead"] + 1, *(first[name] + k for name in names for k in (1, 3)))
    found = [[(0, 0) if buffer is None else (buffer.address, buffer.size) for buffer in wanted(batch.to_struct_array().buffers())]
             for batch in batches]
    address_XQ, size_XQ = np.array(found, np.int64).transpose(2, 1, 0)
    return address_XQ, size_XQ


def _copy(address: np.ndarray, num_bytes: np.ndarray, keep: object) -> memoryview:
    """The bytes of these ranges of memory, in the order of the arrays, end to end.

    Arrow's `take` copies elements of a binary array with a memcpy each. Here the array's bytes are all memory from the lowest range on,
    every second element is a range, and the elements between, which mean nothing, are not taken.
    """
    address, num_bytes = address.ravel(), num_bytes.ravel()
    total = int(num_bytes.sum())
    if total == 0:
        return memoryview(b"")
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
