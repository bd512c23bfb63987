"""Events from public benchmarks that give only each user's items in order, without times; shared by movielens, amazon and llmrank.

The position in the sequence serves as the time (seconds since 1970) and every interaction is an ad with a request of its own, as in
leave-one-out evaluation of sequential recommenders.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_pipeline.events import AD, SourceBatch
from gpr_dist.errors import DataError
from gpr_dist.schema import Action


def sequence_events(user_id: pa.Array, items: pa.ListArray, file: str) -> SourceBatch:
    """One event per list entry: `items` [num users] lists of item id strings, oldest first; row numbers are those of the events."""
    lengths = pc.fill_null(pc.list_value_length(items), 0).to_numpy(zero_copy_only=False)
    starts = np.cumsum(lengths) - lengths
    position = np.arange(lengths.sum()) - np.repeat(starts, lengths)
    table = pa.table({
        "user_id": user_id.take(pa.array(np.repeat(np.arange(len(user_id)), lengths))),
        "item_id": items.flatten(),
        "timestamp": position.astype(np.int64),
        "kind": np.full(len(position), AD, np.uint8),
        "action": np.full(len(position), Action.CLICK, np.uint8),
    })
    return SourceBatch(table, file, 1)


def read_lines(path: str, encoding: str = "utf-8") -> pa.Array:
    """The non-empty lines of a text file. Raises: DataError when it is not text of that encoding."""
    with open(path, "rb") as file:
        data = file.read()
    try:
        lines = data.decode(encoding).splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not {encoding} text (byte {error.start}); is it the right file?") from None
    return pa.array([line for line in lines if line.strip()], pa.large_string())


def split_columns(lines: pa.Array, separator: str, num_columns: int, path: str, max_splits: int | None = None) -> list[pa.Array]:
    """Lines cut into exactly `num_columns` columns. Raises: DataError naming the first line that has another number of them."""
    parts = pc.split_pattern(lines, separator, max_splits=max_splits)
    wrong = np.flatnonzero(pc.list_value_length(parts).to_numpy() != num_columns)
    if len(wrong):
        raise DataError(f"{path} line {wrong[0] + 1}: expected {num_columns} columns separated by {separator!r}, found "
                        f"{len(parts[int(wrong[0])])}")
    return [pc.list_element(parts, column).cast(pa.string()) for column in range(num_columns)]


def split_words(column: pa.Array) -> pa.ListArray:
    """Space-separated item ids → lists; an empty string → no item."""
    trimmed = pc.utf8_trim_whitespace(column)
    parts = pc.ascii_split_whitespace(trimmed)
    empty = pc.equal(trimmed, "").to_numpy(zero_copy_only=False)
    if not empty.any():
        return parts
    lengths = np.where(empty, 0, pc.list_value_length(parts).to_numpy())
    keep = pc.not_equal(parts.flatten(), "")
    return pa.ListArray.from_arrays(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), parts.flatten().filter(keep))
