"""One fused Triton kernel family for `hybrid_attention`: softmax or SiLU scores over spans of keys, with the relative bias inside.

Owns the kernels, their launch and their gradients; what the numbers mean is said by `attention`'s `reference`. Nothing of size queries ×
keys is ever stored: a block of queries walks the keys from its smallest first to its largest last, and the backward pass computes the
scores again (softmax from the saved log-sum-exp): once for dq and once for dk and dv, seven products of tiles where a single kernel with
atomic additions into dq would need five. Keys find their queries by two sorted envelopes of the spans, so the host never waits for the
device. Sums are float32; weights are rounded to the values' precision before they meet the values, as in any flash kernel.
With `TRITON_INTERPRET=1` before the first import of triton the same kernels run on a CPU, slowly, for tests.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpr_dist.ops.attention import AHEAD, RelativeBias, Score, Spans

# T keys  Q queries  H heads  K head width  P, G position and time buckets  N blocks of queries; in kernels M, N: a tile's queries, keys

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_FEW_BUCKETS = tl.constexpr(8)
"""up to so many buckets of a tile are summed one after another; for more, atomic additions, which round in any order (not measured)"""
_SMALLEST_M = 16 if _INTERPRETED else 32


def span_attention(q_QHK: Tensor, k_THK: Tensor, v_THK: Tensor, spans: Spans, score: Score, bias: RelativeBias | None,
                   silu_length: int) -> Tensor:
    """See `attention.hybrid_attention`. Not differentiable twice.

    Spans may be in any order; they are quick when their ends rise along a row, because a block of queries reads all keys between its
    outermost ones. `torch.use_deterministic_algorithms(True)` is for runs that repeat to the bit: fixed tiles and no atomic additions
    of several threads to one number, needed only for the gradients of the bias.
    Rows are apart but for what is not finite: a NaN among the values reaches queries of other rows in its tile, as 0 · NaN.
    Assumes: timestamps of one batch within 68 years of each other (farther ones share a bucket), fewer than 2³¹ keys and queries.
    """
    bounds = _bounds(spans, len(k_THK))
    position_PH = time_GH = places = None
    if bias is not None:
        position_PH, time_GH, places = bias.position_PH, bias.time_GH, _places(bias)
    return _SpanAttention.apply(q_QHK, k_THK, v_THK, position_PH, time_GH, bounds, places, score == "silu", silu_length)


def _bounds(spans: Spans, num_keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """first_Q and last_Q, empty spans outside everything, and for each key the range low..end-1 of queries that may read it; int32.

    No query before low reaches as far as the key and none from end on begins at or before it; between them others may pass it by.
    """
    if "triton" not in spans.made:
        empty_Q = spans.first_Q > spans.last_Q
        first_Q, last_Q = spans.first_Q.masked_fill(empty_Q, num_keys), spans.last_Q.masked_fill(empty_Q, -1)
        key_T = torch.arange(num_keys, device=first_Q.device)
        low_T = torch.searchsorted(last_Q.cummax(0).values, key_T)
        end_T = torch.searchsorted(first_Q.flip(0).cummin(0).values.flip(0), key_T, right=True)
        spans.made["triton"] = tuple(x.int().contiguous() for x in (first_Q, last_Q, low_T, end_T))
    return spans.made["triton"]


def _places(bias: RelativeBias) -> tuple[Tensor, Tensor]:
    """Position and time of each token as int32, time counted from the batch's earliest: converting 64-bit integers is slow on a GPU."""
    if "triton" not in bias.made:
        seconds_T = (bias.seconds_T - bias.seconds_T.min()).clamp_max(2**31 - 2)
        bias.made["triton"] = bias.position_T.int().contiguous(), seconds_T.int().contiguous()
    return bias.made["triton"]


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, q_QHK: Tensor, k_THK: Tensor, v_THK: Tensor, position_PH: Tensor | None, time_GH: Tensor | None,
                bounds: tuple[Tensor, ...], places: tuple[Tensor, Tensor] | None, silu: bool, silu_length: int) -> Tensor:
        q_QHK, k_THK, v_THK = (x if x.stride(-1) == 1 else x.contiguous() for x in (q_QHK, k_THK, v_THK))
        num_queries, num_heads, width = q_QHK.shape
        first_Q, last_Q, _, _ = bounds
        table_HB = first_Q  # never read without a bias
        if position_PH is not None:
            table_HB = torch.cat((position_PH, time_GH)).t().float().contiguous()
        places = places or (first_Q, first_Q)
        out_QHK = torch.empty(q_QHK.shape, dtype=q_QHK.dtype, device=q_QHK.device)
        lse_QH = torch.empty((num_queries, num_heads), dtype=torch.float32, device=q_QHK.device)
        ctx.settings = {
            "scale": width**-0.5, "silu_scale": 1 / silu_length, "WIDTH": width, "PADDED": max(16, triton.next_power_of_2(width)),
            "SILU": silu, "POSITIONS": 0 if position_PH is None else len(position_PH), "TIMES": 0 if time_GH is None else len(time_GH),
            "AHEAD": AHEAD, "DOT": _dot_precision(), "DETERMINISTIC": torch.are_deterministic_algorithms_enabled()}
        with torch.cuda.device_of(q_QHK):
            _forward_kernel[_grid(num_queries, num_heads, "M")](
                q_QHK, k_THK, v_THK, out_QHK, lse_QH, first_Q, last_Q, table_HB, *places, num_queries,
                *_strides(q_QHK, k_THK, v_THK), num_heads, **ctx.settings)
        ctx.save_for_backward(q_QHK, k_THK, v_THK, out_QHK, lse_QH, table_HB, *bounds, *places)
        ctx.table_type = None if position_PH is None else (position_PH.dtype, time_GH.dtype)
        return out_QHK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: object, dout_QHK: Tensor) -> tuple[Tensor | None, ...]:
        q_QHK, k_THK, v_THK, out_QHK, lse_QH, table_HB, first_Q, last_Q, low_T, end_T, *places = ctx.saved_tensors
        if dout_QHK.stride(-1) != 1:
            dout_QHK = dout_QHK.contiguous()
        num_queries, num_heads, _ = q_QHK.shape
        dq_QHK, dk_THK, dv_THK = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_QHK, k_THK, v_THK))
        delta_QH = torch.empty_like(lse_QH)
        dtable_NHB = lse_QH.new_empty(1)  # never written without a bias
        if ctx.table_type:
            dtable_NHB = lse_QH.new_zeros((triton.cdiv(num_queries, _SMALLEST_M), *table_HB.shape))
        with torch.cuda.device_of(q_QHK):
            _backward_query_kernel[_grid(num_queries, num_heads, "M")](
                q_QHK, k_THK, v_THK, out_QHK, dout_QHK, lse_QH, delta_QH, dq_QHK, first_Q, last_Q, table_HB, dtable_NHB, *places,
                num_queries, *_strides(q_QHK, k_THK, v_THK, dout_QHK), num_heads, **ctx.settings)
            _backward_key_kernel[_grid(len(k_THK), num_heads, "N")](
                q_QHK, k_THK, v_THK, dout_QHK, lse_QH, delta_QH, dk_THK, dv_THK, first_Q, last_Q, low_T, end_T, table_HB, *places,
                num_queries, len(k_THK), *_strides(q_QHK, k_THK, v_THK, dout_QHK), num_heads, **ctx.settings)
        dposition_PH = dtime_GH = None
        if ctx.table_type:
            dtable_BH = dtable_NHB.sum(0).t()
            split = ctx.settings["POSITIONS"]
            dposition_PH, dtime_GH = dtable_BH[:split].to(ctx.table_type[0]), dtable_BH[split:].to(ctx.table_type[1])
        return dq_QHK, dk_THK, dv_THK, dposition_PH, dtime_GH, None, None, None, None


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _grid(length: int, num_heads: int, block: str) -> object:
    return lambda chosen: (triton.cdiv(length, chosen[block]), num_heads)


def _dot_precision() -> str:
    """How float32 tiles are multiplied, after PyTorch's own setting: as three products on the tensor cores, or as one.

    ("ieee", outside the tensor cores, takes minutes to compile for wide heads.) NumPy, which interprets, has no bfloat16 to multiply.
    """
    if _INTERPRETED:
        return "interpreted"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _that_fit(configs: list[triton.Config], arguments: dict, **settings: object) -> list[triton.Config]:
    """Those whose tiles fit into shared memory; the first of them if every run shall be the same."""
    settings = arguments | settings
    available = torch.cuda.get_device_properties(settings["q"].device).shared_memory_per_block_optin
    fit = [config for config in configs if _shared_bytes(config, settings) <= available] or configs[-1:]
    return fit[:1] if settings["DETERMINISTIC"] else fit


def _shared_bytes(config: triton.Config, settings: dict) -> int:
    """What a block needs, as compiled for sm_90 with Triton 3.9: two tensors' tiles that stay, two in flight per stage, up to a quarter
    more for their parts in float32, and the bias's changes of layout.
    """
    stays, passes = config.kwargs["M"], config.kwargs["N"]
    if "low_k" in settings:  # the keys' kernel
        stays, passes = passes, stays
    tiles = 2 * (stays + config.num_stages * passes) * settings["PADDED"] * settings["q"].element_size()
    return tiles * 5 // 4 + (12 * stays * passes if settings["POSITIONS"] else 0) + 4096


def _tuned(*tiles: tuple[int, int, int, int], written: tuple[str, ...] = ()) -> object:
    """Measures each (queries, keys, warps, stages) once per kind of call and keeps the quickest; the last one fits everywhere."""
    if _INTERPRETED:
        tiles = ((_SMALLEST_M, 16, 1, 1),)
    configs = [triton.Config({"M": m, "N": n}, num_warps=warps, num_stages=stages) for m, n, warps, stages in tiles]
    return triton.autotune(configs, key=["PADDED", "SILU", "POSITIONS", "DOT", "DETERMINISTIC"], reset_to_zero=list(written),
                           prune_configs_by={"early_config_prune": _that_fit})


@triton.jit
def _dot(a, b, DOT: tl.constexpr):
    if DOT == "interpreted":
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    return tl.dot(a, b, input_precision=DOT)


@triton.jit
def _tile(base, index, seen, token_stride, head_stride, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows `index` of one head, [len(index), PADDED]; zeros where not seen."""
    column = tl.arange(0, PADDED)
    pointers = base + tl.program_id(1) * head_stride + index.to(tl.int64)[:, None] * token_stride + column[None, :]
    return tl.load(pointers, mask=seen[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(base, index, seen, num_heads, x, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    column = tl.arange(0, PADDED)
    pointers = base + (index.to(tl.int64)[:, None] * num_heads + tl.program_id(1)) * WIDTH + column[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=seen[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _buckets(place_q, place_k, seconds_q, seconds_k, POSITIONS: tl.constexpr, TIMES: tl.constexpr, AHEAD: tl.constexpr):
    """Rows of the joint table for a tile's positions and times: `attention.position_bucket`, and POSITIONS + `attention.time_bucket`."""
    position = tl.minimum(tl.maximum(place_q - place_k + AHEAD, 0), POSITIONS - 1)
    # floor(2 log2 x) is the exponent of x²; 22 units in the last place make it round up where time_bucket's float32 logarithm does
    x = (tl.abs(seconds_q - seconds_k) + 1).to(tl.float32)
    time = (((x * x).to(tl.int32, bitcast=True) + 22) >> 23) - 127
    return position, POSITIONS + tl.minimum(time, TIMES - 1)


@triton.jit
def _add_by_bucket(row, bucket, x, seen, DETERMINISTIC: tl.constexpr):
    """row[bucket] += x over a tile. Distances vary little over most tiles, and then a sum per bucket beats scattered additions."""
    low = tl.min(tl.where(seen, bucket, 1 << 30))
    high = tl.max(tl.where(seen, bucket, -1))
    if DETERMINISTIC or high - low < _FEW_BUCKETS:
        for b in range(low, high + 1):
            tl.atomic_add(row + b, tl.sum(tl.where(bucket == b, x, 0.0)), sem="relaxed")
    else:
        tl.atomic_add(row + bucket, x, mask=seen, sem="relaxed")


@_tuned((64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 32, 4, 2), (32, 32, 4, 1))
@triton.jit(do_not_specialize=["num_queries"])
def _forward_kernel(q, k, v, out, lse, first_q, last_q, table, place, seconds, num_queries, q_token, q_head, k_token, k_head, v_token,
                    v_head, num_heads, scale, silu_scale, WIDTH: tl.constexpr, PADDED: tl.constexpr, SILU: tl.constexpr,
                    POSITIONS: tl.constexpr, TIMES: tl.constexpr, AHEAD: tl.constexpr, DOT: tl.constexpr, DETERMINISTIC: tl.constexpr,
                    M: tl.constexpr, N: tl.constexpr):
    LOG2E: tl.constexpr = 1.4426950408889634
    query = tl.program_id(0) * M + tl.arange(0, M)
    real = query < num_queries
    first = tl.load(first_q + query, mask=real, other=0x7FFFFFFF)
    last = tl.load(last_q + query, mask=real, other=-1)
    stop = tl.max(last) + 1
    q_MK = _tile(q, query, real, q_token, q_head, WIDTH, PADDED)
    if POSITIONS:
        place_m = tl.load(place + query, mask=real, other=0)
        seconds_m = tl.load(seconds + query, mask=real, other=0)
        table += tl.program_id(1) * (POSITIONS + TIMES)
    sum_MK = tl.zeros((M, PADDED), tl.float32)
    weight_m = tl.zeros((M,), tl.float32)
    largest_m = tl.full((M,), -1e30, tl.float32)  # finite, so that rows without a key yet stay free of inf - inf
    for start in range(tl.min(first), stop, N):
        key = start + tl.arange(0, N)
        inside = key < stop
        seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
        k_NK = _tile(k, key, inside, k_token, k_head, WIDTH, PADDED)
        scores = _dot(q_MK, tl.trans(k_NK), DOT) * scale
        if POSITIONS:
            place_n = tl.load(place + key, mask=inside, other=0)
            seconds_n = tl.load(seconds + key, mask=inside, other=0)
            position, time = _buckets(place_m[:, None], place_n[None, :], seconds_m[:, None], seconds_n[None, :], POSITIONS, TIMES, AHEAD)
            scores += tl.load(table + position) + tl.load(table + time)
        if SILU:
            weights = tl.where(seen, scores * silu_scale / (1.0 + tl.exp2(-LOG2E * scores)), 0.0)
        else:
            scores = tl.where(seen, scores * LOG2E, float("-inf"))
            grown_m = tl.maximum(largest_m, tl.max(scores, 1))
            weights = tl.exp2(scores - grown_m[:, None])
            shrink_m = tl.exp2(largest_m - grown_m)
            weight_m = weight_m * shrink_m + tl.sum(weights, 1)
            sum_MK = sum_MK * shrink_m[:, None]
            largest_m = grown_m
        v_NK = _tile(v, key, inside, v_token, v_head, WIDTH, PADDED)
        sum_MK += _dot(weights.to(v_NK.dtype), v_NK, DOT)
    if not SILU:
        weight_m = tl.where(weight_m == 0.0, 1.0, weight_m)
        sum_MK = sum_MK / weight_m[:, None]
        tl.store(lse + query.to(tl.int64) * num_heads + tl.program_id(1), largest_m + tl.log2(weight_m), mask=real)
    _store(out, query, real, num_heads, sum_MK, WIDTH, PADDED)


@triton.jit
def _weights_and_slope(scores, seen, lse, silu_scale, SILU: tl.constexpr):
    """Of a tile of scores, in either orientation: the weights A and, for SiLU, dA/dscores; softmax's slope needs the whole row."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if SILU:
        gate = 1.0 / (1.0 + tl.exp2(-LOG2E * scores))
        weights = tl.where(seen, scores * gate * silu_scale, 0.0)
        slope = tl.where(seen, (gate + scores * gate * (1.0 - gate)) * silu_scale, 0.0)
    else:
        weights = tl.exp2(tl.where(seen, scores * LOG2E - lse, float("-inf")))
        slope = weights
    return weights, slope


@_tuned((64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2), (32, 32, 4, 1), written=("dtable",))
@triton.jit(do_not_specialize=["num_queries"])
def _backward_query_kernel(q, k, v, out, dout, lse, delta, dq, first_q, last_q, table, dtable, place, seconds, num_queries, q_token, q_head,
                           k_token, k_head, v_token, v_head, dout_token, dout_head, num_heads, scale, silu_scale, WIDTH: tl.constexpr,
                           PADDED: tl.constexpr, SILU: tl.constexpr, POSITIONS: tl.constexpr, TIMES: tl.constexpr, AHEAD: tl.constexpr,
                           DOT: tl.constexpr, DETERMINISTIC: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """dq, the bias tables' gradients of this block of queries, and delta = Σ dout·out, which the keys' kernel reads."""
    query = tl.program_id(0) * M + tl.arange(0, M)
    real = query < num_queries
    first = tl.load(first_q + query, mask=real, other=0x7FFFFFFF)
    last = tl.load(last_q + query, mask=real, other=-1)
    stop = tl.max(last) + 1
    q_MK = _tile(q, query, real, q_token, q_head, WIDTH, PADDED)
    dout_MK = _tile(dout, query, real, dout_token, dout_head, WIDTH, PADDED)
    lse_m = tl.zeros((M,), tl.float32)
    delta_m = tl.zeros((M,), tl.float32)
    if not SILU:
        number = query.to(tl.int64) * num_heads + tl.program_id(1)
        out_MK = _tile(out, query, real, num_heads * WIDTH, WIDTH, WIDTH, PADDED)
        delta_m = tl.sum(dout_MK.to(tl.float32) * out_MK.to(tl.float32), 1)
        tl.store(delta + number, delta_m, mask=real)
        lse_m = tl.load(lse + number, mask=real, other=0.0)
    if POSITIONS:
        place_m = tl.load(place + query, mask=real, other=0)
        seconds_m = tl.load(seconds + query, mask=real, other=0)
        table += tl.program_id(1) * (POSITIONS + TIMES)
        dtable += (tl.program_id(0) * num_heads + tl.program_id(1)).to(tl.int64) * (POSITIONS + TIMES)
    dq_MK = tl.zeros((M, PADDED), tl.float32)
    for start in range(tl.min(first), stop, N):
        key = start + tl.arange(0, N)
        inside = key < stop
        seen = (key[None, :] >= first[:, None]) & (key[None, :] <= last[:, None])
        k_NK = _tile(k, key, inside, k_token, k_head, WIDTH, PADDED)
        v_NK = _tile(v, key, inside, v_token, v_head, WIDTH, PADDED)
        scores = _dot(q_MK, tl.trans(k_NK), DOT) * scale
        if POSITIONS:
            place_n = tl.load(place + key, mask=inside, other=0)
            seconds_n = tl.load(seconds + key, mask=inside, other=0)
            position, time = _buckets(place_m[:, None], place_n[None, :], seconds_m[:, None], seconds_n[None, :], POSITIONS, TIMES, AHEAD)
            scores += tl.load(table + position) + tl.load(table + time)
        _, slope = _weights_and_slope(scores, seen, lse_m[:, None], silu_scale, SILU)
        dscores = slope * (_dot(dout_MK.to(v_NK.dtype), tl.trans(v_NK), DOT) - delta_m[:, None])
        if POSITIONS:
            _add_by_bucket(dtable, position, dscores, seen, DETERMINISTIC)
            _add_by_bucket(dtable, time, dscores, seen, DETERMINISTIC)
        dq_MK += _dot(dscores.to(k_NK.dtype), k_NK, DOT)
    _store(dq, query, real, num_heads, dq_MK * scale, WIDTH, PADDED)


@_tuned((64, 64, 4, 2), (64, 64, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2), (32, 32, 4, 1))
@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def _backward_key_kernel(q, k, v, dout, lse, delta, dk, dv, first_q, last_q, low_k, end_k, table, place, seconds, num_queries, num_keys,
                         q_token, q_head, k_token, k_head, v_token, v_head, dout_token, dout_head, num_heads, scale, silu_scale,
                         WIDTH: tl.constexpr, PADDED: tl.constexpr, SILU: tl.constexpr, POSITIONS: tl.constexpr, TIMES: tl.constexpr,
                         AHEAD: tl.constexpr, DOT: tl.constexpr, DETERMINISTIC: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """dk and dv of a block of keys, from all queries that may read one of them; tiles are [keys, queries]."""
    key = tl.program_id(0) * N + tl.arange(0, N)
    real = key < num_keys
    low = tl.min(tl.load(low_k + key, mask=real, other=0x7FFFFFFF))
    end = tl.max(tl.load(end_k + key, mask=real, other=0))
    k_NK = _tile(k, key, real, k_token, k_head, WIDTH, PADDED)
    v_NK = _tile(v, key, real, v_token, v_head, WIDTH, PADDED)
    if POSITIONS:
        place_n = tl.load(place + key, mask=real, other=0)
        seconds_n = tl.load(seconds + key, mask=real, other=0)
        table += tl.program_id(1) * (POSITIONS + TIMES)
    dk_NK = tl.zeros((N, PADDED), tl.float32)
    dv_NK = tl.zeros((N, PADDED), tl.float32)
    for start in range(low, end, M):
        query = start + tl.arange(0, M)
        inside = query < end
        first = tl.load(first_q + query, mask=inside, other=0x7FFFFFFF)
        last = tl.load(last_q + query, mask=inside, other=-1)
        seen = (key[:, None] >= first[None, :]) & (key[:, None] <= last[None, :])
        q_MK = _tile(q, query, inside, q_token, q_head, WIDTH, PADDED)
        dout_MK = _tile(dout, query, inside, dout_token, dout_head, WIDTH, PADDED)
        scores = _dot(k_NK, tl.trans(q_MK), DOT) * scale
        if POSITIONS:
            place_m = tl.load(place + query, mask=inside, other=0)
            seconds_m = tl.load(seconds + query, mask=inside, other=0)
            position, time = _buckets(place_m[None, :], place_n[:, None], seconds_m[None, :], seconds_n[:, None], POSITIONS, TIMES, AHEAD)
            scores += tl.load(table + position) + tl.load(table + time)
        lse_m = tl.zeros((M,), tl.float32)
        delta_m = tl.zeros((M,), tl.float32)
        if not SILU:
            number = query.to(tl.int64) * num_heads + tl.program_id(1)
            lse_m = tl.load(lse + number, mask=inside, other=0.0)
            delta_m = tl.load(delta + number, mask=inside, other=0.0)
        weights, slope = _weights_and_slope(scores, seen, lse_m[None, :], silu_scale, SILU)
        dout_MK = dout_MK.to(v_NK.dtype)
        dv_NK += _dot(weights.to(v_NK.dtype), dout_MK, DOT)
        dscores = slope * (_dot(v_NK, tl.trans(dout_MK), DOT) - delta_m[None, :])
        dk_NK += _dot(dscores.to(q_MK.dtype), q_MK, DOT)
    _store(dk, key, real, num_heads, dk_NK * scale, WIDTH, PADDED)
    _store(dv, key, real, num_heads, dv_NK, WIDTH, PADDED)
