"""What the hashed categories in the shards were called: the most frequent values of scene and of every feature, for reports.

Shards keep hashes only, and a vocabulary of every value would grow with the logs; this one holds at most `MOST_KEPT` names per feature.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from gpr_dist.hashing import feature_id
from gpr_dist.schema import write_atomic

MOST_KEPT = 1000
NAMES_FILE = "value_names.json"

ValueNames = dict[str, Counter]
"""feature, or "scene" -> name -> how often."""


def count_names(table: pa.Table, columns: Mapping[str, str], counted: ValueNames) -> None:
    """Add the values of a batch, its most frequent ones. Args: columns: of the table -> feature."""
    for column, feature in columns.items():
        if column in table.column_names:
            found = pc.value_counts(table[column].unify_dictionaries())
            order = pc.array_sort_indices(found.field(1), order="descending")[:MOST_KEPT]
            names, counts = found.field(0).take(order).cast(pa.string()), found.field(1).take(order)
            add_names({feature: {name: count for name, count in zip(names.to_pylist(), counts.to_pylist(), strict=True)
                                 if name is not None}}, counted)


def add_names(part: Mapping[str, Mapping[str, int]], counted: ValueNames) -> None:
    """Add up, and forget rare values when there are too many."""
    for feature, counts in part.items():
        total = counted.setdefault(feature, Counter())
        total.update(counts)
        if len(total) > 4 * MOST_KEPT:
            counted[feature] = Counter(dict(most_frequent(total)))


def most_frequent(counts: Counter) -> list[tuple[str, int]]:
    """At most MOST_KEPT (name, count), ties by name."""
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[:MOST_KEPT]


def write_names(counted: ValueNames, folder: Path) -> None:
    """`value_names.json` of a data set: feature -> category as the shards have it -> name."""
    content = {}
    for feature, counts in sorted(counted.items()):
        names = [name for name, _ in most_frequent(counts)]
        ids = feature_id(pa.array(names, pa.string()), feature)
        content[feature] = dict(zip(map(str, ids.tolist()), names, strict=True))
    write_atomic(folder / NAMES_FILE, json.dumps(content, indent=0).encode())
