"""Pretrain GPR on shards: `deepspeed launch/pretrain.py`, `torchrun --nproc-per-node 2 launch/pretrain.py`, `python launch/pretrain.py`.

Resumes by itself from the newest complete checkpoint of the run, on any number of ranks. The default config builds the quickstart's
shards (The Complete Journey) when there are none. SIGTERM or SIGUSR1: save and leave.
"""

from pathlib import Path

from gpr_dist.config import parse_cli
from gpr_dist.job import PretrainConfig
from gpr_dist.start import check_resume, dry_run, open_job, run_fit, run_job
from gpr_dist.training.objective import mtp_objective

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    config, args = parse_cli(PretrainConfig, __doc__, ROOT / "configs" / "pretrain.yaml")
    check_resume(config.run)
    if args.dry_run:
        return dry_run(config)
    job = open_job(config)
    objective = mtp_objective(config.model.num_mtp_heads, config.value_loss_weight, config.head_weights,
                              item_loss_weight=config.item_loss_weight)
    return run_fit(job, objective)


if __name__ == "__main__":
    run_job(main)
