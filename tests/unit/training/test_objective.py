"""What the loop gets from one micro-batch, with a plain model in the engine's place."""

import dataclasses

import pytest
import torch
from random_batches import empty_batch, random_batch
from tiny_model import L, P, V, loss_share, tiny_model

from gpr_dist.training.objective import mtp_objective


class PlainEngine:
    device = torch.device("cpu")

    def __init__(self, model):
        self.model = model

    def __call__(self, batch):
        return self.model(batch)


@pytest.mark.parametrize("value_weight", [0.0, 0.1])
def test_the_loss_and_the_sums_behind_it(value_weight):
    model, batch = tiny_model(), random_batch(1)
    share = mtp_objective(P, value_weight)(PlainEngine(model), batch, 7)
    torch.testing.assert_close(share.loss, loss_share(model, batch, 7, value_weight))
    assert share.count_P.tolist() == [int((batch.target_head_N == head).sum()) for head in range(P)]
    assert share.nll_PL.dtype == torch.float64 and share.nll_PL.shape == (P, L)
    # The logged sums per head, weighted like the loss, are the loss: what a person watches is what is trained.
    torch.testing.assert_close(share.nll_PL.sum() / P / 7 + value_weight * share.value_loss, share.loss.double(), rtol=1e-6, atol=0)
    assert not share.nll_PL.requires_grad and not share.value_loss.requires_grad and share.value_loss > 0


def test_an_empty_micro_batch_gives_zeros_with_a_gradient():
    model = tiny_model()
    share = mtp_objective(P, 0.1)(PlainEngine(model), empty_batch(), 7)
    share.loss.backward()
    assert share.loss == 0 and not share.nll_PL.any() and not share.count_P.any()
    assert all(p.grad is not None for p in model.parameters())


def test_the_legal_softmax_runs_over_the_legal_codes_only():
    model, batch = tiny_model(), random_batch(2)
    codes = batch.target_codes_NL[:, :, None]
    legal = (torch.rand(len(codes), L, V, generator=torch.Generator().manual_seed(0)) < 0.5).scatter(2, codes, True)
    share = mtp_objective(P, 0.0)(PlainEngine(model), dataclasses.replace(batch, target_offset_NLV=legal.float().log()), 7)
    probability = model(batch, task="logits").softmax(-1).double()
    nll = -(probability.gather(2, codes).squeeze(2) / (probability * legal).sum(-1)).log()
    torch.testing.assert_close(share.loss.double(), nll.sum() / P / 7, rtol=1e-5, atol=0)
    share.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    only = torch.zeros_like(legal).scatter(2, codes, True)  # one legal code is certain
    assert mtp_objective(P, 0.0)(PlainEngine(model), dataclasses.replace(batch, target_offset_NLV=only.float().log()), 7).loss == 0


def test_weights_of_targets_are_those_of_codes_alone():
    """Eq. 4: the code loss is weighted, values and what is logged are not; weights of 1 change no bit, of the gradients either."""
    model, batch = tiny_model(), random_batch(1)
    weight_N = torch.rand(len(batch.target_head_N), generator=torch.Generator().manual_seed(0))
    objective, engine = mtp_objective(P, 0.1), PlainEngine(model)
    plain, ones, weighted = (objective(engine, dataclasses.replace(batch, target_weight_N=w), 7)
                             for w in (None, torch.ones_like(weight_N), weight_N))
    codes = (weight_N * model(batch).nll_NL.sum(1)).sum() / P / 7
    torch.testing.assert_close(weighted.loss, codes + 0.1 * plain.value_loss, rtol=1e-5, atol=0)
    assert weighted.nll_PL.equal(plain.nll_PL) and weighted.value_loss.equal(plain.value_loss) and not weighted.loss.equal(plain.loss)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(share.loss, parameters, allow_unused=True) for share in (plain, ones)]
    assert ones.loss.equal(plain.loss) and all((a is None and b is None) or a.equal(b) for a, b in zip(*gradients, strict=True))
