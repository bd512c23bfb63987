"""The training loop of pretraining and value-aware fine-tuning: one straight `fit`, with the objective, validation and data handed in.

Order of a step: count targets over all ranks → forward and backward of every micro-batch → one reduction of losses, finiteness and
stop requests → finite check → optimizer step → log → validate → save. Every rank takes the same decisions from the same reduced numbers.
"""

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from gpr_dist.config import Config
from gpr_dist.data.loader import Loader, Step
from gpr_dist.errors import ConfigError, TrainingError
from gpr_dist.model.flops import Work, training_flops, work_of
from gpr_dist.model.gpr import GPRConfig
from gpr_dist.ops.noise import hashed_uniform
from gpr_dist.schema import Batch
from gpr_dist.training import checkpoint
from gpr_dist.training.alerts import AlertConfig, Alerts
from gpr_dist.training.checkpoint import CheckpointConfig
from gpr_dist.training.engine import Engine
from gpr_dist.training.profile import ProfileConfig, profiled
from gpr_dist.training.saver import Saver
from gpr_dist.training.schedule import ScheduleConfig, learning_rate
from gpr_dist.training.spikes import Tracer
from gpr_dist.training.step_metrics import (
    KINDS,
    RANK_FACTS,
    losses_by_kind,
    losses_by_place,
    own_clock,
    rank_facts,
    rank_metrics,
    sum_by_kind,
)
from gpr_dist.training.tracker import Tracker

# P MTP heads  L levels  N targets  K kinds of targets  W ranks  F facts of a rank

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class FitConfig(Config):
    """The loop."""

    schedule: ScheduleConfig = ScheduleConfig()
    """length and learning rate"""
    target_share: float = Field(default=1.0, gt=0, le=1)
    """share of the requests whose ads are targets in a step, drawn anew in every step; the loss stays an unbiased estimate of the whole"""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """when to save and what to keep"""
    log_every_steps: int = 1
    """steps between lines of metrics.jsonl"""
    validate_every_steps: int = 200
    """steps between validations; 0 = only at the end"""
    best_metric: str = "validation/loss"
    """what the best checkpoint is best in: validation/loss (less is better) or a ranking metric (more is), e.g. validation/ndcg@10"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """what to do when a loss or gradient is not finite: stop the run, or drop that step's update"""
    max_skipped_steps: int = 10
    """skip: this many dropped updates in a row stop the run"""
    alerts: AlertConfig = AlertConfig()
    """what is said to a person watching"""
    profile: ProfileConfig = ProfileConfig()
    """steps recorded by torch.profiler"""


@dataclass
class LossShare:
    """What an objective returns for one micro-batch: this rank's share of the step's loss and the sums behind it."""

    loss: Tensor  # scalar with gradient; shares of all ranks and micro-batches add up to the step's loss
    nll_PL: Tensor  # float64 sums of -log p per head and level, detached
    count_P: Tensor  # float64 targets per head
    value_loss: Tensor  # scalar, detached share of the value regression
    item_loss: Tensor  # the same of the item head, 0 without one
    nll_N: Tensor  # -log p of each target, summed over levels, detached


Objective = Callable[[Engine, Batch, float], LossShare]


class Weighing(Protocol):
    """Decides before a step's first forward which of its targets count, and how much (training/value_weights.py)."""

    def __call__(self, engine: Engine, batches: list[Batch]) -> tuple[list[Batch], dict[str, float]]:
        """This rank's micro-batches as they are trained on, and metrics of the step (collective)."""

    def state_dict(self) -> dict[str, Any]:
        """For checkpoints: plain JSON values, the same on every rank."""


@dataclass
class Progress:
    """Counters that survive a restart."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    targets: int = 0
    skipped: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None  # of train.best_metric; negative where more is better
    metrics: dict[str, float] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)  # of the last steps, by which alerts know a spike


def fit(engine: Engine, loader: Loader, objective: Objective, config: FitConfig, model: GPRConfig, run: Path, tracker: Tracker,
        progress: Progress, save_state: dict[str, Any],
        validate: Callable[[], dict[str, float]] | None = None, peak_flops: float = 0.0, weighing: Weighing | None = None,
        tracer: Tracer | None = None) -> Progress:
    """Train until `config.schedule.num_steps`, or until a stop signal, which saves and returns (collective).

    Args:
        progress: where to start; from a checkpoint's "progress" after a resume.
        save_state: plain values stored in every checkpoint (fingerprints, resolved config).
        validate: returns metrics with "validation/loss"; called on all ranks.
        peak_flops: per rank, for MFU; 0 = not reported.
        weighing: weights of the targets; its state goes into the checkpoints as "weighing". None = all count 1.
        tracer: describes the rows of a step whose loss is a spike or not finite; None = they are not described.
    Raises: TrainingError when a loss or gradient is not finite and the policy says stop.
    """

    def save(last: bool) -> None:
        state = save_state | ({"weighing": weighing.state_dict()} if weighing else {})
        save_checkpoint(saver, loader, tracker, progress, state, last)

    saver = Saver(engine, run, config.checkpoint)
    num_steps, skipped_in_a_row, saved_step, alerts = config.schedule.num_steps, 0, progress.step, Alerts(config.alerts, progress.losses)
    engine.train()
    with stop_requested() as stop, profiled(config.profile, run, engine.rank, progress.step) as step_profiled:
        steps = iter(loader) if progress.step < num_steps else iter(())
        for global_step in range(progress.step, num_steps):
            started = time.perf_counter()
            data = next(steps)
            waited = time.perf_counter() - started
            lr = learning_rate(config.schedule, global_step)
            result = train_step(engine, data, objective, model, lr, stop(), config.target_share, weighing, waited)
            saver.poll()
            step_profiled()
            progress.step = global_step + 1
            progress.rows, progress.tokens, progress.targets = (a + b for a, b in zip((progress.rows, progress.tokens, progress.targets),
                                                                                      (result.rows, result.work.tokens, result.targets),
                                                                                      strict=True))
            elapsed = time.perf_counter() - started
            progress.seconds += elapsed
            spiked = result.applied and give_alerts(alerts, tracker, progress.step, result.loss, result.work.tokens / elapsed,
                                                    result.facts_WF, elapsed)
            if tracer and (spiked or not result.applied):
                tracer.trace(engine, run, progress.step, "loss spike" if spiked else "not finite", result.batches, result.nll,
                             result.usual_nll)
            if not result.applied:
                progress.skipped += 1
                skipped_in_a_row += 1
                report_nonfinite(engine, data, result.bad_ranks, run, global_step, tracker)
                if config.on_nonfinite == "stop" or skipped_in_a_row >= config.max_skipped_steps:
                    saver.wait()
                    last = f"last checkpoint step-{saved_step:06d}" if saved_step else "no checkpoint yet"
                    raise TrainingError(f"loss or gradient is not finite at step {global_step + 1} on rank(s) {result.bad_ranks}; the "
                                        f"update was dropped, weights are unharmed; rows in {run}/nonfinite-*.json; {last}")
            else:
                skipped_in_a_row = 0
            if progress.step % config.log_every_steps == 0 or progress.step == num_steps:
                tracker.log(progress.step, step_metrics(engine, result, model, lr, elapsed, progress, peak_flops))
            tracker.advance(progress.step, loss=f"{result.loss:.3f}", lr=f"{lr:.1e}", tok_s=f"{result.work.tokens / elapsed:.0f}")
            finished = progress.step == num_steps
            due = config.validate_every_steps and progress.step % config.validate_every_steps == 0
            if validate and (finished or (due and not result.stop)):  # a stop signal is answered in bounded time
                run_validation(engine, validate, config.best_metric, progress, tracker)
            if finished or result.stop or progress.step % config.checkpoint.every_steps == 0:
                save(last=finished or result.stop)
                saved_step = progress.step
            if result.stop:
                tracker.say(f"stop signal: saved {checkpoint.step_folder(run, progress.step)} and leaving")
                break
    return progress


def save_checkpoint(saver: Saver, loader: Loader, tracker: Tracker, progress: Progress, state: dict[str, Any], last: bool) -> None:
    """Save what training is at `progress.step`, log for how long it stood still and what the newest finished write took (collective).

    Args: state: plain values stored beside the counters and the loader's state. last: be committed on return.
    """
    started = time.perf_counter()
    saver.save(progress.step, {**state, "progress": vars(progress), "loader": loader.state_dict()}, progress.best_step)
    if last:
        saver.wait()
    written = {"checkpoint/write_seconds": saver.write_seconds} if saver.write_seconds else {}
    tracker.log(progress.step, {"checkpoint/seconds": time.perf_counter() - started, **written})


@dataclass
class StepResult:
    """Sums over all ranks of one optimizer step."""

    loss: float
    value_loss: float
    item_loss: float
    nll_PL: Tensor
    count_P: Tensor
    kinds_2K: Tensor  # of `sum_by_kind`
    facts_WF: Tensor  # of `rank_facts`
    grad_norm: float
    applied: bool
    stop: bool
    rows: int
    targets: int
    work: Work
    weighing: dict[str, float]  # metrics
    batches: list[Batch]  # this rank's, as they were trained on, on the CPU
    nll: list[Tensor]  # of the targets of each

    @property
    def bad_ranks(self) -> list[int]:
        """Ranks whose loss or gradient was not finite."""
        return self.facts_WF[:, 0].nonzero().flatten().tolist()

    @property
    def usual_nll(self) -> float:
        """Mean over all targets of the step; 0 where that is not finite."""
        return float((self.nll_PL.sum() / self.count_P.sum().clamp_min(1)).nan_to_num(0, 0, 0))


def train_step(engine: Engine, data: Step, objective: Objective, model: GPRConfig, lr: float, stop: bool,
               target_share: float = 1.0, weighing: Weighing | None = None, waited: float = 0.0) -> StepResult:
    """One optimizer step over this rank's micro-batches (collective). Args: waited: s, for the data, told to the other ranks."""
    every, weighing_metrics = weighing(engine, data.micro_batches) if weighing else (data.micro_batches, {})
    sampled = [sample_targets(batch, target_share, data.epoch * 1_000_003 + data.step_in_epoch) for batch in every]
    own_work = sum((work_of(batch, model.num_mtp_heads, model.ptd.intent_window) for batch in sampled), Work())
    batches = [batch.to(engine.device) for batch in sampled]
    counts = [sum(b.num_targets for b in every), sum(b.num_targets for b in sampled), sum(b.num_rows for b in sampled),
              *vars(own_work).values()]
    every_target, targets, rows, *work_sums = (int(x) for x in engine.all_reduce(torch.tensor(counts, dtype=torch.float64)).tolist())
    num_targets = max(1.0, every_target * target_share)  # a step may hold no target at all: its loss is 0
    p, l = model.num_mtp_heads, model.num_levels  # noqa: E741
    sums, nll, started = torch.zeros(3 + p * l + p + 2 * len(KINDS), dtype=torch.float64, device=engine.device), [], own_clock(engine)
    for batch in batches:
        share = objective(engine, batch, num_targets)
        engine.backward(share.loss)
        losses = torch.stack([part.double() for part in (share.loss.detach(), share.value_loss, share.item_loss)])
        sums += torch.cat((losses, share.nll_PL.flatten(), share.count_P, sum_by_kind(batch, share.nll_N)))
        nll.append(share.nll_N)
    bad = not (engine.gradients_are_finite() and bool(torch.isfinite(sums).all()))
    facts = rank_facts(engine, bad, own_clock(engine) - started, waited, training_flops(model, own_work))
    reduced = engine.all_reduce(torch.cat((sums.cpu(), torch.tensor([float(stop)], dtype=torch.float64), facts))).cpu()
    losses, nll_sums, count_P, kinds_2K, stop_sum, facts = reduced.split([3, p * l, p, 2 * len(KINDS), 1, len(facts)])
    facts_WF = facts.view(-1, len(RANK_FACTS))
    grad_norm, applied = engine.step(lr, apply=not facts_WF[:, 0].any())
    return StepResult(*losses.tolist(), nll_sums.view(p, l), count_P, kinds_2K, facts_WF, grad_norm, applied, bool(stop_sum), rows, targets,
                      Work(*work_sums), weighing_metrics, sampled, nll)


def sample_targets(batch: Batch, share: float, seed: int) -> Batch:
    """The batch with the targets of a random share of its requests, chosen by row, site and seed: alike however a step is split.

    The decoder's cost falls with the share, the encoder's does not. Divided by `share` times all targets, the loss stays unbiased.
    """
    if share == 1:
        return batch
    row_R = batch.request_row_R
    key_R = batch.row_ids_B[row_R] * 65_537 + batch.request_token_R - batch.offsets_B1[row_R]
    return batch.keep_targets((hashed_uniform(key_R, 1, seed)[:, 0] < share)[batch.target_request_N])


def step_metrics(engine: Engine, result: StepResult, model: GPRConfig, lr: float, seconds: float, progress: Progress,
                 peak_flops: float) -> dict[str, Any]:
    """The line of metrics.jsonl for a step; rates are over all ranks."""
    metrics: dict[str, Any] = {"loss": result.loss, "value_loss": result.value_loss, "lr": lr, "grad_norm": result.grad_norm}
    metrics |= losses_by_place(result.nll_PL, result.count_P) | losses_by_kind(result.kinds_2K)
    if model.items.has_head:
        metrics["item_loss"] = result.item_loss
    metrics |= {"rows": result.rows, "tokens": result.work.tokens, "targets": result.targets, "seconds": seconds,
                "tokens_per_s": result.work.tokens / seconds, "targets_per_s": result.targets / seconds, "skipped_steps": progress.skipped,
                "total_targets": progress.targets, **rank_metrics(result.facts_WF), **result.weighing}
    if peak_flops:
        metrics["mfu"] = training_flops(model, result.work) / seconds / (peak_flops * engine.world_size)
    return metrics


def give_alerts(alerts: Alerts, tracker: Tracker, step: int, loss: float, rate: float, facts_WF: Tensor, seconds: float) -> bool:
    """Say what is unusual about a step. Returns: whether its loss is a spike not said before, alike on all ranks."""
    found = alerts.step(step, loss, rate, rank_metrics(facts_WF)["loader_wait_s"], seconds)
    for alert in found:
        tracker.alert(step, alert.kind, alert.text)
    return any(alert.kind == "loss_spike" for alert in found)


def measure_peak_flops(precision: str, device: torch.device, size: int = 1024, repeats: int = 4) -> float:
    """Rate of a large square matrix product on this device, operations per second: the denominator of our MFU."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = size if device.type == "cpu" else 8192
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = 0.0
    for _ in range(3):
        _synchronize(device)
        started = time.perf_counter()
        for _ in range(repeats):
            a @ b
        _synchronize(device)
        best = max(best, repeats * 2 * size**3 / (time.perf_counter() - started))
    return best


@contextlib.contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """While open, SIGTERM and SIGUSR1 only raise a flag, read by the yielded function: the loop saves at the next step and leaves."""
    received = []
    previous = {number: signal.signal(number, lambda number, _: received.append(number)) for number in STOP_SIGNALS}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run_validation(engine: Engine, validate: Callable[[], dict[str, float]], best_metric: str, progress: Progress,
                   tracker: Tracker) -> None:
    """Measure, log, and note in `progress` whether it is the best so far (collective)."""
    engine.train(False)
    metrics = validate()
    engine.train(True)
    progress.metrics = metrics
    if best_metric not in metrics:
        raise ConfigError(f"train.best_metric={best_metric} is not measured; choose one of {', '.join(metrics)}")
    loss = metrics[best_metric] if best_metric.endswith("loss") else -metrics[best_metric]
    if progress.best_loss is None or loss < progress.best_loss:
        progress.best_step, progress.best_loss = progress.step, loss
    tracker.log(progress.step, metrics)
    tracker.say(f"step {progress.step}: " + "  ".join(f"{k.removeprefix('validation/')} {v:.4f}" for k, v in metrics.items()))


def report_nonfinite(engine: Engine, data: Step, bad_ranks: list[int], run: Path, step: int, tracker: Tracker) -> None:
    """Leave the rows of the bad step behind, one file per rank concerned, so that they can be looked at."""
    if engine.rank in bad_ranks:
        rows = [batch.row_ids_B.tolist() for batch in data.micro_batches]
        (run / f"nonfinite-step-{step + 1:06d}-rank-{engine.rank:05d}.json").write_text(json.dumps({"micro_batches": rows}))
    tracker.log(step + 1, {"nonfinite/step": step + 1, "nonfinite/ranks": bad_ranks})
    tracker.alert(step + 1, "not_finite", f"step {step + 1}: loss or gradient not finite on rank(s) {bad_ranks}; update dropped")
