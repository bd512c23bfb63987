"""Whether hosts can run a pretraining config, before they are booked: what is wrong, and what to do. Exit code 1 if anything failed.

    python launch/doctor.py --config my_run.yaml                                  # this host alone
    python launch/doctor.py --config my_run.yaml cluster.hostfile=hosts           # every host of DeepSpeed's hostfile, over ssh
    python launch/doctor.py cluster.hostfile=hosts cluster.remote='srun --overlap -N1 -n1 -w {host}'      # inside a SLURM allocation

Start it where you would start the run, from the same folder. Reads the config of launch/pretrain.py, with a section `cluster` more.
"""

from pathlib import Path

from gpr_dist.config import parse_cli, to_yaml
from gpr_dist.doctor import DoctorConfig, check, table
from gpr_dist.errors import run_cli

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    config, args = parse_cli(DoctorConfig, __doc__, ROOT / "configs" / "pretrain.yaml")
    if args.dry_run:
        print(to_yaml(config))
        return 0
    findings = check(config)
    print(table(findings))
    return int(any(finding.status == "fail" for finding in findings))


if __name__ == "__main__":
    run_cli(main)
