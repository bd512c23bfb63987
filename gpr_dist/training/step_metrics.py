"""The numbers of a step that metrics.jsonl gets: losses per head, level and kind of target, speed, and every rank's own facts."""

import resource
import time
from typing import Any

import torch
from torch import Tensor

from gpr_dist.schema import Action, Batch, TokenType
from gpr_dist.training.engine import Engine

# W ranks  F facts of a rank  N targets  K kinds of targets

RANK_FACTS = ("bad", "busy_s", "waited_s", "memory_gib", "flops")
KINDS = tuple(f"loss_after/{kind.name}" for kind in TokenType) + tuple(f"loss_action/{action.name.lower()}" for action in Action)


def rank_facts(engine: Engine, bad: bool, busy_s: float, waited_s: float, flops: float = 0.0) -> Tensor:
    """Zeros [W F] but for this rank's facts, float64 on the CPU: their sum over the ranks is everybody's, in a step's one reduction."""
    facts_WF = torch.zeros(engine.world_size, len(RANK_FACTS), dtype=torch.float64)
    facts_WF[engine.rank] = torch.tensor([bad, busy_s, waited_s, memory_bytes() / 2**30, flops], dtype=torch.float64)
    return facts_WF.flatten()


def own_clock(engine: Engine) -> float:
    """Seconds of this rank's own work; differences count.

    On a CPU the processor time of this thread, which stands still while it waits for other ranks at any ZeRO stage. On a GPU the time
    itself, read after the device has finished: at stages 0 and 1, where ranks meet only at a step's end, a difference is the rank's own;
    at stages 2 and 3 the collectives within a step make all ranks equally late, and a slow GPU is found by `train.profile` on two ranks.
    """
    return time.thread_time() if engine.device.type == "cpu" else time.perf_counter()


def rank_metrics(facts_WF: Tensor) -> dict[str, float]:
    """Metrics of the ranks beside each other: the longest wait for data, the largest memory, how far the slowest is behind the mean."""
    _, busy_W, waited_W, memory_W, flops_W = facts_WF.T
    metrics = {"loader_wait_s": float(waited_W.max()), "memory_gib": float(memory_W.max())}
    if len(facts_WF) > 1:
        metrics |= {"straggler_gap": _gap(busy_W), "straggler_rank": int(busy_W.argmax())}
        if flops_W.any():
            metrics["work_gap"] = _gap(flops_W)
    return metrics


def _gap(values_W: Tensor) -> float:
    return float(values_W.max() / values_W.mean().clamp_min(1e-12))


def sum_by_kind(batch: Batch, nll_N: Tensor) -> Tensor:
    """Losses of the first head's targets, summed by kind, and their numbers: float64 [2 K].

    Kinds: the type of the token an ad is predicted from, and what the user did with the ad.
    """
    after_N = batch.token_type_T[batch.request_token_R[batch.target_request_N]]
    first_N = (batch.target_head_N == 0).double()
    sums_2K = torch.zeros(2, len(KINDS), dtype=torch.float64, device=nll_N.device)
    for kind_N in (after_N, len(TokenType) + batch.target_action_N):
        sums_2K.index_add_(1, kind_N, torch.stack((nll_N.double() * first_N, first_N)))
    return sums_2K.flatten()


def losses_by_kind(sums_2K: Tensor) -> dict[str, float]:
    """Nats per ad of each kind that a step had."""
    return {name: nll / count for name, nll, count in zip(KINDS, *sums_2K.view(2, -1).tolist(), strict=True) if count}


def losses_by_place(nll_PL: Tensor, count_P: Tensor) -> dict[str, Any]:
    """Nats per target of each head, and of each level over all heads."""
    by_head = (nll_PL.sum(1) / count_P.clamp_min(1)).tolist()
    by_level = (nll_PL.sum(0) / count_P.sum().clamp_min(1)).tolist()
    return {f"loss_head/{h + 1}": x for h, x in enumerate(by_head)} | {f"loss_level/{level + 1}": x for level, x in enumerate(by_level)}


def memory_bytes() -> int:
    """Peak memory of this process: on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
