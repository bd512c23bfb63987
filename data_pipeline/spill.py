"""Out-of-core partitioning: rows go in in any order and come out partition by partition.

Owns the temporary files of a build. Each flush writes ONE Arrow file with one record batch per partition (sorted by partition, as a
map-reduce shuffle does), so the number of files does not multiply with the number of partitions, and a partition is read back by
seeking. Which rows belong together is the caller's matter.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa


class Spill:
    """Rows of one writer, partitioned. Files appear under `folder` as `<name>-0000.arrow`, ... when `close` or the limit is reached."""

    def __init__(self, folder: Path, name: str, num_partitions: int, limit_bytes: int):
        """limit_bytes: memory held before rows go to disk; about twice of it is used while writing."""
        self.folder, self.name, self.num_partitions, self.limit_bytes = folder, name, num_partitions, limit_bytes
        self._held: list[tuple[np.ndarray, pa.Table]] = []
        self._held_bytes, self._num_files = 0, 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, partition: np.ndarray, rows: pa.Table) -> None:
        """Rows [n] with the partition in [0, num_partitions) of each [n]."""
        assert len(partition) == rows.num_rows, (len(partition), rows.num_rows)
        self._held.append((partition.astype(np.int32), rows))
        self._held_bytes += rows.nbytes
        if self._held_bytes >= self.limit_bytes:
            self._flush()

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        if not self._held:
            return
        partition = np.concatenate([part for part, _ in self._held])
        rows = pa.concat_tables([table for _, table in self._held])
        self._held, self._held_bytes = [], 0
        if self.num_partitions > 1:
            rows = rows.take(pa.array(np.argsort(partition, kind="stable")))
        starts = np.concatenate([[0], np.cumsum(np.bincount(partition, minlength=self.num_partitions))])
        path = self.folder / f"{self.name}-{self._num_files:04d}.arrow"
        with pa.ipc.new_file(path, rows.schema) as writer:
            for first, last in pairwise(starts):
                writer.write_batch(_one_batch(rows.slice(first, last - first)))
        self._num_files += 1


def read_partition(folder: Path, partition: int) -> Iterator[pa.RecordBatch]:
    """The rows of one partition, file by file (memory-mapped: a file costs memory only for what is used of it)."""
    for path in sorted(folder.glob("*.arrow")):
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(partition)
            if batch.num_rows:
                yield batch


def read_columns(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """The batches as one table of `schema` in one chunk per column."""
    return pa.Table.from_batches(list(batches), schema).combine_chunks()


def records_to_table(records: np.ndarray) -> pa.Table:
    """A structured array as a table with one fixed-width binary column `record`; one copy, no conversion per field."""
    records = np.ascontiguousarray(records)
    kind = pa.binary(records.dtype.itemsize)
    array = pa.Array.from_buffers(kind, len(records), [None, pa.py_buffer(records.view(np.uint8))])
    return pa.table({"record": array})


def batch_to_records(batch: pa.RecordBatch, dtype: np.dtype) -> np.ndarray:
    """Inverse of `records_to_table`, without a copy; valid as long as the batch is."""
    column = batch.column(0)
    return np.frombuffer(column.buffers()[1], dtype, len(column), offset=column.offset * dtype.itemsize)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    if not table.num_rows:
        return pa.RecordBatch.from_pylist([], table.schema)
    return table.combine_chunks().to_batches()[0]
