"""`launch/pretrain.py` as a user starts it: every launcher, data built on demand, W&B, and one line for every mistake."""

import contextlib
import shutil

import pytest
import yaml
from documents import ROOT
from pretrain_runs import NUM_STEPS, Pretraining, logged_losses, run_in_one_group, run_pretraining

from gpr_dist.config import load_config
from gpr_dist.errors import ConfigError, DataError
from gpr_dist.job import PretrainConfig, RunConfig, prepare_history
from gpr_dist.schema import ShardManifest
from gpr_dist.start import check_resume
from gpr_dist.training.tracker import Tracker, TrackerConfig, read_events, read_metrics


def check_finished(job: Pretraining, run, steps: int = NUM_STEPS) -> None:
    """A run that reached its end left everything behind."""
    losses = logged_losses(run)
    assert list(losses) == list(range(1, steps + 1))
    assert f"run folder: {run}" in job.stdout and (run / "loss.png").stat().st_size > 1000 and (run / "popularity.npy").exists()
    assert (run / f"step-{steps:06d}" / "manifest.json").exists()
    assert f"{steps}/{steps}" in job.stderr, "no progress bar"
    last = [line for line in read_metrics(run / "metrics.jsonl") if line["step"] == steps]
    merged = {key: value for line in last for key, value in line.items()}
    wanted = {"loss", "lr", "grad_norm", "tokens_per_s", "mfu", "loader_wait_s", "memory_gib", "loss_head/1", "loss_head/4", "loss_level/3",
              "validation/loss", "validation/hitr@2", "checkpoint/seconds", "loss_after/E", "loss_action/click"}
    wanted |= {"straggler_gap", "straggler_rank", "work_gap"} if "2 rank(s)" in job.stderr else set()
    assert wanted <= merged.keys()
    begin, *_, end = read_events(run)
    assert (begin["event"], begin["num_steps"], end["event"], end["status"]) == ("start", steps, "end", "finished")
    assert load_config(PretrainConfig, run / "config.yaml").train.schedule.num_steps == steps


def test_python_builds_missing_data_and_logs_offline(python_run):
    job, run = python_run
    check_finished(job, run)
    data = run.parents[1] / "data"
    assert ShardManifest.parse((data / "shards" / "train" / "manifest.json").read_text(), "train").num_rows > 200
    assert (data / "tokenizer" / "tokenizer.json").exists()
    runs = list((run / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(runs) == 1 and runs[0].stat().st_size > 1000
    assert len(list(run.glob("step-*"))) == NUM_STEPS


def test_training_without_a_validation_split(tiny, tmp_path):
    """Shards at a URI and nothing but catalogue and tokenizer in the data folder."""
    data, job_folder = tmp_path / "data", tmp_path / "job"
    shutil.copytree(tiny / "data", data, ignore=shutil.ignore_patterns("shards", "history"))  # other tests leave a history here
    overrides = [f"data.folder={data}", f"data.shards=file://{tiny}/data/shards/train", f"run.folder={tmp_path}/runs", "run.name=r",
                 "train.schedule.num_steps=2", "train.schedule.warmup_steps=1"]
    config = load_config(PretrainConfig, ROOT / "configs/pretrain.yaml", overrides)
    with pytest.raises(DataError, match=r"data\.history_events=0"):  # older events are collected from folders only
        prepare_history(config.model, config.data)
    job = run_pretraining(job_folder, [*overrides, "data.history_events=0"], launcher="python")
    assert f"no validation: {data}/shards/validation does not exist" in job.stderr
    run = tmp_path / "runs" / "r"
    assert list(logged_losses(run)) == [1, 2] and not (run / "popularity.npy").exists()
    assert not any(key.startswith("validation") for line in read_metrics(run / "metrics.jsonl") for key in line)


def test_torchrun_on_two_ranks_sees_what_one_rank_sees(torchrun_run, python_run):
    check_finished(*torchrun_run)
    assert "2 rank(s)" in torchrun_run[0].stderr and "1 rank(s)" in python_run[0].stderr
    one, two = logged_losses(python_run[1]), logged_losses(torchrun_run[1])
    assert max(abs(one[step] - two[step]) for step in one) < 1e-5
    assert not (torchrun_run[1] / "wandb").exists()


def test_deepspeed_launcher_with_bf16_and_a_wandb_that_fails(tiny, tmp_path):
    overrides = [f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", "run.name=ds", "train.schedule.num_steps=3",
                 "engine.precision=bf16", "tracker.wandb=online"]
    job = run_pretraining(tmp_path / "job", overrides, launcher="deepspeed", wandb="online", environment={"WANDB_API_KEY": "not-a-key"})
    check_finished(job, tmp_path / "runs" / "ds", 3)
    assert "2 rank(s)" in job.stderr and "W&B could not be started" in job.stderr


def test_wandb_that_fails_later_is_switched_off(tmp_path, monkeypatch, capsys):
    class Broken:
        calls = 0

        def log(self, *_, **__):
            Broken.calls += 1
            raise ConnectionError("no route to host")

        def finish(self, **_):
            raise AssertionError("used after it failed")

    monkeypatch.setattr("wandb.init", lambda **_: Broken())
    tracker = Tracker(TrackerConfig(wandb="online"), tmp_path, {}, 0, 3, 0)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0 / step})
        tracker.advance(step)
    tracker.close()
    assert Broken.calls == 1 and [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 0.5, 1 / 3]
    assert "no route to host" in capsys.readouterr().err


def test_dry_run_looks_at_the_data(tiny, tmp_path):
    """Without data: test_every_yaml_is_accepted; --help: test_help_runs."""
    overrides = [f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", "--dry-run"]
    existing = run_pretraining(tmp_path / "job", overrides, launcher="python")
    text, counts = existing.stdout.split("\n\n", 1)
    assert yaml.safe_load(text)["model"]["codebook_size"] == 16 and "parameters" in counts and not (tmp_path / "runs").exists()


MISTAKES = {
    "unknown key": (["train.schedule.warmup_step=3"], ["train.schedule.warmup_step", "did you mean train.schedule.warmup_steps?"]),
    "streams": (["data.loader.num_streams=5"], ["num_streams=5 does not divide global_batch_size=16", "nearest: 4 or"]),
    "no data": (["data.folder=nowhere", "data.build=null"], ["no shards in nowhere/shards/train", "launch/build_data.py"]),
    "misspelt folder": (["data.folder=data/complete_jurney"], ["no shards in data/complete_jurney/shards/train",
                        "makes data/complete_journey", "correct data.folder"]),
    "no tokenizer": (["data.tokenizer=nowhere", "data.fit_tokenizer=null"], ["no tokenizer in nowhere"]),
    "misspelt tokenizer": (["data.tokenizer=nowhere"], ["no tokenizer in nowhere", "makes data/complete_journey/tokenizer"]),
}


def test_mistakes_are_one_line(tiny, tmp_path):
    """Two as a user sees them, side by side; of the others the text that becomes the line."""
    jobs = {name: [f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", *overrides] for name, (overrides, _) in MISTAKES.items()}
    alone = ("unknown key", "streams")
    with contextlib.ExitStack() as stack:
        started = {name: stack.enter_context(Pretraining(tmp_path / name.replace(" ", "_"), jobs.pop(name), launcher="python"))
                   for name in alone}
        for name, job in started.items():
            assert job.wait() == [2], f"{name}\n{job.describe()}"
            assert len(job.stderr.strip().splitlines()) == 1, f"{name}\n{job.describe()}"
    said = {name: job.stderr for name, job in started.items()} | run_in_one_group(tmp_path / "together", jobs)
    assert len(said) == len(MISTAKES)
    for name, (_, parts) in MISTAKES.items():
        assert all(part in said[name] for part in parts) and "\n" not in said[name].strip(), f"{name}: {said[name]}"
    assert not (tmp_path / "runs").exists()


def test_batch_size_that_does_not_fit_the_ranks(tiny, tmp_path):
    """Both ranks leave with exit code 2; a launcher would end the second before it repeats the line."""
    overrides = [f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", "data.loader.global_batch_size=31"]
    job = run_pretraining(tmp_path / "job", overrides, expect=2, launcher="ranks")
    expected = "ConfigError: global_batch_size=31 is not divisible by the world size 2; nearest: 30 or 32"
    assert job.errors()[0] == expected and set(job.errors()) == {expected} and "Traceback" not in job.stderr
    assert not (tmp_path / "runs").exists()


def test_resume_false_refuses_a_run_that_has_checkpoints(python_run):
    _, run = python_run
    with pytest.raises(ConfigError, match=rf"{run} already has checkpoints up to step-{NUM_STEPS:06d}"):
        check_resume(RunConfig(folder=run.parent, name=run.name, resume=False))
    check_resume(RunConfig(folder=run.parent, name=run.name))


def test_damaged_shards_stop_the_run(tiny, tmp_path):
    shutil.copytree(tiny / "data", tmp_path / "data")
    victim = sorted((tmp_path / "data" / "shards" / "train").glob("part-*"))[0]
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    job = run_pretraining(tmp_path / "job", [f"data.folder={tmp_path}/data", f"run.folder={tmp_path}/runs"], expect=2, launcher="python")
    assert len(job.errors()) == 1 and victim.name in job.errors()[0] and "Traceback" not in job.stderr, job.describe()
