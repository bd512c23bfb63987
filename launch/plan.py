"""What a pretraining config means before any machine is booked: parameters, memory per rank by ZeRO stage, tokens and FLOPs per step.

    python launch/plan.py --config configs/pretrain.yaml machine.world_size=64 model.width=512

Reads the config of launch/pretrain.py, with a section `machine` more, and, if they exist, the manifest and row lengths of the shards.
Allocates no tensor.
"""

from pathlib import Path

import numpy as np
from pydantic import Field

from gpr_dist.config import Config, parse_cli, to_yaml
from gpr_dist.data.reader import ShardReader
from gpr_dist.errors import DataError, TokenizerError, run_cli
from gpr_dist.job import PretrainConfig, resolve, train_shards
from gpr_dist.model.flops import TRAINING_FACTOR, Work, count_parameters, forward_flops
from gpr_dist.model.gpr import GPRConfig
from gpr_dist.model.memory import activation_bytes, checkpoint_bytes, state_bytes

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "pretrain.yaml"
ADS_PER_REQUEST = 2  # assumed: the first head learns every ad of a request, each later head one


class MachineConfig(Config):
    """The machine a run is planned for, and what is assumed of journeys that do not exist yet."""

    world_size: int = Field(default=8, ge=1)
    """ranks (GPUs) in all"""
    peak_tflops: float = Field(default=989.0, gt=0)
    """dense rate of one device in the configured precision, 10^12 operations/s (H100/H200 bf16: 989)"""
    mfu: float = Field(default=0.3, gt=0, le=1)
    """assumed share of that rate, 0..1"""
    mean_tokens: float = Field(default=400.0, gt=0)
    """tokens per journey, used when there are no shards to read"""
    mean_targets: float = Field(default=60.0, ge=0)
    """target ads per journey, used when there are no shards to read"""


class PlanConfig(PretrainConfig):
    """The run to plan and the machine it is planned for."""

    machine: MachineConfig = MachineConfig()
    """what it will run on"""


def main() -> None:
    config, args = parse_cli(PlanConfig, __doc__, DEFAULT_CONFIG)
    config, tokens_per_row, targets_per_row, source = look_at_data(config)
    print(to_yaml(config))
    if args.dry_run:
        return
    rows = config.data.loader.global_batch_size
    work = step_work(config.model, rows, tokens_per_row, targets_per_row, config.data.history_events)
    print_memory(config, work)
    print(f"\nper optimizer step (journeys: {source}): {rows:,} journeys, {work.tokens:,} tokens, "
          f"{int(rows * targets_per_row):,} target ads")
    seconds = print_flops(config, work)
    if source == "shards":
        steps = -(-len(tokens_per_row) // rows)
        print(f"one epoch: {len(tokens_per_row):,} journeys, {steps:,} steps, {steps * seconds:.4g} s")


def look_at_data(config: PlanConfig) -> tuple[PlanConfig, np.ndarray, float, str]:
    """Config completed by the data, tokens of every journey, mean targets of one, and where these are from ("shards" or why assumed)."""
    try:
        config, _, _ = resolve(config)
        reader = ShardReader(train_shards(config.data), cache_dir=config.data.loader.cache_dir, storage=config.data.loader.storage)
    except (DataError, TokenizerError) as error:
        return config, np.array([config.machine.mean_tokens]), config.machine.mean_targets, f"assumed, because {error}"
    if not reader.manifest.num_rows:
        raise DataError(f"{reader.folder} has no journeys; check the time cut-offs of the build")
    return config, np.asarray(reader.num_tokens), reader.manifest.num_targets / reader.manifest.num_rows, "shards"


def step_work(model: GPRConfig, rows: int, tokens_per_row: np.ndarray, targets_per_row: float, history_events: int = 0) -> Work:
    """Expected work of one optimizer step over `rows` journeys.

    A decoder position reads half of its journey on average, longer journeys having more of them. Head 0 has a target for every ad, every
    other head one per request; the item head scores every candidate at
    every request. A pointer reads at most `history_events` more of each row, counted in full.
    """
    tokens = tokens_per_row.astype(float)
    mean, mean_square = tokens.mean(), (tokens**2).mean()
    requests = rows * targets_per_row / ADS_PER_REQUEST
    openings, targets = requests * model.num_mtp_heads, rows * targets_per_row + requests * (model.num_mtp_heads - 1)
    intents = min(mean_square / mean / 2, model.ptd.intent_window or np.inf)
    older, scored = (rows * history_events, requests * (mean + history_events)) if model.pointer.width else (0, 0)
    return Work(int(rows * mean), int(rows * mean_square / 2), int(openings), int(openings * intents), int(targets), int(targets * intents),
                older, int(scored), int(requests) * model.items.num_candidates)


def print_memory(config: PlanConfig, work: Work) -> None:
    """Parameters by part and bytes per rank by ZeRO stage."""
    counts, engine, ranks = count_parameters(config.model), config.engine, config.machine.world_size
    total = sum(counts.values())
    print(f"{'part':>12} {'parameters':>16}")
    for part, count in [*counts.items(), ("all", total)]:
        print(f"{part:>12} {count:>16,}")
    micro_batch = min(config.data.loader.micro_batch_tokens, max(1, work.tokens))
    activations = activation_bytes(config.model, work, micro_batch / max(1, work.tokens), engine.precision)
    print(f"\nmemory per rank of {ranks}, {engine.precision}, GiB (training state + activations, the latter estimated)")
    for stage in range(4):
        states = state_bytes(total, stage, ranks, engine.precision)
        chosen = "  <- configured" if stage == engine.zero_stage else ""
        print(f"      ZeRO-{stage}  {states / 2**30:10.3f} + {activations / 2**30:.3f}{chosen}")
    written = checkpoint_bytes(total, ranks)
    print(f"a checkpoint: {written * ranks / 1e9:.4g} GB, {written / 1e9:.4g} GB by each rank"
          f"{', which keeps as much host memory for the copy' if config.train.checkpoint.background else ''}")


def print_flops(config: PlanConfig, work: Work) -> float:
    """Operations of a step by part. Returns: its expected seconds."""
    machine = config.machine
    flops = {part: TRAINING_FACTOR * value for part, value in forward_flops(config.model, work).items()}
    total = sum(flops.values())
    for part, value in flops.items():
        print(f"{part:>14} {value:12.3e} FLOP  {100 * value / total:5.1f} %")
    seconds = total / (machine.world_size * machine.peak_tflops * 1e12 * machine.mfu)
    print(f"{'all':>14} {total:12.3e} FLOP; at {100 * machine.mfu:.0f} % of {machine.peak_tflops:.0f} TFLOP/s "
          f"x {machine.world_size} ranks: {seconds:.4g} s per step, {work.tokens / seconds:.4g} tokens/s")
    return seconds


if __name__ == "__main__":
    run_cli(main)
