"""Fit the simulator that HEPO trains against: pCTR and pCVR rankers learned from the journey shards, calibrated, with a report.

    python launch/fit_simulator.py data=data/market out=data/market/simulator
    python launch/fit_simulator.py data=data/complete_journey labels.kind=sampled_negatives training.epochs=1   # no unclicked ads logged
"""

import json
import logging
import time
from pathlib import Path

import torch

from gpr_dist.config import parse_cli, to_yaml
from gpr_dist.errors import run_cli
from gpr_dist.rl.cascade import Retriever, RetrieverConfig
from gpr_dist.rl.fitting import SimulatorConfig, check_inputs, fit_simulator, format_report
from gpr_dist.schema import write_atomic
from gpr_dist.tokenizer.semantic_ids import SemanticIds

ROOT = Path(__file__).resolve().parents[1]


class FitSimulatorConfig(SimulatorConfig):
    """What to learn a simulator from, and where to put it."""

    data: Path = Path("data/market")
    """data set folder: catalogue/, shards/, eligibility.arrow"""
    tokenizer: Path | None = None
    """tokenizer bundle; none = <data>/tokenizer"""
    out: Path | None = None
    """simulator folder; none = <data>/simulator"""
    retriever: RetrieverConfig = RetrieverConfig()
    """first stage of the cascade baseline, kept beside the simulator"""


def main() -> int:
    config, args = parse_cli(FitSimulatorConfig, __doc__, ROOT / "configs/simulator.yaml")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    shards = {split: str(config.data / "shards" / split) for split in ("train", "validation", "test")}
    semantic_ids = SemanticIds.load(config.tokenizer or config.data / "tokenizer")
    out = config.out or config.data / "simulator"
    manifest = check_inputs(config.data, shards, semantic_ids, config)
    if args.dry_run:
        print(f"{to_yaml(config)}\nwould learn from {manifest.num_targets:,} ads of {shards['train']} and write {out}")
        return 0
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    simulator, report = fit_simulator(config.data, shards, semantic_ids, config, device)
    retriever = Retriever.fit(shards["train"], semantic_ids.codes_NL, config.retriever)
    simulator.save(out)
    retriever.save(out)
    write_atomic(out / "report.json", json.dumps(report, indent=1).encode())
    seconds = time.perf_counter() - started
    print(f"\n{format_report(report)}\nsimulator in {out}: {report['examples']:,} examples in {seconds:.0f} s on {device}")
    return 0


if __name__ == "__main__":
    run_cli(main)
