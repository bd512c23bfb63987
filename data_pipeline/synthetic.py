"""A small ad market with known truth: `make_market` writes its logs in the raw format that configs/data/market.yaml reads, and apart
from them the truth, which only evaluation may read (`Truth`).

Owns the run over days and the files. Users, ads and true rates: market/world.py; who comes when: market/traffic.py; which ad is shown
by the logging policy: market/policy.py, market/auction.py; responses: market/responses.py.
"""

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from data_pipeline.market.auction import settle
from data_pipeline.market.config import LoggingConfig, MarketConfig
from data_pipeline.market.policy import LoggingPolicy
from data_pipeline.market.randomness import keys, uniform
from data_pipeline.market.responses import luck
from data_pipeline.market.texts import brand_names, category_names, identifiers, item_texts
from data_pipeline.market.traffic import Visits, consumed_items, visits_of_day
from data_pipeline.market.truth import Outcomes, Requests, Served, Truth, group_names
from data_pipeline.market.world import MICRO, World, build_world, sigmoid
from gpr_dist.errors import DataError

__all__ = ["LoggingConfig", "MarketConfig", "MarketSummary", "Outcomes", "Requests", "Served", "Truth", "describe",
           "describe_plan", "is_made", "make_market"]

_ROW_GROUP = 1 << 20
_BASE_BYTES = 330_000_000  # of the program itself; this and the next two: measured at 0.2 to 4 million events a day
_BYTES_PER_EVENT_OF_DAY = 230  # of an average day; the peak is a weekend
_DISK_BYTES_PER_EVENT = 15
_AGES = ("18-24", "25-34", "35-44", "45-54", "55+")


@dataclass
class MarketSummary:
    """Counts over all days."""

    days: int = 0
    requests: int = 0
    unfilled: int = 0
    organic: int = 0
    clicks: int = 0
    conversions: int = 0
    late_conversions: int = 0
    spend: float = 0.0
    exhausted: int = 0
    seconds: float = field(default=0.0, compare=False)
    cpu_seconds: float = field(default=0.0, compare=False)


def is_made(config: MarketConfig) -> bool:
    """Whether `config.out` holds exactly this market."""
    marker = config.out / "truth/market.json"
    return marker.is_file() and marker.read_text() == config.model_dump_json(indent=1)


def make_market(config: MarketConfig) -> MarketSummary:
    """Write the market of `config` to `config.out`, in place of an older one there.

    Files: items.parquet, users.parquet, targeting.parquet, logs/ads/<day>.parquet, logs/organic/<day>.parquet (both in time order), truth/.
    They are written beside it (`<out>.part`) and moved when all are there. Memory: the world and one day of log; see `describe_plan`.
    Raises: DataError when `out` holds something else.
    """
    began, cpu_began = time.perf_counter(), time.process_time()
    _check_ours(config.out)
    part = config.out.with_name(config.out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    world = build_world(config)
    _write_tables(world, part)
    summary, policy, names = MarketSummary(days=config.num_days), LoggingPolicy(world), _Names(world)
    with ThreadPoolExecutor(1) as writer:
        pending: list[Future] = []
        for day in tqdm(range(config.num_days), desc="market", unit="day", mininterval=0.5):
            requests, organic = visits_of_day(world, day)
            label = f"{config.start + timedelta(days=day)}.parquet"
            ads_table = names.ads_table(world, _serve_day(world, policy, requests, summary))
            organic_table = names.organic_table(organic, consumed_items(world, organic))
            summary.organic += len(organic)
            _finish(pending)
            pending = [writer.submit(_write, ads_table, part / "logs/ads" / label),
                       writer.submit(_write, organic_table, part / "logs/organic" / label)]
        _finish(pending)
    world.save(part / "truth")
    shutil.rmtree(config.out, ignore_errors=True)
    part.rename(config.out)
    summary.seconds, summary.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return summary


def _serve_day(world: World, policy: LoggingPolicy, requests: Visits, summary: MarketSummary) -> dict[str, np.ndarray]:
    """Auction the requests of a day chunk by chunk. Returns: numpy columns of the filled ones."""
    spent_V = np.zeros(world.config.num_advertisers, np.int64)
    chunks = [_serve(world, policy, requests[slice(first, first + world.config.chunk_requests)], summary.requests + first, spent_V)
              for first in range(0, max(len(requests), 1), world.config.chunk_requests)]  # a day without requests has its columns too
    columns = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    summary.requests += len(requests)
    summary.unfilled += len(requests) - len(columns["user"])
    summary.clicks += int(columns["clicked"].sum())
    summary.conversions += int(columns["converted"].sum())
    summary.late_conversions += int(columns["late"].sum())
    summary.spend += float(spent_V.sum() / MICRO)
    summary.exhausted += int((spent_V >= world.budget_V).sum())
    return columns


def _serve(world: World, policy: LoggingPolicy, requests: Visits, first_number: int, spent_V: np.ndarray) -> dict[str, np.ndarray]:
    """Retrieve, rank and auction some requests in time order; `spent_V` is added to."""
    config, user, moment = world.config, requests.user_N, requests.time_N
    slot = np.floor(uniform(keys(config.seed, "slot", user, moment)) * len(config.slot_effects)).astype(np.int64)
    interest, need = world.interest(user, moment), world.need(user, moment)
    ad_RK = policy.retrieve(requests, interest, need)
    match_RK = world.click_match(interest, need, ad_RK)
    pctr_RK = policy.predicted_ctr(requests, ad_RK, match_RK, slot)
    drawn = luck(config, 0, user, moment)
    rows = np.arange(len(user))

    def clicks(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return drawn.click_N[rows] < sigmoid(world.click_logit(match_RK[rows, columns][:, None], slot[rows])[:, 0])

    settled = settle(policy.offers(ad_RK, pctr_RK), lambda rows, columns, price: np.where(clicks(rows, columns), price, 0),
                     round(config.reserve * MICRO), spent_V, world.budget_V)
    sold = np.flatnonzero(settled.column_R >= 0)
    column = settled.column_R[sold]
    ad, pctr = ad_RK[sold, column], pctr_RK[sold, column]
    cvr_logit = world.conversion_logit(interest[sold], need[sold], ad)
    clicked = clicks(sold, column)
    converts = clicked & (drawn.conversion_N[sold] < sigmoid(cvr_logit))
    in_time = moment[sold] + drawn.delay_N[sold] < config.end_s
    bid = world.ad_bid_A[ad] / MICRO
    return {
        "request": first_number + rows[sold], "user": user[sold], "time": moment[sold], "placement": requests.placement_N[sold],
        "slot": slot[sold], "ad": ad, "clicked": clicked, "converted": converts & in_time, "late": converts & ~in_time, "pctr": pctr,
        "pcvr": policy.predicted_cvr(requests[sold], ad, cvr_logit), "bid": bid, "price": settled.price_R[sold] / MICRO,
        "ecpm": 1000 * bid * pctr,
    }


class _Names:
    """The strings of the logs, made once."""

    def __init__(self, world: World):
        config = world.config
        self._users, self._ads = identifiers("user", config.num_users), identifiers("ad", config.num_ads)
        self._organic = identifiers("post", config.num_organic)
        self._groups = pa.array(group_names(config))
        self._segments = pa.array([f"segment{number}" for number in range(config.num_segments)])
        self._placements = pa.array([f"placement{number}" for number in range(config.num_placements)])

    def ads_table(self, world: World, day: dict[str, np.ndarray]) -> pa.Table:
        """The ad log of a day as it is written."""
        user, moment = day["user"], day["time"]
        return pa.table({
            "user_id": self._users.take(pa.array(user)),
            "request_id": day["request"],
            "time": moment,
            "ad_id": _dictionary(day["ad"], self._ads),
            "clicked": day["clicked"],
            "converted": day["converted"],
            **{name: day[name].astype(np.float32) for name in ("ecpm", "pctr", "pcvr", "bid", "price")},
            "slot": day["slot"].astype(np.int8),
            "segment": _dictionary(world.user_segment_U[user], self._segments),
            "placement": _dictionary(day["placement"], self._placements),
            "group": _dictionary(world.group(user, moment, day["placement"]), self._groups),
            "hour": (moment // 3600 % 24).astype(np.int8),
        })

    def organic_table(self, visits: Visits, item: np.ndarray) -> pa.Table:
        """The organic log of a day as it is written."""
        return pa.table({"user_id": self._users.take(pa.array(visits.user_N)), "time": visits.time_N,
                         "item_id": _dictionary(item, self._organic), "channel": _dictionary(visits.placement_N, self._placements)})


def _write_tables(world: World, folder: Path) -> None:
    """items.parquet, users.parquet, targeting.parquet."""
    config = world.config
    categories = pa.array(category_names(config.num_topics))
    brands, sites = brand_names(config.num_advertisers), ["guide", "story", "video", "review"]
    ads = pa.table({
        "item_id": identifiers("ad", config.num_ads),
        "kind": pa.array(["ad"] * config.num_ads),
        "text": item_texts(brands, world.ad_advertiser_A, world.ad_topic_A, config.num_topics, world.ad_vector_AD),
        "category": categories.take(pa.array(world.ad_topic_A)),
        "advertiser": pa.array(brands).take(pa.array(world.ad_advertiser_A)),
        "bid": pa.array((world.ad_bid_A / MICRO).astype(np.float32)),
    })
    site = np.arange(config.num_organic) % len(sites)
    organic = pa.table({
        "item_id": identifiers("post", config.num_organic),
        "kind": pa.array(["organic"] * config.num_organic),
        "text": item_texts(sites, site, world.organic_topic_O, config.num_topics, world.organic_vector_OD),
        "category": categories.take(pa.array(world.organic_topic_O)),
        "advertiser": pa.nulls(config.num_organic, pa.string()),
        "bid": pa.nulls(config.num_organic, pa.float32()),
    })
    _write(pa.concat_tables([ads, organic]), folder / "items.parquet")
    age = np.floor(uniform(keys(config.seed, "age", np.arange(config.num_users))) * len(_AGES)).astype(np.int64)
    segments = pa.array([f"segment{number}" for number in range(config.num_segments)])
    _write(pa.table({"user_id": identifiers("user", config.num_users), "segment": _dictionary(world.user_segment_U, segments),
                     "age": _dictionary(age, pa.array(_AGES))}), folder / "users.parquet")
    eligible = [world.eligible_ads(group) for group in range(config.num_groups)]
    group = _dictionary(np.repeat(np.arange(config.num_groups), [len(ads) for ads in eligible]), pa.array(group_names(config)))
    _write(pa.table({"group": group, "item_id": _dictionary(np.concatenate(eligible), identifiers("ad", config.num_ads))}),
           folder / "targeting.parquet")


def _dictionary(indices: np.ndarray, values: pa.Array) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(indices.astype(np.int32)), values)


def _write(table: pa.Table, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=_ROW_GROUP, compression="zstd", store_schema=False)  # any reader sees plain strings


def _finish(pending: list[Future]) -> None:
    for future in pending:
        future.result()


def _check_ours(out: Path) -> None:
    ours = {"logs", "truth", "items.parquet", "users.parquet", "targeting.parquet"}
    if out.exists() and (others := sorted(path.name for path in out.iterdir() if path.name not in ours)):
        raise DataError(f"{out} holds {others[0]}, which is not of a market; give an empty or a new folder as out")


def describe_plan(config: MarketConfig) -> str:
    """What to expect before it is made: events, memory and disk, by arithmetic on the constants above."""
    per_day = config.num_users * config.events_per_user_day
    epochs = config.num_days * 24 / config.need_hours
    memory = (_BASE_BYTES + config.num_users * (8 * config.dim + epochs + 30) + per_day * _BYTES_PER_EVENT_OF_DAY
              + config.chunk_requests * config.logging.candidates * (4 * config.dim + 100))
    events = per_day * config.num_days
    return (f"about {events:,.0f} events ({events * config.request_share:,.0f} requests) in {config.num_groups} eligibility groups; about "
            f"{memory / 1e9:.1f} GB of memory, {events * _DISK_BYTES_PER_EVENT / 1e9:.2f} GB on disk")


def describe(config: MarketConfig, summary: MarketSummary) -> str:
    """Two lines for the terminal."""
    events, shown = summary.requests + summary.organic, summary.requests - summary.unfilled
    return (f"{config.out}: {events:,} events of {config.num_users:,} users in {summary.days} days ({shown:,} ads shown, "
            f"{summary.unfilled:,} requests unfilled, {summary.organic:,} organic), "
            f"{events / max(summary.cpu_seconds, 1e-9):,.0f} events per CPU second\n"
            f"CTR {summary.clicks / max(shown, 1):.4f}, conversions per click {summary.conversions / max(summary.clicks, 1):.4f} (and "
            f"{summary.late_conversions:,} after the end of the log), spend {summary.spend:,.2f}, budgets exhausted on "
            f"{summary.exhausted / (summary.days * config.num_advertisers):.1%} of advertiser-days")
