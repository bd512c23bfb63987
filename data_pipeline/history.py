"""The users' events beside their journeys, so that a model's pointer can repeat what is older than a row.

Every event of the shards once, by user and time, and for each journey which of them its user had before it began: a journey's own tokens
are not repeated, and nothing at or after its first token is in its history. Owns the folder that gpr_dist/data/history.py reads; journeys
are not touched.
"""

import io
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from data_pipeline.journeys import SPLITS
from data_pipeline.shards import iter_record_batches
from data_pipeline.user_texts import own_tokens
from gpr_dist.errors import DataError
from gpr_dist.hashing import hash_strings
from gpr_dist.schema import HistoryManifest, HistoryRows, ShardManifest, write_atomic

_TIME_BITS = 33  # events.MAX_TIME; leaves 30 bits for the users


def build_history(data: Path, out: Path, train: Path | None = None) -> HistoryManifest:
    """Write the history of every split of a data folder. Memory: about 60 bytes per event.

    Args: train: folder of the training shards, if they are not in the data folder.
    Raises: DataError for missing or damaged shards, and for 2^30 users or more.
    """
    folders, manifests = _splits(data, train)
    events: dict[str, list[np.ndarray]] = {name: [] for name in ("user", "time", "item", "action")}
    asked: list[tuple[np.ndarray, np.ndarray]] = []  # user and first moment of every row, split after split
    for folder, manifest in zip(folders, manifests, strict=True):
        for batch in tqdm(iter_record_batches(folder), total=manifest.num_batches, mininterval=0.5, unit="batch",
                          desc=f"history of {manifest.split}"):
            user_B = hash_strings(batch.column("user_id"))
            row_T, fresh_T = own_tokens(batch)
            item_T, time_T, action_T = (batch.column(name).flatten().to_numpy() for name in ("item", "timestamp", "action"))
            mine = np.flatnonzero(fresh_T & (item_T >= 0))
            for name, values in (("user", user_B[row_T[mine]]), ("time", time_T[mine]), ("item", item_T[mine]), ("action", action_T[mine])):
                events[name].append(values)
            asked.append((user_B, time_T[np.searchsorted(row_T, np.arange(batch.num_rows))]))
    if not asked:
        raise DataError(f"no journeys in {data / 'shards'}; run launch/build_data.py first")
    columns = {name: np.concatenate(parts) for name, parts in events.items()}
    user_B, time_B = (np.concatenate(parts) for parts in zip(*asked, strict=True))
    users = np.unique(user_B)
    if len(users) >= 1 << (63 - _TIME_BITS):
        raise DataError(f"{len(users)} users are too many for one history; split the data by users")
    moment_X = (np.searchsorted(users, columns.pop("user")) << _TIME_BITS) + columns["time"]
    order = np.argsort(moment_X, kind="stable")
    moment_X = moment_X[order]
    start_B = np.searchsorted(users, user_B) << _TIME_BITS
    rows = np.stack([np.searchsorted(moment_X, start_B), np.searchsorted(moment_X, start_B + time_B)], axis=1)

    out.mkdir(parents=True, exist_ok=True)
    files = {name: _save(out, name, values[order]) for name, values in columns.items()}
    ends = np.cumsum([manifest.num_rows for manifest in manifests])
    found = {}
    for manifest, part in zip(manifests, np.split(rows, ends[:-1]), strict=True):
        file = _save(out, f"rows-{manifest.split}", part)
        found[manifest.fingerprint] = HistoryRows(split=manifest.split, num_rows=manifest.num_rows, file=file)
    manifest = HistoryManifest(num_events=len(moment_X), files=files, splits=found)
    write_atomic(out / "history.json", manifest.model_dump_json(indent=1).encode())
    for path in set(out.glob("*.npy")) - {out / name for name in (*files.values(), *(entry.file for entry in found.values()))}:
        path.unlink()
    return manifest


def is_history_of(history: Path, data: Path, train: Path | None = None) -> bool:
    """Whether a history was made of the shards that are there now. Raises: DataError when it cannot be read."""
    return set(HistoryManifest.load(history).splits) == {manifest.fingerprint for manifest in _splits(data, train)[1]}


def _splits(data: Path, train: Path | None) -> tuple[list[Path], list[ShardManifest]]:
    places = {split: data / "shards" / split for split in SPLITS} | ({"train": train} if train else {})
    folders = [folder for folder in places.values() if (folder / "manifest.json").exists()]
    return folders, [ShardManifest.parse((folder / "manifest.json").read_bytes(), str(folder)) for folder in folders]


def _save(folder: Path, name: str, values: np.ndarray) -> str:
    """Write under a name that carries the content's hash, so that a folder is replaced under running jobs. Returns: the name."""
    content = io.BytesIO()
    np.save(content, np.ascontiguousarray(values), allow_pickle=False)
    file = f"{name}-{xxhash.xxh3_64_hexdigest(content.getbuffer())}.npy"
    write_atomic(folder / file, content.getbuffer())
    return file
