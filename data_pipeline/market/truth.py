"""What is true of a synthetic market, for evaluation only: expected outcomes of any ad at any request, and what a policy earns when it
serves a stream of requests in place of the one that wrote the log. Nothing that trains may read this."""

# N rows  B requests  K ranked ads  V advertisers

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from data_pipeline.market.auction import Offers, settle
from data_pipeline.market.config import DAY_S, MarketConfig
from data_pipeline.market.responses import luck
from data_pipeline.market.texts import identifiers
from data_pipeline.market.world import MICRO, World, sigmoid
from gpr_dist.errors import DataError

Ids = pa.Array | pa.ChunkedArray | np.ndarray | Sequence[str]
_CHUNK = 1 << 13
_PER_MILLE = 1000
_UNLIMITED = float(1 << 62)


@dataclass(frozen=True)
class Outcomes:
    """True expected outcomes, float64, in the shape of the ads asked for. Money in units of the log."""

    ctr: np.ndarray  # probability of a click, 0..1
    cvr: np.ndarray  # probability of a conversion, ever, after a click, 0..1
    bid: np.ndarray  # per click
    ecpm: np.ndarray  # bid x ctr x 1000
    value: np.ndarray  # ecpm + conversion_worth bids per expected conversion, per 1000 impressions


@dataclass(frozen=True)
class Requests:
    """Ad requests, one entry each, as the log has them."""

    request_id: np.ndarray  # int64
    user_id: pa.Array  # string
    time: np.ndarray  # int64, seconds since 1970
    slot: np.ndarray  # int64
    group: pa.Array  # string, eligibility group
    ad_id: pa.Array  # string, the ad the logging policy showed
    price: np.ndarray  # float64, per click, what it was sold for

    def __len__(self) -> int:
        return len(self.time)

    def take(self, rows: np.ndarray) -> "Requests":
        """Some of them, in the order of `rows`."""
        return Requests(*(getattr(self, f.name).take(rows) for f in fields(self)))


@dataclass(frozen=True)
class Served:
    """What a policy earned. `expected_*` takes probabilities for outcomes, the rest one draw of them that is the same for every policy."""

    num_requests: int
    num_filled: int
    num_ineligible: int
    """ranked ads that may not be shown there, left out"""
    num_exhausted: int
    """(advertiser, day) whose budget was spent, in the draw"""
    revenue: float
    clicks: int
    conversions: int
    """ever, of these clicks"""
    expected_revenue: float
    """second price x CTR, summed"""
    expected_clicks: float
    expected_conversions: float
    expected_value: float
    """sum over requests of `Outcomes.value` / 1000: bids, not prices"""
    spend_V: np.ndarray  # float64, per advertiser, in the draw
    shown_B: np.ndarray  # int64, column of the ad shown in the draw, in the order of the requests given; -1 = none
    expected_revenue_B: np.ndarray  # float64, in the order of the requests given, for intervals by user
    expected_value_B: np.ndarray  # float64, likewise


class Truth:
    """The truth of one market."""

    def __init__(self, folder: Path, world: World):
        self.folder, self.world = folder, world

    @classmethod
    def load(cls, out: str | Path) -> "Truth":
        """Of the market at `out`. Raises: DataError when there is none."""
        return cls(Path(out), World.load(Path(out) / "truth"))

    @property
    def config(self) -> MarketConfig:
        return self.world.config

    def outcomes(self, user_ids: Ids, times: np.ndarray, ad_ids: Ids | np.ndarray, slots: np.ndarray) -> Outcomes:
        """Expected outcomes of showing ads.

        Args: user_ids, times, slots: [N]; times in seconds since 1970. ad_ids: strings [N] or [N, K], ads of the same request in a row;
            empty or None = no ad, whose outcomes are 0.
        Raises: DataError for an unknown user or ad, or a slot the market has not.
        """
        ad = self.ad_numbers(ad_ids)
        ctr, cvr = self._rates(self.user_numbers(user_ids), np.asarray(times, np.int64), ad.reshape(len(ad), -1), self._slots(slots))
        return self._outcomes(ad, ctr.reshape(ad.shape), cvr.reshape(ad.shape))

    def requests(self, since: int, until: int) -> Requests:
        """The logged requests with since <= time < until (seconds since 1970), in time order. Raises: DataError when there is none."""
        columns = [f.name for f in fields(Requests)]
        table = ds.dataset(self.folder / "logs/ads").to_table(columns, filter=(pc.field("time") >= since) & (pc.field("time") < until))
        if not table.num_rows:
            raise DataError(f"{self.folder}/logs/ads has no request in {since} <= time < {until}; the log spans {self.config.start_s} to "
                            f"{self.config.end_s}")
        text = {name: table[name].cast(pa.string()).combine_chunks() for name in ("user_id", "group", "ad_id")}
        number = {name: table[name].to_numpy().astype(np.int64) for name in ("request_id", "time", "slot")}
        found = Requests(**text, **number, price=table["price"].to_numpy().astype(np.float64))
        return found.take(np.argsort(found.request_id, kind="stable"))

    def serve(self, requests: Requests, ranked_item_BK: Ids | np.ndarray, seed: int = 1, budget_frac: float = 1.0) -> Served:
        """Serve requests by a policy that ranked ads for each of them.

        At each request the first ranked ad that may be shown and whose advertiser has budget left is shown; the next such ad sets the
        price: its bid x CTR / the shown ad's CTR, at most the shown ad's bid, at least the reserve. Budgets are per day, full at its start.

        Args: ranked_item_BK: item ids [B, K] best first; empty or None = no ad. seed: of the responses; 0 = those of the log.
            budget_frac: share of the daily budgets these requests may use, e.g. the share of the day's requests that they are; inf = no
                budget ends.
        """
        ad_BK = self.ad_numbers(ranked_item_BK)
        if ad_BK.ndim != 2 or len(ad_BK) != len(requests):
            raise DataError(f"ranked ads of shape {ad_BK.shape} for {len(requests)} requests; expected one row of ads per request")
        order = np.lexsort((requests.request_id, requests.time))
        back = np.argsort(order)
        requests, ad_BK = requests.take(order), ad_BK[order]
        offered = ad_BK >= 0
        eligible = offered & self.world.is_eligible(self._group_numbers(requests.group), np.maximum(ad_BK, 0))
        user_B, slot_B = self.user_numbers(requests.user_id), self._slots(requests.slot)
        ctr_BK = self._rates(user_B, requests.time, ad_BK, slot_B)[0]
        score_BK = np.where(eligible, -np.arange(ad_BK.shape[1], dtype=np.float32), -np.inf)
        safe = np.maximum(ad_BK, 0)
        offers = Offers(ad_BK, self.world.ad_advertiser_A[safe], score_BK, np.where(offered, ctr_BK, 1.0), self.world.ad_bid_A[safe])
        click_B = luck(self.config, seed, user_B, requests.time).click_N
        budget_V = np.floor(np.minimum(self.world.budget_V * budget_frac, _UNLIMITED)).astype(np.int64)
        drawn = self._settle_days(offers, requests.time, budget_V, lambda rows, columns: click_B[rows] < ctr_BK[rows, columns])
        expected = self._settle_days(offers, requests.time, budget_V, lambda rows, columns: ctr_BK[rows, columns])
        rows = np.arange(len(requests))
        ads = [np.where(days.column_B >= 0, ad_BK[rows, days.column_B], -1)[back] for days in (drawn, expected)]
        charges = [days.charge_B[back] / MICRO for days in (drawn, expected)]
        return self._earned(requests.take(back), seed, *ads, *charges, num_ineligible=int((offered & ~eligible).sum()),
                            num_exhausted=drawn.num_exhausted, spend_V=drawn.spent_V / MICRO, shown_B=drawn.column_B[back])

    def serve_logged(self, requests: Requests, seed: int = 1) -> Served:
        """What the logging policy earned at these requests, at the prices of the log: the row to put beside those of `serve`."""
        ad_B = self.ad_numbers(requests.ad_id)
        user_B = self.user_numbers(requests.user_id)
        ctr_B = self._rates(user_B, requests.time, ad_B[:, None], self._slots(requests.slot))[0][:, 0]
        paid_B = np.where(luck(self.config, seed, user_B, requests.time).click_N < ctr_B, requests.price, 0.0)
        owner_B, day_B = self.world.ad_advertiser_A[ad_B], (requests.time - self.config.start_s) // DAY_S
        spent_DV = np.zeros((self.config.num_days, self.config.num_advertisers))
        np.add.at(spent_DV, (day_B, owner_B), paid_B)
        return self._earned(requests, seed, ad_B, ad_B, paid_B, ctr_B * requests.price, num_ineligible=0, spend_V=spent_DV.sum(0),
                            num_exhausted=int((spent_DV >= self.world.budget_V / MICRO).sum()), shown_B=np.zeros(len(ad_B), np.int64))

    def _earned(self, requests: Requests, seed: int, drawn_B: np.ndarray, expected_B: np.ndarray, paid_B: np.ndarray,
                expected_paid_B: np.ndarray, **others) -> Served:
        """Count the outcomes of shown ads (numbers, -1 = none): those of the draw, and those by which expectations are taken."""
        user_B, slot_B = self.user_numbers(requests.user_id), self._slots(requests.slot)
        both = np.stack([drawn_B, expected_B], axis=1)
        true = self._outcomes(both, *self._rates(user_B, requests.time, both, slot_B))
        response = luck(self.config, seed, user_B, requests.time)
        clicked_B = response.click_N < true.ctr[:, 0]
        converted_B = clicked_B & (response.conversion_N < true.cvr[:, 0])
        return Served(
            num_requests=len(requests), num_filled=int((drawn_B >= 0).sum()), revenue=float(paid_B.sum()), clicks=int(clicked_B.sum()),
            conversions=int(converted_B.sum()), expected_revenue=float(expected_paid_B.sum()), expected_clicks=float(true.ctr[:, 1].sum()),
            expected_conversions=float((true.ctr * true.cvr)[:, 1].sum()), expected_value=float(true.value[:, 1].sum() / _PER_MILLE),
            expected_revenue_B=expected_paid_B, expected_value_B=true.value[:, 1] / _PER_MILLE, **others)

    def ad_numbers(self, ad_ids: Ids | np.ndarray) -> np.ndarray:
        """Numbers of ads, int64 in the shape of `ad_ids`; -1 for no ad (empty or None). Raises: DataError for an unknown one."""
        return _numbers(ad_ids, self._ad_ids, "ad", may_lack=True)

    def user_numbers(self, user_ids: Ids) -> np.ndarray:
        """int64. Raises: DataError for an unknown user."""
        return _numbers(user_ids, self._user_ids, "user", may_lack=False)

    @cached_property
    def _ad_ids(self) -> pa.Array:
        return identifiers("ad", self.config.num_ads)

    @cached_property
    def _user_ids(self) -> pa.Array:
        return identifiers("user", self.config.num_users)

    def _group_numbers(self, groups: pa.Array) -> np.ndarray:
        return _numbers(groups, pa.array(group_names(self.config)), "eligibility group", may_lack=False)

    def _slots(self, slots: np.ndarray) -> np.ndarray:
        slots, count = np.asarray(slots, np.int64), len(self.config.slot_effects)
        if len(slots) and not (slots.min() >= 0 and slots.max() < count):
            raise DataError(f"slots {slots.min()} to {slots.max()} were asked for, the market has 0 to {count - 1}")
        return slots

    def _rates(self, user_B: np.ndarray, time_B: np.ndarray, ad_BK: np.ndarray, slot_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """CTR and CVR float64 [B, K]; 0 where there is no ad."""
        rates = np.zeros((2, *ad_BK.shape))
        for first in range(0, len(user_B), _CHUNK):
            rows = slice(first, first + _CHUNK)
            interest, need = self.world.interest(user_B[rows], time_B[rows]), self.world.need(user_B[rows], time_B[rows])
            ad = np.maximum(ad_BK[rows], 0)
            rates[0, rows] = sigmoid(self.world.click_logit(self.world.click_match(interest, need, ad), slot_B[rows]))
            repeated = np.repeat(np.arange(len(ad)), ad.shape[1])
            rates[1, rows] = sigmoid(self.world.conversion_logit(interest[repeated], need[repeated], ad.ravel())).reshape(ad.shape)
        rates[:, ad_BK < 0] = 0
        return rates[0], rates[1]

    def _outcomes(self, ad: np.ndarray, ctr: np.ndarray, cvr: np.ndarray) -> Outcomes:
        bid = np.where(ad >= 0, self.world.ad_bid_A[np.maximum(ad, 0)] / MICRO, 0.0)
        ecpm = _PER_MILLE * ctr * bid
        return Outcomes(ctr, cvr, bid, ecpm, ecpm * (1 + self.config.conversion_worth * cvr))

    def _settle_days(self, offers: Offers, time_B: np.ndarray, budget_V: np.ndarray,
                     clicks: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> "_Days":
        """Args: clicks: (rows, columns) -> clicks at these requests, 0 or 1 or their probability."""
        days = _Days(np.full(len(time_B), -1), np.zeros(len(time_B), np.int64), np.zeros(self.config.num_advertisers, np.int64))
        day_B = (time_B - self.config.start_s) // DAY_S
        for day_start, day_end in pairwise([*np.flatnonzero(np.diff(day_B, prepend=-1)), len(day_B)]):
            spent_V = np.zeros(self.config.num_advertisers, np.int64)
            for first in range(day_start, day_end, _CHUNK):  # few at a time: settling repeats itself for every budget that ends
                rows = slice(first, min(first + _CHUNK, day_end))

                def charge(part: np.ndarray, columns: np.ndarray, price: np.ndarray, first: int = first) -> np.ndarray:
                    return np.rint(clicks(part + first, columns) * price).astype(np.int64)

                settled = settle(offers[rows], charge, round(self.config.reserve * MICRO), spent_V, budget_V)
                days.column_B[rows], days.charge_B[rows] = settled.column_R, settled.charge_R
            days.spent_V += spent_V
            days.num_exhausted += int((spent_V >= budget_V).sum())
        return days


@dataclass
class _Days:
    column_B: np.ndarray
    charge_B: np.ndarray
    spent_V: np.ndarray
    num_exhausted: int = 0


def group_names(config: MarketConfig) -> list[str]:
    """Names of the eligibility groups, by number."""
    return [f"flight{flight}-segment{segment}-placement{placement}" for flight in range(config.num_flights)
            for segment in range(config.num_segments) for placement in range(config.num_placements)]


def _numbers(ids: Ids, known: pa.Array, what: str, may_lack: bool) -> np.ndarray:
    if isinstance(ids, pa.ChunkedArray | pa.Array):
        shape, flat = (len(ids),), ids.cast(pa.string())
    else:
        array = np.asarray(ids, object)
        shape, flat = array.shape, pa.array(array.ravel(), pa.string())
    numbers = pc.index_in(flat, known).to_numpy(zero_copy_only=False)
    lacking = pc.fill_null(pc.equal(flat, ""), True).to_numpy(zero_copy_only=False)
    unknown = np.isnan(numbers) & ~(lacking & may_lack) if numbers.dtype.kind == "f" else np.zeros(len(numbers), bool)
    if unknown.any():
        raise DataError(f"{what} {flat[int(unknown.argmax())].as_py()!r} is not of this market; was the data set built from its logs?")
    return np.where(np.isnan(numbers), -1, numbers).astype(np.int64).reshape(shape)
