"""A synthetic market of a second, for tests."""

from pathlib import Path

import polars as pl

from data_pipeline.synthetic import MarketConfig
from gpr_dist.config import build_config, load_config

ROOT = Path(__file__).resolve().parents[1]


def small_market(out, **changes) -> MarketConfig:
    """configs/market/test.yaml at `out`; changes may be nested dictionaries."""
    values = load_config(MarketConfig, ROOT / "configs/market/test.yaml").model_dump()
    return build_config(MarketConfig, values | {"out": out} | changes, "test")


def ad_log(out) -> pl.DataFrame:
    """In the order of the files, which is that of time."""
    return pl.read_parquet(out / "logs/ads/*.parquet").sort("request_id", maintain_order=True)


def organic_log(out) -> pl.DataFrame:
    return pl.read_parquet(out / "logs/organic/*.parquet")
