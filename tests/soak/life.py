"""One start of the disturbed run: its ranks, forked from here or started by a launcher, what they finished, and how they ended."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import recorded_rank
from pretrain_runs import JOB_MARK, environment_of, members_of
from ranks import free_port, rank_environment

PATIENCE_S = 300
"""what takes longer has hung; everything here shares a busy machine"""


@dataclass
class Life:
    """Ranks are real processes of launch/pretrain.py; a fork saves the imports, which cost more than a tiny run."""

    number: int
    ranks: int
    launcher: str  # fork, torchrun or deepspeed
    folder: Path
    pids: list[int] = field(default_factory=list)  # of forked ranks
    codes: dict[int, int] = field(default_factory=dict)  # exit codes of forked ranks that have ended
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    process: subprocess.Popen | None = None

    def start(self, overrides: list[str]) -> "Life":
        self.folder.mkdir(parents=True)
        record = {recorded_rank.RECORD: str(self.folder / "rows"), "LOCAL_WORLD_SIZE": str(self.ranks)}
        if self.launcher == "fork":
            port = free_port()
            self.pids = [self._fork(overrides, {**rank_environment(rank, self.ranks, port), **record}) for rank in range(self.ranks)]
            return self
        script = recorded_rank.__file__
        command = {"torchrun": ["torchrun", "--standalone", "--nproc-per-node", str(self.ranks), script],
                   "deepspeed": ["deepspeed", "--num_accelerators", str(self.ranks), "--master_port", str(free_port()), script]}
        environment = {**os.environ, **record, JOB_MARK: self.mark, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled",
                       "PYTHONPATH": os.pathsep.join(sys.path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        with open(self.folder / "launcher.log", "w") as log:
            self.process = subprocess.Popen([*command[self.launcher], *overrides], stdout=log, stderr=log, cwd=self.folder,
                                            env=environment, start_new_session=True)
        return self

    def _fork(self, overrides: list[str], environment: dict[str, str]) -> int:
        if pid := os.fork():
            return pid
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # when the soak itself is killed
            with open(self.folder / f"rank-{environment['RANK']}.log", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ.update(environment)
            sys.argv[1:] = overrides
            recorded_rank.main()
        finally:
            os._exit(1)

    def living(self) -> list[int]:
        """Ranks that live, in rank order; of a launcher's life everything it started."""
        if self.process is not None:
            self.process.poll()
            others = [pid for pid in members_of(self.mark) if pid != self.process.pid]
            return sorted(others, key=lambda pid: int(environment_of(pid).get("RANK", -1)))
        for pid in [pid for pid in self.pids if pid not in self.codes]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid in self.pids if pid not in self.codes]

    def finished(self) -> list[dict]:
        """Steps that every rank has finished, each with the rows of all ranks, in order."""
        files = [self.folder / f"rows-rank-{rank}.jsonl" for rank in range(self.ranks)]
        if not all(path.exists() for path in files):
            return []
        lines = [[json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] for path in files]
        return [{**parts[0], "rows": [row for part in parts for row in part["rows"]]} for parts in zip(*lines, strict=False)]

    def wait_for(self, condition: Callable[[], object], what: str, pause: float = 0.02, alive: bool = True) -> float:
        """Poll until `condition()`; seconds it took. The life must go on meanwhile if `alive`."""
        started = time.monotonic()
        while not condition():
            waited = time.monotonic() - started
            assert not alive or not self.has_ended(), f"life {self.number} ended by itself before {what}\n{self.describe()}"
            assert waited < PATIENCE_S, f"life {self.number}: no {what} within {PATIENCE_S} s\n{self.describe()}"
            time.sleep(pause)
        return time.monotonic() - started

    def has_ended(self) -> bool:
        """Whether any rank, or the launcher, has ended."""
        return len(self.living()) < self.ranks if self.process is None else self.process.poll() is not None

    def describe(self) -> str:
        logs = "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))
        return f"{self}\n{logs}"

    def kill(self) -> None:
        """Whatever is left."""
        if self.process is not None:
            self.process.kill()
        for pid in self.living():
            os.kill(pid, signal.SIGKILL)
