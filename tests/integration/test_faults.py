"""What machines do to a run: kills at any moment, full disks, damaged checkpoints, changed inputs. The losses must not notice."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from pretrain_runs import NUM_STEPS, Pretraining, logged_losses, members_of, run_in_one_group, run_pretraining

from data_pipeline.build import BuildConfig, build_data
from data_pipeline.tokenize_items import FitTokenizerConfig, build_tokenizer
from gpr_dist.config import load_config
from gpr_dist.schema import ShardManifest
from gpr_dist.training import checkpoint
from gpr_dist.training.tracker import read_events

PATIENCE_S = 90


def wait_for(job: Pretraining, condition, what: str, pause: float = 0.0005):
    """Poll until `condition()` is true and return its value; a job that ends or hangs first fails the test."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if value := condition():
            return value
        assert any(process.poll() is None for process in job.processes), f"the run ended before {what}\n{job.describe()}"
        time.sleep(pause)
    raise AssertionError(f"no {what} within {PATIENCE_S} s\n{job.describe()}")


def complete_steps(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step-")) for folder in checkpoint.list_steps(run) if checkpoint.verify(folder) is None]


def saving(run: Path) -> bool:
    """Whether a checkpoint is being written right now."""
    return any(not (folder / "manifest.json").exists() for folder in checkpoint.list_steps(run))


def test_sigkill_at_any_moment(tiny, torchrun_run, tmp_path):
    """One rank at a random moment, everything at a random moment and inside a save; then to the end, as if nothing had happened."""
    chance, run = random.Random(1), tmp_path / "runs" / "killed"
    overrides = [f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", "run.name=killed", "train.checkpoint.every_steps=1",
                 "train.checkpoint.keep_last=2"]
    for number, victim in enumerate(["one rank", "all", "while saving", "while saving", "while saving"]):
        before = max(complete_steps(run), default=0) if run.exists() else 0
        with Pretraining(tmp_path / f"job-{number}", overrides) as job:
            wait_for(job, lambda before=before: (run / f"step-{before + 1:06d}" / "manifest.json").exists(), "first checkpoint")
            everything, ranks = members_of(job.mark), job.ranks()
            if victim == "while saving":
                wait_for(job, lambda: saving(run), "save", pause=0)
            else:
                time.sleep(chance.uniform(0, 0.2))
            for pid in [chance.choice(ranks)] if victim == "one rank" else everything:
                os.kill(pid, signal.SIGKILL)
            assert job.wait(60) != [0], "killed, and the launcher reports success"
        assert complete_steps(run)[-1] > before, f"{victim}: no complete checkpoint is left\n{job.describe()}"
        if met_a_save := victim == "while saving" and saving(run):
            break
    assert met_a_save and complete_steps(run)[-1] < NUM_STEPS, "no kill met a save, or the run was over too early"
    job = run_pretraining(tmp_path / "last", overrides)
    assert "resuming" in job.stderr
    assert logged_losses(run) == logged_losses(torchrun_run[1])
    assert [folder.name for folder in checkpoint.list_steps(run)] == [f"step-{step:06d}" for step in (NUM_STEPS - 1, NUM_STEPS)]


def test_stop_signals_save_and_leave(tiny, torchrun_run, tmp_path):
    """SIGTERM to all ranks, SIGUSR1 to one rank, SIGTERM to torchrun and its ranks: each saves the step it reached, in bounded time."""
    run = tmp_path / "runs" / "stopped"
    overrides = [f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", "run.name=stopped", "train.checkpoint.every_steps=1000"]
    before = 0
    for number, (launcher, which) in enumerate([("ranks", "all"), ("ranks", "one"), ("torchrun", "all")]):
        with Pretraining(tmp_path / f"job-{number}", overrides, launcher=launcher) as job:
            wait_for(job, lambda before=before: (run / "metrics.jsonl").exists() and len(logged_losses_so_far(run)) > before, "first step")
            if which == "all":
                job.signal(signal.SIGTERM)
            else:
                os.kill(job.ranks()[1], signal.SIGUSR1)
            codes = job.wait(30)
        if launcher == "ranks":  # torchrun itself reports the signal it got
            assert codes == [0, 0], job.describe()
            assert "stop signal: saved" in job.stderr
        reached = complete_steps(run)[-1]
        assert before < reached < NUM_STEPS and reached == max(logged_losses(run)), job.describe()
        before = reached
    run_pretraining(tmp_path / "last", overrides)
    assert logged_losses(run) == logged_losses(torchrun_run[1])


def logged_losses_so_far(run: Path) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line and line.endswith("}")]


def copy_run(source: Path, target: Path, up_to: int) -> Path:
    """A run as it was when step `up_to` had been saved."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("wandb"))
    for folder in checkpoint.list_steps(target):
        if int(folder.name.removeprefix("step-")) > up_to:
            shutil.rmtree(folder)
    return target


def test_damaged_checkpoints_are_passed_over(tiny, python_run, tmp_path):
    whole = python_run[1]
    run = copy_run(whole, tmp_path / "runs" / "damaged", up_to=6)
    weights = run / "step-000006" / "rank-00000.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    (run / "step-000005" / "rank-00000.safetensors").unlink()
    (run / "step-000004" / "manifest.json").unlink()
    cut = run / "step-000003" / "state.json"
    cut.write_bytes(cut.read_bytes()[:-5])
    job = run_pretraining(tmp_path / "job", [f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", "run.name=damaged"],
                          launcher="python")
    said = [line for line in job.stderr.splitlines() if "is not usable" in line]
    expected = {6: "rank-00000.safetensors was altered", 5: "rank-00000.safetensors is missing", 4: "no manifest.json", 3: "state.json has"}
    assert len(said) == 4, job.describe()
    for line, (step, reason) in zip(said, expected.items(), strict=True):
        assert f"step-{step:06d}" in line and reason in line
    assert "resuming" in job.stderr and "step-000002" in job.stderr
    assert logged_losses(run) == logged_losses(whole)


def test_changed_inputs_are_refused_on_resume(tiny, python_run, tmp_path):
    """Other shards, another tokenizer, another model: one line that names both sides, and the run folder stays as it is."""
    run = python_run[1]
    shutil.copytree(tiny / "data", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "shards")
    build = yaml.safe_load((tiny / "build.yaml").read_text())
    build["journeys"] |= {"context_tokens": 8}
    (tmp_path / "build.yaml").write_text(yaml.safe_dump(build))
    build_data(load_config(BuildConfig, tmp_path / "build.yaml", [f"out={tmp_path}/other"]))
    other = build_tokenizer(load_config(FitTokenizerConfig, tiny / "tokenizer.yaml",
                                        [f"data={tiny}/data", f"out={tmp_path}/tokenizer", "tokenizer.seed=7"]))

    def fingerprint(data: Path) -> str:
        return ShardManifest.parse((data / "shards" / "train" / "manifest.json").read_text(), "train").fingerprint

    saved = checkpoint.read_state(run / f"step-{NUM_STEPS:06d}")["fingerprints"]
    assert saved["data"] == fingerprint(tiny / "data")
    cases = {
        "data": ([f"data.folder={tmp_path}/other"], ["CheckpointError", saved["data"], fingerprint(tmp_path / "other")]),
        "tokenizer": ([f"data.tokenizer={tmp_path}/tokenizer"], ["CheckpointError", saved["tokenizer"], other.codebook_fingerprint]),
        "width": (["model.width=32"], ["CheckpointError", "of shape", "32"]),
        "batch": (["data.loader.global_batch_size=8"], ["DataError", "global_batch_size 16", "8"])}
    metrics = (run / "metrics.jsonl").read_bytes()
    same_run = [f"data.folder={tiny}/data", f"run.folder={run.parent}", f"run.name={run.name}"]
    for name, error in run_in_one_group(tmp_path / "ranks", {name: [*same_run, *changes] for name, (changes, _) in cases.items()}).items():
        assert all(part in error for part in cases[name][1]) and "\n" not in error, f"{name}: {error}"
    assert (run / "metrics.jsonl").read_bytes() == metrics and complete_steps(run)[-1] == NUM_STEPS


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, three checkpoints and a half; the function resizes it."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root; test_rank_that_cannot_write covers the rest")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1024k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this container may not mount; test_rank_that_cannot_write covers the rest")
    yield disk, lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)
    subprocess.run(["umount", "-l", disk], check=True)


def test_disk_full_while_saving(tiny, python_run, small_disk, tmp_path):
    disk, resize = small_disk
    run = disk / "full"
    overrides = [f"data.folder={tiny}/data", f"run.folder={disk}", "run.name=full", "train.checkpoint.every_steps=1",
                 "train.checkpoint.keep_last=100"]
    job = run_pretraining(tmp_path / "job-1", overrides, expect=2, launcher="python")
    saved = complete_steps(run)
    assert saved and [folder.name for folder in checkpoint.list_steps(run)] == [f"step-{step:06d}" for step in saved]
    assert len(job.errors()) == 1 and "Traceback" not in job.stderr, job.describe()
    assert job.errors()[0].startswith("CheckpointError: saving") and "No space left on device" in job.errors()[0]
    with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while filler.write(b"0" * 512):
            pass
    job = run_pretraining(tmp_path / "job-2", overrides, expect=2, launcher="python")  # not even a line of metrics fits
    assert len(job.errors()) == 1 and "Traceback" not in job.stderr and "No space left on device" in job.errors()[0], job.describe()
    assert complete_steps(run) == saved
    resize("64m")
    run_pretraining(tmp_path / "job-3", overrides, launcher="python")
    assert logged_losses(run) == logged_losses(python_run[1])


def test_rank_that_cannot_write_ends_all_ranks(tiny, python_run, tmp_path):
    """Only rank 1's files may not grow; both ranks leave with one line, and the checkpoints before are intact."""
    run = copy_run(python_run[1], tmp_path / "runs" / "limited", up_to=2)
    overrides = [f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", "run.name=limited", "train.checkpoint.every_steps=2"]
    job = run_pretraining(tmp_path / "job", overrides, expect=2, launcher="ranks", file_limits={1: 50_000})
    assert complete_steps(run) == [1, 2] and len(checkpoint.list_steps(run)) == 2
    assert all("CheckpointError: saving" in line for line in job.errors()) and len(job.errors()) == 2, job.describe()
    assert any("File too large" in line for line in job.errors()) and "Traceback" not in job.stderr
    told, ended = read_events(run)[-2:]
    assert (told["kind"], ended["status"]) == ("checkpoint_failed", "failed") and "CheckpointError" in ended["error"]
    assert "WARNING: saving" in job.stderr


@pytest.mark.soak
def test_restarts_by_torchrun_and_launchers_that_die(tiny, torchrun_run, tmp_path):
    """torchrun --max-restarts starts a killed rank's job again; a killed torchrun or deepspeed takes its ranks along; then to the end."""
    run = tmp_path / "runs" / "orphans"
    overrides = [f"data.folder={tiny}/data", f"run.folder={tmp_path}/runs", "run.name=orphans", "train.checkpoint.every_steps=1"]
    for number, launcher in enumerate(("torchrun", "deepspeed")):
        before = max(complete_steps(run), default=0) if run.exists() else 0
        with Pretraining(tmp_path / f"job-{number}", overrides, launcher=launcher, environment={"PET_MAX_RESTARTS": "1"}) as job:
            wait_for(job, lambda before=before: (run / f"step-{before + 1:06d}" / "manifest.json").exists(), "first checkpoint")
            if launcher == "torchrun":
                os.kill(job.ranks()[1], signal.SIGKILL)
                wait_for(job, lambda: "resuming" in job.stderr, "restart", pause=0.05)
            job.processes[0].kill()
            job.wait(10)
            deadline = time.monotonic() + 30
            while left := members_of(job.mark):
                assert time.monotonic() < deadline, f"{launcher} is gone, {left} are not\n{job.describe()}"
                time.sleep(0.05)
        assert complete_steps(run)[-1] < NUM_STEPS
    run_pretraining(tmp_path / "last", overrides)
    assert logged_losses(run) == logged_losses(torchrun_run[1])
