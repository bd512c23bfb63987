"""Attention over packed rows: both paths against a loop over single queries, outputs and gradients."""

import pytest
import torch

from gpr_dist.ops.attention import hybrid_mask, intent_mask, jagged_attention

KEYS, QUERIES, H, K = [0, 5, 12, 13, 21], [0, 3, 3, 4, 11], 2, 4


def inputs(dtype):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, H, K, generator=g, dtype=torch.float64) for n in (QUERIES[-1], KEYS[-1], KEYS[-1]))
    q, k, v = ((2 * x).to(dtype).requires_grad_() for x in (q, k, v))
    window = 3
    masks = [intent_mask(torch.randint(KEYS[b + 1] - KEYS[b], (QUERIES[b + 1] - QUERIES[b],), generator=g), KEYS[b + 1] - KEYS[b],
                         window if b % 2 else 0) for b in range(4)]
    return q, k, v, masks, torch.randn(QUERIES[-1], H, K, generator=g, dtype=torch.float64)


def one_query_at_a_time(q, k, v, masks):
    out = torch.zeros_like(q)
    for row, mask in enumerate(masks):
        for i in range(QUERIES[row], QUERIES[row + 1]):
            keys = KEYS[row] + mask[i - QUERIES[row]].nonzero().squeeze(1)
            for head in range(H):
                weights = torch.softmax(k[keys, head] @ q[i, head] / K**0.5, 0)
                out = out.index_put((torch.tensor(i), torch.tensor(head)), weights @ v[keys, head])
    return out


@pytest.mark.parametrize("implementation", ["sdpa", "reference"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_output_and_gradients_equal_a_loop_over_queries(implementation, dtype, tolerance):
    q, k, v, masks, direction = inputs(dtype)
    out = jagged_attention(q, k, v, QUERIES, KEYS, masks, implementation)
    assert out.dtype == dtype
    out.backward(direction.to(dtype))
    slow = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = one_query_at_a_time(*slow, masks)
    expected.backward(direction)
    for found, wanted in zip((out, q.grad, k.grad, v.grad), (expected, *(x.grad for x in slow)), strict=True):
        assert (found.double() - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize("implementation", ["sdpa", "reference"])
@pytest.mark.parametrize("num_keys", [0, 4])
def test_without_queries_the_graph_stays(implementation, num_keys):
    q, k, v = (torch.randn(n, H, K, requires_grad=True) for n in (0, num_keys, num_keys))
    rows = int(num_keys > 0)
    out = jagged_attention(q, k, v, [0] * (rows + 1), [0, num_keys][: rows + 1], [torch.ones(0, num_keys, dtype=torch.bool)] * rows,
                           implementation)
    assert out.shape == (0, H, K)
    out.sum().backward()
    assert all(x.grad is not None and not x.grad.any() for x in (q, k, v))


def test_one_row_does_not_see_another():
    q, k, v, masks, _ = inputs(torch.float32)
    before = jagged_attention(q, k, v, QUERIES, KEYS, masks)
    with torch.no_grad():
        k[KEYS[1] : KEYS[2]] += 1
        v[KEYS[3] :] = float("nan")
    after = jagged_attention(q, k, v, QUERIES, KEYS, masks)
    assert torch.equal(before[: QUERIES[3]], after[: QUERIES[3]]) and after[QUERIES[3] :].isnan().all()


def test_hybrid_mask_is_the_rule_of_equation_2_inside_a_block():
    block = [0, 0, 0, 0, 1, 1, 1, 2, 2, 3]
    prompt = [True, True, True, False, True, False, False, True, True, True]
    mask = hybrid_mask(torch.tensor(block), torch.tensor(prompt))
    for i in range(10):
        for j in range(10):
            assert mask[i, j] == (j <= i or (block[i] == block[j] and prompt[i] and prompt[j])), (i, j)


@pytest.mark.parametrize("window", [0, 1, 3, 100])
def test_intent_mask_is_the_last_tokens_up_to_the_site(window):
    sites = [0, 2, 6, 2]
    mask = intent_mask(torch.tensor(sites), 7, window)
    for query, site in enumerate(sites):
        wanted = set(range(0 if window == 0 else max(0, site - window + 1), site + 1))
        assert set(mask[query].nonzero().flatten().tolist()) == wanted
