"""bench.py checkpoint: a saver whose ranks are threads goes through its rounds, and the table says what was measured."""

import json
from pathlib import Path

from documents import launch_module
from thread_ranks import Group

from gpr_dist.training import checkpoint

bench = launch_module("bench_checkpoint")


def test_rounds_and_table(tmp_path: Path, capsys):
    run, config = tmp_path / "1", bench.CheckpointBenchConfig(layers=1, width=32, repetitions=2, quiet_steps=1)
    engine = Group(1, {"a": (32, 32)}).engines[0]
    found = bench.measure_saves(engine, run, config)
    assert [folder.name for folder in checkpoint.list_steps(run)] == ["step-000004"]
    assert found["mb"] == 12 * 32 * 32 / 1e6 and {path.name for path in tmp_path.iterdir()} == {"1"}
    assert all(len(found["seconds"][name]) == 2 for name in ("plain", "sync", "sync write", "background", "background write"))
    read = bench.measure_read(engine, run, config)
    assert read["owned_mb"] == found["mb"] and json.dumps(found)
    found["sync"]["stall_s"], found["background"]["stall_s"] = 2.0, 0.05
    bench.report({"save": {"1": found}, "read": {"1 -> 1": [read]}})
    assert "2.5 %" in capsys.readouterr().out
