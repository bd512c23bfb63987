"""Arithmetic of parameters and operations against the real model and PyTorch's own counter."""

from dataclasses import replace

import pytest
import torch
from random_batches import random_batch
from tiny_model import P, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from gpr_dist.model.flops import TRAINING_FACTOR, Work, count_parameters, forward_flops, training_flops, work_of
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.schema import Candidates, TokenType

D, V = 32, 256


def counted(model, batch, part):
    """Operations PyTorch counts in one module, by kind."""
    with FlopCounterMode(display=False, depth=4) as counter, torch.no_grad():
        model(batch)
    return sum(counter.get_flop_counts()[part].values())


def model_and_batch(**settings):
    attention = {"attention": "reference"}  # the counter does not know the CPU's fused attention
    model = tiny_model(width=D, codebook_size=V, hsd={"num_layers": 3, "ffn_multiple": 3.0, **attention},
                       ptd={"num_layers": 2, **attention, **settings.pop("ptd", {})}, **settings)
    return model, random_batch(1, num_rows=6, codebook_size=V)


@pytest.mark.parametrize("ptd", [{}, {"num_thinking": 2, "refining": True}])
def test_operations_equal_the_counter_where_the_convention_counts(ptd):
    model, batch = model_and_batch(ptd=ptd)
    lengths, sites = batch.offsets_B1.diff(), batch.request_token_R - batch.offsets_B1[batch.request_row_R] + 1
    work = work_of(batch, P)
    openings = {(r, h) for r, h in zip(batch.target_request_N.tolist(), batch.target_head_N.tolist(), strict=True)}
    pairs, of_openings = sum(int(n * (n + 1) / 2) for n in lengths), sum(int(sites[r]) for r, _ in openings)
    assert work == Work(batch.num_tokens, pairs, len(openings), of_openings, len(batch.target_head_N),
                        sum(int(sites[r]) for r in batch.target_request_N))
    # The reference attention computes masked pairs too; the convention counts the allowed ones.
    lengths_R = lengths[batch.request_row_R]
    everything = replace(work, token_pairs=int((lengths**2).sum()), opening_intents=sum(int(lengths_R[r]) for r, _ in openings),
                         target_intents=int(lengths_R[batch.target_request_N].sum()))
    flops = forward_flops(model.config, everything)
    norms = 3 * 2 * 2 * batch.num_tokens * len(TokenType) * D  # one-hot products of the first norms, left out by convention
    assert counted(model, batch, "GPR.hsd") == flops["hsd.dense"] + flops["hsd.attention"] + norms
    assert counted(model, batch, "GPR.hte") == flops["hte"]
    among_codes = 2 * 2 * D * 2 * work.targets * 2 * 3  # of several positions at once: a single one is no matrix product
    adapters = 2 * len(batch.request_token_R) * 4 * D * D
    refining = flops.get("ptd.refining", 0)
    if refining:
        among_codes = 2 * 2 * D * 2 * work.targets * 2 * 5
    assert counted(model, batch, "GPR.ptd") == flops["ptd.dense"] + flops["ptd.attention"] + among_codes + adapters + refining
    assert counted(model, batch, "GPR.codes") == flops["ptd.codes"]
    # All that is left out together, and the input embedding, is small even in a model as narrow as this one.
    assert counted(model, batch, "GPR") == pytest.approx(sum(flops.values()), rel=0.05)


def test_operations_of_a_pointer_equal_the_counter():
    settings = {"pointer": {"width": 8}}
    model, batch = model_and_batch(**settings)
    older = torch.arange(batch.num_rows + 1) * 5
    num_older = 5 * batch.num_rows
    item = torch.arange(num_older) % 7
    batch = replace(batch, past_offsets_B1=older, past_item_X=item, past_codes_XL=item[:, None].expand(-1, 3), past_time_X=item,
                    past_action_X=item % 5, copy_request_M=torch.tensor([0, 0, 2]), copy_source_M=torch.tensor([1, batch.num_tokens, 30]),
                    target_copy_NL2=torch.zeros(len(batch.target_head_N), 3, 2, dtype=torch.int64))
    work, requests = work_of(batch, P), len(batch.request_row_R)
    assert work.past_events == num_older and work.copy_pairs == int((batch.offsets_B1.diff() + 5)[batch.request_row_R].sum())
    of_requests = 2 * requests * (D * 8 + D * P + 2 * P)  # queries, gates and evidence, left out by convention
    assert counted(model, batch, "GPR.pointer") == forward_flops(model.config, work)["pointer"] + of_requests
    assert "pointer" not in forward_flops(model_and_batch()[0].config, work)


def test_training_costs_about_three_forwards():
    model, batch = model_and_batch()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(batch)
    with FlopCounterMode(display=False) as both:
        out = model(batch)
        (out.nll_NL.sum() + out.values_NL1.sum()).backward()
    assert both.get_total_flops() == pytest.approx(TRAINING_FACTOR * forward.get_total_flops(), rel=0.1)
    work = work_of(batch, P)
    assert training_flops(model.config, work) == 3 * sum(forward_flops(model.config, work).values())


def test_a_window_bounds_the_pairs_and_work_adds_up():
    _, batch = model_and_batch()
    assert work_of(batch, P, 2).target_intents < work_of(batch, P).target_intents == work_of(batch, P, 1000).target_intents
    assert work_of(batch, P, 1).target_intents == len(batch.target_head_N)
    assert work_of(batch, P) + work_of(batch, P) == Work(*(2 * x for x in vars(work_of(batch, P)).values()))


@pytest.mark.parametrize("settings", [{}, {"width": 48, "num_mtp_heads": 2, "num_levels": 4, "num_user_features": 3, "num_env_features": 1,
                                           "hsd": {"num_layers": 3, "ffn_multiple": 4.0}, "ptd": {"num_layers": 2}}])
def test_parameters_are_counted_without_allocating_any(settings):
    config = GPRConfig(**settings)
    counts, model = count_parameters(config), GPR(config)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts == {part: sum(p.numel() for p in child.parameters()) for part, child in model.named_children()}
    large = GPRConfig(width=4096, codebook_size=8192, hsd={"num_layers": 40, "num_heads": 32}, ptd={"num_heads": 32})
    assert sum(count_parameters(large).values()) > 4e9


def test_the_item_head_counts_every_candidate_of_every_request():
    settings = {"buckets": 300, "num_items": 300}
    model = tiny_model(width=D, codebook_size=V, items=settings)
    batch = random_batch(2, num_rows=4, codebook_size=V)
    candidates = Candidates(torch.arange(300), torch.zeros(300, 3, dtype=torch.long))
    batch = replace(batch, item_T=batch.item_T.clamp_max(299), candidates=candidates, target_column_N=batch.target_item_N.clamp_max(299))
    assert counted(model, batch, "GPR.items") == forward_flops(model.config, work_of(batch, P))["items"] > 0
    assert count_parameters(model.config)["items"] == 300 * (2 * D + 1) + 2 * D
