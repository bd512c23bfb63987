"""Laws of residual k-means: residuals, means, unused codes, out of core as in memory, determinism, bad input."""

import numpy as np
import pytest
import torch

from gpr_dist.config import build_config
from gpr_dist.errors import ConfigError, TokenizerError
from gpr_dist.tokenizer import points as points_module
from gpr_dist.tokenizer import quantizer
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.fit import fit_quantizer
from gpr_dist.tokenizer.quantizer import Quantizer


def clustered(num_items: int = 2000, dim: int = 8, num_clusters: int = 40, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(num_clusters, dim))
    return (centres[random.integers(num_clusters, size=num_items)] + 0.2 * random.normal(size=(num_items, dim))).astype(np.float32)


def small(**settings) -> TokenizerConfig:
    return TokenizerConfig(**{"num_levels": 3, "codebook_size": 16, "iterations": 20, "device": "cpu", **settings})


def fit_codebooks(points: np.ndarray, config: TokenizerConfig) -> np.ndarray:
    """The codebooks in the space of the points."""
    fitted = fit_quantizer(points, config)
    codebooks = fitted.codebooks_LVK.detach().cpu().numpy() * fitted.scale.numpy()
    codebooks[0] += fitted.mean_D.numpy()
    return codebooks


def encode(points: np.ndarray, codebooks: np.ndarray, device: str) -> np.ndarray:
    config = TokenizerConfig(num_levels=codebooks.shape[0], codebook_size=codebooks.shape[1], device=device)
    made = Quantizer(config, codebooks.shape[2])
    made.codebooks_LVK.data.copy_(torch.from_numpy(codebooks))
    return made.encode(points)


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.square(points[:, None].astype(np.float64) - centroids[None]).sum(-1)


def test_encode_follows_the_residual_law_level_by_level(monkeypatch):
    monkeypatch.setattr(quantizer, "READ_ROWS", 300)
    points = clustered()
    codebooks = fit_codebooks(points, small())
    codes = encode(points, codebooks, "cpu")
    assert codes.shape == (len(points), 3) and codes.dtype == np.int32
    residual, errors = points.astype(np.float64), [np.square(points).sum()]
    for level in range(3):
        distance = squared_distances(residual, codebooks[level])
        np.testing.assert_allclose(distance[np.arange(len(points)), codes[:, level]], distance.min(1), rtol=1e-4, atol=1e-6)
        residual = residual - codebooks[level][codes[:, level]]
        errors.append(np.square(residual).sum())
    assert errors == sorted(errors, reverse=True)


def test_codebooks_are_the_means_of_what_is_assigned_to_them():
    points = clustered()
    codebooks = fit_codebooks(points, small(iterations=200, tolerance=0))
    codes, residual = encode(points, codebooks, "cpu"), points.copy()
    for level in range(3):
        for code in np.unique(codes[:, level]):
            np.testing.assert_allclose(codebooks[level, code], residual[codes[:, level] == code].mean(0), atol=1e-5)
        residual = residual - codebooks[level][codes[:, level]]


def test_every_level_uses_all_its_codes_on_spread_out_data():
    codes = encode(clustered(), fit_codebooks(clustered(), small()), "cpu")
    assert [len(np.unique(codes[:, level])) for level in range(3)] == [16, 16, 16]


def test_same_seed_same_codebooks_other_seed_others():
    points = clustered()
    first = fit_codebooks(points, small(max_fit_items=500))
    np.testing.assert_array_equal(first, fit_codebooks(points, small(max_fit_items=500)))
    assert not np.array_equal(first, fit_codebooks(points, small(max_fit_items=500, seed=1)))


def test_the_fit_reads_only_its_sample():
    points = clustered()
    rows = np.sort(np.random.default_rng(0).choice(len(points), 500, replace=False, shuffle=False))
    poisoned = np.full_like(points, np.nan)
    poisoned[rows] = points[rows]
    np.testing.assert_array_equal(fit_codebooks(poisoned, small(max_fit_items=500)), fit_codebooks(points, small(max_fit_items=500)))


@pytest.mark.parametrize("per_code", [None, 20])
def test_out_of_core_gives_the_same_bits_as_in_memory(per_code, tmp_path, monkeypatch):
    monkeypatch.setattr(points_module, "BLOCK_ROWS", 256)
    np.save(tmp_path / "embeddings.npy", clustered())
    stored = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    in_memory, out_of_core = (fit_quantizer(stored, small(fit_memory_gb=gb, kmeans_items_per_code=per_code)) for gb in (1, 1e-9))
    assert in_memory.fingerprint == out_of_core.fingerprint


def test_kmeans_on_a_sample_is_nearly_as_good():
    points = clustered(6000, num_clusters=6000)
    errors = []
    for per_code in (None, 128):
        codebooks = fit_codebooks(points, small(kmeans_items_per_code=per_code))
        codes = encode(points, codebooks, "cpu")
        errors.append(np.square(points - sum(codebooks[level][codes[:, level]] for level in range(3))).sum())
    assert errors[1] < 1.06 * errors[0]


def test_items_told_apart_early_leave_later_codes_unused():
    points = clustered(20)  # 16 codes at level 1 leave fewer than 16 distinct residuals
    codebooks = fit_codebooks(points, small())
    codes = encode(points, codebooks, "cpu")
    assert np.isfinite(codebooks).all()
    assert len(np.unique(codes, axis=0)) == len(points)
    reconstructed = sum(codebooks[level][codes[:, level]] for level in range(3))
    np.testing.assert_allclose(reconstructed, points, atol=1e-5)


def test_fewer_distinct_embeddings_than_codes_is_refused():
    repeated = np.tile(clustered(10), (50, 1))
    with pytest.raises(TokenizerError, match="10 distinct embeddings among 500 items are fewer than codebook_size 16"):
        fit_codebooks(repeated, small())
    with pytest.raises(TokenizerError, match="1 distinct"):
        fit_codebooks(np.ones((100, 4), np.float32), small())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_item(value):
    points = clustered()
    codebooks = fit_codebooks(points, small())
    points[1234, 3] = value
    with pytest.raises(TokenizerError, match="item 1234"):
        fit_codebooks(points, small())
    with pytest.raises(TokenizerError, match="item 1234"):
        encode(points, codebooks, "cpu")


def test_wrong_shapes_are_refused():
    codebooks = fit_codebooks(clustered(), small())
    with pytest.raises(TokenizerError, match=r"\(2000, 5\)"):
        encode(clustered(dim=5), codebooks, "cpu")
    with pytest.raises(TokenizerError, match="shape"):
        fit_codebooks(np.zeros((0, 4), np.float32), small())


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match="63"):
        build_config(TokenizerConfig, {"num_levels": 6, "codebook_size": 2048}, "test")
    with pytest.raises(ConfigError, match="method"):
        build_config(TokenizerConfig, {"method": "kmeans"}, "test")
    with pytest.raises(TokenizerError, match="abacus"):
        fit_codebooks(clustered(), small(device="abacus"))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_is_deterministic_and_as_good_as_the_cpu():
    points = clustered(20_000, 16)
    on_gpu = [fit_codebooks(points, small(device="cuda")) for _ in range(2)]
    np.testing.assert_array_equal(*on_gpu)
    errors = []
    for codebooks, device in ((on_gpu[0], "cuda"), (fit_codebooks(points, small()), "cpu")):
        codes = encode(points, codebooks, device)
        errors.append(np.square(points - sum(codebooks[level][codes[:, level]] for level in range(3))).sum())
    assert errors[0] == pytest.approx(errors[1], rel=0.05)
