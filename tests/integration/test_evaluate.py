"""`launch/evaluate.py` on a run: every ranker sees the same requests, and a report never replaces one about other data."""

import json
import os
import shutil
import subprocess
import sys

from pretrain_runs import run_script_here
from ranks import ROOT

SETTINGS = ["settings.max_rows=7", "settings.beam_width=8", "settings.ks=[2, 5]"]


def evaluate(cwd, *overrides):
    return subprocess.run([sys.executable, ROOT / "launch" / "evaluate.py", *SETTINGS, *overrides], cwd=cwd, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})


def test_all_rankers_see_the_same_requests_and_other_data_has_its_own_report(python_run, tiny, tmp_path):
    _, trained = python_run
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("wandb"))
    done = evaluate(tmp_path, f"checkpoint={run}")
    assert done.returncode == 0, done.stderr
    first = (run / "evaluation-test.json").read_bytes()
    results, values = json.loads(first)["results"], json.loads(first)["values"]
    assert len(values["bias"]) == 4 and sum(count for _, _, count in values["deciles"]) > 0 and "value head" in done.stdout
    assert list(results) == ["generative", "popularity", "personal frequency", "Markov chain"]
    assert len({result["num_requests"] for result in results.values()}) == 1
    assert len({result["num_targets"] for result in results.values()}) == 1 and results["popularity"]["num_requests"] < 100

    shutil.copytree(trained.parents[1] / "data", tmp_path / "december", ignore=shutil.ignore_patterns("history"))
    run_script_here("evaluate", tmp_path, *SETTINGS, f"checkpoint={run}", "data=december", "baselines=false")
    other = json.loads((run / "evaluation-test-december.json").read_text())
    assert other["data"] == "december" and len(other["results"]) == 1
    again, before = (found["generative"] for found in (other["results"], results))  # equal: the pointer's history was made for it
    assert [again[name] for name in again if "hitr" in name] == [before[name] for name in again if "hitr" in name] != []
    assert (tmp_path / "december" / "history" / "history.json").is_file()
    assert (run / "evaluation-test.json").read_bytes() == first
