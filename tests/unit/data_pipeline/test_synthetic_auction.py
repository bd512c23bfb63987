"""The auction for many requests at once against one that serves them one after another."""

import numpy as np
import pytest

from data_pipeline.market.auction import Offers, settle
from data_pipeline.market.randomness import generator, keys, normal_of_bits, pairs, spread, uniform

RESERVE = 3


def random_offers(rng, num_requests=60, num_candidates=7, num_ads=12, num_advertisers=4):
    ad = rng.integers(num_ads, size=(num_requests, num_candidates))
    ctr = rng.uniform(0.01, 0.5, (num_requests, num_ads))[np.arange(num_requests)[:, None], ad]
    bid = rng.integers(RESERVE, 100, num_ads)[ad]
    score = np.where(rng.random(ad.shape) < 0.1, -np.inf, ctr * bid)
    return Offers(ad, (ad % num_advertisers), score, ctr, bid)


def one_by_one(offers, clicked, spent, budget):
    """The rules, request by request. Returns: winners' columns, prices, charges; adds to `spent`."""
    columns, prices, charges = [], [], []
    for request, (ads, owners, scores) in enumerate(zip(offers.ad_RK, offers.advertiser_RK, offers.score_RK, strict=True)):
        ranked = sorted((k for k in range(len(ads)) if scores[k] > -np.inf and spent[owners[k]] < budget[owners[k]]),
                        key=lambda k: (-scores[k], k))
        if not ranked:
            columns, prices, charges = [*columns, -1], [*prices, 0], [*charges, 0]
            continue
        first, others = ranked[0], [k for k in ranked if ads[k] != ads[ranked[0]]]
        price = RESERVE
        if others:
            offer = np.floor(offers.bid_RK[request, others[0]] * (offers.ctr_RK[request, others[0]] / offers.ctr_RK[request, first]))
            price = int(min(max(offer, RESERVE), offers.bid_RK[request, first]))
        charge = price if clicked[request, first] else 0
        spent[owners[first]] += charge
        columns, prices, charges = [*columns, first], [*prices, price], [*charges, charge]
    return columns, prices, charges


@pytest.mark.parametrize("seed", range(30))
def test_settling_together_is_settling_one_by_one(seed):
    rng = np.random.default_rng(seed)
    offers = random_offers(rng)
    clicked = (rng.random((len(offers.ad_RK), offers.ad_RK.max() + 1)) < 0.6)[np.arange(len(offers.ad_RK))[:, None], offers.ad_RK]
    budget = rng.integers(1, 400, 4)
    expected_spent = np.zeros(4, np.int64)
    columns, prices, charges = one_by_one(offers, clicked, expected_spent, budget)
    assert (expected_spent >= budget).any(), "the case should end some budgets"
    for step in (1, 7, len(columns)):  # however many are settled together
        spent, found = np.zeros(4, np.int64), []
        for first in range(0, len(columns), step):
            part = clicked[first : first + step]
            found.append(settle(offers[first : first + step], lambda rows, k, price, part=part: np.where(part[rows, k], price, 0),
                                RESERVE, spent, budget))
        assert np.concatenate([part.column_R for part in found]).tolist() == columns
        assert np.concatenate([part.price_R for part in found]).tolist() == prices
        assert np.concatenate([part.charge_R for part in found]).tolist() == charges
        assert spent.tolist() == expected_spent.tolist()


def test_prices_and_budgets():
    rng = np.random.default_rng(0)
    offers, spent, budget = random_offers(rng, 500), np.zeros(4, np.int64), np.array([200, 500, 0, 10**9])
    settled = settle(offers, lambda rows, k, price: price, RESERVE, spent, budget)
    sold = np.flatnonzero(settled.column_R >= 0)
    bid = offers.bid_RK[sold, settled.column_R[sold]]
    assert (settled.price_R[sold] >= RESERVE).all() and (settled.price_R[sold] <= bid).all()
    assert (settled.price_R[sold] < bid).mean() > 0.5  # a second price, not a first
    winner = offers.advertiser_RK[sold, settled.column_R[sold]]
    assert 2 not in winner and (spent < budget + 100).all() and (spent[:2] >= budget[:2]).all()
    for advertiser in (0, 1):
        paid = np.cumsum(np.where(winner == advertiser, settled.charge_R[sold], 0))
        assert (paid[winner == advertiser][:-1] < budget[advertiser]).all()  # served only while something was left


def test_nobody_and_a_single_bidder():
    offers = Offers(np.array([[1, 1], [2, 3]]), np.zeros((2, 2), int), np.array([[5.0, 5.0], [-np.inf, -np.inf]]), np.full((2, 2), 0.1),
                    np.full((2, 2), 50))
    settled = settle(offers, lambda rows, k, price: price, RESERVE, np.zeros(1, np.int64), np.array([10**6]))
    assert settled.column_R.tolist() == [0, -1] and settled.price_R.tolist() == [RESERVE, 0]  # an ad drawn twice is no competition


def test_random_numbers():
    number = np.arange(200_000)
    key = keys(1, "a", number)
    ten = np.tile(np.arange(10), (20_000, 1))
    for draws in (uniform(key), uniform(spread(key[:20_000], 10)), uniform(pairs(key[:20_000], ten))):
        assert abs(draws.mean() - 0.5) < 0.004 and abs(draws.var() - 1 / 12) < 0.002 and draws.min() >= 0 and draws.max() < 1
    assert abs(np.corrcoef(uniform(key), uniform(keys(1, "b", number)))[0, 1]) < 0.01
    assert abs(np.corrcoef(uniform(key), uniform(keys(2, "a", number)))[0, 1]) < 0.01
    assert (keys(1, "a", number[5:10]) == key[5:10]).all()  # of the row alone
    assert (keys(1, "a", number, number + 1) != keys(1, "a", number + 1, number)).all()
    normal = normal_of_bits(key)
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01
    assert generator(0, "a", 1).random() != generator(0, "a", 2).random() != generator(0, "b", 1).random()
