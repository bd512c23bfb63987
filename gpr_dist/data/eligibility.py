"""Which ads may be shown at a request: one sorted item list per eligibility group, memory-mapped from `eligibility.arrow`.

Owns reading the groups and asking whether an item belongs to one. How a group restricts decoding is `decoding/trie.py`'s business;
which group a request belongs to is stored in the journeys (`gpr_dist/schema.py`).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from gpr_dist.errors import DataError
from gpr_dist.schema import EVERY_AD

AD_KIND = 1  # catalogue.arrow column kind
REBUILD = "rebuild the data with launch/build_data.py"


class Eligibility:
    """Sorted unique catalogue indices of each group; the group EVERY_AD holds every ad of the catalogue."""

    def __init__(self, groups: Sequence[np.ndarray], ads: np.ndarray, num_items: int):
        """Args: groups: one int32 array per group (any sequence; only what is asked for is read); ads: sorted indices of all ads."""
        self._groups, self._ads, self.num_items = groups, ads, num_items

    @classmethod
    def load(cls, data_folder: str | Path) -> "Eligibility":
        """Open the groups of a data folder; without `eligibility.arrow` there is no group and every ad is always eligible.

        Raises: DataError when the catalogue or the group file is missing columns or damaged.
        """
        folder = Path(data_folder)
        kind = _read_column(folder / "catalogue" / "catalogue.arrow", "kind")
        ads = np.flatnonzero(np.concatenate([np.empty(0, np.uint8), *(chunk.to_numpy() for chunk in kind.chunks)]) == AD_KIND)
        path = folder / "eligibility.arrow"
        groups = _MappedLists(_read_column(path, "items"), path) if path.exists() else []
        return cls(groups, ads.astype(np.int32), len(kind))

    @property
    def num_groups(self) -> int:
        """Groups numbered from 0, EVERY_AD not counted."""
        return len(self._groups)

    def items(self, group: int) -> np.ndarray:
        """Sorted int32 catalogue indices eligible in `group`.

        Raises: DataError when the group does not exist or names items outside the catalogue.
        """
        if group == EVERY_AD:
            return self._ads
        if not 0 <= group < self.num_groups:
            raise DataError(f"eligibility group {group} does not exist, eligibility.arrow has {self.num_groups}; {REBUILD}")
        items = self._groups[group]
        if len(items) and (items[0] < 0 or items[-1] >= self.num_items):  # sorted, so the ends bound the rest
            found = f"holds items {items[0]}..{items[-1]}, the catalogue has {self.num_items}"
            raise DataError(f"eligibility.arrow row {group}: {found}; {REBUILD}")
        return items

    def contains(self, groups_N: np.ndarray, items_N: np.ndarray) -> np.ndarray:
        """Whether each item is eligible in its group, bool [N]; the work per distinct group is one binary search for all its items."""
        order = np.argsort(groups_N, kind="stable")
        groups, starts = np.unique(groups_N[order], return_index=True)
        found_N = np.zeros(len(groups_N), dtype=bool)
        for group, first, end in zip(groups.tolist(), starts, np.append(starts, len(order))[1:], strict=True):
            rows, eligible = order[first:end], self.items(group)
            slot = np.searchsorted(eligible, items_N[rows])
            inside = slot < len(eligible)
            found_N[rows[inside]] = eligible[slot[inside]] == items_N[rows[inside]]
        return found_N


class _MappedLists(Sequence):
    """The rows of a list<int32> column as numpy views of the mapped file."""

    def __init__(self, column: pa.ChunkedArray, path: Path):
        if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) or column.type.value_type != pa.int32():
            raise DataError(f"{path}: column items has type {column.type}, expected list<int32>; {REBUILD}")
        if column.null_count:
            raise DataError(f"{path}: {column.null_count} groups are null, expected lists (possibly empty); {REBUILD}")
        self._offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]
        self._values = [chunk.values.to_numpy() for chunk in column.chunks]
        self._first_row = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])

    def __len__(self) -> int:
        return int(self._first_row[-1])

    def __getitem__(self, row: int) -> np.ndarray:
        chunk = int(np.searchsorted(self._first_row, row, side="right")) - 1
        first = row - int(self._first_row[chunk])
        return self._values[chunk][self._offsets[chunk][first] : self._offsets[chunk][first + 1]]


def _read_column(path: Path, name: str) -> pa.ChunkedArray:
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"cannot read {path}: {error}; {REBUILD}") from None
    if name not in table.column_names:
        raise DataError(f"{path}: no column {name!r}, found {table.column_names}; {REBUILD}")
    return table.column(name)
