"""Cross-entropy of semantic IDs against the code tables, in chunks of targets: a large codebook never has all its logits at once."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# N targets  l levels  D width  V codes per level


LOSS_CHUNK_BYTES = 1 << 28
"""float32 logits held at once"""


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
