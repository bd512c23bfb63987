"""Rows copied from many record batches against the rows as plain Python lists."""

import itertools

import numpy as np
import pyarrow as pa
import pytest
from journeys_fixture import random_journeys

from gpr_dist.data.collate import SIDE_COLUMNS, STORED, TOKEN_COLUMNS
from gpr_dist.data.rows import StoredRows
from gpr_dist.errors import DataError
from gpr_dist.schema import JOURNEY_SCHEMA

COLUMNS = [name for name in JOURNEY_SCHEMA.names if name != "user_id"]


def decoded(journeys, sizes, compression=None):
    """The journeys in record batches of these sizes, as decoded from Arrow IPC."""
    batches, start = [], 0
    for size in sizes:
        options = pa.ipc.IpcWriteOptions(compression=compression)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, journeys.schema, options=options) as writer:
            writer.write_batch(journeys.slice(start, size))
        batches.append(pa.ipc.open_stream(sink.getvalue()).read_next_batch())
        start += size
    return batches


def as_lists(columns):
    lists = {name: (columns.token_offsets, columns.tokens[name]) for name in TOKEN_COLUMNS if name in columns.tokens} | columns.sides
    out = {name: [values[a:b].tolist() for a, b in itertools.pairwise(offsets)] for name, (offsets, values) in lists.items()}
    return out | {"num_context": columns.num_context.tolist(), "num_lookahead": columns.num_lookahead.tolist()}


@pytest.mark.parametrize("compression", [None, "zstd"])
@pytest.mark.parametrize("seed", range(4))
def test_any_rows_of_many_batches_in_any_order(seed, compression):
    journeys = random_journeys(90, seed)
    rng = np.random.default_rng(seed)
    rows = np.concatenate([rng.permutation(90), rng.integers(0, 90, 30)])  # a row may be asked for twice
    stored = StoredRows.of(decoded(journeys, [1, 0, 40, 7, 42], compression), COLUMNS)
    copied = stored.take(rows)
    expected = journeys.to_pylist()
    for name, lists in as_lists(copied).items():
        assert repr(lists) == repr([expected[row][name] for row in rows]), name  # as text NaN equals NaN
    assert set(copied.tokens) | set(copied.sides) == set(STORED)
    assert all(values.dtype == STORED[name] for name, values in copied.tokens.items())
    assert all(values.dtype == STORED[name] for name, (_, values) in copied.sides.items())


def test_copies_and_rows_keep_what_they_need():
    journeys = random_journeys(200)
    stored = StoredRows.of(decoded(journeys, [200]), COLUMNS)  # the batch is kept by nothing else
    allocated = pa.total_allocated_bytes()
    copied = stored.take(np.arange(200))
    expected = repr(as_lists(copied))
    stored.take(np.arange(200))  # what is not kept is given back
    assert pa.total_allocated_bytes() <= allocated + 8 * sum(values.nbytes for values in copied.tokens.values())
    del stored
    decoded(random_journeys(200, 1), [200])
    assert repr(as_lists(copied)) == expected


def test_nothing_of_something_and_something_of_nothing():
    some, none = StoredRows.of(decoded(random_journeys(5), [5]), COLUMNS), StoredRows.of([], COLUMNS)
    empty = pa.RecordBatch.from_pylist([dict(random_journeys(1).to_pylist()[0], **{name: [] for name in STORED},
                                             num_context=0, num_lookahead=0)] * 3, JOURNEY_SCHEMA)
    for copied, rows in ((some.take(np.zeros(0, np.int64)), 0), (none.take(np.zeros(0, np.int64)), 0),
                         (StoredRows.of(decoded(empty, [3]), COLUMNS).take(np.array([2, 0])), 2)):
        assert copied.num_rows == rows and copied.token_offsets.tolist() == [0] * (rows + 1)
        assert set(copied.tokens) == set(TOKEN_COLUMNS) and all(len(values) == 0 for values in copied.tokens.values())
        assert set(copied.sides) == set(SIDE_COLUMNS)


def test_only_the_columns_asked_for():
    journeys = random_journeys(30, 2)
    rows = np.random.default_rng(0).permutation(30)
    wanted = ["num_context", "num_lookahead", "token_type", "item", "value"]
    some, every = (StoredRows.of(decoded(journeys, [12, 18]), columns).take(rows) for columns in (wanted, COLUMNS))
    assert some.tokens.keys() == {"token_type", "item", "value"} and not some.sides
    assert all(np.array_equal(values, every.tokens[name], equal_nan=True) for name, values in some.tokens.items())
    assert np.array_equal(some.token_offsets, every.token_offsets)


def test_lists_of_different_lengths_are_named():
    rows = random_journeys(20, 1).to_pylist()
    rows[13]["scene"].append(0)
    journeys = pa.RecordBatch.from_pylist(rows, JOURNEY_SCHEMA)
    with pytest.raises(DataError, match="row 5 of a record batch: scene and token_type differ in length"):
        StoredRows.of(decoded(journeys, [8, 12]), COLUMNS)


@pytest.mark.parametrize("column,place,offset", [("item", 0, -5), ("item", -1, 1 << 20), ("eligibility", 3, -5),
                                                 ("eligibility", 10, 1 << 20)])
def test_offsets_outside_the_batch_are_refused(column, place, offset):
    content = bytearray(random_journeys(20, 1).serialize().to_pybytes())
    batch = pa.ipc.read_record_batch(pa.py_buffer(content), JOURNEY_SCHEMA)
    offsets = batch.column(column).buffers()[1]
    begin = offsets.address - pa.py_buffer(content).address
    np.frombuffer(content, np.int32, 21, begin)[place] = offset
    with pytest.raises(DataError, match="lies outside its bytes"):
        StoredRows.of([batch], COLUMNS)
