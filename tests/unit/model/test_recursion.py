"""Mixture-of-Recursions: tokens that leave early cost nothing and see nothing of what they left."""

import pytest
import torch
from random_batches import random_batch
from tiny_model import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from gpr_dist.config import build_config
from gpr_dist.errors import ConfigError
from gpr_dist.model.gpr import GPRConfig

HSD = {"num_layers": 4, "recursions": 3, "attention": "reference"}


def routed(model, depths):
    """The router replaced by one that sends every token to its given depth."""
    model.hsd.router.forward = lambda x: (depths[: len(x)], torch.ones(len(x), dtype=x.dtype), x.sum() * 0)
    return model


def flops(model, batch):
    with FlopCounterMode(display=False, depth=4) as counter, torch.no_grad():
        model(batch, task="encode")
    return sum(counter.get_flop_counts()["GPR.hsd"].values())


def test_a_depth_of_one_everywhere_is_the_plain_stack():
    batch = random_batch(1)
    once = routed(tiny_model(hsd=HSD), torch.ones(batch.num_tokens, dtype=torch.long))
    plain = tiny_model(hsd={**HSD, "recursions": 1})
    plain.load_state_dict(once.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(once(batch, task="logits"), plain(batch, task="logits"))


def test_the_operations_of_a_repetition_are_those_of_the_tokens_that_take_it():
    batch = random_batch(2, num_rows=6)
    n = batch.num_tokens
    cost = {share: flops(routed(tiny_model(hsd=HSD), torch.where(torch.arange(n) % 10 < 10 * share, 3, 1)), batch)
            for share in (0.0, 0.3, 1.0)}
    dense = 2 * 2 * n * (4 + 2 * 2) * 16 * 16  # two middle layers, one more pass: q k v u and the FFN
    assert cost[1.0] - cost[0.0] > 2 * dense  # attention comes on top
    assert cost[0.3] - cost[0.0] < 0.32 * (cost[1.0] - cost[0.0])


@pytest.mark.parametrize("deep", [0, 1])
def test_tokens_that_go_on_see_only_one_another(deep):
    """What a token that left early holds at the second pass reaches nobody in it."""
    batch = random_batch(3)
    depths = torch.where(torch.arange(batch.num_tokens) % 2 == deep, 2, 1)
    model = routed(tiny_model(hsd={**HSD, "recursions": 2}), depths)
    seen = []
    middle = model.hsd.layers[1]
    original = middle.forward
    middle.forward = lambda x, rows: (seen.append((len(x), rows.spans.key_offsets[-1], len(rows.position_T))), original(x, rows))[1]
    with torch.no_grad():
        model(batch, task="encode")
    going_on = int((depths == 2).sum())
    assert seen == [(batch.num_tokens,) * 3, (going_on,) * 3]


def test_the_router_is_pushed_towards_equal_depths():
    model, batch = tiny_model(hsd={**HSD, "router_balance": 1.0}), random_batch(5, num_rows=8)
    with torch.no_grad():
        model.hsd.router.logits.bias += torch.tensor([4.0, 0.0, 0.0])
    optimizer = torch.optim.Adam(model.hsd.router.parameters(), 0.1)

    before = model(batch).router
    for _ in range(60):
        optimizer.zero_grad()
        model(batch).router.backward()
        optimizer.step()
    assert before > 2.0 and model(batch).router < 1.2  # 3 when one depth takes all, 1 when they are equal


def test_recursion_needs_layers_to_repeat():
    with pytest.raises(ConfigError, match="num_layers=2 has none"):
        build_config(GPRConfig, {"hsd": {"recursions": 2}}, "test")
