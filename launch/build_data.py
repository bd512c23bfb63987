"""Raw logs → catalogue, eligibility lists and shards.

    python launch/build_data.py --config configs/data/complete_journey.yaml
    python launch/build_data.py --config configs/data/example_own_logs.yaml num_workers=8 --dry-run
    python launch/build_data.py --config my_logs.yaml runner=ray num_workers=64     # on the Ray cluster of RAY_ADDRESS
"""

from pathlib import Path

from data_pipeline.build import BuildConfig, build_data, describe_build
from gpr_dist.config import parse_cli, to_yaml
from gpr_dist.errors import run_cli

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs/data/complete_journey.yaml"


def main() -> None:
    config, args = parse_cli(BuildConfig, __doc__, DEFAULT_CONFIG)
    if args.dry_run:
        print(to_yaml(config))
        print("\n".join(describe_build(config)))
        return
    build_data(config)


if __name__ == "__main__":
    run_cli(main)
