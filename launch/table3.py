"""GPR's Table 3: train every stage over seeds, value each policy on the same held-out requests, print mean ± standard deviation.

    python launch/table3.py                                             # the synthetic market: MTP, VAFT, DPO, HEPO, HEPO with ARR, cascade
    python launch/table3.py seeds=[0] 'only=[mtp, vaft, hepo]'          # one seed of three of them
    python launch/table3.py name=journey data=data/complete_journey market=null variants.mtp.config=configs/pretrain.yaml   # without truth

A variant starts from the run of another one. Finished runs are not repeated, an interrupted one goes on; --table only prints what is
there already.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from tqdm import tqdm

from gpr_dist.config import Config, load_config, parse_cli, to_yaml
from gpr_dist.errors import ConfigError, GPRError, run_cli
from gpr_dist.evaluation.names import check_names
from gpr_dist.job import PretrainConfig
from gpr_dist.schema import write_atomic

ROOT = Path(__file__).resolve().parents[1]
# glibc would hand every large temporary back to the system and fault it in again; on CPU that costs more than the arithmetic.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "34359738368", "MALLOC_TRIM_THRESHOLD_": "34359738368", "MALLOC_TOP_PAD_": "268435456"}
REPORT = "policy-test.json"
BESIDE = ("cascade", "production")
LABELS = {"hitr@10": "HitR@10", "ndcg": "nDCG", "opr": "OPR", "average": "avg final_value", "maximum": "max final_value",
          "first": "first's final_value", "true_ndcg": "true nDCG", "true_opr": "true OPR", "true_average": "true avg",
          "true_maximum": "true max", "true_first": "true first", "true_ecpm_first": "true eCPM", "served_revenue": "revenue / 1000",
          "served_value": "value / 1000", "unlimited_revenue": "revenue / 1000 without budgets",
          "unlimited_value": "value / 1000 without budgets", "auction_revenue": "auction revenue / 1000",
          "served_total_revenue": "drawn revenue",
          "served_total_clicks": "drawn clicks", "served_total_conversions": "drawn conversions", "served_total_expected_clicks": "clicks",
          "served_total_expected_conversions": "conversions", "training_s": "training s"}


class Variant(Config):
    """One row of the table."""

    stage: Literal["pretrain", "finetune", "hepo"]
    """script that trains it"""
    config: Path
    """its config"""
    start: str | None = None
    """variant whose run of the same seed it starts from; none = random weights"""
    train: tuple[str, ...] = ()
    """overrides of the script"""


class Table3Config(Config):
    """Which policies are compared."""

    name: str = "table3"
    """runs are called <name>-<variant>-<seed>"""
    data: Path = Path("data/market")
    """data set folder, with tokenizer/ and simulator/"""
    simulator: Path | None = None
    """none = <data>/simulator"""
    market: Path | None = Path("data/market/raw")
    """raw folder of a synthetic market with its truth; none = only the simulator values"""
    runs: Path = Path("runs")
    """parent of the run folders and of <name>.md and <name>.json"""
    variants: dict[str, Variant] = Field(min_length=1)
    """by name, a variant after the one it starts from"""
    only: tuple[str, ...] = ()
    """variants that are trained and shown, with those they start from; none = all"""
    stages: dict[Literal["pretrain", "finetune", "hepo"], tuple[str, ...]] = Field(default_factory=dict)
    """overrides of every variant of a stage"""
    common: tuple[str, ...] = ()
    """overrides of every variant"""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    """of initialisation, order of rows and rollouts"""
    ranks: int = Field(1, ge=1)
    """processes of a run"""
    parallel: int = Field(1, ge=1)
    """seeds trained at a time"""
    evaluate: tuple[str, ...] = ()
    """overrides of launch/evaluate_policy.py"""
    metrics: tuple[str, ...] = ("ndcg", "opr", "average", "maximum", "hitr@10", "true_average", "true_maximum", "true_ecpm_first",
                                "unlimited_revenue", "unlimited_value", "served_revenue", "served_value", "served_total_expected_clicks",
                                "served_total_expected_conversions", "training_s")
    """columns of the table"""

    @model_validator(mode="after")
    def _check(self) -> "Table3Config":
        names = list(self.variants)
        for place, (name, variant) in enumerate(self.variants.items()):
            if variant.start is not None and variant.start not in names[:place]:
                raise ValueError(f"variants.{name}.start={variant.start} must be a variant before it: {', '.join(names[:place]) or 'none'}")
            if (variant.start is None) != (variant.stage == "pretrain"):
                raise ValueError(f"variants.{name}: a pretrain variant starts from nothing, any other from a variant")
        return self


def main() -> None:
    flags = {"--table": "train nothing, print the table of the runs that are there"}
    config, args = parse_cli(Table3Config, __doc__, ROOT / "configs/table3.yaml", flags=flags)
    check_names("only", config.only, tuple(config.variants))
    check_names("metrics", config.metrics, tuple(LABELS))
    names = chosen(config)
    for name in names:
        if config.variants[name].stage == "pretrain":  # a misspelt setting shows before the first run; later stages inherit
            load_config(PretrainConfig, ROOT / config.variants[name].config, overrides(config, name, config.seeds[0]))
    if args.dry_run:
        print(to_yaml(config), *(" ".join(command) for seed in config.seeds for name in names for command in commands(config, name, seed)),
              sep="\n")
        return
    if not args.table:
        train(config, names)
    results = collect(config, names)
    if not results:
        raise ConfigError(f"{config.runs} has no run of {config.name} that was valued; leave out --table")
    shown = table(config, results)
    write_atomic(config.runs / f"{config.name}.json", json.dumps(results, indent=1).encode())
    write_atomic(config.runs / f"{config.name}.md", (shown + "\n").encode())
    print(f"\n{shown}\n\nmean ± standard deviation over at most {len(config.seeds)} seeds; table: {config.runs / config.name}.md")


def train(config: Table3Config, names: list[str]) -> None:
    """Run what is missing."""
    check_data(config)
    with ThreadPoolExecutor(config.parallel) as pool, tqdm(total=len(config.seeds) * len(names), desc="runs", mininterval=0.5) as bar:
        for done in [pool.submit(run_seed, config, names, seed, bar) for seed in config.seeds]:
            done.result()


def check_data(config: Table3Config) -> None:
    """Raises: ConfigError naming what is missing and what makes it."""
    simulator = config.simulator or config.data / "simulator"
    wanted = {config.data / "shards/test/manifest.json": "launch/build_data.py", config.data / "tokenizer/tokenizer.json":
              "launch/fit_tokenizer.py", simulator / "simulator.json": "launch/fit_simulator.py"}
    if config.market:
        wanted[config.market / "truth"] = "launch/make_market.py"
    for path, script in wanted.items():
        if not (ROOT / path).exists():
            raise ConfigError(f"{path} does not exist; make it with {script} (launch/pipeline.sh shows every step)")


def chosen(config: Table3Config) -> list[str]:
    """The variants asked for and those they start from, in the config's order."""
    wanted = set(config.only or config.variants)
    for name in reversed(config.variants):
        if name in wanted and config.variants[name].start:
            wanted.add(config.variants[name].start)
    return [name for name in config.variants if name in wanted]


def run_seed(config: Table3Config, names: list[str], seed: int, bar: tqdm) -> None:
    """Train and value the variants of one seed, one after another."""
    for name in names:
        if not report_file(config, name, seed).exists():
            for command in commands(config, name, seed):
                run(command, config)
        bar.update()


def overrides(config: Table3Config, name: str, seed: int) -> list[str]:
    """Of the script that trains a variant; the last one of two for the same setting counts."""
    variant = config.variants[name]
    fixed = [f"run.name={config.name}-{name}-{seed}", f"run.folder={config.runs}", f"run.seed={seed}", f"data.loader.seed={seed}"]
    if variant.start:
        fixed.append(f"init_from={run_folder(config, variant.start, seed)}")
    else:
        fixed.append(f"data.folder={config.data}")
    if variant.stage == "hepo":
        fixed += [f"rollout.seed={seed}", f"simulator={config.simulator or config.data / 'simulator'}"]
    return [*config.common, *config.stages.get(variant.stage, ()), *variant.train, *fixed]


def commands(config: Table3Config, name: str, seed: int) -> list[list[str]]:
    """Training and valuation of one variant and seed."""
    variant = config.variants[name]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={config.ranks}"]
    first = name == chosen(config)[0]  # cascade and production stand beside the first variant, on the same requests
    policies = ["policy", "cascade", *(["production"] if config.market else [])] if first else ["policy"]
    value = [f"checkpoint={run_folder(config, name, seed)}", f"policies=[{', '.join(policies)}]",
             f"simulator={config.simulator or config.data / 'simulator'}", f"market={config.market or 'null'}", *config.evaluate,
             f"out={run_folder(config, name, seed) / REPORT}"]
    return [[*launcher, f"launch/{variant.stage}.py", "--config", str(variant.config), *overrides(config, name, seed)],
            [sys.executable, "launch/evaluate_policy.py", *value]]


def run_folder(config: Table3Config, name: str, seed: int) -> Path:
    return config.runs / f"{config.name}-{name}-{seed}"


def report_file(config: Table3Config, name: str, seed: int) -> Path:
    return ROOT / run_folder(config, name, seed) / REPORT


def run(command: list[str], config: Table3Config) -> None:
    """Raises: GPRError with the command that failed; its own message stands above."""
    threads = max(1, len(os.sched_getaffinity(0)) // (config.parallel * config.ranks))
    environment = {**MALLOC, "PYTHONWARNINGS": "ignore", "WANDB_MODE": "disabled", "OMP_NUM_THREADS": str(threads), **os.environ}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise GPRError(f"exit code {done.returncode} from: {' '.join(command)}")


def collect(config: Table3Config, names: list[str]) -> dict[str, list[dict[str, float]]]:
    """Row -> the metrics of each seed that was valued; rows of the cascade and of production come first."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in (*BESIDE, *names)}
    for seed in config.seeds:
        for name in (name for name in names if report_file(config, name, seed).exists()):
            for policy, found in json.loads(report_file(config, name, seed).read_text())["policies"].items():
                values = {metric: each[0] for metric, each in found["metrics"].items()} | found["totals"]
                if policy == "policy":
                    rows[name].append(values | {"training_s": training_seconds(config, name, seed)})
                else:
                    rows[policy].append(values)
    return {name: values for name, values in rows.items() if values}


def training_seconds(config: Table3Config, name: str, seed: int) -> float:
    """Of the optimizer steps of this stage alone."""
    lines = (ROOT / run_folder(config, name, seed) / "metrics.jsonl").read_text().splitlines()
    return sum(line["seconds"] for line in map(json.loads, lines) if "seconds" in line and "grad_norm" in line)


def table(config: Table3Config, results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: a row per policy, mean ± sd over seeds."""
    columns = [metric for metric in config.metrics if any(metric in values[0] for values in results.values())]
    lines = [f"| {config.name} | " + " | ".join(LABELS[metric] for metric in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, values in results.items():
        cells = [spread([each[metric] for each in values]) if metric in values[0] else "–" for metric in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[Any]) -> str:
    """Mean ± sample standard deviation, to four digits; the mean alone of one value."""
    mean = statistics.mean(values)
    places = max(0, 4 - len(str(int(abs(mean))))) if abs(mean) >= 1 else 4
    shown = f"{mean:,.{places}f}"
    return shown if len(values) == 1 else f"{shown} ± {statistics.stdev(values):,.{places}f}"


if __name__ == "__main__":
    run_cli(main)
