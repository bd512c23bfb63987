"""The world of the synthetic market: who the users are, what they want when, what the ads are, and the true rates that follow.

Owns everything that is true whatever is logged or served: nothing here depends on the logging policy, and every rate can be computed
for any user, moment, ad and slot without replaying anything. Traffic, auction and logs are built on top of it.

A user has long-term interests z(t) = a cos θ(t) + b sin θ(t), which turn slowly from one interest to another, and a current need: a
topic that may change every few hours, mostly to one of the successors of its topic (the chain a sequence model can learn). For user u,
ad i of topic k, slot s:

    click logit      = base + quality_i + taste_weight · z_u(t)·v_i + need_weight · affinity(need_u(t), k) + slot_effect_s
    conversion logit = base' + quality'_i + 1.5 z_u(t)·v_i + 0.5 affinity(need_u(t), k)
"""

# U users  A ads  V advertisers  O organic items  T topics  D latent size  E epochs of needs  G eligibility groups  S segments  N, R rows

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from data_pipeline.market.config import DAY_S, MarketConfig
from data_pipeline.market.randomness import generator
from gpr_dist.config import build_config
from gpr_dist.errors import DataError
from gpr_dist.schema import write_atomic

MICRO = 1_000_000  # money is counted in whole millionths, so that sums do not depend on their order
_TOPIC_SHARPNESS = 8.0  # long-term topics: softmax(_TOPIC_SHARPNESS · z·c)
_FOLLOWS = np.array([0.6, 0.3, 0.1], np.float32)  # how often each of the three successors of a topic follows
_FOLLOWING_AFFINITY = np.array([0.5, 0.25, 0.1], np.float32)
_CALIBRATION_PAIRS = 1 << 17
_BLOCK = 1 << 16


@dataclass(frozen=True)
class World:
    """Latent state and true parameters, as arrays; saved one file per array."""

    config: MarketConfig
    topic_TD: np.ndarray  # float32, unit vectors
    follows_T3: np.ndarray  # uint8, successors of a need
    affinity_TT: np.ndarray  # float32 [need, topic], 0..1
    user_interest_U2D: np.ndarray  # float32, the two ends of the drift
    user_phase_U: np.ndarray  # float32, radians at the start
    user_speed_U: np.ndarray  # float32, radians per day
    user_segment_U: np.ndarray  # uint8
    user_sessions_U: np.ndarray  # float32, mean sessions per day
    user_shift_U: np.ndarray  # int32, seconds by which the user's epochs of need start earlier
    need_UE: np.ndarray  # uint8, topic
    ad_vector_AD: np.ndarray  # float32, unit vectors
    ad_topic_A: np.ndarray  # uint8
    ad_quality_A: np.ndarray  # float32, logits
    ad_conversion_quality_A: np.ndarray  # float32, logits
    ad_advertiser_A: np.ndarray  # int32
    ad_bid_A: np.ndarray  # int64, MICRO per click
    ad_flights_A2: np.ndarray  # int32, first and last flight
    ad_segments_AS: np.ndarray  # bool, targeted
    ad_placements_AP: np.ndarray  # bool
    budget_V: np.ndarray  # int64, MICRO per day
    organic_vector_OD: np.ndarray  # float32
    organic_topic_O: np.ndarray  # uint8, ascending
    bases_2: np.ndarray  # float64, click and conversion logits of the average

    def interest(self, user_N: np.ndarray, time_N: np.ndarray) -> np.ndarray:
        """Long-term interests float32 [N, D] at times in seconds."""
        angle = self.user_phase_U[user_N] + self.user_speed_U[user_N] * ((time_N - self.config.start_s) / DAY_S).astype(np.float32)
        ends = self.user_interest_U2D[user_N]
        return ends[:, 0] * np.cos(angle)[:, None] + ends[:, 1] * np.sin(angle)[:, None]

    def need(self, user_N: np.ndarray, time_N: np.ndarray) -> np.ndarray:
        """Topic uint8 [N] of the current need; after the end of the log the last one stays."""
        seconds = time_N - self.config.start_s + self.user_shift_U[user_N]
        epoch = np.clip(seconds // _epoch_s(self.config), 0, self.need_UE.shape[1] - 1)
        return self.need_UE[user_N, epoch]

    def draw_topic(self, interest_ND: np.ndarray, uniform_NK: np.ndarray) -> np.ndarray:
        """Topics int64 [N, K] of the long-term interests, from uniform numbers in [0, 1).

        In float64: a matrix product rounds by the number of its rows, and in float32 a draw in ten million would depend on the chunk size.
        """
        mass = interest_ND.astype(np.float64) @ (self.topic_TD.T * np.float64(_TOPIC_SHARPNESS))
        np.exp(mass, out=mass)
        np.cumsum(mass, axis=1, out=mass)
        aim = uniform_NK * mass[:, -1:]
        return np.minimum((aim[:, :, None] >= mass[:, None, :]).sum(2), mass.shape[1] - 1)

    def click_match(self, interest_RD: np.ndarray, need_R: np.ndarray, ad_RK: np.ndarray) -> np.ndarray:
        """Click logits float32 [R, K] without base and slot; those of an ad are the same to the bit beside whatever others."""
        taste = np.einsum("rkd,rd->rk", self.ad_vector_AD[ad_RK], interest_RD)  # a matrix product would round by its shape
        taste *= np.float32(self.config.taste_weight)
        taste += np.float32(self.config.need_weight) * self.affinity_TT[need_R[:, None], self.ad_topic_A[ad_RK]]
        taste += self.ad_quality_A[ad_RK]
        return taste

    def click_logit(self, match_RK: np.ndarray, slot_R: np.ndarray) -> np.ndarray:
        """Click logits float32 [R, K] in the slots of the requests."""
        effects = np.asarray(self.config.slot_effects, np.float32) + np.float32(self.bases_2[0])
        return match_RK + effects[slot_R][:, None]

    def conversion_logit(self, interest_ND: np.ndarray, need_N: np.ndarray, ad_N: np.ndarray) -> np.ndarray:
        """Logits float32 [N] of a conversion after a click."""
        taste = np.einsum("nd,nd->n", interest_ND, self.ad_vector_AD[ad_N])
        affinity = self.affinity_TT[need_N, self.ad_topic_A[ad_N]]
        return np.float32(self.bases_2[1]) + self.ad_conversion_quality_A[ad_N] + np.float32(1.5) * taste + np.float32(0.5) * affinity

    def group(self, user_N: np.ndarray, time_N: np.ndarray, placement_N: np.ndarray) -> np.ndarray:
        """Eligibility group int64 [N] of a request."""
        flight = (time_N - self.config.start_s) // (DAY_S * self.config.flight_days)
        flight = np.clip(flight, 0, self.config.num_flights - 1)
        return (flight * self.config.num_segments + self.user_segment_U[user_N]) * self.config.num_placements + placement_N

    def eligible_ads(self, group: int) -> np.ndarray:
        """Sorted numbers of the ads that may be shown in a group."""
        rest, placement = divmod(group, self.config.num_placements)
        flight, segment = divmod(rest, self.config.num_segments)
        runs = (self.ad_flights_A2[:, 0] <= flight) & (flight <= self.ad_flights_A2[:, 1])
        return np.flatnonzero(runs & self.ad_segments_AS[:, segment] & self.ad_placements_AP[:, placement])

    def is_eligible(self, group_R: np.ndarray, ad_RK: np.ndarray) -> np.ndarray:
        """bool [R, K]."""
        rest, placement = np.divmod(group_R, self.config.num_placements)
        flight, segment = np.divmod(rest, self.config.num_segments)
        runs = (self.ad_flights_A2[ad_RK, 0] <= flight[:, None]) & (flight[:, None] <= self.ad_flights_A2[ad_RK, 1])
        return runs & self.ad_segments_AS[ad_RK, segment[:, None]] & self.ad_placements_AP[ad_RK, placement[:, None]]

    def save(self, folder: Path) -> None:
        """One .npy per array, the config last."""
        folder.mkdir(parents=True, exist_ok=True)
        for field in fields(self)[1:]:
            np.save(folder / f"{field.name}.npy", getattr(self, field.name))
        write_atomic(folder / "market.json", self.config.model_dump_json(indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> "World":
        """Arrays are mapped, not read. Raises: DataError when the folder is not a market's truth."""
        try:
            config = build_config(MarketConfig, json.loads((folder / "market.json").read_text()), str(folder / "market.json"))
            arrays = {field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r", allow_pickle=False) for field in fields(cls)[1:]}
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} holds no readable truth of a market ({error}); make it with launch/make_market.py") from None
        return cls(config, **arrays)


def sigmoid(logit: np.ndarray) -> np.ndarray:
    """Of float32 or float64, in place of scipy's, which is slower for float32."""
    return 1 / (1 + np.exp(-logit))


def build_world(config: MarketConfig) -> World:
    """Draw the world of a config; the same for the same seed and sizes, whatever the logging policy."""
    topics = _topics(config)
    users = _users(config)
    ads = _ads(config, topics["topic_TD"], topics["follows_T3"])
    organic_topic_O = (np.arange(config.num_organic) * config.num_topics // config.num_organic).astype(np.uint8)
    organic = _around(generator(config.seed, "organic"), topics["topic_TD"][organic_topic_O])
    draft = World(config, **topics, **users, **ads, organic_vector_OD=organic, organic_topic_O=organic_topic_O, bases_2=np.zeros(2),
                  need_UE=np.zeros((config.num_users, _num_epochs(config)), np.uint8))
    _draw_needs(draft)
    _calibrate(draft)
    return draft


def _topics(config: MarketConfig) -> dict[str, np.ndarray]:
    rng = generator(config.seed, "topics")
    topic_TD = _unit(rng.standard_normal((config.num_topics, config.dim)))
    ring = rng.permutation(config.num_topics)
    follows_T3 = np.empty((config.num_topics, 3), np.uint8)
    follows_T3[ring] = np.stack([np.roll(ring, -step) for step in (1, 2, 3)], axis=1)
    affinity_TT = np.eye(config.num_topics, dtype=np.float32)
    for column, value in enumerate(_FOLLOWING_AFFINITY):
        affinity_TT[np.arange(config.num_topics), follows_T3[:, column]] = value
    return {"topic_TD": topic_TD, "follows_T3": follows_T3, "affinity_TT": affinity_TT}


def _users(config: MarketConfig) -> dict[str, np.ndarray]:
    rng, num_users = generator(config.seed, "users"), config.num_users
    segment_U = rng.integers(config.num_segments, size=num_users).astype(np.uint8)
    centre_SD = _unit(rng.standard_normal((config.num_segments, config.dim)))
    interest_U2D = np.empty((num_users, 2, config.dim), np.float32)
    for first in range(0, num_users, _BLOCK):
        rows = slice(first, first + _BLOCK)
        noise = _unit(rng.standard_normal((len(segment_U[rows]), 2, config.dim)))
        interest_U2D[rows] = _unit(0.5 * centre_SD[segment_U[rows]][:, None] + noise)
    activity = np.exp(0.7 * rng.standard_normal(num_users))
    return {
        "user_interest_U2D": interest_U2D,
        "user_segment_U": segment_U,
        "user_phase_U": rng.uniform(0, 2 * np.pi, num_users).astype(np.float32),
        "user_speed_U": (2 * np.pi / (config.drift_days * np.exp(0.5 * rng.standard_normal(num_users)))).astype(np.float32),
        "user_sessions_U": (activity / activity.mean() * config.events_per_user_day / config.session_events).astype(np.float32),
        "user_shift_U": rng.integers(_epoch_s(config), size=num_users).astype(np.int32),
    }


def _ads(config: MarketConfig, topic_TD: np.ndarray, follows_T3: np.ndarray) -> dict[str, np.ndarray]:
    rng, num_ads = generator(config.seed, "ads"), config.num_ads
    advertiser_A = np.concatenate([np.arange(config.num_advertisers),  # everyone has an ad, some have many
                                   np.floor(config.num_advertisers * rng.random(num_ads - config.num_advertisers) ** 1.5)]).astype(np.int32)
    home_V = rng.permutation(config.num_advertisers) % config.num_topics
    topic_A = np.where(rng.random(num_ads) < 0.6, home_V[advertiser_A], rng.integers(config.num_topics, size=num_ads)).astype(np.uint8)
    level_V = np.exp(0.6 * rng.standard_normal(config.num_advertisers))
    bid_A = config.mean_bid * level_V[advertiser_A] * np.exp(0.5 * rng.standard_normal(num_ads))
    first_A = np.where(rng.random(num_ads) < 0.6, 0, rng.integers(config.num_flights, size=num_ads))
    length_A = np.where(rng.random(num_ads) < 0.5, config.num_flights, rng.geometric(min(1.0, 2 / config.num_flights), num_ads))
    size_V = np.bincount(advertiser_A, minlength=config.num_advertisers) * np.exp(rng.standard_normal(config.num_advertisers))
    daily = config.num_users * config.events_per_user_day * config.request_share * 7 * config.ctr * 0.8 * config.mean_bid
    return {
        "ad_vector_AD": _around(rng, topic_TD[topic_A]),
        "ad_topic_A": topic_A,
        "ad_quality_A": (0.4 * rng.standard_normal(num_ads)).astype(np.float32),
        "ad_conversion_quality_A": (0.7 * rng.standard_normal(num_ads)).astype(np.float32),
        "ad_advertiser_A": advertiser_A,
        "ad_bid_A": np.rint(MICRO * np.maximum(bid_A, config.reserve)).astype(np.int64),
        "ad_flights_A2": np.stack([first_A, np.minimum(first_A + length_A - 1, config.num_flights - 1)], axis=1).astype(np.int32),
        "ad_segments_AS": _targets(rng, num_ads, config.num_segments, share=0.45),
        "ad_placements_AP": _targets(rng, num_ads, config.num_placements, share=0.7),
        "budget_V": np.rint(MICRO * config.budget * daily * size_V / size_V.sum()).astype(np.int64),
    }


def _targets(rng: np.random.Generator, num_ads: int, count: int, share: float) -> np.ndarray:
    """bool [num_ads, count], at least one each; a quarter of the ads take all."""
    targets = rng.random((num_ads, count)) < share
    targets[rng.random(num_ads) < 0.25] = True
    targets[np.arange(num_ads), rng.integers(count, size=num_ads)] = True
    return targets


def _draw_needs(world: World) -> None:
    """Fill `need_UE`, epoch by epoch: stay, go on to a successor, or start anew from the long-term interests."""
    config, users = world.config, np.arange(world.config.num_users)
    for epoch in range(world.need_UE.shape[1]):
        uniform_3U = generator(config.seed, "needs", epoch).random((3, config.num_users))
        if epoch == 0:
            anew = users
        else:
            before = world.need_UE[:, epoch - 1]
            rank = (uniform_3U[1][:, None] >= np.cumsum(_FOLLOWS)[None, :2]).sum(1)
            world.need_UE[:, epoch] = np.where(uniform_3U[0] < config.need_stay, before, world.follows_T3[before, rank])
            anew = np.flatnonzero(uniform_3U[0] >= config.need_stay + (1 - config.need_stay) * config.need_chain)
        for first in range(0, len(anew), _BLOCK):
            rows = anew[first : first + _BLOCK]
            times = config.start_s + epoch * _epoch_s(config) - world.user_shift_U[rows]
            world.need_UE[rows, epoch] = world.draw_topic(world.interest(rows, times), uniform_3U[2][rows, None])[:, 0]


def _calibrate(world: World) -> None:
    """Set the base logits so that random users and ads have the mean rates of the config (slots as they are drawn)."""
    config, rng = world.config, generator(world.config.seed, "calibration")
    user = rng.integers(config.num_users, size=_CALIBRATION_PAIRS)
    ad = rng.integers(config.num_ads, size=_CALIBRATION_PAIRS)
    slot = rng.integers(len(config.slot_effects), size=_CALIBRATION_PAIRS)
    time = rng.integers(config.start_s, config.end_s, size=_CALIBRATION_PAIRS)
    interest, need = world.interest(user, time), world.need(user, time)
    click = world.click_logit(world.click_match(interest, need, ad[:, None]), slot)[:, 0].astype(np.float64)
    conversion = world.conversion_logit(interest, need, ad).astype(np.float64)
    weight = sigmoid(click + _base_for(click, np.ones_like(click), config.ctr))  # conversions are counted per click
    world.bases_2[0] = _base_for(click, np.ones_like(click), config.ctr)
    world.bases_2[1] = _base_for(conversion, weight, config.cvr)


def _base_for(logit: np.ndarray, weight: np.ndarray, rate: float) -> float:
    low, high = -30.0, 30.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if np.average(sigmoid(logit + middle), weights=weight) < rate else (low, middle)
    return low


def _epoch_s(config: MarketConfig) -> int:
    return round(config.need_hours * 3600)


def _num_epochs(config: MarketConfig) -> int:
    return -(-config.num_days * DAY_S // _epoch_s(config)) + 1


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def _around(rng: np.random.Generator, centre_ND: np.ndarray) -> np.ndarray:
    """Unit vectors near others."""
    return _unit(centre_ND + 0.8 * _unit(rng.standard_normal(centre_ND.shape)))
