"""Value-aware fine-tuning (VAFT, GPR Eq. 4) of a pretrained model: `deepspeed launch/finetune.py init_from=runs/quickstart`.

Data, model and losses are those of the run it starts from, where this config says nothing else. Ads count by what they were worth; the
data must log the column value (eCPM), and pctr and pcvr if clicks and conversions are to be divided by them. Resumes by itself.
"""

from pathlib import Path

from gpr_dist.config import parse_cli
from gpr_dist.job import FinetuneConfig, inherit
from gpr_dist.start import check_resume, dry_run, open_job, open_vaft, run_fit, run_job
from gpr_dist.training.objective import mtp_objective

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    config, args = parse_cli(FinetuneConfig, __doc__, ROOT / "configs" / "finetune.yaml")
    check_resume(config.run)
    config = inherit(config, missing_ok=args.dry_run)
    if args.dry_run:
        return dry_run(config)
    job = open_job(config)
    objective = mtp_objective(config.model.num_mtp_heads, config.value_loss_weight, config.head_weights,
                              item_loss_weight=config.item_loss_weight)
    return run_fit(job, objective, open_vaft(job, config.vaft))


if __name__ == "__main__":
    run_job(main)
