"""Learning rate along the steps: end points, continuity, and what is refused."""

import itertools

import pytest

from gpr_dist.config import build_config
from gpr_dist.errors import ConfigError
from gpr_dist.training.schedule import ScheduleConfig, learning_rate

SHAPES = pytest.mark.parametrize("shape", ["cosine", "wsd", "constant"])


def rates(**settings):
    config = ScheduleConfig(**{"num_steps": 1000, "lr": 0.01, "warmup_steps": 100, "floor_frac": 0.1, **settings})
    return [learning_rate(config, step) for step in range(config.num_steps)]


@SHAPES
def test_warm_up_is_a_line_from_one_part_to_the_peak(shape):
    found = rates(shape=shape)
    assert found[0] == pytest.approx(0.01 / 100) and found[49] == pytest.approx(0.005) and found[99] == pytest.approx(0.01)
    assert all(b - a == pytest.approx(0.0001) for a, b in itertools.pairwise(found[:100]))
    assert found[100] == pytest.approx(0.01) and max(found) == pytest.approx(0.01)


@SHAPES
@pytest.mark.parametrize("warmup", [0, 100, 700, 1000])
@pytest.mark.parametrize("decay", [0.0, 0.4, 1.0])
def test_never_jumps_and_never_rises_again(shape, warmup, decay):
    found = rates(shape=shape, warmup_steps=warmup, decay_frac=decay)
    assert all(0 < rate <= 0.01 * (1 + 1e-9) for rate in found)
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(found[warmup:]))
    longest_fall = max(a - b for a, b in itertools.pairwise(found))
    assert longest_fall <= (0 if shape == "constant" else 1.6 * 0.01 / max(1, min(1000 * decay, 1000 - warmup)))


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_floor():
    found = rates(shape="cosine")
    assert found[550] == pytest.approx((0.01 + 0.001) / 2) and found[-1] == pytest.approx(0.001, rel=1e-2)
    assert found[325] > 0.008 and found[775] < 0.003


def test_wsd_is_stable_then_falls_on_a_line_to_the_floor():
    found = rates(shape="wsd", decay_frac=0.3)
    assert all(rate == 0.01 for rate in found[100:701]) and found[701] < 0.01
    assert found[850] == pytest.approx((0.01 + 0.001) / 2) and found[-1] == pytest.approx(0.001, rel=0.05)


def test_wsd_does_not_decay_inside_the_warm_up():
    found = rates(shape="wsd", warmup_steps=800, decay_frac=0.5)
    assert found[799] == found[800] == pytest.approx(0.01) and found[900] == pytest.approx(0.0055)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="warmup_steps=50 is longer than num_steps=20"):
        build_config(ScheduleConfig, {"num_steps": 20}, "here")


@pytest.mark.parametrize("wrong", [{"lr": 0}, {"num_steps": 0}, {"warmup_steps": -1}, {"decay_frac": 1.5}, {"floor_frac": -0.1},
                                   {"shape": "linear"}])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build_config(ScheduleConfig, wrong, "here")
