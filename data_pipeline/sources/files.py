"""A team's own logs: Parquet, Arrow/Feather or CSV files on any pyarrow file system, described by a column mapping in YAML.

Owns finding and reading the files and bringing their columns into the form of events.py. Several logs (say, one of ads and one of
organic content) may have different mappings. configs/data/example_own_logs.yaml shows every setting.
"""

import difflib
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from data_pipeline.events import AD, ORGANIC, SourceBatch
from data_pipeline.sources.base import Source, Task
from data_pipeline.sources.columns import UNITS_PER_SECOND, as_flags, as_floats, as_strings, clamp_times, map_values, parse_times
from data_pipeline.sources.tables import (
    FoundFile,
    TableFiles,
    file_system,
    find_files,
    format_of,
    pieces,
    read_piece,
    read_schema,
    read_table,
)
from gpr_dist.config import Config
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.hashing import time_feature
from gpr_dist.schema import EVERY_AD, Action

ActionName = Literal["impression", "click", "conversion"]
_ACTIONS = {"impression": Action.IMPRESSION, "click": Action.CLICK, "conversion": Action.CONVERSION}


class LogConfig(TableFiles):
    """One kind of log: its files and which columns mean what."""

    user_id: str
    """column"""
    item_id: str
    """column"""
    timestamp: str
    """column: an Arrow timestamp or date, or anything `time_format` says; without a zone it is UTC"""
    time_format: str | None = None
    """s | ms | us | ns since 1970, iso, or a strptime format with %; needed unless the column has a timestamp type"""
    kind: Literal["ad", "organic"] | None = None
    """what every row of this log is; or use kind_column"""
    kind_column: str | None = None
    """column that tells ads from organic content, by the values below"""
    ad_values: tuple[str, ...] = ()
    """values of kind_column that mean ad"""
    organic_values: tuple[str, ...] = ()
    """values of kind_column that mean organic content"""
    action: ActionName | None = None
    """action of every ad row; or use action_column or action_flags. Organic rows need none"""
    action_column: str | None = None
    """column whose values name the action, by action_values"""
    action_values: dict[str, ActionName] = Field(default_factory=dict)
    """value of action_column -> action"""
    action_flags: dict[ActionName, str] = Field(default_factory=dict)
    """action -> column of 0/1 or true/false; the strongest that is set counts, none = impression"""
    request_id: str | None = None
    """column; ads with the same id were shown together. none = ads of a user with the same time"""
    value: str | None = None
    """column: value logged at exposure (eCPM, price)"""
    pctr: str | None = None
    """column: logged click prediction, 0..1"""
    pcvr: str | None = None
    """column: logged conversion prediction, 0..1"""
    scene: str | None = None
    """column: where the item was shown or consumed"""
    eligibility: str | None = None
    """column: key of the request's group in the eligibility file; null = every ad"""
    user_features: dict[str, str] = Field(default_factory=dict)
    """name -> column, features of the user as logged with the event; for features that do not change use `users`"""
    env_features: dict[str, str] = Field(default_factory=dict)
    """name -> column, what was known of the request before an ad was chosen"""
    time_features: tuple[Literal["hour", "day_of_week", "week_of_year"], ...] = ()
    """E features made from the timestamp (UTC)"""

    @model_validator(mode="after")
    def _check(self) -> "LogConfig":
        problems = []
        if (self.kind is None) == (self.kind_column is None):
            problems.append("set exactly one of kind and kind_column")
        if self.kind_column and not (self.ad_values or self.organic_values):
            problems.append("kind_column needs ad_values and organic_values")
        num_actions = (self.action is not None) + (self.action_column is not None) + bool(self.action_flags)
        if self.kind != "organic" and num_actions != 1:
            problems.append("set exactly one of action, action_column and action_flags")
        if self.action_column and not self.action_values:
            problems.append("action_column needs action_values")
        if self.time_format and self.time_format not in (*UNITS_PER_SECOND, "iso") and "%" not in self.time_format:
            problems.append(f"time_format {self.time_format!r} is none of s, ms, us, ns, iso and has no % in it")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class ItemsConfig(TableFiles):
    """The items file."""

    item_id: str
    """column"""
    text: tuple[str, ...] = ()
    """columns joined by a space; the default embeddings are made from it"""
    price: str | None = None
    """column"""
    features: dict[str, str] = Field(default_factory=dict)
    """name -> column, copied into the catalogue"""


class UsersConfig(TableFiles):
    """The users file: features that do not change."""

    user_id: str
    """column"""
    features: dict[str, str]
    """name -> column"""


class EligibilityConfig(TableFiles):
    """Which ads may be shown: one line per group and ad."""

    group: str
    """column: key of the group, matched with the log's eligibility column"""
    item_id: str
    """column"""


class FilesConfig(Config):
    """A team's own logs."""

    format: Literal["files"]
    logs: tuple[LogConfig, ...]
    """one entry per kind of log"""
    items: ItemsConfig | None = None
    """text, price and features of the items"""
    users: UsersConfig | None = None
    """static user features"""
    eligibility: EligibilityConfig | None = None
    """which ads may be shown at which request; none = every ad"""

    @model_validator(mode="after")
    def _check(self) -> "FilesConfig":
        if not self.logs:
            raise ValueError("logs is empty; name at least one log")
        if any(log.eligibility for log in self.logs) and self.eligibility is None:
            raise ValueError("a log names an eligibility column, but there is no eligibility file")
        return self


class FilesSource(Source):
    """Logs as the mapping describes them. Text becomes numbers without stopping: what cannot be read becomes a counted bad row."""

    def __init__(self, config: FilesConfig):
        self._config = config
        self.user_features = _distinct(name for log in config.logs for name in log.user_features)
        self.env_features = _distinct(name for log in config.logs for name in (*log.env_features, *log.time_features))
        self.profile_features = tuple(config.users.features) if config.users else ()
        both = set(self.user_features) & set(self.profile_features)
        if both:
            raise ConfigError(f"user feature {', '.join(sorted(both))} is in the users file and in a log; give them different names")

    @cached_property
    def item_features(self) -> pa.Schema:
        config = self._config.items
        if not config or not config.features:
            return pa.schema([])
        schema = read_schema(find_files(config)[0], config)
        return pa.schema([(name, _plain_type(schema.field(column).type)) for name, column in config.features.items()
                          if _require(schema.names, column, f"source.items.features.{name}", str(config.path))])

    @cached_property
    def num_groups(self) -> int:
        return len(self._group_keys)

    def inputs(self) -> list[str]:
        tables = [*self._config.logs, self._config.items, self._config.users, self._config.eligibility]
        files = [file for table in tables if table for file in find_files(table)]
        return [f"{file.path} ({file.num_bytes:,} bytes, modified {file.modified_ns})" for file in files]

    def tasks(self) -> list[Task]:
        tasks: list[Task] = []
        for number, log in enumerate(self._config.logs):
            for file in find_files(log):
                names = read_schema(file, log).names
                for setting, column in _columns_of(log).items():
                    _require(names, column, f"source.logs[{number}].{setting}", file.path)
                for num_rows, detail in pieces(file):
                    tasks.append(Task(len(tasks), file.path, num_rows, (number, *detail)))
        for label, table in (("items", self._config.items), ("users", self._config.users), ("eligibility", self._config.eligibility)):
            for file in find_files(table) if table else ():
                names = read_schema(file, table).names
                for setting, column in _columns_of(table).items():
                    _require(names, column, f"source.{label}.{setting}", file.path)
        return tasks

    def read_events(self, task: Task) -> Iterator[SourceBatch]:
        number, *detail = task.detail
        log = self._config.logs[number]
        fs, path = file_system(task.name)
        columns = _needed(log)
        features = [*log.user_features.values(), *log.env_features.values(), *([log.scene] if log.scene else [])]
        file = FoundFile(fs, path, format_of(path, log), 0, 0)
        for rows, first_row, malformed in read_piece(file, log, columns, features, detail):
            yield self._to_events(rows, log, task.name, first_row, malformed)

    def read_items(self) -> Iterator[pa.Table]:
        config = self._config.items
        if config is None:
            return
        for rows in read_table(config, _needed(config)):
            text = [pc.fill_null(as_strings(rows[column]), "") for column in config.text]
            table = {"item_id": as_strings(rows[config.item_id]),
                     "text": pc.binary_join_element_wise(*text, " ") if text else pa.repeat(pa.scalar("", pa.string()), rows.num_rows)}
            price = as_floats(rows[config.price])[0] if config.price else pa.nulls(rows.num_rows, pa.float32())
            features = {name: rows[column].cast(self.item_features.field(name).type) for name, column in config.features.items()}
            yield pa.table(table | {"price": price} | features)

    def read_users(self) -> Iterator[pa.Table]:
        config = self._config.users
        for rows in read_table(config, _needed(config)) if config else ():
            features = {name: as_strings(rows[column]) for name, column in config.features.items()}
            yield pa.table({"user_id": as_strings(rows[config.user_id])} | features)

    def read_eligibility(self) -> Iterator[pa.Table]:
        config = self._config.eligibility
        for rows in read_table(config, _needed(config)) if config else ():
            group = pc.index_in(as_strings(rows[config.group]).cast(pa.string()), self._group_keys)
            if group.null_count:
                raise DataError(f"{config.path}: {group.null_count:,} rows have no {config.group}; every row needs a group")
            yield pa.table({"group": group, "item_id": as_strings(rows[config.item_id])})

    @cached_property
    def _group_keys(self) -> pa.Array:
        """Distinct group keys, sorted; a group's number is its place here."""
        config = self._config.eligibility
        keys = pa.array([], pa.string())
        for rows in read_table(config, [config.group]) if config else ():
            found = pc.unique(as_strings(rows[config.group]).cast(pa.string())).drop_null()  # the column may be dictionary-encoded
            keys = pc.unique(pa.concat_arrays([keys, found]))
        return keys.take(pc.sort_indices(keys))

    def _to_events(self, rows: pa.Table, log: LogConfig, file: str, first_row: int, malformed: list[str]) -> SourceBatch:
        time = parse_times(rows[log.timestamp], log.time_format, f"{file} column {log.timestamp}")
        table = {"user_id": as_strings(rows[log.user_id]), "item_id": as_strings(rows[log.item_id]), "timestamp": time,
                 "kind": _kind(rows, log), "action": _action(rows, log)}
        problems = []
        for name in ("value", "pctr", "pcvr"):
            if (column := getattr(log, name)) is not None:
                table[name], unreadable = as_floats(rows[column])
                problems.append((f"{name} that is not a number", unreadable))
        for name in ("request_id", "scene"):
            if (column := getattr(log, name)) is not None:
                table[name] = as_strings(rows[column])
        if log.eligibility is not None:
            key = as_strings(rows[log.eligibility]).cast(pa.string())
            group = pc.index_in(key, self._group_keys)
            table["eligibility"] = pc.if_else(pc.is_null(key), pa.scalar(EVERY_AD, pa.int32()), group)
        for prefix, features in (("user", log.user_features), ("env", log.env_features)):
            table |= {f"{prefix}.{name}": as_strings(rows[column]) for name, column in features.items()}
        table |= {f"env.{name}": time_feature(name, clamp_times(time)) for name in log.time_features}
        return SourceBatch(pa.table(table), file, first_row, len(malformed), tuple(malformed[:5]), tuple(problems))


def _kind(rows: pa.Table, log: LogConfig) -> pa.Array | pa.ChunkedArray:
    if log.kind is not None:
        return pa.repeat(pa.scalar(AD if log.kind == "ad" else ORGANIC, pa.uint8()), rows.num_rows)
    values = dict.fromkeys(log.organic_values, ORGANIC) | dict.fromkeys(log.ad_values, AD)
    return map_values(rows[log.kind_column], values)


def _action(rows: pa.Table, log: LogConfig) -> pa.Array | pa.ChunkedArray:
    """uint8, null where unknown. Organic rows are never unknown: their action is CONSUME whatever the log says."""
    if log.action is not None or log.kind == "organic":
        return pa.repeat(pa.scalar(_ACTIONS.get(log.action, Action.CONSUME), pa.uint8()), rows.num_rows)
    if log.action_column is not None:
        action = map_values(rows[log.action_column], {value: _ACTIONS[name] for value, name in log.action_values.items()})
    else:
        action = pa.repeat(pa.scalar(Action.IMPRESSION, pa.uint8()), rows.num_rows)
        for name in sorted(log.action_flags, key=_ACTIONS.__getitem__):
            flag = as_flags(rows[log.action_flags[name]])
            action = pc.if_else(flag, pa.scalar(_ACTIONS[name], pa.uint8()), action)  # a flag that is neither makes it null
    if log.kind_column is not None:
        organic = pc.fill_null(pc.equal(_kind(rows, log), ORGANIC), False)
        action = pc.if_else(organic, pa.scalar(Action.CONSUME, pa.uint8()), action)
    return action


def _columns_of(table: TableFiles) -> dict[str, str]:
    """Setting → column, of every column a table needs."""
    if isinstance(table, LogConfig):
        names = ("user_id", "item_id", "timestamp", "kind_column", "action_column", "request_id", "value", "pctr", "pcvr", "scene",
                 "eligibility")
    else:
        names = ("user_id", "item_id", "group", "price")
    columns = {name: getattr(table, name) for name in names if getattr(table, name, None) is not None}
    for setting in ("action_flags", "user_features", "env_features", "features"):
        columns |= {f"{setting}.{name}": column for name, column in getattr(table, setting, {}).items()}
    return columns | {f"text[{number}]": column for number, column in enumerate(getattr(table, "text", ()))}


def _needed(table: TableFiles) -> list[str]:
    """The columns to read, each once."""
    return list(dict.fromkeys(_columns_of(table).values()))


def _require(names: list[str], column: str, setting: str, where: str) -> bool:
    if column not in names:
        near = difflib.get_close_matches(column, names, n=1, cutoff=0.0)
        raise ConfigError(f"{setting}: {where} has no column {column!r}; nearest: {near[0] if near else 'none'}")
    return True


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _plain_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
