"""Shards: journeys in, Arrow IPC files or WebDataset tars out, with an index that makes every record batch readable on its own.

Owns the byte layout of a split folder and its crash safety: files appear under their final name only when complete, a part counts
as done when its sidecar exists, the manifest comes last. Reading for training is `gpr_dist/data/reader.py`; which journeys go into
which split is decided by `journeys.py`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import Field
from webdataset import TarWriter

from gpr_dist.config import Config
from gpr_dist.errors import DataError
from gpr_dist.safety import inside
from gpr_dist.schema import INDEX_SCHEMA, JOURNEY_SCHEMA, ROW_STATS, ShardInfo, ShardManifest, TokenType, write_atomic

SUFFIX = {"arrow": ".arrow", "webdataset": ".tar"}
PER_TOKEN = ("token_type", "block", "item", "action", "scene", "timestamp", "value", "pctr", "pcvr")
_ARROW_MAGIC_BYTES = 8  # "ARROW1" and two bytes of padding before the schema message of an IPC file
_TAR_HEADER_BYTES = 512  # ustar, names shorter than 100 characters
_HASH_CHUNK_BYTES = 1 << 24


class ShardConfig(Config):
    """How journeys are laid out in files."""

    container: Literal["arrow", "webdataset"] = "arrow"
    """arrow = Arrow IPC files, webdataset = tars with one record batch per member"""
    compression: Literal["none", "lz4", "zstd"] = "none"
    """of the buffers inside each record batch; none is fastest from a local disk, zstd from a slow network"""
    rows_per_batch: int = Field(default=64, ge=1)
    """journeys per record batch, the unit that is read and checksummed"""
    rows_per_shard: int = Field(default=65536, ge=1)
    """journeys per file, rounded up to whole record batches"""


class ShardWriter:
    """Writes one part (one worker's journeys of one split) as `part-00003-0000.arrow`, `part-00003-0001.arrow`, ...

    The bytes depend on the rows and the config only, not on how the rows were grouped in the calls of `write`. Files left by an
    interrupted run of the same part are removed first. Use as a context manager, or call `close`: without it the part does not count.
    """

    def __init__(self, folder: str | Path, part: int, config: ShardConfig) -> None:
        self.folder, self.part, self.config = Path(folder), part, config
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(f"part-{part:05d}[-.]*"):
            path.unlink()
        self._pending: list[pa.RecordBatch] = []
        self._num_pending = 0
        self._file: _ArrowFile | _TarFile | None = None
        self._shards: list[ShardInfo] = []
        self._index: list[pa.RecordBatch] = []
        self._stats: list[np.ndarray] = []
        self._num_rows = self._num_targets = self._num_tokens = 0
        self._times: list[int] = []
        self._content = xxhash.xxh3_128()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type | None, error: object, trace: object) -> None:
        if kind is None:
            self.close()

    def write(self, batch: pa.RecordBatch | pa.Table) -> None:
        """Append journeys of JOURNEY_SCHEMA (any number of rows; 64-bit list and string offsets are cast).

        Raises: DataError when a column is missing, has nulls, or the per-token lists of a row differ in length.
        """
        batch = _as_journeys(batch, f"part {self.part}")
        if batch.num_rows == 0:
            return
        self._pending.append(batch)
        self._num_pending += batch.num_rows
        size = self.config.rows_per_batch
        if self._num_pending < size:
            return
        rows = pa.concat_batches(self._pending)
        whole = rows.num_rows - rows.num_rows % size
        for start in range(0, whole, size):
            self._write_batch(rows.slice(start, size))
        self._pending = [rows.slice(whole)]
        self._num_pending = rows.num_rows - whole

    def close(self) -> None:
        """Finish the last file and commit the part: its index and row statistics, then the sidecar `part-00003.json`."""
        if self._num_pending:
            self._write_batch(pa.concat_batches(self._pending))
        self._pending, self._num_pending = [], 0
        self._finish_file()
        stem = self.folder / f"part-{self.part:05d}"
        write_atomic(stem.with_suffix(".index.arrow"), table_bytes(pa.Table.from_batches(self._index, INDEX_SCHEMA)))
        stats = np.concatenate(self._stats) if self._stats else np.zeros((0, len(ROW_STATS)), np.int32)
        write_atomic(stem.with_suffix(".rows.npy"), npy_header(len(stats)) + stats.tobytes())
        sidecar = {"container": self.config.container, "compression": self.config.compression,
                   "shards": [shard.model_dump() for shard in self._shards], "num_rows": self._num_rows, "num_tokens": self._num_tokens,
                   "num_targets": self._num_targets, "num_batches": sum(batch.num_rows for batch in self._index),
                   "first_timestamp": min(self._times, default=None), "last_timestamp": max(self._times, default=None),
                   "content_checksum": self._content.hexdigest()}
        write_atomic(stem.with_suffix(".json"), json.dumps(sidecar).encode())

    def _write_batch(self, batch: pa.RecordBatch) -> None:
        # The IPC writer cuts a slice's buffers to 64 bytes only, so that neighbours of the slice would end up in the file; copy it.
        batch = batch.take(pa.array(np.arange(batch.num_rows)))
        if self._file is None:
            name = f"part-{self.part:05d}-{len(self._shards):04d}{SUFFIX[self.config.container]}"
            self._file = new_shard(self.folder / name, self.config.container, self.config.compression)
        self._file.write(batch)
        self._content.update(batch.drop_columns(["user_id"]).serialize())  # no part of what a model learns: another salt, the same data
        stats = row_stats(batch)
        self._stats.append(stats)
        self._num_tokens += int(stats[:, 0].sum(dtype=np.int64))
        self._num_targets += int(stats[:, 1].sum(dtype=np.int64))
        span = pc.min_max(batch.column("timestamp").flatten())
        self._times += [time.as_py() for time in span.values() if time.is_valid]
        if len(self._times) > 1024:
            self._times = [min(self._times), max(self._times)]
        if self._file.num_rows >= self.config.rows_per_shard:
            self._finish_file()

    def _finish_file(self) -> None:
        if self._file is None:
            return
        ranges = self._file.close()
        shard = ShardInfo(name=self._file.path.name, num_bytes=self._file.path.stat().st_size, num_rows=self._file.num_rows)
        offset, num_bytes, checksum, num_rows = zip(*ranges, strict=True)
        first_row = np.cumsum(num_rows) - num_rows + self._num_rows
        columns = [[len(self._shards)] * len(ranges), offset, num_bytes, checksum, first_row, num_rows]
        # typed from Python integers: numpy would make float64 of checksums on both sides of 2^63
        self._index.append(pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, INDEX_SCHEMA, strict=True)], INDEX_SCHEMA))
        self._shards.append(shard)
        self._num_rows += shard.num_rows
        self._file = None


def finished_parts(folder: str | Path) -> set[int]:
    """Parts whose sidecar exists: a restarted build skips them."""
    return {int(path.stem.removeprefix("part-")) for path in Path(folder).glob("part-*.json")}


def write_manifest(folder: str | Path, split: str, user_features: Sequence[str], env_features: Sequence[str], catalogue_fingerprint: str,
                   num_items: int) -> ShardManifest:
    """Merge the parts' sidecars, in part order, into index.arrow, rows.npy and, last, manifest.json; then remove the sidecars.

    A split without rows is legal. Memory: the index and row statistics of one part at a time.
    Raises: DataError when the parts were written with different container or compression settings.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = sorted(folder.glob("part-*.json"), key=lambda path: int(path.stem.removeprefix("part-")))
    if not paths and (folder / "manifest.json").exists():
        return ShardManifest.parse((folder / "manifest.json").read_bytes(), str(folder / "manifest.json"))
    parts = [json.loads(path.read_bytes()) for path in paths]
    layouts = {(part["container"], part["compression"]) for part in parts} or {("arrow", "none")}
    if len(layouts) > 1:
        raise DataError(f"{folder}: parts were written with different settings {sorted(layouts)}; remove the folder and build again")
    container, compression = layouts.pop()
    num_rows = sum(part["num_rows"] for part in parts)
    _merge_indexes(folder, paths, parts)
    _merge_row_stats(folder, paths, num_rows)
    first = [part["first_timestamp"] for part in parts if part["first_timestamp"] is not None]
    last = [part["last_timestamp"] for part in parts if part["last_timestamp"] is not None]
    manifest = ShardManifest(
        container=container, compression=compression, split=split, num_rows=num_rows,
        shards=tuple(ShardInfo(**shard) for part in parts for shard in part["shards"]),
        num_tokens=sum(part["num_tokens"] for part in parts), num_targets=sum(part["num_targets"] for part in parts),
        num_batches=sum(part["num_batches"] for part in parts), first_timestamp=min(first, default=0), last_timestamp=max(last, default=0),
        user_features=tuple(user_features), env_features=tuple(env_features), catalogue_fingerprint=catalogue_fingerprint,
        num_items=num_items, content_checksum=xxhash.xxh3_128_hexdigest("".join(part["content_checksum"] for part in parts).encode()),
        index_checksum=sha256_of(folder / "index.arrow", folder / "rows.npy"))
    manifest.save(folder)
    for path in paths:
        for sidecar in (path, path.with_suffix(".index.arrow"), path.with_suffix(".rows.npy")):
            sidecar.unlink(missing_ok=True)
    return manifest


def iter_record_batches(folder: Path, seed: int | None = None, hint: str = "") -> Iterator[pa.RecordBatch]:
    """Every record batch of a local split folder of either container, in file order or, with a seed, in a random one.

    Args: hint: what else a user can do when there are no shards, for the message.
    Raises: DataError when the folder cannot be read or a batch is damaged.
    """
    split = LocalSplit.open(folder, hint)
    for number in range(split.num_batches) if seed is None else np.random.default_rng(seed).permutation(split.num_batches):
        yield split.batch(number)


@dataclass(frozen=True)
class LocalSplit:
    """A local split folder of either container, every file of it mapped."""

    folder: Path
    manifest: ShardManifest
    index: dict[str, np.ndarray]  # columns of INDEX_SCHEMA
    files: list[pa.Buffer]  # of every shard

    @classmethod
    def open(cls, folder: Path, hint: str = "") -> "LocalSplit":
        """Raises: DataError when it cannot be read."""
        try:
            manifest = ShardManifest.parse((folder / "manifest.json").read_bytes(), str(folder / "manifest.json"))
            index = pa.ipc.open_file(inside(folder, manifest.index_file, folder / "manifest.json", DataError)).read_all()
            paths = [inside(folder, shard.name, folder / "manifest.json", DataError) for shard in manifest.shards]
            files = [pa.memory_map(str(path)).read_buffer() for path in paths]
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"shards {folder} cannot be read ({error}); run launch/build_data.py first{hint}") from None
        return cls(folder, manifest, {name: index[name].to_numpy() for name in INDEX_SCHEMA.names}, files)

    @property
    def num_batches(self) -> int:
        return len(self.index["shard"])

    def batch(self, number: int) -> pa.RecordBatch:
        """Raises: DataError when it is damaged."""
        shard, offset, num_bytes, checksum = (int(self.index[name][number]) for name in ("shard", "offset", "num_bytes", "checksum"))
        content = memoryview(self.files[shard])[offset:offset + num_bytes]
        if xxhash.xxh3_64_intdigest(content) != checksum:
            name = self.manifest.shards[shard].name
            raise DataError(f"{self.folder / name}: record batch at byte {offset} is damaged; rebuild the shards")
        if self.manifest.container == "arrow":
            return pa.ipc.read_record_batch(pa.ipc.read_message(content), JOURNEY_SCHEMA)
        return pa.ipc.open_stream(content).read_next_batch()


def row_stats(batch: pa.RecordBatch) -> np.ndarray:
    """ROW_STATS of each journey, int32 [rows, 2]: tokens fed to the model, and head-0 targets.

    A target is an ad of the target region whose request has a prediction site; a request whose first ad is the row's first token
    has none.
    """
    token_type, block = batch.column("token_type"), batch.column("block")
    length = np.diff(np.asarray(token_type.offsets))
    context, lookahead = np.asarray(batch.column("num_context")), np.asarray(batch.column("num_lookahead"))
    type_T, block_T = np.asarray(token_type.flatten()), np.asarray(block.flatten())
    start = np.cumsum(length) - length
    row_T = np.repeat(np.arange(len(length)), length)
    position_T = np.arange(len(type_T)) - start[row_T]
    is_ad_T = type_T == TokenType.I
    target_T = is_ad_T & (position_T >= context[row_T]) & (position_T < (length - lookahead)[row_T])
    if len(type_T):
        first_T = np.minimum(start, len(type_T) - 1)[row_T]
        target_T &= ~(is_ad_T[first_T] & (block_T == block_T[first_T]))
    num_targets = np.bincount(row_T, weights=target_T, minlength=len(length))
    return np.stack([length - lookahead, num_targets], axis=1).astype(np.int32)


def new_shard(path: Path, container: str, compression: str) -> "_ArrowFile | _TarFile":
    """A shard file to write record batches to; it appears under its name when it is closed."""
    return (_ArrowFile if container == "arrow" else _TarFile)(path, compression)


class _ArrowFile:
    """An ordinary Arrow IPC file; a batch's bytes are its encapsulated IPC message."""

    def __init__(self, path: Path, compression: str) -> None:
        self.path, self.num_rows = path, 0
        self._temporary = path.with_name(path.name + ".tmp")
        self._sink = pa.OSFile(str(self._temporary), "wb")
        self._writer = pa.ipc.new_file(self._sink, JOURNEY_SCHEMA, options=_write_options(compression))
        self._ends = [_ARROW_MAGIC_BYTES + JOURNEY_SCHEMA.serialize().size]
        self._rows: list[int] = []

    def write(self, batch: pa.RecordBatch) -> None:
        self._writer.write_batch(batch)
        self._ends.append(self._sink.tell())
        self._rows.append(batch.num_rows)
        self.num_rows += batch.num_rows

    def close(self) -> list[tuple[int, int, int, int]]:
        """Finish the file; returns (offset, num_bytes, checksum, num_rows) of every batch."""
        self._writer.close()
        self._sink.close()
        with pa.memory_map(str(self._temporary)) as file:
            content = file.read_buffer()
            pieces = [content.slice(start, end - start) for start, end in zip(self._ends, self._ends[1:], strict=False)]
            assert pa.ipc.read_message(pieces[0]).type == "record batch", f"{self.path}: batch bytes do not start at {self._ends[0]}"
            checksums = [xxhash.xxh3_64_intdigest(piece) for piece in pieces]
            del content, pieces
        _commit(self._temporary, self.path)
        return list(zip(self._ends, np.diff(self._ends).tolist(), checksums, self._rows, strict=False))


class _TarFile:
    """An ordinary tar; member `000000.arrow` is a complete Arrow IPC stream of one record batch, and the batch's bytes."""

    def __init__(self, path: Path, compression: str) -> None:
        self.path, self.num_rows = path, 0
        self._temporary = path.with_name(path.name + ".tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115  closed in close()
        self._tar = TarWriter(self._file, encoder=False, mtime=0)  # a fixed time: same rows, same bytes
        self._options = _write_options(compression)
        self._ranges: list[tuple[int, int, int, int]] = []

    def write(self, batch: pa.RecordBatch) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, JOURNEY_SCHEMA, options=self._options) as writer:
            writer.write_batch(batch)
        content = memoryview(sink.getvalue())
        offset = self._tar.tarstream.offset + _TAR_HEADER_BYTES
        self._tar.write({"__key__": f"{len(self._ranges):06d}", "arrow": content})
        self._ranges.append((offset, len(content), xxhash.xxh3_64_intdigest(content), batch.num_rows))
        self.num_rows += batch.num_rows

    def close(self) -> list[tuple[int, int, int, int]]:
        self._tar.close()
        self._file.close()
        _commit(self._temporary, self.path)
        return self._ranges


def _as_journeys(batch: pa.RecordBatch | pa.Table, where: str) -> pa.RecordBatch:
    table = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
    missing = [name for name in JOURNEY_SCHEMA.names if name not in table.column_names]
    if missing:
        raise DataError(f"{where}: journeys have no column {', '.join(missing)}; expected the columns of JOURNEY_SCHEMA")
    try:
        table = table.select(JOURNEY_SCHEMA.names).cast(JOURNEY_SCHEMA).combine_chunks()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{where}: journeys do not fit JOURNEY_SCHEMA: {error}") from None
    if table.num_rows == 0:
        return pa.RecordBatch.from_pylist([], JOURNEY_SCHEMA)
    rows = table.to_batches()[0]
    for field, column in zip(JOURNEY_SCHEMA, rows.columns, strict=True):
        if column.null_count or (pa.types.is_list(field.type) and column.flatten().null_count):
            raise DataError(f"{where}: journey column {field.name} has nulls; write NaN, NO_ITEM or 0 for unknown")
    lengths = np.diff(np.asarray(rows.column("token_type").offsets))
    for name in PER_TOKEN[1:]:
        different = np.flatnonzero(np.diff(np.asarray(rows.column(name).offsets)) != lengths)
        if len(different):
            raise DataError(f"{where} row {different[0]}: {name} and token_type differ in length; every token needs one entry in each list")
    if np.any(np.asarray(rows.column("num_context")) + np.asarray(rows.column("num_lookahead")) > lengths):
        raise DataError(f"{where}: a journey has num_context + num_lookahead > its number of tokens")
    return rows


def _merge_indexes(folder: Path, paths: list[Path], parts: list[dict]) -> None:
    num_shards = num_rows = 0
    temporary = folder / "index.arrow.tmp"
    with pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, INDEX_SCHEMA) as writer:
        for path, part in zip(paths, parts, strict=True):
            with pa.ipc.open_file(str(path.with_suffix(".index.arrow"))) as reader:
                index = reader.read_all()
            for name, shift in (("shard", num_shards), ("first_row", num_rows)):
                position = INDEX_SCHEMA.get_field_index(name)
                column = pc.add(index.column(name), pa.scalar(shift, INDEX_SCHEMA.field(name).type))
                index = index.set_column(position, INDEX_SCHEMA.field(name), column)
            writer.write_table(index)
            num_shards += len(part["shards"])
            num_rows += part["num_rows"]
    _commit(temporary, folder / "index.arrow")


def _merge_row_stats(folder: Path, paths: list[Path], num_rows: int) -> None:
    temporary = folder / "rows.npy.tmp"
    with open(temporary, "wb") as file:
        file.write(npy_header(num_rows))
        for path in paths:
            file.write(np.load(path.with_suffix(".rows.npy"), allow_pickle=False).tobytes())
    _commit(temporary, folder / "rows.npy")


def npy_header(num_rows: int) -> bytes:
    """Of a file of ROW_STATS; the rows follow."""
    empty = np.lib.format.header_data_from_array_1_0(np.zeros((0, len(ROW_STATS)), np.int32))
    sink = pa.BufferOutputStream()
    np.lib.format.write_array_header_1_0(sink, empty | {"shape": (num_rows, len(ROW_STATS))})
    return sink.getvalue().to_pybytes()


def table_bytes(table: pa.Table) -> bytes:
    """As an Arrow IPC file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _write_options(compression: str) -> pa.ipc.IpcWriteOptions:
    return pa.ipc.IpcWriteOptions(compression=None if compression == "none" else compression)


def _commit(temporary: Path, path: Path) -> None:
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def sha256_of(*paths: Path) -> str:
    """Of the bytes of these files, one after another."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
