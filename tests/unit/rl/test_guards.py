"""Guards: what they measure against a slow count, when they stop, and that they remember."""

import pyarrow as pa
import pytest
import torch
from rl_market import ITEMS, market_batch, sampler
from tiny_model import tiny_model

from gpr_dist.errors import ConfigError
from gpr_dist.rl.guards import GuardConfig, Guards, exposure_by_group, exposure_sums, item_groups, seen_before
from gpr_dist.schema import TokenType

FINE = {"kl": 0.1, "entropy": 0.5, "group_share": 0.1, "repetition": 0.2, "reward": 1.0}


def rolled_out():
    rollout = sampler(tiny_model(), num_candidates=6)(market_batch(1, num_rows=5), 0)
    torch.manual_seed(0)
    return rollout, *(-10 * torch.rand(len(rollout.group_N)) for _ in range(2))


def test_repetition_equals_a_walk_over_the_row():
    batch = sampler(tiny_model(), num_candidates=30, requests_per_row=9)(market_batch(1, num_rows=5), 0).batch
    for n, found in enumerate(seen_before(batch).tolist()):
        request = batch.target_request_N[n]
        first, site = int(batch.offsets_B1[batch.request_row_R[request]]), int(batch.request_token_R[request])
        ads = [int(batch.item_T[t]) for t in range(first, site + 1) if batch.token_type_T[t] == TokenType.I]
        assert found == (int(batch.target_item_N[n]) in ads)
    assert seen_before(batch).any() and not seen_before(batch).all()


def test_sums_are_expectations_under_the_renormalised_policy():
    rollout, log_p, reference = rolled_out()
    counts = torch.ones(len(rollout.batch.request_row_R), dtype=torch.bool)
    counts[int(rollout.group_N[0])] = False
    truth = torch.rand(len(log_p))
    found = exposure_sums(log_p, reference, rollout.batch, counts, rollout.value_N, truth)
    expected = dict.fromkeys(found, 0.0)
    seen, shares = seen_before(rollout.batch), torch.zeros(3, dtype=torch.float64)
    for request in counts.nonzero().flatten().tolist():
        mine = rollout.group_N == request
        if not mine.any():
            continue
        p, q = log_p[mine].softmax(0), reference[mine].softmax(0)
        expected["kl"] += float((p * (p / q).log()).sum())
        expected["entropy"] += float(-(p * p.log()).sum() / torch.tensor(float(mine.sum())).log())
        expected["candidate_mass"] += float(log_p[mine].exp().sum())
        for name, value in (("repetition", seen.float()), ("reward", rollout.value_N), ("truth", truth)):
            expected[name] += float((p * value[mine]).sum())
        shares.index_add_(0, rollout.batch.target_item_N[mine] % 3, p.double())
    expected["requests"] = float(counts.sum())
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected, rel=1e-4)
    by_group = exposure_by_group(log_p, rollout.batch, counts, torch.arange(ITEMS) % 3)
    torch.testing.assert_close(by_group, shares, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "limit", "bad"), [("max_kl", 1.0, {"kl": 2.0}), ("min_entropy", 0.1, {"entropy": 0.05}),
                                                    ("max_group_share", 0.5, {"group_share": 0.6}),
                                                    ("max_repetition", 0.5, {"repetition": 0.7})])
def test_only_checks_in_a_row_outside_a_limit_stop(name, limit, bad):
    guards = Guards(GuardConfig(patience=2, **{name: limit}))
    for metrics in (FINE, FINE | bad, FINE, FINE | bad):
        guards.check(metrics)
        assert guards.stopped is None
    guards.check(FINE | bad)
    assert f"guard {name.removeprefix('max_').removeprefix('min_')} = " in guards.stopped and "for 2 checks" in guards.stopped


def test_reward_that_grows_while_the_truth_falls_is_noticed():
    guards = Guards(GuardConfig(patience=1, max_divergence=0.3))
    for step in range(5):
        found = guards.check(FINE | {"reward": 1.0, "truth": 5.0 - 0.01 * step})
    assert guards.stopped is None and found["divergence"] == pytest.approx(0, abs=0.02)
    for step in range(20):
        guards.check(FINE | {"reward": 1.0 + 0.1 * step, "truth": 5.0 - 0.1 * step})
    assert "divergence" in guards.stopped


def test_a_stopped_run_stays_stopped_until_its_limits_change():
    config = GuardConfig(patience=1, max_kl=0.05)
    guards = Guards(config)
    guards.check(FINE)
    assert guards.stopped and Guards.of(config, guards.state()).stopped == guards.stopped
    assert Guards.of(GuardConfig(patience=1, max_kl=1.0), guards.state()).stopped is None
    assert Guards.of(config, None).stopped is None


def test_when_checks_are_due():
    assert [Guards(GuardConfig(every_steps=n)).is_due(4) for n in (0, 1, 2, 3)] == [False, True, True, False]


def test_groups_of_items_come_from_the_catalogue(tmp_path):
    (tmp_path / "catalogue").mkdir()
    table = pa.table({"item_id": list("abcd"), "advertiser": ["x", None, "y", "x"], "lists": [[1], [], [2], [3]]})
    with pa.OSFile(str(tmp_path / "catalogue" / "catalogue.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    groups = item_groups(tmp_path, "advertiser", 4)
    assert groups[0] == groups[3] != groups[2] and len(set(groups.tolist())) == 3
    assert item_groups(tmp_path, "brand", 4).tolist() == item_groups(tmp_path, None, 4).tolist() == [0, 1, 2, 3]
    assert item_groups(tmp_path, "advertiser", 6).tolist() == [*groups.tolist(), groups[1], groups[1]], "ads younger than the catalogue"
    with pytest.raises(ConfigError, match=r"guards.group_column=lists"):
        item_groups(tmp_path, "lists", 4)
