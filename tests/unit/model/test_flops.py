"""Arithmetic of parameters and operations against the real model and PyTorch's own counter."""

from dataclasses import replace

import pytest
import torch
from random_batches import random_batch
from tiny_model import P, tiny_model
from torch.utils.flop_counter import FlopCounterMode

from gpr_dist.model.flops import TRAINING_FACTOR, Work, count_parameters, forward_flops, training_flops, work_of
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.schema import TokenType

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
