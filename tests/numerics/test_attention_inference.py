"""Rows joined in one call, as inference does, against the explicit form: rows of other lengths, without queries, without a reader."""

import pytest
import torch

from gpr_dist.ops.attention import Spans, hybrid_attention, intent_spans

H, K = 2, 8
CASES = {  # (keys of each row, queries of each row)
    "equal": ([9, 9, 9], [4, 4, 4]), "other keys": ([9, 7, 8], [4, 4, 4]), "other queries": ([9, 9, 9], [4, 3, 2]),
    "a row without queries": ([9, 8, 9, 7], [3, 0, 4, 3]), "one row": ([5], [3]), "one query each": ([6, 5, 7, 6], [1, 1, 1, 1]),
    "too different": ([40, 2, 3], [9, 1, 1])}


def random_spans(keys, queries, seed):
    generator = torch.Generator().manual_seed(seed)
    key_offsets, query_offsets = ([0, *torch.tensor(counts).cumsum(0).tolist()] for counts in (keys, queries))
    first, last = [], []
    for row, count in enumerate(queries):
        for _ in range(count):
            low, high = sorted(torch.randint(keys[row], (2,), generator=generator).tolist())
            first.append(key_offsets[row] + low)
            last.append(key_offsets[row] + high)
    return Spans(torch.tensor(first), torch.tensor(last), query_offsets, key_offsets)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_joined_rows_are_the_rows(case, dtype):
    keys, queries = CASES[case]
    for seed in range(3):
        spans = random_spans(keys, queries, seed)
        torch.manual_seed(seed)
        q, k, v = (torch.randn(size, H, K, dtype=dtype) for size in (sum(queries), sum(keys), sum(keys)))
        wanted = hybrid_attention(q, k, v, spans, implementation="reference")
        with torch.inference_mode():
            found = hybrid_attention(q, k, v, spans, implementation="torch")
        assert (spans.padded(dtype) is None) == (case == "too different")
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        with torch.inference_mode():  # what one row holds never reaches another, not even by NaN
            k[: keys[0]] = torch.nan
            after = hybrid_attention(q, k, v, spans, implementation="torch")
        torch.testing.assert_close(after[queries[0]:], found[queries[0]:], rtol=0, atol=1e-6)


def test_queries_that_read_their_whole_row_need_no_mask():
    site, start = torch.tensor([3, 3, 8, 8]), torch.tensor([0, 0, 4, 4])
    assert intent_spans(site, start, [0, 2, 4], [0, 4, 9]).padded(torch.float32).add is not None  # rows of 4 and 5 keys
    site, start = torch.tensor([3, 3, 7, 7]), torch.tensor([0, 0, 4, 4])
    padded = intent_spans(site, start, [0, 2, 4], [0, 4, 8]).padded(torch.float32)
    assert padded.add is None and padded.query_index is None and padded.key_index is None


def test_an_empty_span_is_not_joined():
    spans = Spans(torch.tensor([0, 3]), torch.tensor([1, 2]), [0, 1, 2], [0, 2, 4])
    with torch.inference_mode():
        found = hybrid_attention(*(torch.ones(n, H, K) for n in (2, 4, 4)), spans, implementation="torch")
    assert spans.padded(torch.float32) is None and (found[0] == 1).all() and (found[1] == 0).all()
