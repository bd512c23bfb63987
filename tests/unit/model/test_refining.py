"""The refining token: its noise belongs to the request, its sample never knows the target, and the denoiser learns."""

import dataclasses

import pytest
import torch
from random_batches import random_batch
from tiny_model import V, edit_tokens, tiny_model

from gpr_dist.model.refining import Refiner, clean, signal
from gpr_dist.ops.noise import hashed_normal, hashed_uniform

D = 16


def test_the_schedule_falls_from_signal_to_noise():
    share = signal(torch.linspace(0, 1, 50))
    assert share[0] > 0.999 and share[-1] < 1e-3 and (share.diff() <= 0).all()


def test_noise_is_a_function_of_its_key_and_standard_normal():
    keys = torch.randint(-(2**62), 2**62, (20_000,), generator=torch.Generator().manual_seed(0))
    noise = hashed_normal(keys, 8)
    assert torch.equal(hashed_normal(keys.flip(0), 8), noise.flip(0)) and not torch.equal(hashed_normal(keys, 8, seed=1), noise)
    assert noise.mean(0).abs().max() < 0.03 and (noise.std(0) - 1).abs().max() < 0.03
    assert (torch.corrcoef(noise.T) - torch.eye(8)).abs().max() < 0.03
    consecutive = hashed_uniform(torch.arange(100_000), 1)[:, 0]
    assert consecutive.min() > 0 and consecutive.max() < 1
    counts = torch.histc(consecutive, 50, 0, 1)
    assert ((counts - 2000).square() / 2000).sum() < 90  # chi-squared with 49 degrees of freedom: 1 in 3,000
    assert torch.corrcoef(torch.stack((consecutive[:-1], consecutive[1:])))[0, 1].abs() < 0.01


def test_a_perfect_denoiser_is_sampled_exactly(monkeypatch):
    refiner, target = Refiner(D, 2.0, 4), clean(torch.randn(5, D))
    monkeypatch.setattr(refiner, "_denoise", lambda x, condition, t: target)
    torch.testing.assert_close(refiner(torch.randn(5, D), torch.arange(5)), target)


def test_the_denoiser_learns_the_ad_its_condition_tells():
    torch.manual_seed(0)
    ads = torch.randn(6, D)
    conditions, which = torch.randn(6, D), torch.arange(600) % 6
    refiner = Refiner(D, 2.0, 3)
    optimizer = torch.optim.Adam(refiner.parameters(), 3e-3)
    losses = []
    for step in range(150):
        loss = refiner(conditions[which], torch.arange(600) + 600 * step, clean(ads)[which]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    sampled = refiner(conditions, torch.arange(6) + 10**6)
    assert not sampled.requires_grad
    nearest = torch.cdist(sampled, clean(ads)).argmin(1)
    assert nearest.tolist() == list(range(6))


def test_the_token_depends_on_the_request_and_not_on_the_target():
    model, batch = tiny_model(ptd={"num_thinking": 2, "refining": True}), random_batch(3)
    with torch.no_grad():
        before = model(batch, task="encode")
        other = dataclasses.replace(batch, target_codes_NL=(batch.target_codes_NL + 3) % V, target_item_N=batch.target_item_N + 1)
        after = model(other, task="encode")
        renumbered = model(dataclasses.replace(batch, row_ids_B=batch.row_ids_B + 7), task="encode")
        edited = model(edit_tokens(batch, torch.ones(batch.num_tokens, dtype=torch.bool)), task="encode")
        output = [model(b).refining_N for b in (batch, other)]
    assert torch.equal(before.state_QD, after.state_QD) and torch.equal(before.condition_QD, after.condition_QD)
    assert not torch.allclose(renumbered.state_QD, before.state_QD)  # another row, another noise
    assert torch.equal(renumbered.condition_QD, before.condition_QD)
    assert not torch.allclose(edited.condition_QD, before.condition_QD)
    assert not torch.allclose(*output)


@pytest.mark.parametrize("thinking", [0, 1, 3])
def test_thinking_tokens_come_one_after_another_and_all_matter(thinking):
    model, batch = tiny_model(ptd={"num_thinking": thinking}), random_batch(4)
    with torch.no_grad():
        before = model(batch, task="logits")
        for position in range(thinking + 3):
            shift = torch.randn(D)  # a constant would not survive the norms
            model.ptd.position_LD[position] += shift
            changed = (model(batch, task="logits") - before).abs().flatten(2).amax((0, 2)) > 1e-4
            model.ptd.position_LD[position] -= shift
            first = max(0, position - thinking)  # a position is read by itself and by those after it
            assert changed.tolist() == [level >= first for level in range(3)]
