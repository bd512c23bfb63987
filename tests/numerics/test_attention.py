"""Attention over packed rows: every implementation against a loop over single queries, outputs and gradients."""

import pytest
import torch

from gpr_dist.errors import ConfigError
from gpr_dist.ops.attention import (
    AHEAD,
    RelativeBias,
    Spans,
    check_implementation,
    default_implementation,
    hybrid_attention,
    hybrid_spans,
    intent_spans,
    time_bucket,
)

KEYS, QUERIES, H, K = [0, 5, 12, 13, 21], [0, 3, 3, 4, 11], 2, 16
CPU = [("reference", "softmax"), ("torch", "softmax"), ("reference", "silu"), ("torch", "silu")]
EVERY = pytest.mark.parametrize(("implementation", "score"), CPU)


def decoder_inputs(dtype, device="cpu"):
    """Queries that read windows of their row's keys, some rows without a query."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, H, K, generator=g, dtype=torch.float64) for n in (QUERIES[-1], KEYS[-1], KEYS[-1]))
    q, k, v = (x.to(device, dtype).requires_grad_() for x in (2 * q, k, v))
    row = torch.repeat_interleave(torch.arange(4), torch.tensor(QUERIES).diff())
    start, length = torch.tensor(KEYS)[row], torch.tensor(KEYS).diff()[row]
    site = start + (torch.rand(len(row), generator=g) * length).long()
    spans = intent_spans(site.to(device), start.to(device), QUERIES, KEYS, window=3)
    return q, k, v, spans, None, torch.randn(QUERIES[-1], H, K, generator=g, dtype=torch.float64)


def encoder_inputs(dtype, device="cpu"):
    """Tokens of rows of blocks that look at themselves, with relative bias; long enough for several blocks of a kernel."""
    g = torch.Generator().manual_seed(1)
    offsets = [0, 140, 141, 141, 300]
    num_tokens = offsets[-1]
    q, k, v = (torch.randn(num_tokens, H, K, generator=g, dtype=torch.float64) for _ in range(3))
    q, k, v = (x.to(device, dtype).requires_grad_() for x in (q, k, v))
    block = torch.arange(num_tokens) // 5
    spans = hybrid_spans(block.to(device), (torch.arange(num_tokens) % 5 < 3).to(device), offsets)
    position = torch.cat([torch.arange(n) for n in torch.tensor(offsets).diff().tolist()])
    seconds = torch.randint(0, 10**6, (num_tokens,), generator=g).cumsum(0)
    tables = [torch.randn(n, H, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_() for n in (64, 40)]
    bias = RelativeBias(*tables, position.to(device), seconds.to(device), {})
    return q, k, v, spans, bias, torch.randn(num_tokens, H, K, generator=g, dtype=torch.float64)


def shared_bias_inputs(dtype, device="cpu"):
    """The same with one bias for all heads."""
    q, k, v, spans, bias, direction = encoder_inputs(dtype, device)
    tables = [table.detach()[:, :1].clone().requires_grad_() for table in (bias.position_PH, bias.time_GH)]
    return q, k, v, spans, RelativeBias(*tables, bias.position_T, bias.seconds_T, {}), direction


def one_query_at_a_time(q, k, v, spans, bias, score):
    rows = []
    for i in range(len(q)):
        keys = torch.arange(spans.first_Q[i], spans.last_Q[i] + 1)
        scores = torch.einsum("thk,hk->ht", k[keys], q[i]) / K**0.5
        if bias is not None:
            distance = (bias.position_T[i] - bias.position_T[keys] + AHEAD).clamp(0, len(bias.position_PH) - 1)
            when = ((bias.seconds_T[i] - bias.seconds_T[keys]).abs() + 1).double().log2().mul(2).long().clamp_max(len(bias.time_GH) - 1)
            scores = scores + (bias.position_PH[distance] + bias.time_GH[when]).T
        weights = scores.softmax(1) if score == "softmax" else scores * scores.sigmoid() / 256
        rows.append(torch.einsum("ht,thk->hk", weights, v[keys]))
    return torch.stack(rows)


def check_against_the_loop(make, implementation, score, dtype, tolerance, device="cpu"):
    q, k, v, spans, bias, direction = make(dtype, device)
    learned = [q, k, v] + ([bias.position_PH, bias.time_GH] if bias else [])
    out = hybrid_attention(q, k, v, spans, score, bias, 256, implementation)
    assert out.dtype == dtype and out.shape == q.shape
    out.backward(direction.to(device, dtype))
    slow = [x.detach().cpu().double().requires_grad_() for x in learned]
    slow_spans = Spans(spans.first_Q.cpu(), spans.last_Q.cpu(), spans.query_offsets, spans.key_offsets)
    slow_bias = RelativeBias(*slow[3:], bias.position_T.cpu(), bias.seconds_T.cpu(), {}) if bias else None
    expected = one_query_at_a_time(*slow[:3], slow_spans, slow_bias, score)
    expected.backward(direction)
    for found, wanted in zip((out, *(x.grad for x in learned)), (expected, *(x.grad for x in slow)), strict=True):
        assert (found.cpu().double() - wanted).norm() / wanted.norm() < tolerance


@EVERY
@pytest.mark.parametrize("make", [decoder_inputs, encoder_inputs, shared_bias_inputs])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_output_and_gradients_equal_a_loop_over_queries(make, implementation, score, dtype, tolerance):
    check_against_the_loop(make, implementation, score, dtype, tolerance)


@pytest.mark.parametrize("make", [decoder_inputs, encoder_inputs, shared_bias_inputs])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_flex_attention_computes_the_same_outputs(make, dtype, tolerance):
    q, k, v, spans, bias, _ = make(dtype)
    with torch.no_grad():  # it has no backward pass on a CPU; on a GPU see below
        found = hybrid_attention(q, k, v, spans, "softmax", bias, implementation="flex")
        expected = hybrid_attention(q, k, v, spans, "softmax", bias, implementation="reference")
    assert found.dtype == dtype and (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("implementation", "score"), [*CPU, ("flex", "softmax"), ("triton", "softmax"), ("triton", "silu")])
@pytest.mark.parametrize("make", [decoder_inputs, encoder_inputs, shared_bias_inputs])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.03)])
def test_output_and_gradients_on_a_gpu(make, implementation, score, dtype, tolerance):
    check_against_the_loop(make, implementation, score, dtype, tolerance, "cuda")


@EVERY
@pytest.mark.parametrize("num_keys", [0, 4])
def test_without_queries_the_graph_stays(implementation, score, num_keys):
    q, k, v = (torch.randn(n, H, K, requires_grad=True) for n in (0, num_keys, num_keys))
    rows = int(num_keys > 0)
    none = torch.zeros(0, dtype=torch.int64)
    tables = [torch.randn(64, H, requires_grad=True) for _ in range(2)]
    for bias in (None, RelativeBias(*tables, torch.arange(num_keys), torch.arange(num_keys), {})):
        spans = Spans(none, none, [0] * (rows + 1), [0, num_keys][: rows + 1])
        out = hybrid_attention(q, k, v, spans, score, bias, implementation=implementation)
        assert out.shape == (0, H, K)
        out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (q, k, v, *tables))


@pytest.mark.parametrize("score", ["softmax", "silu"])
def test_one_row_does_not_see_another(score):
    q, k, v, spans, _, _ = decoder_inputs(torch.float32)
    before = hybrid_attention(q, k, v, spans, score)
    with torch.no_grad():
        k[KEYS[1] : KEYS[2]] += 1
        v[KEYS[3] :] = 1e30  # finite: short rows share a product, in which the others' weights are 0
    after = hybrid_attention(q, k, v, spans, score)
    assert torch.equal(before[: QUERIES[3]], after[: QUERIES[3]]) and (after[QUERIES[3] :].abs() > 1e20).all()


def test_hybrid_spans_are_the_rule_of_equation_2_inside_a_block():
    block = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
    prompt = [True, True, True, False, True, False, False, True, True, True, True]
    offsets = [0, 9, 9, 11]  # the last row begins where its prompt does
    spans = hybrid_spans(torch.tensor(block), torch.tensor(prompt), offsets)
    causal = hybrid_spans(torch.tensor(block), torch.tensor(prompt), offsets, causal=True)
    row = [0] * 9 + [2] * 2
    for i in range(11):
        for j in range(11):
            allowed = row[i] == row[j] and (j <= i or (block[i] == block[j] and prompt[i] and prompt[j]))
            assert (spans.first_Q[i] <= j <= spans.last_Q[i]) == allowed, (i, j)
            assert (causal.first_Q[i] <= j <= causal.last_Q[i]) == (row[i] == row[j] and j <= i)


def test_an_ad_between_the_prompts_of_a_block_stays_hidden():
    spans = hybrid_spans(torch.zeros(5, dtype=torch.long), torch.tensor([True, True, False, True, True]), [0, 5])
    assert spans.last_Q.tolist() == [1, 1, 2, 4, 4]


@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_intent_spans_are_the_last_tokens_up_to_the_site(window):
    sites = torch.tensor([10, 12, 16, 12])
    spans = intent_spans(sites, torch.full((4,), 10), [0, 4], [10, 17], window)
    for query, site in enumerate(sites.tolist()):
        assert spans.last_Q[query] == site and spans.first_Q[query] == (10 if window == 0 else max(10, site - window + 1))


def test_selected_spans_are_the_old_ones_without_the_tokens_left_out():
    torch.manual_seed(0)
    offsets = [0, 12, 12, 13, 30]
    spans = hybrid_spans(torch.arange(30) // 4, torch.arange(30) % 4 < 3, offsets)
    for kept in (torch.rand(30) < 0.5, torch.zeros(30, dtype=torch.bool), torch.ones(30, dtype=torch.bool)):
        index = kept.nonzero().squeeze(1)
        chosen = spans.select(index)
        assert chosen.key_offsets == [int((index < end).sum()) for end in offsets]
        for place, token in enumerate(index.tolist()):
            seen = index[int(chosen.first_Q[place]): int(chosen.last_Q[place]) + 1].tolist()
            assert seen == [j for j in index.tolist() if spans.first_Q[token] <= j <= spans.last_Q[token]]


def test_time_buckets_are_half_powers_of_two():
    assert time_bucket(torch.tensor([0, 1, -1, 3, 7, 10**12]), 64).tolist() == [0, 2, 2, 4, 6, 63]


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="FlexAttention has no SiLU"):
        check_implementation("flex", "silu", "hsd.attention")
    assert default_implementation(torch.device("cpu"), "silu") == "torch"
    assert default_implementation(torch.device("cuda"), "softmax") == "flex"


@pytest.mark.parametrize("longest", [0, 2048])
def test_long_and_short_rows_train_alike_on_a_cpu(longest, monkeypatch):
    monkeypatch.setattr("gpr_dist.ops.attention._PRODUCTS_MOST_KEYS", longest)  # the fused kernel, plain products
    monkeypatch.setattr("gpr_dist.ops.attention._PIECE_QUERIES", {"fused": 32, "products": 16})
    q, k, v, spans, _, direction = encoder_inputs(torch.float32)
    learned, expected = [q, k, v], one_query_at_a_time(q, k, v, spans, None, "softmax")
    wanted = torch.autograd.grad(expected, learned, direction.float())
    out = hybrid_attention(q, k, v, spans)
    for found, right in zip((out, *torch.autograd.grad(out, learned, direction.float())), (expected, *wanted), strict=True):
        assert (found - right).norm() / right.norm() < 1e-5


def test_a_query_that_reads_nothing_gets_zeros_and_no_gradient():
    q, k, v, spans, _, _ = decoder_inputs(torch.float32)
    out = hybrid_attention(q, k, v, Spans(spans.first_Q, spans.first_Q - 1, QUERIES, KEYS))
    out.sum().backward()
    assert not out.any() and all(not x.grad.any() for x in (q, k, v))
