"""Rankings of a generative model: beam search over the eligible semantic IDs of every request, then the items of the best ones.

The model is an object handed in (`Decoder`), so this file knows no architecture. All ranks call the model equally often, whatever
their batches hold, which ZeRO-3 needs. `evaluate_generation` is what the training loop measures: HitR@K and NDCG@K, summed over ranks.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.decoding.legality import Eligible, LegalCache
from gpr_dist.decoding.ranking import rank_items
from gpr_dist.decoding.search import SearchConfig, SearchModel, Softmax, search
from gpr_dist.decoding.trie import Trie
from gpr_dist.evaluation.journey_log import Lists
from gpr_dist.evaluation.metrics import add_sums, ranking_metrics, ranking_sums
from gpr_dist.schema import Batch

# R requests of a batch  B of them decoded together  N targets or alive prefixes  V codes per level  K ranked items

AllReduce = Callable[[Tensor, Literal["sum", "max"]], Tensor]


class Decoder(Protocol):
    """What evaluation needs of a model."""

    def start(self, batch: Batch) -> Any:
        """Encode the batch's journeys once; the result is handed back to `searcher`."""

    def searcher(self, state: Any, first_request: int) -> SearchModel:
        """The model over the batch's requests from `first_request` on, with its pointer if it has one."""


class GenerativeRanker:
    """Ranks the requests of batch after batch (an `evaluation.rankings.Ranker`)."""

    def __init__(self, decode: Decoder, trie: Trie, eligibility: Eligibility, item_weight: Tensor, k: int,
                 beam_width: int | Sequence[int] = 128, normalise: Softmax = "all", chunk_requests: int = 64,
                 all_reduce: AllReduce | None = None) -> None:
        """Args:
            trie: on the model's device. item_weight: [catalogue items] >= 0, e.g. popularity; splits a leaf's probability among its
                items, and is the prior of normalise="prior".
            k: length of the lists.
            chunk_requests: requests decoded together. A batch takes as many chunks as the rank with the most requests in its batch needs.
            all_reduce: adds up or maximises a tensor over the ranks; None in a single process.
        """
        self.trie, self.k = trie, k
        self._decode, self._normalise, self._chunk_requests = decode, normalise, chunk_requests
        self._config = SearchConfig(width=beam_width if isinstance(beam_width, int) else tuple(beam_width), softmax=normalise)
        self._legal_cache = LegalCache(trie, eligibility.items)
        self._item_weight_M = trie.slot_weights(item_weight)
        self._reduce = all_reduce or (lambda tensor, _: tensor)

    @torch.no_grad()
    def __call__(self, batch: Batch, seen: Lists | None = None) -> tuple[Tensor, Tensor]:
        """(item_RK int64, score_RK float32 log-probabilities), on the CPU; -1 and -inf where a list ends. Collective.

        Args: seen: items that are no candidates, per request.
        """
        state = self._decode.start(batch)
        groups_R = batch.request_eligibility_R.to(self.trie.device)
        num_chunks = torch.tensor(-(-groups_R.numel() // self._chunk_requests), device=self.trie.device)
        items, scores = [torch.empty(0, self.k, dtype=torch.long)], [torch.empty(0, self.k)]
        for chunk in range(int(self._reduce(num_chunks, "max"))):
            first = min(chunk * self._chunk_requests, groups_R.numel())  # past the end: no request, the model is called all the same
            legal, request_group_B = self._legal_cache(groups_R[first : first + self._chunk_requests])
            exclude = None if seen is None else _pairs(seen.of(first, first + request_group_B.numel()), self.trie.device)
            eligible = Eligible.of(self.trie, legal, request_group_B, exclude)
            result = search(self._decode.searcher(state, first), eligible, self._config, self._item_weight_M)
            ranked = rank_items(result, eligible, self._item_weight_M, self.k, self._normalise)
            items.append(ranked.item_BK.cpu())
            scores.append(ranked.score_BK.cpu())
        return torch.cat(items), torch.cat(scores)


def _pairs(seen: Lists, device: torch.device) -> tuple[Tensor, Tensor]:
    """(request, item) of every entry."""
    request = np.repeat(np.arange(len(seen.offset_R1) - 1), np.diff(seen.offset_R1))
    return torch.from_numpy(request).to(device), torch.from_numpy(seen.item_M.astype(np.int64)).to(device)


@torch.no_grad()
def evaluate_generation(decode: Decoder, batches: Iterable[Batch], trie: Trie, eligibility: Eligibility, item_weight: Tensor,
                        ks: Sequence[int] = (10, 100), beam_width: int | Sequence[int] = 128,
                        normalise: Softmax = "all", chunk_requests: int = 64,
                        all_reduce: AllReduce | None = None, progress: bool = True) -> dict[str, float]:
    """Rank the eligible items of every request and compare with the ads that were shown (the targets of head 0).

    Args: as of `GenerativeRanker`, and
        batches: the evaluated split; every rank must hand in equally many (they may be empty).
    Returns: hitr@k, ndcg@k per target event; num_requests, num_targets; eligible_target_frac: share of targets that could be ranked;
        illegal_items: ranked items that are not eligible (0, or the search is broken); seconds (slowest rank); requests_per_s.
    """
    started = time.perf_counter()
    rank = GenerativeRanker(decode, trie, eligibility, item_weight, max(ks), beam_width, normalise, chunk_requests, all_reduce)
    reduce = all_reduce or (lambda tensor, _: tensor)
    no_ids = torch.empty(0, dtype=torch.long)
    sums = [_batch_sums(torch.empty(0, max(ks), dtype=torch.long), no_ids, no_ids, no_ids, trie, eligibility, ks)]
    for batch in tqdm(batches, desc="evaluate", unit="batch", mininterval=0.5, disable=not progress):
        shown = batch.target_head_N == 0
        targets = batch.target_request_N[shown].cpu(), batch.target_item_N[shown].cpu()
        sums.append(_batch_sums(rank(batch)[0], batch.request_eligibility_R.cpu(), *targets, trie, eligibility, ks))
    total = add_sums(sums)
    reduced = reduce(torch.stack(list(total.values())).to(trie.device), "sum").tolist()
    metrics = ranking_metrics(dict(zip(total, reduced, strict=True)))
    metrics["eligible_target_frac"] = metrics.pop("eligible_targets") / max(metrics["num_targets"], 1)
    metrics["seconds"] = float(reduce(torch.tensor(time.perf_counter() - started, device=trie.device), "max"))
    metrics["requests_per_s"] = metrics["num_requests"] / metrics["seconds"]
    return metrics


def _batch_sums(ranked_RK: Tensor, group_R: Tensor, target_request_N: Tensor, target_item_N: Tensor, trie: Trie,
                eligibility: Eligibility, ks: Sequence[int]) -> dict[str, Tensor]:
    """Metric sums of one batch, with what eligibility says about it asked anew, independently of the search."""
    sums = ranking_sums(ranked_RK, target_request_N, target_item_N, ks)
    request, column = (ranked_RK >= 0).nonzero(as_tuple=True)
    is_legal = eligibility.contains(group_R[request].numpy(), ranked_RK[request, column].numpy())
    sums["illegal_items"] = torch.tensor(float((~is_legal).sum()), dtype=torch.double)
    is_eligible_N = eligibility.contains(group_R[target_request_N].numpy(), target_item_N.numpy())
    sums["eligible_targets"] = (torch.from_numpy(is_eligible_N) & trie.contains(target_item_N).cpu()).sum().double()
    return sums
