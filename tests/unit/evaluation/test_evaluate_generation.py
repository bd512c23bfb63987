"""Evaluation of a model that is a table of item scores: known answers, any chunking, any number of ranks."""

import dataclasses

import numpy as np
import pytest
import torch

from gpr_dist.data.eligibility import Eligibility
from gpr_dist.decoding.trie import Trie
from gpr_dist.evaluation.evaluate import evaluate_generation
from gpr_dist.schema import EVERY_AD, Batch

V, L, NUM_ITEMS = 4, 3, 40
CODES = np.random.default_rng(0).integers(0, V, (NUM_ITEMS, L))
TRIE = Trie.from_codes(CODES, V)
GROUPS = [np.arange(0, NUM_ITEMS, 3, dtype=np.int32), np.array([5, 6, 7], dtype=np.int32)]
ELIGIBILITY = Eligibility(GROUPS, np.arange(NUM_ITEMS, dtype=np.int32), NUM_ITEMS)
PRIORITY = torch.arange(NUM_ITEMS).float()  # weight of an item in its leaf
SHARE = np.array([(item + 0.1) / (np.flatnonzero((codes == CODES).all(axis=1)) + 0.1).sum() for item, codes in enumerate(CODES)])


def make_batch(num_requests, seed):
    """Only what evaluation reads is meaningful; targets of head 1 must be ignored."""
    rng = np.random.default_rng(seed)
    groups = rng.integers(-1, 2, num_requests)
    request = np.repeat(np.arange(num_requests), 2)
    values = {field.name: torch.empty(0, dtype=torch.long) for field in dataclasses.fields(Batch)}
    values |= {"request_eligibility_R": torch.from_numpy(groups), "request_token_R": torch.from_numpy(rng.integers(0, 1000, num_requests)),
               "target_request_N": torch.from_numpy(np.concatenate([request, request])),
               "target_head_N": torch.from_numpy(np.repeat([0, 1], len(request))),
               "target_item_N": torch.from_numpy(rng.integers(0, NUM_ITEMS, 2 * len(request)))}
    return Batch(**values)


class TableDecoder:
    """p(code | request, prefix) from a random table chosen by the request's token; counts its calls."""

    def __init__(self):
        self.calls, self.starts = 0, 0
        self.logits = torch.from_numpy(np.random.default_rng(1).normal(size=(1000, L, V**L, V)))

    def start(self, batch):
        self.starts += 1
        return batch.request_token_R

    def searcher(self, state, first_request):
        return TableSearch(self, state, first_request)

    def step_log_probs(self, state, request_index_N, prefix_codes_Nl):
        self.calls += 1
        level = prefix_codes_Nl.shape[1]
        prefix = (prefix_codes_Nl * V ** torch.arange(level)).sum(1)
        return self.logits[state[request_index_N], level, prefix].log_softmax(-1).float()


@dataclasses.dataclass
class TableSearch:
    table: TableDecoder
    state: torch.Tensor
    first_request: int

    def log_probs(self, request_N, head_N, prefix_Nl):
        return self.table.step_log_probs(self.state, request_N + self.first_request, prefix_Nl), None

    def copies(self, num_requests, heads):
        return None


def slow_metrics(batches, k):
    decoder, hits, gains, eligible, total = TableDecoder(), 0, 0.0, 0, 0
    for batch in batches:
        targets = (batch.target_request_N.tolist(), batch.target_head_N.tolist(), batch.target_item_N.tolist())
        for request, head, item in zip(*targets, strict=True):
            if head:
                continue
            items = ELIGIBILITY.items(int(batch.request_eligibility_R[request]))
            codes = torch.from_numpy(CODES[items])
            rows = torch.full((len(items),), request)
            score = sum(decoder.step_log_probs(batch.request_token_R, rows, codes[:, :level]).gather(1, codes[:, level : level + 1])[:, 0]
                        for level in range(L)) + torch.from_numpy(np.log(SHARE[items]))
            order = sorted(range(len(items)), key=lambda slot: -float(score[slot]))
            ranked = [int(items[slot]) for slot in order][:k]
            total, eligible = total + 1, eligible + (item in items)
            if item in ranked:
                hits, gains = hits + 1, gains + 1 / np.log2(ranked.index(item) + 2)
    return hits / total, gains / total, eligible / total, total


@pytest.mark.parametrize("chunk_requests", [1, 4, 100])
def test_equals_ranking_every_item(chunk_requests):
    batches = [make_batch(9, 0), make_batch(0, 1), make_batch(6, 2)]
    decoder = TableDecoder()
    metrics = evaluate_generation(decoder, batches, TRIE, ELIGIBILITY, PRIORITY, ks=(2, 8), beam_width=64, chunk_requests=chunk_requests,
                                  progress=False)
    for k in (2, 8):
        hitr, ndcg, eligible, total = slow_metrics(batches, k)
        assert 0 < hitr < 1 and metrics[f"hitr@{k}"] == pytest.approx(hitr) and metrics[f"ndcg@{k}"] == pytest.approx(ndcg)
    assert metrics["num_targets"] == total and metrics["num_requests"] == 15 and metrics["illegal_items"] == 0
    assert metrics["eligible_target_frac"] == pytest.approx(eligible) and 0 < eligible < 1
    assert metrics["requests_per_s"] > 0 and decoder.starts == 3
    assert decoder.calls == L * sum(-(-requests // chunk_requests) for requests in (9, 0, 6))


def test_ranks_call_the_model_equally_often_and_add_up():
    """Two ranks in lock step, without processes: the sizes of the other rank's batches and its sums are known beforehand."""
    ours, theirs = [make_batch(5, 0), make_batch(0, 1)], [make_batch(2, 2), make_batch(11, 3)]
    options = {"ks": (2,), "beam_width": 16, "chunk_requests": 3, "progress": False}
    single = evaluate_generation(TableDecoder(), ours + theirs, TRIE, ELIGIBILITY, PRIORITY, **options)

    def run(batches, others, other_sums):
        decoder, reduced, sizes = TableDecoder(), [], iter(-(-batch.request_token_R.numel() // 3) for batch in others)

        def all_reduce(tensor, op):
            reduced.append(tensor.clone())
            if op == "max":
                return torch.maximum(tensor, torch.tensor(next(sizes, 0)))
            return tensor + other_sums

        metrics = evaluate_generation(decoder, batches, TRIE, ELIGIBILITY, PRIORITY, all_reduce=all_reduce, **options)
        return decoder.calls, metrics, next(tensor for tensor in reduced if tensor.dim() == 1)

    their_sums = run(theirs, ours, 0)[2]
    our_calls, metrics, our_sums = run(ours, theirs, their_sums)
    their_calls, other_metrics, _ = run(theirs, ours, our_sums)
    assert our_calls == their_calls == L * (2 + 4)
    for name in ("hitr@2", "ndcg@2", "num_requests", "num_targets", "eligible_target_frac", "illegal_items"):
        assert metrics[name] == other_metrics[name] == pytest.approx(single[name])


def test_items_outside_the_eligibility_would_be_counted(monkeypatch):
    monkeypatch.setattr("gpr_dist.evaluation.evaluate.LegalCache.__call__",
                        lambda self, groups_B: (TRIE.legal_nodes([None]), torch.zeros_like(groups_B)))
    metrics = evaluate_generation(TableDecoder(), [make_batch(9, 0)], TRIE, ELIGIBILITY, PRIORITY, ks=(8,), progress=False)
    restricted = int((make_batch(9, 0).request_eligibility_R != EVERY_AD).sum())
    assert 0 < metrics["illegal_items"] <= 8 * restricted
