"""Tokenizer metrics against slow, obvious versions."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from gpr_dist.tokenizer import metrics, residuals
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.metrics import format_report, group_items, measure, pairwise_similarity
from gpr_dist.tokenizer.quantizer import Quantizer

NUM_CODES = 4


def quantizer_of(codebooks: np.ndarray) -> Quantizer:
    made = Quantizer(TokenizerConfig(num_levels=codebooks.shape[0], codebook_size=codebooks.shape[1]), codebooks.shape[2])
    made.codebooks_LVK.data.copy_(torch.from_numpy(codebooks))
    return made


@pytest.fixture
def catalogue():
    random = np.random.default_rng(0)
    codes = random.integers(NUM_CODES, size=(200, 3)).astype(np.int32)
    codes[codes[:, 1] == 3, 1] = 0  # an unused code
    embeddings = random.normal(size=(200, 5)).astype(np.float32)
    embeddings[7] = 0
    return embeddings, codes, random.normal(size=(3, NUM_CODES, 5)).astype(np.float32)


def cosine(a, b):
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b) / norm if norm else 0.0


def test_report_equals_brute_force(catalogue):
    embeddings, codes, codebooks = catalogue
    report = measure(embeddings, codes, quantizer_of(codebooks))
    counts = Counter(map(tuple, codes.tolist()))
    assert report.num_items == 200 and report.num_distinct == len(counts)
    assert report.collision == pytest.approx(1 - len(counts) / 200)
    assert report.not_alone_frac == pytest.approx(sum(n for n in counts.values() if n > 1) / 200)
    assert report.largest_group == max(counts.values())
    for level in range(3):
        used = Counter(codes[:, level].tolist())
        assert report.cur[level] == len(used) / NUM_CODES
        assert report.entropy_bits[level] == pytest.approx(-sum(n / 200 * np.log2(n / 200) for n in used.values()))
    pairs = [(i, j) for i, j in combinations(range(200), 2) if (codes[i] == codes[j]).all()]
    assert report.pas == pytest.approx(np.mean([cosine(embeddings[i], embeddings[j]) for i, j in pairs]))
    residual, variance = embeddings.astype(np.float64), np.square(embeddings - embeddings.mean(0)).sum()
    for level in range(3):
        residual = residual - codebooks[level][codes[:, level]]
        assert report.reconstruction_error[level] == pytest.approx(np.square(residual).sum() / variance, rel=1e-5)


def test_chunks_do_not_change_the_numbers(catalogue, monkeypatch):
    whole = measure(*catalogue[:2], quantizer_of(catalogue[2]))
    monkeypatch.setattr(metrics, "_READ_ROWS", 7)
    monkeypatch.setattr(residuals, "_READ_ROWS", 7)
    chunked = measure(*catalogue[:2], quantizer_of(catalogue[2]))
    assert chunked.pas == pytest.approx(whole.pas)
    np.testing.assert_allclose(chunked.reconstruction_error, whole.reconstruction_error, rtol=1e-6)


def test_similarity_of_a_sample_is_that_of_its_whole_groups():
    codes = np.repeat(np.arange(4), 25)[:, None].astype(np.int32)
    embeddings = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    groups = group_items(codes, NUM_CODES)
    of_group = [pairwise_similarity(embeddings[codes[:, 0] == g], group_items(codes[:25], NUM_CODES)) for g in range(4)]
    sampled = pairwise_similarity(embeddings, groups, max_items=60)
    assert any(sampled == pytest.approx((of_group[a] + of_group[b]) / 2) for a, b in combinations(range(4), 2))


def test_every_kth_item_of_a_huge_group_stands_for_all(monkeypatch):
    codes = np.repeat([0, 1], [600, 7])[:, None].astype(np.int32)
    embeddings = np.random.default_rng(0).normal(1, 1, size=(607, 3)).astype(np.float32)
    whole = pairwise_similarity(embeddings, group_items(codes, NUM_CODES))
    monkeypatch.setattr(metrics, "_GROUP_ITEMS", 200)
    kth, small = embeddings[:600:3], embeddings[600:]
    means = [np.mean([cosine(a, b) for a, b in combinations(group, 2)]) for group in (kth, small)]
    pairs = 600 * 599 / 2, 7 * 6 / 2
    sampled = pairwise_similarity(embeddings, group_items(codes, NUM_CODES))
    assert sampled == pytest.approx(np.average(means, weights=pairs)) == pytest.approx(whole, abs=0.05)


def test_groups_are_a_partition_in_the_order_of_the_codes(catalogue):
    _, codes, _ = catalogue
    groups = group_items(codes, NUM_CODES)
    assert sorted(groups.items_N.tolist()) == list(range(200))
    seen = []
    for lo, hi in zip(groups.offsets_G1[:-1], groups.offsets_G1[1:], strict=True):
        members = groups.items_N[lo:hi]
        assert np.all(np.diff(members) > 0) and len(np.unique(codes[members], axis=0)) == 1
        seen.append(tuple(codes[members[0]].tolist()))
    assert seen == sorted(set(seen))


def test_items_all_alone_have_no_similarity():
    codes = np.arange(8)[:, None].astype(np.int32)
    report = measure(np.eye(8, dtype=np.float32), codes, quantizer_of(np.eye(8, dtype=np.float32)[None]))
    assert (report.collision, report.not_alone_frac, report.largest_group, report.pas) == (0, 0, 1, None)
    assert report.reconstruction_error == (0.0,) and report.entropy_bits == (3.0,)
    assert "none collide" in format_report(report)
