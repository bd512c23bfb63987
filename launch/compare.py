"""Train and evaluate variants of a run over seeds and print their table: mean ± standard deviation, beside the training time.

    python launch/compare.py --config configs/compare/ablation.yaml                        # the ablation of RESULTS.md
    python launch/compare.py --config configs/compare/tokenizers.yaml seeds=[0]            # one seed only
    python launch/compare.py --config configs/public/beauty/compare.yaml 'source=[source.sequences=DIR/Beauty.txt]'   # from raw files on

Each run is a pretraining of its own, started with torchrun, and an evaluation; finished ones are not repeated, an interrupted one goes on.
Where the data set is missing it is built first.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field
from tqdm import tqdm

from gpr_dist.config import Config, load_config, parse_cli, to_yaml
from gpr_dist.errors import GPRError, run_cli
from gpr_dist.job import PretrainConfig
from gpr_dist.job import tokenizer_folder as job_tokenizer_folder

ROOT = Path(__file__).resolve().parents[1]
# glibc would hand every large temporary back to the system and fault it in again; on CPU that costs more than the arithmetic.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "34359738368", "MALLOC_TRIM_THRESHOLD_": "34359738368", "MALLOC_TOP_PAD_": "268435456"}


class Variant(Config):
    """What is different."""

    train: tuple[str, ...] = ()
    """overrides of launch/pretrain.py"""
    tokenizer: tuple[str, ...] = ()
    """overrides of launch/fit_tokenizer.py; none = the base's tokenizer, some = one is fitted for this variant first"""


class CompareConfig(Config):
    """Which runs are compared."""

    name: str
    """runs are called <name>-<variant>-<seed>"""
    base: Path = ROOT / "configs/pretrain.yaml"
    """pretraining config of all variants"""
    build_data: Path | None = None
    """config of launch/build_data.py, run first when there is no data set; none = launch/pretrain.py decides"""
    source: tuple[str, ...] = ()
    """overrides of that config: where the raw files are"""
    fit_tokenizer: Path = ROOT / "configs/tokenizer/complete_journey.yaml"
    """tokenizer config of the variants that fit one, and with build_data of the data set's own tokenizer"""
    common: tuple[str, ...] = ()
    """overrides of launch/pretrain.py for all variants"""
    variants: dict[str, Variant] = Field(min_length=1)
    """by name; the first one is what the others are compared with"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of initialisation and order of rows"""
    ranks: int = Field(2, ge=1)
    """processes of a run"""
    split: Literal["validation", "test"] = "test"
    """what is evaluated"""
    evaluate: tuple[str, ...] = ("baselines=false",)
    """overrides of launch/evaluate.py"""
    checkpoints: tuple[Literal["last", "best"], ...] = ("last",)
    """of each run: the newest, and the one that validated best (train.best_metric)"""
    rankers: tuple[str, ...] = ()
    """rows of each variant and checkpoint, as launch/evaluate.py calls them; none = the model's first one"""
    metrics: tuple[str, ...] = ("hitr@10", "hitr@100", "ndcg@10")
    """columns of the table"""


def main() -> None:
    config, args = parse_cli(CompareConfig, __doc__, ROOT / "configs/compare/ablation.yaml")
    runs = [(name, seed) for seed in config.seeds for name in config.variants]  # seed by seed: an early table has every variant
    for name, seed in runs:
        load_config(PretrainConfig, config.base, overrides(config, name, seed))  # a misspelt setting shows before the first run
    if args.dry_run:
        print(to_yaml(config), *(" ".join(command) for name, seed in runs for command in commands(config, name, seed)), sep="\n")
        return
    for command in preparation(config):
        run(command)
    for name, seed in tqdm(runs, desc="runs", file=sys.stderr):
        if not all(report_file(config, name, seed, which).exists() for which in config.checkpoints):
            for command in commands(config, name, seed):
                run(command)
    results = {row: [measured(config, row, name, seed, which) for seed in config.seeds] for name in config.variants
               for which in config.checkpoints for row in rows(config, name, which)}
    (run_folder(config, "", "").parent / f"{config.name}.json").write_text(json.dumps(results, indent=1))
    print(table(config, results))


def preparation(config: CompareConfig) -> list[list[str]]:
    """What makes the data set and its tokenizer, as far as they are missing."""
    data, found = load_config(PretrainConfig, config.base, list(config.common)).data, []
    if config.build_data is None:
        return found
    if not (data.folder / "shards" / "test" / "manifest.json").exists():
        found.append([sys.executable, "launch/build_data.py", "--config", str(config.build_data), *config.source, f"out={data.folder}"])
    if not (job_tokenizer_folder(data) / "tokenizer.json").exists():
        found.append([sys.executable, "launch/fit_tokenizer.py", "--config", str(config.fit_tokenizer), f"data={data.folder}",
                      f"out={job_tokenizer_folder(data)}"])
    return found


def overrides(config: CompareConfig, name: str, seed: int) -> list[str]:
    """Of launch/pretrain.py for one run."""
    variant = config.variants[name]
    tokenizer = [f"data.tokenizer={tokenizer_folder(config, name)}"] if variant.tokenizer else []
    seeds = [f"run.seed={seed}", f"data.loader.seed={seed}"]
    return [*config.common, *variant.train, *tokenizer, f"run.name={config.name}-{name}-{seed}", *seeds]


def commands(config: CompareConfig, name: str, seed: int) -> list[list[str]]:
    """What is run for one variant and seed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.ranks}"]
    found = [[*launcher, "launch/pretrain.py", "--config", str(config.base), *overrides(config, name, seed)]]
    found += [[sys.executable, "launch/evaluate.py", f"checkpoint={run_folder(config, name, seed)}", f"split={config.split}",
               f"best={str(which == 'best').lower()}", *config.evaluate, f"out={report_file(config, name, seed, which)}"]
              for which in config.checkpoints]
    fit, folder = config.variants[name].tokenizer, tokenizer_folder(config, name)
    if fit and not (folder / "tokenizer.json").exists():
        found.insert(0, [sys.executable, "launch/fit_tokenizer.py", "--config", str(config.fit_tokenizer), *fit, f"out={folder}"])
    return found


def run_folder(config: CompareConfig, name: str, seed: int | str) -> Path:
    return load_config(PretrainConfig, config.base, list(config.common)).run.folder / f"{config.name}-{name}-{seed}"


def tokenizer_folder(config: CompareConfig, name: str) -> Path:
    return load_config(PretrainConfig, config.base, list(config.common)).data.folder / f"tokenizer-{config.name}-{name}"


def report_file(config: CompareConfig, name: str, seed: int, which: str = "last") -> Path:
    return run_folder(config, name, seed) / f"evaluation-{config.split}{'' if which == 'last' else '-' + which}.json"


def rows(config: CompareConfig, name: str, which: str) -> dict[str, str | None]:
    """Rows of the table and the ranker of each; None = the model's first one."""
    label = name if len(config.checkpoints) == 1 else f"{name}, {which}"
    return {f"{label}: {ranker}": ranker for ranker in config.rankers} if config.rankers else {label: None}


def run(command: list[str]) -> None:
    """Raises: GPRError with the command that failed; its own message stands above."""
    environment = {**MALLOC, "PYTHONWARNINGS": "ignore", "WANDB_MODE": "disabled", **os.environ}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise GPRError(f"exit code {done.returncode} from: {' '.join(command)}")


def measured(config: CompareConfig, row: str, name: str, seed: int, which: str) -> dict[str, float]:
    """The metrics of a row of the table, and the seconds the run's optimizer steps took. Raises: GPRError for an unknown ranker."""
    path = report_file(config, name, seed, which)
    results, ranker = json.loads(path.read_text())["results"], rows(config, name, which)[row]
    if ranker is not None and ranker not in results:
        raise GPRError(f"{path} has no ranker {ranker!r}; it has {', '.join(results)}")
    steps = [json.loads(line) for line in (run_folder(config, name, seed) / "metrics.jsonl").read_text().splitlines()]
    seconds = sum(step["seconds"] for step in steps if "tokens_per_s" in step)
    return {**(next(iter(results.values())) if ranker is None else results[ranker]), "training_s": seconds}


def table(config: CompareConfig, results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row per variant, or several, mean ± sd over seeds."""
    lines = [f"| {config.name} | " + " | ".join(config.metrics) + " | training s |", "|---" * (len(config.metrics) + 2) + "|"]
    for name, runs in results.items():
        cells = [spread([run[metric] for run in runs]) for metric in config.metrics]
        lines.append(f"| {name} | {' | '.join(cells)} | {statistics.mean(run['training_s'] for run in runs):.0f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean ± sample standard deviation; the mean alone of one value."""
    mean = f"{statistics.mean(values):.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    run_cli(main)
