"""Laws of residual k-means: residuals, nearest centroids, monotone error, quality beside scikit-learn, determinism, bad input."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as ReferenceKMeans

from gpr_dist.config import build_config
from gpr_dist.errors import ConfigError, TokenizerError
from gpr_dist.tokenizer import kmeans as kmeans_module
from gpr_dist.tokenizer import quantizer, rq_kmeans
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.fit import fit_quantizer
from gpr_dist.tokenizer.kmeans import kmeans, nearest
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


def fit_kmeans(points: np.ndarray, num_codes: int, seed: int = 0, iterations: int = 100):
    generator = torch.Generator().manual_seed(seed)
    return kmeans(torch.from_numpy(points), torch.ones(len(points)), num_codes, iterations, 0.0, generator)


def squared_distances(points: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return np.square(points[:, None].astype(np.float64) - centroids[None]).sum(-1)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_nearest_is_the_brute_force_minimum_also_far_from_the_origin(offset, monkeypatch):
    monkeypatch.setitem(kmeans_module._SCORES, "cpu", 512)  # several chunks
    points, centroids = clustered() + np.float32(offset), clustered(30, seed=1) + np.float32(offset)
    codes, distances = nearest(torch.from_numpy(points), torch.from_numpy(centroids))
    expected = squared_distances(points, centroids)
    np.testing.assert_allclose(expected[np.arange(len(points)), codes], expected.min(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(distances, expected.min(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_clusters", [40, 2000])  # 2000: one broad cloud
def test_inertia_never_increases_and_is_no_worse_than_scikit_learn(seed, num_clusters):
    points = clustered(num_clusters=num_clusters, seed=seed)
    # more codes than clusters: with as many, single runs of either differ by 20 % depending on which cluster the start misses
    result = fit_kmeans(points, 64, seed)
    assert np.all(np.diff(result.inertia) <= 1e-6 * result.inertia[0])
    reference = ReferenceKMeans(64, n_init=1, random_state=seed, max_iter=100, tol=0).fit(points)
    assert squared_distances(points, result.centroids_VD.numpy()).min(1).sum() <= 1.02 * reference.inertia_


def test_inertia_never_increases_when_clusters_run_empty(monkeypatch):
    points = clustered()
    bad_start = np.concatenate([points[:2], np.full((18, points.shape[1]), 50, np.float32) + points[:18]])
    monkeypatch.setattr(kmeans_module, "_plus_plus", lambda *_: torch.from_numpy(bad_start))
    result = fit_kmeans(points, 20)
    assert np.all(np.diff(result.inertia) <= 0)
    codes, _ = nearest(torch.from_numpy(points), result.centroids_VD)
    assert len(codes.unique()) == 20


def test_weights_stand_for_repeated_points():
    points = clustered(300)
    weights = np.random.default_rng(0).integers(1, 5, len(points))
    repeated = np.repeat(points, weights, axis=0)
    distinct, counted = rq_kmeans._distinct(repeated, np.ones(len(repeated)))
    order, expected = np.lexsort(distinct.T), np.lexsort(points.T)
    np.testing.assert_array_equal(distinct[order], points[expected])
    np.testing.assert_array_equal(counted[order], weights[expected])
    codes = torch.from_numpy(np.random.default_rng(1).integers(7, size=len(points)))
    sums, mass = kmeans_module._cluster_sums(torch.from_numpy(points), torch.from_numpy(weights).float(), codes, 7)
    codes_repeated = np.repeat(codes.numpy(), weights)
    for code in range(7):
        np.testing.assert_allclose(sums[code], repeated[codes_repeated == code].sum(0, dtype=np.float64), rtol=1e-5, atol=1e-6)
        assert mass[code] == (codes_repeated == code).sum()


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
