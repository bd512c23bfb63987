"""The item catalogue: item id → index, built out of core, only ever appended to.

Owns `catalogue/`: catalogue.arrow (one row per item, row number = index), hashes.npy and indices.npy (the ids' 64-bit hashes sorted,
and the index of each: the memory-mapped lookup table), catalogue.json (written last). Which items exist is told by the callers of
`ItemCollector`; what an item means to a model belongs to the tokenizer.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.events import AD
from data_pipeline.spill import Spill, read_columns, read_partition
from gpr_dist.errors import DataError
from gpr_dist.hashing import StringColumn, bucket_of, check_collisions, hash_strings
from gpr_dist.schema import NO_ITEM, SCHEMA_VERSION, write_atomic

NEVER_SEEN = -1  # first_seen of an item that no event shows
_UNSEEN = np.iinfo(np.int64).max
_SIGHTINGS = pa.schema([("hash", pa.uint64()), ("item_id", pa.string()), ("kind", pa.uint8()), ("first_seen", pa.int64())])
_BATCH_ROWS = 1 << 16


class Catalogue:
    """A finished catalogue, memory-mapped: opening it costs nothing, a lookup costs a binary search per id."""

    def __init__(self, folder: str | Path):
        """Raises: DataError when there is no finished catalogue in `folder`, or one of another version."""
        self.folder = Path(folder)
        try:
            meta = json.loads((self.folder / "catalogue.json").read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise DataError(f"{self.folder}: no finished catalogue ({error}); build it with launch/build_data.py") from None
        if meta.get("schema_version") != SCHEMA_VERSION:
            raise DataError(f"{self.folder}: catalogue of schema version {meta.get('schema_version')}, this code reads {SCHEMA_VERSION}")
        self.num_items: int = meta["num_items"]
        self.fingerprint: str = meta["fingerprint"]
        self._hashes = _load_npy(self.folder / "hashes.npy", self.num_items)
        self._indices = _load_npy(self.folder / "indices.npy", self.num_items)

    def index_of(self, hashes: np.ndarray) -> np.ndarray:
        """Catalogue index int32 per item hash (uint64, `hash_strings` of the id); NO_ITEM where the id is not in the catalogue."""
        if not self.num_items:
            return np.full(len(hashes), NO_ITEM, np.int32)
        at = np.minimum(np.searchsorted(self._hashes, hashes), self.num_items - 1)
        return np.where(self._hashes[at] == hashes, self._indices[at], np.int32(NO_ITEM)).astype(np.int32)

    def index_of_ids(self, item_ids: StringColumn) -> np.ndarray:
        """Catalogue index int32 per item id string; NO_ITEM where unknown or null."""
        return self.index_of(hash_strings(item_ids))

    def known(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes and indices number first..last-1 in hash order, for merging."""
        return self._hashes[first:last], self._indices[first:last]

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows of catalogue.arrow, in index order."""
        with pa.memory_map(str(self.folder / "catalogue.arrow")) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                yield reader.get_batch(number)

    def table(self) -> pa.Table:
        """All rows as one memory-mapped table."""
        return pa.ipc.open_file(pa.memory_map(str(self.folder / "catalogue.arrow"))).read_all()


class ItemCollector:
    """Collects sightings of items (from events, eligibility lists, items tables) into partition files on disk."""

    def __init__(self, folder: Path, name: str, num_partitions: int, limit_bytes: int):
        self.num_partitions = num_partitions
        self._spill = Spill(folder, name, num_partitions, limit_bytes)

    def add(self, item_ids: StringColumn, hashes: np.ndarray, kind: np.ndarray, time: np.ndarray | None) -> None:
        """Items [n] seen as `kind` at `time` (seconds; None = not in an event); repetitions are merged first."""
        check_collisions(item_ids, hashes, "item")
        order = np.lexsort((kind, hashes))
        last_of = np.flatnonzero(np.append(hashes[order][1:] != hashes[order][:-1], True)) if len(order) else np.zeros(0, np.int64)
        chosen = order[last_of]  # the largest kind: AD wins
        first_seen = np.full(len(chosen), _UNSEEN)
        if time is not None and len(order):
            starts = np.concatenate([[0], last_of[:-1] + 1])
            first_seen = np.minimum.reduceat(time[order], starts)
        ids = _plain_strings(item_ids.take(pa.array(chosen)))
        self._spill.add(bucket_of(hashes[chosen], self.num_partitions), pa.table(
            [pa.array(hashes[chosen]), ids, pa.array(kind[chosen].astype(np.uint8)), pa.array(first_seen)], schema=_SIGHTINGS))

    def close(self) -> None:
        self._spill.close()


class ItemTableCollector:
    """Collects the rows of the items table (text, price, features) into partition files, keyed by hash."""

    def __init__(self, folder: Path, num_partitions: int, limit_bytes: int):
        self.num_partitions = num_partitions
        self._spill = Spill(folder, "items", num_partitions, limit_bytes)

    def add(self, items: pa.Table) -> None:
        """Rows of ITEM_SCHEMA plus feature columns. Raises: DataError when an item id is null or empty."""
        missing = pc.fill_null(pc.equal(items["item_id"], ""), True)
        if pc.any(missing).as_py():
            raise DataError(f"items table: {pc.sum(missing).as_py():,} rows have no item_id; every item needs one")
        hashes = hash_strings(items["item_id"])
        self._spill.add(bucket_of(hashes, self.num_partitions), items.append_column("hash", pa.array(hashes)))

    def close(self) -> None:
        self._spill.close()


def build_catalogue(folder: Path, sightings: Path, items: Path, num_partitions: int, item_features: pa.Schema,
                    base: Catalogue | None = None) -> Catalogue:
    """Merge what the collectors wrote under `sightings` and `items` into a catalogue. Memory: one partition at a time.

    New items are numbered in the order of their hash, after those of `base`, so that the numbering does not depend on the order of
    the logs. A base item keeps its index and its columns; it becomes an ad when it is now seen as one.
    Args: item_features: fields of the feature columns beyond ITEM_SCHEMA.
    Raises: DataError when two ids share a hash, an item is listed twice with different content, or base has other columns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("item_id", pa.string()), ("kind", pa.uint8()), ("first_seen", pa.int64()), ("text", pa.string()),
                        ("price", pa.float32()), *item_features])
    num_base = base.num_items if base else 0
    if base and (found := next(iter(base.batches()), None)) is not None and found.schema.names != schema.names:
        raise DataError(f"base catalogue {base.folder} has columns {found.schema.names}, this build has {schema.names}; give both the same")
    now_ad = np.zeros(num_base, bool)
    digest = hashlib.sha256()
    next_index, base_position = num_base, 0
    with _Appender(folder / "new_rows.arrow", schema) as new_rows, open(folder / "hashes.tmp", "wb") as hash_file, \
            open(folder / "indices.tmp", "wb") as index_file:
        for partition in range(num_partitions):
            new = _merge_sightings(sightings, partition)
            new = _join_items(new, items, partition, schema)
            hashes = new["hash"].to_numpy()
            known_hashes, known_indices = np.zeros(0, np.uint64), np.zeros(0, np.int32)
            if base:
                end = _partition_end(base, base_position, partition, num_partitions)
                known_hashes, known_indices = base.known(base_position, end)
                base_position = end
                index = base.index_of(hashes)
                now_ad[index[(index >= 0) & (new["kind"].to_numpy() == AD)]] = True
                _check_same_ids(base, index, new["item_id"])
                new, hashes = new.filter(pa.array(index < 0)), hashes[index < 0]
            new_rows.write(new.select(schema.names))
            indices = np.arange(next_index, next_index + len(hashes), dtype=np.int32)
            next_index += len(hashes)
            assert next_index < 1 << 31, next_index
            all_hashes, all_indices = np.concatenate([known_hashes, hashes]), np.concatenate([known_indices, indices])
            order = np.argsort(all_hashes, kind="stable")
            hash_file.write(all_hashes[order].tobytes())
            index_file.write(all_indices[order].tobytes())
            digest.update(np.ascontiguousarray(hashes).tobytes())
    fingerprint = hashlib.sha256(f"{base.fingerprint if base else ''}:{digest.hexdigest()}:{next_index}".encode()).hexdigest()[:16]
    if base and next_index == num_base:
        fingerprint = base.fingerprint  # the same items under the same indices
    with _Appender(folder / "catalogue.arrow", schema) as rows:
        if base:
            for batch in _with_kind(base, now_ad):
                rows.write(pa.Table.from_batches([batch]).cast(schema))
        with pa.memory_map(str(folder / "new_rows.arrow")) as source:
            reader = pa.ipc.open_file(source)
            for number in range(reader.num_record_batches):
                rows.write(pa.Table.from_batches([reader.get_batch(number)]))
    (folder / "new_rows.arrow").unlink()
    _finish_npy(folder, "hashes", np.uint64, next_index)
    _finish_npy(folder, "indices", np.int32, next_index)
    meta = {"schema_version": SCHEMA_VERSION, "num_items": next_index, "fingerprint": fingerprint}
    write_atomic(folder / "catalogue.json", json.dumps(meta, indent=1).encode())
    return Catalogue(folder)


def _merge_sightings(folder: Path, partition: int) -> pa.Table:
    """One row per item of a partition, sorted by hash."""
    table = read_columns(read_partition(folder, partition), _SIGHTINGS)
    hashes, kind, seen = table["hash"].to_numpy(), table["kind"].to_numpy(), table["first_seen"].to_numpy()
    order = np.argsort(hashes, kind="stable")
    starts = np.flatnonzero(np.append(True, hashes[order][1:] != hashes[order][:-1])) if len(order) else np.zeros(0, np.int64)
    rows, ids = order[starts], table["item_id"]
    check_collisions(ids, hashes, "item")
    kind = np.maximum.reduceat(kind[order], starts) if len(order) else kind
    seen = np.minimum.reduceat(seen[order], starts) if len(order) else seen
    seen = np.where(seen == _UNSEEN, NEVER_SEEN, seen)
    return pa.table([pa.array(hashes[rows]), ids.take(pa.array(rows)), pa.array(kind), pa.array(seen)], schema=_SIGHTINGS)


def _join_items(sightings: pa.Table, folder: Path, partition: int, schema: pa.Schema) -> pa.Table:
    """Add text, price and features. Every item of the items table is also a sighting, so that nothing is added here."""
    batches = list(read_partition(folder, partition))
    features = [schema.field(name) for name in schema.names[3:]]
    if batches:
        items = pa.Table.from_batches(batches).combine_chunks()
        hashes = items["hash"].to_numpy()
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        _check_listed_once(items, order, hashes)
        at = np.minimum(np.searchsorted(hashes, sightings["hash"].to_numpy()), max(len(hashes) - 1, 0))
        listed = hashes[at] == sightings["hash"].to_numpy()
        rows = pa.array(order[at], mask=~listed)
        columns = [items[f.name].take(rows).cast(f.type) if f.name in items.column_names else pa.nulls(sightings.num_rows, f.type)
                   for f in features]
    else:
        columns = [pa.nulls(sightings.num_rows, f.type) for f in features]
    for f, column in zip(features, columns, strict=True):
        fill = {"text": "", "price": float("nan")}.get(f.name)
        sightings = sightings.append_column(f, column if fill is None else pc.fill_null(column, pa.scalar(fill, f.type)))
    return sightings


def _check_listed_once(items: pa.Table, order: np.ndarray, hashes: np.ndarray) -> None:
    """An item may be listed again with the same content; with other content nothing says which row is right."""
    again = np.flatnonzero(hashes[1:] == hashes[:-1])
    if not len(again):
        return
    first, second = items.take(pa.array(order[again])), items.take(pa.array(order[again + 1]))
    for name in items.column_names:
        same = pc.or_kleene(pc.equal(first[name], second[name]), pc.and_(pc.is_null(first[name]), pc.is_null(second[name])))
        if pa.types.is_floating(first[name].type):
            same = pc.or_kleene(same, pc.and_(pc.is_nan(first[name]), pc.is_nan(second[name])))
        different = np.flatnonzero(~pc.fill_null(same, False).to_numpy())
        if len(different):
            row = int(different[0])
            raise DataError(f"items table: item {first['item_id'][row].as_py()!r} is listed twice with different {name} "
                            f"({first[name][row].as_py()!r} and {second[name][row].as_py()!r}); keep one row per item")


def _check_same_ids(base: Catalogue, index: np.ndarray, item_ids: pa.ChunkedArray) -> None:
    rows = np.flatnonzero(index >= 0)
    if len(rows):
        known = base.table()["item_id"].take(pa.array(index[rows])).cast(pa.string())
        both = pa.chunked_array([*known.chunks, *item_ids.take(pa.array(rows)).chunks])
        check_collisions(both, np.tile(index[rows], 2), "item")


def _partition_end(base: Catalogue, start: int, partition: int, num_partitions: int) -> int:
    """Where a partition of the base's hash order ends; `bucket_of` is monotone, so a binary search finds it."""
    low, high = start, base.num_items
    while low < high:
        middle = (low + high) // 2
        if bucket_of(np.asarray(base.known(middle, middle + 1)[0]), num_partitions)[0] <= partition:
            low = middle + 1
        else:
            high = middle
    return low


def _with_kind(base: Catalogue, now_ad: np.ndarray) -> Iterator[pa.RecordBatch]:
    first = 0
    for batch in base.batches():
        kind = np.where(now_ad[first:first + batch.num_rows], np.uint8(AD), batch.column("kind").to_numpy())
        yield batch.set_column(batch.schema.get_field_index("kind"), "kind", pa.array(kind))
        first += batch.num_rows


class _Appender:
    """An Arrow file whose record batches have `_BATCH_ROWS` rows however it is fed, so that its bytes depend on the rows only."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._path, self._schema = path, schema
        self._held: list[pa.Table] = []

    def __enter__(self) -> "_Appender":
        self._writer = pa.ipc.new_file(self._path, self._schema)
        return self

    def write(self, table: pa.Table) -> None:
        self._held.append(table.cast(self._schema))
        if sum(held.num_rows for held in self._held) >= _BATCH_ROWS:
            self._drain(1)

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        if kind is None:
            self._drain(0)
        self._writer.close()

    def _drain(self, whole_only: int) -> None:
        rows = pa.concat_tables(self._held) if self._held else pa.table([[] for _ in self._schema], schema=self._schema)
        end = rows.num_rows - rows.num_rows % _BATCH_ROWS if whole_only else rows.num_rows
        for first in range(0, end, _BATCH_ROWS):
            piece = rows.slice(first, min(_BATCH_ROWS, end - first)).combine_chunks()
            self._writer.write_batch(piece.to_batches()[0])
        self._held = [rows.slice(end)]


def _finish_npy(folder: Path, name: str, dtype: type, length: int) -> None:
    """Put the .npy header before the raw values of `<name>.tmp`."""
    values = np.memmap(folder / f"{name}.tmp", dtype, "r", shape=(length,)) if length else np.zeros(0, dtype)
    out = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=(length,)) if length else None
    if out is None:
        np.save(folder / f"{name}.npy", values)
    else:
        for first in range(0, length, 1 << 24):
            out[first:first + (1 << 24)] = values[first:first + (1 << 24)]
        out.flush()
    (folder / f"{name}.tmp").unlink()


def _load_npy(path: Path, length: int) -> np.ndarray:
    try:
        values = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is missing or damaged ({error}); rebuild with launch/build_data.py") from None
    if len(values) != length:
        raise DataError(f"{path} has {len(values):,} entries, catalogue.json says {length:,}; rebuild with launch/build_data.py")
    return values


def _plain_strings(column: StringColumn) -> pa.ChunkedArray:
    column = column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
    return column.cast(pa.string())
