"""What users do with an ad that was shown: click, conversion, and when it happens; from the true rates and from numbers that belong to
user and moment, so that two policies showing the same ad at the same moment see the same response."""

from dataclasses import dataclass

import numpy as np

from data_pipeline.market.config import MarketConfig
from data_pipeline.market.randomness import keys, uniform

_DELAY_SPREAD = 1.1  # standard deviation of the logarithm of the delay


@dataclass(frozen=True)
class Luck:
    """Of N requests: a click happens when click_N < CTR, a conversion when it was clicked and conversion_N < CVR."""

    click_N: np.ndarray  # float64 in [0, 1)
    conversion_N: np.ndarray  # float64 in [0, 1)
    delay_N: np.ndarray  # int64, seconds from click to conversion


def luck(config: MarketConfig, seed: int, user_N: np.ndarray, time_N: np.ndarray) -> Luck:
    """The log was made with seed 0; other seeds replay the same requests with other responses."""
    stream = "response" if seed == 0 else f"response {seed}"
    draws = [uniform(keys(config.seed, f"{stream} {what}", user_N, time_N)) for what in ("click", "conversion", "delay", "angle")]
    normal = np.sqrt(-2 * np.log1p(-draws[2])) * np.cos(2 * np.pi * draws[3])
    delay = np.ceil(config.conversion_delay_hours * 3600 * np.exp(_DELAY_SPREAD * normal)).astype(np.int64)
    return Luck(draws[0], draws[1], np.maximum(delay, 1))
