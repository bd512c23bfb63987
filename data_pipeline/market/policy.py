"""The logging policy: production's retrieval and rankers. They decide which ads are logged, and nothing about how ads do."""

# R requests  K candidates  A ads  D latent size  T topics

from functools import lru_cache

import numpy as np

from data_pipeline.market.auction import Offers
from data_pipeline.market.config import MarketConfig
from data_pipeline.market.randomness import generator, keys, normal_of_bits, pairs, spread, uniform
from data_pipeline.market.traffic import Visits
from data_pipeline.market.world import World, sigmoid

_DRAWN_TOPICS = 4  # different draws of long-term topics among the candidates of a request, at most
_LIVE_GROUPS = 512  # indices kept in memory: those of a flight or two


class LoggingPolicy:
    """Retrieval index and rankers of one market."""

    def __init__(self, world: World):
        self._world, config = world, world.config
        rng = generator(config.seed, "production")
        reach_A = np.floor(config.logging.max_reach ** rng.random(config.num_ads)).astype(np.int64)
        self._error_A = (config.logging.ranker_noise / 2 * rng.standard_normal(config.num_ads)).astype(np.float32)
        self._group_index = lru_cache(_LIVE_GROUPS)(lambda group: _index_of_group(world, reach_A, group))
        self._columns = _split_columns(config)

    def retrieve(self, requests: Visits, interest_RD: np.ndarray, need_R: np.ndarray) -> np.ndarray:
        """Candidates int32 [R, K], all eligible; -1 in the rows of groups without an eligible ad."""
        world, config = self._world, self._world.config
        key_R = keys(config.seed, "retrieval", requests.user_N, requests.time_N)
        draw_RX = uniform(spread(key_R, 1 + _DRAWN_TOPICS))
        topic_RX = world.draw_topic(interest_RD, draw_RX[:, 1:])
        believed_R = np.where(draw_RX[:, 0] < config.logging.belief_accuracy, need_R, topic_RX[:, 0])
        need_columns, taste_columns = self._columns
        topic_RK = np.full((len(requests), config.logging.candidates), -1, np.int64)  # -1 = any topic
        topic_RK[:, :need_columns] = believed_R[:, None]
        for column in range(need_columns, need_columns + taste_columns):
            topic_RK[:, column] = topic_RX[:, column % _DRAWN_TOPICS]
        if not len(requests):
            return np.zeros((0, config.logging.candidates), np.int32)
        group_R = world.group(requests.user_N, requests.time_N, requests.placement_N)
        groups, which_R = np.unique(group_R, return_inverse=True)
        tables, bounds = zip(*(self._group_index(int(group)) for group in groups), strict=True)
        first_of = np.cumsum([0, *(len(table) for table in tables)])
        table = np.concatenate([*tables, np.full(1, -1, np.int32)])
        bounds_GT = np.stack(bounds)
        any_topic = topic_RK < 0
        low = np.where(any_topic, 0, bounds_GT[which_R[:, None], topic_RK])
        high = bounds_GT[which_R[:, None], np.where(any_topic, config.num_topics - 1, topic_RK) + 1]
        empty = high == low  # no eligible ad of that topic: any other instead
        low = np.where(empty, 0, low)
        high = np.where(empty, bounds_GT[which_R, -1][:, None], high)
        draw_RK = uniform(spread(keys(config.seed, "candidates", requests.user_N, requests.time_N), config.logging.candidates))
        place = first_of[which_R][:, None] + low + np.floor(draw_RK * (high - low)).astype(np.int64)
        return table[np.where(high > low, place, len(table) - 1)]

    def predicted_ctr(self, requests: Visits, ad_RK: np.ndarray, match_RK: np.ndarray, slot_R: np.ndarray) -> np.ndarray:
        """pCTR float32 [R, K] from the true match: shrunk towards the average, off by a constant per ad and by noise per request and ad."""
        config = self._world.config.logging
        key_R = keys(self._world.config.seed, "ranker", requests.user_N, requests.time_N)
        seen = match_RK * np.float32(config.ranker_shrink) + self._error_A[ad_RK]
        seen += np.float32(config.ranker_noise) * normal_of_bits(pairs(key_R, ad_RK))
        return sigmoid(self._world.click_logit(seen, slot_R))

    def predicted_cvr(self, requests: Visits, ad_R: np.ndarray, logit_R: np.ndarray) -> np.ndarray:
        """pCVR float32 [R] of the winners from the true logits, with errors as those of pCTR."""
        config, base = self._world.config.logging, np.float32(self._world.bases_2[1])
        noise = normal_of_bits(keys(self._world.config.seed, "conversion ranker", requests.user_N, requests.time_N, ad_R))
        return sigmoid(base + np.float32(config.ranker_shrink) * (logit_R - base) + np.float32(config.ranker_noise) * noise)

    def offers(self, ad_RK: np.ndarray, pctr_RK: np.ndarray) -> Offers:
        """The candidates with predicted eCPM as score."""
        safe = np.maximum(ad_RK, 0)
        bid_RK = self._world.ad_bid_A[safe]
        score_RK = np.where(ad_RK >= 0, pctr_RK * bid_RK.astype(np.float32), -np.inf)
        return Offers(ad_RK, self._world.ad_advertiser_A[safe], score_RK, pctr_RK, bid_RK)


def _index_of_group(world: World, reach_A: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Eligible ads in the order of topics, each as often as its reach, and where each topic starts [T + 1]."""
    ads = world.eligible_ads(group).astype(np.int32)
    ads = ads[np.argsort(world.ad_topic_A[ads], kind="stable")]
    table = np.repeat(ads, reach_A[ads])
    return table, np.searchsorted(world.ad_topic_A[table], np.arange(world.config.num_topics + 1))


def _split_columns(config: MarketConfig) -> tuple[int, int]:
    count = config.logging.candidates
    need = round(count * config.logging.need_share)
    return need, min(round(count * config.logging.taste_share), count - need)
