"""Arithmetic of parameters and operations against the real model and PyTorch's own counter."""

import pytest
import torch
from random_batches import random_batch
from tiny_model import tiny_model
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


def test_operations_equal_the_counter_where_the_convention_counts():
    model, batch = model_and_batch()
    lengths, sites = batch.offsets_B1.diff(), batch.request_token_R - batch.offsets_B1[batch.request_row_R] + 1
    work = work_of(batch, 3)
    assert work == Work(batch.num_tokens, sum(int(n * (n + 1) / 2) for n in lengths), 3 * len(batch.target_head_N),
                        3 * sum(int(sites[r]) for r in batch.target_request_N))
    # The reference attention computes masked pairs too; the convention counts the allowed ones.
    lengths_N = lengths[batch.request_row_R][batch.target_request_N]
    everything = Work(work.tokens, int((lengths**2).sum()), work.decoded, 3 * int(lengths_N.sum()))
    flops = forward_flops(model.config, everything)
    norms = 3 * 2 * 2 * 2 * batch.num_tokens * len(TokenType) * D  # one-hot products of the typed norms, left out by convention
    assert counted(model, batch, "GPR.hsd") == flops["hsd.dense"] + flops["hsd.attention"] + norms
    assert counted(model, batch, "GPR.hte") == flops["hte"]
    among_codes = 2 * 2 * 2 * work.decoded * 3 * D
    adapters = 2 * len(batch.request_token_R) * 4 * D * D
    assert counted(model, batch, "GPR.ptd") == flops["ptd.dense"] + flops["ptd.attention"] + among_codes + adapters
    assert counted(model, batch, "GPR.codes") == flops["ptd.codes"]
    # All that is left out together, and the input embedding, is small even in a model as narrow as this one.
    assert counted(model, batch, "GPR") == pytest.approx(sum(flops.values()), rel=0.05)


def test_training_costs_about_three_forwards():
    model, batch = model_and_batch()
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(batch)
    with FlopCounterMode(display=False) as both:
        out = model(batch)
        (out.logits_NLV.sum() + out.values_NL1.sum()).backward()
    assert both.get_total_flops() == pytest.approx(TRAINING_FACTOR * forward.get_total_flops(), rel=0.1)
    work = work_of(batch, 3)
    assert training_flops(model.config, work) == 3 * sum(forward_flops(model.config, work).values())


def test_a_window_bounds_the_pairs_and_work_adds_up():
    _, batch = model_and_batch()
    assert work_of(batch, 3, 2).decoded_pairs < work_of(batch, 3).decoded_pairs == work_of(batch, 3, 1000).decoded_pairs
    assert work_of(batch, 3, 1).decoded_pairs == 3 * len(batch.target_head_N)
    assert work_of(batch, 3) + work_of(batch, 3) == Work(*(2 * x for x in vars(work_of(batch, 3)).values()))


@pytest.mark.parametrize("settings", [{}, {"width": 48, "num_mtp_heads": 2, "num_levels": 4, "num_user_features": 3, "num_env_features": 1,
                                           "hsd": {"num_layers": 3, "ffn_multiple": 4.0}, "ptd": {"num_layers": 2}}])
def test_parameters_are_counted_without_allocating_any(settings):
    config = GPRConfig(**settings)
    counts, model = count_parameters(config), GPR(config)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts == {part: sum(p.numel() for p in child.parameters()) for part, child in model.named_children()}
    large = GPRConfig(width=4096, codebook_size=8192, hsd={"num_layers": 40, "num_heads": 32}, ptd={"num_heads": 32})
    assert sum(count_parameters(large).values()) > 4e9
