"""Events of a journey's user older than the journey, at batch time: memory maps and one gather. Made by data_pipeline/history.py.

A row holds what the journey encoder reads, a few hundred tokens; what a user repeats is often months old, and far cheaper to keep as a
bare list. Journeys need not be rebuilt for it, and are found by their fingerprint.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from gpr_dist.data.arrays import open_array
from gpr_dist.errors import DataError
from gpr_dist.schema import HistoryManifest, ShardManifest

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

        def opened(name: str, shape: tuple[int, ...]) -> np.ndarray:  # a file is named by its checksum
            checksum = Path(name).stem.rpartition("-")[2] if verify != "never" else None
            return open_array(self.folder / name, shape, ("i", "u"), _REMAKE, checksum)

        self._rows_B2 = opened(rows.file, (split.num_rows, 2))
        self._columns = {name: opened(file, (manifest.num_events,)) for name, file in manifest.files.items()}

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(offsets int64 [B + 1], item, time and action int64 [X]) of these rows of the split, oldest event first."""
        first, end = np.asarray(self._rows_B2[rows]).reshape(-1, 2).T
        first = np.maximum(first, end - self.most)
        offsets = np.concatenate([[0], np.cumsum(end - first)])
        index = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], end - first)
        return offsets, {name: column[index].astype(np.int64) for name, column in self._columns.items()}
