"""Who may see which ad, from a table of ads: targeting, blocked placements, audit, budget and pacing, frequency caps.

An example of a rules file; all rules must allow an ad, and ads that the table does not have are never shown:

    ads: ads.parquet                                # .parquet, .arrow/.feather/.ipc or .csv; item_id, and the columns named below
    rules:
      - {kind: targeting, column: countries, field: country}   # values for which the ad may be shown; none named = all
      - {kind: blocked, column: blocked_slots, field: slot}    # values for which it may not
      - {kind: flag, column: audited}                          # true = may be shown
      - {kind: pacing, column: share}                          # share of the requests in which it takes part, 0..1; none = 1
      - {kind: cap, column: per_day, within_hours: 24}         # most times the request's history may have it already; none = no cap

Columns with values are lists of strings, or strings separated by "|". Requests bring theirs in `audience: {"country": "DE"}`; a value
that no ad names, or none, meets the ads that name nothing. Owns the file formats; the algebra is `decoding/eligibility_rules.py`'s.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pv
import pyarrow.parquet as pq
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from gpr_dist.config import Config, build_config
from gpr_dist.decoding.eligibility_rules import Table, capped, flag, listed, pacing, targeting
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import CheckpointError, DataError
from gpr_dist.hashing import hash_strings
from gpr_dist.safety import load_tensors
from gpr_dist.schema import NO_ITEM

# R requests  I catalogue items  Gr audiences  Y bytes of packed slots  X (ad, value) pairs, or (request, item) pairs

RULES, TABLES = "rules.json", "rules.safetensors"
IndexOf = Callable[[np.ndarray], np.ndarray]


class RuleConfig(Config):
    """One rule."""

    kind: Literal["targeting", "blocked", "flag", "pacing", "cap"]
    """what the column says"""
    column: str
    """of the table of ads"""
    field: str | None = None
    """of the request's audience that targeting and blocked look at; none = as the column is named"""
    within_hours: float = Field(24.0, gt=0)
    """how far back a cap counts"""

    @property
    def asks(self) -> str | None:
        """The field of the request's audience, where the rule reads one."""
        return (self.field or self.column) if self.kind in ("targeting", "blocked") else None


class RulesConfig(Config):
    """A rules file."""

    ads: Path
    """table of ads, relative to the file"""
    rules: tuple[RuleConfig, ...] = Field(min_length=1)
    """all of them must allow an ad"""


@dataclass(frozen=True)
class Rules:
    """Rules over the ads of a trie. They never change: `switched` gives new ones, requests under way go on undisturbed."""

    rules: tuple[RuleConfig, ...]
    values: tuple[tuple[str, ...], ...]  # of each rule, what its rows stand for
    tables: tuple[Table | None, ...]  # of each rule, None for a cap; the last one: ads that are in the table
    caps_I: Mapping[int, Tensor]  # rule -> most times, int32; ads without a cap have the largest number

    @property
    def fields(self) -> tuple[str, ...]:
        """Those of a request's audience."""
        return tuple(dict.fromkeys(rule.asks for rule in self.rules if rule.asks))

    def audiences(self, audience: pa.StructArray | None, key_R: np.ndarray) -> tuple[Tensor, Tensor]:
        """Packed slots of the distinct audiences among R requests: (uint8 [Gr, Y], int64 [R]).

        Args: audience: strings by `fields`; None only where there are none. key_R: int64, which pacing draws by.
        """
        tables = [table for table in self.tables if table is not None]
        fields = {"request": torch.from_numpy(key_R)}
        for number, rule in enumerate(self.rules):
            if rule.asks:
                row = pc.fill_null(pc.index_in(pc.struct_field(audience, rule.asks), pa.array(self.values[number], pa.string())), -1)
                fields[str(number)] = torch.from_numpy(row.to_numpy(zero_copy_only=False).astype(np.int64))
        return reduce(and_, tables).audiences(fields)

    def capped(self, request_N: np.ndarray, item_N: np.ndarray, age_s_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(request_X, item_X) that a cap forbids. Args: past ads of all requests, and how old they are, seconds > 0."""
        found = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
        for number, cap_I in self.caps_I.items():
            recent = age_s_N <= 3600 * self.rules[number].within_hours
            stride = len(cap_I)
            pair, count = np.unique(request_N[recent] * stride + item_N[recent], return_counts=True)
            over = capped(*(torch.from_numpy(x) for x in (pair // stride, pair % stride, count)), cap_I)
            found.append(tuple(part.numpy() for part in over))
        return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))

    def switched(self, column: str, items: Tensor, allowed: bool) -> "Rules":
        """Rules in which a flag of some ads is other than in the table, e.g. a budget that ran out. Raises: DataError for no such flag."""
        flags = [number for number, rule in enumerate(self.rules) if rule.kind == "flag" and rule.column == column]
        if not flags:
            raise DataError(f"no rule is a flag of column {column!r}; flags: {[rule.column for rule in self.rules if rule.kind == 'flag']}")
        tables = list(self.tables)
        tables[flags[0]] = tables[flags[0]].with_items(items, allowed)
        return replace(self, tables=tuple(tables))

    def save(self, folder: Path) -> None:
        """Write two files into a bundle."""
        tensors = {f"table_{n}": table.rows_RY.cpu().contiguous() for n, table in enumerate(self.tables) if table is not None}
        save_file(tensors | {f"cap_{n}": cap_I.cpu() for n, cap_I in self.caps_I.items()}, folder / TABLES)
        content = [{"rule": rule.model_dump(), "values": values} for rule, values in zip(self.rules, self.values, strict=True)]
        (folder / RULES).write_text(json.dumps(content))

    @classmethod
    def load(cls, folder: Path, trie: Trie) -> "Rules | None":
        """Those of a bundle, None where it has none. Raises: CheckpointError when they are not of this trie."""
        if not (folder / RULES).is_file():
            return None
        content, tensors = json.loads((folder / RULES).read_text()), load_tensors(folder / TABLES, CheckpointError, device=str(trie.device))
        rules = tuple(build_config(RuleConfig, entry["rule"], str(folder / RULES)) for entry in content)
        values = tuple(tuple(entry["values"]) for entry in content)
        num_bytes = -(-trie.slot_item.numel() // 8)
        if any(tensor.shape[-1] != num_bytes for name, tensor in tensors.items() if name.startswith("table")):
            raise CheckpointError(f"{folder / TABLES} is not of the ads of {folder}; export the bundle again with launch/export.py")
        tables = [_table(rule, trie, tensors[f"table_{n}"], n) if rule.kind != "cap" else None for n, rule in enumerate(rules)]
        return cls(rules, values, (*tables, Table(trie, tensors[f"table_{len(rules)}"])),
                   {n: tensors[f"cap_{n}"] for n, rule in enumerate(rules) if rule.kind == "cap"})


def compile_rules(config: RulesConfig, folder: Path, trie: Trie, index_of: IndexOf, num_items: int) -> tuple[Rules, int]:
    """Rules over the ads of `trie`. Args: folder: of the rules file. index_of: hashes of item ids → catalogue indices.

    Returns: the rules; rows of the table whose item the catalogue does not have, which are ignored.
    Raises: DataError for a missing column, a wrong type or range, an ad that is listed twice.
    """
    path = config.ads if config.ads.is_absolute() else folder / config.ads
    table = _read_table(path)
    index = index_of(hash_strings(_column(table, "item_id", path).cast(pa.string())))
    known = index != NO_ITEM
    unknown, index, table = int((~known).sum()), index[known].astype(np.int64), table.filter(pa.array(known))
    if len(np.unique(index)) != len(index):
        raise DataError(f"{path} lists an ad twice; keep one row for each")
    item = torch.from_numpy(index)
    values, tables, caps_I = [], [], {}
    for number, rule in enumerate(config.rules):
        column, names, made = _column(table, rule.column, path), (), None
        if rule.asks:
            lists = _lists(column, path, rule.column)
            flat, row = pc.list_flatten(lists), pc.list_parent_indices(lists)
            said = pc.fill_null(pc.not_equal(flat, ""), False)
            flat, row = flat.filter(said), np.array(row.filter(said))
            encoded = pc.dictionary_encode(flat)
            names = tuple(encoded.dictionary.to_pylist())
            codes = torch.from_numpy(np.array(encoded.indices, np.int64))
            make = targeting if rule.kind == "targeting" else listed
            made = make(trie, str(number), len(names), item[torch.from_numpy(row)], codes)
            made = ~made if rule.kind == "blocked" else made
            made = replace(_as_table(made), field=str(number))
        elif rule.kind == "flag":
            allowed_I = torch.zeros(num_items, dtype=torch.bool)
            allowed_I[item] = torch.from_numpy(_numbers(column, path, rule.column, 0, 1, 0.0) > 0)
            made = flag(trie, allowed_I)
        elif rule.kind == "pacing":
            rate_I = torch.ones(num_items)
            rate_I[item] = torch.from_numpy(_numbers(column, path, rule.column, 0, 1, 1.0)).float()
            made = pacing(trie, rate_I, "request")
        else:
            largest = np.iinfo(np.int32).max
            caps_I[number] = torch.full((num_items,), largest, dtype=torch.int32)
            caps_I[number][item] = torch.from_numpy(_numbers(column, path, rule.column, 0, largest, largest).astype(np.int32))
        values.append(names)
        tables.append(made)
    in_table_I = torch.zeros(num_items, dtype=torch.bool)
    in_table_I[item] = True
    return Rules(config.rules, tuple(values), (*tables, flag(trie, in_table_I)), caps_I), unknown


def _as_table(rule: Any) -> Table:
    """A rule over one table as a table: `~` of it."""
    if isinstance(rule, Table):
        return rule
    table, = rule.tables()
    return replace(table, rows_RY=rule.evaluate([torch.arange(len(table.rows_RY), device=table.rows_RY.device)]))


def _table(rule: RuleConfig, trie: Trie, rows_RY: Tensor, number: int) -> Table:
    if rule.asks:
        return Table(trie, rows_RY, str(number))
    return Table(trie, rows_RY, "request", len(rows_RY) - 1) if rule.kind == "pacing" else Table(trie, rows_RY)


def _read_table(path: Path) -> pa.Table:
    try:
        if path.suffix == ".parquet":
            return pq.read_table(path)
        if path.suffix == ".csv":
            return pv.read_csv(path, convert_options=pv.ConvertOptions(column_types={"item_id": pa.string()}, strings_can_be_null=True))
        with pa.memory_map(str(path)) as file:
            return pa.ipc.open_file(file).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"table of ads {path} cannot be read ({error})") from None


def _column(table: pa.Table, name: str, path: Path) -> pa.Array:
    if name not in table.column_names:
        raise DataError(f"table of ads {path} has no column {name!r}; it has {', '.join(table.column_names)}")
    return table[name].combine_chunks()


def _lists(column: pa.Array, path: Path, name: str) -> pa.Array:
    """list<string>; null = none."""
    if pa.types.is_integer(column.type) or pa.types.is_null(column.type):
        column = column.cast(pa.string())
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        column = pc.split_pattern(column, "|")
    try:
        return column.cast(pa.list_(pa.string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{path}: column {name} is {column.type}, expected lists of strings, or strings ({error})") from None


def _numbers(column: pa.Array, path: Path, name: str, least: float, most: float, missing: float) -> np.ndarray:
    try:
        numbers = pc.fill_null(column.cast(pa.int8() if pa.types.is_boolean(column.type) else pa.float64()).cast(pa.float64()), missing)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{path}: column {name} is {column.type}, expected numbers ({error})") from None
    found = np.array(numbers)
    if not ((found >= least) & (found <= most)).all():
        raise DataError(f"{path}: column {name} has {found[~((found >= least) & (found <= most))][0]}, expected {least:g} to {most:g}")
    return found
