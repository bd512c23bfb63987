"""Saves a run's checkpoints without stopping it: the state is copied between two steps, and a thread writes the copy.

Files and commit are those of training/checkpoint.py. Each rank's thread writes and flushes its own file, then a note beside it; rank 0's
waits for the notes of all and commits, so that no collective runs outside the training thread. How the threads fare is asked for in the
training thread, once per step while a write is under way. At most one is: the next save waits for it. A kill at any moment leaves a
folder without a manifest, and the checkpoint before it.
"""

import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gpr_dist.errors import CheckpointError
from gpr_dist.schema import write_atomic
from gpr_dist.training import checkpoint
from gpr_dist.training.checkpoint import CUDA_RNG_KEY, FORMAT_VERSION, RNG_KEY, CheckpointConfig
from gpr_dist.training.engine import STATES, Engine

_LONGEST_PAUSE_S = 1.0  # between two looks for the other ranks' notes: a shared file system is asked seldom
_JOIN_S = 0.05
_PATIENCE_S = 10.0  # for the other ranks' threads, when the write of one failed


def save(engine: Engine, run: Path, step: int, state: dict[str, Any]) -> Path:
    """One checkpoint, written and committed on return; arguments and errors as of `Saver.save` (collective). Returns: its folder."""
    Saver(engine, run, CheckpointConfig(background=False, keep_last=10**9)).save(step, state)
    return checkpoint.step_folder(run, step)


class _Write:
    """A checkpoint under way, as the thread and the training thread of a rank share it."""

    def __init__(self, folder: Path, action: Callable[["_Write"], None]) -> None:
        self.folder = folder
        self.problem: str | None = None
        self.given_up = threading.Event()
        self.started, self.seconds = time.monotonic(), 0.0
        self.thread = threading.Thread(target=self._run, args=(action,), name=folder.name, daemon=True)  # a crash does not wait for it
        self.thread.start()

    def _run(self, action: Callable[["_Write"], None]) -> None:
        self.problem = _try(lambda: action(self))
        self.seconds = time.monotonic() - self.started


class Saver:
    """Of one run, on every rank. With `config.background`, the memory for the copy is taken here, so that lack of it shows at the start."""

    def __init__(self, engine: Engine, run: Path, config: CheckpointConfig) -> None:
        self._engine, self._run, self._config = engine, run, config
        self._copies: dict[str, Tensor] = {}
        self._write: _Write | None = None
        self.write_seconds = 0.0
        """from the copy to the commit, of the newest checkpoint committed, on rank 0"""
        if config.background:
            self._copy()

    def save(self, step: int, state: dict[str, Any], best_step: int | None = None) -> None:
        """Copy what training is at this instant and begin to write it; a write still under way is waited for (collective).

        Args: state: plain JSON values: counters, loader state, fingerprints, config. best_step: which `keep_best` keeps.
        Raises: CheckpointError on every rank when any rank could not write this or the one before; older checkpoints are untouched.
        """
        self.wait()
        engine, folder = self._engine, checkpoint.step_folder(self._run, step)
        document = json.dumps({"format_version": FORMAT_VERSION, "step": step, "world_size": engine.world_size, "states": STATES,
                               "optimizer_step": engine.optimizer_step, "shapes": engine.shapes, **state}, indent=1).encode()
        problem = _try(lambda: self._make_folder(folder)) if engine.rank == 0 else None
        if engine.all_reduce(torch.tensor([float(problem is not None)]), "max").item():
            raise _failed(folder, problem)
        ranges = self._copy()
        self._write = _Write(folder, lambda write: self._write_and_commit(write, ranges, document, best_step))
        if not self._config.background:
            self.wait()
            self._copies = {}

    def poll(self) -> bool:
        """Whether a write is still under way (collective; asks the other ranks only if there was one).

        Raises: CheckpointError on every rank when any rank could not write; what was written is removed.
        """
        write = self._write
        if write is None:
            return False
        is_alive, limit = write.thread.is_alive(), self._engine.config.timeout_seconds  # first of all: no problem comes after its end
        if is_alive and 0 < limit < time.monotonic() - write.started:  # asking for it counts as progress: no watchdog ends this
            write.problem = f"not on disk after {limit:g} s, engine.timeout_seconds"
        busy, failed = self._engine.all_reduce(torch.tensor([float(is_alive), float(write.problem is not None)]), "max").tolist()
        if failed:
            write.given_up.set()
            write.thread.join(_PATIENCE_S)
            self._engine.barrier()
            if self._engine.rank == 0 and not (write.folder / "manifest.json").exists():
                shutil.rmtree(write.folder, ignore_errors=True)
            raise _failed(write.folder, write.problem)
        if not busy:
            self._write, self.write_seconds = None, write.seconds
        return bool(busy)

    def wait(self) -> None:
        """Until nothing is under way (collective). Raises: as `poll`."""
        while self.poll():
            self._write.thread.join(_JOIN_S)

    def _make_folder(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)  # the remains of a save that was killed
        folder.mkdir(parents=True)
        needed, disk = 4 * len(STATES) * sum(map(math.prod, self._engine.shapes.values())), shutil.disk_usage(folder)
        if disk.total and disk.free < needed:  # before it is full: metrics and logs of this and other runs would fail with it
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(f"No space left on device: {needed / 1e9:.3g} GB needed, {disk.free / 1e9:.3g} GB free")

    def _copy(self) -> list[tuple[str, int, int]]:
        """Fill `_copies`, what this rank's file will hold, in host memory. Returns: its ranges (parameter, lo, hi)."""
        ranges, cuda = [], self._engine.device.type == "cuda"
        for shard in self._engine.state_shards():
            ranges.append((shard.name, shard.lo, shard.hi))
            for key, live in shard.tensors.items():
                name = checkpoint.tensor_name(shard.name, key, shard.lo, shard.hi)
                if name not in self._copies:
                    self._copies[name] = torch.empty(live.shape, pin_memory=cuda)
                self._copies[name].copy_(live, non_blocking=True)
        self._copies[RNG_KEY] = torch.get_rng_state()
        if cuda:
            self._copies[CUDA_RNG_KEY] = torch.cuda.get_rng_state()
            torch.cuda.synchronize()  # the next optimizer step changes the originals
        return ranges

    def _write_and_commit(self, write: _Write, ranges: list[tuple[str, int, int]], document: bytes, best_step: int | None) -> None:
        """In the thread: no collective, no CUDA. safetensors and fsync let the training thread run meanwhile."""
        rank, world_size = self._engine.rank, self._engine.world_size
        path = write.folder / checkpoint.rank_file(rank)
        save_file(self._copies, path)
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        checkpoint.write_note(path, ranges)
        if rank != 0:
            return
        write_atomic(write.folder / "state.json", document)
        pause = 0.001
        while sum(name.startswith("rank-") and name.endswith(".json") for name in os.listdir(write.folder)) < world_size:
            if write.given_up.wait(pause):
                return
            pause = min(2 * pause, _LONGEST_PAUSE_S)
        checkpoint.commit(write.folder, world_size)
        checkpoint.prune(self._run, self._config, best_step)


def _try(action: Callable[[], Any]) -> str | None:
    try:
        action()
    except Exception as error:  # safetensors raises its own type for a full disk
        return f"{type(error).__name__}: {error}"
    return None


def _failed(folder: Path, problem: str | None) -> CheckpointError:
    return CheckpointError(f"saving {folder} failed ({problem or 'another rank could not write its part'}); "
                           "the checkpoints before it are intact")
