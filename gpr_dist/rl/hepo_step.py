"""One step of the policy optimisation: roll out with the old policy, value, compare, update (GPR §4.3, Eq. 5 to 10).

    pi_old  rollouts of every micro-batch, log-probabilities of their candidates  (with the weights of the last refresh)
    pi_ref  log-probabilities with the start weights, where DPO, a KL term or a guard asks for them
    pi      per micro-batch: forward over the candidates → policy and critic loss → backward; stabiliser on the logged ads → backward

Every number that decides something is summed over all ranks before the first backward, so that a step does not depend on how it is
split. Formulas are in objectives/; the loop around a step is hepo_loop.py.
"""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpr_dist.data.loader import Step
from gpr_dist.objectives.hepo import group_mean_std, is_constant
from gpr_dist.rl.guards import Guards, exposure_by_group, exposure_sums
from gpr_dist.rl.policy import PolicyConfig, Rolled, policy_share
from gpr_dist.rl.rewards import RewardModel, RewardScale
from gpr_dist.rl.rollout import Rollout, Sampler
from gpr_dist.schema import Batch
from gpr_dist.training.engine import Engine
from gpr_dist.training.loop import Objective, Weighing, sample_targets
from gpr_dist.training.step_metrics import RANK_FACTS, own_clock, rank_facts

# N candidates, by request  R requests  L levels


Order = Callable[[np.ndarray, np.ndarray, np.ndarray], Any]


@dataclass(frozen=True)
class Parts:
    """What the steps of a run have in common."""

    engine: Engine
    sampler: Sampler
    config: PolicyConfig
    codebook_size: int
    group_of_item_M: Tensor  # int64, advertiser of each catalogue item, on the device
    stabiliser: Objective | None = None  # its loss on the logged ads
    weighing: Weighing | None = None  # of the logged ads
    target_share: float = 1.0  # of the logged requests in the stabiliser
    reference: list[Tensor] | None = None  # `Engine.copy_weights` of the start weights
    rehearse: Callable[[Batch, int], Batch] | None = None  # (micro-batch, step) → requests to come of its users, rolled out beside it
    truth: RewardModel | None = None  # watched by a guard, never learned from
    clock: Callable[[], float] = time.perf_counter  # of the metrics; launch/bench.py may count processor time
    order: Order | None = None  # (score, value, request) → ndcg_Q, agreeing_Q, pairs_Q: `evaluation.value_order.order_by_value`


@dataclass(frozen=True)
class StepOutcome:
    """What the loop needs to know, the same on every rank."""

    metrics: dict[str, float]
    applied: bool
    stop: bool
    facts_WF: Tensor  # of `rank_facts`
    rows: int
    tokens: int
    candidates: int

    @property
    def bad_ranks(self) -> list[int]:
        """Ranks whose loss or gradient was not finite."""
        return self.facts_WF[:, 0].nonzero().flatten().tolist()


def hepo_step(parts: Parts, data: Step, step: int, old: list[Tensor] | None, scale: RewardScale, guards: Guards, lr: float,
              stop: bool, waited: float = 0.0) -> StepOutcome:
    """Args: old: weights of pi_old; None = they are the current ones. scale, guards: take the step in. waited: s, for data. Collective."""
    engine, config, started = parts.engine, parts.config, parts.clock()
    guarded = guards.is_due(step)
    rolled = _roll_out(parts, data, step, old, guarded or config.kl_weight > 0 or config.algorithm == "dpo")
    rolled_s = parts.clock() - started
    logged, num_targets, weighing_metrics = _logged_ads(parts, data)
    facts = _reduced(engine, _facts(rolled, data) | {"targets": torch.tensor(float(num_targets), dtype=torch.float64)})
    groups, candidates = max(1.0, facts["groups"]), max(1.0, facts["candidates"])
    if facts["groups"]:
        scale.update(facts["counted_value"] / candidates, facts["variance"] / groups)

    sums: dict[str, Tensor] = {}
    working = own_clock(engine)
    exposure_G = torch.zeros_like(parts.group_of_item_M[:0], dtype=torch.float64)
    for one in rolled:
        output = engine(one.rollout.batch, task="policy")
        loss, more = policy_share(output, one, scale, config, parts.codebook_size, groups, candidates)
        engine.backward(loss)
        log_p_N = -output.nll_NL.detach().sum(1)
        if guarded:
            truth_N = _truth(parts, one.rollout)
            more |= {f"guard/{name}": value for name, value in exposure_sums(
                log_p_N, one.reference_N, one.rollout.batch, one.counts_R, one.rollout.value_N, truth_N).items()}
            here_G = exposure_by_group(log_p_N, one.rollout.batch, one.counts_R, parts.group_of_item_M)
            exposure_G = here_G + exposure_G if len(exposure_G) else here_G
        more |= _order_sums(parts, log_p_N, one)
        _add(sums, more)
    stabiliser = torch.zeros((), dtype=torch.float64, device=engine.device)
    for batch in logged:
        share = parts.stabiliser(engine, batch.to(engine.device), max(1.0, facts["targets"] * parts.target_share))
        engine.backward(config.stabiliser_weight * share.loss)
        stabiliser += share.loss.detach().double()
    _add(sums, {"stabiliser_loss": stabiliser})

    names = list(sums)
    values = torch.stack([sums[name].cpu() for name in names])
    bad = not (engine.gradients_are_finite() and bool(values.isfinite().all()))
    mine = rank_facts(engine, bad, own_clock(engine) - working, waited)
    reduced = engine.all_reduce(torch.cat([values, mine, torch.tensor([float(stop)], dtype=torch.float64), exposure_G.cpu()])).cpu()
    found = dict(zip(names, reduced[:len(names)].tolist(), strict=True))
    everyones, stop_sum, exposure_G = reduced[len(names):].split([len(mine), 1, len(exposure_G)])
    facts_WF = everyones.view(-1, len(RANK_FACTS))
    grad_norm, applied = engine.step(lr, apply=not facts_WF[:, 0].any())
    seconds = parts.clock() - started
    metrics = _metrics(found, facts, config, candidates, groups) | weighing_metrics | {
        "grad_norm": grad_norm, "lr": lr, "rollout_s": rolled_s, "update_s": seconds - rolled_s, "seconds": seconds,
        "candidates_per_s": facts["sampled"] / seconds}
    if guarded and found["guard/requests"]:
        checked = {name.removeprefix("guard/"): value / found["guard/requests"] for name, value in found.items()
                   if name.startswith("guard/") and name != "guard/requests"}
        checked["group_share"] = float(exposure_G.max() / exposure_G.sum().clamp_min(1e-12))
        metrics |= {f"guard/{name}": value for name, value in guards.check(checked).items()}
    return StepOutcome(metrics, applied, bool(stop_sum), facts_WF, int(facts["rows"]), int(facts["tokens"]),
                       int(facts["sampled"]))


def _roll_out(parts: Parts, data: Step, step: int, old: list[Tensor] | None, with_reference: bool) -> list[Rolled]:
    """Every micro-batch and, where there is a rehearsal, the requests to come of its users."""
    engine = parts.engine
    requests = [(batch, False) for batch in data.micro_batches]
    if parts.rehearse is not None:
        requests += [(parts.rehearse(batch, step), True) for batch in data.micro_batches]
    rolled = []
    with torch.no_grad(), engine.weights(old) if old is not None else contextlib.nullcontext():
        for batch, every_request in requests:
            rollout = parts.sampler(batch, step, every_request)
            constant_R = is_constant(rollout.value_N, rollout.group_N, len(rollout.batch.request_row_R))
            rolled.append(Rolled(rollout, ~constant_R))
            if old is not None:
                rolled[-1].old_log_p_NL = -engine(rollout.batch, task="policy").nll_NL
    if with_reference:
        with torch.no_grad(), engine.weights(parts.reference):
            for one in rolled:
                one.reference_N = -engine(one.rollout.batch, task="policy").nll_NL.sum(1)
    return rolled


def _logged_ads(parts: Parts, data: Step) -> tuple[list[Batch], int, dict[str, float]]:
    """The micro-batches of the stabiliser, weighed and sampled; their targets before sampling; metrics. None without a stabiliser."""
    if parts.stabiliser is None or not parts.config.stabiliser_weight:
        return [], 0, {}
    batches, metrics = parts.weighing(parts.engine, data.micro_batches) if parts.weighing else (data.micro_batches, {})
    seed = data.epoch * 1_000_003 + data.step_in_epoch
    return [sample_targets(batch, parts.target_share, seed) for batch in batches], sum(batch.num_targets for batch in batches), metrics


def _facts(rolled: list[Rolled], data: Step) -> dict[str, Tensor]:
    """Sums over this rank's micro-batches of what is known before the update."""
    sums: dict[str, Tensor] = {}
    for one in rolled:
        rollout, counts_R, group_N = one.rollout, one.counts_R, one.rollout.group_N
        _, std_R = group_mean_std(rollout.value_N, group_N, len(counts_R))
        best_R = rollout.value_N.new_zeros(len(counts_R)).scatter_reduce(0, group_N, rollout.value_N, "amax", include_self=False)
        _add(sums, {"requests": rollout.num_requests, "skipped": rollout.num_skipped, "groups": counts_R.sum(),
                    "constant": rollout.num_requests - counts_R.sum(), "candidates": one.counts_N.sum(), "sampled": len(group_N),
                    "value": rollout.value_N.sum(), "counted_value": (rollout.value_N * one.counts_N).sum(), "best_value": best_R.sum(),
                    "variance": (std_R.square() * counts_R).sum(), "ecpm": rollout.ecpm_N.sum()})
    _add(sums, {"rows": sum(batch.num_rows for batch in data.micro_batches),
                "tokens": sum(batch.num_tokens for batch in data.micro_batches)})
    return sums


def _truth(parts: Parts, rollout: Rollout) -> Tensor | None:
    if parts.truth is None:
        return None
    return parts.truth.rewards(rollout.batch, rollout.group_N, rollout.batch.target_item_N).final_value_N


def _order_sums(parts: Parts, log_p_N: Tensor, one: Rolled) -> dict[str, Tensor]:
    """How well the policy's order of the candidates agrees with their rewards."""
    if parts.order is None:
        return {}
    order = parts.order(log_p_N.cpu().numpy(), one.rollout.value_N.cpu().numpy(), one.rollout.group_N.cpu().numpy())
    device = log_p_N.device
    return {name: torch.tensor(float(value), dtype=torch.float64, device=device) for name, value in
            {"ndcg": order.ndcg_Q.sum(), "ordered": len(order.ndcg_Q), "agreeing": order.agreeing_Q.sum(),
             "pairs": order.pairs_Q.sum()}.items()}


def _add(sums: dict[str, Tensor], more: dict[str, Any]) -> None:
    for name, value in more.items():
        value = torch.as_tensor(value).double()
        sums[name] = sums[name] + value if name in sums else value


def _reduced(engine: Engine, sums: dict[str, Tensor]) -> dict[str, float]:
    """Over all ranks; names come in the same order on each (collective)."""
    values = torch.stack([value.cpu() for value in sums.values()])
    return dict(zip(sums, engine.all_reduce(values).tolist(), strict=True))


def _metrics(found: dict[str, float], facts: dict[str, float], config: PolicyConfig, candidates: float,
             groups: float) -> dict[str, float]:
    """The line of metrics.jsonl; rewards are as the reward model gives them."""
    sampled, requests = max(1.0, facts["sampled"]), max(1.0, facts["requests"])
    metrics = {"loss": found["loss"] + config.stabiliser_weight * found["stabiliser_loss"], "policy_loss": found["policy_loss"],
               "stabiliser_loss": found["stabiliser_loss"], "reward": facts["value"] / sampled,
               "best_reward": facts["best_value"] / requests,
               "ecpm": facts["ecpm"] / sampled, "requests": facts["requests"], "skipped_requests": facts["skipped"],
               "constant_requests": facts["constant"], "candidates": facts["sampled"], "rows": facts["rows"], "tokens": facts["tokens"]}
    if "clipped" in found:
        metrics |= {"ratio_deviation": found["ratio_deviation"] / candidates, "clipped_frac": found["clipped"] / candidates}
    if "critic_loss" in found:
        explained = 1 - found["critic_loss"] * candidates / max(found["return_square"], 1e-12)
        metrics |= {"critic_loss": found["critic_loss"], "critic_explained": explained,
                    "process_reward": found["process_reward"] / candidates}
    if "kl" in found:
        metrics["kl"] = found["kl"] / groups
    if found.get("pairs"):
        metrics |= {"ndcg": found["ndcg"] / found["ordered"], "opr": found["agreeing"] / found["pairs"]}
    return metrics
