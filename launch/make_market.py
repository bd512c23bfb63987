"""Write the logs of a synthetic ad market with known truth.

    python launch/make_market.py                                                  # the quickstart's market
    python launch/make_market.py --config configs/market/large.yaml num_users=100000
"""

from pathlib import Path

from data_pipeline.synthetic import MarketConfig, describe, make_market
from gpr_dist.config import parse_cli, to_yaml
from gpr_dist.errors import run_cli

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs/market/quickstart.yaml"


def main() -> None:
    config, args = parse_cli(MarketConfig, __doc__, DEFAULT_CONFIG)
    if args.dry_run:
        print(to_yaml(config))
        return
    print(describe(config, make_market(config)))


if __name__ == "__main__":
    run_cli(main)
