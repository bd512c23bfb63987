"""Erase users from a finished data set: their rows from the shards, their texts and vectors from external knowledge, their history.

Only files that hold them are written again, under new names; what is there changes at the moment a manifest does, split by split, and
an interrupted run is finished by another. Rows after an erased one move up, so that every row number stays the place in the split; with
the rows the data's fingerprint changes, and jobs that were trained on the old rows refuse these. Aggregates that were made of many users
(catalogue, names of frequent values, tokenizers, encoders, models) stay, and so do the logs: take the users out of them too.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import Field, model_validator
from tqdm import tqdm

from data_pipeline.history import build_history, is_history_of
from data_pipeline.journeys import SPLITS
from data_pipeline.knowledge import TEXTS, save_array
from data_pipeline.shards import LocalSplit, new_shard, npy_header, sha256_of, table_bytes
from data_pipeline.users import open_users
from gpr_dist.config import Config
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.hashing import bucket_of, hash_strings
from gpr_dist.schema import INDEX_SCHEMA, KnowledgeManifest, KnowledgeRows, ShardInfo, ShardManifest, write_atomic

_CHUNK_ROWS = 1 << 20
_SHARD_NAME = re.compile(r"(part-(\d+)-\d+)(?:-[0-9a-f]{8})?(\.\w+)")


class EraseConfig(Config):
    """Whom to erase from what."""

    data: Path
    """data folder, made by launch/build_data.py"""
    users: tuple[str, ...] = ()
    """ids as in the logs, quoted: 'users=["17", "u-23"]'"""
    users_file: Path | None = None
    """or a file of them, one a line"""
    salt: Path | None = None
    """file with the salt of the data's user ids; none = environment variable GPR_USER_SALT, else <data>/user_salt"""
    knowledge: tuple[Path, ...] = Field(default=())
    """folders of external knowledge made for this data elsewhere; those below `data` are found"""

    @model_validator(mode="before")
    @classmethod
    def _check(cls, values: dict) -> dict:
        if any(not isinstance(user, str) for user in values.get("users", ())):
            raise ValueError("users are text, and 017 is not 17: quote every id, 'users=[\"17\"]', or give users_file")
        return values


@dataclass
class Erased:
    """What goes from one split."""

    old: LocalSplit
    rows: np.ndarray  # int64, ascending
    num_tokens: int
    users: set[str] = field(repr=False)  # stored ids that were found
    new: ShardManifest | None = None


def erase_users(config: EraseConfig, dry_run: bool = False) -> list[Erased]:
    """Erase them everywhere in the data folder. Returns: what went, or would go, per split; nothing where they are not.

    Raises: ConfigError without users or with another salt, DataError for data that are damaged or not built to the end.
    """
    data, raw = config.data, _raw_ids(config)
    if (data / ".build").exists():
        raise DataError(f"{data / '.build'} is an unfinished build; finish it with launch/build_data.py first, or remove the folder")
    folders = [data / "shards" / split for split in SPLITS if (data / "shards" / split / "manifest.json").exists()]
    if not folders:
        raise DataError(f"no shards in {data / 'shards'}; correct data")
    stored, parts = open_users(data, config.salt).stored(raw), _parts_of(data, raw)
    splits = [_find(LocalSplit.open(folder), stored, parts) for folder in folders]
    if dry_run:
        return splits
    for split in splits:
        if len(split.rows):
            split.new = _rewrite(split, stored)
    for folder in {*(path.parent for path in data.rglob("knowledge.json")), *config.knowledge}:
        _erase_knowledge(folder, stored, [split for split in splits if split.new])
    for split in splits:
        if split.new:
            split.new.save(split.old.folder)
        _remove_unused(split.old.folder, split.new or split.old.manifest)
    history = data / "history"
    if not sum((split.new or split.old.manifest).num_rows for split in splits):
        shutil.rmtree(history, ignore_errors=True)
    elif (history / "history.json").exists() and not is_history_of(history, data):
        build_history(data, history)
    return splits


def _raw_ids(config: EraseConfig) -> pa.Array:
    lines: list[str] = []
    if config.users_file:
        try:
            lines = config.users_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"users_file={config.users_file} cannot be read: {error}") from None
    ids = sorted({*config.users, *(line for line in lines if line)})
    if not ids:
        raise ConfigError("nobody to erase: give users or users_file")
    return pa.array(ids, pa.string())


def _parts_of(data: Path, raw: pa.Array) -> set[int] | None:
    """Parts of the shards that can hold these users: a build gives every bucket of users a part of its own. None = all."""
    try:
        num_buckets = json.loads((data / "build.json").read_bytes())["num_buckets"]
    except (OSError, ValueError, KeyError):
        return None
    return set(bucket_of(hash_strings(raw), num_buckets).tolist())


def _find(split: LocalSplit, stored: pa.Array, parts: set[int] | None) -> Erased:
    names = [_SHARD_NAME.fullmatch(shard.name) for shard in split.manifest.shards]
    looked = np.array([parts is None or name is None or int(name[2]) in parts for name in names], bool)
    rows, users = [np.zeros(0, np.int64)], set()
    for number in tqdm(np.flatnonzero(looked[split.index["shard"]]), desc=f"find users in {split.manifest.split}", unit="batch",
                       mininterval=0.5):
        ids = split.batch(number).column("user_id")
        found = pc.is_in(ids, stored)
        if pc.any(found).as_py():
            rows.append(np.flatnonzero(found) + split.index["first_row"][number])
            users |= set(ids.filter(found).to_pylist())
    rows = np.concatenate(rows)
    tokens = np.load(split.folder / split.manifest.rows_file, mmap_mode="r" if split.manifest.num_rows else None, allow_pickle=False)
    return Erased(split, rows, int(tokens[rows, 0].sum(dtype=np.int64)), users)


def _rewrite(erased: Erased, stored: pa.Array) -> ShardManifest:
    """Write the files of the split without these rows beside the old ones. Returns: the manifest that makes them valid, not yet saved.

    Names follow from what is erased, so that an interrupted run writes the same files again.
    """
    old, manifest, index = erased.old, erased.old.manifest, erased.old.index
    tag = xxhash.xxh3_64_hexdigest(manifest.index_checksum.encode() + erased.rows.tobytes())[:8]
    affected = set(index["shard"][np.unique(np.searchsorted(index["first_row"], erased.rows, side="right") - 1)].tolist())
    shards, ranges, owners = [], [], []
    starts = np.searchsorted(index["shard"], np.arange(len(manifest.shards) + 1))
    for number, shard in enumerate(tqdm(manifest.shards, desc=f"erase from {manifest.split}", unit="shard", mininterval=0.5)):
        batches = range(starts[number], starts[number + 1])
        if number in affected:
            shard, entries = _rewrite_shard(erased, shard, batches, stored, tag)
        else:
            entries = [tuple(int(index[name][batch]) for name in ("offset", "num_bytes", "checksum", "num_rows")) for batch in batches]
        if entries:
            ranges += entries
            owners += [len(shards)] * len(entries)
            shards.append(shard)
    offset, num_bytes, checksum, num_rows = zip(*ranges, strict=True) if ranges else ((), (), (), ())
    columns = [owners, offset, num_bytes, checksum, np.cumsum(num_rows) - num_rows if ranges else (), num_rows]
    table = pa.table([pa.array(column, kind.type) for column, kind in zip(columns, INDEX_SCHEMA, strict=True)], INDEX_SCHEMA)
    index_file, rows_file = f"index-{tag}.arrow", f"rows-{tag}.npy"
    write_atomic(old.folder / index_file, table_bytes(table))
    gone = _rewrite_stats(erased, rows_file)
    return manifest.model_copy(update={
        "shards": tuple(shards), "num_rows": manifest.num_rows - len(erased.rows), "num_tokens": manifest.num_tokens - int(gone[0]),
        "num_targets": manifest.num_targets - int(gone[1]), "num_batches": len(ranges), "index_file": index_file, "rows_file": rows_file,
        "content_checksum": xxhash.xxh3_128_hexdigest(manifest.content_checksum.encode() + erased.rows.tobytes()),
        "index_checksum": sha256_of(old.folder / index_file, old.folder / rows_file)})


def _rewrite_shard(erased: Erased, shard: ShardInfo, batches: range, stored: pa.Array, tag: str) -> tuple[ShardInfo, list[tuple]]:
    """Record batches keep their limits; one that is left without rows goes, and so does such a file."""
    manifest, name = erased.old.manifest, _SHARD_NAME.fullmatch(shard.name)
    if name is None:
        raise DataError(f"{erased.old.folder / shard.name} is not named like the shards of launch/build_data.py; build the data again "
                        "from logs without the users")
    path = erased.old.folder / f"{name[1]}-{tag}{name[3]}"
    file = None
    for number in batches:
        batch = erased.old.batch(number)
        batch = batch.filter(pc.invert(pc.is_in(batch.column("user_id"), stored)))  # a copy: nothing of the others comes along
        if batch.num_rows:
            file = file or new_shard(path, manifest.container, manifest.compression)
            file.write(batch)
    if file is None:
        return shard, []
    entries = file.close()
    return ShardInfo(name=path.name, num_bytes=path.stat().st_size, num_rows=file.num_rows), entries


def _rewrite_stats(erased: Erased, name: str) -> np.ndarray:
    """rows.npy without the rows, a chunk at a time. Returns: the sum of what went."""
    folder, manifest, rows = erased.old.folder, erased.old.manifest, erased.rows
    stats = np.load(folder / manifest.rows_file, mmap_mode="r", allow_pickle=False)
    temporary = folder / f"{name}.tmp"
    with open(temporary, "wb") as file:
        file.write(npy_header(len(stats) - len(rows)))
        for first in range(0, len(stats), _CHUNK_ROWS):
            here = rows[np.searchsorted(rows, first) : np.searchsorted(rows, first + _CHUNK_ROWS)] - first
            file.write(np.delete(stats[first : first + _CHUNK_ROWS], here, axis=0).tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / name)
    return stats[rows].sum(0, dtype=np.int64)


def _remove_unused(folder: Path, manifest: ShardManifest) -> None:
    used = {manifest.index_file, manifest.rows_file, *(shard.name for shard in manifest.shards)}
    for path in (path for pattern in ("part-*", "index*", "rows*") for path in folder.glob(pattern)):
        if path.name not in used:
            path.unlink()


def _erase_knowledge(folder: Path, stored: pa.Array, changed: list[Erased]) -> None:
    """Texts of the users, and every vector that no remaining row reads, with the rows numbered as the new shards are."""
    manifest = KnowledgeManifest.load(folder)
    _erase_texts(folder / TEXTS, stored)
    if any(split.old.manifest.fingerprint in manifest.splits for split in changed):
        manifest = _erase_vectors(folder, manifest, changed)
        write_atomic(folder / "knowledge.json", manifest.model_dump_json(indent=1).encode())
    files = {manifest.vectors, manifest.blocks, *(entry.file for entry in manifest.splits.values())}
    for path in (path for pattern in ("vectors-*", "blocks-*", "rows-*") for path in folder.glob(pattern)):
        if path.name not in files:
            path.unlink()


def _erase_vectors(folder: Path, manifest: KnowledgeManifest, changed: list[Erased]) -> KnowledgeManifest:
    """Write vectors and rows beside the old ones. Returns: the manifest that makes them valid, not yet saved."""
    by_fingerprint = {split.old.manifest.fingerprint: split for split in changed}
    read, used = {}, np.zeros(manifest.num_texts, bool)
    for fingerprint, entry in manifest.splits.items():
        rows, split = np.load(folder / entry.file, allow_pickle=False), by_fingerprint.get(fingerprint)
        if split:
            rows, fingerprint = np.delete(rows, split.rows), split.new.fingerprint
        read[fingerprint] = (entry.split, rows)
        used[rows[rows >= 0]] = True
    place, splits = np.append(np.cumsum(used) - 1, -1), {}  # place[-1] is that of no text
    for fingerprint, (name, rows) in read.items():
        file, checksum = save_array(folder, "rows", place[rows])
        splits[fingerprint] = KnowledgeRows(split=name, file=file, checksum=checksum, num_rows=len(rows), num_missing=int((rows < 0).sum()))
    kept, size, temporary = np.flatnonzero(used), manifest.block_rows, folder / "vectors.tmp"
    vectors = np.load(folder / manifest.vectors, mmap_mode="r", allow_pickle=False)
    out = np.lib.format.open_memmap(temporary, mode="w+", dtype=vectors.dtype, shape=(len(kept), *vectors.shape[1:]))
    blocks = []
    for first in range(0, len(kept), size):
        block = np.ascontiguousarray(vectors[kept[first : first + size]])
        out[first : first + size] = block
        blocks.append(xxhash.xxh3_64_intdigest(block))
    out.flush()
    blocks_file, checksum = save_array(folder, "blocks", np.array(blocks, np.uint64))
    os.replace(temporary, folder / f"vectors-{checksum}.npy")
    return manifest.model_copy(update={"num_texts": len(kept), "splits": splits, "vectors": f"vectors-{checksum}.npy",
                                       "blocks": blocks_file, "blocks_checksum": checksum})


def _erase_texts(path: Path, stored: pa.Array) -> None:
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        with pa.ipc.new_file(str(temporary), reader.schema) as writer:
            for number in range(reader.num_record_batches):
                batch = reader.get_batch(number)
                writer.write_batch(batch.filter(pc.invert(pc.is_in(batch.column("user_id"), stored))))
    os.replace(temporary, path)
