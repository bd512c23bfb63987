"""The request format: JSON lines or Arrow tables in, columns out; what is wrong with a request is told per request.

    {"id": "r-1", "user": "2375", "user_features": {"age": "35-44"}, "time": 1512120000, "env": {"store": "412"},
     "history": [{"item_id": "1029743", "type": "organic", "time": 1512033600, "value": 2.5},
                 {"item_id": "883404", "type": "ad", "action": "click", "time": 1512033600, "scene": "display=9|mailer=A",
                  "value": 1.0, "request": "b-7", "env": {"store": "412"}}],
     "eligible": ["883404", "1029743"], "exclude": ["1029743"], "k": 10}

Only `time` is required (seconds since 1970, UTC; as in the training logs). An Arrow or Parquet file has the same names as columns.
- `user`: id as in the logs, any string for a new one; `user_features`, `env`: names as in the bundle's settings, string values, what
  is left out is unknown. Features of the time (hour, ...) may be left out: they are made from `time` where training made them so.
- `history`: what the user did before, oldest first by custom, in any order in fact. `type` is ad or organic, `action` of an ad is
  impression, click or conversion. `scene`, `value`, `pctr`, `pcvr`: as logged. `request` groups the ads of one earlier request (none =
  those of the same second); its `env` belongs to that request, as do `user_features` that the log has with every event. Events that
  are not strictly before `time`, and ads whose `request` is this request's `id`, are left out, as in training; so are unknown items.
- Which ads may be shown: `eligible` lists them, or `group` is a row of the bundle's eligibility.arrow, or `placement` the name the
  export gave to such a row; none of them = every ad of the catalogue. `exclude` takes ads away from any.
- `audience`: {"country": "DE"}, what the bundle's targeting rules ask; names as in the bundle's settings.
- `k`: ads wanted. `knowledge`: m lists of E floats, for a model that reads external knowledge; left out = unknown user.
"""

import difflib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from gpr_dist.errors import DataError
from gpr_dist.schema import Action
from gpr_dist.serving.settings import BundleSettings, RequestSettings

# N events of all requests  R requests

MAX_TIME = 1 << 33  # seconds, year 2242: a time beyond it is milliseconds read as seconds
EVENT_TYPES = ("organic", "ad")
AD_ACTIONS = {"impression": Action.IMPRESSION, "click": Action.CLICK, "conversion": Action.CONVERSION}


@dataclass
class Parsed:
    """The good requests of a chunk, and what is wrong with the others."""

    requests: pa.RecordBatch  # of request_schema
    number: np.ndarray  # int64, place of each request in the chunk
    errors: dict[int, str]  # place in the chunk -> message


def request_schema(settings: RequestSettings) -> pa.Schema:
    """Columns of a table of requests; in JSON, the fields of a line."""
    event = [("item_id", pa.string()), ("type", pa.string()), ("time", pa.int64()), ("action", pa.string()), ("scene", pa.string()),
             ("value", pa.float32()), ("pctr", pa.float32()), ("pcvr", pa.float32()), ("request", pa.string()), ("group", pa.int32()),
             *_features(settings)]
    fields = [("id", pa.string()), ("user", pa.string()), ("time", pa.int64()), *_features(settings),
              ("history", pa.list_(pa.struct(event))), ("eligible", pa.list_(pa.string())), ("group", pa.int32()),
              ("placement", pa.string()), ("exclude", pa.list_(pa.string())), ("k", pa.int32())]
    if settings.audience_fields:
        fields.append(("audience", pa.struct([(name, pa.string()) for name in settings.audience_fields])))
    if settings.num_knowledge_vectors:
        fields.append(("knowledge", pa.list_(pa.list_(pa.float32()))))
    return pa.schema(fields)


def parse_lines(lines: Sequence[bytes], bundle: BundleSettings, num_groups: int) -> Parsed:
    """Requests of JSON lines. Arrow parses all at once; only where it finds something wrong are they parsed one by one."""
    schema = request_schema(bundle.requests)
    try:
        table, number, errors = _parse(lines, schema), np.arange(len(lines)), {}
    except (pa.ArrowInvalid, UnicodeDecodeError, ValueError):
        tables, number, errors = [], [], {}
        for place, line in enumerate(lines):
            try:
                tables.append(_parse([line], schema))
                number.append(place)
            except (pa.ArrowInvalid, UnicodeDecodeError, ValueError) as error:
                errors[place] = _explain(line, schema, error)
        table, number = pa.concat_tables([schema.empty_table(), *tables]), np.array(number, np.int64)
    return _checked(table, number, errors, bundle, num_groups)


def parse_table(table: pa.Table, bundle: BundleSettings, num_groups: int) -> Parsed:
    """Requests of an Arrow table, whose columns may be fewer than those of `request_schema` and in another order.

    Raises: DataError for an unknown column or one of another type: then no row can be trusted.
    """
    schema = request_schema(bundle.requests)
    columns = []
    for name in table.column_names:
        if name not in schema.names:
            raise DataError(f"requests have a column {name!r}{_near(name, schema.names)}; columns of a request: {', '.join(schema.names)}")
    for field in schema:
        found = table[field.name] if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        try:
            columns.append(_conform(found, field.type, field.name))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise DataError(f"requests: column {field.name} is {found.type}, expected {field.type} ({error})") from None
    return _checked(pa.table(columns, schema=schema), np.arange(table.num_rows), {}, bundle, num_groups)


def _features(settings: RequestSettings) -> list[tuple[str, pa.DataType]]:
    groups = (("user_features", settings.user_features), ("env", settings.env_features))
    return [(name, pa.struct([(feature, pa.string()) for feature in features])) for name, features in groups if features]


def _parse(lines: Sequence[bytes], schema: pa.Schema) -> pa.Table:
    if not lines:
        return schema.empty_table()
    text = b"\n".join(lines)
    text.decode()  # Arrow does not check
    if not all(line.strip()[:1] == b"{" and line.strip()[-1:] == b"}" for line in lines):
        raise ValueError("a request is one JSON object on one line")
    table = pj.read_json(io.BytesIO(text), pj.ReadOptions(use_threads=False, block_size=len(text) + 1),
                         pj.ParseOptions(schema, newlines_in_values=False, unexpected_field_behavior="error"))
    if table.num_rows != len(lines):
        raise ValueError("a request is one JSON object on one line")
    return table.select(schema.names)


def _explain(line: bytes, schema: pa.Schema, error: Exception) -> str:
    """Arrow says what is wrong, but not which field it did not expect."""
    try:
        unknown = _unknown_field(json.loads(line), {field.name: field.type for field in schema}, "")
    except (ValueError, UnicodeDecodeError, RecursionError):
        unknown = None
    return unknown or _plain(" ".join(str(error).removesuffix(" in row 0").split()))


def _plain(message: str) -> str:
    """Arrow's words about a field of another type, as ours."""
    if found := re.search(r"Column\(/(\S*)\) changed from (\w+) to (\w+)", message):
        return f"{found[1].replace('/[]', '').replace('/', '.')} is of type {found[3]}, expected {found[2]}"
    if found := re.search(r"Failed to convert JSON to int\d+, couldn't parse:\s*(\S+)", message):
        return f"{found[1]} is not a whole number (times are whole seconds since 1970)"
    if found := re.search(r"Column\(/(\S*)\) was specified twice", message):
        return f"{found[1].replace('/[]', '').replace('/', '.')} is given twice"
    return message


def _unknown_field(value: object, known: Mapping[str, pa.DataType], where: str) -> str | None:
    if not isinstance(value, dict):
        return None
    for name, inner in value.items():
        if name not in known:
            return f"unknown field {where}{name}{_near(name, list(known))}"
        kind, inner = known[name], inner if isinstance(inner, list) else [inner]
        kind = kind.value_type if pa.types.is_list(kind) else kind
        if pa.types.is_struct(kind):
            fields = {kind.field(at).name: kind.field(at).type for at in range(kind.num_fields)}
            found = next(filter(None, (_unknown_field(one, fields, f"{where}{name}.") for one in inner)), None)
            if found:
                return found
    return None


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _conform(column: pa.ChunkedArray | pa.Array, kind: pa.DataType, where: str) -> pa.Array:
    """A column as `kind`; fields that a struct lacks become null, those it has too many of are refused."""
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_struct(kind) and pa.types.is_struct(column.type):
        names = [column.type.field(at).name for at in range(column.type.num_fields)]
        known = [kind.field(at).name for at in range(kind.num_fields)]
        for name in names:
            if name not in known:
                raise DataError(f"requests: unknown field {where}.{name}{_near(name, known)}")
        inner = [_conform(pc.struct_field(column, name) if name in names else pa.nulls(len(column), kind.field(at).type),
                          kind.field(at).type, f"{where}.{name}") for at, name in enumerate(known)]
        return pa.StructArray.from_arrays(inner, fields=list(kind), mask=pc.is_null(column))
    if pa.types.is_list(kind) and (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        return pa.ListArray.from_arrays(offsets, _conform(column.flatten(), kind.value_type, where), mask=pc.is_null(column))
    return column.cast(kind)


def _checked(table: pa.Table, number: np.ndarray, errors: dict[int, str], bundle: BundleSettings, num_groups: int) -> Parsed:
    """Leave out the requests whose values make no sense."""
    requests = table.combine_chunks().to_batches()[0] if table.num_rows else pa.RecordBatch.from_pylist([], table.schema)
    bad = np.zeros(len(number), bool)
    for message, wrong in _problems(requests, bundle, num_groups):
        for row in np.flatnonzero(wrong & ~bad).tolist():
            errors[int(number[row])] = message(row) if callable(message) else message
        bad |= wrong
    return Parsed(requests.filter(pa.array(~bad)) if bad.any() else requests, number[~bad], errors)


def _problems(requests: pa.RecordBatch, bundle: BundleSettings, num_groups: int):
    """Yields (message, or a function of the row that makes it; bool [R])."""
    num_requests, settings, max_k = requests.num_rows, bundle.requests, bundle.max_k
    events, owner = flat(requests["history"])

    def of_request(wrong_N: pa.Array | np.ndarray) -> np.ndarray:
        wrong_N = np.asarray(pc.fill_null(wrong_N, True)) if isinstance(wrong_N, pa.Array) else wrong_N
        return np.bincount(owner[wrong_N], minlength=num_requests) > 0

    def text(name: str):
        return lambda row: f"{name} is {requests[name][row].as_py()}, "

    time, k, group = requests["time"], requests["k"], requests["group"]
    yield "time is missing: seconds since 1970", _mask(pc.is_null(time))
    yield (lambda row: text("time")(row) + "expected seconds since 1970 (up to the year 2242); milliseconds?"), _outside(time, MAX_TIME)
    yield (lambda row: text("k")(row) + f"expected 1 to {max_k}, the beam width"), _mask(pc.or_kleene(pc.less(k, 1), pc.greater(k, max_k)))
    yield (lambda row: text("group")(row) + f"the bundle has groups 0 to {num_groups - 1}, or -1 for every ad"), \
        _mask(pc.or_kleene(pc.less(group, -1), pc.greater_equal(group, num_groups)))
    placement = requests["placement"]
    named = pc.is_in(placement, pa.array(list(bundle.placements), pa.string()))
    yield ((lambda row: f"unknown placement {placement[row].as_py()!r}; the bundle has {', '.join(bundle.placements) or 'none'}"),
           _mask(pc.is_valid(placement)) & ~_mask(named))
    given = sum(_mask(pc.is_valid(requests[name])).astype(int) for name in ("eligible", "group", "placement"))
    yield "more than one of eligible, group and placement is given; give one of them", given > 1
    for name in ("eligible", "exclude"):
        ids, of = flat(requests[name])
        yield f"{name} has an ad that is null", np.bincount(of[_mask(pc.is_null(ids))], minlength=num_requests) > 0
    item, kind, when, action = (pc.struct_field(events, name) for name in ("item_id", "type", "time", "action"))
    yield "history has an event without item_id", of_request(_mask(pc.or_kleene(pc.is_null(item), pc.equal(item, ""))))
    yield "history has an event whose type is neither ad nor organic", of_request(pc.invert(pc.is_in(kind, pa.array(EVENT_TYPES))))
    yield ("history has an event without a time, or with one outside 1970..2242 (milliseconds?)",
           of_request(_mask(pc.is_null(when)) | _outside(when, MAX_TIME)))
    known = pc.is_in(action, pa.array(list(AD_ACTIONS)))
    yield (f"history has an ad whose action is none of {', '.join(AD_ACTIONS)}",
           of_request(_mask(pc.and_kleene(pc.equal(kind, "ad"), pc.invert(known)))))
    if settings.num_knowledge_vectors:
        yield (f"knowledge is not {settings.num_knowledge_vectors} lists of {settings.knowledge_width} finite numbers",
               _wrong_knowledge(requests["knowledge"], settings))


def flat(lists: pa.ListArray) -> tuple[pa.Array, np.ndarray]:
    """Values of all lists, and which list each belongs to, int64; a null list is empty."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    return lists.flatten(), np.repeat(np.arange(len(lists)), lengths)


def _mask(condition: pa.Array) -> np.ndarray:
    return pc.fill_null(condition, False).to_numpy(zero_copy_only=False)


def _outside(column: pa.Array, end: int) -> np.ndarray:
    return _mask(pc.or_kleene(pc.less(column, 0), pc.greater_equal(column, end)))


def _wrong_knowledge(column: pa.ListArray, settings: RequestSettings) -> np.ndarray:
    vectors, of = flat(column)
    numbers, of_vector = flat(vectors)
    bad = np.zeros(len(of), bool)
    bad[of_vector[~_mask(pc.is_finite(numbers))]] = True
    bad |= np.bincount(of_vector, minlength=len(of)) != settings.knowledge_width
    counts = np.bincount(of, minlength=len(column))
    return (np.bincount(of[bad], minlength=len(column)) > 0) | (_mask(pc.is_valid(column)) & (counts != settings.num_knowledge_vectors))
