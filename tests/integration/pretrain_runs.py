"""A tiny data set made by the real pipeline, and training scripts started, killed and watched as a user would."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from documents import launch_module
from ranks import ROOT, free_port, rank_environment, run_ranks

from data_pipeline.build import BuildConfig, build_data
from data_pipeline.tokenize_items import FitTokenizerConfig, build_tokenizer
from gpr_dist.config import load_config
from gpr_dist.errors import run_cli

DAY = 86400
JOB_MARK = "GPR_TEST_JOB"
NUM_STEPS = 20
SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI-K7MDENG-bPxRfiCY",
           "HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz", "GPR_USER_SALT": "a salt that a cluster's secrets hold"}
SECRET_URI = "s3://AKIAIOSFODNN7EXAMPLE:not/escaped/secret@bucket/cache?region=eu&session_token=FwoGZXIvYXdz"
NUM_USERS, NUM_ADS, NUM_ARTICLES = 240, 150, 100
WORDS = [a + b for a in ("red", "blue", "wild", "tiny", "old") for b in ("tea", "shoe", "lamp", "book", "car", "bike", "hat", "pen")]
TINY = ["data.loader.global_batch_size=16", "data.loader.micro_batch_tokens=512", "model.width=16", "model.hsd.num_heads=2",
        "model.ptd.num_heads=2", "model.embedding.feature_buckets=64", "model.embedding.scene_buckets=8",
        f"train.schedule.num_steps={NUM_STEPS}",
        "train.schedule.warmup_steps=2", "train.validate_every_steps=0", "validation.max_rows=8", "validation.beam_width=4",
        "validation.ks=[2]", "engine.timeout_seconds=60"]


def write_logs(folder: Path, seed: int = 0) -> None:
    """Ad impressions and articles read by a few hundred users over 100 days, and the table of items."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for name, prefix, num_items, num_events in (("ads", "ad", NUM_ADS, 5000), ("reads", "article", NUM_ARTICLES, 4000)):
        pq.write_table(pa.table({
            "uid": [f"u{n}" for n in rng.integers(0, NUM_USERS, num_events)],
            "item": [f"{prefix}-{n}" for n in rng.integers(0, num_items, num_events)],
            "ts": rng.integers(0, 100 * DAY, num_events), "ecpm": rng.random(num_events),
            "slot": [f"slot-{n}" for n in rng.integers(0, 4, num_events)]}), folder / f"{name}.parquet")
    items = [f"ad-{n}" for n in range(NUM_ADS)] + [f"article-{n}" for n in range(NUM_ARTICLES)]
    pq.write_table(pa.table({"id": items, "title": [" ".join(rng.choice(WORDS, 4)) for _ in items]}), folder / "items.parquet")


def write_configs(folder: Path, logs: Path | None = None) -> None:
    """build.yaml and tokenizer.yaml for data in <folder>/data, as a team with its own logs writes them."""
    logs = logs or folder / "logs"
    column_names = {"user_id": "uid", "item_id": "item", "timestamp": "ts", "time_format": "s"}
    build = {"source": {"format": "files", "logs": [
        {"path": str(logs / "ads.parquet"), **column_names, "kind": "ad", "action": "click", "value": "ecpm",
         "env_features": {"slot": "slot"}, "time_features": ["hour"]},
        {"path": str(logs / "reads.parquet"), **column_names, "kind": "organic"}],
        "items": {"path": str(logs / "items.parquet"), "item_id": "id", "text": ["title"]}},
        "out": str(folder / "data"), "shards": {"rows_per_batch": 32}, "min_buckets": 3,
        "journeys": {"max_tokens": 48, "context_tokens": 16, "max_organic_per_block": 12,
                     "split": {"method": "time", "validation_from": "1970-03-12", "test_from": "1970-03-27"}}}
    fit = {"data": str(folder / "data"), "out": str(folder / "data" / "tokenizer"), "embedding": {"dim": 8},
           "tokenizer": {"codebook_size": 16, "iterations": 5}}
    (folder / "build.yaml").write_text(yaml.safe_dump(build))
    (folder / "tokenizer.yaml").write_text(yaml.safe_dump(fit))


def build_tiny_data(folder: Path) -> Path:
    """Logs, configs, shards and tokenizer. Returns the data folder."""
    write_logs(folder / "logs")
    write_configs(folder)
    data = build_data(load_config(BuildConfig, folder / "build.yaml"))
    build_tokenizer(load_config(FitTokenizerConfig, folder / "tokenizer.yaml"))
    return data


class Pretraining:
    """One start of a training script in a session of its own, so that the whole group can be signalled; never outlives the test."""

    def __init__(self, folder: Path, overrides: list[str], launcher: str = "torchrun", ranks: int = 2, wandb: str = "disabled",
                 config: Path | None = None, environment: dict[str, str] | None = None, tiny: bool = True,
                 file_limits: dict[int, int] | None = None, stage: str = "pretrain") -> None:
        """`file_limits`: largest file, in bytes, that the process of this number may write: a full disk for users without root; `stage`:
        name of the script in launch/."""
        folder.mkdir(parents=True, exist_ok=True)
        script = str(ROOT / "launch" / f"{stage}.py")
        bin_folder = Path(sys.executable).parent
        commands = {
            "python": [[sys.executable, script]],
            "torchrun": [["torchrun", "--standalone", "--nproc-per-node", str(ranks), script]],
            "deepspeed": [["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port()), script]],
            "ranks": [[sys.executable, script]] * ranks}[launcher]
        arguments = ["--config", str(config)] if config else []
        arguments += [*(TINY if tiny else []), *overrides]
        limits = file_limits or {}
        base = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
        base |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1", "WANDB_MODE": wandb,
                 "PATH": os.pathsep.join([str(bin_folder), os.environ.get("PATH", "")]), **(environment or {})}
        if launcher == "python":  # one thread: two that share busy cores wait for each other in every small operation
            base |= {"LOCAL_WORLD_SIZE": str(os.cpu_count())}
        self.mark = uuid.uuid4().hex
        base |= {JOB_MARK: self.mark}
        port = free_port()
        self.processes, self._logs = [], []
        for number, command in enumerate(commands):
            paths = [folder / f"{stream}-{number}.log" for stream in ("stdout", "stderr")]
            self._logs.append(paths)
            env = {**rank_environment(number, ranks, port), **base} if launcher == "ranks" else base
            if launcher == "ranks":
                env |= {"LOCAL_WORLD_SIZE": str(ranks)}
            with open(paths[0], "w") as out, open(paths[1], "w") as err:
                self.processes.append(subprocess.Popen([*command, *arguments], stdout=out, stderr=err, env=env, cwd=folder,
                                                       start_new_session=True, preexec_fn=_file_limit(limits.get(number))))

    def __enter__(self) -> "Pretraining":
        return self

    def __exit__(self, *_: Any) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait(30)

    def signal(self, number: int) -> None:
        """To every process of the job, launcher and ranks."""
        for pid in members_of(self.mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in rank order."""
        return sorted((pid for pid in members_of(self.mark) if is_rank(pid)), key=lambda pid: int(environment_of(pid).get("RANK", 0)))

    def wait(self, timeout: float = 120) -> list[int]:
        """Exit codes; a process that hangs fails the test."""
        return [process.wait(timeout) for process in self.processes]

    @property
    def stdout(self) -> str:
        return "".join(out.read_text() for out, _ in self._logs)

    @property
    def stderr(self) -> str:
        return "".join(err.read_text() for _, err in self._logs)

    def errors(self) -> list[str]:
        """Lines of our own errors on stderr."""
        return [line for line in self.stderr.splitlines() if line.split(":")[0].endswith("Error")]

    def describe(self) -> str:
        return f"stdout:\n{self.stdout[-3000:]}\nstderr:\n{self.stderr[-5000:]}"


def run_in_one_group(folder: Path, jobs: dict[str, list[str]], ranks: int = 1) -> dict[str, str]:
    """launch/pretrain.py with every list of overrides, one after another in one process group: starting costs more than a tiny run.

    Returns: by name the error that ended the job on every rank, "" without one.
    """
    started = [("pretrain", [*TINY, *overrides]) for overrides in jobs.values()]
    first, *others = run_ranks("stage_workers:run_stages", ranks, folder, timeout=240, jobs=started)
    assert all(other == first for other in others)
    return dict(zip(jobs, first, strict=True))


def run_script_here(script: str, cwd: Path, *arguments: str) -> None:
    """launch/<script>.py in this process, in the folder `cwd`; it must succeed. A start costs seconds."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.chdir(cwd)
        patch.setattr("sys.argv", [f"{script}.py", *arguments])
        run_cli(launch_module(script).main)
    assert left.value.code == 0


def _file_limit(num_bytes: int | None) -> Any:
    return None if num_bytes is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def run_pretraining(folder: Path, overrides: list[str], expect: int = 0, timeout: float = 120, **options: Any) -> Pretraining:
    """Start launch/pretrain.py or another stage, wait, and check the exit code of every process."""
    with Pretraining(folder, overrides, **options) as job:
        codes = job.wait(timeout)
    assert set(codes) == {expect}, f"exit codes {codes}, expected {expect}\n{job.describe()}"
    return job


def members_of(job: str) -> list[int]:
    """Live processes that carry a job's mark in their environment, whatever session a launcher gave them and whether it still lives."""
    return [pid for pid in (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
            if environment_of(pid).get(JOB_MARK) == job]


def environment_of(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return {}
    return dict(part.split("=", 1) for part in text.split("\0") if "=" in part)


def is_rank(pid: int) -> bool:
    """Whether it is python running one of our scripts, not a launcher or one of its helpers."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return False
    scripts = [part for part in command[1:] if part.endswith(".py") or part.endswith(("torchrun", "deepspeed"))]
    return bool(scripts) and Path(scripts[0]).parent == ROOT / "launch"


def logged_losses(run: Path) -> dict[int, float]:
    """Training loss per step, from metrics.jsonl; a step logged twice fails."""
    losses: dict[int, float] = {}
    for line in (json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()):
        if "loss" in line:
            assert line["step"] not in losses, f"step {line['step']} is logged twice in {run}"
            losses[line["step"]] = line["loss"]
    return losses
