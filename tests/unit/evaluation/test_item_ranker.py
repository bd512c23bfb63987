"""The item ranker against the model's scores sorted request by request: eligibility, groups that differ, items seen."""

import dataclasses

import numpy as np
import pytest
import torch
from random_batches import empty_batch, random_batch
from tiny_model import tiny_model

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.evaluation.item_ranker import ItemRanker
from gpr_dist.evaluation.journey_log import Lists
from gpr_dist.schema import EVERY_AD

M, K = 60, 12
CODES = np.random.default_rng(0).integers(0, 16, (M, 3))
ADS = np.arange(4, M, dtype=np.int32)
GROUPS = [np.arange(8, 30, 2, dtype=np.int32), np.arange(20, 26, dtype=np.int32)]
ELIGIBILITY = Eligibility(GROUPS, ADS, M)


@pytest.mark.parametrize("groups", [[EVERY_AD], [0, 1], [1, EVERY_AD, 0]])
@pytest.mark.parametrize("with_seen", [False, True])
def test_the_best_eligible_items_that_were_not_seen(groups, with_seen):
    model = tiny_model(items={"buckets": M, "num_items": M})
    batch = random_batch(3, num_rows=4)
    num_requests = len(batch.request_row_R)
    group_R = torch.tensor(groups)[torch.arange(num_requests) % len(groups)]
    batch = dataclasses.replace(batch, item_T=torch.where(batch.item_T >= 0, batch.item_T % M, -1), request_eligibility_R=group_R)
    rng = np.random.default_rng(1)
    seen = [np.unique(rng.integers(0, M, rng.integers(0, 15))).astype(np.int32) for _ in range(num_requests)]
    lists = Lists(np.concatenate([[0], np.cumsum([len(items) for items in seen])]), np.concatenate(seen)) if with_seen else None
    item_RK, score_RK = ItemRanker(model, "cpu", CODES, ELIGIBILITY, K)(batch, lists)

    hidden = model(batch, task="encode").intents.hidden_TD[batch.request_token_R]
    scores = (model.items.norm(hidden) @ model.items.output.weight.T + model.items.bias.weight[:, 0]).detach()
    for request, group in enumerate(group_R.tolist()):
        eligible = ELIGIBILITY.items(group)
        log_p = dict(zip(eligible.tolist(), scores[request, eligible].log_softmax(0).tolist(), strict=True))
        wanted = sorted((item for item in log_p if not with_seen or item not in seen[request]), key=lambda item: -log_p[item])[:K]
        assert item_RK[request, :len(wanted)].tolist() == wanted and (item_RK[request, len(wanted):] == -1).all()
        assert score_RK[request, :len(wanted)].tolist() == pytest.approx([log_p[item] for item in wanted], abs=1e-4)
        assert (score_RK[request, len(wanted):] == -torch.inf).all()


def test_an_empty_batch_is_one_call_too():
    calls = []
    model = tiny_model(items={"buckets": M, "num_items": M})

    def counted(*arguments, **named):
        calls.append(named["task"])
        return model(*arguments, **named)

    item_RK, score_RK = ItemRanker(counted, "cpu", CODES, ELIGIBILITY, K)(empty_batch())
    assert item_RK.shape == score_RK.shape == (0, K) and calls == ["rank_items"]
