"""One run, many faults: no row is lost or repeated, and the losses are those of a run that was left alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pretrain_runs import build_tiny_data

SCRIPT = Path(__file__).with_name("soak.py")
KINDS = 13


def run_soak(folder: Path, *arguments: str, timeout: float) -> dict:
    """soak.py in a process of its own, which forks its ranks; the report."""
    build_tiny_data(folder)
    with open(folder / "soak.log", "w") as log:
        code = subprocess.run([sys.executable, str(SCRIPT), str(folder), *arguments], stdout=log, stderr=log, timeout=timeout,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    said = (folder / "soak.log").read_text()
    assert code == 0, said[-8000:]
    print(said)
    return json.loads((folder / "soak.json").read_text())


def check(report: dict) -> None:
    assert report["rows_lost"] == report["rows_repeated"] == 0
    assert report["epochs_with_each_row_once"] == report["full_epochs"] >= 1
    assert report["steps_before_the_ranks_changed"] > 2 and report["steps_with_another_loss_before_the_ranks_changed"] == 0
    assert report["largest_difference_of_a_loss"] < 1e-5
    assert all(fault["recover_s"] > 0 for fault in report["faults"])


def test_a_few_faults(tmp_path):
    check(run_soak(tmp_path, "--faults", "0", timeout=400))


@pytest.mark.soak
def test_a_hundred_faults(tmp_path):
    """Half an hour at most. `pytest -m soak -s tests/soak` prints the table of README.md."""
    report = run_soak(tmp_path, "--faults", "100", "--seconds", "1500", timeout=1800)
    check(report)
    assert len(report["faults"]) >= 100 and len({fault["kind"] for fault in report["faults"]}) == KINDS
    assert {fault["ranks"] for fault in report["faults"]} == {1, 2, 3}
