"""Laws of the RQ-VAE stage: where it starts, that everything learns, dead codes, bad input, the same result on any number of processes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer import points as points_module
from gpr_dist.tokenizer import rq_vae
from gpr_dist.tokenizer.collective import process_group
from gpr_dist.tokenizer.config import RQVAEConfig, TokenizerConfig
from gpr_dist.tokenizer.points import Points
from gpr_dist.tokenizer.quantizer import Quantizer
from gpr_dist.tokenizer.rq_vae import rq_vae_loss, train_rq_vae

CPU = torch.device("cpu")


def clustered(num_items: int = 1200, dim: int = 8, num_clusters: int = 40, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = random.normal(size=(num_clusters, dim))
    return (centres[random.integers(num_clusters, size=num_items)] + 0.3 * random.normal(size=(num_items, dim))).astype(np.float32)


def small(method: str = "rq_kmeans_plus", seed: int = 0, **settings) -> TokenizerConfig:
    stage = {"hidden": (32,), "epochs": 8, "batch_size": 256, "micro_batch_size": 64, "lr": 3e-3, "codebook_lr": 1e-2, **settings}
    return TokenizerConfig(method=method, num_levels=3, codebook_size=16, seed=seed, device="cpu", rq_vae=RQVAEConfig(**stage))


def started(config: TokenizerConfig, embeddings: np.ndarray | None = None) -> tuple[Quantizer, Points]:
    """A quantizer as the fit hands it over: normalised, its codebooks random rows of the points."""
    points = Points(clustered() if embeddings is None else embeddings, config, CPU)
    quantizer = Quantizer(config, points.dim)
    quantizer.mean_D.copy_(points.mean_D)
    quantizer.scale.copy_(points.scale)
    rows = np.random.default_rng(config.seed).choice(points.num_rows, (config.num_levels, config.codebook_size), replace=False)
    for level in range(config.num_levels):
        with torch.no_grad():
            quantizer.codebooks_LVK[level] = quantizer.latent(points.take(np.sort(rows[level]))) * 0.5**level
    return quantizer, points


@pytest.mark.parametrize("method", ["rq_vae", "rq_kmeans_plus"])
def test_every_codebook_the_encoder_and_the_decoder_have_a_gradient(method):
    quantizer, points = started(small(method))
    train_rq_vae(quantizer, points)  # past the zeros the residual layers start with
    loss, _ = rq_vae_loss(quantizer, points.take(np.arange(200)))
    (loss.reconstruction + loss.codebook + 0.25 * loss.commitment).backward()
    assert (quantizer.codebooks_LVK.grad.abs().amax((1, 2)) > 0).all()
    for name, parameter in [*quantizer.encoder.named_parameters(), *quantizer.decoder.named_parameters()]:
        assert parameter.grad.abs().max() > 0, name


def test_each_loss_reaches_only_what_it_is_for():
    quantizer, points = started(small("rq_vae"))
    reached = {}
    for name, value in rq_vae_loss(quantizer, points.take(np.arange(100)))[0]._asdict().items():
        quantizer.zero_grad()
        value.backward(retain_graph=True)
        learning = {part for part, parameter in quantizer.named_parameters() if parameter.grad is not None and parameter.grad.any()}
        reached[name] = {part.split("_")[0].split(".")[0] for part in learning}
    assert reached == {"reconstruction": {"encoder", "decoder"}, "codebook": {"codebooks"}, "commitment": {"encoder"}}


def test_losses_follow_their_definitions():
    quantizer, points = started(small())
    train_rq_vae(quantizer, points)
    x_nD = points.take(np.arange(50))
    with torch.no_grad():
        loss, codes_nL = rq_vae_loss(quantizer, x_nD)
        residual, quantised, quantisation = quantizer.latent(x_nD), 0, 0.0
        for level in range(3):
            centroid = quantizer.codebooks_LVK[level][codes_nL[:, level]]
            assert (torch.cdist(residual, quantizer.codebooks_LVK[level]).argmin(1) == codes_nL[:, level]).all()
            residual, quantised = residual - centroid, quantised + centroid
            quantisation += float(residual.square().mean())
        np.testing.assert_allclose(float(loss.reconstruction), float((x_nD - quantizer.decode(quantised)).square().mean()), rtol=1e-4)
        np.testing.assert_allclose([float(loss.codebook), float(loss.commitment)], quantisation, rtol=1e-4)


@pytest.mark.parametrize("method", ["rq_vae", "rq_kmeans_plus"])
def test_losses_fall_and_codebooks_change(method):
    quantizer, points = started(small(method, epochs=20))
    before = quantizer.codebooks_LVK.detach().clone()
    losses_E3 = train_rq_vae(quantizer, points).losses_E3
    assert losses_E3.shape == (20, 3) and losses_E3[-1, 0] < 0.9 * losses_E3[0, 0]
    assert ((quantizer.codebooks_LVK - before).abs().amax((1, 2)) > 0.01).all()


def test_no_epochs_change_nothing():
    quantizer, points = started(small(epochs=0))
    before = quantizer.fingerprint
    assert train_rq_vae(quantizer, points).losses_E3.shape == (0, 3) and quantizer.fingerprint == before


def test_one_crowded_code_is_split_until_the_items_are_spread():
    quantizer, points = started(small(epochs=12, restart_epochs=1))
    with torch.no_grad():
        quantizer.codebooks_LVK[:, 1:] = 1e3  # every item gets code 0 of every level
    train_rq_vae(quantizer, points)
    codes_nL = quantizer.assign(quantizer.latent(points.take(np.arange(points.num_rows)))).numpy()
    for level in range(3):
        usage_V = np.bincount(codes_nL[:, level], minlength=16)
        assert (usage_V > 0).all() and usage_V.max() < 0.3 * points.num_rows, (level, usage_V)


def test_idle_codes_are_those_below_the_share():
    quantizer, points = started(small(restart_share=0.5))
    optimiser = torch.optim.AdamW([quantizer.codebooks_LVK])
    quantizer.codebooks_LVK.sum().backward()
    optimiser.step()
    before = quantizer.codebooks_LVK.detach().clone()
    idle_LV = torch.zeros(3, 16, dtype=torch.bool)
    idle_LV[0, 3] = idle_LV[2, 5] = True
    assert rq_vae._restart(quantizer, points, idle_LV, optimiser, 0).tolist() == [1, 0, 1]
    moved_LV = (quantizer.codebooks_LVK != before).any(2)
    assert torch.equal(moved_LV, idle_LV)
    assert not optimiser.state[quantizer.codebooks_LVK]["exp_avg"][idle_LV].any()
    # beside a code that stayed: nearer to it than to where it was
    assert torch.cdist(quantizer.codebooks_LVK[0, 3:4], before[0]).argmin() != 3


def test_dead_codes_restart_where_items_are_and_are_counted():
    quantizer, points = started(small(epochs=6, restart_epochs=2))
    with torch.no_grad():
        quantizer.codebooks_LVK[1, 4:9] = 1e3  # no item is near
    training = train_rq_vae(quantizer, points)
    codes_nL = quantizer.assign(quantizer.latent(points.take(np.arange(points.num_rows))))
    assert training.num_restarted_L[1] >= 5
    assert set(range(4, 9)) <= set(codes_nL[:, 1].tolist())

    quantizer, points = started(small(epochs=6, restart_epochs=0))
    with torch.no_grad():
        quantizer.codebooks_LVK[1, 4:9] = 1e3
    assert train_rq_vae(quantizer, points).num_restarted_L.tolist() == [0, 0, 0]
    assert (quantizer.codebooks_LVK[1, 4:9] > 900).all()


def test_a_level_that_leaves_nothing_restarts_nothing():
    embeddings = np.repeat(np.eye(8, dtype=np.float32), 40, 0)
    quantizer, points = started(small(epochs=3, restart_epochs=1, lr=1e-9, codebook_lr=1e-9), embeddings)
    with torch.no_grad():  # level 1 is exact, so all codes but one of the next levels are dead and nothing is served badly
        quantizer.codebooks_LVK.fill_(1e3)
        quantizer.codebooks_LVK[0, :8] = points.take(np.arange(0, 320, 40))
        quantizer.codebooks_LVK[1:, 0] = 0
    train_rq_vae(quantizer, points)
    assert torch.isfinite(quantizer.codebooks_LVK).all()


def test_a_loss_that_is_not_finite_is_one_readable_error():
    quantizer, points = started(small(lr=1e30))
    with pytest.raises(TokenizerError, match=r"loss is not finite in epoch \d+ at step \d+ of \d+; lower tokenizer.rq_vae.lr ") as caught:
        train_rq_vae(quantizer, points)
    assert "\n" not in str(caught.value)


def test_every_epoch_sees_every_row_once_in_an_order_of_its_own(monkeypatch):
    monkeypatch.setattr(rq_vae, "BLOCK_ROWS", 64)
    monkeypatch.setattr(rq_vae, "SHUFFLED_BLOCKS", 3)
    config = small()
    epochs = [list(rq_vae._batches(1000, config, epoch)) for epoch in (0, 1, 0)]
    for batches in epochs:
        assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
        assert max(map(len, batches)) <= config.rq_vae.batch_size
        assert all((np.diff(rows) > 0).all() and len(set((rows // 64).tolist())) <= 3 for rows in batches)  # few places of the map
    first, second, again = (np.concatenate(batches) for batches in epochs)
    assert (first == again).all() and (first != second).any()


def test_the_seed_decides_everything():
    results = []
    for seed in (0, 0, 1):
        torch.rand(3)  # the global generator must not matter
        quantizer, points = started(small(seed=seed, epochs=3))
        train_rq_vae(quantizer, points)
        results.append(quantizer.fingerprint)
    assert results[0] == results[1] != results[2]


def train_on_this_rank() -> list:
    """Both methods, with blocks small enough that four processes all have rows."""
    torch.set_num_threads(1)
    points_module.BLOCK_ROWS = rq_vae.BLOCK_ROWS = 128
    rq_vae.SHUFFLED_BLOCKS = 4
    results = []
    with process_group(CPU):
        for method in ("rq_vae", "rq_kmeans_plus"):
            quantizer, points = started(small(method, epochs=3, restart_epochs=1))
            with torch.no_grad():
                quantizer.codebooks_LVK[2, :6] = 1e3
            training = train_rq_vae(quantizer, points)
            results.append([quantizer.fingerprint, training.losses_E3.tolist(), training.num_restarted_L.tolist()])
    return results


def test_one_two_and_four_processes_give_the_same_bits(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    target = "test_rq_vae:train_on_this_rank"
    results = [result for size in (1, 2, 4) for result in run_ranks(target, size, tmp_path / str(size))]
    assert len(results) == 7 and all(result == results[0] for result in results)
    assert all(restarted[2] >= 6 for _, _, restarted in results[0])
