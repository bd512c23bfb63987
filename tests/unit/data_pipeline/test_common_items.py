"""Which items two tokenizer bundles share: shown by catalogue fingerprints or by the ids' checksum, refused otherwise."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from data_pipeline.embeddings import EmbeddingConfig
from data_pipeline.tokenize_items import FitTokenizerConfig, append_items, build_tokenizer, common_items
from gpr_dist.errors import TokenizerError
from gpr_dist.hashing import hash_strings
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.semantic_ids import SemanticIds

SMALL, LARGE = 40, 55


def write_data(data: Path, fingerprint: str, ids: list[str]) -> Path:
    """A catalogue of these ids and a vector for each of them."""
    folder = data / "catalogue"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    table = pa.table({"item_id": ids, "kind": pa.array([1] * len(ids), pa.uint8()), "first_seen": [0] * len(ids), "text": [""] * len(ids),
                      "price": pa.array([1.0] * len(ids), pa.float32())})
    with pa.ipc.new_file(str(folder / "catalogue.arrow"), table.schema) as writer:
        writer.write_table(table)
    hashes = hash_strings(pa.array(ids))
    np.save(folder / "hashes.npy", np.sort(hashes))
    np.save(folder / "indices.npy", np.argsort(hashes).astype(np.int32))
    (folder / "catalogue.json").write_text(json.dumps({"schema_version": 1, "num_items": len(ids), "fingerprint": fingerprint}))
    np.save(data / "vectors.npy", np.random.default_rng(0).normal(size=(LARGE, 4))[: len(ids)])
    return data


def fit(data: Path, out: Path, seed: int = 0) -> FitTokenizerConfig:
    config = FitTokenizerConfig(data=data, out=out, embedding=EmbeddingConfig(source="file", path=data / "vectors.npy"),
                                cooccurrence={"dim": 0}, tokenizer=TokenizerConfig(num_levels=2, codebook_size=4, seed=seed, device="cpu"))
    build_tokenizer(config)
    return config


def ids(number: int, prefix: str = "item") -> list[str]:
    return [f"{prefix}-{n}" for n in range(number)]


def load(config: FitTokenizerConfig) -> SemanticIds:
    return SemanticIds.load(config.out)


@pytest.fixture
def old(tmp_path):
    return load(fit(write_data(tmp_path / "data", "small", ids(SMALL)), tmp_path / "old"))


def test_a_refit_on_the_same_catalogue(old, tmp_path):
    new = load(fit(tmp_path / "data", tmp_path / "new", seed=1))
    shutil.rmtree(tmp_path / "data")  # the fingerprints are enough
    assert common_items(old, new, tmp_path / "data") == SMALL


def test_a_refit_on_a_catalogue_that_grew(old, tmp_path):
    new = load(fit(write_data(tmp_path / "data", "large", ids(LARGE)), tmp_path / "new"))
    assert common_items(old, new, tmp_path / "data") == SMALL
    append_items(FitTokenizerConfig(data=tmp_path / "data", out=tmp_path / "old", embedding=EmbeddingConfig(
        source="file", path=tmp_path / "data" / "vectors.npy"), cooccurrence={"dim": 0}))
    appended = SemanticIds.load(tmp_path / "old")
    shutil.rmtree(tmp_path / "data")
    assert common_items(appended, new, tmp_path / "data") == LARGE
    assert common_items(old, appended, tmp_path / "data") == SMALL


def test_the_same_ids_under_another_fingerprint(old, tmp_path):
    new = load(fit(write_data(tmp_path / "data", "rebuilt", ids(SMALL)), tmp_path / "new"))
    assert common_items(old, new, tmp_path / "data") == SMALL


@pytest.mark.parametrize("found", [[*ids(SMALL - 1), "other"], ids(SMALL)[::-1], [*ids(SMALL)[::-1], *ids(9, "new")], ids(SMALL - 3)])
def test_items_changed_moved_or_gone(old, tmp_path, found):
    new = load(fit(write_data(tmp_path / "data", "changed", found), tmp_path / "new"))
    with pytest.raises(TokenizerError, match=r"do not encode the same items: .*catalogue does not continue the old one"):
        common_items(old, new, tmp_path / "data")


def test_the_catalogue_must_be_the_new_tokenizers(old, tmp_path):
    new = load(fit(write_data(tmp_path / "data", "large", ids(LARGE)), tmp_path / "new"))
    write_data(tmp_path / "data", "yet another", ids(LARGE))
    with pytest.raises(TokenizerError, match="do not encode the same items"):
        common_items(old, new, tmp_path / "data")
