"""Commands on the hosts of tests/hosts.py: what their environment is, torchrun on each, and what is left of them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hosts import Host
from pretrain_runs import TINY, environment_of, is_rank
from ranks import ROOT

BIN = Path(sys.executable).parent
CLEAN = {"PATH": f"{BIN}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": os.environ.get("HOME", "/root"), "PYTHONPATH": str(ROOT),
         "PYTHONWARNINGS": "ignore"}
"""what a user's shell has; ssh carries none of it, DeepSpeed the names that begin with PYTHON"""
EVERYWHERE = {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
"""what every rank needs beside it: from the shell with torchrun, from .deepspeed_env with deepspeed"""
SCRIPT = str(ROOT / "launch" / "pretrain.py")
PATIENCE_S = 300


def torchrun_command(first: Host, overrides: list[str], nodes: str, *options: str) -> list[str]:
    """The same on every host; `nodes`: how many, as --nnodes takes it."""
    return ["torchrun", "--nnodes", nodes, "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{first.name}:29500",
            "--rdzv-id", "test", *options, SCRIPT, *TINY, *overrides]


class HostsJob:
    """A command started on every one of `used`, all printing into one log; ended with the `hosts` they run on."""

    def __init__(self, used: list[Host], folder: Path, command: list[str], environment: dict[str, str] | None = None) -> None:
        folder.mkdir()
        self.folder, self._log = folder, folder / "log"
        with open(self._log, "w") as log:
            self.processes = [host.start(command, cwd=folder, env=CLEAN | EVERYWHERE | {"JOB": str(folder)} | (environment or {}),
                                         stdout=log, stderr=log) for host in used]

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """Poll until `condition()` is true and return its value; a job that ends or hangs first fails the test."""
        deadline = time.monotonic() + PATIENCE_S
        while not (value := condition()):
            assert time.monotonic() < deadline, f"no {what} within {PATIENCE_S} s\n{self.said[-6000:]}"
            assert any(process.poll() is None for process in self.processes), f"the run ended before {what}\n{self.said[-6000:]}"
            time.sleep(0.01)
        return value

    def wait(self, timeout: float = PATIENCE_S) -> list[int]:
        """Exit codes of the launchers, host by host."""
        deadline = time.monotonic() + timeout
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s: {self.left()}\n{self.said[-6000:]}") from None

    def ranks(self) -> list[int]:
        """Process ids of its ranks that still run, on whatever host."""
        return [pid for pid in processes_with(f"'JOB': '{self.folder}'") if is_rank(pid)]

    def left(self) -> list[str]:
        """Processes of the job that still run, on whatever host."""
        return describe_processes(processes_with(f"'JOB': '{self.folder}'"))


def processes_with(text: str) -> list[int]:
    """Of this machine, hosts included, that have `text` in their environment."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and text in str(environment_of(int(entry.name)))]


def describe_processes(pids: list[int]) -> list[str]:
    """Their ids and commands; one that ended meanwhile is left out."""
    told = []
    for pid in pids:
        try:
            command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200]
        except OSError:
            continue
        if command:  # a zombie has none
            told.append(f"{pid} {command}")
    return told
