"""What a pretraining config means before any machine is booked: parameters, memory per rank by ZeRO stage, tokens and FLOPs per step.

Reads the same config as launch/pretrain.py and, if they exist, the manifest and row lengths of the shards. Allocates no tensor.
"""

from pathlib import Path

import numpy as np

from gpr_dist.config import Config, load_config, parse_cli, to_yaml
from gpr_dist.data.reader import ShardReader
from gpr_dist.errors import DataError, run_cli
from gpr_dist.job import PretrainConfig, resolve, train_shards
from gpr_dist.model.flops import TRAINING_FACTOR, Work, count_parameters, forward_flops
from gpr_dist.model.memory import activation_bytes, state_bytes

ROOT = Path(__file__).resolve().parents[1]


class PlanConfig(Config):
    """The run to plan and the machine it is planned for."""

    pretrain: Path = ROOT / "configs" / "pretrain.yaml"
    """config of launch/pretrain.py"""
    world_size: int = 8
    """ranks (GPUs) in all"""
    peak_tflops: float = 989.0
    """dense rate of one device in the configured precision, 10^12 operations/s (H100/H200 bf16: 989)"""
    mfu: float = 0.3
    """assumed share of that rate, 0..1"""
    mean_tokens: float = 400.0
    """tokens per journey, used when there are no shards to read"""
    mean_targets: float = 60.0
    """target ads per journey, used when there are no shards to read"""


def main() -> int:
    config, args = parse_cli(PlanConfig, __doc__)
    run = load_config(PretrainConfig, config.pretrain)
    try:
        run, _, _ = resolve(run)
        reader = ShardReader(train_shards(run.data))
        lengths, targets, source = np.asarray(reader.num_tokens), reader.manifest.num_targets / reader.manifest.num_rows, "shards"
    except DataError as error:
        lengths, targets, source = np.array([config.mean_tokens]), config.mean_targets, f"assumed: {error}"
    print(to_yaml(run))
    if args.dry_run:
        return 0
    rows = run.data.loader.global_batch_size
    decoded = rows * targets * run.model.num_levels * (1 + (run.model.num_mtp_heads - 1) / 2)
    work = Work(int(rows * lengths.mean()), int(rows * (lengths.astype(float) ** 2 / 2).mean()), int(decoded),
                int(decoded * (lengths.astype(float) ** 2).mean() / lengths.mean() / 2))

    print(f"{'part':>12} {'parameters':>16}")
    counts = count_parameters(run.model)
    for part, count in [*counts.items(), ("all", sum(counts.values()))]:
        print(f"{part:>12} {count:>16,}")
    print(f"\nmemory per rank of {config.world_size}, {run.engine.precision}, GiB (training state + activations, the latter estimated)")
    activations = activation_bytes(run.model, min(run.data.loader.micro_batch_tokens, work.tokens), work.decoded / max(1, work.tokens),
                                   run.engine.precision)
    for stage in range(4):
        states = state_bytes(sum(counts.values()), stage, config.world_size, run.engine.precision)
        chosen = "  <- configured" if stage == run.engine.zero_stage else ""
        print(f"      ZeRO-{stage}  {states / 2**30:10.3f} + {activations / 2**30:.3f}{chosen}")
    flops = {part: TRAINING_FACTOR * value for part, value in forward_flops(run.model, work).items()}
    total = sum(flops.values())
    print(f"\nper optimizer step (journeys from {source}): {rows:,} journeys, {work.tokens:,} tokens, {int(rows * targets):,} target ads")
    for part, value in flops.items():
        print(f"{part:>14} {value:12.3e} FLOP  {100 * value / total:5.1f} %")
    seconds = total / (config.world_size * config.peak_tflops * 1e12 * config.mfu)
    print(f"{'all':>14} {total:12.3e} FLOP; at {100 * config.mfu:.0f} % of {config.peak_tflops:.0f} TFLOP/s x {config.world_size} ranks: "
          f"{seconds:.4g} s per step, {work.tokens / seconds:.4g} tokens/s")
    if source == "shards":
        steps = -(-reader.manifest.num_rows // rows)
        print(f"one epoch: {reader.manifest.num_rows:,} journeys, {steps:,} steps, {steps * seconds:.4g} s")
    return 0


if __name__ == "__main__":
    run_cli(main)
