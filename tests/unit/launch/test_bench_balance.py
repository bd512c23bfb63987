"""Balance benchmark: the plan's table over drawn and stored journeys, and two processes that time what was planned."""

import json

import numpy as np
from documents import launch_module
from journeys_fixture import random_journeys, write_split

PLAN = {"num_rows": 20_000, "ranks": (2, 6), "rows_per_rank": 32, "shuffle_rows": 256, "rows_per_batch": 16}


def test_the_table_and_two_ranks(tmp_path, capfd):
    bench = launch_module("bench_balance")
    measure = {"steps": 1, "rows_per_rank": 8, "width": 16, "max_tokens": 200}
    found = bench.run_bench(bench.BalanceBenchConfig(**PLAN, measure=measure, out=str(tmp_path / "out.json")))
    assert json.loads((tmp_path / "out.json").read_text())["measured"] == found["measured"]
    for world_size in (2, 6):
        rows, by_work = (found["planned"][mode][world_size] for mode in ("rows", "work"))
        assert 1 <= by_work["worst"] < 1.01 < rows["worst"]
        assert by_work["average"] <= by_work["worst"] <= by_work["forwards"] + 1e-9
        assert 1 < by_work["read_all"] < 1 + 1.5 * (world_size - 1) * 16 / (256 * world_size) and by_work["read_most"] < 1.3
        assert by_work["plan_ms"] > 0 and by_work["plan_mb"] > 0
    by_work = found["measured"]["work"]
    assert 1 <= by_work["planned_worst"] < 1.1 and 1 <= by_work["over_all"] <= by_work["worst"] < 2
    printed = capfd.readouterr().out
    assert printed.count("2 gloo ranks") == 2 and "fair share" in printed


def test_stored_journeys(tmp_path):
    bench = launch_module("bench_balance")
    write_split(tmp_path / "split", random_journeys(200))
    plan = {**PLAN, "shards": str(tmp_path / "split"), "ranks": (2,), "rows_per_rank": 8, "shuffle_rows": 32, "measure": {"steps": 0}}
    numbers = bench.run_bench(bench.BalanceBenchConfig(**plan))["planned"]["work"][2]
    assert 1 <= numbers["worst"] < 1.2 and numbers["read_all"] >= 1


def test_drawn_lengths_are_the_same_whenever_they_are_asked_for():
    bench = launch_module("bench_balance")
    *_, num_tokens = bench.open_lengths(bench.BalanceBenchConfig(max_tokens=512, rows_per_batch=100_000))
    rows = np.array([0, 1, 999_999_999, 500_000_000])
    assert np.array_equal(num_tokens[rows], num_tokens[rows[::-1]][::-1])
    many = num_tokens[np.arange(10**9 - 50_000, 10**9)]
    assert many.min() >= 2 and many.max() == 512 and abs(np.median(many) - np.exp(5)) < 5
