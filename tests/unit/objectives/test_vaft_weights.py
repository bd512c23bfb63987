"""How much a target counts (Eq. 4): what it was worth, against the running mean of its action."""

import math

import pytest
import torch

from gpr_dist.config import load_config
from gpr_dist.errors import ConfigError
from gpr_dist.objectives.mtp import mtp_loss, uniform_head_weights
from gpr_dist.objectives.vaft import RunningMeans, VaftConfig, ad_worth, vaft_weights
from gpr_dist.schema import Action

NAN = math.nan
ALL, NONE = torch.tensor([False, True, True]), torch.zeros(3, dtype=torch.bool)
SAW, CLICKED, BOUGHT = int(Action.IMPRESSION), int(Action.CLICK), int(Action.CONVERSION)


def worth(action, value, pctr=NAN, pcvr=NAN, divided=ALL):
    columns = (torch.tensor([x], dtype=torch.float32) for x in (value, pctr, pcvr))
    return float(ad_worth(torch.tensor([action]), *columns, divided))


def test_an_ad_is_worth_its_value_per_chance_of_what_the_user_did():
    assert worth(SAW, 3.0) == worth(SAW, 3.0, 0.1, 0.1) == 3.0
    assert worth(CLICKED, 3.0, 0.125) == worth(CLICKED, 3.0, 0.125, 0.5) == 24.0
    assert worth(BOUGHT, 3.0, 0.125, 0.25) == 96.0
    assert worth(CLICKED, 3.0, 0.125, divided=NONE) == worth(BOUGHT, 3.0, divided=NONE) == 3.0
    assert worth(int(Action.CONSUME), 3.0) == 3.0  # an ad without an action was at least seen


@pytest.mark.parametrize(("action", "columns"), [
    (SAW, (NAN,)), (SAW, (math.inf,)), (CLICKED, (3.0,)), (CLICKED, (3.0, 0.0)), (CLICKED, (3.0, -0.1)), (BOUGHT, (3.0, 0.1)),
    (BOUGHT, (3.0, 0.1, 0.0)), (BOUGHT, (NAN, 0.1, 0.1))])
def test_a_worth_that_was_not_logged_is_not_known(action, columns):
    assert math.isnan(worth(action, *columns))


def test_returned_goods_are_worth_nothing():
    assert worth(SAW, -5.0) == 0.0 and worth(CLICKED, -5.0, 0.1) == 0.0


def weights(actions, worths, means, **settings):
    return vaft_weights(torch.tensor(actions), torch.tensor(worths, dtype=torch.float64), torch.tensor(means, dtype=torch.float64),
                        VaftConfig(**settings)).tolist()


def test_clipped_weights_are_the_actions_times_a_cut_ratio():
    actions, worths = [SAW, SAW, SAW, CLICKED, CLICKED, BOUGHT, BOUGHT], [2.0, 0.1, 1e6, 10.0, 15.0, 0.0, NAN]
    assert weights(actions, worths, [2.0, 10.0, 500.0]) == [1.0, 0.25, 4.0, 2.0, 3.0, 1.0, 4.0]
    found = weights(actions, worths, [2.0, 10.0, 500.0], action_weights=(0, 1, 1), ratio_range=(0, 1.25))
    assert found == [0.0, 0.0, 0.0, 1.0, 1.25, 0.0, 1.0]


def test_an_action_without_a_mean_counts_as_its_mean_would():
    assert weights([SAW, BOUGHT], [NAN, NAN], [NAN, NAN, NAN]) == [1.0, 4.0]
    assert weights([SAW, SAW], [0.0, 2.0], [0.0, NAN, NAN]) == [1.0, 4.0]  # everything before was worth nothing
    assert weights([SAW, CLICKED, BOUGHT], [NAN, NAN, 7.0], [2.0, NAN, 6.0], weights="raw") == [2.0, 4.0, 7.0]
    assert weights([SAW], [NAN], [NAN, NAN, NAN], weights="raw") == [1.0]


def test_raw_weights_are_the_worth_and_ones_are_ones():
    assert weights([SAW, CLICKED, BOUGHT], [0.5, 1e5, 0.0], [1.0, 1.0, 1.0], weights="raw") == [0.5, 1e5, 0.0]
    assert weights([SAW, CLICKED, BOUGHT], [0.5, NAN, 1e9], [NAN, 1.0, 1.0], weights="ones") == [1.0] * 3


def test_running_means_weigh_steps_by_their_counts_and_fade():
    means = RunningMeans.empty()
    assert means.mean_A.isnan().all()
    steps = [([6.0, 5.0, 0.0], [3, 1, 0]), ([1.0, 7.0, 0.0], [1, 1, 0]), ([0.0, 9.0, 8.0], [0, 1, 2])]
    for sums, counts in steps:
        means = means.updated(torch.tensor(sums, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64), memory=0.5)
    assert means.mean_A.tolist() == pytest.approx([(6 * 0.5 + 1) / (3 * 0.5 + 1), (5 / 4 + 7 / 2 + 9) / (1 / 4 + 1 / 2 + 1), 4.0])
    quiet = means.updated(torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), memory=0.5)
    assert quiet.mean_A.equal(means.mean_A) and quiet.count_A.equal(means.count_A)  # also after 10,000 steps without a conversion


def test_the_loss_weighs_its_targets():
    g = torch.Generator().manual_seed(0)
    nll_NL, head_N, weight_N = torch.rand(12, 3, generator=g), torch.arange(12) % 4, torch.rand(12, generator=g)
    head_weights = torch.tensor([0.7, 0.1, 0.1, 0.1])
    obvious = sum(float(head_weights[head_N[n]] * weight_N[n] * nll_NL[n].sum()) for n in range(12)) / 5
    assert float(mtp_loss(nll_NL, head_N, head_weights, 5, weight_N)) == pytest.approx(obvious, rel=1e-6)
    plain = mtp_loss(nll_NL, head_N, uniform_head_weights(4), 5)
    assert mtp_loss(nll_NL, head_N, uniform_head_weights(4), 5, torch.ones(12)).equal(plain)


@pytest.mark.parametrize(("override", "message"), [
    ("weights=twos", "weights"), ("action_weights=[0, 0, 0]", "not all 0"), ("action_weights=[1, -2, 4]", ">= 0"),
    ("ratio_range=[2, 4]", "least <= 1 <= largest"), ("memory=1", "memory"), ("maturity_seconds=-1", "maturity_seconds")])
def test_settings_that_make_no_sense(override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(VaftConfig, None, [override])
