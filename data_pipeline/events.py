"""The normalised event table every source produces, its validation, and the fixed-width form kept on disk during a build.

Owns what a good log row is. Reading raw files belongs to sources/, ordering events into journeys to journeys.py.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpr_dist.errors import DataError
from gpr_dist.hashing import combine64, feature_id, hash_strings
from gpr_dist.schema import EVERY_AD, Action

ORGANIC, AD = 0, 1
MAX_TIME = 1 << 33  # seconds; year 2242. A time beyond it is milliseconds read as seconds; journeys.py packs times into 33 bits

EVENT_SCHEMA = pa.schema([
    ("user_id", pa.string()),
    ("item_id", pa.string()),
    ("timestamp", pa.int64()),  # seconds since 1970 (or the position, in data without times); null = unparsable
    ("kind", pa.uint8()),  # ORGANIC | AD; null = unknown kind
    ("request_id", pa.string()),  # ads of one request share it; null = the timestamp tells the request
    ("action", pa.uint8()),  # gpr_dist.schema.Action; null = unknown action. Organic events are CONSUME whatever it says
    ("value", pa.float32()),  # NaN or null = not logged, as pctr and pcvr
    ("pctr", pa.float32()),
    ("pcvr", pa.float32()),
    ("scene", pa.string()),  # where the item was shown or consumed; null = unknown
    ("eligibility", pa.int32()),  # eligibility group of the request, EVERY_AD = all; null = a group that does not exist
])
"""Required columns of an event table. Optional ones follow: `user.<name>` and `env.<name>`, strings, null = unknown.

String columns may be dictionary-encoded. A source may leave out request_id, value, pctr, pcvr, scene and eligibility.
"""

ITEM_SCHEMA = pa.schema([("item_id", pa.string()), ("text", pa.string()), ("price", pa.float32())])
"""Columns of an items table; further columns are item features and go to the catalogue as they are."""


class SourceBatch(NamedTuple):
    """Events as they come from a source, with their origin for error messages."""

    events: pa.Table
    file: str
    first_row: int  # 1-based data row of events[0] in `file`
    malformed: int = 0  # rows of the file that could not be split into columns, before or inside this batch
    malformed_shown: tuple[str, ...] = ()
    problems: tuple[tuple[str, np.ndarray], ...] = ()  # further (reason, mask over events) the source found


@dataclass
class BadRows:
    """How many log rows were bad, why, and the first few of them."""

    total: int = 0
    reasons: Counter = field(default_factory=Counter)
    shown: list[str] = field(default_factory=list)
    num_shown: int = 5

    @property
    def bad(self) -> int:
        return sum(self.reasons.values())

    def add(self, other: "BadRows") -> None:
        """Add the counts of another part of the log; parts are added in log order, so that the first rows stay the first."""
        self.total += other.total
        self.reasons.update(other.reasons)
        self.shown = (self.shown + other.shown)[: self.num_shown]

    def check(self, max_bad_frac: float) -> None:
        """Raises: DataError when more than `max_bad_frac` (0..1) of all rows are bad."""
        if self.bad > max_bad_frac * self.total:
            raise DataError(f"{self.bad:,} of {self.total:,} log rows are bad ({self.summary()}), more than max_bad_frac={max_bad_frac:g}; "
                            f"first: {'; '.join(self.shown)}. Repair the log or the column mapping, or raise max_bad_frac.")

    def summary(self) -> str:
        return ", ".join(f"{count:,} with {reason}" for reason, count in sorted(self.reasons.items()))


def validate_events(batch: SourceBatch, bad_rows: BadRows) -> pa.Table:
    """Drop the bad rows of a batch and count them in `bad_rows`: each bad row once, under the first reason that applies.

    Bad is: no user id, no item id, a time that cannot be read or lies outside 1970..2242, an unknown kind or action, an eligibility
    group that does not exist. Returns: the good rows, with every column of EVENT_SCHEMA.
    """
    table = batch.events
    problems = [
        ("missing user id", _is_missing(table["user_id"])),
        ("missing item id", _is_missing(table["item_id"])),
        ("unparsable time", _is_null(table["timestamp"])),
        ("time outside 1970..2242 (wrong unit?)", _is_outside(table["timestamp"])),
        ("unknown kind", _is_null(table["kind"])),
        ("unknown action", _is_null(table["action"])),
    ]
    if "eligibility" in table.column_names:
        problems.append(("unknown eligibility group", _is_null(table["eligibility"])))
    problems += batch.problems
    bad = np.zeros(table.num_rows, bool)
    found: list[tuple[int, str]] = []
    for reason, mask in problems:
        rows = np.flatnonzero(mask & ~bad)
        if len(rows):
            bad_rows.reasons[reason] += len(rows)
            found += [(int(row), reason) for row in rows[: bad_rows.num_shown]]
            bad[rows] = True
    if batch.malformed:
        bad_rows.reasons["a wrong number of columns"] += batch.malformed
    shown = [*batch.malformed_shown, *(f"{batch.file} row {batch.first_row + row}: {reason}" for row, reason in sorted(found))]
    bad_rows.shown = (bad_rows.shown + shown)[: bad_rows.num_shown]
    bad_rows.total += table.num_rows + batch.malformed
    return _complete(table.filter(pa.array(~bad)) if bad.any() else table)


def feature_names(table_or_names: pa.Table | list[str], prefix: str) -> tuple[str, ...]:
    """Names of the `user.` or `env.` columns, without the prefix, in column order."""
    names = table_or_names.column_names if isinstance(table_or_names, pa.Table) else table_or_names
    return tuple(name.removeprefix(prefix + ".") for name in names if name.startswith(prefix + "."))


def event_dtype(num_user_features: int, num_env_features: int) -> np.dtype:
    """The fixed-width record of one event on disk and in journeys.py; strings have become hashes."""
    return np.dtype([
        ("user", "<u8"), ("item", "<u8"), ("request", "<u8"),  # request 0 = told by the timestamp
        ("timestamp", "<i8"), ("value", "<f4"), ("pctr", "<f4"), ("pcvr", "<f4"), ("scene", "<i4"), ("eligibility", "<i4"),
        ("kind", "u1"), ("action", "u1"),
        ("user_features", "<i4", (num_user_features,)), ("env_features", "<i4", (num_env_features,)),
    ])


def encode_events(table: pa.Table, user_features: tuple[str, ...], env_features: tuple[str, ...]) -> np.ndarray:
    """Validated events [n] -> structured array [n] of `event_dtype`. A feature the table lacks is 0 (unknown)."""
    records = np.zeros(table.num_rows, event_dtype(len(user_features), len(env_features)))
    records["user"] = hash_strings(table["user_id"])
    records["item"] = hash_strings(table["item_id"])
    records["request"] = hash_strings(table["request_id"])
    for name in ("timestamp", "value", "pctr", "pcvr", "eligibility", "kind", "action"):
        records[name] = table[name].to_numpy()
    records["action"][records["kind"] == ORGANIC] = Action.CONSUME
    records["scene"] = feature_id(table["scene"], "scene")
    for prefix, field_name, names in (("user", "user_features", user_features), ("env", "env_features", env_features)):
        for column, name in enumerate(names):
            if f"{prefix}.{name}" in table.column_names:
                records[field_name][:, column] = feature_id(table[f"{prefix}.{name}"], name)
    return records


def event_fingerprint(records: np.ndarray) -> np.ndarray:
    """uint64 over every field of each event: the last tie-breaker, so that the order of the log never shows."""
    columns = [records[name] for name in ("request", "value", "pctr", "pcvr", "scene", "eligibility", "kind", "action")]
    for name in ("user_features", "env_features"):
        columns += [records[name][:, column] for column in range(records[name].shape[1])]
    return combine64(*columns)


def _complete(table: pa.Table) -> pa.Table:
    """Add the optional columns a source left out, and put NaN where a number is null."""
    defaults = {"request_id": None, "value": np.nan, "pctr": np.nan, "pcvr": np.nan, "scene": None, "eligibility": EVERY_AD}
    for name, fill in defaults.items():
        kind = EVENT_SCHEMA.field(name).type
        if name not in table.column_names:
            table = table.append_column(name, pa.repeat(pa.scalar(fill, kind), table.num_rows))
        elif pa.types.is_floating(kind) and table[name].null_count:
            table = table.set_column(table.column_names.index(name), name, pc.fill_null(table[name], float("nan")))
    return table


def _is_null(column: pa.ChunkedArray) -> np.ndarray:
    return pc.is_null(column).to_numpy() if column.null_count else np.zeros(len(column), bool)


def _is_missing(column: pa.ChunkedArray) -> np.ndarray:
    """Null or the empty string."""
    if not pa.types.is_dictionary(column.type):
        return pc.fill_null(pc.equal(column, ""), True).to_numpy()
    masks = [np.zeros(0, bool)]
    for chunk in column.chunks:
        empty = np.append(pc.fill_null(pc.equal(chunk.dictionary, ""), True).to_numpy(zero_copy_only=False), True)
        masks.append(empty[pc.fill_null(chunk.indices, len(empty) - 1).to_numpy(zero_copy_only=False)])
    return np.concatenate(masks).astype(bool)


def _is_outside(column: pa.ChunkedArray) -> np.ndarray:
    seconds = pc.fill_null(column, 0).to_numpy()
    return (seconds < 0) | (seconds >= MAX_TIME)
