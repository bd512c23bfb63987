"""A pointer with the users' histories, from logs to a validated run: two ranks are as good as one, under ZeRO-3."""

import pytest
from pretrain_runs import logged_losses, run_in_one_group, run_pretraining

from gpr_dist.schema import HistoryManifest
from gpr_dist.training.tracker import read_metrics


def overrides(tiny, tmp_path, name, *more):
    return [f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", f"run.name={name}", "train.schedule.num_steps=4",
            "train.checkpoint.every_steps=2", "train.validate_every_steps=4", "model.pointer.width=4", *more]


def test_two_ranks_train_and_validate_like_one(tiny, tmp_path):
    history, runs = tmp_path / "history", tmp_path / "runs"
    with_history = (f"data.history={history}", "data.history_events=20")
    run_pretraining(tmp_path / "two", overrides(tiny, tmp_path, "two", *with_history))
    assert {entry.split for entry in HistoryManifest.load(history).splits.values()} == {"train", "validation", "test"}
    alone = {"one": overrides(tiny, tmp_path, "one", *with_history), "rows": overrides(tiny, tmp_path, "rows", "data.history_events=0")}
    assert not any(run_in_one_group(tmp_path / "alone", alone).values())
    one, two = logged_losses(runs / "one"), logged_losses(runs / "two")
    assert two == pytest.approx(one, rel=1e-4)
    measured = {key: value for line in read_metrics(runs / "two" / "metrics.jsonl") for key, value in line.items()}
    alone = {key: value for line in read_metrics(runs / "one" / "metrics.jsonl") for key, value in line.items()}
    for name in ("validation/loss", "validation/hitr@2"):
        assert measured[name] == pytest.approx(alone[name], rel=1e-3)

    # Without the history there are other pairs, and so other losses from the same weights.
    assert abs(logged_losses(runs / "rows")[1] / one[1] - 1) > 1e-6
