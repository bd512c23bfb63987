"""Laws of the market's logs."""

import hashlib

import numpy as np
import polars as pl
import pytest
from small_market import ad_log, organic_log, small_market

from data_pipeline.market.config import DAY_S
from data_pipeline.market.responses import luck
from data_pipeline.synthetic import Truth, describe, describe_plan, is_made, make_market
from gpr_dist.config import build_config
from gpr_dist.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    """(config, summary, ad log, truth)."""
    config = small_market(tmp_path_factory.mktemp("market") / "raw")
    summary = make_market(config)
    return config, summary, ad_log(config.out), Truth.load(config.out)


def digests(out):
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != "market.json")  # which names its folder
    return {path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def true_outcomes(truth, log):
    return truth.outcomes(log["user_id"].to_arrow(), log["time"].to_numpy(), log["ad_id"].to_arrow(), log["slot"].to_numpy())


# --- determinism ------------------------------------------------------------------------------------------------------------------


def test_the_seed_decides_everything_and_the_chunk_size_nothing(tmp_path):
    small = {"num_days": 3, "num_users": 200, "budget": 1.0}
    same = small_market(tmp_path / "same", **small)
    variants = {"again": {}, "chunks": {"chunk_requests": 37}, "other": {"seed": 1}}
    summary = make_market(same)
    assert summary.exhausted > 0, "budgets should end within a day, or chunks could not matter"
    for name, changes in variants.items():
        found = make_market(small_market(tmp_path / name, **small, **changes))
        if name != "other":
            assert digests(tmp_path / name) == digests(same.out) and found == summary
    ours, others = digests(same.out), digests(tmp_path / "other")
    assert ours.keys() == others.keys()
    assert {name for name in ours if ours[name] == others[name]} == {"truth/organic_topic_O.npy"}  # equal shares, whatever the seed


def test_the_truth_does_not_depend_on_the_logging_policy(tmp_path, market):
    config, _, log, truth = market
    other = config.model_copy(update={"out": tmp_path / "other", "logging": config.logging.model_copy(update={
        "candidates": 5, "max_reach": 2, "ranker_noise": 2.0, "need_share": 0.1, "belief_accuracy": 0.2})})
    make_market(other)
    theirs, their_log = Truth.load(other.out), ad_log(other.out)
    ours, again = true_outcomes(truth, log), true_outcomes(theirs, log)
    assert all((getattr(ours, name) == getattr(again, name)).all() for name in ("ctr", "cvr", "bid", "ecpm", "value"))
    both = log.join(their_log, on=["user_id", "time"], suffix="_2")
    assert len(both) > 0.9 * len(log)  # the same requests, in the same slots; now and then nobody has budget left
    assert (both["slot"] == both["slot_2"]).all()
    same_ad = both.filter(pl.col("ad_id") == pl.col("ad_id_2"))
    assert 0.02 * len(both) < len(same_ad) < 0.6 * len(both)
    for response in ("clicked", "converted"):
        assert (same_ad[response] == same_ad[f"{response}_2"]).all()


# --- auction, budgets, targeting --------------------------------------------------------------------------------------------------


def test_prices_predictions_and_money(market):
    config, summary, log, _ = market
    assert (log["price"] <= log["bid"]).all() and (log["price"] >= np.float32(config.reserve)).all()
    assert 0.2 < (log["price"] < 0.8 * log["bid"]).mean() < 0.95
    np.testing.assert_allclose(log["ecpm"], 1000 * log["bid"] * log["pctr"], rtol=1e-5)
    bids = pl.read_parquet(config.out / "items.parquet", columns=["item_id", "bid"])
    joined = log.join(bids, left_on="ad_id", right_on="item_id", suffix="_item")
    assert len(joined) == len(log) and (joined["bid"] == joined["bid_item"]).all()
    assert log.filter("clicked")["price"].cast(pl.Float64).sum() == pytest.approx(summary.spend, rel=1e-5)
    assert len(log) == summary.requests - summary.unfilled
    assert (log["clicked"].sum(), log["converted"].sum()) == (summary.clicks, summary.conversions)
    assert not log.filter(~pl.col("clicked"))["converted"].any()


def test_budgets_are_overspent_by_less_than_a_click_and_then_nothing_is_shown(market):
    config, summary, log, truth = market
    owner = truth.world.ad_advertiser_A[truth.ad_numbers(log["ad_id"].to_arrow())]
    spent = log.with_columns(owner=owner, day=(pl.col("time") - config.start_s) // DAY_S,
                             paid=pl.col("clicked") * pl.col("price").cast(pl.Float64))
    spent = spent.with_columns(budget=truth.world.budget_V[owner] / 1e6, total=pl.col("paid").cum_sum().over("owner", "day"))
    before = spent["total"] - spent["paid"]
    assert (before < spent["budget"] + 1e-4).all()  # the log rounds to float32
    days = spent.group_by("owner", "day").agg(pl.col("total").max(), pl.col("budget").first())
    ended = days.filter(pl.col("total") >= pl.col("budget") - 1e-4)
    assert len(ended) == summary.exhausted > 10


def test_targeting_and_life_times_are_never_violated(market):
    config, _, log, truth = market
    targeting = pl.read_parquet(config.out / "targeting.parquet")
    assert targeting.is_duplicated().sum() == 0 and targeting["group"].n_unique() == config.num_groups
    assert len(log.join(targeting, left_on=["group", "ad_id"], right_on=["group", "item_id"], how="anti")) == 0
    users = pl.read_parquet(config.out / "users.parquet")
    joined = log.join(users, on="user_id", suffix="_user")
    assert (joined["segment"] == joined["segment_user"]).all()
    flight = (log["time"] - config.start_s) // (config.flight_days * DAY_S)
    assert (log["group"] == [f"flight{f}-{s}-{p}" for f, s, p in zip(flight, log["segment"], log["placement"], strict=True)]).all()
    flights = truth.world.ad_flights_A2[truth.ad_numbers(log["ad_id"].to_arrow())]
    assert (flights[:, 0] <= flight.to_numpy()).all() and (flight.to_numpy() <= flights[:, 1]).all()
    assert (flights[:, 0] > 0).mean() > 0.1  # some of what is shown started later


def test_requests_without_an_eligible_ad_are_counted_and_not_logged(tmp_path):
    config = small_market(tmp_path / "raw", num_ads=5, num_advertisers=5, num_topics=4, num_days=2, flight_days=1, num_segments=12,
                          num_placements=4, num_users=300)
    summary = make_market(config)
    log, targeting = ad_log(config.out), pl.read_parquet(config.out / "targeting.parquet")
    empty = config.num_groups - targeting["group"].n_unique()
    assert empty > 0 and 0 < summary.unfilled < summary.requests and len(log) == summary.requests - summary.unfilled
    assert set(log["group"]) <= set(targeting["group"])


def test_days_without_requests(tmp_path):
    config = small_market(tmp_path / "raw", num_users=2, events_per_user_day=0.5)
    summary = make_market(config)
    assert summary.requests < config.num_days and len(ad_log(config.out)) == summary.requests - summary.unfilled
    assert len(list(config.out.glob("logs/ads/*.parquet"))) == config.num_days
    Truth.load(config.out)


# --- time -------------------------------------------------------------------------------------------------------------------------


def test_times(market):
    config, summary, log, _ = market
    assert log["time"].is_sorted() and log["time"].min() >= config.start_s and log["time"].max() < config.end_s
    organic = organic_log(config.out)
    assert len(organic) == summary.organic and organic["time"].is_sorted()
    moments = pl.concat([log.select("user_id", "time"), organic.select("user_id", "time")])
    assert moments.is_duplicated().sum() == 0  # so a request is known by its user and time
    events = summary.requests + summary.organic
    assert events == pytest.approx(config.num_users * config.events_per_user_day * config.num_days, rel=0.1)
    assert summary.requests / events == pytest.approx(config.request_share, abs=0.01)
    hourly = np.bincount(log["hour"], minlength=24)
    assert hourly[17] > 2 * hourly[1]  # days and nights
    assert (log["request_id"].diff().drop_nulls() > 0).all()


def test_conversions_that_lie_after_the_end_are_not_in_the_log(market):
    config, summary, log, truth = market
    drawn = luck(config, 0, truth.user_numbers(log["user_id"].to_arrow()), log["time"].to_numpy())
    true = true_outcomes(truth, log)
    clicked = drawn.click_N < true.ctr
    assert (log["clicked"].to_numpy() == clicked).all()
    converts = clicked & (drawn.conversion_N < true.cvr)
    happened = log["time"].to_numpy() + drawn.delay_N < config.end_s
    assert (log["converted"].to_numpy() == (converts & happened)).all()
    assert (converts & ~happened).sum() == summary.late_conversions > 0
    hours = drawn.delay_N / 3600
    assert np.median(hours) == pytest.approx(config.conversion_delay_hours, rel=0.05)
    assert np.quantile(hours, 0.95) > 48 and np.quantile(hours, 0.05) < 4  # hours to days
    last_day = log["time"].to_numpy() >= config.end_s - DAY_S
    assert happened[~last_day].mean() > 0.85 > 0.5 > happened[last_day].mean()


# --- what can be learned ----------------------------------------------------------------------------------------------------------


def test_clicks_follow_the_true_rates_and_predictions_err(market):
    _, _, log, truth = market
    ctr, clicked = true_outcomes(truth, log).ctr, log["clicked"].to_numpy()
    for part in np.array_split(np.argsort(ctr), 10):
        assert abs(clicked[part].sum() - ctr[part].sum()) < 4 * np.sqrt((ctr[part] * (1 - ctr[part])).sum())
    error = np.log(log["pctr"].to_numpy() / ctr)
    assert 0.3 < error.std() < 1.5
    correlation = np.corrcoef(np.log(log["pctr"]), np.log(ctr))[0, 1]
    assert 0.4 < correlation < 0.95


def test_position_bias_is_recovered_by_regression(market):
    """Slots are drawn at random, so a logistic regression of clicks on slots, given the ad's logit without a slot, finds the effects."""
    config, _, log, truth = market
    num_slots = len(config.slot_effects)
    slots = log["slot"].to_numpy()
    counts = np.bincount(slots, minlength=num_slots)
    assert (abs(counts - len(log) / num_slots) < 4 * np.sqrt(len(log) / num_slots)).all()
    no_slot = truth.outcomes(log["user_id"].to_arrow(), log["time"].to_numpy(), log["ad_id"].to_arrow(), np.zeros(len(log), int)).ctr
    offset, clicked, dummies = np.log(no_slot / (1 - no_slot)), log["clicked"].to_numpy(), np.eye(num_slots)[slots]
    effect = np.zeros(num_slots)
    for _ in range(20):  # Newton
        rate = 1 / (1 + np.exp(-(offset + dummies @ effect)))
        information = dummies.T @ (dummies * (rate * (1 - rate))[:, None])
        effect += np.linalg.solve(information, dummies.T @ (clicked - rate))
    error = np.sqrt(np.diag(np.linalg.inv(information)))
    assert error.max() < 0.12  # or the next line would say little
    assert (abs(effect - config.slot_effects) < 4 * error).all()


def hit_rate(scores_of, requests, num_ads):
    return np.mean([ad in np.argpartition(-scores_of(user, last), 10)[:10] for user, last, ad in requests])


def test_sequences_beat_popularity(market):
    """Next ad by the topic of the one before, or by what the user saw before, against popularity: HitR@10 on the last day."""
    config, _, log, truth = market
    topic_A = truth.world.ad_topic_A.astype(int)
    table = log.sort("user_id", "time").with_columns(ad=truth.ad_numbers(log.sort("user_id", "time")["ad_id"].to_arrow()))
    table = table.with_columns(last=pl.col("ad").shift(1).over("user_id")).drop_nulls("last")
    train, test = table.filter(pl.col("time") < config.end_s - DAY_S), table.filter(pl.col("time") >= config.end_s - DAY_S)
    popularity = np.bincount(train["ad"], minlength=config.num_ads).astype(float)
    follows = np.zeros((config.num_topics, config.num_topics))
    np.add.at(follows, (topic_A[train["last"]], topic_A[train["ad"]]), 1)
    lift = follows / follows.sum(0)
    seen = {user: np.bincount(ads, minlength=config.num_ads) for user, ads in train.group_by("user_id").agg("ad").iter_rows()}
    requests = list(test.select("user_id", "last", "ad").iter_rows())
    popular = hit_rate(lambda user, last: popularity, requests, config.num_ads)
    markov = hit_rate(lambda user, last: popularity * lift[topic_A[last]][topic_A], requests, config.num_ads)
    personal = hit_rate(lambda user, last: seen.get(user, 0) + 1e-4 * popularity, requests, config.num_ads)
    assert len(requests) > 1000 and markov > 1.3 * popular and personal > 1.1 * popular


def test_values_differ_between_ads(market):
    """Bids and rates vary, and the best eligible ads are worth much more than those the logging policy chose: there is value to learn."""
    config, _, log, truth = market
    bids = pl.read_parquet(config.out / "items.parquet")["bid"].drop_nulls().to_numpy()
    assert 0.5 < np.log(bids).std() < 1.2
    sample = log.sample(300, seed=0)
    items, targeting = pl.read_parquet(config.out / "items.parquet"), pl.read_parquet(config.out / "targeting.parquet")
    ads = items.filter(pl.col("kind") == "ad")["item_id"].to_numpy()
    every = np.broadcast_to(ads, (300, len(ads)))
    true = truth.outcomes(sample["user_id"].to_arrow(), sample["time"].to_numpy(), every, sample["slot"].to_numpy())
    of_group = {group: np.isin(ads, members) for group, members in targeting.group_by("group").agg("item_id").iter_rows()}
    eligible = np.stack([of_group[group] for group in sample["group"]])
    best = np.where(eligible, true.ecpm, 0).max(1).mean()
    shown = true_outcomes(truth, sample).ecpm.mean()
    assert best > 1.8 * shown and shown > 4 * true.ecpm[eligible].mean()


# --- files and settings -----------------------------------------------------------------------------------------------------------


def test_an_unchanged_market_is_recognised_and_other_folders_are_left_alone(tmp_path, market):
    config, summary, _, _ = market
    assert is_made(config) and not is_made(config.model_copy(update={"seed": 5}))
    text = describe(config, summary)
    assert f"{summary.requests + summary.organic:,} events" in text and "GB of memory" in describe_plan(config)
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match=r"thesis\.tex"):
        make_market(config.model_copy(update={"out": tmp_path}))
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("changes, words", [
    ({"num_advertisers": 301}, "num_advertisers=301"), ({"num_segments": 60, "num_placements": 60}, "eligibility groups"),
    ({"slot_effects": []}, "slot_effects"), ({"logging": {"need_share": 0.7, "taste_share": 0.7}}, "more than 1"),
    ({"num_topics": 250, "num_ads": 200}, "num_topics=250"),
])
def test_settings_that_contradict_each_other(changes, words, tmp_path):
    with pytest.raises(ConfigError, match=words):
        small_market(tmp_path, **changes)


def test_defaults_are_valid(tmp_path):
    assert build_config(type(small_market(tmp_path)), {"out": tmp_path}, "defaults").num_groups > 1
