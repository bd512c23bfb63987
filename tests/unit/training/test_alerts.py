"""A person is warned of what is unusual, once, and of nothing else."""

import numpy as np
import pytest

from gpr_dist.training.alerts import AlertConfig, Alerts

CONFIG = AlertConfig(window_steps=50, first_after_steps=20, repeat_after_steps=40)


def run(losses, rates=None, waits=None, config=CONFIG):
    """(step, kind) of every alert; steps take a second."""
    alerts, found = Alerts(config), []
    for step, loss in enumerate(losses, 1):
        rate = 100.0 if rates is None else rates[step - 1]
        found += [(step, alert.kind) for alert in alerts.step(step, loss, rate, 0.0 if waits is None else waits[step - 1], 1.0)]
    return found


def noisy(count, seed=0):
    return list(5 + 0.1 * np.random.default_rng(seed).standard_normal(count))


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_falling_loss_are_no_spikes(seed):
    assert run(noisy(400, seed)) == run(np.linspace(9, 2, 400)) == run([3.0] * 100 + [3.01] * 100) == []


def test_a_spike_is_seen_and_does_not_hide_the_next():
    losses = noisy(200)
    losses[99], losses[160] = 7.0, 7.0
    assert run(losses) == [(100, "loss_spike"), (161, "loss_spike")]


def test_the_first_steps_only_teach():
    losses = noisy(100)
    losses[10], losses[25] = 50.0, 50.0
    assert run(losses) == [(26, "loss_spike")]


def test_a_warning_is_repeated_only_after_a_while():
    losses = [*noisy(50), 8.0, 8.0, 8.0, *noisy(30), 8.0, *noisy(20), 8.0]
    assert run(losses) == [(51, "loss_spike"), (105, "loss_spike")]


def test_waiting_for_data_counts_over_the_window():
    assert run(noisy(200), waits=[0.1] * 200) == []
    assert run(noisy(60), waits=[0.0] * 10 + [0.9] + [0.0] * 49) == [], "one slow read is no state"
    assert run(noisy(60), waits=[0.3] * 60) == [(20, "loader_wait"), (60, "loader_wait")]


def test_a_lasting_loss_of_speed_is_seen_a_hiccup_is_not():
    rates = [100.0] * 60
    rates[30], rates[31] = 10.0, 10.0
    assert run(noisy(60), rates=rates) == []
    assert run(noisy(60), rates=[100.0] * 40 + [40.0] * 20) == [(43, "throughput")]
    assert run(noisy(60), rates=[100.0] * 40 + [60.0] * 20) == []


def test_ranks_with_other_speeds_see_the_same_spikes():
    losses = noisy(100)
    losses[70] = 9.0
    one, two = run(losses, rates=[1.0] * 100, waits=[0.9] * 100), run(losses)
    assert [alert for alert in one if alert[1] == "loss_spike"] == two == [(71, "loss_spike")]


def test_a_resumed_run_knows_what_was_usual():
    before, kept = noisy(100), []
    alerts = Alerts(CONFIG, kept)
    for step, loss in enumerate(before, 1):
        alerts.step(step, loss, 1.0, 0.0, 1.0)
    assert kept == before[-50:]
    assert [alert.kind for alert in Alerts(CONFIG, list(kept)).step(101, 7.0, 1.0, 0.0, 1.0)] == ["loss_spike"]
