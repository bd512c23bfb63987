"""The loop of the policy optimisation: `fit` of pretraining with rollouts, an old policy that is renewed, guards, and an early stop.

Resume is bit-identical from checkpoints at a renewal of the old policy, which all but those of a stop signal are: the weights are then
pi_old themselves, and nothing else has to be kept. After a stop signal the resumed run renews it at once.
"""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gpr_dist.data.loader import Loader
from gpr_dist.errors import ConfigError, TrainingError
from gpr_dist.objectives.hepo import group_log_softmax
from gpr_dist.rl.guards import Guards
from gpr_dist.rl.hepo_step import Order, Parts, StepOutcome, hepo_step
from gpr_dist.rl.rewards import RewardScale
from gpr_dist.rl.rollout import Sampler
from gpr_dist.schema import Batch
from gpr_dist.training import checkpoint
from gpr_dist.training.alerts import Alerts
from gpr_dist.training.loop import FitConfig, Progress, give_alerts, report_nonfinite, run_validation, save_checkpoint, stop_requested
from gpr_dist.training.profile import profiled
from gpr_dist.training.saver import Saver
from gpr_dist.training.schedule import learning_rate
from gpr_dist.training.step_metrics import rank_metrics
from gpr_dist.training.tracker import Tracker


class HepoFitConfig(FitConfig):
    """The loop; `target_share` is of the stabiliser's targets."""

    best_metric: str = "validation/reward"
    """what the best checkpoint is best in: validation/reward (expected under the policy), best_reward, ndcg, opr; more is better"""
    validate_every_steps: int = Field(50, ge=0)
    """steps between validations; 0 = only at the end"""


def fit_hepo(parts: Parts, loader: Loader, config: HepoFitConfig, run: Path, tracker: Tracker, progress: Progress, scale: RewardScale,
             guards: Guards, save_state: dict[str, Any], validate: Callable[[], dict[str, float]] | None = None) -> Progress:
    """Optimise until `config.schedule.num_steps`, a guard, or a stop signal; saves and returns (collective).

    Args:
        progress, scale, guards: where to start; from a checkpoint's "progress" and "hepo" after a resume.
        save_state: plain values stored in every checkpoint.
    Raises: ConfigError for checkpoints between renewals of the old policy; TrainingError as in `training.loop.fit`.
    """
    engine, refresh = parts.engine, parts.config.refresh_every_steps
    if config.checkpoint.every_steps % refresh:
        near = max(1, round(config.checkpoint.every_steps / refresh)) * refresh
        raise ConfigError(f"train.checkpoint.every_steps={config.checkpoint.every_steps} is no multiple of policy.refresh_every_steps="
                          f"{refresh}: a resumed run would not have the old policy; nearest: {near}")

    def save(last: bool) -> None:
        state = save_state | {"hepo": {"scale": scale.state(), "guards": guards.state()}}
        state |= {"weighing": parts.weighing.state_dict()} if parts.weighing else {}
        save_checkpoint(saver, loader, tracker, progress, state, last)

    if guards.stopped:
        tracker.say(f"stopped at step {progress.step} by {guards.stopped}; raise that limit to go on")
        return progress
    saver = Saver(engine, run, config.checkpoint)
    num_steps, skipped_in_a_row, old, alerts = config.schedule.num_steps, 0, None, Alerts(config.alerts, progress.losses)
    if validate and not progress.step and config.validate_every_steps:
        _log_start(parts, validate, tracker)
    engine.train()
    with stop_requested() as stop, profiled(config.profile, run, engine.rank, progress.step) as step_profiled:
        steps = iter(loader) if progress.step < num_steps else iter(())
        for step in range(progress.step, num_steps):
            started = time.perf_counter()
            data = next(steps)
            waited = time.perf_counter() - started
            fresh = step % refresh == 0 or old is None
            if fresh and refresh > 1:
                old = engine.copy_weights()
            outcome = hepo_step(parts, data, step, None if fresh else old, scale, guards, learning_rate(config.schedule, step), stop(),
                                waited)
            saver.poll()
            step_profiled()
            elapsed = time.perf_counter() - started
            _count(progress, outcome, elapsed)
            if outcome.applied:
                give_alerts(alerts, tracker, progress.step, outcome.metrics["loss"], outcome.candidates / elapsed, outcome.facts_WF,
                            elapsed)
            if not outcome.applied:
                skipped_in_a_row += 1
                report_nonfinite(engine, data, outcome.bad_ranks, run, step, tracker)
                if config.on_nonfinite == "stop" or skipped_in_a_row >= config.max_skipped_steps:
                    saver.wait()
                    raise TrainingError(f"loss or gradient is not finite at step {step + 1} on rank(s) {outcome.bad_ranks}; the update was "
                                        f"dropped, weights are unharmed; rows in {run}/nonfinite-*.json")
            else:
                skipped_in_a_row = 0
            finished = progress.step == num_steps
            if progress.step % config.log_every_steps == 0 or finished or guards.stopped:
                tracker.log(progress.step, outcome.metrics | {"skipped_steps": progress.skipped, **rank_metrics(outcome.facts_WF)})
            m = outcome.metrics
            tracker.advance(progress.step, reward=f"{m['reward']:.4g}", loss=f"{m['loss']:.3f}", cand_s=f"{m['candidates_per_s']:.0f}")
            leaving = finished or bool(guards.stopped)
            due = config.validate_every_steps and progress.step % config.validate_every_steps == 0
            if validate and (leaving or (due and not outcome.stop)):  # a stop signal is answered in bounded time
                run_validation(engine, validate, config.best_metric, progress, tracker)
            if leaving or outcome.stop or progress.step % config.checkpoint.every_steps == 0:
                save(last=leaving or outcome.stop)
            if guards.stopped:
                tracker.say(f"early stop: {guards.stopped}; saved {checkpoint.step_folder(run, progress.step)}")
                break
            if outcome.stop:
                tracker.say(f"stop signal: saved {checkpoint.step_folder(run, progress.step)} and leaving")
                break
    return progress


def _log_start(parts: Parts, validate: Callable[[], dict[str, float]], tracker: Tracker) -> None:
    """What the start weights earn, for comparison: step 0 of metrics.jsonl."""
    parts.engine.train(False)
    metrics = validate()
    tracker.log(0, metrics)
    tracker.say("start: " + "  ".join(f"{name.removeprefix('validation/')} {value:.4f}" for name, value in metrics.items()))


def _count(progress: Progress, outcome: StepOutcome, seconds: float) -> None:
    progress.step += 1
    progress.rows += outcome.rows
    progress.tokens += outcome.tokens
    progress.targets += outcome.candidates
    progress.seconds += seconds
    progress.skipped += not outcome.applied


def build_policy_validation(sampler: Sampler, batches: Iterable[Batch], all_reduce: Callable[..., Tensor],
                            order: Order | None = None) -> Callable[[], dict[str, float]]:
    """The function `fit_hepo` calls: what the policy earns on held-out journeys, by the reward model (collective).

    Args: batches: of `iter_once`, equally many on every rank. sampler: its draws are the same at every validation.
    """

    @torch.no_grad()
    def validate() -> dict[str, float]:
        sums = torch.zeros(9, dtype=torch.float64)
        for batch in batches:
            rollout = sampler(batch, step=0)
            num_requests, group_N, value_N = len(rollout.batch.request_row_R), rollout.group_N, rollout.value_N
            log_p_N = rollout.steps_NL.sum(1)
            expected = (group_log_softmax(log_p_N, group_N, num_requests).exp() * value_N).sum()
            best_R = value_N.new_zeros(num_requests).scatter_reduce(0, group_N, value_N, "amax", include_self=False)
            found = [rollout.num_requests, len(group_N), float(expected), float(value_N.sum()), float(best_R.sum()), 0, 0, 0, 0]
            if order is not None:
                ordered = order(log_p_N.cpu().numpy(), value_N.cpu().numpy(), group_N.cpu().numpy())
                found[5:] = [ordered.ndcg_Q.sum(), len(ordered.ndcg_Q), ordered.agreeing_Q.sum(), ordered.pairs_Q.sum()]
            sums += torch.tensor(found, dtype=torch.float64)
        requests, candidates, expected, value, best, ndcg, requests_ordered, agreeing, pairs = all_reduce(sums).tolist()
        metrics = {"reward": expected / max(requests, 1), "mean_reward": value / max(candidates, 1), "best_reward": best / max(requests, 1)}
        if order is not None:
            metrics |= {"ndcg": ndcg / max(requests_ordered, 1), "opr": agreeing / max(pairs, 1)}
        return {f"validation/{name}": value for name, value in metrics.items()}

    return validate
