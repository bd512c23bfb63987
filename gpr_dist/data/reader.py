"""Reads record batches of a split folder by number, from a local path or any URI that pyarrow.fs opens (s3://, gs://, hdfs://).

Owns verification: manifest, index, file sizes when a folder is opened, and the checksum of each record batch at its first read. What
is read when is decided by `loader.py`.
"""

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import webdataset
import xxhash
from pyarrow import fs

from gpr_dist.errors import DataError
from gpr_dist.schema import INDEX_SCHEMA, JOURNEY_SCHEMA, ROW_STATS, ShardManifest

log = logging.getLogger(__name__)
_REBUILD = "rebuild it with launch/build_data.py"


class ShardReader:
    """One split folder, opened and checked. `read_batch` may be called from several threads.

    Memory: the index (36 bytes per record batch). Row statistics are memory-mapped; of a remote folder they are first copied to
    `cache_dir`, once per machine. Local shards are memory-mapped, so an uncompressed record batch is read without a copy.
    """

    def __init__(self, folder: str | Path, verify: Literal["first_read", "never"] = "first_read",
                 on_corrupt: Literal["stop", "skip"] = "stop", cache_dir: str | Path | None = None) -> None:
        """Raises: DataError when there is no manifest, the index is altered, or (on_corrupt = stop) a shard is missing or cut short."""
        self.folder, self.verify, self.on_corrupt = str(folder), verify, on_corrupt
        self._files, self._root = _open_filesystem(self.folder)
        self.is_local = isinstance(self._files, fs.LocalFileSystem)
        self.manifest = self._read_manifest()
        index, rows = self._local_sidecars(Path(cache_dir or Path(tempfile.gettempdir()) / f"gpr-dist-{os.getuid()}"))
        self.first_row, self.num_rows = index["first_row"], index["num_rows"]
        self.num_tokens, self.num_targets = rows[:, 0], rows[:, 1]
        self._index = index
        self._unverified = np.full(self.num_batches, verify != "never")
        self._opened: dict[int, pa.Buffer | pa.NativeFile] = {}
        self._lock = threading.Lock()
        self.num_batches_read = self.num_skipped_batches = self.num_skipped_rows = 0
        self._check_shards()

    @property
    def num_batches(self) -> int:
        return len(self.first_row)

    def read_batch(self, number: int) -> pa.RecordBatch:
        """Record batch `number`. Raises: DataError naming file, batch, and expected and found checksum."""
        index = self._index
        shard, offset, num_bytes = int(index["shard"][number]), int(index["offset"][number]), int(index["num_bytes"][number])
        try:
            content = self._read_bytes(shard, offset, num_bytes)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self._where(number)} cannot be read ({error}); {_REBUILD}") from None
        if content.size != num_bytes:
            raise DataError(f"{self._where(number)}: the file ends {num_bytes - content.size} bytes early; {_REBUILD}")
        if self._unverified[number]:
            found = xxhash.xxh3_64_intdigest(content)
            expected = int(index["checksum"][number])
            if found != expected:
                raise DataError(f"{self._where(number)} is damaged: checksum {found:016x}, expected {expected:016x}; {_REBUILD}")
            self._unverified[number] = False
        try:
            if self.manifest.container == "arrow":
                message = content
            else:
                messages = pa.ipc.MessageReader.open_stream(content)
                messages.read_next_message()  # the schema is the same in every member; to decode it costs more than the batch
                message = messages.read_next_message()
            batch = pa.ipc.read_record_batch(message, JOURNEY_SCHEMA)
        except (pa.ArrowException, OSError, StopIteration) as error:
            raise DataError(f"{self._where(number)} is not a record batch of journeys ({error}); {_REBUILD}") from None
        if batch.num_rows != index["num_rows"][number]:
            raise DataError(f"{self._where(number)} has {batch.num_rows} rows, the index says {index['num_rows'][number]}; {_REBUILD}")
        with self._lock:
            self.num_batches_read += 1
        return batch

    def read_batch_or_skip(self, number: int) -> pa.RecordBatch | None:
        """As `read_batch`; with on_corrupt = skip a damaged one is logged, counted and None."""
        try:
            return self.read_batch(number)
        except DataError as error:
            if self.on_corrupt == "stop":
                raise
            with self._lock:
                self.num_skipped_batches += 1
                self.num_skipped_rows += int(self.num_rows[number])
            log.warning("skipped %d journeys: %s", self.num_rows[number], error)
            return None

    def forget_verified(self) -> None:
        """Compare every checksum again at its next read, e.g. after the storage was repaired."""
        self._unverified[:] = self.verify != "never"

    def locate(self, row: int) -> str:
        """File, batch and row in it of a global row number, for messages."""
        number = int(np.searchsorted(self.first_row, row, side="right")) - 1
        return f"{self._where(number)} row {row - int(self.first_row[number])}"

    def _where(self, number: int) -> str:
        shard = int(self._index["shard"][number])
        return f"{self._path(shard)} batch {number - int(np.searchsorted(self._index['shard'], shard))}"

    def _path(self, shard: int) -> str:
        return f"{self.folder.rstrip('/')}/{self.manifest.shards[shard].name}"

    def _read_manifest(self) -> ShardManifest:
        where = f"{self.folder.rstrip('/')}/manifest.json"
        try:
            with self._files.open_input_stream(f"{self._root}/manifest.json") as file:
                return ShardManifest.parse(file.read(), where)
        except FileNotFoundError:
            raise DataError(f"{where} does not exist: no data set there, or its build was interrupted; run launch/build_data.py") from None
        except OSError as error:
            raise DataError(f"{where} cannot be read: {error}") from None

    def _local_sidecars(self, cache: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The index as arrays and the memory-mapped row statistics, both checked against the manifest."""
        paths = [Path(self._root) / "index.arrow", Path(self._root) / "rows.npy"]
        try:
            if not self.is_local:
                local = [cache / f"{self.manifest.index_checksum}-{path.name}" for path in paths]
                paths = [_copy_once(self._files, f"{self._root}/{path.name}", copy) for path, copy in zip(paths, local, strict=True)]
            if self.verify != "never" and _sha256(paths) != self.manifest.index_checksum:
                raise DataError(f"{self.folder}: index.arrow or rows.npy was altered after the manifest was written; {_REBUILD}")
            with pa.memory_map(str(paths[0])) as file:
                table = pa.ipc.open_file(file).read_all()
            rows = np.load(paths[1], mmap_mode="r") if self.manifest.num_rows else np.zeros((0, len(ROW_STATS)), np.int32)
        except (OSError, ValueError, pa.ArrowException) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.folder}: index.arrow and rows.npy cannot be read ({error}); {_REBUILD}") from None
        if table.schema != INDEX_SCHEMA or table.num_rows != self.manifest.num_batches or len(rows) != self.manifest.num_rows:
            raise DataError(f"{self.folder}: index.arrow or rows.npy does not fit the manifest; {_REBUILD}")
        return {name: table.column(name).to_numpy() for name in table.column_names}, rows

    def _check_shards(self) -> None:
        """Existence and size of every shard, from one listing of the folder."""
        found = {info.base_name: info.size for info in self._files.get_file_info(fs.FileSelector(self._root))}
        for shard in self.manifest.shards:
            where = f"{self.folder.rstrip('/')}/{shard.name}"
            if shard.name not in found:
                problem = f"{where} is missing"
            elif found[shard.name] != shard.num_bytes:
                problem = f"{where} has {found[shard.name]} bytes, the manifest says {shard.num_bytes}"
            else:
                continue
            if self.on_corrupt == "stop":
                raise DataError(f"{problem}; {_REBUILD}")
            log.warning("%s; its journeys will be skipped as far as they cannot be read", problem)

    def _read_bytes(self, shard: int, offset: int, num_bytes: int) -> pa.Buffer:
        with self._lock:
            if shard not in self._opened:
                path = f"{self._root}/{self.manifest.shards[shard].name}"
                if self.is_local:
                    with pa.memory_map(path) as file:
                        self._opened[shard] = file.read_buffer()  # no copy; the mapping lives as long as the buffer
                else:
                    self._opened[shard] = self._files.open_input_file(path)
            opened = self._opened[shard]
        if isinstance(opened, pa.Buffer):
            return opened.slice(min(offset, opened.size), num_bytes)
        return pa.py_buffer(opened.read_at(num_bytes, offset))


def iter_batches(url: str) -> Iterator[pa.RecordBatch]:
    """Record batches of one shard tar, in file order, through webdataset's opener: `pipe:aws s3 cp ... -`, `https:`, `file:` or a path.

    Sequential and unverified (the stream has no index): for evaluation and export jobs elsewhere, not for training.
    Raises: DataError naming the member that is no record batch.
    """
    stages = webdataset.DataPipeline(webdataset.SimpleShardList([url]), webdataset.tarfile_samples)
    for sample in stages:
        if "arrow" not in sample:
            raise DataError(f"{url}: member {sample['__key__']} has no .arrow file; expected a tar written by ShardWriter")
        try:
            yield from pa.ipc.open_stream(sample["arrow"])
        except pa.ArrowException as error:
            raise DataError(f"{url}: member {sample['__key__']}.arrow is damaged ({error})") from None


def _open_filesystem(folder: str) -> tuple[fs.FileSystem, str]:
    if "://" not in folder:
        return fs.LocalFileSystem(), os.path.abspath(folder)
    try:
        files, path = fs.FileSystem.from_uri(folder)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"cannot open {folder}: {error}") from None
    return files, path.rstrip("/")


def _copy_once(files: fs.FileSystem, source: str, target: Path) -> Path:
    """Copy a remote file beside its final name and rename: processes of one machine may race, the content is the same."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        fs.copy_files(source, str(temporary), source_filesystem=files, destination_filesystem=fs.LocalFileSystem())
        os.replace(temporary, target)
    return target


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
