"""A malformed request is named with its place and what is wrong; the others are read as they are."""

import json

import pyarrow as pa
import pytest

from gpr_dist.errors import DataError
from gpr_dist.serving.requests import parse_lines, parse_table, request_schema
from gpr_dist.serving.settings import BundleSettings, RequestSettings

SETTINGS = RequestSettings(user_features=("age",), env_features=("store", "hour"), user_tokens="row", env_tokens=True, max_tokens=32,
                           context_tokens=32, max_organic_per_block=8)
KNOWING = SETTINGS.model_copy(update={"num_knowledge_vectors": 2, "knowledge_width": 3})


def bundle_of(settings=SETTINGS):
    return BundleSettings(requests=settings, search={"width": 10}, placements={"feed": 2}, num_items=5, catalogue_fingerprint="f")


GOOD = {"id": "r", "user": "u", "time": 100, "env": {"store": "s"}, "history": [
    {"item_id": "a", "type": "ad", "action": "click", "time": 5, "env": {"store": "t"}}, {"item_id": "b", "type": "organic", "time": 6}],
    "k": 3}


def parse(*lines, settings=SETTINGS):
    return parse_lines([line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines],
                       bundle_of(settings), 4)


def test_good_requests_are_read_as_they_are():
    parsed = parse(GOOD, {"time": 7})
    assert parsed.errors == {} and parsed.number.tolist() == [0, 1]
    first, second = parsed.requests.to_pylist()
    assert first["history"][0]["env"] == {"store": "t", "hour": None} and first["k"] == 3 and first["history"][1]["action"] is None
    assert second["history"] is None and second["user"] is None and second["time"] == 7
    assert parse().requests.num_rows == 0


@pytest.mark.parametrize(("line", "message"), [
    (b'{"time": 1,}', "Missing a name"), (b'{"time": 1', "one JSON object"), (b"nonsense", "one JSON object"),
    (b"[1]", "one JSON object"), (b'{"time":1}{"time":2}', "one JSON object"),
    (b'{"id":"\xff","time":1}', "utf-8"), ({"tiem": 1}, "unknown field tiem; did you mean time"),
    ({"time": 1, "env": {"stor": "x"}}, "unknown field env.stor; did you mean store"),
    ({"time": 1, "history": [{"item": "x"}]}, "unknown field history.item"),
    ({"time": "now"}, "time"), ({"time": 1, "id": 5}, "id"), ({"time": 1.5}, "1.5"), ({"id": "x"}, "time is missing"),
    ({"time": 1_512_120_000_000}, "milliseconds"), ({"time": -1}, "time is -1"), ({"time": 1, "k": 0}, "k is 0, expected 1 to 10"),
    ({"time": 1, "k": 11}, "k is 11"), ({"time": 1, "group": 4}, "groups 0 to 3"), ({"time": 1, "group": -2}, "group is -2"),
    ({"time": 1, "group": 1, "eligible": []}, "more than one of"),
    ({"time": 1, "placement": "search"}, "unknown placement 'search'; the bundle has feed"),
    ({"time": 1, "placement": "feed", "group": 1}, "more than one of"),
    ({"time": 1, "eligible": [None]}, "eligible has an ad that is null"),
    ({"time": 1, "exclude": [None]}, "exclude has"), ({"time": 1, "history": [None]}, "without item_id"),
    ({"time": 1, "history": [{"type": "ad", "time": 1, "action": "click"}]}, "without item_id"),
    ({"time": 1, "history": [{"item_id": "a", "type": "advert", "time": 1}]}, "neither ad nor organic"),
    ({"time": 1, "history": [{"item_id": "a", "type": "organic"}]}, "without a time"),
    ({"time": 1, "history": [{"item_id": "a", "type": "organic", "time": 10**13}]}, "without a time, or with one outside"),
    ({"time": 1, "history": [{"item_id": "a", "type": "ad", "time": 1}]}, "impression, click, conversion"),
    ({"time": 1, "history": [{"item_id": "a", "type": "ad", "time": 1, "action": "clicked"}]}, "action is none of"),
    ({"time": 1, "knowledge": [[1, 2, 3]]}, "unknown field knowledge"),
])
def test_a_malformed_request_is_named_and_the_others_are_read(line, message):
    parsed = parse(GOOD, line, {"time": 9})
    assert list(parsed.errors) == [1] and message in parsed.errors[1], parsed.errors
    assert parsed.number.tolist() == [0, 2] and parsed.requests["time"].to_pylist() == [100, 9]


@pytest.mark.parametrize("bad", [[[1, 2, 3]], [[1, 2, 3], [1, 2]], [[1, 2, 3], [1, 2, None]], [], [[1, 2], [1, 2]]])
def test_knowledge_has_the_shape_of_the_model(bad):
    parsed = parse({"time": 1, "knowledge": [[1, 2, 3], [4, 5, 6]]}, {"time": 2, "knowledge": bad}, {"time": 3}, settings=KNOWING)
    assert list(parsed.errors) == [1] and "2 lists of 3 finite numbers" in parsed.errors[1]


def test_a_table_may_have_fewer_columns_in_any_order():
    history = [[{"time": 5, "item_id": "a", "type": "organic"}], None]
    table = pa.table({"k": pa.array([2, None], pa.int64()), "time": pa.array([10, 20]), "history": history})
    parsed = parse_table(table, bundle_of(), 4)
    assert parsed.errors == {} and parsed.requests.schema == request_schema(SETTINGS)
    lines = parse({"time": 10, "k": 2, "history": history[0]}, {"time": 20})
    assert parsed.requests.to_pylist() == lines.requests.to_pylist()
    sliced = parse_table(table.slice(1), bundle_of(), 4)
    assert sliced.requests.to_pylist() == lines.requests.to_pylist()[1:]


@pytest.mark.parametrize(("columns", "message"), [
    ({"tyme": [1]}, "did you mean time"), ({"time": ["now"]}, "column time"), ({"time": [1], "env": [{"shop": "x"}]}, "env.shop"),
    ({"time": [1], "history": [[{"item_id": "a", "when": 3}]]}, "history.when"),
])
def test_a_table_of_another_shape_is_refused(columns, message):
    with pytest.raises(DataError, match=message):
        parse_table(pa.table(columns), bundle_of(), 4)


def test_a_bad_row_of_a_table_is_named():
    parsed = parse_table(pa.table({"time": pa.array([1, None, 3], pa.int64())}), bundle_of(), 4)
    assert list(parsed.errors) == [1] and parsed.number.tolist() == [0, 2]
