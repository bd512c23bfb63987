"""Labelled pairs: what counts as a click, a conversion, a negative."""

import dataclasses

import numpy as np
import pytest
import torch
from journeys_fixture import NUM_ITEMS, random_journeys, stored_rows

from gpr_dist.data.collate import collate
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.errors import DataError
from gpr_dist.rl.examples import LabelConfig, Labeller, group_sizes, log_doubt, log_sampling_rate
from gpr_dist.schema import EVERY_AD, Action

ADS = np.arange(45, dtype=np.int32)
GROUPS = [np.arange(0, 40, 2, dtype=np.int32), np.arange(30, dtype=np.int32), np.arange(7, dtype=np.int32), ADS[5:], ADS[:1]]
ELIGIBILITY = Eligibility(GROUPS, ADS, NUM_ITEMS)
END = 2_000_000_000


def batch_of(rows):
    rows = np.asarray(rows)
    return collate(stored_rows(random_journeys(30)).take(rows), rows, np.zeros((NUM_ITEMS, 2), np.int32), 3, 2, 3)


def pairs(batch, examples, which):
    """(row, place of the site in it, item) of some examples: the same however the row is packed."""
    request = examples.request_N[which]
    row = batch.request_row_R[request]
    place = batch.request_token_R[request] - batch.offsets_B1[row]
    return sorted(zip(batch.row_ids_B[row].tolist(), place.tolist(), examples.item_N[which].tolist(), strict=True))


def test_actions_are_the_labels_of_every_logged_ad_once():
    batch = batch_of(range(30))
    examples = Labeller(LabelConfig(), ELIGIBILITY, END, training=False)(batch)
    head_0 = batch.target_head_N == 0
    action_N = batch.target_action_N[head_0]
    assert torch.equal(examples.item_N, batch.target_item_N[head_0]) and examples.logged_N.all() and (examples.weight_N == 1).all()
    assert torch.equal(examples.click_N.bool(), action_N >= Action.CLICK)
    assert torch.equal(examples.convert_N.isfinite(), action_N >= Action.CLICK)
    assert torch.equal(examples.convert_N == 1, action_N == Action.CONVERSION) and 0 < examples.convert_N.nansum() < examples.click_N.sum()


def test_clicks_younger_than_their_maturity_teach_no_conversion():
    batch = batch_of(range(30))
    last = int(batch.request_time_R.median())
    examples = Labeller(LabelConfig(maturity_s=100.0), ELIGIBILITY, last + 100, training=False)(batch)
    young_N = batch.request_time_R[examples.request_N] > last
    assert torch.equal(examples.convert_N.isfinite(), (examples.click_N > 0) & ~young_N)
    assert (examples.click_N[young_N] > 0).any()


def test_unshown_ads_are_eligible_and_belong_to_training_alone():
    batch = batch_of(range(30))
    examples = Labeller(LabelConfig(unshown=3), ELIGIBILITY, END)(batch)
    drawn_N = ~examples.logged_N
    groups_N = batch.request_eligibility_R[examples.request_N].numpy()
    assert ELIGIBILITY.contains(groups_N[drawn_N], examples.item_N[drawn_N].numpy()).all()
    assert not examples.weight_N[drawn_N].any() and not examples.click_N[drawn_N].any()
    assert drawn_N.sum() > 2 * len(batch.request_token_R)


def test_sampled_negatives_are_eligible_not_taken_and_stand_for_all_eligible_ads():
    batch = batch_of(range(30))
    config = LabelConfig(kind="sampled_negatives", negatives=200)
    examples = Labeller(config, ELIGIBILITY, END, training=False)(batch)
    taken_N = examples.click_N > 0
    head_0 = batch.target_head_N == 0
    logged = set(zip(batch.target_request_N[head_0].tolist(), batch.target_item_N[head_0].tolist(), strict=True))
    keys = list(zip(examples.request_N.tolist(), examples.item_N.tolist(), strict=True))
    assert sorted(key for key, taken in zip(keys, taken_N, strict=True) if taken) == sorted(logged)
    assert torch.equal(taken_N, examples.logged_N)
    assert not logged & {key for key, taken in zip(keys, taken_N, strict=True) if not taken}
    groups_N = batch.request_eligibility_R[examples.request_N].numpy()
    assert ELIGIBILITY.contains(groups_N[~taken_N], examples.item_N[~taken_N].numpy()).all()
    mass_R = torch.zeros(len(batch.request_token_R)).index_add_(0, examples.request_N[~taken_N], examples.weight_N[~taken_N])
    groups_R = batch.request_eligibility_R.tolist()
    untaken_R = torch.tensor([len(set(ELIGIBILITY.items(group).tolist()) - {item for request, item in logged if request == number})
                              for number, group in enumerate(groups_R)])
    assert float(mass_R.sum()) == pytest.approx(float(untaken_R.sum()), rel=0.02)
    assert (mass_R[untaken_R == 0] == 0).all()


def test_packing_changes_no_example():
    config = LabelConfig(kind="sampled_negatives", negatives=5)
    label = Labeller(config, ELIGIBILITY, END)
    together = batch_of(range(30))
    whole = pairs(together, label(together), slice(None))
    alone = [pair for batch in map(batch_of, [[row] for row in range(30)]) for pair in pairs(batch, label(batch), slice(None))]
    assert whole == sorted(alone) and len(whole) > 100
    other_seed = Labeller(config, ELIGIBILITY, END, seed=1)(together)
    assert pairs(together, other_seed, slice(None)) != whole


def test_the_sampling_rate_is_divided_out():
    sizes = group_sizes(ELIGIBILITY)
    assert sizes.tolist() == [20, 30, 7, 40, 1, 45] and sizes[EVERY_AD] == 45
    config = LabelConfig(kind="sampled_negatives", negatives=10)
    assert log_sampling_rate(config, torch.tensor([1000.0])).item() == pytest.approx(np.log(0.01))
    assert not log_sampling_rate(LabelConfig(), sizes).any()


def test_only_ads_shown_less_than_a_random_one_are_doubted():
    shown_N = torch.tensor([-5.0, -np.log(4) - 1, -np.log(4), 0.0, 3.0]).float()  # -log 4 = as often as one of the 4 random ads
    doubt_N = log_doubt(LabelConfig(unshown=4, pessimism=0.5), shown_N)
    torch.testing.assert_close(doubt_N, torch.tensor([0.5 * (np.log(4) - 5), -0.5, 0, 0, 0]).float(), atol=1e-6, rtol=0)
    for config in (LabelConfig(pessimism=0), LabelConfig(unshown=0), LabelConfig(shown_weight=0), LabelConfig(kind="sampled_negatives")):
        assert not log_doubt(config, shown_N).any()


def test_a_request_of_an_empty_group_is_refused():
    batch = batch_of(range(30))
    empty = dataclasses.replace(batch, request_eligibility_R=torch.zeros_like(batch.request_eligibility_R))
    nothing = Eligibility([np.empty(0, np.int32)], ADS, NUM_ITEMS)
    with pytest.raises(DataError, match="eligibility group 0 is empty"):
        Labeller(LabelConfig(kind="sampled_negatives"), nothing, END)(empty)
