"""Reads record batches of a split folder by number, from a local path or any URI that pyarrow.fs opens (s3://, gs://, hdfs://).

Owns verification: manifest, index, file sizes when a folder is opened, and the checksum of each record batch at its first read. What
is read when is decided by `loader.py`; how remote files are reached, and how often they are asked, by `storage.py`.
"""

import hashlib
import logging
import os
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import webdataset
import xxhash

from gpr_dist.data.storage import Storage, StorageConfig, StorageError, shown
from gpr_dist.errors import DataError
from gpr_dist.safety import check_name, inside
from gpr_dist.schema import INDEX_SCHEMA, JOURNEY_SCHEMA, ROW_STATS, ShardManifest

log = logging.getLogger(__name__)
_REBUILD = "rebuild it with launch/build_data.py"


class ShardReader:
    """One split folder, opened and checked. `read_batch` may be called from several threads.

    Memory: the index (36 bytes per record batch). Row statistics are memory-mapped; of a remote folder they are first copied to
    `cache_dir`, once per machine. Local shards are memory-mapped, so an uncompressed record batch is read without a copy.
    """

    def __init__(self, folder: str | Path, verify: Literal["first_read", "never"] = "first_read",
                 on_corrupt: Literal["stop", "skip"] = "stop", cache_dir: str | Path | None = None,
                 storage: StorageConfig | None = None) -> None:
        """Raises: DataError when there is no manifest, the index is altered, or (on_corrupt = stop) a shard is missing or cut short;
        StorageError when a remote storage refuses, or fails for longer than `storage` allows."""
        self.storage = Storage(folder, storage)
        self.folder, self.verify, self.on_corrupt, self.is_local = self.storage.name, verify, on_corrupt, self.storage.is_local
        self.manifest = self._read_manifest()
        index, rows = self._local_sidecars(Path(cache_dir or Path(tempfile.gettempdir()) / f"gpr-dist-{os.getuid()}"))
        self.first_row, self.num_rows = index["first_row"], index["num_rows"]
        self.num_tokens, self.num_targets = rows[:, 0], rows[:, 1]
        self._index = index
        self._unverified = np.full(self.num_batches, verify != "never")
        self._mapped: dict[int, pa.Buffer] = {}
        self._lock = threading.Lock()
        self.num_batches_read = self.num_reread_batches = self.num_skipped_batches = self.num_skipped_rows = 0
        self._check_shards()

    @property
    def num_batches(self) -> int:
        return len(self.first_row)

    def read_batch(self, number: int) -> pa.RecordBatch:
        """Record batch `number`. Raises: DataError naming file, batch, and expected and found checksum; StorageError of the storage."""
        content, problem = self._read_checked(number)
        if problem and not self.is_local:  # the object may be whole, and what arrived cut or garbled
            log.warning("%s: %s; read once more", self._where(number), problem)
            with self._lock:
                self.num_reread_batches += 1
            content, problem = self._read_checked(number)
        if problem:
            raise DataError(f"{self._where(number)} {problem}; {_REBUILD}")
        try:
            if self.manifest.container == "arrow":
                message = content
            else:
                messages = pa.ipc.MessageReader.open_stream(content)
                messages.read_next_message()  # the schema is the same in every member; to decode it costs more than the batch
                message = messages.read_next_message()
            batch = pa.ipc.read_record_batch(message, JOURNEY_SCHEMA)
        except (pa.ArrowException, OSError, EOFError, StopIteration) as error:
            raise DataError(f"{self._where(number)} is not a record batch of journeys ({error}); {_REBUILD}") from None
        if batch.num_rows != self.num_rows[number]:
            raise DataError(f"{self._where(number)} has {batch.num_rows} rows, the index says {self.num_rows[number]}; {_REBUILD}")
        with self._lock:
            self.num_batches_read += 1
        return batch

    def read_batch_or_skip(self, number: int) -> pa.RecordBatch | None:
        """As `read_batch`; with on_corrupt = skip a damaged one is logged, counted and None; a storage that fails is no damage."""
        try:
            return self.read_batch(number)
        except StorageError:
            raise
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
        return f"{self.folder}/{self.manifest.shards[shard].name}"

    def _read_manifest(self) -> ShardManifest:
        where = f"{self.folder}/manifest.json"
        try:
            content = self.storage.read_all("manifest.json")
            with suppress(DataError):
                return ShardManifest.parse(content, where)
            return ShardManifest.parse(content if self.is_local else self.storage.read_all("manifest.json"), where)  # it may have been cut
        except FileNotFoundError:
            raise DataError(f"{where} does not exist: no data set there, or its build was interrupted; run launch/build_data.py") from None
        except OSError as error:
            raise DataError(f"{where} cannot be read: {error}") from None

    def _local_sidecars(self, cache: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The index as arrays and the memory-mapped row statistics, both checked against the manifest."""
        try:
            paths = self._sidecar_paths(cache)
            if not self._unaltered(paths):
                for path in () if self.is_local else paths:  # what arrived was cut or garbled, or what lay in the cache
                    path.unlink(missing_ok=True)
                paths = self._sidecar_paths(cache)
                if self.is_local or not self._unaltered(paths):
                    raise DataError(f"{self.folder}: index.arrow or rows.npy was altered after the manifest was written; {_REBUILD}")
            with pa.memory_map(str(paths[0])) as file:
                table = pa.ipc.open_file(file).read_all()
            rows = np.zeros((0, len(ROW_STATS)), np.int32)
            if self.manifest.num_rows:
                rows = np.load(paths[1], mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, pa.ArrowException) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.folder}: index.arrow and rows.npy cannot be read ({error}); {_REBUILD}") from None
        if table.schema != INDEX_SCHEMA or table.num_rows != self.manifest.num_batches or len(rows) != self.manifest.num_rows:
            raise DataError(f"{self.folder}: index.arrow or rows.npy does not fit the manifest; {_REBUILD}")
        return {name: table.column(name).to_numpy() for name in table.column_names}, rows

    def _sidecar_paths(self, cache: Path) -> list[Path]:
        names = (self.manifest.index_file, self.manifest.rows_file)
        if self.is_local:
            return [inside(self.storage.root, name, f"{self.folder}/manifest.json", DataError) for name in names]
        return [self.storage.copy(name, cache / f"{self.manifest.index_checksum}-{name}") for name in names]

    def _unaltered(self, paths: list[Path]) -> bool:
        return self.verify == "never" or _sha256(paths) == self.manifest.index_checksum

    def _check_shards(self) -> None:
        """Existence and size of every shard, from one listing of the folder."""
        found = self.storage.sizes()
        for shard in self.manifest.shards:
            where = f"{self.folder}/{shard.name}"
            if shard.name not in found:
                problem = f"{where} is missing"
            elif found[shard.name] != shard.num_bytes:
                problem = f"{where} has {found[shard.name]} bytes, the manifest says {shard.num_bytes}"
            else:
                continue
            if self.on_corrupt == "stop":
                raise DataError(f"{problem}; {_REBUILD}")
            log.warning("%s; its journeys will be skipped as far as they cannot be read", problem)

    def _read_checked(self, number: int) -> tuple[pa.Buffer, str | None]:
        """The bytes of a record batch and what is wrong with them. Remote ones are compared at every read: each is another transfer."""
        shard, offset, num_bytes, expected = (int(self._index[name][number]) for name in ("shard", "offset", "num_bytes", "checksum"))
        try:
            content = self._read_bytes(number, shard, offset, num_bytes)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self._where(number)} cannot be read ({error}); {_REBUILD}") from None
        if content.size != num_bytes:
            return content, f"ends {num_bytes - content.size} bytes early"
        if self._unverified[number]:
            found = xxhash.xxh3_64_intdigest(content)
            if found != expected:
                return content, f"is damaged: checksum {found:016x}, expected {expected:016x}"
            self._unverified[number] = not self.is_local
        return content, None

    def _read_bytes(self, number: int, shard: int, offset: int, num_bytes: int) -> pa.Buffer:
        name = self.manifest.shards[shard].name
        if not self.is_local:
            return self.storage.read_range(name, offset, num_bytes, self._where(number))
        with self._lock:
            if shard not in self._mapped:
                with pa.memory_map(str(inside(self.storage.root, name, f"{self.folder}/manifest.json", DataError))) as file:
                    self._mapped[shard] = file.read_buffer()  # no copy; the mapping lives as long as the buffer
            mapped = self._mapped[shard]
        return mapped.slice(min(offset, mapped.size), num_bytes)


def iter_batches(url: str) -> Iterator[pa.RecordBatch]:
    """Record batches of one shard tar, in file order, through webdataset's opener: `pipe:aws s3 cp ... -`, `https:`, `file:` or a path.

    Sequential and unverified (the stream has no index), and read once: curl (`https:`) repeats a connection that fails, nothing repeats
    one that is cut. For evaluation and export jobs elsewhere, not for training.
    Raises: DataError when the stream breaks off, or naming the member that is no record batch.
    """
    stages, where = webdataset.DataPipeline(webdataset.SimpleShardList([url]), webdataset.tarfile_samples), shown(url)
    try:
        for sample in stages:
            check_name(sample["__key__"], where, DataError)  # members are never written, but a tar with such names is not one of ours
            if "arrow" not in sample:
                raise DataError(f"{where}: member {sample['__key__']} has no .arrow file; expected a tar written by ShardWriter")
            try:
                yield from pa.ipc.open_stream(sample["arrow"])
            except pa.ArrowException as error:
                raise DataError(f"{where}: member {sample['__key__']}.arrow is damaged ({error})") from None
    except (tarfile.TarError, OSError) as error:
        problem = str(error.args[0] if error.args else error).splitlines()[0]
        raise DataError(f"{where} broke off before its end ({problem}); read it again, or open its folder with ShardReader") from None


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()
