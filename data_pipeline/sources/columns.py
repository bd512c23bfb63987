"""Columns of any type brought into the types of events.py, without stopping at values that cannot be read: those become null."""

import re

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from gpr_dist.errors import ConfigError

UNITS_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_ISO_FORMATS = ("%Y-%m-%dT%H:%M:%S%.f%#z", "%Y-%m-%d %H:%M:%S%.f%#z", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M",
                "%Y-%m-%d %H:%M")
_TRUE, _FALSE = ("1", "1.0", "true", "t", "yes", "y"), ("0", "0.0", "false", "f", "no", "n", "")


def parse_times(column: pa.ChunkedArray, time_format: str | None, where: str) -> pa.ChunkedArray:
    """Times in whole seconds since 1970 (int64, rounded down); null where a time cannot be read.

    Raises: ConfigError when the column does not tell its unit and no format is given.
    """
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        if pa.types.is_date(kind):
            column = column.cast(pa.timestamp("s"))
        return pc.floor_temporal(column, unit="second").cast(pa.timestamp("s", column.type.tz)).cast(pa.int64())
    if time_format is None:
        raise ConfigError(f"{where} is {kind}, which does not tell its unit; set time_format to s, ms, us, ns, iso or a strptime format")
    series = pl.Series("t", _to_polars(column))
    if time_format in UNITS_PER_SECOND:
        per_second = UNITS_PER_SECOND[time_format]
        if series.dtype == pl.String:
            series = series.str.strip_chars()
            whole = series.cast(pl.Int64, strict=False)
            series = whole if whole.null_count() == series.null_count() else series.cast(pl.Float64, strict=False)
        if series.dtype.is_float():
            seconds = (series.fill_nan(None) / per_second).floor().cast(pl.Int64, strict=False)
        else:
            seconds = series.cast(pl.Int64, strict=False) // per_second
    else:
        seconds = _parse_text_times(series.cast(pl.String).str.strip_chars(), time_format)
    return _from_polars(seconds)


def _parse_text_times(text: pl.Series, time_format: str) -> pl.Series:
    if time_format != "iso":
        return _epoch(text, time_format)
    dates = text.str.len_bytes() == 10
    text = pl.select(pl.when(dates).then(text + "T00:00").otherwise(text)).to_series()
    seconds = pl.Series("t", [None], pl.Int64).new_from_index(0, len(text)) if len(text) else pl.Series("t", [], pl.Int64)
    for iso_format in _ISO_FORMATS:  # usually the first or second reads all; later ones see only what is left
        left = seconds.is_null() & text.is_not_null()
        if not left.any():
            break
        rows = left.arg_true()
        seconds = seconds.scatter(rows, _epoch(text.gather(rows), iso_format))
    return seconds


def _epoch(text: pl.Series, time_format: str) -> pl.Series:
    zoned = "z" in re.findall(r"%[.:#]*(\w)", time_format)
    if not any(letter in time_format for letter in ("%H", "%I", "%T", "%R", "%s", "%X")):
        return text.str.to_date(time_format, strict=False).cast(pl.Datetime("us")).dt.epoch("s")
    parsed = text.str.to_datetime(time_format, strict=False, time_unit="us", time_zone="UTC" if zoned else None, ambiguous="null")
    return parsed.dt.epoch("s")


def map_values(column: pa.ChunkedArray, values: dict[str, int]) -> pa.ChunkedArray:
    codes = pa.array([int(code) for code in values.values()], pa.uint8())
    return pa.chunked_array([codes.take(pc.index_in(chunk, pa.array(list(values), pa.string()))) for chunk in as_strings(column).chunks],
                            pa.uint8())


def as_flags(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """true/false; null (not logged) is false; text that is neither becomes null."""
    if pa.types.is_boolean(column.type):
        return pc.fill_null(column, False)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return pc.fill_null(pc.not_equal(column, 0), False)
    text = pc.utf8_lower(pc.fill_null(as_strings(column), ""))
    true, false = pc.is_in(text, pa.array(_TRUE)), pc.is_in(text, pa.array(_FALSE))
    return pc.if_else(pc.or_(true, false), true, pa.scalar(None, pa.bool_()))


def as_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Strings (a dictionary of strings stays one); whole floats, which pandas makes of integers with gaps, lose their ".0"."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        if pa.types.is_string(kind.value_type):
            return column.cast(pa.dictionary(pa.int32(), pa.string()))
        column, kind = column.cast(kind.value_type), kind.value_type
    if pa.types.is_floating(kind):
        finite = pc.if_else(pc.is_finite(column), column, pa.scalar(None, kind))
        if pc.all(pc.equal(pc.floor(finite), finite)).as_py() in (True, None):
            column = finite.cast(pa.int64())
    return column.cast(pa.string())


def as_floats(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, np.ndarray]:
    """float32 with null = not logged, and a mask of text that is not a number."""
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_decimal(column.type):
        return column.cast(pa.float32(), safe=False), np.zeros(len(column), bool)
    text = pl.Series("v", _to_polars(as_strings(column))).cast(pl.String).str.strip_chars()
    text = pl.select(pl.when(text == "").then(None).otherwise(text)).to_series()
    numbers = text.cast(pl.Float32, strict=False)
    return _from_polars(numbers), (numbers.is_null() & text.is_not_null()).to_numpy()


def clamp_times(time: pa.ChunkedArray) -> pa.ChunkedArray:
    """Times a calendar can hold: bad rows are dropped later, but must not stop the calendar functions now."""
    return pc.fill_null(pc.max_element_wise(pc.min_element_wise(time, 1 << 33), 0), 0)


def _to_polars(column: pa.ChunkedArray) -> pl.Series:
    return pl.from_arrow(column)


def _from_polars(series: pl.Series) -> pa.ChunkedArray:
    return pa.chunked_array([series.to_arrow()])
