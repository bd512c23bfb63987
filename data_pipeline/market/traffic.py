"""Who comes when: the sessions of a day, their events, and what organic content is consumed. Independent of ads and of what they cost."""

# N events of a day, in the order of users and time  R ad requests in time order  M organic events in time order  S sessions

from dataclasses import dataclass

import numpy as np

from data_pipeline.market.config import DAY_S, MarketConfig
from data_pipeline.market.randomness import generator, keys, spread, uniform
from data_pipeline.market.world import World

_HOURLY = np.array([2, 2, 3, 5, 7, 8, 8, 8, 9, 10, 9, 8, 8, 8, 9, 10, 12, 13, 12, 10, 7, 5, 3, 2], float)  # the market's night is 0:00 UTC
_MEAN_GAP_S = 40.0
_MAX_SESSION_EVENTS = 100
_CHUNK = 1 << 15


@dataclass(frozen=True)
class Visits:
    """Moments at which something is shown or consumed, in time order. A user never has two at the same second."""

    user_N: np.ndarray  # int64
    time_N: np.ndarray  # int64, seconds since 1970
    placement_N: np.ndarray  # uint8

    def __len__(self) -> int:
        return len(self.user_N)

    def __getitem__(self, rows: slice | np.ndarray) -> "Visits":
        return Visits(self.user_N[rows], self.time_N[rows], self.placement_N[rows])


def visits_of_day(world: World, day: int) -> tuple[Visits, Visits]:
    """Ad requests and organic events of a day (0-based). Times stay within the day: sessions end at midnight."""
    config, rng = world.config, generator(world.config.seed, "traffic", day)
    weekday = 1.15 if (config.start.weekday() + day) % 7 >= 5 else 0.94
    user_S = np.repeat(np.arange(config.num_users), rng.poisson(world.user_sessions_U * weekday))
    cumulative = np.concatenate([[0.0], np.cumsum(_HOURLY / _HOURLY.sum())])
    start_S = np.floor(np.interp(rng.random(len(user_S)), cumulative, np.arange(25) * 3600.0)).astype(np.int64)
    order = np.argsort(user_S * DAY_S + start_S, kind="stable")
    user_S, start_S = user_S[order], start_S[order]
    placement_S = rng.integers(config.num_placements, size=len(user_S)).astype(np.uint8)
    count_S = np.minimum(1 + rng.poisson(config.session_events - 1, len(user_S)), _MAX_SESSION_EVENTS)
    session_N = np.repeat(np.arange(len(user_S)), count_S)
    gap_N = 1 + np.floor(rng.exponential(_MEAN_GAP_S, len(session_N))).astype(np.int64)
    is_request_N = rng.random(len(session_N)) < config.request_share
    run_N = np.cumsum(gap_N)
    first_S = np.cumsum(count_S) - count_S
    time_N = start_S[session_N] + run_N - (run_N - gap_N)[first_S][session_N]
    return _in_time_order(config, day, user_S[session_N], time_N, placement_S[session_N], is_request_N)


def _in_time_order(config: MarketConfig, day: int, user_N: np.ndarray, time_N: np.ndarray, placement_N: np.ndarray,
                   is_request_N: np.ndarray) -> tuple[Visits, Visits]:
    """Make the times of each user distinct, drop what falls behind midnight, sort by time."""
    room = 1 << 20  # seconds between the times of two users while they are made distinct, more than a day
    order = np.argsort(user_N * room + time_N, kind="stable")
    number = np.arange(len(order))
    moment_N = np.maximum.accumulate((user_N * room + time_N)[order] - number) + number
    user_N = user_N[order]
    time_N = moment_N - user_N * room
    order = order[time_N < DAY_S]
    user_N, time_N = user_N[time_N < DAY_S], time_N[time_N < DAY_S]
    by_time = np.argsort(time_N.astype(np.int32), kind="stable")  # ties stay in the order of users
    user_N, time_N, source = user_N[by_time], time_N[by_time] + config.start_s + day * DAY_S, order[by_time]
    request = is_request_N[source]
    placement = placement_N[source]
    return (Visits(user_N[request], time_N[request], placement[request]), Visits(user_N[~request], time_N[~request], placement[~request]))


def consumed_items(world: World, organic: Visits) -> np.ndarray:
    """Organic items int64 [M]: of the current need's topic, its successor's, or a long-term one; popular ones, and those to the taste."""
    parts = [_consumed(world, organic[slice(first, first + _CHUNK)]) for first in range(0, len(organic), _CHUNK)]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _consumed(world: World, organic: Visits) -> np.ndarray:
    hashes = spread(keys(world.config.seed, "organic", organic.user_N, organic.time_N), 4)
    which, topic_draw, first_draw, second_draw = uniform(hashes).T
    interest, need = world.interest(organic.user_N, organic.time_N), world.need(organic.user_N, organic.time_N)
    topic = np.where(which < 0.5, need, world.follows_T3[need, 0]).astype(np.int64)
    rest = np.flatnonzero(which >= 0.6)
    topic[rest] = world.draw_topic(interest[rest], topic_draw[rest, None])[:, 0]
    bounds = np.searchsorted(world.organic_topic_O, np.arange(world.config.num_topics + 1))
    first, size = bounds[topic], np.diff(bounds)[topic]
    pick_M2 = first[:, None] + np.floor(size[:, None] ** np.stack([first_draw, second_draw], 1) - 1e-9).astype(np.int64)  # Zipf-like
    pick_M2 = np.minimum(pick_M2, (first + size - 1)[:, None])
    liking = np.einsum("nkd,nd->nk", world.organic_vector_OD[pick_M2], interest)
    return np.where(liking[:, 0] >= liking[:, 1], pick_M2[:, 0], pick_M2[:, 1])
