"""Laws of k-means: nearest centroids, monotone error, quality beside scikit-learn, empty clusters, repeated rows, threads."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as ReferenceKMeans

from gpr_dist.tokenizer import kmeans as kmeans_module
from gpr_dist.tokenizer import points as points_module
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.kmeans import KMeans, kmeans, nearest
from gpr_dist.tokenizer.rq_kmeans import Residuals


def clustered(num_items: int = 2000, dim: int = 8, num_clusters: int = 40, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(num_clusters, dim))
    return (centres[random.integers(num_clusters, size=num_items)] + 0.2 * random.normal(size=(num_items, dim))).astype(np.float32)


class InMemory:
    """Rows as rq_kmeans.Source gives them."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows = torch.from_numpy(rows)
        self.num_rows, self.dim, self.device = *rows.shape, torch.device("cpu")

    def take(self, rows: np.ndarray) -> torch.Tensor:
        return self._rows[torch.from_numpy(rows)]


def rows_of(points: np.ndarray) -> Residuals:
    return Residuals(InMemory(points), TokenizerConfig(kmeans_items_per_code=None, device="cpu"))


def fit_kmeans(points: np.ndarray, num_codes: int, seed: int = 0, iterations: int = 100) -> KMeans:
    return kmeans(rows_of(points), num_codes, iterations, 0.0, torch.Generator().manual_seed(seed))


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


@pytest.mark.parametrize("num_clusters", [40, 2000])  # 2000: one broad cloud
def test_inertia_never_increases_and_is_no_worse_than_scikit_learn(num_clusters):
    ours, reference = [], []
    for seed in range(5):  # single runs of either differ by 3 %
        points = clustered(num_clusters=num_clusters, seed=seed)
        result = fit_kmeans(points, 64, seed)
        assert np.all(np.diff(result.inertia) <= 1e-6 * result.inertia[0])
        ours.append(squared_distances(points, result.centroids_VD.numpy()).min(1).sum())
        reference.append(ReferenceKMeans(64, n_init=1, random_state=seed, max_iter=100, tol=0).fit(points).inertia_)
    assert np.mean(ours) <= 1.01 * np.mean(reference)


def test_the_projection_of_wide_rows_does_not_spoil_the_start():
    points = clustered(3000, dim=200, num_clusters=100)
    result = fit_kmeans(points, 64, iterations=20)
    reference = ReferenceKMeans(64, n_init=1, random_state=0, max_iter=20, tol=0).fit(points)
    assert squared_distances(points, result.centroids_VD.numpy()).min(1).sum() <= 1.02 * reference.inertia_


def test_inertia_never_increases_when_clusters_run_empty(monkeypatch):
    points = clustered()
    bad_start = np.concatenate([points[:2], np.full((18, points.shape[1]), 50, np.float32) + points[:18]])
    monkeypatch.setattr(kmeans_module, "_seed", lambda *_: torch.from_numpy(bad_start))
    result = fit_kmeans(points, 20)
    assert np.all(np.diff(result.inertia) <= 0)
    codes, _ = nearest(torch.from_numpy(points), result.centroids_VD)
    assert len(codes.unique()) == 20


def test_an_empty_cluster_restarts_at_different_rows_also_when_the_worst_repeat():
    points = np.concatenate([clustered(100), np.full((50, 8), 9, np.float32), np.full((1, 8), -8, np.float32)])
    rows = rows_of(points)
    distance = torch.from_numpy(np.square(points).sum(1))
    worst = kmeans_module._worst_served(rows, distance, 2)
    assert worst[:, 0].tolist() == [9.0]  # among the 8 worst rows there is only one point
    worst = kmeans_module._worst_served(rows, distance, 20)
    assert worst[:2, 0].tolist() == [9.0, -8.0] and len(worst.unique(dim=0)) == len(worst) == 20


def test_every_centroid_is_the_mean_of_its_rows_over_blocks(monkeypatch):
    monkeypatch.setattr(points_module, "BLOCK_ROWS", 128)
    points = clustered(1000)
    start = torch.from_numpy(points[:7].copy())
    result = KMeans(start)
    sums, counts, distances = kmeans_module._assign(rows_of(points), result)
    codes = squared_distances(points, points[:7]).argmin(1)
    for code in range(7):
        np.testing.assert_allclose(sums[code], points[codes == code].sum(0, dtype=np.float64), rtol=1e-5, atol=1e-5)
        assert counts[code] == (codes == code).sum()
    np.testing.assert_allclose(distances, squared_distances(points, points[:7]).min(1), rtol=1e-4, atol=1e-4)
    assert result.inertia[0] == pytest.approx(float(distances.double().sum()))


def test_repeated_rows_are_found():
    points = clustered(300)
    points[0], points[1] = 0.0, -0.0  # one point
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(300), 3))
    first = kmeans_module._distinct(torch.from_numpy(points[order])).numpy()
    expected = np.sort(np.unique(np.where(order == 1, 0, order), return_index=True)[1])
    np.testing.assert_array_equal(first, expected)


def test_distinct_rows_are_found_beyond_the_sample(monkeypatch):
    monkeypatch.setattr(points_module, "BLOCK_ROWS", 512)
    points = np.repeat(clustered(12), [9000, *[1] * 11], axis=0)  # a sample of 128 · 8 rows has the first one nearly alone
    result = fit_kmeans(points, 8)
    assert len(result.centroids_VD.unique(dim=0)) == 8
    assert len(kmeans_module._seed(rows_of(points), 13, torch.Generator())) == 12


def test_every_start_centroid_is_another_row():
    sample = torch.from_numpy(np.repeat(clustered(50), 2, axis=0))
    sample[1::2] += 1e-7 * torch.arange(50)[:, None]  # nearly equal: distances round to 0
    sample = sample[kmeans_module._distinct(sample)]
    chosen = kmeans_module._plus_plus(sample, len(sample), torch.Generator().manual_seed(0))
    assert sorted(chosen.tolist()) == list(range(len(sample)))


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr(points_module, "BLOCK_ROWS", 256)
    before, points, results = torch.get_num_threads(), clustered(), []
    start = torch.from_numpy(points[:32].copy())
    monkeypatch.setattr(kmeans_module, "_seed", lambda *_: start)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(fit_kmeans(points, 32, iterations=10))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].centroids_VD, results[1].centroids_VD) and results[0].inertia == results[1].inertia
