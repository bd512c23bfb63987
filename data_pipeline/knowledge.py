"""External knowledge offline (GPR §3.2): texts of users → frozen encoder → m vectors per text, and which text each journey row has.

Texts come from the template (user_texts.py) or are given by the team, as may be the vectors themselves. A journey gets the newest text
of its user that is not younger than the first ad it predicts. Owns the folder that gpr_dist/data/knowledge.py reads; every file carries
its content's hash and `knowledge.json` comes last, so that a folder is replaced under running jobs. Journeys are not touched.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import xxhash
from pydantic import Field, model_validator
from tqdm import tqdm

from data_pipeline.embeddings import SENTENCE_ENCODER, TextConfig, TextSVD, clean_texts, fit_texts, sentence_encoder, unit_rows
from data_pipeline.journeys import SPLITS
from data_pipeline.shards import iter_record_batches
from data_pipeline.user_texts import TemplateConfig, describe_template, first_ad_times, write_texts
from data_pipeline.users import UserIds, open_users
from gpr_dist.config import Config
from gpr_dist.errors import DataError
from gpr_dist.hashing import hash_strings
from gpr_dist.schema import KnowledgeManifest, KnowledgeRows, ShardManifest, write_atomic

# K texts  m vectors of each  E width  n texts of one chunk

TEXTS = "texts.arrow"
_CHUNK_ROWS = 32_768
_BLOCK_ROWS = 1024
_ALWAYS = np.iinfo(np.int64).min  # as_of of a text without a time: older than every journey


class GivenTextsConfig(Config):
    """Texts, or vectors, that the team made."""

    path: Path
    """.parquet, .arrow/.feather/.ipc or .csv, one row per user, or per user and moment"""
    user_column: str = "user_id"
    """ids as in the logs"""
    salt: Path | None = None
    """file with the salt of the data's user ids; none = environment variable GPR_USER_SALT, else <data>/user_salt"""
    columns: tuple[str, ...] = ("text",)
    """m columns: texts, each encoded, or lists of E floats, used as they are"""
    as_of_column: str | None = None
    """timestamp, or seconds since 1970: the text uses what happened before it only; none = facts that hold at all times"""
    vectors_by: str = ""
    """name and version of the encoder that made given vectors: a model refuses vectors of another name"""


class KnowledgeEncoderConfig(TextConfig):
    """The frozen encoder."""

    source: Literal["text_svd", "encoder", "same"] = "text_svd"
    """text_svd: TF-IDF + SVD of the texts; encoder: a sentence encoder, pip install "gpr-dist[encoder]"; same: that of `path`"""
    path: Path | None = None
    """of source same: knowledge folder whose encoder makes the vectors, so that a model trained on it can read them"""
    normalize: bool = True
    """divide every vector by its L2 norm"""

    @model_validator(mode="after")
    def _check(self) -> "KnowledgeEncoderConfig":
        if (self.source == "same") != (self.path is not None):
            raise ValueError("path is needed by source=same and by nothing else")
        return self


class BuildKnowledgeConfig(Config):
    """Settings of launch/build_knowledge.py."""

    data: Path
    """data folder with shards/ and catalogue/"""
    out: Path
    """knowledge folder"""
    template: TemplateConfig | None = None
    """texts written from the training journeys ..."""
    given: GivenTextsConfig | None = None
    """... or given ones"""
    embedding: KnowledgeEncoderConfig = KnowledgeEncoderConfig()
    """how a text becomes a vector"""
    dtype: Literal["float16", "float32"] = "float16"
    """of the stored vectors"""
    max_missing_frac: float = Field(0.5, ge=0, le=1)
    """largest share of journeys of a split without a text; they are counted and have the model's "absent" vector, more stops"""

    @model_validator(mode="after")
    def _check(self) -> "BuildKnowledgeConfig":
        if (self.template is None) == (self.given is None):
            raise ValueError("give one of template and given")
        return self


def build_knowledge(config: BuildKnowledgeConfig) -> KnowledgeManifest:
    """Texts → vectors → rows of every split there is, in `config.out`.

    Memory: about 100 bytes per text while they are sorted by user, a chunk of users, and the sample the encoder is fitted on.
    Raises: DataError for missing or damaged input, and more journeys without a text than allowed.
    """
    out, manifests = config.out, _manifests(config.data)
    out.mkdir(parents=True, exist_ok=True)
    given = config.given
    users = UserIds(None)  # the template's texts have the ids of the shards
    if given:
        users = open_users(config.data, given.salt)
    else:
        write_texts(config.data, config.template, out / TEXTS)
        given = GivenTextsConfig(path=out / TEXTS, columns=config.template.aspects, as_of_column="as_of")
    index = _Index.read(given, users)
    if not index.num_texts:
        raise DataError(f"{given.path} has no row: nothing is known of any user")
    rows = {}
    for folder, split in manifests.items():
        rows |= _find_rows(folder, split, index, config, given)
    encode, encoder, width = _open_encoder(config, given, index.num_texts)
    vectors, blocks, blocks_checksum = _write_vectors(out, given, encode, (index.num_texts, len(given.columns), width), config)
    manifest = KnowledgeManifest(num_texts=index.num_texts, num_vectors=len(given.columns), width=width, columns=given.columns,
                                 encoder=encoder, vectors=vectors, blocks=blocks, block_rows=_BLOCK_ROWS, blocks_checksum=blocks_checksum,
                                 splits=rows)
    write_atomic(out / "knowledge.json", manifest.model_dump_json(indent=1).encode())
    used = {vectors, blocks, encoder.get("file"), *(entry.file for entry in rows.values())}
    for path in (path for pattern in ("vectors-*", "blocks-*", "rows-*", "text-svd-*") for path in out.glob(pattern)):
        if path.name not in used:
            path.unlink()
    return manifest


def describe_knowledge(config: BuildKnowledgeConfig) -> list[str]:
    """What would be read, having opened it, for --dry-run. Raises: as `build_knowledge`, without writing anything."""
    manifests = _manifests(config.data)
    lines = [f"{manifest.split}: {manifest.num_rows:,} journeys" for manifest in manifests.values()]
    if config.template:
        return [*lines, *describe_template(config.data, config.template)]
    given = config.given
    wanted = [given.user_column, *([given.as_of_column] if given.as_of_column else []), *given.columns]
    first = next(iter_texts(given, wanted), None)
    return [*lines, f"{given.path}: " + ("no row" if first is None else ", ".join(f"{field.name} {field.type}" for field in first.schema))]


def _manifests(data: Path) -> dict[Path, ShardManifest]:
    """Of every split there is. Raises: DataError without a training split."""
    folders = [data / "shards" / split for split in SPLITS]
    if not (folders[0] / "manifest.json").exists():
        raise DataError(f"no shards in {folders[0]}; build them with launch/build_data.py, or correct data")
    return {folder: ShardManifest.parse((folder / "manifest.json").read_bytes(), f"{folder}/manifest.json") for folder in folders
            if (folder / "manifest.json").exists()}


def iter_texts(given: GivenTextsConfig, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """The chosen columns of the texts' file, in file order. Raises: DataError when it cannot be read or a column is missing."""
    path = given.path
    try:
        match path.suffix:
            case ".parquet":
                file = pq.ParquetFile(path)
                if missing := [name for name in columns if name not in file.schema_arrow.names]:  # pyarrow would leave them out
                    raise KeyError(f"no column {', '.join(missing)}")
                yield from file.iter_batches(_CHUNK_ROWS, columns=columns)
            case ".csv":
                types = {name: pa.string() for name in (given.user_column, *given.columns)}
                options = pcsv.ConvertOptions(include_columns=columns, column_types=types, strings_can_be_null=True)
                yield from pcsv.open_csv(path, convert_options=options, parse_options=pcsv.ParseOptions(newlines_in_values=True))
            case ".arrow" | ".feather" | ".ipc":
                reader = pa.ipc.open_file(pa.memory_map(str(path)))
                for number in range(reader.num_record_batches):
                    batch = reader.get_batch(number).select(columns)
                    for lo in range(0, len(batch), _CHUNK_ROWS):
                        yield batch.slice(lo, _CHUNK_ROWS)
            case _:
                raise DataError(f"given.path={path}: unknown format, expected .parquet, .arrow, .feather, .ipc or .csv")
    except (OSError, KeyError, pa.ArrowException) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"texts {path} cannot be read: {error}") from None


@dataclass(frozen=True)
class _Index:
    """Finds the newest text of a user at a time."""

    users: np.ndarray  # distinct hashes, ascending
    times: np.ndarray  # distinct as_of, ascending
    keys: np.ndarray  # place of the user * (number of times + 1) + place of the time + 1, ascending
    texts: np.ndarray  # row in the file, for each key

    @property
    def num_texts(self) -> int:
        return len(self.keys)

    @classmethod
    def read(cls, given: GivenTextsConfig, ids: UserIds) -> "_Index":
        """Args: ids: makes the stored ids of those in the file.

        Raises: DataError for rows without a user or time, and for a user with two texts of one time.
        """
        hashes, as_of = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        wanted = [given.user_column] + ([given.as_of_column] if given.as_of_column else [])
        for batch in iter_texts(given, wanted):
            hashes.append(hash_strings(ids.stored(batch.column(given.user_column).cast(pa.string()))))
            if given.as_of_column:
                as_of.append(_seconds(batch.column(given.as_of_column), given))
        hash_K, as_of_K = np.concatenate(hashes), np.concatenate(as_of)
        if not hash_K.all():
            raise DataError(f"texts {given.path}: row {int(np.argmin(hash_K != 0))} has no {given.user_column}")
        if not given.as_of_column:
            as_of_K = np.full(len(hash_K), _ALWAYS)
        users, user_K = np.unique(hash_K, return_inverse=True)
        times, time_K = np.unique(as_of_K, return_inverse=True)
        key_K = user_K.astype(np.int64) * (len(times) + 1) + time_K + 1
        order = np.argsort(key_K, kind="stable")
        keys = key_K[order]
        twice = np.flatnonzero(keys[1:] == keys[:-1])
        if len(twice):
            when = f" at {given.as_of_column} {as_of_K[order[twice[0]]]}" if given.as_of_column else ""
            raise DataError(f"texts {given.path}: {len(twice)} rows repeat a user{when}, first row {order[twice[0] + 1]}; keep one row per "
                            "user (and moment); several texts of a user go into several columns")
        return cls(users, times, keys, order)

    def find(self, hashes: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Row of each user's newest text whose as_of is not after the time, int64, -1 = none."""
        user = np.minimum(np.searchsorted(self.users, hashes), len(self.users) - 1)
        base = user.astype(np.int64) * (len(self.times) + 1)
        at = np.searchsorted(self.keys, base + np.searchsorted(self.times, times, side="right"), side="right") - 1
        known = (self.users[user] == hashes) & (at >= 0) & (self.keys[at] > base)
        return np.where(known, self.texts[at], -1)


def _seconds(column: pa.Array, given: GivenTextsConfig) -> np.ndarray:
    if column.null_count:
        raise DataError(f"texts {given.path}: {column.null_count} rows have no {given.as_of_column}; a text without a time would be given "
                        "to journeys that it may foretell")
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("s"), safe=False)
    try:
        return column.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid as error:
        raise DataError(f"texts {given.path}: {given.as_of_column} should be timestamps or whole seconds since 1970 ({error})") from None


def _find_rows(shards: Path, manifest: ShardManifest, index: _Index, config: BuildKnowledgeConfig,
               given: GivenTextsConfig) -> dict[str, KnowledgeRows]:
    """Write the split's row → text array. Raises: DataError when too many rows have none."""
    found = [np.zeros(0, np.int64)]
    for batch in tqdm(iter_record_batches(shards), total=manifest.num_batches, desc=f"find texts of {manifest.split}", unit="batch",
                      mininterval=0.5):
        found.append(index.find(hash_strings(batch.column("user_id")), first_ad_times(batch)))
    rows = np.concatenate(found)
    num_missing = int((rows < 0).sum())
    if num_missing > config.max_missing_frac * len(rows):
        raise DataError(f"{num_missing} of {len(rows)} journeys of {shards} have no text in {given.path} older than they are; "
                        f"max_missing_frac={config.max_missing_frac} allows {config.max_missing_frac:.0%}; give more or older texts "
                        "(template.every_days), or raise it")
    name, checksum = save_array(config.out, "rows", rows)
    return {manifest.fingerprint: KnowledgeRows(split=manifest.split, file=name, checksum=checksum, num_rows=len(rows),
                                                num_missing=num_missing)}


Encode = Callable[[pa.RecordBatch], np.ndarray]


def _open_encoder(config: BuildKnowledgeConfig, given: GivenTextsConfig, num_texts: int) -> tuple[Encode, dict[str, str], int]:
    """(columns of n texts → float32 [n, m, E], what the manifest says about the encoder, E)."""
    first = next(iter_texts(given, list(given.columns)))
    kinds = {"texts" if _is_text(field.type) else "vectors" if _is_list(field.type) else str(field.type) for field in first.schema}
    if kinds == {"vectors"}:
        vector = next((c.drop_null()[0] for b in iter_texts(given, list(given.columns)) for c in b.columns if c.null_count < len(c)), None)
        if vector is None or not len(vector):
            raise DataError(f"texts {given.path}: columns {', '.join(given.columns)} hold no vector")
        return lambda batch: _stack_vectors(batch, len(vector), given), {"source": "given", "by": given.vectors_by}, len(vector)
    if kinds != {"texts"}:
        raise DataError(f"texts {given.path}: columns {', '.join(given.columns)} are {', '.join(sorted(kinds))}; all should be strings, or "
                        "all lists of floats")
    settings = {"normalize": str(config.embedding.normalize).lower()}
    source, folder = config.embedding.source, config.out
    if source == "same":
        old = KnowledgeManifest.load(config.embedding.path)
        source, folder, settings = old.encoder["source"], config.embedding.path, old.encoder
        if source == "given":
            raise DataError(f"{folder} holds vectors that were given, it has no encoder; give vectors")
    if source == "encoder":
        embed, width = sentence_encoder()
        return lambda batch: _embed(batch, embed, width, settings), {**settings, "source": "encoder", "model": SENTENCE_ENCODER}, width
    if config.embedding.source == "same":
        fitted = TextSVD.load(folder / settings["file"])
    else:
        fitted = fit_texts(_sample(given, num_texts, config.embedding), config.embedding, f"texts {given.path}")
    settings = {**settings, "source": "text_svd", "file": fitted.save(config.out)}
    width = len(fitted.mean_D)
    return lambda batch: _embed(batch, fitted.embed, width, settings), settings, width


def _sample(given: GivenTextsConfig, num_texts: int, config: TextConfig) -> pa.ChunkedArray:
    """About `max_fit_texts` texts of all columns, of rows drawn at random."""
    wanted = -(-config.max_fit_texts // len(given.columns))
    rng = np.random.default_rng(config.seed)
    parts = []
    for batch in iter_texts(given, list(given.columns)):
        chosen = batch if num_texts <= wanted else batch.filter(pa.array(rng.random(len(batch)) < wanted / num_texts))
        parts += [column.cast(pa.string()) for column in chosen.columns]
    return pa.chunked_array(parts, pa.string())


def _embed(batch: pa.RecordBatch, embed: Callable[[list[str]], np.ndarray], width: int, settings: dict[str, str]) -> np.ndarray:
    """float32 [n, m, E]; 0 for a text that is empty or says nothing known; a text repeated within the batch is embedded once."""
    vectors_nmE = np.zeros((len(batch), batch.num_columns, width), np.float32)
    for place, column in enumerate(batch.columns):
        texts = clean_texts(pa.chunked_array([column.cast(pa.string())])).combine_chunks().dictionary_encode()
        known = np.flatnonzero(texts.is_valid())
        if len(known):
            made = np.asarray(embed(texts.dictionary.to_pylist()), np.float32)
            made = unit_rows(made) if settings["normalize"] == "true" else made
            vectors_nmE[known, place] = made[texts.indices.drop_null().to_numpy()]
    return vectors_nmE


def _stack_vectors(batch: pa.RecordBatch, width: int, given: GivenTextsConfig) -> np.ndarray:
    vectors_nmE = np.zeros((len(batch), batch.num_columns, width), np.float32)
    for place, column in enumerate(batch.columns):
        known = np.flatnonzero(column.is_valid())
        lengths = pc.list_value_length(column.drop_null()).to_numpy(zero_copy_only=False)
        if (lengths != width).any():
            raise DataError(f"texts {given.path}: a vector of {batch.schema.names[place]} has {lengths[lengths != width][0]} values, "
                            f"others have {width}")
        vectors_nmE[known, place] = pc.list_flatten(column).to_numpy(zero_copy_only=False).reshape(-1, width)
    return vectors_nmE


def _write_vectors(out: Path, given: GivenTextsConfig, encode: Encode, shape: tuple[int, int, int],
                   config: BuildKnowledgeConfig) -> tuple[str, str, str]:
    """Returns: names of vectors and block checksums, checksum of the latter. Raises: DataError for vectors not finite."""
    temporary = out / "vectors.tmp"
    blocks, held = [], np.zeros((0, *shape[1:]), config.dtype)
    try:
        vectors_KmE = np.lib.format.open_memmap(temporary, mode="w+", dtype=config.dtype, shape=shape)
        done = 0
        with tqdm(total=shape[0], desc="encode texts", unit="text", unit_scale=True, mininterval=0.5) as bar:
            for batch in iter_texts(given, list(given.columns)):
                with np.errstate(over="ignore"):  # too large for float16 is infinite, and refused
                    made = encode(batch).astype(config.dtype)
                if not np.isfinite(made).all():
                    row = done + int(np.argmin(np.isfinite(made).all((1, 2))))
                    raise DataError(f"texts {given.path}: the vector of row {row} is not finite in {config.dtype}; repair it, or set "
                                    "dtype=float32")
                vectors_KmE[done:done + len(made)] = made
                done += len(made)
                held = np.concatenate([held, made])
                whole = len(held) - len(held) % _BLOCK_ROWS
                blocks += [xxhash.xxh3_64_intdigest(held[lo:lo + _BLOCK_ROWS]) for lo in range(0, whole, _BLOCK_ROWS)]
                held = held[whole:]
                bar.update(len(made))
        blocks += [xxhash.xxh3_64_intdigest(held)] if len(held) else []
        vectors_KmE.flush()
        blocks_name, checksum = save_array(out, "blocks", np.array(blocks, np.uint64))
        name = f"vectors-{checksum}.npy"
        os.replace(temporary, out / name)
    finally:
        temporary.unlink(missing_ok=True)
    return name, blocks_name, checksum


def save_array(folder: Path, kind: str, values: np.ndarray) -> tuple[str, str]:
    """Write .npy under a name that carries its content's hash. Returns: name, xxh3_64 of the file."""
    sink = pa.BufferOutputStream()
    np.save(sink, values, allow_pickle=False)
    content = sink.getvalue()
    checksum = xxhash.xxh3_64_hexdigest(content)
    write_atomic(folder / f"{kind}-{checksum}.npy", content)
    return f"{kind}-{checksum}.npy", checksum


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or (pa.types.is_dictionary(kind) and _is_text(kind.value_type)) \
        or kind == pa.string_view()


def _is_list(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)) and \
        pa.types.is_floating(kind.value_type)


def show_texts(path: Path, columns: tuple[str, ...], num_users: int) -> Iterator[str]:
    """The newest text of a few users, as lines."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
    ids = table["user_id"]
    last = np.flatnonzero(np.append(pc.not_equal(ids.slice(1), ids.slice(0, len(ids) - 1)).to_numpy(zero_copy_only=False), True))
    for row in islice(last.tolist(), num_users):
        yield f"user {ids[row].as_py()}"
        yield from (f"  {name}: {table[name][row].as_py()}" for name in columns)
