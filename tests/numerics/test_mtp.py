"""Multi-token prediction against its definition, and which weights a head's targets reach."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from random_batches import random_batch
from tiny_model import L, P, V, reorder_targets, tiny_model

from gpr_dist.objectives.mtp import mtp_loss, uniform_head_weights
from gpr_dist.ops.cross_entropy import nll_of_logits


def nll_and_heads(seed=0, n=20):
    torch.manual_seed(seed)
    return nll_of_logits(torch.randn(n, L, V), torch.randint(V, (n, L))), torch.randint(P, (n,))


def head_gradients(batch):
    """Gradient norm of each head's own rows, and the gradients themselves."""
    model = tiny_model(torch.float64)
    nll = nll_of_logits(model(batch, task="logits"), batch.target_codes_NL)
    mtp_loss(nll, batch.target_head_N, uniform_head_weights(P), 10).backward()
    return model.ptd.query_PD.grad, model.ptd.adapter_PDD.grad


def test_is_the_weighted_sum_of_equation_3():
    nll, head = nll_and_heads()
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05])
    expected = sum(float(weights[h]) * float(nll[n, level]) for n, h in enumerate(head.tolist()) for level in range(L)) / 7
    assert float(mtp_loss(nll, head, weights, 7)) == pytest.approx(expected, rel=1e-6)


def test_one_head_is_plain_next_item_prediction():
    torch.manual_seed(0)
    logits, codes = torch.randn(9, L, V), torch.randint(V, (9, L))
    expected = sum(F.cross_entropy(logits[:, level], codes[:, level]) for level in range(L))  # mean over ads
    found = mtp_loss(nll_of_logits(logits, codes), torch.zeros(9, dtype=torch.long), uniform_head_weights(1), 9)
    torch.testing.assert_close(found, expected)


def test_one_head_of_the_model_is_plain_next_item_prediction():
    batch = random_batch(3, num_heads=1)
    model = tiny_model(num_mtp_heads=1)
    logits = model(batch, task="logits")
    probability = logits.softmax(-1).gather(2, batch.target_codes_NL[:, :, None]).prod(1)  # of the whole semantic ID
    found = mtp_loss(nll_of_logits(logits, batch.target_codes_NL), batch.target_head_N, uniform_head_weights(1), batch.num_targets)
    assert batch.num_targets == len(batch.target_head_N)
    torch.testing.assert_close(found, -probability.log().mean())


def test_shares_of_any_split_add_up():
    nll, head = nll_and_heads(1)
    weights = uniform_head_weights(P)
    whole = mtp_loss(nll, head, weights, 13)
    cuts = [0, 3, 3, 11, 20]
    parts = [mtp_loss(nll[a:b], head[a:b], weights, 13) for a, b in itertools.pairwise(cuts)]
    assert parts[1] == 0
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("num_targets", [0, -1])
def test_no_targets_in_the_step_is_refused(num_targets):
    nll, head = nll_and_heads()
    with pytest.raises(ValueError, match=f"num_targets must be positive, got {num_targets}"):
        mtp_loss(nll, head, uniform_head_weights(P), num_targets)


@pytest.mark.parametrize("head", range(P))
def test_targets_of_a_head_train_that_head_only(head):
    batch = random_batch(2, num_rows=5)
    mine = batch.target_head_N == head
    only = reorder_targets(batch, mine.nonzero().squeeze(1))
    for gradient in head_gradients(only):
        assert [bool(row.any()) for row in gradient] == [h == head for h in range(P)]
    codes = torch.where(mine[:, None], (batch.target_codes_NL + 1) % V, batch.target_codes_NL)
    pairs = zip(head_gradients(batch), head_gradients(dataclasses.replace(batch, target_codes_NL=codes)), strict=True)
    for before, after in pairs:
        changed = [not torch.allclose(before[h], after[h], rtol=1e-9, atol=1e-12) for h in range(P)]
        assert changed == [h == head for h in range(P)]


def test_the_heads_of_a_request_give_different_predictions():
    batch = random_batch(2, num_rows=5)
    logits = tiny_model()(batch, task="logits")[:, 0]  # before any code is known
    of_request = [logits[batch.target_request_N == request] for request in range(len(batch.request_token_R))]
    heads = [batch.target_head_N[batch.target_request_N == request] for request in range(len(batch.request_token_R))]
    for rows, head in zip(of_request, heads, strict=True):
        same = (rows[:, None] - rows[None]).abs().amax(-1) < 1e-6
        assert torch.equal(same, head[:, None] == head[None])
