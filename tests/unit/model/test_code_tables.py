"""The hand-written list of code tables against the real model: nothing forgotten, nothing extra, the right order of rows."""

import dataclasses

import pytest
import torch
from random_batches import random_batch
from tiny_model import L, V, tiny_model

from gpr_dist.model.code_tables import code_tables
from gpr_dist.model.gpr import GPR, GPRConfig


def shapes(**settings) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPR(GPRConfig(width=8, **settings)).named_parameters()}


@pytest.mark.parametrize("num_levels", [1, 3])
def test_exactly_the_parameters_that_grow_with_the_codebook(num_levels):
    small, large = (shapes(num_levels=num_levels, codebook_size=size) for size in (5, 7))
    tables = code_tables(GPRConfig(width=8, num_levels=num_levels, codebook_size=5))
    assert tables.keys() == {name for name in small if small[name] != large[name]}
    for name, table in tables.items():
        assert table.shape == small[name] and table.flat_shape[:2] == (num_levels, 5)
        assert torch.Size(table.flat_shape).numel() == torch.Size(small[name]).numel()


def test_renumbering_codes_and_moving_their_rows_changes_nothing():
    """π(codes) with rows moved by π: same values, logits permuted. A table that is not listed, or listed in another order, shows."""
    batch, model, moved = random_batch(3, num_rows=4), tiny_model(), tiny_model()
    order_LV = torch.stack([torch.randperm(V, generator=torch.Generator().manual_seed(level)) for level in range(L)])
    weights = moved.state_dict()
    for name, table in code_tables(model.config).items():
        flat = weights[name].clone().view(table.flat_shape)
        for level in range(L):
            weights[name].view(table.flat_shape)[level, order_LV[level]] = flat[level]
    level_L = torch.arange(L)

    def renumber(codes):
        return torch.where(codes >= 0, order_LV[level_L, codes.clamp_min(0)], codes)

    renumbered = dataclasses.replace(batch, codes_TL=renumber(batch.codes_TL), target_codes_NL=renumber(batch.target_codes_NL))
    with torch.no_grad():
        values = [network(data).values_NL1 for network, data in ((model, batch), (moved, renumbered))]
        before, after, unmoved = model(batch, task="logits"), moved(renumbered, task="logits"), model(renumbered, task="logits")
    torch.testing.assert_close(*values)
    for level in range(L):
        torch.testing.assert_close(after[:, level, order_LV[level]], before[:, level])
    assert (unmoved - before).abs().max() > 0.1  # the renumbering matters


def test_the_standard_deviation_is_the_initialisers():
    torch.manual_seed(0)
    config = GPRConfig(width=64, codebook_size=256)
    parameters = dict(GPR(config).named_parameters())
    for name, table in code_tables(config).items():
        values = parameters[name].detach()
        assert float(values.std()) == pytest.approx(table.std, rel=0.02) and abs(float(values.mean())) < 0.01
