"""The fused Triton kernels against the reference: outputs and all gradients. Without a GPU they run in Triton's interpreter, in a process
of its own, because triton chooses when it is first imported.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from gpr_dist.ops.attention import RelativeBias, Spans, hybrid_attention, hybrid_spans, intent_spans, time_bucket

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:  # kernels find what they call among the globals
    import triton
    import triton.language as tl

    from gpr_dist.ops.triton_attention import _buckets

    @triton.jit
    def time_buckets(seconds, found, number, N: tl.constexpr):
        index = tl.program_id(0) * N + tl.arange(0, N)
        later = tl.load(seconds + index, mask=index < number, other=0)
        zero = tl.zeros((N,), tl.int32)
        _, time = _buckets(zero, zero, later, zero, 1, 64, 0)
        tl.store(found + index, time - 1, mask=index < number)
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton, which CUDA builds of torch bring (pip install triton)")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1; test_the_kernels_in_the_interpreter runs it")
PRECISIONS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 0.03}


@pytest.mark.skipif(INTERPRETED, reason="is itself")
def test_the_kernels_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-m", "not cuda", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    if "only 0-dimensional arrays can be converted to Python scalars" in done.stdout:
        pytest.skip("this triton's interpreter does not work with this NumPy (3.6 does not with NumPy 2.4, 3.9 does)")
    assert done.returncode == 0, done.stdout + done.stderr


def lengths(scale):
    return [scale, 1, 0, scale + scale // 3]


def encoder_case(scale, width, heads, with_bias):
    """Rows of request blocks that look at themselves; bursts of seconds and gaps of months between them."""
    g = torch.Generator().manual_seed(1)
    counts = torch.tensor(lengths(scale))
    offsets = [0, *counts.cumsum(0).tolist()]
    num_tokens = offsets[-1]
    index = torch.arange(num_tokens)
    spans = hybrid_spans(index // 7, index % 7 < 4, offsets)
    position = index - torch.repeat_interleave(torch.tensor(offsets[:-1]), counts)
    tables = [torch.randn(n, heads, generator=g) for n in (48, 40)] if with_bias else []
    gaps = 10 ** (7 * torch.rand(num_tokens, generator=g)) * (torch.rand(num_tokens, generator=g) < 0.3)
    seconds = 1_400_000_000 + gaps.long().cumsum(0)
    return num_tokens, num_tokens, spans, tables, (position, seconds)


def decoder_case(scale, width, heads, with_bias):
    """Queries in any order that read windows of their row's keys; some rows without a query, some queries without a key."""
    g = torch.Generator().manual_seed(2)
    keys = torch.tensor(lengths(scale))
    queries = torch.tensor([scale // 2, 3, 0, 2 * scale])
    key_offsets, query_offsets = [0, *keys.cumsum(0).tolist()], [0, *queries.cumsum(0).tolist()]
    row = torch.repeat_interleave(torch.arange(4), queries)
    start = torch.tensor(key_offsets)[row]
    site = start + (torch.rand(len(row), generator=g) * keys[row]).long()
    spans = intent_spans(site, start, query_offsets, key_offsets, window=scale // 2)
    spans.last_Q = torch.where(torch.rand(len(row), generator=g) < 0.1, spans.first_Q - 1, spans.last_Q)
    return len(row), key_offsets[-1], spans, [], None


def check_against_the_reference(make, score, with_bias, dtype, tolerance, scale, width=16, heads=2, device="cpu"):
    num_queries, num_keys, spans, tables, places = make(scale, width, heads, with_bias)
    g = torch.Generator().manual_seed(0)
    packed = torch.randn(max(num_queries, num_keys), heads, 3, width, generator=g)  # parts of one tensor, as a projection leaves them
    direction = torch.randn(num_queries, heads, width, generator=g)
    results = []
    for implementation in ("triton", "reference"):
        kind = dtype if implementation == "triton" else torch.float32
        learned = [x.to(dtype).to(device, kind).requires_grad_() for x in (packed, *tables)]
        q, k, v = learned[0].unbind(2)
        moved = Spans(spans.first_Q.to(device), spans.last_Q.to(device), spans.query_offsets, spans.key_offsets)
        bias = RelativeBias(*learned[1:], *(x.to(device) for x in places), {}) if tables else None
        out = hybrid_attention(q[:num_queries], k[:num_keys], v[:num_keys], moved, score, bias, 20, implementation)
        assert out.dtype == kind
        out.backward(direction.to(device, kind))
        results.append([out, *learned[0].grad.unbind(2), *(x.grad for x in learned[1:])])
        assert all(x.grad.dtype == kind for x in learned)
    for name, found, wanted in zip(("out", "dq", "dk", "dv", "dposition", "dtime"), *results, strict=False):
        error = (found.float() - wanted).norm() / wanted.norm()
        assert error < tolerance, (name, float(error))
    empty = spans.first_Q > spans.last_Q
    assert not results[0][0].cpu()[empty].any()


CASES = pytest.mark.parametrize(("make", "with_bias"), [(encoder_case, False), (encoder_case, True), (decoder_case, False)])


@interpreted
@pytest.mark.parametrize("score", ["softmax", "silu"])
@CASES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_and_gradients_equal_the_reference(make, with_bias, score, dtype):
    check_against_the_reference(make, score, with_bias, dtype, PRECISIONS[dtype], scale=24)


@interpreted
@pytest.mark.parametrize(("width", "dtype"), [(24, torch.float16), (64, torch.float32), (256, torch.float32)])
def test_head_widths(width, dtype):
    check_against_the_reference(encoder_case, "softmax", True, dtype, PRECISIONS[dtype], scale=15, width=width, heads=1)


@interpreted
def test_gradients_of_the_bias_without_scattered_additions():
    torch.use_deterministic_algorithms(True)
    try:
        check_against_the_reference(encoder_case, "softmax", True, torch.float32, 1e-5, scale=30)
    finally:
        torch.use_deterministic_algorithms(False)


@interpreted
def test_time_buckets_are_those_of_the_definition():
    edges = [round(2 ** (n / 2)) for n in range(62)]  # wherever a bucket begins, and the seconds around
    seconds = (torch.tensor(edges)[:, None] + torch.arange(-600, 600)).flatten().clamp(0, 2**31 - 2)
    found = torch.empty(len(seconds), dtype=torch.int32)
    time_buckets[(triton.cdiv(len(seconds), 4096),)](seconds.int(), found, len(seconds), N=4096)
    assert torch.equal(found.long(), time_bucket(seconds, 64))


def test_the_queries_of_a_key_are_found_in_any_order():
    from gpr_dist.ops.triton_attention import _bounds

    g = torch.Generator().manual_seed(0)
    for spread in (0, 3, 30):
        first = (torch.arange(50) // 2 + torch.randint(0, spread + 1, (50,), generator=g)).clamp_max(29)
        last = (first + torch.randint(-2, 9, (50,), generator=g)).clamp_max(29)
        _, _, low, end = _bounds(Spans(first, last, [0, 50], [0, 30]), 30)
        for key in range(30):
            readers = ((first <= key) & (key <= last)).nonzero().flatten().tolist()
            assert all(low[key] <= query < end[key] for query in readers)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("settings", [{"SILU": False, "POSITIONS": 64, "TIMES": 40}, {"SILU": True, "POSITIONS": 0, "TIMES": 0}])
@pytest.mark.parametrize("name", ["_forward_kernel", "_backward_query_kernel", "_backward_key_kernel"])
def test_kernels_compile_for_a_gpu_that_is_not_there(name, settings, tmp_path, monkeypatch):
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gpr_dist.ops import triton_attention

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tuned = getattr(triton_attention, name)
    tile = tuned.configs[-1]
    constants = {**settings, **tile.kwargs, "WIDTH": 40, "PADDED": 64, "AHEAD": 16, "DOT": "tf32x3", "DETERMINISTIC": False}
    kind = dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), "*bf16")
    kind |= dict.fromkeys(("lse", "delta", "table", "dtable"), "*fp32") | dict.fromkeys(("scale", "silu_scale"), "fp32")
    kind |= dict.fromkeys(("first_q", "last_q", "low_k", "end_k", "place", "seconds"), "*i32") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(tuned.fn, {argument: kind.get(argument, "i32") for argument in tuned.fn.arg_names}, constants)
    binary = compile(source, GPUTarget("cuda", 90, 32), {"num_warps": tile.num_warps, "num_stages": tile.num_stages})
    assert binary.asm["cubin"]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("width", [16, 40, 64, 128, 256])
@pytest.mark.parametrize("score", ["softmax", "silu"])
@CASES
@pytest.mark.parametrize("dtype", list(PRECISIONS))
def test_output_and_gradients_on_a_gpu(make, with_bias, score, dtype, width):
    check_against_the_reference(make, score, with_bias, dtype, max(PRECISIONS[dtype], 1e-3), scale=700, width=width, heads=3, device="cuda")
