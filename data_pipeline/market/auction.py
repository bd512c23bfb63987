"""The second-price auction with daily budgets, exactly as if requests were served one after another, but computed for many at once.

An advertiser takes part in a request when it has spent less than its budget before it; so a budget is overspent by less than the
price of one click. Money is whole millionths, so that the result does not depend on how many requests are settled together.
"""

# R requests in time order  K ads offered to each  V advertisers

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Offers:
    """The ads that compete at each request. Money in MICRO of world.py."""

    ad_RK: np.ndarray  # integers; an ad may be there twice, it never competes with itself
    advertiser_RK: np.ndarray  # integers
    score_RK: np.ndarray  # float; the highest wins, the next sets the price; -inf = does not compete
    ctr_RK: np.ndarray  # float, the click rates by which the runner-up's offer becomes a price per click
    bid_RK: np.ndarray  # int64, per click

    def __getitem__(self, rows: slice) -> "Offers":
        return Offers(self.ad_RK[rows], self.advertiser_RK[rows], self.score_RK[rows], self.ctr_RK[rows], self.bid_RK[rows])


@dataclass(frozen=True)
class Settled:
    """Outcome of the auctions."""

    column_R: np.ndarray  # int64 into K, the winner; -1 = nobody competed
    price_R: np.ndarray  # int64, price of a click; reserve <= price <= the winner's bid
    charge_R: np.ndarray  # int64, what was spent


def settle(offers: Offers, charge: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray], reserve: int, spent_V: np.ndarray,
           budget_V: np.ndarray) -> Settled:
    """Settle requests in order and add what is spent to `spent_V` (int64, MICRO).

    The winner pays, per click, what the runner-up offers per impression divided by the winner's click rate (generalised second price),
    at least the reserve and at most its own bid.

    When a budget ends depends on who won before, and who wins on which budgets have ended. Both follow from the requests before, so
    repeating the two steps fixes at least one further end of a budget each time, and stops at the sequential result.

    Args: charge: (rows, columns, prices) -> int64 money spent at each of these requests; must give the same for the same arguments.
    """
    rows = np.arange(len(offers.ad_RK))
    out_V = np.where(spent_V >= budget_V, 0, _NEVER)  # first request of this call in which the advertiser does not take part
    while True:
        column_R, price_R = _auction(offers, out_V, reserve)
        sold = np.flatnonzero(column_R >= 0)
        charge_R = np.zeros(len(rows), np.int64)
        charge_R[sold] = charge(sold, column_R[sold], price_R[sold])
        paying = np.flatnonzero(charge_R > 0)
        payer = offers.advertiser_RK[paying, column_R[paying]]
        ends_V = _ends(paying, payer, charge_R[paying], spent_V, budget_V)
        if np.array_equal(ends_V, out_V):
            np.add.at(spent_V, payer, charge_R[paying])
            return Settled(column_R, price_R, charge_R)
        out_V = ends_V


def _auction(offers: Offers, out_V: np.ndarray, reserve: int) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(len(offers.ad_RK))
    score_RK = offers.score_RK
    if (out_V != _NEVER).any():
        score_RK = np.where(out_V[offers.advertiser_RK] > rows[:, None], score_RK, -np.inf)
    winner_R = score_RK.argmax(1)
    sold_R = score_RK[rows, winner_R] > -np.inf
    others_RK = np.where(offers.ad_RK == offers.ad_RK[rows, winner_R][:, None], -np.inf, score_RK)
    second_R = others_RK.argmax(1)
    contested_R = others_RK[rows, second_R] > -np.inf
    bid_R = offers.bid_RK[rows, winner_R]
    ratio_R = offers.ctr_RK[rows, second_R].astype(np.float64) / offers.ctr_RK[rows, winner_R]
    price_R = np.where(contested_R, np.floor(offers.bid_RK[rows, second_R] * np.where(contested_R, ratio_R, 0)), 0)
    price_R = np.clip(price_R, reserve, np.maximum(bid_R, reserve)).astype(np.int64)
    return np.where(sold_R, winner_R, -1), np.where(sold_R, np.minimum(price_R, bid_R), 0)


def _ends(paying: np.ndarray, payer: np.ndarray, charge: np.ndarray, spent_V: np.ndarray, budget_V: np.ndarray) -> np.ndarray:
    """For each advertiser the request after the one with which its spending reaches the budget."""
    ends_V = np.where(spent_V >= budget_V, 0, _NEVER)
    order = np.argsort(payer, kind="stable")
    who, total = payer[order], np.cumsum(charge[order])
    starts = np.flatnonzero(np.diff(who, prepend=-1))
    before = np.repeat((total - charge[order])[starts], np.diff(np.append(starts, len(who))))
    reached = np.flatnonzero(spent_V[who] + total - before >= budget_V[who])
    np.minimum.at(ends_V, who[reached], paying[order][reached] + 1)
    return ends_V
