"""What a click on an ad is worth: from a column of the catalogue, or estimated from logged values.

Logs that come with pCTR have eCPM as their value, so that an ad's bid is its summed value over its summed pCTR. Without pCTR the value
of a click is the mean value of its clicks (e.g. sales). Either ratio is drawn towards that of all ads where there is little of it.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from gpr_dist.config import Config
from gpr_dist.errors import DataError
from gpr_dist.schema import Action, Batch

# M catalogue items

PER_MILLE = 1000.0  # impressions that an eCPM is the value of


class BidConfig(Config):
    """Where bids come from."""

    column: str | None = None
    """number column of the catalogue, value of a click in currency; none = `bid` where there is one, else estimated from the logs"""
    smoothing: float = Field(10.0, gt=0)
    """estimates: so many average clicks are added to every ad's"""


class Bids(NamedTuple):
    """Value of a click on every catalogue item."""

    bid_M: np.ndarray  # float32, currency
    origin: str  # in words, for the report


class ValueSums:
    """Running sums of the logged values of ads; one pass over batches."""

    def __init__(self, num_items: int) -> None:
        self.value_M, self.clicks_M, self.click_value_M = np.zeros(num_items), np.zeros(num_items), np.zeros(num_items)
        self.valued_pctr_M = np.zeros(num_items)

    def add(self, batch: Batch) -> None:
        """The head-0 targets of a batch: every logged ad once."""
        head_0 = (batch.target_head_N == 0).numpy()
        item, value, pctr, action = (getattr(batch, f"target_{name}_N").numpy()[head_0] for name in ("item", "value", "pctr", "action"))
        size = len(self.value_M)
        known = np.isfinite(value)
        both, clicked = known & np.isfinite(pctr), known & (action >= Action.CLICK)
        self.value_M += np.bincount(item[both], value[both], size)
        self.valued_pctr_M += np.bincount(item[both], pctr[both], size)
        self.click_value_M += np.bincount(item[clicked], value[clicked], size)
        self.clicks_M += np.bincount(item[clicked], minlength=size)


def find_bids(catalogue: Path, sums: ValueSums, config: BidConfig) -> Bids:
    """Args: catalogue: catalogue.arrow.

    Raises: DataError when the column is missing or no number, or nothing tells what a click is worth.
    """
    table = pa.ipc.open_file(pa.memory_map(str(catalogue))).read_all()
    name = config.column or ("bid" if "bid" in table.column_names else None)
    if name is not None:
        return _from_column(table, name, catalogue)
    if sums.valued_pctr_M.sum() > 0:
        ratio = _smooth(sums.value_M / PER_MILLE, sums.valued_pctr_M, config.smoothing)
        return Bids(ratio, "estimated from the log: value / (1000 pctr), value taken as eCPM")
    if sums.clicks_M.sum() > 0:
        return Bids(_smooth(sums.click_value_M, sums.clicks_M, config.smoothing), "estimated from the log: mean logged value of a click")
    raise DataError(f"{catalogue} has no column bid and the logs have no values, so nothing tells what a click is worth; name a number "
                    f"column by bids.column (there are {', '.join(table.column_names)}), or rebuild the shards with `value`")


def check_column(catalogue: Path, config: BidConfig) -> None:
    """Fail early. Raises: DataError when `config.column` is not a number column of the catalogue."""
    if config.column is not None:
        _from_column(pa.ipc.open_file(pa.memory_map(str(catalogue))).read_all(), config.column, catalogue)


def _from_column(table: pa.Table, name: str, catalogue: Path) -> Bids:
    if name not in table.column_names:
        raise DataError(f"{catalogue} has no column {name}; bids.column can be one of {', '.join(table.column_names)}")
    kind = table.schema.field(name).type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
        raise DataError(f"{catalogue}: column {name} holds {kind}, but a bid is a number; choose another by bids.column")
    bid_M = table.column(name).cast(pa.float64()).to_numpy()
    known = np.isfinite(bid_M)
    if not known.any() or bid_M[known].min() < 0:
        raise DataError(f"{catalogue}: column {name} " + ("is empty" if not known.any() else f"has a bid of {bid_M[known].min():g}")
                        + "; a bid is the value of a click, at least 0")
    unknown = f"; mean of the others for {int((~known).sum()):,} items without" if not known.all() else ""
    return Bids(np.where(known, bid_M, bid_M[known].mean()).astype(np.float32), f"column {name} of the catalogue{unknown}")


def _smooth(sum_M: np.ndarray, count_M: np.ndarray, pseudo: float) -> np.ndarray:
    """sum / count of each item, with `pseudo` average ones added."""
    return ((sum_M + pseudo * sum_M.sum() / count_M.sum()) / (count_M + pseudo)).astype(np.float32)
