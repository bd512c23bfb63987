"""`bench.py recursion`: what a token that leaves the recursion early still costs (Mixture-of-Recursions, GPR §3.1).

The journey encoder, forward and backward, while the router is made to send a given share of the tokens through the middle layers again.
If leaving early is free, the step of a share of 0 takes as long as that of the same layers without recursion, and the rest grows with the
tokens that stay, their attention with their square. All shares in turn in one process; the median counts.
"""

import statistics
import time
from typing import Any, Literal
from unittest.mock import patch

import torch
from bench_step_ours import generate_batch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.model.gpr import GPRConfig
from gpr_dist.model.hsd import HSD, HSDConfig, Router
from gpr_dist.schema import Batch

# T tokens  D width


class RecursionBenchConfig(Config):
    """What is measured."""

    width: int = Field(256, ge=2)
    """model width"""
    hsd: HSDConfig = HSDConfig(num_layers=4, recursions=2)
    """the encoder"""
    rows: int = Field(8, ge=1)
    """journeys"""
    tokens: float = Field(500, ge=4)
    """of a journey, on average"""
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    """of the tokens that pass the middle layers as often as possible; the others pass them once"""
    repetitions: int = Field(5, ge=1)
    """steps of each share"""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu = seconds of processor time: for crowded machines"""
    threads: int = Field(1, ge=1)
    """of torch"""
    seed: int = 0
    """of data and weights"""


def run_bench(config: RecursionBenchConfig) -> dict[str, float]:
    """Print a line per share. Returns: seconds by name."""
    torch.set_num_threads(config.threads)
    batch = generate_batch(GPRConfig(width=config.width), config.rows, config.tokens, 4, 3, 0.4, config.seed)
    torch.manual_seed(config.seed)
    x_TD = torch.randn(batch.num_tokens, config.width)
    plain = HSD(config.width, config.hsd.model_copy(update={"recursions": 1}))
    recursive = HSD(config.width, config.hsd)
    tried: dict[str, tuple[HSD, float]] = {"without recursion": (plain, 0.0)}
    tried |= {f"{share:.0%} again": (recursive, share) for share in config.shares}
    runs: dict[str, list[float]] = {name: [] for name in tried}
    for count in tqdm(range(config.repetitions + 1), desc="repetitions", mininterval=0.5):
        for name, (encoder, share) in tried.items():
            seconds = timed(encoder, x_TD, batch, share, time.process_time if config.clock == "cpu" else time.perf_counter)
            if count:  # the first round warms up
                runs[name].append(seconds)
    found = {name: statistics.median(seconds) for name, seconds in runs.items()}
    print(f"{batch.num_tokens:,} tokens, width {config.width}, {config.hsd.num_layers} layers, the middle {config.hsd.num_layers - 2} up "
          f"to {config.hsd.recursions} times; forward and backward, {config.clock} time")
    for name, seconds in found.items():
        print(f"  {name:20} {seconds * 1e3:8.1f} ms {seconds / found['without recursion']:7.2f} x")
    return found


def timed(encoder: HSD, x_TD: Tensor, batch: Batch, share: float, clock: Any) -> float:
    """Seconds of one forward and backward pass with a router that sends this share on."""
    leaf_TD = x_TD.clone().requires_grad_()
    encoder.zero_grad()
    route = Router.forward

    def sent(router: Router, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        depth_T, gate_T, loss = route(router, x_TD)
        place_T = torch.arange(len(depth_T), device=depth_T.device)
        goes_T = (place_T * share).floor() < ((place_T + 1) * share).floor()  # evenly spread
        return torch.where(goes_T, router.config.recursions, 1), gate_T, loss

    with patch.object(Router, "forward", sent):
        begin = clock()
        hidden_TD, loss = encoder(leaf_TD, batch)
        (hidden_TD.sum() if loss is None else hidden_TD.sum() + loss).backward()
        return clock() - begin
