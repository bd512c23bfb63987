"""Write the logs of a synthetic ad market with known truth.

    python launch/make_market.py                                                  # the quickstart's market
    python launch/make_market.py ipinyou=FOLDER                                   # and its prices and click rates beside real auctions
    python launch/make_market.py --config configs/market/large.yaml num_users=100000
"""

from pathlib import Path

from data_pipeline.market.ipinyou import compare
from data_pipeline.synthetic import MarketConfig, describe, describe_plan, is_made, make_market
from gpr_dist.config import parse_cli, to_yaml
from gpr_dist.errors import run_cli

DEFAULT_CONFIG = Path(__file__).resolve().parents[1] / "configs/market/quickstart.yaml"


class MakeMarketConfig(MarketConfig):
    """The market, and what it is compared with."""

    ipinyou: Path | None = None
    """folder of the iPinYou auctions (<campaign>.validation.txt); none = no comparison"""


def main() -> None:
    config, args = parse_cli(MakeMarketConfig, __doc__, DEFAULT_CONFIG)
    market = MarketConfig(**config.model_dump(exclude={"ipinyou"}))
    if args.dry_run:
        print(f"{to_yaml(config)}\n{describe_plan(market)}")
    elif is_made(market):
        print(f"{market.out} is up to date")
    else:
        print(describe(market, make_market(market)))
    if config.ipinyou and not args.dry_run:
        print(compare(market.out, config.ipinyou))


if __name__ == "__main__":
    run_cli(main)
