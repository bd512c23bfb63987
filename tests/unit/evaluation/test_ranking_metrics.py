import math

import numpy as np
import pytest
import torch

from gpr_dist.evaluation import metrics
from gpr_dist.evaluation.metrics import add_sums, ranking_metrics, ranking_sums

RANKED = torch.tensor([[4, 7, 9, 1], [2, -1, -1, -1], [3, 5, 6, 8]])
REQUEST = torch.tensor([0, 0, 0, 1, 1, 2])
ITEM = torch.tensor([9, 4, 5, 2, 2, 8])  # ranks 3, 1, none, 1, 1 (the same ad twice is two events), 4


def test_by_hand():
    result = ranking_metrics(ranking_sums(RANKED, REQUEST, ITEM, ks=(1, 3, 4)))
    assert result["hitr@1"] == 3 / 6 and result["hitr@3"] == 4 / 6 and result["hitr@4"] == 5 / 6
    assert result["ndcg@1"] == 3 / 6
    assert result["ndcg@3"] == pytest.approx((3 + 1 / 2) / 6)
    assert result["ndcg@4"] == pytest.approx((3 + 1 / 2 + 1 / math.log2(5)) / 6)
    assert result["num_targets"] == 6 and result["num_requests"] == 3


def test_batches_and_chunks_add_up(monkeypatch):
    rng = np.random.default_rng(0)
    ranked = torch.from_numpy(np.stack([rng.permutation(50)[:20] for _ in range(30)]))
    request, item = torch.from_numpy(rng.integers(0, 30, 200)), torch.from_numpy(rng.integers(0, 50, 200))
    whole = ranking_sums(ranked, request, item, (5, 20))
    first = request < 11
    parts = [ranking_sums(ranked[:11], request[first], item[first], (5, 20)),
             ranking_sums(ranked[:0], request[:0], item[:0], (5, 20)),
             ranking_sums(ranked[11:], request[~first] - 11, item[~first], (5, 20))]
    assert ranking_metrics(add_sums(parts)) == pytest.approx(ranking_metrics(whole))
    assert 0 < whole["hitr@5"] < whole["hitr@20"] < 200
    monkeypatch.setattr(metrics, "EVENTS_PER_CHUNK", 7)
    assert ranking_metrics(ranking_sums(ranked, request, item, (5, 20))) == ranking_metrics(whole)


def test_no_event_gives_nan_not_zero():
    result = ranking_metrics(ranking_sums(RANKED, REQUEST[:0], ITEM[:0], (2,)))
    assert math.isnan(result["hitr@2"]) and math.isnan(result["ndcg@2"]) and result["num_targets"] == 0
