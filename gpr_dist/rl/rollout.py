"""Rollouts: for requests of a micro-batch, distinct candidate ads sampled from a policy over the eligible trie, and what they are worth.

A rollout is a `Batch` whose targets are the candidates, so that the forward that trained the model also gives their log-probabilities,
over the same legal codes, with the same refiner noise. A candidate is a semantic ID; of the eligible ads that share it the most valuable
is shown, as the auction would choose. Every rank makes the same number of forwards, whatever its batches hold (ZeRO-3 needs that).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from gpr_dist.config import Config
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.data.legal import LegalCodes
from gpr_dist.data.past import PastItems
from gpr_dist.decoding.legality import Eligible, LegalCache
from gpr_dist.decoding.model_decoder import ModelDecoder
from gpr_dist.decoding.search import SearchConfig, search
from gpr_dist.decoding.segments import starts, top_k
from gpr_dist.decoding.trie import Trie
from gpr_dist.errors import TrainingError
from gpr_dist.ops.noise import hashed_uniform
from gpr_dist.rl.rewards import RewardModel
from gpr_dist.schema import Action, Batch

# B rows  R requests  N candidates, by request  L levels  M (candidate, eligible ad on its semantic ID), by candidate

REQUEST_SEED = 11  # tells the choice of requests from other uses of the same keys


class RolloutConfig(Config):
    """How candidates are sampled."""

    num_candidates: int = Field(40, ge=2)
    """distinct candidates G per request, fewer where fewer are eligible"""
    requests_per_row: int = Field(2, ge=1)
    """requests of a journey that are rolled out in a step, drawn anew in every step"""
    chunk_requests: int = Field(256, ge=1)
    """requests searched at a time"""
    seed: int = 0
    """of the choice of requests and of the candidates"""


@dataclass(frozen=True)
class Rollout:
    """Candidates of a micro-batch's requests; requests with fewer than two have none."""

    batch: Batch  # on the device; targets of head 0 are the candidates
    ecpm_N: Tensor  # float32
    value_N: Tensor  # float32, final_value: the terminal reward (Eq. 5)
    steps_NL: Tensor  # float32, log-probability of each code as the search saw it
    num_requests: int  # with candidates
    num_skipped: int  # with fewer than two eligible semantic IDs

    @property
    def group_N(self) -> Tensor:
        """Request of each candidate, ascending."""
        return self.batch.target_request_N


class Sampler:
    """Makes rollouts with the weights the engine has at the moment."""

    def __init__(self, model: Callable[..., Any], device: torch.device, trie: Trie, eligibility: Eligibility, legal: LegalCodes,
                 past: PastItems | None, reward: RewardModel, config: RolloutConfig,
                 all_reduce: Callable[[Tensor, str], Tensor] | None = None) -> None:
        """Args:
            model: the engine. trie: of the ads, on any device.
            legal: what the policy's softmax runs over; with item weights the prior is part of the policy.
            past: of a model with a pointer.
            all_reduce: over ranks; None in a single process.
        """
        self._decoder, self._device, self._trie = ModelDecoder(model, device), device, trie.to(device)
        self._legal_cache = LegalCache(self._trie, eligibility.items)
        self._legal, self._past, self._reward, self.config = legal, past, reward, config
        self._reduce = all_reduce or (lambda tensor, _: tensor)
        self._softmax, self._weight_M = "legal", None
        if legal.item_weight_M is not None:
            self._softmax, self._weight_M = "prior", self._trie.slot_weights(torch.from_numpy(legal.item_weight_M))

    @torch.no_grad()
    def __call__(self, batch: Batch, step: int, every_request: bool = False) -> Rollout:
        """Roll out requests of a micro-batch of the loader (on the CPU); its targets are ignored. Collective.

        Args: step: makes the draws of one step differ from those of another. every_request: not only `requests_per_row` of each row.
        """
        seed = self.config.seed * 1_000_003 + step
        keep_R = torch.ones_like(batch.request_row_R, dtype=torch.bool)
        if not every_request:
            keep_R = choose_requests(batch, self.config.requests_per_row, seed)
        requests = take_requests(batch, keep_R)
        on_device = requests.to(self._device)
        request_N, codes_NL, steps_NL, request_M, owner_M, item_M = self._search(on_device, seed)
        valued = self._reward.rewards(on_device, request_M, item_M)
        if not valued.final_value_N.isfinite().all():
            bad = int((~valued.final_value_N.isfinite()).nonzero()[0])
            raise TrainingError(f"the reward model values item {int(item_M[bad])} at {float(valued.final_value_N[bad])}; rewards must be "
                                "finite: fit the simulator again, or look at its bids")
        best_N = top_k(valued.final_value_N, starts(owner_M, len(request_N)), 1)
        count_R = torch.bincount(request_N, minlength=len(keep_R[keep_R]))
        kept_N = (count_R >= 2)[request_N]
        best_N = best_N[kept_N]
        rollout = self._as_batch(requests, request_N[kept_N], codes_NL[kept_N], item_M[best_N])
        return Rollout(rollout.to(self._device), valued.ecpm_N[best_N], valued.final_value_N[best_N], steps_NL[kept_N],
                       int((count_R >= 2).sum()), int((count_R < 2).sum()))

    def _search(self, batch: Batch, seed: int) -> tuple[Tensor, ...]:
        """Returns: request [N], codes and log-probabilities [N, L] of the candidates; request, candidate and item [M] of their ads."""
        config = SearchConfig(strategy="gumbel", width=self.config.num_candidates, softmax=self._softmax, seed=seed)
        state, id_R, group_R = self._decoder.start(batch), _request_ids(batch), batch.request_eligibility_R
        size, num_levels = self.config.chunk_requests, self._trie.num_levels
        num_chunks = int(self._reduce(torch.tensor(-(-len(id_R) // size), device=self._device), "max"))
        parts, num_found = [], 0
        for first in range(0, max(1, num_chunks) * size, size):
            chunk = slice(min(first, len(id_R)), first + size)
            legal, group_B = self._legal_cache(group_R[chunk])
            eligible = Eligible.of(self._trie, legal, group_B)
            result = search(self._decoder.searcher(state, chunk.start), eligible, config, self._weight_M, id_R[chunk])
            request, column = (result.leaf_BK >= 0).nonzero(as_tuple=True)
            owner, slot = eligible.children(num_levels, request, result.leaf_BK[request, column])
            parts.append((request + chunk.start, result.codes_BKL[request, column], result.steps_BKL[request, column],
                          request[owner] + chunk.start, owner + num_found, self._trie.slot_item[slot].long()))
            num_found += len(request)
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _as_batch(self, requests: Batch, request_N: Tensor, codes_NL: Tensor, item_N: Tensor) -> Batch:
        """The candidates as targets, with what their softmax runs over and what they would copy; on the CPU."""
        request_N, nothing_N = request_N.cpu(), torch.full(request_N.shape, torch.nan)
        batch = replace(requests, target_request_N=request_N, target_head_N=torch.zeros_like(request_N), target_item_N=item_N.cpu(),
                        target_codes_NL=codes_NL.cpu(), target_action_N=torch.full_like(request_N, int(Action.IMPRESSION)),
                        target_value_N=nothing_N, target_pctr_N=nothing_N, target_pcvr_N=nothing_N)
        if self._past is not None:
            batch = self._past.add_to(batch)
        return self._legal.add_to(batch, counted=False)


def choose_requests(batch: Batch, per_row: int, seed: int) -> Tensor:
    """At most so many requests of each row, at random by row, site and seed: alike however a step is split; bool [R]."""
    row_R = batch.request_row_R
    draw_R = hashed_uniform(_request_ids(batch), 1, seed + REQUEST_SEED)[:, 0]
    order_R = draw_R.argsort(stable=True)
    order_R = order_R[row_R[order_R].argsort(stable=True)]
    rank_R = torch.arange(len(row_R), device=row_R.device) - starts(row_R[order_R], batch.num_rows)[row_R[order_R]]
    keep_R = torch.zeros_like(row_R, dtype=torch.bool)
    keep_R[order_R[rank_R < per_row]] = True
    return keep_R


def take_requests(batch: Batch, keep_R: Tensor) -> Batch:
    """The same rows with some of their requests and without targets, dropout and item candidates. Args: keep_R: bool."""
    changes: dict[str, Any] = {"noise_T": None, "candidates": None}
    for field in fields(Batch):
        value = getattr(batch, field.name)
        if value is None:
            continue
        if field.name.startswith("request_"):
            changes[field.name] = value[keep_R]
        elif field.name.startswith("target_"):
            changes[field.name] = None if field.default is None else value[:0]
    if batch.copy_request_M is not None:
        kept_M = keep_R[batch.copy_request_M]
        changes["copy_request_M"] = (keep_R.cumsum(0) - 1)[batch.copy_request_M[kept_M]]
        changes["copy_source_M"] = batch.copy_source_M[kept_M]
    return replace(batch, **changes)


def _request_ids(batch: Batch) -> Tensor:
    """A number that belongs to the request wherever its row is computed."""
    row_R = batch.request_row_R
    return batch.row_ids_B[row_R] * 65_537 + batch.request_token_R - batch.offsets_B1[row_R]
