"""Measurements: `python launch/bench.py loader [--config FILE] [key=value ...]`; each sub-command has its own settings and `--help`."""

import sys

import bench_balance
import bench_checkpoint
import bench_decode
import bench_hepo
import bench_loader
import bench_recommend
import bench_recursion
import bench_step
import bench_table1
import bench_tokenizer

from gpr_dist.config import parse_cli, to_yaml
from gpr_dist.errors import ConfigError, run_cli

COMMANDS = {
    "balance": (bench_balance.BalanceBenchConfig, bench_balance.run_bench, "work of the slowest rank over the mean, by plan and measured"),
    "checkpoint": (bench_checkpoint.CheckpointBenchConfig, bench_checkpoint.run_bench, "how long training stands still for a checkpoint"),
    "decode": (bench_decode.DecodeBenchConfig, bench_decode.run_bench, "requests/s and latency of constrained decoding beside others"),
    "hepo": (bench_hepo.HepoBenchConfig, bench_hepo.run_bench, "rollouts and updates of the policy optimisation per second"),
    "loader": (bench_loader.LoaderBenchConfig, bench_loader.run_bench, "rows/s and MB/s of the streaming loader beside other loaders"),
    "recommend": (bench_recommend.RecommendBenchConfig, bench_recommend.run_bench, "requests/s and latency of a bundle, JSON to answers"),
    "recursion": (bench_recursion.RecursionBenchConfig, bench_recursion.run_bench, "what a token that leaves the recursion early costs"),
    "step": (bench_step.StepBenchConfig, bench_step.run_bench, "training step: rates, MFU, time by part, beside two public models"),
    "tokenizer": (bench_tokenizer.TokenizerBenchConfig, bench_tokenizer.run_bench, "fit and encode speed beside other residual quantizers"),
    "table1": (bench_table1.Table1Config, bench_table1.run_bench, "collision, CUR and PAS of the tokenizer's methods on held-out items"),
}


def main() -> None:
    """Run the sub-command named first."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(__doc__, *(f"  {command:10} {text}" for command, (_, _, text) in COMMANDS.items()), sep="\n")
        return
    if name not in COMMANDS:
        raise ConfigError(f"unknown benchmark {name!r}; there is: {', '.join(COMMANDS)}")
    config_class, run, text = COMMANDS[name]
    config, args = parse_cli(config_class, text, argv=sys.argv[2:])
    if args.dry_run:
        print(to_yaml(config), end="")
        return
    run(config)


if __name__ == "__main__":
    run_cli(main)
