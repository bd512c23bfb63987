"""What a ranker would show: how much of the catalogue, how unevenly, and whose."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.evaluation.baselines import Ranking
from gpr_dist.evaluation.journey_log import JourneyLog
from gpr_dist.evaluation.names import check_names

# R requests  K ranked items  I catalogue items  C candidates  A advertisers

CURVE_POINTS = 101


class Exposure(NamedTuple):
    """Of the first k items of all requests."""

    items: int
    """distinct items shown"""
    coverage: float
    """share of the candidates that are shown at all; candidates = items eligible at any of the requests"""
    gini: float
    """of the candidates' exposures: 0 = all alike, 1 = one item has all"""
    top_share: float
    """share of the exposures that goes to the most shown 1 % of the candidates"""
    new_share: float
    """share of the exposures that goes to items without an event in the training split"""
    lorenz: list[float]
    """share of the exposures of the least shown 0 %, 1 % ... 100 % of the candidates"""
    advertisers: int | None
    """distinct advertisers shown; none = not known"""
    top_advertiser_share: float | None
    """share of the exposures of the most shown advertiser"""


def find_candidates(log: JourneyLog, eligibility: Eligibility, num_items: int) -> np.ndarray:
    """Whether each catalogue item is eligible at any request, bool [I]."""
    is_candidate_I = np.zeros(num_items, dtype=bool)
    for group in np.unique(log.request_group_R).tolist():
        is_candidate_I[eligibility.items(group)] = True
    return is_candidate_I


def measure_exposure(ranking: Ranking, k: int, is_candidate_I: np.ndarray, is_new_I: np.ndarray,
                     advertiser_I: np.ndarray | None = None) -> Exposure:
    """Args: is_new_I: bool [I], never trained. advertiser_I: int number of each item's advertiser, < 0 = unknown; none = not known."""
    shown = ranking.item_RK[:, :k]
    return count_exposure(np.bincount(shown[shown >= 0], minlength=len(is_candidate_I)), is_candidate_I, is_new_I, advertiser_I)


def count_exposure(count_I: np.ndarray, is_candidate_I: np.ndarray, is_new_I: np.ndarray, advertiser_I: np.ndarray | None) -> Exposure:
    """The same of counted exposures, e.g. of the ads that were shown."""
    count_C = np.sort(count_I[is_candidate_I | (count_I > 0)]).astype(np.float64)
    total, num = max(count_C.sum(), 1.0), len(count_C)
    lorenz = np.concatenate([[0.0], np.cumsum(count_C)]) / total
    gini = 1 - float((lorenz[1:] + lorenz[:-1]).sum()) / max(num, 1)
    points = np.interp(np.linspace(0, num, CURVE_POINTS), np.arange(num + 1), lorenz)
    top = count_C[num - max(1, num // 100) :].sum() / total
    by_advertiser = None if advertiser_I is None else np.bincount(advertiser_I[advertiser_I >= 0], count_I[advertiser_I >= 0])
    return Exposure(int((count_C > 0).sum()), float((count_C > 0).mean()) if num else 0.0, gini, float(top),
                    float(count_I[is_new_I].sum() / total), points.tolist(),
                    None if by_advertiser is None else int((by_advertiser > 0).sum()),
                    None if by_advertiser is None else float(by_advertiser.max(initial=0) / total))


def read_advertisers(catalogue: Path, column: str | None) -> np.ndarray | None:
    """Number of each item's advertiser, -1 = unknown, int32 [I], from a column of catalogue.arrow; none = "advertiser", if there is one.

    Raises: ConfigError naming the nearest column when the one asked for is not there.
    """
    table = pa.ipc.open_file(pa.memory_map(str(catalogue))).read_all()
    wanted = column or "advertiser"
    if wanted not in table.column_names:
        check_names("advertiser", (column,) if column else (), table.column_names)
        return None
    encoded = table[wanted].combine_chunks().dictionary_encode()
    return pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
