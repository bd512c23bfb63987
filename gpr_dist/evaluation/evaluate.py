"""Evaluation of a generative model: beam search over the eligible semantic IDs of every request, then HitR@K and NDCG@K per item.

The model is an object handed in (`Decoder`), so this file knows no architecture. All ranks call the model equally often, whatever
their batches hold, which ZeRO-3 needs; the sums of all ranks are added at the end.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.decoding.beam_search import Softmax, beam_search, expand_items
from gpr_dist.decoding.trie import LegalCache, Trie
from gpr_dist.evaluation.metrics import add_sums, ranking_metrics, ranking_sums
from gpr_dist.schema import Batch

# R requests of a batch  B of them decoded together  N targets or alive prefixes  V codes per level  K ranked items

AllReduce = Callable[[Tensor, Literal["sum", "max"]], Tensor]


class Decoder(Protocol):
    """What evaluation needs of a model."""

    def start(self, batch: Batch) -> Any:
        """Encode the batch's journeys once; the result is handed back to `step_log_probs`."""

    def step_log_probs(self, state: Any, request_index_N: Tensor, prefix_codes_Nl: Tensor) -> Tensor:
        """Log-softmax over all codes of level l, [N, V], of requests (int64 into the batch's R, ascending); N may be 0."""


@torch.no_grad()
def evaluate_generation(decode: Decoder, batches: Iterable[Batch], trie: Trie, eligibility: Eligibility, item_weight: Tensor,
                        ks: Sequence[int] = (10, 100), beam_width: int | Sequence[int] = 128,
                        normalise: Softmax = "all", chunk_requests: int = 64,
                        all_reduce: AllReduce | None = None, progress: bool = True) -> dict[str, float]:
    """Rank the eligible items of every request and compare with the ads that were shown (the targets of head 0).

    Args:
        batches: the evaluated split; every rank must hand in equally many (they may be empty).
        trie: on the model's device. item_weight: [catalogue items] >= 0, e.g. popularity; splits a leaf's
            probability among its items, and is the prior of normalise="prior".
        chunk_requests: requests decoded together. A batch takes as many chunks as the rank with the most requests in its batch needs.
        all_reduce: adds up or maximises a tensor over the ranks; None in a single process.
    Returns: hitr@k, ndcg@k per target event; num_requests, num_targets; eligible_target_frac: share of targets that could be ranked;
        illegal_items: ranked items that are not eligible (0, or the search is broken); seconds (slowest rank); requests_per_s.
    """
    started = time.perf_counter()
    reduce = all_reduce or (lambda tensor, _: tensor)
    legal_cache = LegalCache(trie, eligibility.items)
    item_weight_M = trie.slot_weights(item_weight)
    no_ids = torch.empty(0, dtype=torch.long)
    sums = [_batch_sums(torch.empty(0, max(ks), dtype=torch.long), no_ids, no_ids, no_ids, trie, eligibility, ks)]
    for batch in tqdm(batches, desc="evaluate", unit="batch", mininterval=0.5, disable=not progress):
        state = decode.start(batch)
        groups_R = batch.request_eligibility_R.to(trie.device)
        num_chunks = torch.tensor(-(-groups_R.numel() // chunk_requests), device=trie.device)
        ranked = [torch.empty(0, max(ks), dtype=torch.long)]
        for chunk in range(int(reduce(num_chunks, "max"))):
            first = min(chunk * chunk_requests, groups_R.numel())  # past the end: no request, the model is called all the same
            legal, request_group_B = legal_cache(groups_R[first : first + chunk_requests])
            step = partial(_step, decode, state, first)
            result = beam_search(step, trie, legal, request_group_B, beam_width, normalise, item_weight_M)
            ranked.append(expand_items(result, trie, legal[-1], request_group_B, item_weight_M, max(ks), normalise)[0].cpu())
        shown = batch.target_head_N == 0
        targets = batch.target_request_N[shown].cpu(), batch.target_item_N[shown].cpu()
        sums.append(_batch_sums(torch.cat(ranked), groups_R.cpu(), *targets, trie, eligibility, ks))
    total = add_sums(sums)
    reduced = reduce(torch.stack(list(total.values())).to(trie.device), "sum").tolist()
    metrics = ranking_metrics(dict(zip(total, reduced, strict=True)))
    metrics["eligible_target_frac"] = metrics.pop("eligible_targets") / max(metrics["num_targets"], 1)
    metrics["seconds"] = float(reduce(torch.tensor(time.perf_counter() - started, device=trie.device), "max"))
    metrics["requests_per_s"] = metrics["num_requests"] / metrics["seconds"]
    return metrics


def comparison_table(results: Mapping[str, Mapping[str, float]], ks: Sequence[int] = (10, 100)) -> str:
    """Fixed-width table of HitR@K and NDCG@K, one row per ranker in the order given (the model, then the baselines)."""
    columns = [("HitR", k) for k in ks] + [("NDCG", k) for k in ks]
    width = max(len(name) for name in [*results, "ranker"])
    lines = ["  ".join(["ranker".ljust(width), *(f"{metric}@{k}".rjust(8) for metric, k in columns)])]
    lines.append("-" * len(lines[0]))
    for name, metrics in results.items():
        lines.append("  ".join([name.ljust(width), *(f"{metrics[f'{metric.lower()}@{k}']:8.4f}" for metric, k in columns)]))
    return "\n".join(lines)


def _step(decode: Decoder, state: Any, first: int, request_N: Tensor, prefix_codes_Nl: Tensor) -> Tensor:
    return decode.step_log_probs(state, request_N + first, prefix_codes_Nl)


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
