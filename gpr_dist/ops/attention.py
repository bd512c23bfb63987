"""Attention over packed jagged rows: one reference that materialises everything, one path through PyTorch's SDPA.

Owns masks and softmax attention only; projections, gating and positions belong to the model. Rows are packed end to end without
padding, so attention runs row by row: its cost is the sum of squared row lengths, not the square of the longest one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# T packed tokens  Q packed queries  t, q tokens and queries of one row  H heads  K head width


def hybrid_mask(block_t: Tensor, prompt_t: Tensor) -> Tensor:
    """Which token i may look at which token j inside one row (GPR Eq. 2, scoped to one request block).

        allow(i, j) = j <= i  or  (block[i] == block[j] and prompt[i] and prompt[j])

    Args: block_t: request block of each token. prompt_t: bool, True at U, O and E.
    Returns: bool [t, t], True = may attend.
    Differs from the paper: bidirectional only inside a block; over the whole sequence it would show future prompts (PAPER.md).
    """
    position = torch.arange(block_t.numel(), device=block_t.device)
    causal = position[None, :] <= position[:, None]
    same_prompt = (block_t[:, None] == block_t[None, :]) & prompt_t[:, None] & prompt_t[None, :]
    return causal | same_prompt


def intent_mask(site_q: Tensor, num_keys: int, window: int = 0) -> Tensor:
    """Which tokens of a row a decoder query may read: those up to its request's prediction site, the last `window` of them.

    Args: site_q: position of the site inside the row. window: 0 = all.
    Returns: bool [q, num_keys].
    """
    key = torch.arange(num_keys, device=site_q.device)
    allowed = key[None, :] <= site_q[:, None]
    if window > 0:
        allowed &= key[None, :] > site_q[:, None] - window
    return allowed


def jagged_attention(q_QHK: Tensor, k_THK: Tensor, v_THK: Tensor, query_offsets: Sequence[int], key_offsets: Sequence[int],
                     masks: Sequence[Tensor], implementation: str = "sdpa") -> Tensor:
    """Softmax(QKᵀ/√K + mask)·V, row by row.

    Args:
        query_offsets, key_offsets: [B+1] row boundaries of the packed queries and keys (plain integers: they shape the loop).
        masks: per row, bool [queries, keys] of that row; every query sees at least one key.
        implementation: sdpa | reference (explicit float32 softmax, for tests).
    Returns: [Q, H, K]; differentiable in all inputs also when there is no row at all.
    """
    attend = _sdpa if implementation == "sdpa" else _reference
    rows = []
    for row, mask in enumerate(masks):
        first, last = query_offsets[row], query_offsets[row + 1]
        if first < last:
            keys = slice(key_offsets[row], key_offsets[row + 1])
            rows.append(attend(q_QHK[first:last], k_THK[keys], v_THK[keys], mask))
    if not rows:  # an empty micro-batch: keep the graph, so that every rank reduces the same gradients
        return q_QHK + (k_THK.sum() + v_THK.sum())
    return torch.cat(rows)


def _sdpa(q_qHK: Tensor, k_tHK: Tensor, v_tHK: Tensor, mask_qt: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q_qHK, k_tHK, v_tHK))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_qt)[0].transpose(0, 1)


def _reference(q_qHK: Tensor, k_tHK: Tensor, v_tHK: Tensor, mask_qt: Tensor) -> Tensor:
    scores = torch.einsum("qhk,thk->hqt", q_qHK.float(), k_tHK.float()) / q_qHK.shape[-1] ** 0.5
    weights = scores.masked_fill(~mask_qt, float("-inf")).softmax(-1)
    return torch.einsum("hqt,thk->qhk", weights, v_tHK.float()).to(q_qHK.dtype)
