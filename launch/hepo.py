"""Policy optimisation (HEPO, GPR Eq. 5 to 10) against a simulator: `deepspeed launch/hepo.py init_from=runs/finetune`.

Data and model are those of the run it starts from, where this config says nothing else; the simulator comes from launch/fit_simulator.py.
policy.algorithm: hepo, or the baselines grpo and dpo. Resumes by itself; stops early when a guard's limit is exceeded.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch

from gpr_dist.config import build_config, parse_cli
from gpr_dist.data.legal import LegalCodes
from gpr_dist.data.loader import iter_once
from gpr_dist.data.sampler import World
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import ConfigError
from gpr_dist.evaluation.validate import has_targets
from gpr_dist.evaluation.value_order import order_by_value
from gpr_dist.job import FinetuneConfig, RunConfig, inherit, split_shards
from gpr_dist.model.gpr import GPRConfig
from gpr_dist.rl.arr import ArrConfig, Rehearsal
from gpr_dist.rl.guards import GuardConfig, Guards, item_groups
from gpr_dist.rl.hepo_loop import HepoFitConfig, build_policy_validation, fit_hepo
from gpr_dist.rl.hepo_step import Parts
from gpr_dist.rl.policy import PolicyConfig
from gpr_dist.rl.rewards import RewardModel, RewardScale
from gpr_dist.rl.rollout import RolloutConfig, Sampler
from gpr_dist.rl.simulator import Simulator
from gpr_dist.schema import EVERY_AD
from gpr_dist.start import (
    Job,
    Start,
    check_resume,
    checkpoint_facts,
    dry_run,
    exit_code,
    open_job,
    open_start,
    open_tracker,
    open_vaft,
    run_job,
)
from gpr_dist.training.init_from import init_from
from gpr_dist.training.loop import Objective
from gpr_dist.training.objective import mtp_objective

ROOT = Path(__file__).resolve().parents[1]


class HepoConfig(FinetuneConfig):
    """Everything a policy optimisation depends on; what it leaves open is taken over from the run it starts from."""

    stage: ClassVar[str] = "hepo"
    run: RunConfig = RunConfig(name="hepo")
    """names and folders"""
    init_from: Path = Path("runs/finetune")
    """start from these weights, which are also what KL and DPO compare with: a run folder, a step folder or a bundle"""
    simulator: Path | None = None
    """what values ads: a folder made by launch/fit_simulator.py; none = <data.folder>/simulator"""
    policy: PolicyConfig = PolicyConfig()
    """the update"""
    rollout: RolloutConfig = RolloutConfig()
    """candidates"""
    arr: ArrConfig = ArrConfig()
    """anticipated requests among the rollouts"""
    guards: GuardConfig = GuardConfig()
    """early stop"""
    train: HepoFitConfig = HepoFitConfig()
    """loop"""


def main() -> int:
    config, args = parse_cli(HepoConfig, __doc__, ROOT / "configs" / "hepo.yaml")
    check_resume(config.run)
    config = for_policy(inherit(config, missing_ok=args.dry_run))
    if args.dry_run:
        return dry_run(config)
    job = open_job(config)
    folder = config.simulator or config.data.folder / "simulator"
    return run_hepo(job, Simulator.load(folder, job.engine.device, job.semantic_ids))


def for_policy(config: HepoConfig) -> HepoConfig:
    """With the critic where it is needed, and without dropout: old and new log-probabilities must come from one network."""
    weights = config.policy.level_weights
    if weights is not None and len(weights) != config.model.num_levels:
        raise ConfigError(f"policy.level_weights={list(weights)} must list {config.model.num_levels} levels")
    model = _without_dropout(config.model.model_dump()) | {"critic": config.policy.algorithm == "hepo"}
    engine = config.engine.model_copy(update={"lr_scales": {"critic.": config.policy.critic_lr} if model["critic"] else {}})
    return config.model_copy(update={"model": build_config(GPRConfig, model, "the model of the policy"), "engine": engine})


def _without_dropout(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: _without_dropout(value) if isinstance(value, dict) else 0.0 if name.endswith("dropout") else value
            for name, value in settings.items()}


def run_hepo(job: Job, reward: RewardModel) -> int:
    """Resume or start, optimise to the end, to a guard or to a stop signal (collective). Returns: the job's exit code."""
    config, engine = job.config, job.engine
    sampler = open_sampler(job, reward)
    weighing = open_vaft(job, config.vaft) if config.policy.stabiliser_weight else None
    start = open_start(job)
    parts = Parts(engine, sampler, config.policy, job.semantic_ids.codebook_size, open_groups(job), open_stabiliser(job), weighing,
                  config.train.target_share, open_reference(job, start), open_rehearsal(job), order=order_by_value)
    stored = start.restored.state if start.restored else {}
    state = stored.get("hepo", {})
    scale = RewardScale.of(state["scale"]) if state else RewardScale()
    guards = Guards.of(config.guards, state.get("guards"))
    with open_tracker(job, start) as tracker:
        if weighing:
            tracker.say(weighing.made_of)
            if stored:
                weighing.load_state_dict(stored["weighing"])
        fit_hepo(parts, job.loader, config.train, job.run, tracker, start.progress, scale, guards, checkpoint_facts(job, start),
                 open_policy_validation(job, sampler))
    if engine.rank == 0:
        print(f"run folder: {job.run}", flush=True)
    engine.close()
    return 0 if guards.stopped else exit_code(config, start.progress)


def open_sampler(job: Job, reward: RewardModel) -> Sampler:
    """Rollouts over the ads of the catalogue. A model trained over all codes is renormalised over the legal ones, in both passes."""
    ids, ads = job.semantic_ids, job.eligibility.items(EVERY_AD)
    trie = Trie.from_codes(ids.codes_NL[ads], ids.codebook_size, ads)
    legal = job.legal or LegalCodes(ids.codes_NL, ids.codebook_size, job.eligibility)
    return Sampler(job.engine, job.engine.device, trie, job.eligibility, legal, job.past, reward, job.config.rollout,
                   job.engine.all_reduce)


def open_stabiliser(job: Job) -> Objective | None:
    """The value-aware loss on the logged ads; none with weight 0."""
    config = job.config
    if not config.policy.stabiliser_weight:
        return None
    return mtp_objective(config.model.num_mtp_heads, config.value_loss_weight, config.head_weights,
                         item_loss_weight=config.item_loss_weight)


def open_reference(job: Job, start: Start) -> list[torch.Tensor] | None:
    """The start weights, where anything compares with them; a resumed run reads them again, from where its first weights came."""
    config = job.config
    if not (config.guards.every_steps or config.policy.kl_weight or config.policy.algorithm == "dpo"):
        return None
    if not start.restored:
        return job.engine.copy_weights()
    init_from(job.engine, Path(start.origin["source"]), config.model, job.fingerprints)
    reference = job.engine.copy_weights()
    open_start(job)
    return reference


def open_rehearsal(job: Job) -> Rehearsal | None:
    """Requests to come of the users of every micro-batch; none with a share of 0."""
    config = job.config
    if not config.arr.share:
        return None
    return Rehearsal(config.arr, config.rollout.requests_per_row, job.loader.reader.manifest.env_features, job.past)


def open_groups(job: Job) -> torch.Tensor:
    """Advertiser of every item."""
    groups = item_groups(job.config.data.folder, job.config.guards.group_column, job.semantic_ids.num_items)
    return torch.from_numpy(groups).to(job.engine.device)


def open_policy_validation(job: Job, sampler: Sampler) -> Callable[[], dict[str, float]] | None:
    """What the policy earns on the validation split; none without one."""
    config, engine = job.config, job.engine
    shards = split_shards(config.data)["validation"]
    if not has_targets(Path(shards)):
        return None
    batches = iter_once(shards, config.data.loader, World(engine.rank, engine.world_size), job.semantic_ids.codes_NL,
                        config.model.num_mtp_heads, config.validation.max_rows, None, config.data.knowledge, None, job.past)
    return build_policy_validation(sampler, batches, engine.all_reduce, order_by_value)


if __name__ == "__main__":
    run_job(main)
