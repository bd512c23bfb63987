"""Losses by kind against a loop, and what ranks tell each other in one sum."""

import time
from types import SimpleNamespace

import pytest
import torch
from random_batches import empty_batch, random_batch

from gpr_dist.schema import Action, TokenType
from gpr_dist.training.panels import panel_of
from gpr_dist.training.step_metrics import (
    KINDS,
    RANK_FACTS,
    losses_by_kind,
    losses_by_place,
    own_clock,
    rank_facts,
    rank_metrics,
    sum_by_kind,
)


def test_losses_by_kind_are_means_over_the_first_heads_ads():
    batches = [random_batch(seed) for seed in range(3)]
    nll = [torch.rand(len(batch.target_head_N)) for batch in batches]
    slow: dict[str, list[float]] = {}
    for batch, nll_N in zip(batches, nll, strict=True):
        for n in range(len(nll_N)):
            if batch.target_head_N[n] == 0:
                site = batch.request_token_R[batch.target_request_N[n]]
                for name in (f"loss_after/{TokenType(int(batch.token_type_T[site])).name}",
                             f"loss_action/{Action(int(batch.target_action_N[n])).name.lower()}"):
                    slow.setdefault(name, []).append(float(nll_N[n]))
    found = losses_by_kind(sum(sum_by_kind(batch, nll_N) for batch, nll_N in zip(batches, nll, strict=True)))
    assert found == pytest.approx({name: sum(values) / len(values) for name, values in slow.items()}) and len(found) > 2
    assert set(found) <= set(KINDS) and losses_by_kind(sum_by_kind(empty_batch(), torch.zeros(0))) == {}


def test_every_rank_learns_every_ranks_facts_from_one_sum():
    ranks = [SimpleNamespace(rank=rank, world_size=3) for rank in range(3)]
    total = sum(rank_facts(rank, rank.rank == 2, busy, waited, flops) for rank, busy, waited, flops in
                zip(ranks, (1.0, 4.0, 1.0), (0.1, 0.0, 0.3), (10.0, 11.0, 9.0), strict=True))
    facts_WF = total.view(3, len(RANK_FACTS))
    assert facts_WF[:, 0].tolist() == [0, 0, 1]
    found = rank_metrics(facts_WF)
    assert found.pop("memory_gib") > 0.01
    assert found == pytest.approx({"loader_wait_s": 0.3, "straggler_gap": 2.0, "straggler_rank": 1, "work_gap": 1.1})
    assert rank_metrics(facts_WF[:1]).keys() == {"loader_wait_s", "memory_gib"}, "a rank alone is nobody's straggler"


def test_on_a_cpu_waiting_is_no_work():
    engine = SimpleNamespace(device=torch.device("cpu"))
    started = own_clock(engine)
    time.sleep(0.05)
    assert own_clock(engine) - started < 0.02


def test_losses_by_place():
    found = losses_by_place(torch.tensor([[2.0, 4.0], [1.0, 1.0]]), torch.tensor([2.0, 0.0]))
    assert found == {"loss_head/1": 3.0, "loss_head/2": 2.0, "loss_level/1": 1.5, "loss_level/2": 2.5}


@pytest.mark.parametrize(("metric", "panel"), [("loss", "loss/total"), ("loss_head/2", "loss/head_2"), ("loss_level/1", "loss/level_1"),
                                               ("loss_action/click", "loss/action_click"), ("mfu", "speed/mfu"),
                                               ("checkpoint/seconds", "time/checkpoint"),
                                               ("checkpoint/write_seconds", "time/checkpoint_write_seconds"),
                                               ("memory_gib", "memory/rank_max"), ("straggler_gap", "straggler/gap"),
                                               ("validation/ndcg@10", "validation/ndcg@10"), ("reward", "objective/reward"),
                                               ("vaft/weight_frac/click", "vaft/weight_frac/click")])
def test_wandb_groups_by_what_is_before_the_slash(metric, panel):
    assert "/".join(panel_of(metric)) == panel
