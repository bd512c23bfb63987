"""Events of a journey's user older than the journey, at batch time: memory maps and one gather. Made by data_pipeline/history.py.

A row holds what the journey encoder reads, a few hundred tokens; what a user repeats is often months old, and far cheaper to keep as a
bare list. Journeys need not be rebuilt for it, and are found by their fingerprint.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from gpr_dist.errors import DataError
from gpr_dist.schema import HistoryManifest, ShardManifest, file_checksum

# B rows  X events of all rows

_REMAKE = "delete the folder, launch/pretrain.py makes it again"


class UserHistory:
    """The events before each row of one split."""

    def __init__(self, folder: str | Path, split: ShardManifest, most: int, verify: Literal["first_read", "never"] = "first_read") -> None:
        """Args: most: events of a row that are read, the latest ones.

        Raises: DataError when a file is missing, cut or altered, or the folder was made for other shards.
        """
        self.folder, self.most = Path(folder), most
        manifest = HistoryManifest.load(folder)
        rows = manifest.splits.get(split.fingerprint)
        if rows is None:
            known = ", ".join(f"{entry.split} {fingerprint}" for fingerprint, entry in manifest.splits.items())
            raise DataError(f"{folder} was made for the shards {known}, not for {split.split} {split.fingerprint}; {_REMAKE}")
        check = verify != "never"
        self._rows_B2 = self._open(rows.file, (split.num_rows, 2), check)
        self._columns = {name: self._open(file, (manifest.num_events,), check) for name, file in manifest.files.items()}

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(offsets int64 [B + 1], item, time and action int64 [X]) of these rows of the split, oldest event first."""
        first, end = np.asarray(self._rows_B2[rows]).reshape(-1, 2).T
        first = np.maximum(first, end - self.most)
        offsets = np.concatenate([[0], np.cumsum(end - first)])
        index = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], end - first)
        return offsets, {name: column[index].astype(np.int64) for name, column in self._columns.items()}

    def _open(self, name: str, shape: tuple[int, ...], check: bool) -> np.ndarray:
        path = self.folder / name
        try:
            if check and f"-{file_checksum(path, xxhash.xxh3_64)}.npy" not in name:
                raise DataError(f"{path} was altered; {_REMAKE}")
            array = np.load(path, mmap_mode="r" if np.prod(shape) else None, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} cannot be read ({error}); {_REMAKE}") from None
        if array.shape != shape or array.dtype.kind not in "iu":
            raise DataError(f"{path} is {array.dtype} {array.shape}, expected whole numbers of shape {shape}; {_REMAKE}")
        return array
