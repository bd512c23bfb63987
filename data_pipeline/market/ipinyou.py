"""The market's prices and click rates beside those of real auctions: iPinYou, a file of (click, market price, pCTR) per campaign."""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from pyarrow import csv

from gpr_dist.errors import DataError

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_COLUMNS = ["click", "price", "pctr"]


def real_auctions(folder: Path) -> dict[str, pl.DataFrame]:
    """Campaign -> click (0 | 1), price (of a thousand impressions, the highest competing bid), pctr. Raises: DataError without files."""
    files = sorted(Path(folder).glob("*.validation.txt"))
    if not files:
        raise DataError(f"{folder} has no file <campaign>.validation.txt; give the folder of the iPinYou auctions, or leave ipinyou out")
    return {file.name.split(".")[0]: _read(file) for file in files}


def market_auctions(out: Path) -> pl.DataFrame:
    """The same columns of the synthetic log at `out`: the price of a thousand impressions is the price of a click x pCTR x 1000."""
    price = 1000.0 * pl.col("price") * pl.col("pctr")
    return pl.scan_parquet(out / "logs/ads/*.parquet").select(click=pl.col("clicked").cast(pl.Float64), price=price, pctr="pctr").collect()


def relative_quantiles(values: np.ndarray) -> np.ndarray:
    """Quantiles / mean: what is comparable between currencies and markets."""
    return np.quantile(values, QUANTILES) / values.mean()


def compare(out: Path, folder: Path) -> str:
    """A table: CTR, and quantiles of price / mean price and of pCTR / mean pCTR, of the market at `out` and of each real campaign."""
    rows = {"this market": market_auctions(out), **{f"iPinYou {name}": table for name, table in real_auctions(folder).items()}}
    heads = "".join(f"{f'{q:.0%}':>7}" for q in QUANTILES)
    lines = [f"{'':14}{'CTR':>9}  {'price / mean, quantiles':<{len(heads)}}  pCTR / mean, quantiles", f"{'':14}{'':>9}  {heads}  {heads}"]
    for name, table in rows.items():
        parts = ["".join(f"{value:7.2f}" for value in relative_quantiles(table[column].to_numpy())) for column in ("price", "pctr")]
        lines.append(f"{name:14}{table['click'].mean():9.5f}  {parts[0]}  {parts[1]}")
    return "\n".join(lines)


def _read(file: Path) -> pl.DataFrame:
    """Rows of three numbers; the lines between them open an episode and have fewer."""
    table = csv.read_csv(file, csv.ReadOptions(column_names=_COLUMNS),
                         csv.ParseOptions(delimiter="\t", invalid_row_handler=lambda row: "skip"),
                         csv.ConvertOptions(column_types=dict.fromkeys(_COLUMNS, pa.float64())))
    if not table.num_rows:
        raise DataError(f"{file} has no row `click<TAB>price<TAB>pctr`; is it a file of the iPinYou auctions?")
    return pl.DataFrame(table)
