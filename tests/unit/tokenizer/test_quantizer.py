"""Laws of the quantizer: RQ-Kmeans+ starts as RQ-Kmeans, weights come from the seed alone, a bundle with an encoder survives the disk."""

import numpy as np
import pytest
import torch

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer.config import RQVAEConfig, TokenizerConfig
from gpr_dist.tokenizer.fit import fit_quantizer
from gpr_dist.tokenizer.metrics import measure
from gpr_dist.tokenizer.quantizer import Quantizer
from gpr_dist.tokenizer.semantic_ids import SemanticIds


def items(num_items: int = 600, dim: int = 12, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(30, dim))
    return (5 + centres[random.integers(30, size=num_items)] + 0.3 * random.normal(size=(num_items, dim))).astype(np.float32)


def settings(method: str, **stage) -> TokenizerConfig:
    return TokenizerConfig(method=method, num_levels=3, codebook_size=16, device="cpu", rq_vae=RQVAEConfig(**{"hidden": (24, 16), **stage}))


def random_quantizer(method: str, dim: int = 12, **stage) -> Quantizer:
    """As after a training: no tensor is zero."""
    quantizer = Quantizer(settings(method, **stage), dim)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in quantizer.state_dict().values():
            tensor.copy_(0.1 + 0.3 * torch.rand(tensor.shape, generator=generator))
    return quantizer


def test_rq_kmeans_plus_starts_as_rq_kmeans_exactly():
    embeddings = items()
    plain = fit_quantizer(embeddings, settings("rq_kmeans"))
    plus = fit_quantizer(embeddings, settings("rq_kmeans_plus", epochs=0))
    assert torch.equal(plus.codebooks_LVK, plain.codebooks_LVK)
    fresh = items(seed=1)
    codes = plain.encode(fresh)
    np.testing.assert_array_equal(plus.encode(fresh), codes)
    for num_levels in (1, 2, None):
        np.testing.assert_array_equal(plus.reconstruct(codes, num_levels), plain.reconstruct(codes, num_levels))


@pytest.mark.parametrize("method", ["rq_vae", "rq_kmeans_plus"])
def test_weights_come_from_the_seed_and_leave_the_global_generator_alone(method):
    torch.manual_seed(5)
    first, following = Quantizer(settings(method), 12), torch.rand(3)
    torch.manual_seed(6)
    again = Quantizer(settings(method), 12)
    torch.manual_seed(5)
    assert first.fingerprint == again.fingerprint and torch.equal(torch.rand(3), following)
    assert first.fingerprint != Quantizer(settings(method).model_copy(update={"seed": 1}), 12).fingerprint


@pytest.mark.parametrize(("method", "latent_dim"), [("rq_kmeans", None), ("rq_vae", None), ("rq_vae", 5), ("rq_kmeans_plus", None)])
def test_a_bundle_survives_the_disk_whatever_the_method(method, latent_dim, tmp_path):
    quantizer = random_quantizer(method, latent_dim=latent_dim)
    embeddings = items()
    codes = quantizer.encode(embeddings)
    SemanticIds(codes, quantizer, ("catalogue",)).save(tmp_path)
    loaded = SemanticIds.load(tmp_path)
    assert loaded.quantizer.config == quantizer.config and loaded.codebook_fingerprint == quantizer.fingerprint
    np.testing.assert_array_equal(loaded.quantizer.encode(embeddings), codes)
    np.testing.assert_array_equal(loaded.quantizer.reconstruct(codes), quantizer.reconstruct(codes))


@pytest.mark.parametrize("method", ["rq_vae", "rq_kmeans_plus"])
def test_the_encoder_is_part_of_what_the_codes_mean(method):
    quantizer = random_quantizer(method)
    before = quantizer.fingerprint
    with torch.no_grad():
        quantizer.encoder[0].weight[0, 0] += 1e-3
    assert quantizer.fingerprint != before


def test_codes_follow_the_residual_law_on_the_latents():
    quantizer = random_quantizer("rq_vae", latent_dim=5)
    embeddings = torch.from_numpy(items(50))
    with torch.no_grad():
        residual = quantizer.encoder((embeddings - quantizer.mean_D) / quantizer.scale)
        codes = torch.from_numpy(quantizer.encode(embeddings.numpy())).long()
        for level in range(3):
            distance = torch.cdist(residual, quantizer.codebooks_LVK[level])
            np.testing.assert_allclose(distance.gather(1, codes[:, level:level + 1])[:, 0], distance.amin(1), rtol=1e-3, atol=1e-4)
            residual = residual - quantizer.codebooks_LVK[level][codes[:, level]]


def test_reconstruct_undoes_the_normalisation():
    embeddings = items()
    quantizer = fit_quantizer(embeddings, settings("rq_kmeans"))
    error = measure(embeddings, quantizer.encode(embeddings), quantizer).reconstruction_error
    assert (np.diff(error) < 0).all() and error[-1] < 0.2


def test_tensors_of_another_shape_are_refused_by_name():
    tensors = random_quantizer("rq_kmeans_plus").tensors()
    with pytest.raises(TokenizerError, match=r"here\.safetensors holds tensors .*its settings need"):
        Quantizer.from_tensors(settings("rq_kmeans"), tensors, "here.safetensors")
    with pytest.raises(TokenizerError, match="its settings need"):
        Quantizer.from_tensors(settings("rq_kmeans_plus", hidden=(24,)), tensors, "here.safetensors")


def test_a_wrong_dimension_and_a_nan_are_one_readable_error():
    quantizer = random_quantizer("rq_vae")
    with pytest.raises(TokenizerError, match=r"\[items, 12\]"):
        quantizer.encode(items(dim=13))
    broken = items()
    broken[17, 3] = np.nan
    with pytest.raises(TokenizerError, match="item 17 is not finite"):
        quantizer.encode(broken)
