"""Attention over packed jagged rows, one public function: `hybrid_attention` (GPR Eq. 1, and HSTU's pointwise SiLU form).

Rows are packed end to end without padding. What a query may read is one span of keys of its own row, because a request's prompt
(U, O, E) is contiguous: the hybrid mask, the intents of a request and a window of them are all spans. Four implementations give the
same numbers: `reference` (explicit, float32, for tests), `torch` (piece by piece through PyTorch, the one for CPUs), `flex`
(FlexAttention with block masks made from the spans, softmax only) and `triton` (one fused kernel for both scores). Projections,
gating, positions and parameters belong to the model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpr_dist.errors import ConfigError

# T packed tokens (keys)  Q packed queries  t, q tokens and queries of one row  H heads  K head width  P, G position and time buckets

Score = Literal["softmax", "silu"]
Implementation = Literal["auto", "reference", "torch", "flex", "triton"]
AHEAD = 16
"""positions by which a prompt token may look ahead and keep buckets of their own in the relative bias"""
_FLEX_BLOCK = 128
_PIECE_QUERIES = {"fused": 256, "products": 128}
"""most queries of a piece: fewer leave out more of the keys that none of them reads, and cost more calls"""
_PADDED_SHARE = 2
"""inference joins rows of similar length in one call while the padded scores are at most so many times the true ones"""
_JOINED_QUERIES = 64
"""most queries of short rows that share a piece: a product that is mostly masked costs less than one call per row"""
_PRODUCTS_MOST_KEYS = 2048
"""longest row that a CPU trains on by plain products: they keep all weights for the backward pass, and take three quarters of the time of
PyTorch's fused kernel, which keeps none"""
# Scores whose weight and gradient are 0. SiLU of -inf is not a number, and below -1e9 its exponential is five times as slow.
_MASKED = {"softmax": float("-inf"), "silu": -1e8}


class Piece(NamedTuple):
    """Successive queries of one row, or of several short ones, and the keys from the first to the last that any of them reads."""

    row: int  # the first one
    num_queries: int
    first_key: int  # packed
    end_key: int


@dataclass
class Spans:
    """Which keys each query may read: those from first to last, both included, all in its own row; first > last = none."""

    first_Q: Tensor  # int64, position in the packed keys
    last_Q: Tensor
    query_offsets: Sequence[int]  # [B+1] row boundaries; plain integers, because they shape loops
    key_offsets: Sequence[int]
    made: dict = field(default_factory=dict)
    """masks, made once for all layers"""

    def pieces(self, most: int, joined: int = 0) -> list[Piece]:
        """All queries in order, in about equal pieces of a row each, of at most so many queries.

        Args: joined: successive rows share a piece while they have together at most so many queries.
        """
        if ("pieces", most) not in self.made:
            cuts, room = [], 0
            for row, (begin, end) in enumerate(pairwise(self.query_offsets)):
                parts = -(-(end - begin) // most)
                if parts == 1 and end - begin <= room:
                    room -= end - begin
                elif parts:
                    cuts += [(row, begin + (end - begin) * part // parts) for part in range(parts)]
                    room = joined - (end - begin)
            starts = [start for _, start in cuts]
            first_Q, last_Q = self.first_Q.cpu().numpy(), self.last_Q.cpu().numpy()
            first_Q = np.where(first_Q > last_Q, np.iinfo(np.int64).max, first_Q)
            low, high = np.minimum.reduceat(first_Q, starts).tolist(), (np.maximum.reduceat(last_Q, starts) + 1).tolist()
            counts = np.diff(starts, append=len(first_Q)).tolist()
            self.made["pieces", most] = [Piece(row, count, min(lo, hi), hi)
                                         for (row, _), count, lo, hi in zip(cuts, counts, low, high, strict=True)]
        return self.made["pieces", most]

    def padded(self, dtype: torch.dtype) -> "Padded | None":
        """All rows in one block, made once for all layers; None where rows differ too much in length, or a query reads nothing."""
        if ("padded", dtype) not in self.made:
            self.made["padded", dtype] = None if self.any_empty() else Padded.of(self, dtype)
        return self.made["padded", dtype]

    def any_empty(self) -> bool:
        """Whether a query reads nothing."""
        if "empty" not in self.made:
            self.made["empty"] = bool((self.first_Q > self.last_Q).any())
        return self.made["empty"]

    def allowed(self, pieces: list[Piece]) -> "list[Tensor | None]":
        """Per piece, bool [queries, keys]; None where every query reads every key."""
        counts = [piece.num_queries for piece in pieces]
        out = []
        for piece, first_q, last_q in zip(pieces, self.first_Q.split(counts), self.last_Q.split(counts), strict=True):
            key_t = torch.arange(piece.first_key, piece.end_key, device=first_q.device)
            allowed_qt = (key_t >= first_q[:, None]) & (key_t <= last_q[:, None])
            out.append(None if allowed_qt.all() else allowed_qt)
        return out

    def additive(self, pieces: list[Piece], score: Score, dtype: torch.dtype) -> "list[Tensor | None]":
        """The same as numbers to add to the scores [1, queries, keys]; made once for all layers."""
        key = score, dtype, len(pieces)
        if key not in self.made:
            self.made[key] = [
                None if allowed is None else torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(
                    ~allowed, _MASKED[score])[None] for allowed in self.allowed(pieces)]
        return self.made[key]

    def select(self, index_t: Tensor) -> "Spans":
        """Of self-attention over some of the tokens only (increasing positions)."""
        kept_T1 = torch.zeros(len(self.first_Q) + 1, dtype=torch.int64, device=index_t.device)
        kept_T1[1:][index_t] = 1
        kept_T1 = kept_T1.cumsum(0)  # tokens kept before each position
        offsets = kept_T1[torch.tensor(self.key_offsets, device=index_t.device)].tolist()
        return Spans(kept_T1[self.first_Q[index_t]], kept_T1[self.last_Q[index_t] + 1] - 1, offsets, offsets)

    def mask(self, row: int) -> Tensor:
        """Of a whole row, bool [q, t]."""
        queries = slice(self.query_offsets[row], self.query_offsets[row + 1])
        key_t = torch.arange(self.key_offsets[row], self.key_offsets[row + 1], device=self.first_Q.device)
        return (key_t >= self.first_Q[queries, None]) & (key_t <= self.last_Q[queries, None])


@dataclass
class Padded:
    """Rows as one block of equal lengths: an index where they have to be filled up, none where they are equal already."""

    shape_q: tuple[int, int]  # rows with queries, queries of the longest
    shape_t: tuple[int, int]
    query_index: Tensor | None
    key_index: Tensor | None
    back_index: Tensor | None  # of the packed queries
    add: Tensor | None  # [rows, 1, q, t], None where every query reads every key

    @classmethod
    def of(cls, spans: Spans, dtype: torch.dtype) -> "Padded | None":
        offsets_q, offsets_t = np.array(spans.query_offsets), np.array(spans.key_offsets)
        rows = np.flatnonzero(np.diff(offsets_q))
        count_q, count_t = np.diff(offsets_q)[rows], np.diff(offsets_t)[rows]
        shape_q, shape_t = (len(rows), int(count_q.max())), (len(rows), int(count_t.max()))
        if len(rows) * shape_q[1] * shape_t[1] > _PADDED_SHARE * int((count_q * count_t).sum()):
            return None
        device = spans.first_Q.device

        def filled(first: np.ndarray, count: np.ndarray, longest: int) -> np.ndarray:
            return first[:, None] + np.minimum(np.arange(longest), count[:, None] - 1)  # past its end a row repeats its last one

        queries, keys = filled(offsets_q[rows], count_q, shape_q[1]), filled(offsets_t[rows], count_t, shape_t[1])
        back_index = np.flatnonzero(np.arange(shape_q[1]) < count_q[:, None])
        query_index, key_index, back_index = (torch.from_numpy(index.ravel()).to(device) for index in (queries, keys, back_index))
        key_bt = torch.from_numpy(offsets_t[rows, None] + np.arange(shape_t[1])).to(device)[:, None]
        first_bq, last_bq = (x.index_select(0, query_index).view(shape_q)[:, :, None] for x in (spans.first_Q, spans.last_Q))
        allowed_bqt = (key_bt >= first_bq) & (key_bt <= last_bq)
        add = None
        if not allowed_bqt.all():
            add = torch.zeros(allowed_bqt.shape, dtype=dtype, device=device).masked_fill_(~allowed_bqt, float("-inf"))[:, None]
        same_q, same_t = (count_q == shape_q[1]).all(), len(rows) == len(offsets_t) - 1 and (count_t == shape_t[1]).all()
        return cls(shape_q, shape_t, None if same_q else query_index, None if same_t else key_index, None if same_q else back_index, add)

    def attend(self, q_QHK: Tensor, k_THK: Tensor, v_THK: Tensor) -> Tensor:
        """Softmax attention of all rows in one call."""
        def block(x_THK: Tensor, index: Tensor | None, shape: tuple[int, int]) -> Tensor:
            return (x_THK if index is None else x_THK.index_select(0, index)).unflatten(0, shape).transpose(1, 2)

        q, k, v = block(q_QHK, self.query_index, self.shape_q), *(block(x, self.key_index, self.shape_t) for x in (k_THK, v_THK))
        out_QHK = F.scaled_dot_product_attention(q, k, v, attn_mask=self.add).transpose(1, 2).flatten(0, 1)
        return out_QHK if self.back_index is None else out_QHK.index_select(0, self.back_index)


@dataclass
class RelativeBias:
    """HSTU's bias on the scores: one number for the distance in positions plus one for the logarithm of that in time; of each head, or
    of all where the tables have one column."""

    position_PH: Tensor  # distance i - j in [-AHEAD, P - AHEAD); beyond, the last one
    time_GH: Tensor  # bucket of |t_i - t_j|, half a power of two wide
    position_T: Tensor  # int64, position of each token in its row
    seconds_T: Tensor  # int64
    made: dict
    """buckets, made once for all layers: give every layer the same dict"""

    def of_row(self, first: int, last: int) -> Tensor:
        """Of the tokens first..last-1 among themselves [H, t, t], differentiable in the tables."""
        position_tt, time_tt = self._buckets(slice(first, last), slice(first, last))
        return (self.position_PH[position_tt] + self.time_GH[time_tt]).permute(2, 0, 1)

    def table(self, masked: float) -> Tensor:
        """[H, P·G + 1]: every sum of the two, and what stands for a masked pair."""
        sums_HC = (self.position_PH[:, None] + self.time_GH).flatten(0, 1).T
        return F.pad(sums_HC, (0, 1), value=masked)

    def indices(self, pieces: list[Piece], spans: Spans) -> list[Tensor]:
        """Per piece, which column of the table each pair has, [queries · keys]: made once for all layers and heads."""
        if "indices" not in self.made:
            self.made["indices"], begin = [], 0
            for piece, allowed_qt in zip(pieces, spans.allowed(pieces), strict=True):
                position_qt, time_qt = self._buckets(slice(begin, begin + piece.num_queries), slice(piece.first_key, piece.end_key))
                index_qt = position_qt * len(self.time_GH) + time_qt
                if allowed_qt is not None:
                    index_qt.masked_fill_(~allowed_qt, len(self.position_PH) * len(self.time_GH))
                self.made["indices"].append(index_qt.flatten())  # int64: adding into a table by int32 takes a CPU 16 times as long
                begin += piece.num_queries
        return self.made["indices"]

    def _buckets(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor]:
        distance_qt = self.position_T[queries, None] - self.position_T[keys]
        return (position_bucket(distance_qt, len(self.position_PH)),
                time_bucket(self.seconds_T[queries, None] - self.seconds_T[keys], len(self.time_GH)))


def position_bucket(distance: Tensor, num_buckets: int) -> Tensor:
    """Bucket of a distance in positions, query minus key."""
    return (distance + AHEAD).clamp(0, num_buckets - 1)


def time_bucket(seconds: Tensor, num_buckets: int) -> Tensor:
    """Bucket of a distance in seconds: 2 log2(1 + |s|), rounded down; 64 buckets reach 136 years."""
    return (2 * (seconds.abs() + 1).float().log2()).long().clamp_max(num_buckets - 1)


def hybrid_spans(block_T: Tensor, prompt_T: Tensor, offsets: Sequence[int], causal: bool = False) -> Spans:
    """What a token may look at (GPR Eq. 2, scoped to one request block): everything before it, and the rest of its block's prompt.

    A prompt token reads up to the end of the run of prompt tokens of its block that it stands in; journeys keep a block's U, O and E
    together before its ads, so that this is Eq. 2; were an ad among them, it would stay hidden.
    Args: block_T: request block of each token. prompt_T: bool, True at U, O and E. causal: without the look-ahead.
    Differs from the paper: bidirectional only inside a block; over the whole sequence it would show future prompts (PAPER.md).
    """
    num_tokens = block_T.numel()
    position_T = torch.arange(num_tokens, device=block_T.device)
    start_T = torch.zeros(num_tokens, dtype=torch.bool, device=block_T.device)
    boundaries = torch.tensor(offsets, device=block_T.device)
    start_T[boundaries[:-1][boundaries.diff() > 0]] = True
    first_T = torch.where(start_T, position_T, 0).cummax(0).values if num_tokens else position_T
    if causal or not num_tokens:
        return Spans(first_T, position_T, offsets, offsets)
    joined_T = torch.zeros_like(start_T)  # whether a token goes on the run of the one before it
    joined_T[1:] = (block_T[1:] == block_T[:-1]) & prompt_T[1:] & prompt_T[:-1] & ~start_T[1:]
    ends_T = torch.ones_like(start_T)
    ends_T[:-1] = ~joined_T[1:]
    last_T = torch.where(ends_T, position_T, num_tokens).flip(0).cummin(0).values.flip(0)
    return Spans(first_T, last_T, offsets, offsets)


def intent_spans(site_Q: Tensor, row_start_Q: Tensor, query_offsets: Sequence[int], key_offsets: Sequence[int], window: int = 0) -> Spans:
    """Which tokens a decoder query may read: those of its row up to its request's prediction site, the last `window` of them.

    Args: site_Q, row_start_Q: positions in the packed tokens. window: 0 = all.
    """
    first_Q = torch.maximum(row_start_Q, site_Q - window + 1) if window else row_start_Q
    return Spans(first_Q, site_Q, query_offsets, key_offsets)


def hybrid_attention(q_QHK: Tensor, k_THK: Tensor, v_THK: Tensor, spans: Spans, score: Score = "softmax", bias: RelativeBias | None = None,
                     silu_length: int = 256, implementation: Implementation = "auto") -> Tensor:
    """A·V with A = softmax(QKᵀ/√K + bias) over the span (GPR Eq. 1), or SiLU(QKᵀ/√K + bias)/silu_length (HSTU, 2402.17152 Eq. 2).

    Args:
        bias: of self-attention only; queries are then the tokens themselves.
        silu_length: HSTU's N; a constant, so that a token's output never depends on how long its row will become.
        implementation: auto = `default_implementation`.
    Returns: [Q, H, K] in q's precision; sums and softmax in float32; 0 for a query with an empty span. Differentiable in all inputs also
        when there are no rows at all.
    """
    if implementation == "auto":
        implementation = default_implementation(q_QHK.device, score)
    if not len(q_QHK) or not len(k_THK):  # an empty micro-batch: keep the graph, so that every rank reduces the same gradients
        tables = 0.0 if bias is None else 0 * (bias.position_PH.sum() + bias.time_GH.sum())
        return q_QHK + 0 * (k_THK.sum() + v_THK.sum()) + tables
    if bias is not None and implementation in ("flex", "triton"):
        heads = q_QHK.shape[1]
        bias = replace(bias, position_PH=bias.position_PH.expand(-1, heads), time_GH=bias.time_GH.expand(-1, heads))
    if implementation == "flex":
        return _flex(q_QHK, k_THK, v_THK, spans, bias)
    if implementation == "triton":
        from gpr_dist.ops.triton_attention import span_attention  # needs triton, which only CUDA builds of torch bring

        return span_attention(q_QHK, k_THK, v_THK, spans, score, bias, silu_length)
    if bias is not None:  # once for all rows: their gradients add up in float32
        wide = torch.promote_types(bias.position_PH.dtype, torch.float32)
        bias = replace(bias, position_PH=bias.position_PH.to(wide), time_GH=bias.time_GH.to(wide))
    attend = _reference if implementation == "reference" else _torch
    return attend(q_QHK, k_THK, v_THK, spans, score, bias, silu_length)


def default_implementation(device: torch.device, score: Score) -> Implementation:
    """CPU: torch. CUDA: flex for the softmax, triton for SiLU, which FlexAttention cannot express."""
    if device.type != "cuda":
        return "torch"
    return "flex" if score == "softmax" else "triton"


def check_implementation(implementation: Implementation, score: Score, where: str) -> None:
    """Refuse what cannot work. Args: where: the settings' names, for the message. Raises: ConfigError."""
    if implementation == "flex" and score == "silu":
        raise ConfigError(f"{where}: FlexAttention has no SiLU scores; use attention=triton on CUDA, torch on CPU, or auto")


def _torch(q_QHK: Tensor, k_THK: Tensor, v_THK: Tensor, spans: Spans, score: Score, bias: RelativeBias | None, length: int) -> Tensor:
    """Piece by piece. A CPU computes bf16 in float32: its fused kernel and its small products take up to twice as long in bf16."""
    dtype = torch.float32 if q_QHK.device.type == "cpu" and q_QHK.dtype == torch.bfloat16 else q_QHK.dtype
    q_QHK, k_THK, v_THK, output_dtype = q_QHK.to(dtype), k_THK.to(dtype), v_THK.to(dtype), q_QHK.dtype
    row_lengths = [end - begin for begin, end in pairwise(spans.key_offsets)]
    train_short = q_QHK.device.type == "cpu" and torch.is_grad_enabled() and max(row_lengths) <= _PRODUCTS_MOST_KEYS
    if score == "silu" or bias is not None or (train_short and not spans.any_empty()):
        pieces = spans.pieces(_PIECE_QUERIES["products"], _JOINED_QUERIES)
        table_HC = None if bias is None else bias.table(_MASKED[score]).to(dtype)
        added = spans.additive(pieces, score, dtype) if bias is None else bias.indices(pieces, spans)
        return _Products.apply(q_QHK, k_THK, v_THK, table_HC, pieces, added, score, 1 / length).to(output_dtype)
    few = max(end - begin for begin, end in pairwise(spans.query_offsets)) <= _PIECE_QUERIES["fused"]
    if few and not torch.is_grad_enabled() and (padded := spans.padded(dtype)) is not None:
        return padded.attend(q_QHK, k_THK, v_THK).to(output_dtype)
    pieces = spans.pieces(_PIECE_QUERIES["fused"])
    # Splits, not slices: the backward pass of a slice fills and adds a tensor as large as the whole batch.
    queries, keys, values = q_QHK.split([piece.num_queries for piece in pieces]), k_THK.split(row_lengths), v_THK.split(row_lengths)
    out = []
    for piece, q_qHK, add in zip(pieces, queries, spans.additive(pieces, score, dtype), strict=True):
        here = slice(piece.first_key - spans.key_offsets[piece.row], piece.end_key - spans.key_offsets[piece.row])
        q, k, v = (x.transpose(0, 1)[None] for x in (q_qHK, keys[piece.row][here], values[piece.row][here]))
        mask_qt = None if add is None else add[0]  # not of three dimensions: those take a path of PyTorch's 2.5 times as slow
        out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask_qt)[0].transpose(0, 1))
    return torch.cat(out).to(output_dtype)


class _Products(torch.autograd.Function):
    """Attention by plain products: SiLU scores and a bias that learns, which no fused kernel of PyTorch on a CPU computes, and short rows.

    One node for all pieces: PyTorch's own would cost more than the arithmetic of a short row, and each would add up its part of the
    gradients in a tensor of its own.
    """

    @staticmethod
    def forward(ctx: Any, q_QHK: Tensor, k_THK: Tensor, v_THK: Tensor, table_HC: Tensor | None, pieces: list[Piece],
                added: list[Tensor | None], score: Score, factor: float) -> Tensor:
        """Args: added: per piece, what is added to the scores, or where there is a table its columns. factor: of SiLU scores' sum."""
        ctx.pieces, ctx.added, ctx.score, ctx.table_shape = pieces, added, score, None if table_HC is None else table_HC.shape
        ctx.scale, ctx.factor = q_QHK.shape[-1] ** -0.5, factor if score == "silu" else 1.0
        q, k, v = (x.transpose(0, 1).contiguous() for x in (q_QHK, k_THK, v_THK))
        out, kept = torch.empty_like(q), []
        for queries, keys, add in _Products._places(pieces, added):
            if table_HC is not None:
                add = table_HC.index_select(1, add).view(len(table_HC), queries.stop - queries.start, -1)
            k_t = k[:, keys].transpose(1, 2)
            scores = q[:, queries] @ k_t * ctx.scale if add is None else torch.baddbmm(add, q[:, queries], k_t, alpha=ctx.scale)
            weights = scores.softmax(-1) if score == "softmax" else F.silu(scores)
            out[:, queries] = weights @ v[:, keys]
            kept += [weights] if score == "softmax" else [weights, scores]
        ctx.save_for_backward(q, k, v, *kept)
        return out.mul_(ctx.factor).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient_QHK: Tensor) -> tuple:
        q, k, v, *kept = ctx.saved_tensors
        g = (gradient_QHK.transpose(0, 1) * ctx.factor).contiguous()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        wide = torch.promote_types(q.dtype, torch.float32)  # a column adds up very many
        dtable_HC = None if ctx.table_shape is None else q.new_zeros(ctx.table_shape, dtype=wide)
        each = 1 if ctx.score == "softmax" else 2
        for number, (queries, keys, add) in enumerate(_Products._places(ctx.pieces, ctx.added)):
            weights, scores = kept[each * number], kept[each * number + each - 1]
            dweights = g[:, queries] @ v[:, keys].transpose(1, 2)
            if ctx.score == "softmax":
                dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
            else:
                dscores = torch.ops.aten.silu_backward(dweights, scores)
            dq[:, queries] = dscores @ k[:, keys]
            dk[:, keys].baddbmm_(dscores.transpose(1, 2), q[:, queries], alpha=ctx.scale)
            dv[:, keys].baddbmm_(weights.transpose(1, 2), g[:, queries])
            if dtable_HC is not None:
                if len(dtable_HC) < len(dscores):
                    dscores = dscores.sum(0, keepdim=True)
                dtable_HC.index_add_(1, add, dscores.flatten(1).to(wide))
        return *(x.transpose(0, 1) for x in (dq.mul_(ctx.scale), dk, dv)), dtable_HC, None, None, None, None

    @staticmethod
    def _places(pieces: list[Piece], added: list[Tensor | None]) -> Iterator[tuple[slice, slice, Tensor | None]]:
        begin = 0
        for piece, add in zip(pieces, added, strict=True):
            yield slice(begin, begin + piece.num_queries), slice(piece.first_key, piece.end_key), add
            begin += piece.num_queries


def _reference(q_QHK: Tensor, k_THK: Tensor, v_THK: Tensor, spans: Spans, score: Score, bias: RelativeBias | None, length: int) -> Tensor:
    out = []
    for row, (queries, keys) in enumerate(zip(pairwise(spans.query_offsets), pairwise(spans.key_offsets), strict=True)):
        q_qHK, k_tHK, v_tHK = q_QHK[slice(*queries)], k_THK[slice(*keys)], v_THK[slice(*keys)]
        mask_qt = spans.mask(row)
        scores = torch.einsum("qhk,thk->hqt", q_qHK.float(), k_tHK.float()) / q_qHK.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias.of_row(*keys).float()
        if score == "softmax":
            weights = scores.masked_fill(~mask_qt, float("-inf")).softmax(-1).nan_to_num(0.0)
        else:
            weights = F.silu(scores).masked_fill(~mask_qt, 0.0) / length
        out.append(torch.einsum("hqt,thk->qhk", weights, v_tHK.float()).to(q_QHK.dtype))
    return torch.cat(out)


def _flex(q_QHK: Tensor, k_THK: Tensor, v_THK: Tensor, spans: Spans, bias: RelativeBias | None) -> Tensor:
    """FlexAttention over the whole packed batch; lengths are rounded up to a few sizes, so that it is compiled a few times."""
    num_queries, num_keys = _bucketed(len(q_QHK)), _bucketed(len(k_THK))
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, size - len(x))).transpose(0, 1)[None]
               for x, size in ((q_QHK, num_queries), (k_THK, num_keys), (v_THK, num_keys)))
    score_mod = None
    if bias is not None:
        position_T, seconds_T = (F.pad(x, (0, num_keys - len(x))) for x in (bias.position_T, bias.seconds_T))
        position_PH, time_GH = bias.position_PH, bias.time_GH

        def score_mod(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = position_bucket(position_T[query] - position_T[key], position_PH.shape[0])
            return score + position_PH[distance, head] + time_GH[time_bucket(seconds_T[query] - seconds_T[key], time_GH.shape[0]), head]

    out = _flex_function(q.device.type)(q, k, v, score_mod=score_mod, block_mask=_flex_mask(spans, num_queries, num_keys))
    return out[0].transpose(0, 1)[:len(q_QHK)]


def _bucketed(length: int) -> int:
    """The next of the sizes 128, 256, 384, 512, 640, 768, … with steps of an eighth of the power of two below: at most 12 % padding."""
    step = max(_FLEX_BLOCK, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


def _flex_mask(spans: Spans, num_queries: int, num_keys: int) -> "BlockMask":  # noqa: F821
    """The block mask, made from the spans directly: the dense mask of a long batch would not fit into memory."""
    if "flex" not in spans.made:
        from torch.nn.attention.flex_attention import BlockMask

        pad = num_queries - len(spans.first_Q)
        first_Q, last_Q = F.pad(spans.first_Q, (0, pad), value=num_keys), F.pad(spans.last_Q, (0, pad), value=-1)
        low_b = first_Q.view(-1, _FLEX_BLOCK).amin(1) // _FLEX_BLOCK
        high_b = last_Q.view(-1, _FLEX_BLOCK).amax(1) // _FLEX_BLOCK
        count_b = (high_b - low_b + 1).clamp_min(0)
        index_bk = (low_b[:, None] + torch.arange(num_keys // _FLEX_BLOCK, device=low_b.device)).clamp_max(num_keys // _FLEX_BLOCK - 1)

        def inside(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= first_Q[query]) & (key <= last_Q[query])

        spans.made["flex"] = BlockMask.from_kv_blocks(
            count_b.int()[None, None], index_bk.int()[None, None], BLOCK_SIZE=_FLEX_BLOCK, mask_mod=inside,
            seq_lengths=(num_queries, num_keys))
    return spans.made["flex"]


@cache
def _flex_function(device: str) -> object:
    """Compiled on CUDA; on a CPU as it is, which materialises everything and serves the tests."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device == "cuda" else flex_attention
