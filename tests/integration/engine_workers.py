"""What the rank processes of test_engine.py and test_checkpoint.py run; a process group runs a list of cases, as starting is slow."""

import functools
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_batches import concat_batches, empty_batch, random_batch
from torch import Tensor, nn

from gpr_dist.data.candidates import ItemCandidates
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.loader import LoaderConfig, build_loader
from gpr_dist.data.sampler import World
from gpr_dist.errors import GPRError
from gpr_dist.model.gpr import GPR, GPRConfig
from gpr_dist.objectives.mtp import mtp_loss, uniform_head_weights, value_loss
from gpr_dist.tokenizer.semantic_ids import SemanticIds
from gpr_dist.training import checkpoint
from gpr_dist.training.engine import Engine, EngineConfig, init_distributed
from gpr_dist.training.loop import FitConfig, Progress, fit
from gpr_dist.training.objective import mtp_objective
from gpr_dist.training.spikes import Tracer
from gpr_dist.training.tracker import Tracker, TrackerConfig

ROWS_PER_STEP = 8
LR = 3e-3
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
TIMEOUT_S = 60


def run_cases(function: str, cases: list[dict]) -> list:
    """Call one of this module's functions for every case, in one process group."""
    init_distributed(TIMEOUT_S)
    results = [globals()[function](**case) for case in cases]
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return results


# ------------------------------------------------------------------------------------------------ the engine, on random batches

def model_config(**changes: Any) -> GPRConfig:
    return GPRConfig.model_validate({"width": 16, "codebook_size": 16, "num_user_features": 2, "num_env_features": 2,
                                     "hsd": {"num_heads": 2}, "ptd": {"num_heads": 2},
                                     "embedding": {"feature_buckets": 64, "scene_buckets": 8}, **changes})


def build_model() -> GPR:
    torch.manual_seed(0)
    return GPR(model_config())


@functools.cache
def step_rows(step: int) -> list:
    """The rows of a global step, one batch each; the same for every world size."""
    return [random_batch(1000 * step + row, num_rows=1) for row in range(ROWS_PER_STEP)]


def share_loss(model: Any, batch: Any, num_targets: int) -> Tensor:
    weights = uniform_head_weights(4)
    output = model(batch)
    nll = output.nll_NL
    value = value_loss(output.values_NL1, batch.target_value_N, batch.target_head_N, weights, num_targets)
    return mtp_loss(nll, batch.target_head_N, weights, num_targets) + 0.1 * value


def plain_training(num_steps: int, clip: float = 1.0) -> dict[str, list[float]]:
    """The reference: one process, no DeepSpeed."""
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
    losses, norms = [], []
    for step in range(num_steps):
        batch = concat_batches(step_rows(step))
        loss = share_loss(model, batch, batch.num_targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "norms": norms}


def train_engine(num_steps: int, zero_stage: int = 3, precision: str = "fp32", persistence: int = 10_000, clip: float = 1.0,
                 split: str = "even", nan_step: int = -1, nan_where: str = "gradient", skip_steps: tuple = ()) -> dict:
    """Train on this rank's rows of every step.

    Args:
        split: even = rows dealt out, two micro-batches; one = one micro-batch; uneven = rank 0 has all rows, in three micro-batches,
            and every other rank three empty ones.
        nan_step: the last rank's gradient or loss is NaN there, and the caller learns it only from the engine.
    """
    engine = Engine(build_model(), EngineConfig(zero_stage=zero_stage, precision=precision, persistence_elements=persistence,
                                                gradient_clipping=clip, timeout_seconds=TIMEOUT_S))
    parts = {"one": 1, "even": 2, "uneven": 3}[split]
    losses, norms, applied = [], [], []
    for step in range(num_steps):
        if step in skip_steps:
            continue
        rows = step_rows(step)
        total = sum(batch.num_targets for batch in rows)
        mine = (rows if engine.rank == 0 else []) if split == "uneven" else rows[engine.rank :: engine.world_size]
        loss_sum = 0.0
        for part in range(parts):
            picked = mine[part::parts]
            batch = concat_batches(picked) if picked else empty_batch()
            loss = share_loss(engine, batch, total)
            loss_sum += float(loss.detach())
            if step == nan_step and engine.rank == engine.world_size - 1 and part == 0:
                loss = poison(engine, loss, nan_where)
            engine.backward(loss)
        everywhere = engine.all_reduce(torch.tensor([float(not engine.gradients_are_finite())])).item() == 0
        norm, was_applied = engine.step(LR, apply=everywhere)
        losses.append(float(engine.all_reduce(torch.tensor([loss_sum], dtype=torch.float64))))
        norms.append(norm)
        applied.append(was_applied)
    finite = all(bool(t.isfinite().all()) for shard in engine.state_shards() for t in shard.tensors.values())
    return {"losses": losses, "norms": norms, "applied": applied, "state_finite": finite}


def poison(engine: Engine, loss: Tensor, where: str) -> Tensor:
    if where == "loss":
        return loss * float("nan")
    parameter = next(iter(engine.module.parameters()))

    def spoil(grad: Tensor) -> Tensor:
        handle.remove()
        grad = grad.clone()
        grad.view(-1)[-1] = float("nan")
        return grad

    handle = parameter.register_hook(spoil)
    return loss


class TwoParts(nn.Module):
    """`sometimes` takes part in the loss only when asked."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.always = nn.Linear(6, 6)
        self.sometimes = nn.Linear(6, 6)
        for p in self.parameters():
            nn.init.normal_(p, generator=generator)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        y = self.always(x)
        return (self.sometimes(y) if both else y).square().mean()


def two_parts_input(step: int, rank: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def train_two_parts(zero_stage: int, both_at: list[int], num_steps: int, nan_step: int = -1, micro_batches: int = 1) -> dict:
    """Weights of this rank's shards after each step; `sometimes` is used by every rank at the steps `both_at`, else by nobody.

    With 2 micro-batches it is used in the second one only.
    """
    engine = Engine(TwoParts(), EngineConfig(zero_stage=zero_stage, persistence_elements=0, gradient_clipping=0.0))
    history, applied = [], []
    for step in range(num_steps):
        for part in range(micro_batches):
            loss = engine(two_parts_input(step, engine.rank), step in both_at and part == micro_batches - 1) / engine.world_size
            if step == nan_step and engine.rank == 1:
                loss = loss * float("nan")
            engine.backward(loss)
        applied.append(engine.step(LR, apply=True)[1])
        history.append([(shard.name, shard.lo, shard.tensors["param"].tolist()) for shard in engine.state_shards()])
    return {"history": history, "applied": applied}


# ------------------------------------------------------------------------------------------------ the loop, on real shards

class RecordedLoader:
    """The loader, keeping the row ids this rank was given at every step."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.rows = loader, []

    def state_dict(self) -> dict:
        return self.loader.state_dict()

    def __iter__(self) -> Any:
        for step in self.loader:
            self.rows.append([row for batch in step.micro_batches for row in batch.row_ids_B.tolist()])
            yield step


def fit_tiny(data: str, run: str, until: int, total: int = 8, zero_stage: int = 3, precision: str = "fp32", dropout: float = 0.0,
             every: int = 100, keep_last: int = 10, keep_every: int = 0, validation: list | None = None, nan_steps: tuple = (),
             policy: str = "stop", max_skipped: int = 10, width: int = 16, items: dict | None = None, background: bool = True,
             spike_step: int = 0, spike_rows: tuple = (), slow_rank: int = -1) -> dict:
    """`fit` to step `until` (a checkpoint is written there) of a run of `total` steps, resuming what the run folder holds.

    Args: validation: made-up validation losses, one per step; nan_steps: steps (from 1) at which the last rank's loss is NaN; items:
        settings of `model.items`, with an item head; spike_step: the losses of `spike_rows` are tenfold there; slow_rank: works 0.2 s more
        on each micro-batch.
    Returns: this rank's row ids per step, the losses logged, the text of a GPRError that ended it.
    """
    folder, run_folder = Path(data), Path(run)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    semantic_ids = SemanticIds.load(folder / "tokenizer")
    config = model_config(width=width, num_user_features=0, hsd={"num_heads": 2, "dropout": dropout}, num_levels=semantic_ids.num_levels,
                          codebook_size=semantic_ids.codebook_size, items={**(items or {}), "num_items": semantic_ids.num_items})
    candidates = None
    if items:
        weights = np.arange(semantic_ids.num_items) % 7 + 1.0
        candidates = ItemCandidates(semantic_ids.codes_NL, Eligibility.load(folder), config.items, weights)
    torch.manual_seed(0)
    engine = Engine(GPR(config), EngineConfig(zero_stage=zero_stage, precision=precision, timeout_seconds=TIMEOUT_S))
    torch.manual_seed(1000 + rank)
    loader = build_loader(folder / "shards" / "train", LoaderConfig(global_batch_size=64, micro_batch_tokens=512), World(rank, world_size),
                          semantic_ids.codes_NL, config.num_mtp_heads, candidates=candidates, keyed=config.drops)
    restored = checkpoint.load_latest(engine, run_folder, {"tokenizer": semantic_ids.codebook_fingerprint})
    progress = Progress(**restored.state["progress"]) if restored else Progress()
    if restored:
        loader.load_state_dict(restored.state["loader"])
    start = progress.step
    tracker = Tracker(TrackerConfig(wandb="disabled", progress=False), run_folder, {}, rank, total, start)
    recorded = RecordedLoader(loader)
    schedule = {"num_steps": until, "shape": "constant", "lr": LR, "warmup_steps": 0}
    fit_config = FitConfig.model_validate({
        "schedule": schedule, "alerts": {"first_after_steps": 5}, "on_nonfinite": policy, "max_skipped_steps": max_skipped,
        "validate_every_steps": 1 if validation else 0,
        "checkpoint": {"every_steps": every, "keep_last": keep_last, "keep_every_steps": keep_every, "background": background}})
    made_up = iter(validation or [])
    error = None
    objective = mtp_objective(config.num_mtp_heads, 0.1, item_loss_weight=1.0)

    def spoilt(engine: Engine, batch: Any, num_targets: int) -> Any:
        share = objective(engine, batch, num_targets)
        if len(recorded.rows) + start in nan_steps and rank == world_size - 1:
            share.loss = share.loss * float("nan")
        if len(recorded.rows) + start == spike_step:
            row_N = batch.row_ids_B[batch.request_row_R][batch.target_request_N]
            share.nll_N = torch.where(torch.isin(row_N, torch.tensor(spike_rows)), 10.0, 1.0) * share.nll_N
            share.loss, share.nll_PL = 3 * share.loss, 3 * share.nll_PL
        if rank == slow_rank:
            until = time.thread_time() + 0.2
            while time.thread_time() < until:
                pass
        return share

    try:
        fit(engine, recorded, spoilt, fit_config, config, run_folder, tracker, progress,
            {"fingerprints": {"tokenizer": semantic_ids.codebook_fingerprint}},
            (lambda: {"validation/loss": next(made_up)}) if validation else None,
            tracer=Tracer(loader.reader, folder / "catalogue" / "catalogue.arrow"))
    except GPRError as problem:
        error = f"{type(problem).__name__}: {problem}"
    tracker.close()
    engine.barrier()
    lines = [json.loads(text) for text in (run_folder / "metrics.jsonl").read_text().splitlines()]
    random = torch.rand(3).tolist()
    finite = all(bool(t.isfinite().all()) for shard in engine.state_shards() for t in shard.tensors.values())
    return {"start": start, "rows": recorded.rows, "losses": {str(line["step"]): line["loss"] for line in lines if "loss" in line},
            "nonfinite": [line for line in lines if "nonfinite/step" in line], "error": error, "random": random,
            "skipped": progress.skipped, "state_finite": finite, "pid": os.getpid()}
