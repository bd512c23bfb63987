"""A small catalogue whose ads collide on semantic IDs, groups with hardly any ad, batches over it, and a table of values."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import torch
from random_batches import concat_batches, random_batch
from tiny_model import L, V

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.legal import LegalCodes
from gpr_dist.data.past import PastItems
from gpr_dist.decoding.trie import Trie
from gpr_dist.rl.rollout import RolloutConfig, Sampler
from gpr_dist.schema import Batch

ITEMS = 60
_RNG = np.random.default_rng(5)
CODES = _RNG.integers(0, 4, (ITEMS, L))
CODES[1] = CODES[0]  # the only two ads of group 2: one semantic ID
COUNTS = _RNG.integers(0, 20, ITEMS).astype(np.float64)
GROUPS = [np.arange(0, ITEMS, 3), np.array([4]), np.array([0, 1]), np.array([], int), np.array([2, 7, 11]), np.arange(ITEMS)]
ELIGIBILITY = Eligibility([group.astype(np.int32) for group in GROUPS], np.arange(0, ITEMS, 2, dtype=np.int32), ITEMS)
TRIE = Trie.from_codes(CODES, V)


class TableReward:
    """A value for every item, the same at every request, unless `constant`."""

    def __init__(self, seed: int = 0, constant: bool = False) -> None:
        self.value_M = torch.ones(ITEMS) if constant else torch.from_numpy(np.random.default_rng(seed).random(ITEMS)).float()

    def rewards(self, batch: Batch, request_N: torch.Tensor, item_N: torch.Tensor) -> SimpleNamespace:
        value_N = self.value_M.to(item_N.device)[item_N]
        assert len(request_N) == len(item_N) and (not len(request_N) or int(request_N.max()) < len(batch.request_row_R))
        return SimpleNamespace(pctr_N=value_N, pcvr_N=value_N, ecpm_N=10 * value_N, final_value_N=value_N)


def market_batch(seed: int, num_rows: int = 4, groups: tuple[int, ...] = (-1, 0, 1, 2, 3, 4, 5)) -> Batch:
    """Rows of the catalogue's items under its groups; row numbers are distinct over seeds."""
    batch, rng = random_batch(seed, num_rows=num_rows), np.random.default_rng(seed)
    codes, item = torch.from_numpy(CODES), torch.where(batch.item_T < 0, -1, batch.item_T % ITEMS)
    target = batch.target_item_N % ITEMS
    return dataclasses.replace(batch, item_T=item, codes_TL=torch.where(item[:, None] < 0, -1, codes[item]), target_item_N=target,
                               target_codes_NL=codes[target], row_ids_B=batch.row_ids_B + 1000 * seed,
                               request_eligibility_R=torch.from_numpy(rng.choice(groups, len(batch.request_row_R))))


def sampler(model, softmax: str = "legal", pointer: bool = False, reward: TableReward | None = None, **settings) -> Sampler:
    legal = LegalCodes(CODES, V, ELIGIBILITY, COUNTS if softmax == "prior" else None)
    past = PastItems(CODES, V, ELIGIBILITY) if pointer else None
    return Sampler(model, torch.device("cpu"), TRIE, ELIGIBILITY, legal, past, reward or TableReward(), RolloutConfig(**settings))


def prepared(batch: Batch, pointer: bool) -> Batch:
    """As the loader of a model with a pointer makes it."""
    return PastItems(CODES, V, ELIGIBILITY).add_to(batch) if pointer else batch


def joined(*batches: Batch) -> Batch:
    return concat_batches(list(batches))
