"""`bench.py hepo`: rollouts and updates of the policy optimisation per second, by candidates per request and catalogue size.

What is timed is the step that launch/hepo.py trains with, ZeRO engine included: sample, value and compare the candidates, log-probabilities
of the old policy, policy and critic loss, stabiliser, AdamW. Journeys, codes, eligibility and values are made up: ads have a value each
(`table`), or a network of the simulator's kind values every pair (`rankers`), so that what valuing costs can be seen. Beside it runs the
plain training step on the same journeys. Under torchrun the rates are those of all ranks.
"""

import json
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from bench_step_ours import generate_batch
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.legal import LegalCodes
from gpr_dist.data.loader import Step
from gpr_dist.decoding.trie import Trie
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.rl.guards import GuardConfig, Guards
from gpr_dist.rl.hepo_step import Parts, hepo_step
from gpr_dist.rl.policy import PolicyConfig
from gpr_dist.rl.rankers import RankerConfig, Rankers
from gpr_dist.rl.rewards import RewardScale
from gpr_dist.rl.rollout import RolloutConfig, Sampler
from gpr_dist.schema import Batch
from gpr_dist.training.engine import Engine, EngineConfig, init_distributed
from gpr_dist.training.loop import train_step
from gpr_dist.training.objective import mtp_objective

GROUPS = 20  # of eligibility, each with half of the ads


class HepoBenchConfig(Config):
    """What is measured."""

    items: tuple[int, ...] = Field((10_000, 1_000_000), min_length=1)
    """catalogue sizes; all are ads"""
    candidates: tuple[int, ...] = Field((8, 40), min_length=1)
    """of a request"""
    reward: Literal["table", "rankers"] = "rankers"
    """what values them"""
    policy: PolicyConfig = PolicyConfig()
    """the update; of each `refresh_every_steps` steps the first needs no forward of the old policy"""
    requests_per_row: int = Field(2, ge=1)
    """rolled out in a step"""
    rows: int = Field(16, ge=1)
    """journeys of a rank's step"""
    tokens: float = Field(200, ge=4)
    """of a journey, on average"""
    model: GPRConfig = GPRConfig(width=96, hsd={"num_layers": 2}, ptd={"num_layers": 1}, num_user_features=4, num_env_features=4,
                                 critic=True)
    """the network"""
    engine: EngineConfig = EngineConfig()
    """sharding and precision"""
    steps: int = Field(6, ge=2)
    """of each case; the median counts, the first is left out"""
    threads: int = Field(1, ge=1)
    """CPU threads"""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu = seconds of processor time: for crowded machines, with threads=1"""
    seed: int = 0
    """of everything made up"""
    out: Path | None = None
    """JSON file for the results"""


class MadeUpReward:
    """Values of ads: a table, or an untrained network of the simulator's kind."""

    def __init__(self, config: HepoBenchConfig, codes_ML: np.ndarray, device: torch.device) -> None:
        self.codes_ML = torch.from_numpy(codes_ML).to(device)
        self.value_M = torch.rand(len(codes_ML), device=device)
        self.rankers = None
        if config.reward == "rankers":
            model = config.model
            self.rankers = Rankers(RankerConfig(), model.num_levels, model.codebook_size, model.num_user_features, model.num_env_features)
            self.rankers = self.rankers.eval().requires_grad_(False).to(device)

    def rewards(self, batch: Batch, request_N: Tensor, item_N: Tensor) -> SimpleNamespace:
        value_N = self.value_M[item_N]
        if self.rankers is not None:
            value_N = value_N * self.rankers(batch, request_N, item_N, self.codes_ML[item_N].long())[:, 0].sigmoid()
        return SimpleNamespace(pctr_N=value_N, pcvr_N=value_N, ecpm_N=value_N, final_value_N=value_N)


def run_bench(config: HepoBenchConfig) -> list[dict[str, Any]]:
    """Measure, print a table."""
    torch.set_num_threads(config.threads)
    init_distributed()
    torch.manual_seed(config.seed)
    engine = Engine(GPR(config.model), config.engine)
    speaks = engine.rank == 0
    if speaks:
        print(f"{config.rows} rows of {config.tokens:.0f} tokens per rank, {config.requests_per_row} requests of each, {config.reward}, "
              f"{config.policy.algorithm}, {engine.world_size} rank(s) x {config.threads} threads on {engine.device.type}, {config.clock} "
              f"time, load average {os.getloadavg()[0]:.1f}")
        print(f"{'items':>10} {'G':>4} {'rollout s':>9} {'cand/s':>9} {'update s':>9} {'cand/s':>9} {'step s':>8} {'plain step s':>12}")
    results = []
    for num_items in config.items:
        for num_candidates in config.candidates:
            found = {"items": num_items, "candidates": num_candidates, **measure(engine, config, num_items, num_candidates)}
            results.append(found)
            if speaks:
                sampled, rollout, update = found["sampled"], found["rollout_s"], found["update_s"]
                print(f"{num_items:10,} {num_candidates:4} {rollout:9.3f} {sampled / rollout:9.0f} {update:9.3f} {sampled / update:9.0f} "
                      f"{found['seconds']:8.3f} {found['plain_s']:12.3f}", flush=True)
    if config.out and speaks:
        config.out.write_text(json.dumps({"config": config.model_dump(mode="json"), "results": results}, indent=1))
    engine.close()
    return results


def measure(engine: Engine, config: HepoBenchConfig, num_items: int, num_candidates: int) -> dict[str, float]:
    """Medians over the steps but the first."""
    rng = np.random.default_rng(config.seed)
    model, clock = config.model, time.perf_counter if config.clock == "wall" else time.process_time
    codes_ML = rng.integers(0, model.codebook_size, (num_items, model.num_levels)).astype(np.int32)
    groups = [np.flatnonzero(rng.random(num_items) < 0.5).astype(np.int32) for _ in range(GROUPS)]
    eligibility = Eligibility(groups, np.arange(num_items, dtype=np.int32), num_items)
    legal = LegalCodes(codes_ML, model.codebook_size, eligibility)
    sampler = Sampler(engine, engine.device, Trie.from_codes(codes_ML, model.codebook_size), eligibility, legal, None,
                      MadeUpReward(config, codes_ML, engine.device),
                      RolloutConfig(num_candidates=num_candidates, requests_per_row=config.requests_per_row), engine.all_reduce)
    objective = mtp_objective(model.num_mtp_heads, 0.1)
    group_of_item_M = torch.arange(num_items, device=engine.device) % 1000
    parts = Parts(engine, sampler, config.policy, model.codebook_size, group_of_item_M, objective, reference=engine.copy_weights(),
                  clock=clock)
    scale, guards, old, rolled, plain = RewardScale(), Guards(GuardConfig(every_steps=0)), None, [], []
    for step in tqdm(range(config.steps), desc=f"{num_items:,} items, {num_candidates} candidates", mininterval=0.5):
        data = Step(0, step, [legal.add_to(made_up_batch(config, codes_ML, 1000 * step + engine.rank, len(groups)), counted=False)])
        fresh = step % config.policy.refresh_every_steps == 0
        old = engine.copy_weights() if fresh else old
        rolled.append(hepo_step(parts, data, step, None if fresh else old, scale, guards, 1e-4, False))
        started = clock()
        train_step(engine, data, objective, model, 1e-4, False)
        plain.append(clock() - started)
    medians = {name: statistics.median(one.metrics[name] for one in rolled[1:]) for name in ("rollout_s", "update_s", "seconds")}
    return medians | {"sampled": statistics.median(one.candidates for one in rolled[1:]), "plain_s": statistics.median(plain[1:])}


def made_up_batch(config: HepoBenchConfig, codes_ML: np.ndarray, seed: int, num_groups: int) -> Batch:
    """Journeys over the items, as the loader gives them."""
    batch = generate_batch(config.model, config.rows, config.tokens, organic=4, ads=3, spread=0.4, seed=seed)
    num_items, codes = len(codes_ML), torch.from_numpy(codes_ML).long()
    batch.item_T = torch.where(batch.item_T >= 0, batch.item_T % num_items, batch.item_T)
    batch.codes_TL = torch.where(batch.item_T[:, None] >= 0, codes[batch.item_T.clamp_min(0)], -1)
    batch.target_item_N = batch.target_item_N % num_items
    batch.target_codes_NL = codes[batch.target_item_N]
    batch.request_eligibility_R = torch.arange(len(batch.request_row_R)) % num_groups
    return batch
