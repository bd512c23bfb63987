"""The tokenizer bundle: round trip, fingerprints, reverse map, append, damage, mismatch."""

import json
from dataclasses import replace

import numpy as np
import pytest

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.fit import fit_tokenizer
from gpr_dist.tokenizer.quantizer import Quantizer
from gpr_dist.tokenizer.semantic_ids import BUNDLE_FILE, SemanticIds

CONFIG = TokenizerConfig(num_levels=3, codebook_size=8, device="cpu")


def embeddings(num_items: int = 300, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num_items, 4)).astype(np.float32)


def with_config(bundle: SemanticIds, **settings) -> SemanticIds:
    config = CONFIG.model_copy(update=settings)
    return replace(bundle, quantizer=Quantizer.from_tensors(config, bundle.quantizer.tensors(), "here"))


@pytest.fixture
def bundle() -> SemanticIds:
    return fit_tokenizer(embeddings(), CONFIG, "c0ffee")


def test_fit_encodes_every_item_with_the_nearest_codes(bundle):
    np.testing.assert_array_equal(bundle.quantizer.encode(embeddings()), bundle.codes_NL)
    assert (bundle.num_items, bundle.num_levels, bundle.codebook_size, bundle.catalogue_fingerprint) == (300, 3, 8, "c0ffee")
    error = np.square(embeddings() - bundle.quantizer.reconstruct(bundle.codes_NL)).sum()
    assert error / np.square(embeddings() - embeddings().mean(0)).sum() == pytest.approx(bundle.report.reconstruction_error[-1], rel=1e-5)
    assert bundle.report.num_distinct == len(np.unique(bundle.codes_NL, axis=0))


def test_round_trip(bundle, tmp_path):
    saved = bundle.save(tmp_path / "tokenizer")
    loaded = SemanticIds.load(tmp_path / "tokenizer")
    np.testing.assert_array_equal(loaded.codes_NL, bundle.codes_NL)
    np.testing.assert_array_equal(loaded.quantizer.encode(embeddings()), bundle.codes_NL)
    assert loaded.fingerprint == bundle.fingerprint == saved.fingerprint
    assert loaded.codebook_fingerprint == bundle.codebook_fingerprint
    assert (loaded.config, loaded.catalogues, loaded.report) == (bundle.config, bundle.catalogues, bundle.report)
    assert not loaded.codes_NL.flags.writeable
    assert not list((tmp_path / "tokenizer").glob("*.tmp"))


def test_items_of_is_the_reverse_map_also_for_prefixes(bundle):
    for item in (0, 17, 299):
        for length in range(4):
            codes = bundle.codes_NL[item, :length]
            expected = np.flatnonzero((bundle.codes_NL[:, :length] == codes).all(1))
            np.testing.assert_array_equal(np.sort(bundle.items_of(codes)), expected)
    used = {tuple(codes) for codes in bundle.codes_NL.tolist()}
    unused = next(codes for codes in np.ndindex(8, 8, 8) if codes not in used)
    assert len(bundle.items_of(np.array(unused))) == 0
    with pytest.raises(TokenizerError, match="no semantic ID"):
        bundle.items_of(np.array([0, 0, 8]))


def test_fingerprints_change_with_what_they_identify(bundle):
    codes = bundle.codes_NL.copy()
    codes[123, 2] = (codes[123, 2] + 1) % 8
    other_codes = replace(bundle, codes_NL=codes)
    assert other_codes.fingerprint != bundle.fingerprint and other_codes.codebook_fingerprint == bundle.codebook_fingerprint
    tensors = bundle.quantizer.tensors()
    tensors["codebooks_LVK"] = np.nextafter(tensors["codebooks_LVK"], np.float32(9))
    other_codebooks = replace(bundle, quantizer=Quantizer.from_tensors(CONFIG, tensors, "here"))
    assert other_codebooks.fingerprint != bundle.fingerprint and other_codebooks.codebook_fingerprint != bundle.codebook_fingerprint
    assert with_config(bundle, seed=5).fingerprint != bundle.fingerprint
    assert with_config(bundle, device="cuda").fingerprint == bundle.fingerprint
    assert len(bundle.fingerprint) == len(bundle.codebook_fingerprint) == 16


def test_append_keeps_every_old_code_and_the_model(bundle, tmp_path):
    new = embeddings(40, seed=1)
    grown = bundle.append(new, "decade").save(tmp_path)
    grown = SemanticIds.load(tmp_path)
    np.testing.assert_array_equal(grown.codes_NL[:300], bundle.codes_NL)
    np.testing.assert_array_equal(grown.codes_NL[300:], bundle.quantizer.encode(new))
    assert grown.fingerprint != bundle.fingerprint and grown.num_items == 340
    grown.check_codebooks(bundle.codebook_fingerprint, "checkpoint")
    for catalogue in ("c0ffee", "decade"):
        grown.check_catalogue(catalogue, "manifest")
    with pytest.raises(TokenizerError, match="decade"):
        bundle.check_catalogue("decade", "manifest")
    item = int(np.flatnonzero((grown.codes_NL == grown.codes_NL[339]).all(1))[-1])
    assert item in grown.items_of(grown.codes_NL[339])


def test_mismatches_name_both_fingerprints(bundle):
    bundle.check_catalogue("c0ffee", "manifest.json")
    with pytest.raises(TokenizerError, match=r"shards/train/manifest.json is of catalogue badcaf.*c0ffee"):
        bundle.check_catalogue("badcaf", "shards/train/manifest.json")
    with pytest.raises(TokenizerError, match=rf"step-000100 was trained with codebooks badcaf.*{bundle.codebook_fingerprint}"):
        bundle.check_codebooks("badcaf", "step-000100")


@pytest.mark.parametrize("pattern", ["codes-*.arrow", "quantizer-*.safetensors", BUNDLE_FILE])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_and_the_file_named(bundle, tmp_path, pattern, damage):
    bundle.save(tmp_path)
    path = next(tmp_path.glob(pattern))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        # in the description a byte that says something: of a number's 17 digits the last may mean nothing
        content[content.index(b'c0ffee') if pattern == BUNDLE_FILE else len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[:len(content) // 2])
    else:
        path.unlink()
    with pytest.raises(TokenizerError, match=path.name):
        SemanticIds.load(tmp_path)


def test_an_altered_or_foreign_description_is_refused(bundle, tmp_path):
    bundle.save(tmp_path)
    path = tmp_path / BUNDLE_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "catalogues": ["badcaf"]}))
    with pytest.raises(TokenizerError, match="altered"):
        SemanticIds.load(tmp_path)
    path.write_text(json.dumps({**content, "bundle_version": 99}))
    with pytest.raises(TokenizerError, match="version 99"):
        SemanticIds.load(tmp_path)


def test_saving_over_a_bundle_keeps_the_old_one_until_the_last_moment(bundle, tmp_path, monkeypatch):
    bundle.save(tmp_path)
    other = fit_tokenizer(embeddings(seed=2), CONFIG, "c0ffee")

    def full(path, data):
        if path.name == BUNDLE_FILE:
            raise OSError(28, "No space left on device", str(path))
        path.write_bytes(data)

    with monkeypatch.context() as patch:
        patch.setattr("gpr_dist.tokenizer.semantic_ids.write_atomic", full)
        with pytest.raises(TokenizerError, match="No space left"):
            other.save(tmp_path)
    assert SemanticIds.load(tmp_path).fingerprint == bundle.fingerprint
    other.save(tmp_path)
    assert SemanticIds.load(tmp_path).fingerprint == other.fingerprint
    assert len(list(tmp_path.iterdir())) == 3  # the first bundle's files are gone


def test_codes_outside_the_codebook_are_refused(bundle):
    codes = bundle.codes_NL.copy()
    codes[5, 1] = 8
    with pytest.raises(TokenizerError, match=r"item 5 has codes .* outside \[0, 8\)"):
        replace(bundle, codes_NL=codes)
    with pytest.raises(TokenizerError, match=r"codes \(300, 2\) do not have shape \[N, 3\]"):
        replace(bundle, codes_NL=codes[:, :2])
