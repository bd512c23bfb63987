"""The market's truth: expected outcomes, and what policies earn that serve it."""

import numpy as np
import pyarrow as pa
import pytest
from small_market import ad_log, small_market

from data_pipeline.market.config import DAY_S
from data_pipeline.market.world import build_world
from data_pipeline.synthetic import Requests, Truth, make_market
from gpr_dist.errors import DataError

NUM_RANKED = 8


@pytest.fixture(scope="module")
def market(tmp_path_factory):
    config = small_market(tmp_path_factory.mktemp("market") / "raw", budget=1e6)  # budgets never end
    make_market(config)
    return config, Truth.load(config.out)


@pytest.fixture(scope="module")
def scarce(tmp_path_factory):
    config = small_market(tmp_path_factory.mktemp("market") / "raw", budget=0.5, num_days=3)
    make_market(config)
    return config, Truth.load(config.out)


def last_day(config, truth):
    return truth.requests(config.end_s - DAY_S, config.end_s)


def ad_ids(config):
    return np.array([f"ad-{number:07d}" for number in range(config.num_ads)], object)


def every_ecpm(config, truth, requests):
    every = np.broadcast_to(ad_ids(config), (len(requests), config.num_ads))
    return truth.outcomes(requests.user_id, requests.time, every, requests.slot).ecpm


def eligible_ads(config, truth, requests):
    """bool [B, A]."""
    world = truth.world
    names = [f"flight{f}-segment{s}-placement{p}" for f in range(config.num_flights) for s in range(config.num_segments)
             for p in range(config.num_placements)]
    members = {name: np.isin(np.arange(config.num_ads), world.eligible_ads(number)) for number, name in enumerate(names)}
    return np.stack([members[name] for name in requests.group.to_pylist()])


def best_first(config, score):
    return ad_ids(config)[np.argsort(-score, axis=1, kind="stable")[:, :NUM_RANKED]]


def columns(served):
    """What a policy earned, without the arrays."""
    return {name: value for name, value in vars(served).items() if not isinstance(value, np.ndarray)}


# --- outcomes ---------------------------------------------------------------------------------------------------------------------


def test_outcomes_of_random_ads_have_the_rates_of_the_config(market):
    config, truth = market
    rng = np.random.default_rng(0)
    user = np.array([f"user-{number:07d}" for number in rng.integers(config.num_users, size=20_000)])
    ads, slots = rng.choice(ad_ids(config), 20_000), rng.integers(len(config.slot_effects), size=20_000)
    true = truth.outcomes(user, rng.integers(config.start_s, config.end_s, 20_000), ads, slots)
    assert true.ctr.mean() == pytest.approx(config.ctr, rel=0.08)
    assert np.average(true.cvr, weights=true.ctr) == pytest.approx(config.cvr, rel=0.08)
    np.testing.assert_allclose(true.ecpm, 1000 * true.ctr * true.bid)
    np.testing.assert_allclose(true.value, true.ecpm + 1000 * true.ctr * true.cvr * config.conversion_worth * true.bid)


def test_outcomes_are_the_formula(market):
    """Written out for single (user, time, ad, slot)."""
    config, truth = market
    world, rng = truth.world, np.random.default_rng(1)
    for _ in range(20):
        user, ad, slot = int(rng.integers(config.num_users)), int(rng.integers(config.num_ads)), int(rng.integers(4))
        time = int(rng.integers(config.start_s, config.end_s + 30 * DAY_S))  # later than the log is allowed: requests to come
        angle = world.user_phase_U[user] + world.user_speed_U[user] * (time - config.start_s) / DAY_S
        z = np.cos(angle) * world.user_interest_U2D[user, 0] + np.sin(angle) * world.user_interest_U2D[user, 1]
        epoch = (time - config.start_s + int(world.user_shift_U[user])) // (config.need_hours * 3600)
        need = world.need_UE[user, min(int(epoch), world.need_UE.shape[1] - 1)]
        liking, meets = z @ world.ad_vector_AD[ad], world.affinity_TT[need, world.ad_topic_A[ad]]
        click = (world.bases_2[0] + world.ad_quality_A[ad] + config.taste_weight * liking + config.need_weight * meets
                 + config.slot_effects[slot])
        conversion = world.bases_2[1] + world.ad_conversion_quality_A[ad] + 1.5 * liking + 0.5 * meets
        true = truth.outcomes([f"user-{user:07d}"], [time], [f"ad-{ad:07d}"], [slot])
        np.testing.assert_allclose([true.ctr[0], true.cvr[0]], 1 / (1 + np.exp(-np.array([click, conversion]))), rtol=1e-4)


def test_outcomes_of_several_ads_are_those_of_each(market):
    config, truth = market
    requests = last_day(config, truth).take(np.arange(50))
    ranked = np.random.default_rng(2).choice(ad_ids(config), (50, 5))
    ranked[3, 2], ranked[4, 0] = None, ""
    together = truth.outcomes(requests.user_id, requests.time, ranked, requests.slot)
    for column in range(5):
        alone = truth.outcomes(requests.user_id, requests.time, ranked[:, column], requests.slot)
        for name in vars(together):
            np.testing.assert_array_equal(getattr(together, name)[:, column], getattr(alone, name))
    assert together.ecpm[3, 2] == together.value[4, 0] == together.bid[4, 0] == 0 and (together.ctr > 0).sum() == 248


def test_needs_follow_the_chain_and_interests_drift_slowly(market):
    config, truth = market
    world = truth.world
    before, after = world.need_UE[:, :-1].ravel(), world.need_UE[:, 1:].ravel()
    stays = (before == after).mean()
    assert config.need_stay < stays < config.need_stay + 0.1  # a fresh need may be the old one
    moved = before != after
    follows = (world.follows_T3[before[moved], 0] == after[moved]).mean()
    assert follows == pytest.approx(0.6 * config.need_chain, abs=0.06)
    users = np.arange(config.num_users)
    moments = [np.full(config.num_users, config.start_s + days * DAY_S) for days in (0, 1, 30)]
    now, tomorrow, later = (world.interest(users, moment) for moment in moments)
    cosine = [(now * other).sum(1) / np.linalg.norm(now, axis=1) / np.linalg.norm(other, axis=1) for other in (tomorrow, later)]
    assert np.median(cosine[0]) > 0.99 and np.median(cosine[1]) < 0.6


def test_the_saved_world_is_the_built_one(market):
    config, truth = market
    built = build_world(config)
    for name, value in vars(built).items():
        if name != "config":
            np.testing.assert_array_equal(value, getattr(truth.world, name))


# --- serving ----------------------------------------------------------------------------------------------------------------------


def test_serving_the_logged_ads_again_gives_the_logged_clicks(market):
    config, truth = market
    requests, log = truth.requests(config.start_s, config.end_s), ad_log(config.out)
    assert requests.request_id.tolist() == log["request_id"].to_list()
    served = truth.serve(requests, np.array(requests.ad_id.to_pylist(), object)[:, None], seed=0)
    assert served.clicks == log["clicked"].sum() > 100 and served.num_filled == len(log) and served.num_ineligible == 0
    assert served.conversions > log["converted"].sum()  # also those after the end of the log
    assert served.revenue == pytest.approx(config.reserve * served.clicks)  # nobody else was ranked
    assert (served.shown_B == 0).all() and served.spend_V.sum() == pytest.approx(served.revenue)


def test_what_the_logging_policy_earned(market, scarce):
    config, truth = market
    requests, log = truth.requests(config.start_s, config.end_s), ad_log(config.out)
    served = truth.serve_logged(requests, seed=0)
    paid = log.filter("clicked")["price"].cast(float).sum()
    assert served.clicks == log["clicked"].sum() and served.revenue == pytest.approx(paid, rel=1e-5)
    assert abs(served.expected_revenue - served.revenue) < 0.15 * served.revenue  # some hundred clicks
    alone = truth.serve(requests, np.array(requests.ad_id.to_pylist(), object)[:, None], seed=0)
    for name in ("clicks", "conversions", "expected_clicks", "expected_conversions", "expected_value", "num_filled"):
        assert getattr(served, name) == pytest.approx(getattr(alone, name)), name
    np.testing.assert_allclose(served.expected_value_B, alone.expected_value_B)
    assert served.expected_value_B.sum() == pytest.approx(served.expected_value)
    config, truth = scarce
    ended = truth.serve_logged(truth.requests(config.start_s, config.end_s), seed=0)
    assert ended.num_exhausted > 10 and ended.spend_V.sum() == pytest.approx(ended.revenue)


def test_expected_revenue_is_the_smaller_of_two_offers(market):
    """The shown ad pays what the runner-up offers for the impression, and never more than it offers itself."""
    config, truth = market
    requests = last_day(config, truth)
    eligible = eligible_ads(config, truth, requests)
    ecpm = np.where(eligible, every_ecpm(config, truth, requests), -np.inf)
    for score in (ecpm, np.where(eligible, np.random.default_rng(3).random(ecpm.shape), -np.inf)):
        order = np.argsort(-score, axis=1, kind="stable")[:, :2]
        served = truth.serve(requests, ad_ids(config)[order])
        first, second = np.take_along_axis(ecpm, order, 1).T / 1000
        floor = first / (world_bid := truth.world.ad_bid_A[order[:, 0]] / 1e6) * config.reserve  # the reserve, per impression
        np.testing.assert_allclose(served.expected_revenue_B, np.clip(second, floor, first), atol=3e-6)  # money is in millionths
        assert served.expected_revenue == pytest.approx(served.expected_revenue_B.sum())
        assert served.expected_clicks == pytest.approx((first / world_bid).sum())


def test_draws_scatter_around_the_expectation(market):
    config, truth = market
    requests = last_day(config, truth).take(np.arange(800))
    ranked = best_first(config, np.where(eligible_ads(config, truth, requests), every_ecpm(config, truth, requests), 0))
    draws = [truth.serve(requests, ranked, seed=seed) for seed in range(30)]
    for drawn, expected in (("revenue", "expected_revenue"), ("clicks", "expected_clicks"), ("conversions", "expected_conversions")):
        values = np.array([getattr(draw, drawn) for draw in draws])
        assert abs(values.mean() - getattr(draws[0], expected)) < 4 * values.std() / np.sqrt(len(draws)) and values.std() > 0
    assert columns(truth.serve(requests, ranked, seed=5)) == columns(draws[5])


def test_better_policies_earn_more(market):
    config, truth = market
    requests = last_day(config, truth)
    eligible, ecpm = eligible_ads(config, truth, requests), every_ecpm(config, truth, requests)
    noise = np.random.default_rng(4).standard_normal(ecpm.shape)
    earned = [truth.serve(requests, best_first(config, np.where(eligible, np.log(ecpm) + scale * noise, -np.inf))).expected_revenue
              for scale in (0, 0.5, 1.5, 50)]
    assert earned[0] > 1.05 * earned[1] > 1.3 * earned[2] > 2 * earned[3] > 0
    by_clicks = truth.serve(requests, best_first(config, np.where(eligible, ecpm / truth.world.ad_bid_A, -np.inf)))
    best = truth.serve(requests, best_first(config, np.where(eligible, ecpm, -np.inf)))
    assert by_clicks.expected_clicks > 1.1 * best.expected_clicks and by_clicks.expected_revenue < 0.9 * best.expected_revenue


def test_ads_that_may_not_be_shown_are_left_out_and_counted(market):
    config, truth = market
    requests = last_day(config, truth).take(np.arange(200))
    eligible = eligible_ads(config, truth, requests)
    allowed = ad_ids(config)[eligible.argmax(1)]
    forbidden = ad_ids(config)[(~eligible).argmax(1)]
    served = truth.serve(requests, np.stack([forbidden, allowed], 1))
    assert served.num_ineligible == 200 and (served.shown_B == 1).all()
    nothing = truth.serve(requests, np.stack([forbidden, np.full(200, None)], 1))
    assert nothing.num_filled == nothing.revenue == nothing.expected_value == nothing.clicks == 0 and (nothing.shown_B == -1).all()


def test_budgets_bind_and_the_order_of_the_requests_given_does_not_matter(scarce):
    config, truth = scarce
    requests = truth.requests(config.end_s - 2 * DAY_S, config.end_s)
    ranked = best_first(config, np.where(eligible_ads(config, truth, requests), every_ecpm(config, truth, requests), -np.inf))
    served = truth.serve(requests, ranked)
    largest_bid = truth.world.ad_bid_A.max() / 1e6
    assert (served.spend_V < 2 * (truth.world.budget_V / 1e6 + largest_bid)).all() and served.num_exhausted > 10
    assert (served.shown_B > 0).mean() > 0.1  # the ads behind the first take over
    half = truth.serve(requests, ranked, budget_frac=0.5)
    assert half.num_exhausted > served.num_exhausted and half.revenue < served.revenue
    unlimited = truth.serve(requests, ranked, budget_frac=np.inf)
    assert unlimited.num_exhausted == 0 and (unlimited.shown_B == 0).all() and unlimited.expected_revenue > served.expected_revenue
    mixed = np.random.default_rng(5).permutation(len(requests))
    again = truth.serve(requests.take(mixed), ranked[mixed])
    assert columns(again) == pytest.approx(columns(served))
    assert (again.shown_B == served.shown_B[mixed]).all() and (again.expected_revenue_B == served.expected_revenue_B[mixed]).all()
    single = truth.requests(config.end_s - DAY_S, config.end_s)  # each day has its own budgets
    assert truth.serve(single, ranked[-len(single):]).revenue < served.revenue


# --- bad input --------------------------------------------------------------------------------------------------------------------


def test_what_is_not_of_this_market_is_refused(market, tmp_path):
    config, truth = market
    requests = last_day(config, truth).take(np.arange(2))
    with pytest.raises(DataError, match="ad 'ad-x' is not of this market"):
        truth.outcomes(requests.user_id, requests.time, ["ad-0000001", "ad-x"], requests.slot)
    with pytest.raises(DataError, match="user '' is not"):
        truth.outcomes(["user-0000001", ""], requests.time, ["ad-0000001", None], requests.slot)
    with pytest.raises(DataError, match="slots 0 to 9"):
        truth.outcomes(requests.user_id, requests.time, ["ad-0000001", None], [0, 9])
    with pytest.raises(DataError, match="one row of ads per request"):
        truth.serve(requests, ["ad-0000001", "ad-0000002"])
    with pytest.raises(DataError, match="has no request in"):
        truth.requests(config.end_s, config.end_s + DAY_S)
    with pytest.raises(DataError, match=r"launch/make_market\.py"):
        Truth.load(tmp_path)
    strange = Requests(**(vars(requests) | {"group": pa.array(["flight0-segment0-placement9"] * 2)}))
    with pytest.raises(DataError, match="eligibility group 'flight0-segment0-placement9'"):
        truth.serve(strange, np.array([["ad-0000001"]] * 2, object))
