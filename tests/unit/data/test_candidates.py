"""Candidates of the item softmax: all ads, those of the requests' groups, or a sample whose weighted sum estimates the whole."""

import dataclasses

import numpy as np
import pytest
import torch
from random_batches import random_batch

from gpr_dist.data.candidates import CandidatesConfig, ItemCandidates
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.schema import EVERY_AD

M = 400
CODES = np.random.default_rng(0).integers(0, 16, (M, 3))
ADS = np.arange(3, M, dtype=np.int32)
GROUPS = [np.arange(10, 90, dtype=np.int32), np.arange(60, 200, 2, dtype=np.int32)]
ELIGIBILITY = Eligibility(GROUPS, ADS, M)
WEIGHT = np.random.default_rng(1).zipf(1.5, M).clip(max=300).astype(float)


def batch_of(groups, seed=0):
    batch = random_batch(seed, num_rows=6)
    target = torch.from_numpy(np.random.default_rng(seed).choice(ADS, len(batch.target_item_N)))
    group_R = torch.tensor(groups)[torch.arange(len(batch.request_row_R)) % len(groups)]
    return dataclasses.replace(batch, target_item_N=target, request_eligibility_R=group_R)


def candidates(sampled=False):
    config = CandidatesConfig(full_softmax_items=100 if sampled else 1000, num_sampled=64)
    return ItemCandidates(CODES, ELIGIBILITY, config, WEIGHT, seed=5)


def check_columns(batch):
    found = batch.candidates
    assert torch.equal(found.item_C[batch.target_column_N], batch.target_item_N)
    assert (found.item_C.diff() > 0).all() and torch.equal(found.codes_CL, torch.from_numpy(CODES)[found.item_C])


def test_every_ad_where_all_are_eligible():
    batch = candidates().add_to(batch_of([EVERY_AD]), 0)
    check_columns(batch)
    assert batch.candidates.item_C.tolist() == ADS.tolist() and batch.candidates.legal_GC is None and batch.candidates.offset_C is None


@pytest.mark.parametrize("groups", [[0, 1], [1], [EVERY_AD, 0]])
@pytest.mark.parametrize("sampled", [False, True])
def test_each_request_is_told_its_own(groups, sampled):
    batch = candidates(sampled).add_to(batch_of(groups), 3)
    check_columns(batch)
    found = batch.candidates
    allowed_RC = found.legal_GC[found.group_R] & (found.offset_C > -torch.inf)
    drawn = set(found.item_C[found.offset_C > -torch.inf].tolist())
    for group, allowed_C in zip(batch.request_eligibility_R.tolist(), allowed_RC, strict=True):
        legal = set(ELIGIBILITY.items(group).tolist())
        assert set(found.item_C[allowed_C].tolist()) == legal & drawn
        assert sampled or legal <= drawn


def test_a_sample_depends_on_the_step_alone_and_estimates_the_sum_over_all_ads():
    sampler = candidates(sampled=True)
    scores = np.random.default_rng(2).normal(size=M)
    batch, estimates = batch_of([EVERY_AD]), []
    for draw in range(1600):
        found = sampler.add_to(batch, draw).candidates
        estimates.append(float((torch.from_numpy(scores)[found.item_C] + found.offset_C).exp().sum()))
    whole = np.exp(scores[ADS]).sum()
    assert np.mean(estimates) == pytest.approx(whole, abs=4 * np.std(estimates) / 40) and np.std(estimates) < 0.6 * whole
    one, other = (sampler.add_to(batch_of([EVERY_AD], seed), 7).candidates for seed in (0, 1))
    drawn = [found.item_C[found.offset_C > -torch.inf].tolist() for found in (one, other)]
    assert drawn[0] == drawn[1] and 30 < len(drawn[0]) <= 64
