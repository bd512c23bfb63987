"""Processes and threads that work on one tokenizer together: who owns which blocks, and sums that do not depend on it.

Floating-point sums change with their order, so with the number of processes. Here a sum is made of results of fixed blocks of rows
(the same shapes whoever computes them), rounded to fixed-point int64 and added as integers, which is associative: 1, 2 or 1000
processes get the same bits. Everything works without torch.distributed, as one process.
"""

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gpr_dist.errors import GPRError, TokenizerError

# B blocks of this process

_BITS = 62  # of an int64 that a sum may fill
T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share(num_blocks: int, of_rank: int | None = None) -> range:
    """The contiguous run of blocks a process (none = this one) owns; empty for some when there are fewer blocks than processes."""
    of_rank = rank() if of_rank is None else of_rank
    return range(num_blocks * of_rank // world_size(), num_blocks * (of_rank + 1) // world_size())


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes a launcher (torchrun, deepspeed) started, NCCL for CUDA and gloo for the CPU; alone without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


class ExactSum:
    """Running sum of tensors of one shape over blocks and processes, the same bits however the blocks are spread."""

    def __init__(self, shape: tuple[int, ...], bound: float, device: torch.device) -> None:
        """Args: bound: at least the sum of the absolute values over all processes, element by element; finite."""
        self._exponent = _fixed_point(bound)
        self._total = torch.zeros(shape, dtype=torch.int64, device=device)
        self._lock = threading.Lock()

    def add(self, part: Tensor) -> None:
        """A block's finite result, computed alike on any process. Threads may add at the same time."""
        part = self._integers(part)
        with self._lock:
            self._total += part

    def add_rows(self, index_n: Tensor, rows_nX: Tensor) -> None:
        """Add each row to the entry of the first axis its index names; exact, so the order in which a GPU does it is all one."""
        rows_nX = self._integers(rows_nX)
        with self._lock:
            self._total.index_add_(0, index_n, rows_nX)

    def _integers(self, values: Tensor) -> Tensor:
        return (values.double() * math.ldexp(1.0, self._exponent)).round_().long()

    def total(self) -> Tensor:
        """The sum over all processes, float64. Every process must call it."""
        return _reduce(self._total, dist.ReduceOp.SUM).double() * math.ldexp(1.0, -self._exponent)


def map_blocks(function: Callable[[int], T], starts: Iterable[int], device: torch.device) -> Iterator[T]:
    """`function` of every block, in their order; on the CPU by one thread per core torch may use, each with kernels of one thread.

    So a block's result does not depend on the number of threads either. An error of a block is raised when its turn comes.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield from map(function, starts)
        return
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(function, starts)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a worker's 1 is also what threads started later would get


def exact_sum(parts_BX: Tensor) -> Tensor:
    """Sum of the blocks' results over this and all other processes: float64 [X], the same bits however the blocks are spread.

    Args: parts_BX: float [B, ...], one entry per block this process owns; B may be 0 and may differ between the processes.
    Returns: NaN everywhere, on every process, when any part of any process is not finite.
    """
    largest = parts_BX.double().abs().amax() if parts_BX.numel() else torch.zeros((), dtype=torch.float64, device=parts_BX.device)
    largest = global_max(largest if bool(largest.isfinite()) else torch.full_like(largest, torch.inf))
    num_parts = int(_reduce(torch.tensor(len(parts_BX), device=parts_BX.device), dist.ReduceOp.SUM))
    if not bool(largest.isfinite()):
        return torch.full(parts_BX.shape[1:], torch.nan, dtype=torch.float64, device=parts_BX.device)
    running = ExactSum(parts_BX.shape[1:], num_parts * float(largest), parts_BX.device)
    for part_X in parts_BX:
        running.add(part_X)
    return running.total()


def global_max(values: Tensor) -> Tensor:
    """Elementwise largest over the processes; exact. NaN is not allowed."""
    return _reduce(values, dist.ReduceOp.MAX)


def gather_rows(rows_nX: Tensor) -> Tensor:
    """Rows of all processes in rank order, on every process; the number of rows may differ between them."""
    if world_size() == 1:
        return rows_nX
    mine = rows_nX.to(_wire_device()).contiguous()
    counts = [torch.zeros(1, dtype=torch.int64, device=mine.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(mine)], device=mine.device))
    counts = [int(count) for count in counts]
    padded = mine.new_zeros(max(counts), *mine.shape[1:])  # NCCL gathers equal shapes only
    padded[:len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows_nX.device)


def broadcast(values: Tensor) -> Tensor:
    """Rank 0's values on every process; shape and type must be the same on all."""
    if world_size() == 1:
        return values
    wire = values.to(_wire_device(), copy=True)
    dist.broadcast(wire, 0)
    return wire.to(values.device)


def gather_shares(mine_nX: Tensor, num_rows: int, block_rows: int) -> Tensor | None:
    """Rows in rank order on rank 0, None elsewhere; nothing is held twice. Args: mine_nX: the rows of this process's `share` of blocks."""
    if world_size() == 1:
        return mine_nX
    if rank() != 0:
        dist.send(mine_nX.to(_wire_device()).contiguous(), 0)
        return None
    all_NX = mine_nX.new_empty(num_rows, *mine_nX.shape[1:])
    all_NX[:len(mine_nX)] = mine_nX
    for source in range(1, world_size()):
        blocks = share(-(-num_rows // block_rows), source)
        part = all_NX[blocks.start * block_rows:blocks.stop * block_rows]
        received = torch.empty_like(part, device=_wire_device())
        dist.recv(received, source)
        part.copy_(received)
    return all_NX


@contextmanager
def together() -> Iterator[None]:
    """Run a body that calls no collective; an error in any process is raised in all of them, so that none waits for ever.

    Raises: the process's own error, or a TokenizerError with the message of the lowest rank that failed.
    """
    problem = None
    try:
        yield
    except (GPRError, OSError) as error:
        problem = error
    if world_size() > 1:
        failed = int(_reduce(torch.tensor(world_size() if problem is None else rank()), dist.ReduceOp.MIN))
        if failed < world_size():
            message = [str(problem)]
            dist.broadcast_object_list(message, failed, device=_wire_device())
            if problem is None or isinstance(problem, GPRError):
                raise TokenizerError(message[0])
    if problem is not None:
        raise problem


def _fixed_point(bound: float) -> int:
    """Largest exponent e with bound · 2^e ≤ 2^62, kept where 2^±e is a normal double."""
    assert math.isfinite(bound) and bound >= 0, bound
    return min(_BITS - math.frexp(bound)[1], 1000)


def _reduce(values: Tensor, operation: dist.ReduceOp) -> Tensor:
    if world_size() == 1:
        return values.clone()
    wire = values.to(_wire_device(), copy=True)
    dist.all_reduce(wire, operation)
    return wire.to(values.device)


def _wire_device() -> torch.device:
    """Where tensors must lie to be sent."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
