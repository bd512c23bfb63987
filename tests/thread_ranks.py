"""Ranks that are threads of this process, with as much of an Engine as saving and loading see: no process group, milliseconds to start."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from gpr_dist.errors import CheckpointError
from gpr_dist.training.engine import STATES, StateShard


class Group:
    """Ranks that are threads: collectives meet at a barrier."""

    def __init__(self, world_size: int, shapes: dict[str, tuple[int, ...]]) -> None:
        self.barrier, self.values = threading.Barrier(world_size, timeout=20), [torch.zeros(1)] * world_size
        self.engines = [ThreadEngine(self, rank, world_size, shapes) for rank in range(world_size)]

    def run(self, action: Callable[["ThreadEngine"], Any]) -> list[Any]:
        """`action(engine)` on every rank. Returns: results in rank order; an exception is a result too."""
        results: list[Any] = [None] * len(self.engines)

        def call(rank: int) -> None:
            try:
                results[rank] = action(self.engines[rank])
            except CheckpointError as error:
                results[rank] = error

        threads = [threading.Thread(target=call, args=(rank,)) for rank in range(len(self.engines))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        return results


class ThreadEngine:
    """What saving and loading see of an Engine, sharded as ZeRO-3 does; every element tells its parameter, state and place."""

    def __init__(self, group: Group, rank: int, world_size: int, shapes: dict[str, tuple[int, ...]]) -> None:
        self.group, self.rank, self.world_size, self.device = group, rank, world_size, torch.device("cpu")
        self.shapes, self.optimizer_step, self.config = shapes, 7, SimpleNamespace(timeout_seconds=20.0)
        self.shards = []
        for number, (name, shape) in enumerate(shapes.items()):
            size = torch.Size(shape).numel()
            part = -(-size // world_size)
            lo, hi = min(size, rank * part), min(size, (rank + 1) * part)
            if lo < hi:
                whole = {state: torch.arange(size) + 10_000.0 * (3 * number + k) for k, state in enumerate(STATES)}
                self.shards.append(StateShard(name, lo, hi, {state: values[lo:hi].clone() for state, values in whole.items()}))

    def all_reduce(self, values: torch.Tensor, op: str = "sum") -> torch.Tensor:
        self.group.values[self.rank] = values
        self.group.barrier.wait()
        stacked = torch.stack(self.group.values)
        self.group.barrier.wait()
        return stacked.amax(0) if op == "max" else stacked.sum(0)

    def barrier(self) -> None:
        self.group.barrier.wait()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def backward(self, loss: torch.Tensor) -> None:
        """Nothing is trained."""

    def step(self, lr: float) -> None:
        """Nothing is trained."""

    def state_shards(self) -> list[StateShard]:
        return self.shards

    loadable_shards = state_shards

    def finish_loading(self, optimizer_step: int) -> None:
        self.optimizer_step = optimizer_step

    def numbers(self) -> dict[tuple, list[float]]:
        return {(shard.name, shard.lo, key): values.tolist() for shard in self.shards for key, values in shard.tensors.items()}
