"""Cross-entropy of semantic IDs against the code tables, and of items against an item table, in chunks: never all logits at once."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# N targets  l levels  D width  V codes per level  R requests, r of them in a chunk  C candidate items  G eligibility groups


LOSS_CHUNK_BYTES = 1 << 28
"""float32 logits held at once"""
_SURE = 60.0
"""nats up to which the logarithm of a float32 probability is exact"""


def code_logits(state_NlD: Tensor, weight_lVD: Tensor, bias_lV: Tensor) -> Tensor:
    """Logits [N, l, V] of every code, state·weight/√D + bias."""
    return _logits(state_NlD, weight_lVD, bias_lV).transpose(0, 1)


def _logits(state_NlD: Tensor, weight_lVD: Tensor, bias_lV: Tensor) -> Tensor:
    """[l, N, V], as one product makes them."""
    return torch.baddbmm(bias_lV[:, None], state_NlD.transpose(0, 1), weight_lVD.transpose(1, 2), alpha=state_NlD.shape[-1] ** -0.5)


def code_nll(state_NLD: Tensor, weight_LVD: Tensor, bias_LV: Tensor, codes_NL: Tensor, offset_NLV: Tensor | None = None,
             chunk_bytes: int = LOSS_CHUNK_BYTES) -> Tensor:
    """-log p of every true code, nats [N, L]; softmax in float32 (float64 for float64 states).

    Args:
        offset_NLV: added to the logits: -inf where a code is not legal, else 0 or the log of a prior. None = softmax over all codes.
        chunk_bytes: float32 logits held at once; with more targets the logits are made chunk by chunk and again in the backward pass.
    """
    num_targets, num_levels, _ = state_NLD.shape
    rows = max(1, chunk_bytes // (4 * num_levels * weight_LVD.shape[1]))
    if num_targets <= rows:
        return _nll(state_NLD, weight_LVD, bias_LV, codes_NL, offset_NLV)
    chunks = []
    for lo in range(0, num_targets, rows):
        here = slice(lo, lo + rows)
        offset = None if offset_NLV is None else offset_NLV[here]
        chunks.append(checkpoint(_nll, state_NLD[here], weight_LVD, bias_LV, codes_NL[here], offset, use_reentrant=False))
    return torch.cat(chunks)


def _nll(state_NLD: Tensor, weight_LVD: Tensor, bias_LV: Tensor, codes_NL: Tensor, offset_NLV: Tensor | None) -> Tensor:
    logits_LNV = _logits(state_NLD, weight_LVD, bias_LV)
    return nll_of_logits(logits_LNV, codes_NL.T, None if offset_NLV is None else offset_NLV.transpose(0, 1)).T


def nll_of_logits(logits_NLV: Tensor, codes_NL: Tensor, offset_NLV: Tensor | None = None) -> Tensor:
    """-log p of every true code, nats [N, L], also with N and L exchanged; the softmax of float64 logits is float64, of others float32."""
    if logits_NLV.dtype != torch.float64:
        logits_NLV = logits_NLV.float()
    if offset_NLV is not None:
        logits_NLV = logits_NLV + offset_NLV
    # Classes last: the kernel for classes in the middle takes three times as long on a CPU.
    return F.cross_entropy(logits_NLV.flatten(0, 1), codes_NL.flatten(), reduction="none").view(codes_NL.shape)


def item_nll(state_RD: Tensor, weight_CD: Tensor, bias_C: Tensor | None, request_N: Tensor, column_N: Tensor,
             offset_C: Tensor | None = None, legal_GC: Tensor | None = None, group_R: Tensor | None = None, chunk_bytes: int | None = None,
             weight_N: Tensor | None = None) -> Tensor:
    """Sum of -log p of the true items, nats; the softmax over the candidates is float32 (float64 for float64 states).

        s_rc = state_r · weight_c + bias_c;   nll_n = log sum_c exp(s_rc + offset_c) - s_rn,   c legal or one of the request's targets

    Gradients are made in the forward pass, chunk by chunk, so that neither logits nor probabilities of all requests are ever held, and
    no product is computed twice. That is why it returns one sum, and must know a weight per target.

    Args:
        bias_C: None = 0.
        request_N, column_N: int64, request and candidate of every target.
        offset_C: log of the inverse inclusion probability of each candidate, so that a sample estimates the full sum (unbiased before
            the log); -inf = not drawn. It does not apply to a request's own targets, which are certain. None = 0.
        legal_GC, group_R: candidates each request's eligibility group allows; own targets are always allowed. None = all.
        chunk_bytes: float32 logits held at once.
        weight_N: of each target in the sum, without gradient; None = 1.
    """
    if chunk_bytes is None:  # what a core's cache holds; a GPU wants large products
        chunk_bytes = 1 << 22 if state_RD.device.type == "cpu" else LOSS_CHUNK_BYTES
    order_N = request_N.argsort(stable=True)
    rows = max(1, chunk_bytes // (4 * max(1, len(weight_CD))))
    return _ItemNLL.apply(state_RD, weight_CD, bias_C, request_N[order_N], column_N[order_N], offset_C, legal_GC, group_R, rows,
                          torch.is_grad_enabled(), None if weight_N is None else weight_N[order_N])


class _ItemNLL(torch.autograd.Function):
    """`item_nll`; targets are in the order of their requests."""

    @staticmethod
    def forward(ctx: Any, state_RD: Tensor, weight_CD: Tensor, bias_C: Tensor | None, request_N: Tensor, column_N: Tensor,
                offset_C: Tensor | None, legal_GC: Tensor | None, group_R: Tensor | None, rows: int, with_gradient: bool,
                weight_N: Tensor | None) -> Tensor:
        exact = torch.float64 if state_RD.dtype == torch.float64 else torch.float32
        ends = torch.searchsorted(request_N, torch.arange(0, len(state_RD) + rows, rows, device=request_N.device)).tolist()
        weight_N = torch.ones_like(request_N, dtype=exact) if weight_N is None else weight_N.to(exact)
        weight_R = weight_N.new_zeros(len(state_RD)).index_add_(0, request_N, weight_N)
        scaled = with_gradient and bool((weight_R != 1).any())
        total = state_RD.new_zeros((), dtype=exact)
        d_state_RD, d_weight_DC, d_bias_C = None, None, None
        if with_gradient:
            d_state_RD = torch.empty_like(state_RD)
            d_weight_DC = weight_CD.new_zeros(weight_CD.shape[::-1], dtype=exact)  # that way round: a third less time on a CPU
            d_bias_C = None if bias_C is None else torch.zeros_like(bias_C, dtype=exact)
        for number, lo in enumerate(range(0, len(state_RD), rows)):
            state_rD = state_RD[lo:lo + rows]
            of_chunk = slice(ends[number], ends[number + 1])
            request_n, column_n, weight_n = request_N[of_chunk] - lo, column_N[of_chunk], weight_N[of_chunk]
            logits_rC = (state_rD @ weight_CD.T).to(exact)
            if bias_C is not None:
                logits_rC += bias_C  # half the time of addmm on a CPU
            own_n = logits_rC[request_n, column_n]
            if offset_C is not None:
                logits_rC += offset_C
            if legal_GC is not None:
                logits_rC.masked_fill_(~legal_GC[group_R[lo:lo + rows]], -torch.inf)
            if offset_C is not None or legal_GC is not None:
                logits_rC[request_n, column_n] = own_n
            if not with_gradient:
                total += (weight_n * (logits_rC.logsumexp(1)[request_n] - own_n)).sum()
                continue
            p_rC = logits_rC.softmax(1)
            nll_n = p_rC[request_n, column_n].log_().neg_()
            if bool((nll_n > _SURE).any()):  # so near 0 that it lost digits
                nll_n = logits_rC.logsumexp(1)[request_n] - own_n
            total += (weight_n * nll_n).sum()
            if scaled:
                p_rC *= weight_R[lo:lo + rows, None]
            p_rC.index_put_((request_n, column_n), -weight_n, accumulate=True)
            if bias_C is not None:
                d_bias_C += p_rC.sum(0)
            d_logits_rC = p_rC.to(state_RD.dtype)
            torch.mm(d_logits_rC, weight_CD, out=d_state_RD[lo:lo + rows])
            if exact == state_RD.dtype:
                d_weight_DC.addmm_(state_rD.T, d_logits_rC)
            else:
                d_weight_DC += state_rD.T @ d_logits_rC  # bf16 would lose what later chunks add
        if with_gradient:
            d_weight_CD = d_weight_DC.T.to(weight_CD.dtype).contiguous()  # what follows is several times as slow on a transposed one
            ctx.save_for_backward(d_state_RD, d_weight_CD, None if bias_C is None else d_bias_C.to(bias_C.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if d is None else gradient.to(d.dtype) * d for d in ctx.saved_tensors), *[None] * 8)
