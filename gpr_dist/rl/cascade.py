"""The cascade that GPR replaces, as a baseline: retrieve some hundreds of eligible ads, then rank them by pCTR x bid.

Retrieval adds up three probabilities: popularity, a first-order Markov chain from the user's last items, and the user's own repetitions.
It is counted on the train split; ranking uses the simulator's own rankers, so that cascade and policy are valued by the same numbers.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from gpr_dist.config import Config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.loader import LoaderConfig, iter_once
from gpr_dist.data.sampler import World
from gpr_dist.errors import DataError
from gpr_dist.rl.rankers import RankerConfig, recent_past
from gpr_dist.rl.simulator import Simulator
from gpr_dist.safety import load_tensors
from gpr_dist.schema import Batch, write_atomic

# R requests  K ranked ads  H past events  M catalogue items  X entries (request, ad, mass)  P transitions (item, next ad)

FILE = "retriever.safetensors"


class RetrieverConfig(Config):
    """First stage of the cascade."""

    popularity: float = Field(1.0, ge=0)
    """weight of an ad's share of the exposures in train"""
    markov: float = Field(1.0, ge=0)
    """weight of the mean transition probability from the user's last items"""
    personal: float = Field(1.0, ge=0)
    """weight of an ad's share of the user's past events"""
    markov_items: int = Field(8, ge=1)
    """last O and I tokens that predict the next ad"""
    smoothing: float = Field(20.0, gt=0)
    """transitions of unknown target added to every item's, so that rare items predict little"""
    neighbours: int = Field(100, ge=1)
    """most transitions kept per item, the most frequent ones"""
    max_rows: int = Field(200_000, ge=1)
    """most rows of train that are counted"""


class Retriever(NamedTuple):
    """Popularity and transitions of one data set."""

    config: RetrieverConfig
    share_M: np.ndarray  # float32, share of the exposures
    offset_M1: np.ndarray  # int64, transitions of item m are offset[m]:offset[m + 1]
    next_P: np.ndarray  # int32 ad
    probability_P: np.ndarray  # float32

    @classmethod
    def fit(cls, shards: str | Path, codes_ML: np.ndarray, config: RetrieverConfig) -> "Retriever":
        """Count one pass over the rows of a split. Memory: distinct transitions, 16 bytes each. Raises: DataError when it has no ads."""
        num_items = len(codes_ML)
        shown_M, keys, counts = np.zeros(num_items), np.empty(0, np.int64), np.empty(0, np.int64)
        batches = iter_once(shards, LoaderConfig(), World(0, 1), codes_ML, 1, config.max_rows)
        for batch in tqdm(batches, desc="retriever", unit="batch", mininterval=0.5):
            shown = batch.target_item_N.numpy()
            shown_M += np.bincount(shown, minlength=num_items)
            item_RH = _past_items(batch, config.markov_items)
            before_NH = item_RH[batch.target_request_N.numpy()]
            pairs = (before_NH * num_items + shown[:, None])[before_NH >= 0]
            found, count = np.unique(pairs, return_counts=True)
            keys, which = np.unique(np.concatenate([keys, found]), return_inverse=True)
            counts = np.bincount(which, np.concatenate([counts, count]), len(keys)).astype(np.int64)
        if not shown_M.sum():
            raise DataError(f"{shards} has no ads to count; check the cut-offs of the build")
        before_P, total_M = keys // num_items, np.bincount(keys // num_items, counts, num_items)
        order = np.lexsort((-counts, before_P))
        place = np.arange(len(order)) - np.searchsorted(before_P, before_P)  # keys ascend, so the groups are those of `order` too
        kept = np.sort(order[place < config.neighbours])
        offset_M1 = np.searchsorted(before_P[kept], np.arange(num_items + 1))
        probability_P = counts[kept] / (total_M[before_P[kept]] + config.smoothing)
        return cls(config, (shown_M / shown_M.sum()).astype(np.float32), offset_M1, (keys[kept] % num_items).astype(np.int32),
                   probability_P.astype(np.float32))

    def retrieve(self, batch: Batch, eligibility: Eligibility, num_retrieved: int) -> np.ndarray:
        """The most probable eligible ads of every request of a batch on the CPU, best first: int64 [R, num_retrieved], -1 = no more."""
        group_R, num_items = batch.request_eligibility_R.numpy(), len(self.share_M)
        item_RH = _past_items(batch, RankerConfig().history_events)
        known_RH = item_RH >= 0
        own, own_request = item_RH[known_RH], np.nonzero(known_RH)[0]
        own_mass = self.config.personal / (known_RH.sum(1)[own_request] + 1)
        last_RH = item_RH[:, : self.config.markov_items]
        before, before_request = last_RH[last_RH >= 0], np.nonzero(last_RH >= 0)[0]
        length = self.offset_M1[before + 1] - self.offset_M1[before]
        at_P = np.arange(length.sum()) + np.repeat(self.offset_M1[before] - np.cumsum(length) + length, length)
        next_mass = self.config.markov * self.probability_P[at_P] / np.maximum(np.repeat((last_RH >= 0).sum(1)[before_request], length), 1)
        request_X = np.concatenate([own_request, np.repeat(before_request, length)])
        item_X, mass_X = np.concatenate([own, self.next_P[at_P]]), np.concatenate([own_mass, next_mass])
        eligible_X = eligibility.contains(group_R[request_X], item_X.astype(np.int32))
        top_request, top_item = self._popular(group_R, eligibility, num_retrieved)
        key_X = np.concatenate([request_X[eligible_X] * num_items + item_X[eligible_X], top_request * num_items + top_item])
        key, which = np.unique(key_X, return_inverse=True)
        mass = np.bincount(which, np.concatenate([mass_X[eligible_X], np.zeros(len(top_item))]), len(key))
        mass += self.config.popularity * self.share_M[key % num_items]
        order = np.lexsort((-mass, key // num_items))
        request, item = key[order] // num_items, key[order] % num_items
        place = np.arange(len(order)) - np.searchsorted(request, request)
        out_RK = np.full((len(group_R), num_retrieved), -1, np.int64)
        kept = place < num_retrieved
        out_RK[request[kept], place[kept]] = item[kept]
        return out_RK

    def _popular(self, group_R: np.ndarray, eligibility: Eligibility, most: int) -> tuple[np.ndarray, np.ndarray]:
        """(request, ad) of each request's most popular eligible ads."""
        requests, items = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for group in np.unique(group_R).tolist():
            eligible = eligibility.items(group)
            if len(eligible) > most:
                eligible = eligible[np.argpartition(-self.share_M[eligible], most)[:most]]
            rows = np.flatnonzero(group_R == group)
            requests.append(np.repeat(rows, len(eligible)))
            items.append(np.tile(eligible.astype(np.int64), len(rows)))
        return np.concatenate(requests), np.concatenate(items)

    def save(self, folder: str | Path) -> None:
        tensors = {"share_M": self.share_M, "offset_M1": self.offset_M1, "next_P": self.next_P, "probability_P": self.probability_P}
        write_atomic(Path(folder) / "retriever.json", self.config.model_dump_json(indent=1).encode())
        write_atomic(Path(folder) / FILE, save(tensors))

    @classmethod
    def load(cls, folder: str | Path) -> "Retriever":
        """Raises: DataError when there is none."""
        try:
            config = RetrieverConfig.model_validate_json((Path(folder) / "retriever.json").read_bytes())
            return cls(config, **load_tensors(Path(folder) / FILE, DataError, "np"))
        except OSError as error:
            raise DataError(f"{folder} has no retriever ({error.strerror}); fit it with launch/fit_simulator.py") from None


def cascade_rank(batch: Batch, simulator: Simulator, retriever: Retriever, eligibility: Eligibility, k: int,
                 num_retrieved: int = 200) -> Tensor:
    """The first k ads of every request of a batch under retrieval, then ranking by expected eCPM (pCTR x bid).

    Args: batch: on the CPU. num_retrieved: ads that reach the rankers, >= k.
    Returns: int64 [R, k] on the CPU, best first, -1 where fewer ads are eligible.
    """
    retrieved_RK = torch.from_numpy(retriever.retrieve(batch, eligibility, max(num_retrieved, k)))
    request_N, column_N = (retrieved_RK >= 0).nonzero(as_tuple=True)
    device = simulator.bid_M.device
    rewards = simulator.rewards(batch.to(device), request_N.to(device), retrieved_RK[request_N, column_N].to(device))
    ecpm_RK = torch.full(retrieved_RK.shape, -torch.inf)
    ecpm_RK[request_N, column_N] = rewards.ecpm_N.cpu()
    best_RK = ecpm_RK.argsort(dim=1, descending=True, stable=True)[:, :k]
    return retrieved_RK.gather(1, best_RK)


def _past_items(batch: Batch, most: int) -> np.ndarray:
    """Items of the last tokens before each request's site, latest first: int64 [R, H], -1 = no more."""
    config = RankerConfig(history_events=most)
    past = recent_past(batch, config, torch.tensor(config.half_lives_s))
    return torch.where(past.known_RH, batch.item_T[past.token_RH], -1).numpy()
