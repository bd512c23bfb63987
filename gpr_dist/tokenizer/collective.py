"""Processes that fit one tokenizer together: who owns which blocks, and sums that do not depend on it.

Floating-point sums change with their order, so with the number of processes. Here a sum is made of results of fixed blocks of rows
(the same shapes whoever computes them), rounded to fixed-point int64 and added as integers, which is associative: 1, 2 or 1000
processes get the same bits. Everything works without torch.distributed, as one process.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from gpr_dist.errors import GPRError, TokenizerError

# B blocks of this process

_BITS = 62  # of an int64 that a sum may fill


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def share(num_blocks: int) -> range:
    """The contiguous run of blocks this process owns; some own none when there are fewer blocks than processes."""
    return range(num_blocks * rank() // world_size(), num_blocks * (rank() + 1) // world_size())


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

    def add(self, part: Tensor) -> None:
        """A block's finite result, computed alike on any process."""
        self._total += (part.double() * math.ldexp(1.0, self._exponent)).round_().long()

    def total(self) -> Tensor:
        """The sum over all processes, float64. Every process must call it."""
        return _reduce(self._total, dist.ReduceOp.SUM).double() * math.ldexp(1.0, -self._exponent)


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
