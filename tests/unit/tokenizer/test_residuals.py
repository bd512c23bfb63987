"""What codes leave of embeddings, against the definition; chunks, parts and duplicates."""

import numpy as np
import pytest
import torch

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer import residuals
from gpr_dist.tokenizer.config import RQVAEConfig, TokenizerConfig
from gpr_dist.tokenizer.quantizer import Quantizer
from gpr_dist.tokenizer.residuals import QUANTILES, check_codes, measure_residuals

N, D, L, V = 300, 5, 3, 4


def make_quantizer(method):
    torch.manual_seed(0)
    made = Quantizer(TokenizerConfig(method=method, num_levels=L, codebook_size=V, rq_vae=RQVAEConfig(hidden=(7,), latent_dim=None)), D)
    made.codebooks_LVK.data.normal_()
    made.mean_D.normal_()
    made.scale.fill_(1.7)
    for mlp in (made.encoder, made.decoder):
        if mlp is not None:
            torch.nn.init.normal_(mlp[-1].weight, std=0.3)
    return made


def embeddings():
    return np.random.default_rng(0).normal(1, 2, size=(N, D)).astype(np.float32)


@pytest.mark.parametrize("method", ["rq_kmeans", "rq_vae", "rq_kmeans_plus"])
def test_errors_and_distances_are_those_of_the_definition(method):
    quantizer, e = make_quantizer(method), embeddings()
    codes = quantizer.encode(e)
    part = np.arange(N) % 3 == 0
    found = measure_residuals(e, codes, quantizer, part)
    variance = np.square(e - e.mean(0)).sum(1).mean()
    assert found.variance == pytest.approx(variance, rel=1e-5)
    with torch.no_grad():
        latent = quantizer.latent(quantizer.normalise(torch.from_numpy(e))).numpy()
    for level in range(L):
        error = np.square(e - quantizer.reconstruct(codes, level + 1)).sum(1) / variance
        assert found.error_L[level] == pytest.approx(error.mean(), rel=1e-4)
        assert found.error_std_L[level] == pytest.approx(error.std(), rel=1e-4)
        assert found.part_error_L[level] == pytest.approx(error[part].mean(), rel=1e-4)
        latent = latent - quantizer.codebooks_LVK.detach().numpy()[level][codes[:, level]]
        distance = np.linalg.norm(latent, axis=1)
        np.testing.assert_allclose(found.distance_LQ[level], np.quantile(distance, QUANTILES), rtol=1e-4)


def test_chunks_do_not_change_the_numbers_and_quantiles_are_of_every_kth_item(monkeypatch):
    quantizer, e = make_quantizer("rq_kmeans"), embeddings()
    codes = quantizer.encode(e)
    whole = measure_residuals(e, codes, quantizer)
    monkeypatch.setattr(residuals, "_READ_ROWS", 7)
    chunked = measure_residuals(e, codes, quantizer)
    np.testing.assert_allclose(chunked.error_L, whole.error_L, rtol=1e-6)
    np.testing.assert_allclose(chunked.sampled_distance_nL, whole.sampled_distance_nL, rtol=1e-4)
    assert np.array_equal(chunked.hash_N, whole.hash_N)
    monkeypatch.setattr(residuals, "_QUANTILE_ITEMS", 100)
    thinned = measure_residuals(e, codes, quantizer)
    assert thinned.stride == 3
    np.testing.assert_allclose(thinned.sampled_distance_nL, whole.sampled_distance_nL[::3], rtol=1e-4)


def test_the_unit_may_be_that_of_other_items():
    quantizer, e = make_quantizer("rq_kmeans"), embeddings()
    codes = quantizer.encode(e)
    own, other = measure_residuals(e, codes, quantizer), measure_residuals(e, codes, quantizer, variance=2.0)
    np.testing.assert_allclose(other.error_L * 2, own.error_L * own.variance)
    assert other.variance == own.variance


def test_equal_embeddings_and_only_they_have_equal_hashes():
    quantizer, e = make_quantizer("rq_kmeans"), embeddings()
    e[50:60] = e[3]
    e[60, 0], e[61] = -0.0, e[60]
    e[61, 0] = 0.0
    hashes = measure_residuals(e, quantizer.encode(e), quantizer).hash_N
    assert len(np.unique(hashes)) == len(np.unique(e, axis=0)) == N - 11


def test_constant_embeddings_have_no_unit():
    quantizer = make_quantizer("rq_kmeans")
    e = np.ones((10, D), np.float32)
    found = measure_residuals(e, quantizer.encode(e), quantizer)
    assert found.variance == pytest.approx(0, abs=1e-6) and np.isfinite(found.error_L).all()


def test_other_embeddings_are_refused():
    quantizer, e = make_quantizer("rq_kmeans"), embeddings()
    codes = quantizer.encode(e)
    check_codes(e, codes, quantizer, "x.npy")
    with pytest.raises(TokenizerError, match=r"x\.npy: only .* of 300 rows looked at encode to the codes"):
        check_codes(np.roll(e, 1, axis=0), codes, quantizer, "x.npy")
    with pytest.raises(TokenizerError, match="embeddings have shape"):
        measure_residuals(e[:, :3], codes, quantizer)
