"""The page of a run shows what its folder says, for finished, failed, killed and old runs, alone and beside each other."""

import json
import re

import numpy as np
import pytest
import yaml

from gpr_dist.errors import DataError
from gpr_dist.training.run_log import curves_of, differences, read_run
from gpr_dist.training.run_page import MAX_POINTS, _limits, format_runs, run_alarms, run_page, summary

START = {"time": 1e9, "step": 0, "event": "start", "commit": "abc", "world_size": 2, "device": "cpu", "parameters": 1000}
SPIKE = {"step": 60, "rank": 3, "reason": "loss spike", "usual_nll": 5.0, "rows": [
    {"row": 17, "where": "train/part-00000.arrow batch 2 row 1", "user": "d1gest", "targets": 4, "mean_nll": 20.5, "excess": "inf",
     "ads": [{"nll": "nan", "head": 1, "item": 3, "item_id": "<ad-3>", "advertiser": "Acme & Sons"}]}]}


END = {"time": 1e9 + 60, "step": 100, "event": "end", "status": "finished"}


def write_run(folder, steps=100, num_steps=100, events=(START, END), lr=1e-3, spike=None, only=None):
    """Args: only: metrics that are written, none = all; drawing takes a while."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        lines.append({"step": step, "loss": 5 + rng.normal() / 10, "loss_head/1": 6.0, "loss_head/2": 7.0, "tokens": 10, "seconds": 2.0,
                      "loader_wait_s": 0.5, "tokens_per_s": 5.0, "mfu": 0.25, "straggler_gap": 1.5, "straggler_rank": step % 2,
                      "skipped_steps": 0, "memory_gib": 1.0})
        if step % 40 == 0:
            lines.append({"step": step, "validation/loss": 4.5 - step / 100, "validation/hitr@2": 0.1})
            lines.append({"step": step, "checkpoint/seconds": 1.0})
    lines = [{name: value for name, value in line.items() if only is None or name in ("step", *only)} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"run": {"name": folder.name}, "train": {"schedule": {"lr": lr, "num_steps": num_steps}, "best_metric": "validation/loss"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if spike:
        (folder / "spikes").mkdir()
        (folder / "spikes" / f"step-{spike['step']:06d}-rank-{spike['rank']:05d}.json").write_text(json.dumps(spike))
    return folder


ENDS = {
    "finished": (START, {"time": 1e9, "step": 100, "event": "end", "status": "finished"}),
    "stopped": (START, {"time": 1e9, "step": 100, "event": "end", "status": "stopped"}),
    "failed": (START, {"time": 1e9, "step": 100, "event": "end", "status": "failed", "error": "CheckpointError: disk full"}),
    "running or killed": (START, {"time": 1e9, "step": 50, "event": "end", "status": "stopped"}, {**START, "event": "resume", "step": 50}),
}


@pytest.mark.parametrize("status", ENDS)
def test_how_a_run_ended(tmp_path, status):
    run = read_run(write_run(tmp_path / "r", events=ENDS[status], num_steps=200, only=["loss"]))
    assert run.status == status and status in format_runs([run])
    assert run.restarts == ([50] if status == "running or killed" else [])
    assert any("disk full" in alarm.found for alarm in run_alarms([run])) == (status == "failed")


@pytest.mark.parametrize(("num_steps", "status"), [(100, "finished"), (101, "unfinished")])
def test_a_run_of_an_older_version_has_no_events(tmp_path, num_steps, status):
    folder = write_run(tmp_path / "r", num_steps=num_steps, only=["loss"])
    (folder / "events.jsonl").unlink()
    run = read_run(folder)
    assert run.status == status and status in format_runs([run]) and run_alarms([run]) == ()


def test_the_overview_says_what_the_lines_say(tmp_path):
    run = read_run(write_run(tmp_path / "r"))
    found = summary(run)
    assert found["tokens"] == 1000 and found["hours"] == pytest.approx(200 / 3600) and found["mfu"] == 0.25 and found["alerts"] == 0
    assert (found["best_metric"], found["best"]) == ("loss", pytest.approx(4.5 - 0.8)) and found["ranks"] == 2 and found["commit"] == "abc"
    page = run_page([run])
    assert "25.0%" in page and "saving took 1.0% on top" in page and "1.500 ×" in page, "waiting 0.5 of 2 s; 2 of 202 s saving"
    assert "2.5%" not in page.replace("25.0%", "")
    for panel in ("loss/total", "loss/head", "validation/hitr@2", "speed/mfu", "time/checkpoint", "memory/rank_max", "straggler/gap"):
        assert re.search(rf"<figcaption>{panel}\b", page), panel
    assert "optimizer/skipped_steps" not in page, "a panel of zeros"


def test_spikes_name_rows_and_advertisers_and_are_escaped(tmp_path):
    alert = {"time": 1e9, "step": 60, "event": "alert", "kind": "loss_spike", "text": "loss 9 at step 60"}
    run = read_run(write_run(tmp_path / "r", events=(START, alert, alert), spike=SPIKE, only=["loss"]))
    page = run_page([run])
    for text in ("step 60, loss spike: 1 rows of 1 rank(s); most of the worst ads are of Acme &amp; Sons (1)",
                 "&lt;ad-3&gt; of Acme &amp; Sons (nan)", "part-00000.arrow batch 2 row 1", "d1gest", "traced"):
        assert text in page, text
    assert run_page([run]) == page, "the same input, the same bytes"
    assert "<ad-3>" not in page and [alarm.found for alarm in run_alarms([run])] == ["r: loss spike, 2 time(s); last: loss 9 at step 60"]


def test_runs_beside_each_other_share_their_axes_and_list_what_differs(tmp_path):
    runs = [read_run(write_run(tmp_path / name, lr=lr, steps=steps)) for name, lr, steps in (("one", 1e-3, 100), ("two", 2e-3, 40))]
    assert differences(runs) == [("train.schedule.lr", "0.001", "0.002")]
    page = run_page(runs)
    assert page.count("<figcaption>loss/total") == 1 and page.count("<figcaption>loss/head_1") == 1
    figure = page[page.index("<figure>"):page.index("<figcaption>loss/total")]
    assert ">one</text>" in figure and ">two</text>" in figure and "var(--series-1)" in figure and "var(--series-2)" in figure
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>', "", page), "nothing is fetched"


def test_a_long_run_is_drawn_with_few_points(tmp_path):
    only = ["loss", "straggler_rank", "checkpoint/seconds"]
    short, long = (read_run(write_run(tmp_path / str(n), steps=n, only=only)) for n in (1000, 20_000))
    assert len(run_page([long])) < 2 * len(run_page([short])) and MAX_POINTS < 1000, "of 20 times the steps"


def test_a_few_values_far_away_do_not_flatten_the_rest():
    values = np.concatenate([np.linspace(4, 5, 1000), [1e6]])
    low, high = _limits(values)
    assert low < 4 and 5 < high < 6
    assert _limits(np.array([3.0]))[0] < 3 < _limits(np.array([3.0]))[1]


def test_only_finite_numbers_are_drawn():
    curves = curves_of([{"step": 1, "loss": "nan", "lr": 1}, {"step": 2, "loss": 2.0, "ranks": [1]}])
    found = {name: (curve.steps.tolist(), curve.values.tolist()) for name, curve in curves.items()}
    assert found == {"loss": ([2], [2.0]), "lr": ([1], [1.0])}


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(DataError, match=r"is no run folder.*metrics\.jsonl"):
        read_run(tmp_path)
