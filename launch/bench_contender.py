"""Contenders of a benchmark, each a process of its own with the same threads and the same allocator settings, run step by step in turn.

The other end of the pipe is `bench_step_peers.serve`: the parent names a step, the answer is a line of JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpr_dist.errors import GPRError

HERE = Path(__file__).resolve().parent
# glibc gives every large temporary back to the system and faults it in again: two to three times the step on a CPU.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "34359738368", "MALLOC_TRIM_THRESHOLD_": "34359738368", "MALLOC_TOP_PAD_": "268435456"}


class PeerError(GPRError, RuntimeError):
    """A contender cannot run on this machine."""


class Contender:
    """A process that runs one step when asked."""

    def __init__(self, script: str, kind: str, settings: dict[str, Any], python: Path | str = sys.executable, ours: bool = False,
                 allocator: dict[str, str] = ALLOCATOR) -> None:
        """Args: script: of this folder. kind: one of its builders. settings: the builder's, and `threads`. ours: imports gpr_dist.

        Raises: PeerError with the reason where it does not run here.
        """
        threads = str(settings["threads"])
        environment = {**os.environ, **allocator, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if ours:
            environment["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        try:
            self.process = subprocess.Popen([str(python), str(HERE / script), kind, json.dumps(settings)], stdin=subprocess.PIPE,
                                            stdout=subprocess.PIPE, stderr=None if ours else subprocess.DEVNULL, text=True, env=environment)
        except OSError as error:
            raise PeerError(f"{python}: {error.strerror}") from None
        self.steps: list[str] = self._answer()["steps"]

    def run(self, step: str) -> dict[str, Any]:
        """Run a step. Returns: wall and cpu seconds, memory, and what the step says."""
        self.process.stdin.write(step + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"ended with exit code {self.process.wait()}"}
        if "error" in answer:
            self.close()
            raise PeerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
