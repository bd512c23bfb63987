"""One rank of launch/pretrain.py that also writes down which rows each finished step was trained on: a script for launchers, a function
for forks. The rest is the script as it is, but for the MFU's denominator, a second of every start."""

import json
import os
import sys
from pathlib import Path

import torch
from documents import launch_module

from gpr_dist import start
from gpr_dist.training import loop
from gpr_dist.training.engine import _import_muon

RECORD = "GPR_SOAK_RECORD"
"""environment variable: the file of this life; the rank is added to its name"""


def record_steps(path: Path) -> None:
    """From now on every finished training step leaves a line in `path`: {"epoch", "step", "rows"}."""
    train_step = loop.train_step

    def recorded(engine, data, *args, **kwargs):
        result = train_step(engine, data, *args, **kwargs)
        rows = torch.cat([batch.row_ids_B for batch in data.micro_batches]).tolist()
        with open(path, "a") as file:
            file.write(json.dumps({"epoch": data.epoch, "step": data.step_in_epoch, "rows": rows}) + "\n")
        return result

    loop.train_step = recorded


def import_everything() -> None:
    """What a rank would import later, so that forks need not: torch loads its compiler for the first optimizer."""
    torch.optim.AdamW([torch.zeros(1)])
    _import_muon()


def main() -> None:
    start.measure_peak_flops = lambda *_: 0.0
    record_steps(Path(f"{os.environ[RECORD]}-rank-{os.environ['RANK']}.jsonl"))
    sys.argv[0] = "pretrain.py"
    start.run_job(launch_module("pretrain").main)


if __name__ == "__main__":
    main()
