"""Item identity: rows of the table, the loss of the head against plain cross-entropy, what it sees, and its ranking."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from random_batches import concat_batches, random_batch
from tiny_model import tiny_model

from gpr_dist.config import build_config
from gpr_dist.data.candidates import CandidatesConfig, ItemCandidates
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.errors import ConfigError
from gpr_dist.hashing import row_keys
from gpr_dist.model.gpr import GPRConfig
from gpr_dist.model.items import ItemsConfig, item_rows
from gpr_dist.schema import EVERY_AD, Candidates

M = 60
CODES = np.random.default_rng(0).integers(0, 16, (M, 3))
SETTINGS = [{"head": "untied"}, {"head": "tied"}, {"input": False}, {"buckets": 24}, {"head_codes": True}, {"head": "none"}]


def with_items(batch, eligibility=None):
    eligibility = eligibility or Eligibility([np.arange(5, 40, dtype=np.int32)], np.arange(M, dtype=np.int32), M)
    item_T = torch.where(batch.item_T >= 0, batch.item_T % M, -1)
    batch = dataclasses.replace(batch, item_T=item_T, target_item_N=batch.target_item_N % M,
                                request_eligibility_R=torch.full_like(batch.request_eligibility_R, EVERY_AD))
    return ItemCandidates(CODES, eligibility, CandidatesConfig(), np.ones(M)).add_to(batch, 0)


def model_with(**items):
    return tiny_model(items={"buckets": M, "num_items": M, **items})


def share(model, batch):
    output = model(batch)
    return output.nll_NL.sum() + (0 if output.item_nll is None else output.item_nll)


@pytest.mark.parametrize("items", SETTINGS)
def test_every_parameter_is_used_and_the_loss_does_not_depend_on_the_split(items):
    model, rows = model_with(**items), [with_items(random_batch(seed, num_rows=1)) for seed in range(3)]
    whole = with_items(concat_batches([dataclasses.replace(row, candidates=None, target_column_N=None) for row in rows]))
    gradients = []
    for batches in ([whole], rows):
        model.zero_grad(set_to_none=True)
        total = sum(share(model, batch) for batch in batches)
        total.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if not name.startswith("hte")} | {"loss": total.detach()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=2e-5 * float(gradient.abs().max()) + 1e-7)


@pytest.mark.parametrize("items", [{"head": "untied"}, {"head": "tied"}, {"buckets": 24}])
def test_loss_and_ranking_are_those_of_plain_scores(items):
    model, batch = model_with(**items), with_items(random_batch(4, num_rows=3))
    table = model.items.table if items.get("head") == "tied" else model.items.output
    hidden = model(batch, task="encode").intents.hidden_TD[batch.request_token_R]
    every = torch.arange(M)
    rows = every[:, None] if model.items.exact else item_rows(every, 24, 2)
    scores = model.items.norm(hidden) @ table.weight[rows].sum(1).T + model.items.bias.weight[rows].sum(1)[:, 0]
    first = batch.target_head_N == 0
    plain = F.cross_entropy(scores[batch.target_request_N[first]], batch.target_item_N[first], reduction="sum")
    torch.testing.assert_close(model(batch).item_nll, plain, rtol=1e-4, atol=1e-4)

    num_requests = len(batch.request_row_R)
    legal_GC = torch.rand(2, M) < 0.5
    legal_GC[1] = False
    legal_GC[1, :4] = True
    group_R = torch.arange(num_requests) % 2
    excluded = torch.tensor([0, 0, 1]), torch.tensor([7, 8, 0])
    item_RK, score_RK = model(batch, task="rank_items", candidates=batch.candidates, legal_GC=legal_GC, group_R=group_R, k=9,
                              excluded=excluded)
    log_p = scores.masked_fill(~legal_GC[group_R], -torch.inf).log_softmax(1)
    log_p[excluded] = -torch.inf
    best, wanted = log_p.topk(9)
    torch.testing.assert_close(score_RK, best, rtol=1e-4, atol=1e-4)
    assert torch.equal(item_RK, torch.where(best > -torch.inf, wanted, -1)) and (item_RK[1::2, 4:] == -1).all()


def test_the_head_sees_nothing_of_its_request():
    model, batch = model_with(), with_items(random_batch(5, num_rows=2))
    everyone = {"candidates": batch.candidates, "legal_GC": torch.ones(1, M, dtype=torch.bool),
                "group_R": torch.zeros(len(batch.request_row_R), dtype=torch.long), "k": M}
    _, score_RK = model(batch, task="rank_items", **everyone)
    request = len(batch.request_row_R) - 1
    after = torch.arange(batch.num_tokens) > batch.request_token_R[request]
    edited = dataclasses.replace(batch, item_T=torch.where(after & (batch.item_T >= 0), (batch.item_T + 11) % M, batch.item_T))
    assert torch.equal(model(edited, task="rank_items", **everyone)[1][request], score_RK[request])
    before = torch.arange(batch.num_tokens) == int((batch.item_T[: batch.request_token_R[request] + 1] >= 0).nonzero()[-1])
    edited = dataclasses.replace(batch, item_T=torch.where(before, (batch.item_T + 11) % M, batch.item_T))
    assert not torch.equal(model(edited, task="rank_items", **everyone)[1][request], score_RK[request])  # identity is read


def test_dropout_follows_the_row_and_not_the_batch():
    dropped = {"embedding": {"dropout": 0.3}, "hsd": {"dropout": 0.2}, "ptd": {"head_dropout": 0.3}}
    model = tiny_model(items={"buckets": M, "num_items": M, "dropout": 0.5, "head_dropout": 0.4}, **dropped)

    def keyed(batch, seed=3):
        lengths = batch.offsets_B1.diff()
        position = torch.arange(batch.num_tokens) - batch.offsets_B1[:-1].repeat_interleave(lengths)
        return dataclasses.replace(batch, noise_T=row_keys(batch.row_ids_B.repeat_interleave(lengths), position, seed))

    rows = [keyed(with_items(random_batch(seed, num_rows=1))) for seed in range(3)]
    rows = [keyed(dataclasses.replace(row, row_ids_B=torch.tensor([number]))) for number, row in enumerate(rows)]
    bare = [dataclasses.replace(row, candidates=None, target_column_N=None, noise_T=None) for row in rows]
    whole = keyed(with_items(concat_batches(bare)))
    apart = sum(share(model, row) for row in rows)
    torch.testing.assert_close(share(model, whole), apart, rtol=1e-5, atol=1e-4)
    assert abs((share(model, keyed(whole, 4)) - apart).item()) > 0.01
    assert abs((share(model.eval(), whole) - apart).item()) > 0.01
    torch.testing.assert_close(share(model, whole), share(model, keyed(whole, 4)))  # evaluation knows no noise


def test_rows_of_hashed_items_are_spread_and_pairs_of_items_share_them_rarely():
    rows = item_rows(torch.arange(200_000), 40_000, 2)
    assert rows.min() >= 0 and rows.max() < 40_000 and (rows[:, 0] < 20_000).all() and (rows[:, 1] >= 20_000).all()
    load = torch.bincount(rows.flatten(), minlength=40_000)
    assert load.max() < 40 and (load == 0).sum() < 10  # 10 on average
    assert len(torch.unique(rows, dim=0)) > 199_000


def test_settings_that_leave_rows_without_a_use_are_refused():
    with pytest.raises(ConfigError, match="without a use"):
        build_config(ItemsConfig, {"buckets": 8, "input": False, "head": "tied"}, "test")
    assert isinstance(with_items(random_batch(0)).to("cpu").candidates, Candidates)


@pytest.mark.parametrize("part", [{"embedding": {"dropout": 0.1}}, {"hsd": {"dropout": 0.1}}, {"ptd": {"head_dropout": 0.1}},
                                  {"items": {"buckets": 8, "dropout": 0.1}}, {"items": {"buckets": 8, "head_dropout": 0.1}}])
def test_a_model_with_any_dropout_says_so(part):
    """launch/pretrain.py asks for keys by it; without keys the masks would depend on the rank."""
    assert build_config(GPRConfig, part, "test").drops and not GPRConfig().drops
