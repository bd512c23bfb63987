"""Tables in files of any format on any pyarrow file system: finding them, and reading them piece by piece.

Knows Parquet, Arrow/Feather and CSV; not what the columns mean (files.py).
"""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.fs
import pyarrow.parquet as pq

from gpr_dist.config import Config
from gpr_dist.errors import ConfigError, DataError

_SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow", ".ipc": "arrow", ".csv": "csv", ".tsv": "csv",
             ".csv.gz": "csv", ".tsv.gz": "csv", ".csv.zst": "csv", ".tsv.zst": "csv"}
_NULLS = ["", "NULL", "null", "NA", "NaN", "nan", "\\N"]
_BATCH_ROWS = 1 << 18
_TASK_ROWS = 1 << 23  # rows of the row groups a piece holds, about


class TableFiles(Config):
    """Files that hold one table."""

    path: str | tuple[str, ...]
    """files, folders or globs (* within a name, ** across folders), local or URI (s3://, gs://, hdfs://)"""
    file_format: Literal["auto", "parquet", "arrow", "csv"] = "auto"
    """auto = by the end of the file name"""
    delimiter: str = ","
    """of CSV files"""


class FoundFile(NamedTuple):
    """One input file."""

    fs: pyarrow.fs.FileSystem
    path: str
    format: str
    num_bytes: int
    modified_ns: int


def find_files(table: TableFiles) -> list[FoundFile]:
    """Files of a table, sorted by path. Raises: DataError when a place cannot be reached, a pattern matches nothing, a file is empty."""
    found: dict[str, FoundFile] = {}
    for pattern in [table.path] if isinstance(table.path, str) else table.path:
        fs, path = file_system(pattern)
        try:
            matches = [info for info in _match(fs, path) if info.is_file]
        except OSError as error:
            raise _unreachable(pattern, error) from None
        if not matches:
            raise DataError(f"no file matches {pattern}; check the path (relative paths start at the folder of the command)")
        for info in matches:
            if not info.size:
                raise DataError(f"{info.path} is empty; remove it or write it again")
            name = info.path if "://" not in pattern else f"{pattern.partition('://')[0]}://{info.path}"
            found[name] = FoundFile(fs, name, format_of(name, table), info.size, info.mtime_ns or 0)
    return [found[name] for name in sorted(found)]


def read_piece(file: FoundFile, table: TableFiles, columns: list[str], categorical: list[str],
                detail: list[int]) -> Iterator[tuple[pa.Table, int, list[str]]]:
    """Batches of a file or of its row groups detail[0]:detail[1]: (rows, number of the first row, malformed lines before its end)."""
    try:
        if file.format == "csv":
            yield from _read_csv(file, table, columns)
            return
        first, last, first_row = detail
        with file.fs.open_input_file(_bare(file.path)) as source:
            if file.format == "parquet":
                strings = [name for name in categorical if _is_text(pq.read_schema(source).field(name).type)]
                parquet = pq.ParquetFile(source, read_dictionary=strings)
                batches = parquet.iter_batches(_BATCH_ROWS, row_groups=list(range(first, last)), columns=columns)
            else:
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(number).select(columns) for number in range(first, last))
            for batch in batches:
                yield pa.Table.from_batches([batch]), first_row, []
                first_row += batch.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None


def _read_csv(file: FoundFile, table: TableFiles, columns: list[str]) -> Iterator[tuple[pa.Table, int, list[str]]]:
    malformed: list[str] = []

    def skip(row: pyarrow.csv.InvalidRow) -> str:
        line = f" near line {row.number}" if row.number is not None else ""
        malformed.append(f"{file.path}{line}: {row.actual_columns} columns instead of {row.expected_columns}")
        return "skip"

    parse = pyarrow.csv.ParseOptions(delimiter=_delimiter(file, table), invalid_row_handler=skip)
    convert = pyarrow.csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()), null_values=_NULLS,
                                         strings_can_be_null=True, quoted_strings_can_be_null=False)
    read = pyarrow.csv.ReadOptions(use_threads=False, block_size=1 << 24)
    first_row = 1
    with file.fs.open_input_stream(_bare(file.path)) as source, pyarrow.csv.open_csv(source, read, parse, convert) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch]), first_row, list(malformed)
            first_row += batch.num_rows + len(malformed)
            malformed.clear()


def read_table(table: TableFiles, columns: list[str]) -> Iterator[pa.Table]:
    """All rows of the table's files, in the order of their names."""
    for file in find_files(table):
        for _, detail in pieces(file):
            for rows, first_row, malformed in read_piece(file, table, columns, [], list(detail)):
                if malformed:
                    raise DataError(f"{malformed[0]} (before row {first_row + rows.num_rows}); repair the line")
                yield rows


def pieces(file: FoundFile) -> Iterator[tuple[int, tuple[int, ...]]]:
    """(rows, detail) of the parts of a file that can be read on their own: row groups, record batches, or a whole CSV.

    Raises: DataError when it is not of its format.
    """
    if file.format == "csv":
        yield file.num_bytes // 40, ()
        return
    try:
        with file.fs.open_input_file(_bare(file.path)) as source:
            if file.format == "parquet":
                meta = pq.ParquetFile(source).metadata
                rows = [meta.row_group(number).num_rows for number in range(meta.num_row_groups)]
            else:
                reader = pa.ipc.open_file(source)
                rows = [reader.get_batch(number).num_rows for number in range(reader.num_record_batches)]
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None
    first, first_row, held = 0, 1, 0
    for number, num_rows in enumerate(rows):
        held += num_rows
        if held >= _TASK_ROWS or number == len(rows) - 1:
            yield held, (first, number + 1, first_row)
            first, first_row, held = number + 1, first_row + held, 0


def read_schema(file: FoundFile, table: TableFiles) -> pa.Schema:
    try:
        if file.format == "csv":
            with file.fs.open_input_stream(_bare(file.path)) as source:
                options = pyarrow.csv.ParseOptions(delimiter=_delimiter(file, table), invalid_row_handler=lambda row: "skip")
                with pyarrow.csv.open_csv(source, parse_options=options) as reader:
                    return pa.schema([(name, pa.string()) for name in reader.schema.names])
        with file.fs.open_input_file(_bare(file.path)) as source:
            return pq.read_schema(source) if file.format == "parquet" else pa.ipc.open_file(source).schema
    except (pa.ArrowInvalid, OSError) as error:
        raise _damaged(file, error) from None


def file_system(pattern: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """File system and path of a local path or URI; a glob stays in the path.

    Raises: ConfigError for an unknown scheme, DataError when the storage cannot be reached.
    """
    if "://" not in pattern:
        return pyarrow.fs.LocalFileSystem(), pattern
    fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    try:
        fs, _ = pyarrow.fs.FileSystem.from_uri(fixed)
    except ValueError as error:  # pa.ArrowInvalid too
        raise ConfigError(f"{pattern}: {error}; use a local path or an s3://, gs://, hdfs:// or file:// URI") from None
    except OSError as error:
        raise _unreachable(pattern, error) from None
    return fs, _bare(pattern)


def _damaged(file: FoundFile, error: Exception) -> DataError:
    return DataError(f"{file.path} is damaged or not a {file.format} file ({str(error).splitlines()[0]}); write it again")


def _unreachable(pattern: str, error: OSError) -> DataError:
    return DataError(f"cannot reach {pattern} ({str(error).splitlines()[0]}); check network, credentials, region and path")


def _bare(path: str) -> str:
    return path.partition("://")[2] if "://" in path else path


def _match(fs: pyarrow.fs.FileSystem, path: str) -> list[pyarrow.fs.FileInfo]:
    if not re.search(r"[*?\[]", path):
        info = fs.get_file_info(path)
        if info.type == pyarrow.fs.FileType.Directory:
            return [child for child in fs.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
                    if child.is_file and _suffix_format(child.path) and not child.base_name.startswith(("_", "."))]
        return [info]
    folder = re.split(r"[*?\[]", path, maxsplit=1)[0].rpartition("/")[0] or ("/" if path.startswith("/") else ".")
    expression = re.compile("".join(_GLOB.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*\*|\*|\?)", path)))
    children = fs.get_file_info(pyarrow.fs.FileSelector(folder, recursive=True, allow_not_found=True))
    return [child for child in children if expression.fullmatch(child.path.removeprefix("./") if folder == "." else child.path)]


_GLOB = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def _suffix_format(path: str) -> str | None:
    return next((kind for suffix, kind in _SUFFIXES.items() if path.lower().endswith(suffix)), None)


def format_of(path: str, table: TableFiles) -> str:
    kind = table.file_format if table.file_format != "auto" else _suffix_format(path)
    if kind is None:
        raise ConfigError(f"cannot tell the format of {path} by its name; set file_format to parquet, arrow or csv")
    return kind


def _delimiter(file: FoundFile, table: TableFiles) -> str:
    return "\t" if table.delimiter == "," and ".tsv" in file.path.lower() else table.delimiter


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
