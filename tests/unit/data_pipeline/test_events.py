"""What a bad row is, times of every format, time features, and the fixed-width form."""

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.events import (
    AD,
    ORGANIC,
    BadRows,
    SourceBatch,
    encode_events,
    event_fingerprint,
    feature_names,
    validate_events,
)
from data_pipeline.sources.columns import as_flags, as_floats, as_strings, parse_times
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.hashing import time_feature
from gpr_dist.schema import EVERY_AD, Action


def table(**changes):
    columns = {"user_id": ["a", "b", "c", "d"], "item_id": ["1", "2", "3", "4"], "timestamp": pa.array([1, 2, 3, 4], pa.int64()),
               "kind": pa.array([AD, AD, ORGANIC, AD], pa.uint8()), "action": pa.array([2, 3, 4, 4], pa.uint8())}
    return pa.table(columns | changes)


def test_good_rows_pass_and_get_every_column():
    bad = BadRows()
    rows = validate_events(SourceBatch(table(), "log", 1), bad)
    assert (bad.total, bad.bad) == (4, 0) and rows.num_rows == 4
    records = encode_events(rows, ("age",), ())
    assert records["action"].tolist() == [Action.IMPRESSION, Action.CLICK, Action.CONSUME, Action.CONVERSION]  # organic is CONSUME
    assert np.isnan(records["value"]).all() and (records["eligibility"] == EVERY_AD).all() and (records["request"] == 0).all()
    assert (records["scene"] == 0).all() and (records["user_features"] == 0).all()
    assert len(set(event_fingerprint(records).tolist())) == 4


@pytest.mark.parametrize("dictionary", [False, True])
def test_each_bad_row_counts_once_under_its_first_reason(dictionary):
    users = pa.array([None, "b", "", "d"])
    bad = BadRows()
    changes = {"user_id": users.dictionary_encode() if dictionary else users, "timestamp": pa.array([None, None, 1, 5], pa.int64())}
    rows = validate_events(SourceBatch(table(**changes), "log.csv", 101), bad)
    assert rows["item_id"].to_pylist() == ["4"]
    assert dict(bad.reasons) == {"missing user id": 2, "unparsable time": 1} and (bad.total, bad.bad) == (4, 3)
    assert bad.shown == ["log.csv row 101: missing user id", "log.csv row 102: unparsable time", "log.csv row 103: missing user id"]
    bad.check(0.75)
    with pytest.raises(DataError, match=r"3 of 4 log rows are bad .* max_bad_frac=0.7; first: log.csv row 101"):
        bad.check(0.7)


def test_further_reasons():
    bad = BadRows(num_shown=2)
    changes = {"kind": pa.array([None, 1, 1, 1], pa.uint8()), "action": pa.array([2, None, 2, 2], pa.uint8()),
               "timestamp": pa.array([1, 1, 1 << 40, -5], pa.int64())}
    rows = validate_events(SourceBatch(table(**changes), "x", 1, malformed=3, malformed_shown=("line 9",)), bad)
    assert rows.num_rows == 0 and bad.total == 7 and bad.bad == 7 and bad.shown == ["line 9", "x row 1: unknown kind"]
    other = BadRows(num_shown=2)
    other.add(bad)
    other.add(bad)
    assert other.total == 14 and other.shown == bad.shown and other.reasons["a wrong number of columns"] == 6


def chunked(values, kind=None):
    return pa.chunked_array([pa.array(values, kind)])


@pytest.mark.parametrize(("column", "time_format", "expected"), [
    (chunked([1500, None, -1], pa.int64()), "ms", [1, None, -1]),
    (chunked([1.5, float("nan"), 1e30]), "s", [1, None, None]),
    (chunked([" 12", "x", None, "13.7"]), "s", [12, None, None, 13]),
    (chunked([10**15]), "ns", [10**6]),
    (chunked(["1970-01-02", "1970-01-01T00:00:05", "1970-01-01 00:00:06.9", "1970-01-01T01:00:07+01:00", "1970-01-01T00:00:08Z", "no", "",
              None, "1970-01-01 00:01", "1970-13-01"]), "iso", [86400, 5, 6, 7, 8, None, None, None, 60, None]),
    (chunked(["02/01/1970 00:00:01", "31/02/1970 00:00:00"]), "%d/%m/%Y %H:%M:%S", [86401, None]),
    (chunked(["19700103", "x"]), "%Y%m%d", [2 * 86400, None]),
    (chunked([1500, -1500, None], pa.timestamp("ms")), None, [1, -2, None]),
    (chunked([1500], pa.timestamp("ms", "Europe/Vienna")), None, [1]),
    (chunked([2], pa.date32()), None, [2 * 86400]),
    (chunked([], pa.string()), "iso", []),
])
def test_parse_times(column, time_format, expected):
    found = parse_times(column, time_format, "here")
    assert found.type == pa.int64() and found.to_pylist() == expected


def test_numbers_without_a_unit_are_refused():
    with pytest.raises(ConfigError, match="here is int64, which does not tell its unit; set time_format"):
        parse_times(chunked([1], pa.int64()), None, "here")


def test_columns_of_other_types():
    assert as_strings(chunked([1, None])).to_pylist() == ["1", None]
    assert as_strings(chunked([1.0, None, float("nan")])).to_pylist() == ["1", None, None]
    assert as_strings(pa.chunked_array([pa.array([7, 8]).dictionary_encode()])).to_pylist() == ["7", "8"]
    assert as_flags(chunked(["1", "FALSE", None, "maybe"])).to_pylist() == [True, False, False, None]
    assert as_flags(chunked([2, 0, None])).to_pylist() == [True, False, False]
    numbers, unreadable = as_floats(chunked(["1.5", "", None, "much"]))
    assert numbers.to_pylist() == [1.5, None, None, None] and unreadable.tolist() == [False, False, False, True]


def test_time_features_and_names():
    time = pa.chunked_array([pa.array([0, 86400 * 4 + 3600 * 5])])  # Thursday 1970-01-01 00:00, Monday 05:00
    found = {name: time_feature(name, time).to_pylist() for name in ("hour", "day_of_week", "week_of_year")}
    assert found == {"hour": ["0", "5"], "day_of_week": ["3", "0"], "week_of_year": ["1", "2"]}
    with pytest.raises(ConfigError, match="unknown time feature 'minute'"):
        time_feature("minute", time)
    assert feature_names(["user_id", "user.age", "env.hour"], "env") == ("hour",)
