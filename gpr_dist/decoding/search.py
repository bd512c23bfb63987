"""One search over the trie of legal semantic IDs for every use: plain and value-guided beam (GPR Fig. 2d), sampling with and without
replacement for rollouts; one or several MTP heads; with or without a pointer to past items.

Batched over requests, no Python per beam. What is asked of the model is fixed: one forward per level, and one for values where the
values guide, whatever the batch holds, also when it holds nothing, because under ZeRO-3 every rank must run the same forwards.
How prefixes are chosen is `choose.py`'s business, what is legal `legality.py`'s, and the items of a leaf `ranking.py`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, model_validator
from torch import Tensor

from gpr_dist.config import Config
from gpr_dist.decoding import choose
from gpr_dist.decoding.legality import Eligible
from gpr_dist.decoding.pointer import Pointer
from gpr_dist.decoding.segments import log_sum_exp, starts, top_k, z_scores
from gpr_dist.errors import ConfigError, TrainingError
from gpr_dist.schema import CopyMass

# B requests  Q searches (request, head), by request  K results per request  L levels  V codes per level
# N alive prefixes of all searches, by search  M their legal children, in the same order  C chosen ones

Softmax = Literal["all", "legal", "prior"]


class ValueGuide(Config):
    """How the value head steers the beam."""

    temperature: float | None = Field(1.0, gt=0)
    """tau of w = softmax((V - mean) / (std tau)) over the alive prefixes; none = every prefix proposes `max_children` children"""
    max_children: int = Field(1 << 20, ge=1)
    """largest number of children k_b that one prefix proposes"""
    proposals: float = Field(2.0, ge=1)
    """children proposed per level over the beam's width, of which the width best are kept"""
    eta: float = Field(0.3, ge=0)
    """weight of zscore(V) beside the sum of log p when children are kept"""


class SearchConfig(Config):
    """The search."""

    strategy: Literal["beam", "value", "sample", "gumbel"] = "beam"
    """beam | value = value-guided beam | sample = independent paths, with repeats | gumbel = distinct paths, sampled without replacement"""
    width: int | tuple[int, ...] = 128
    """prefixes kept per request (or paths sampled), one number or one per level"""
    softmax: Softmax = "all"
    """what step probabilities are normalised over: all codes | legal ones | legal ones times the weight of the items below"""
    heads: tuple[int, ...] = (0,)
    """MTP heads searched; with several, each has its own beam and the results are united"""
    head_weights: tuple[float, ...] = ()
    """share of each head in beam width and probability; empty = equal"""
    temperature: float = Field(1.0, gt=0)
    """divides the log-probabilities of a step before they are normalised; only for softmax legal or prior"""
    guide: ValueGuide = ValueGuide()
    """for strategy value"""
    seed: int = 0
    """of sampling; a request's draws depend on it and on the request's id alone"""

    @model_validator(mode="after")
    def _check(self) -> "SearchConfig":
        widths = (self.width,) if isinstance(self.width, int) else self.width
        problems = []
        if not widths or min(widths) < 1:
            problems.append(f"width={self.width} must be at least 1")
        if not self.heads or len(set(self.heads)) != len(self.heads) or min(self.heads) < 0:
            problems.append(f"heads={self.heads} must be distinct MTP heads")
        if self.head_weights and (len(self.head_weights) != len(self.heads) or min(self.head_weights) <= 0):
            problems.append(f"head_weights={self.head_weights} must be positive, one for each of heads={self.heads}")
        if widths and min(widths) < len(self.heads):
            problems.append(f"width={self.width} must be at least the number of heads ({len(self.heads)})")
        if self.softmax == "all" and (self.strategy in ("sample", "gumbel") or self.temperature != 1):
            problems.append("sampling and a temperature need probabilities over the legal codes: set softmax=legal or prior")
        if self.strategy in ("sample", "gumbel") and len(self.heads) > 1:
            problems.append(f"strategy={self.strategy} samples from one MTP head, found heads={self.heads}")
        if self.strategy == "sample" and len(set(widths)) > 1:
            problems.append(f"strategy=sample draws whole paths, so one width is enough, found width={self.width}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def widths(self, num_levels: int) -> list[list[int]]:
        """Prefixes per level and head; every head has at least one. Raises: ConfigError when `width` lists another number of levels."""
        widths = [self.width] * num_levels if isinstance(self.width, int) else list(self.width)
        if len(widths) != num_levels:
            raise ConfigError(f"search.width={self.width} lists {len(widths)} levels, the trie has {num_levels}; give one or as many")
        return [_shares(width, self.shares) for width in widths]

    @property
    def shares(self) -> list[float]:
        """Weight of each head; they sum to 1."""
        weights = self.head_weights or (1.0,) * len(self.heads)
        return [weight / sum(weights) for weight in weights]


class SearchModel(Protocol):
    """A model that has encoded the batch."""

    def log_probs(self, request_N: Tensor, head_N: Tensor, prefix_Nl: Tensor) -> tuple[Tensor, Any]:
        """Log-softmax over all codes of level l, [N, V], for requests in ascending order (N may be 0), and what `values` needs of it."""

    def values(self, state: Any, row_M: Tensor, code_M: Tensor, level: int) -> Tensor:
        """V_{level+1} of code `code_M` after the prefix in row `row_M` of the last `log_probs`, [M]; M may be 0."""

    def copies(self, num_requests: int, heads: tuple[int, ...]) -> CopyMass | None:
        """What the pointer to past items says about the requests, gates [B, H] of these heads; None = the model has no pointer."""


@dataclass(frozen=True)
class BeamResult:
    """The leaves found for each request, in the order of the strategy. Where there are fewer: leaf -1, scores -inf, codes -1, value NaN."""

    leaf_BK: Tensor  # int64, node of the trie's last level
    score_BK: Tensor  # float32, log-probability of the path in nats
    codes_BKL: Tensor  # int64
    steps_BKL: Tensor | None = None  # float32, log-probability of each code after those before it, in sum the score; only with one head
    log_p_gen_BK: Tensor | None = None  # float32, of the generator alone; only with a pointer
    pointer: Pointer | None = None  # what was mixed with it
    value_BK: Tensor | None = None  # float32, V_L in log1p units; only with strategy value
    perturbed_BK: Tensor | None = None  # float32, Gumbel-perturbed score, which orders the result; only with strategy gumbel


@dataclass
class Beams:
    """Alive prefixes, by search and then best first."""

    search_N: Tensor  # int64
    node_N: Tensor  # int64
    codes_Nl: Tensor  # int64
    log_p_gen_N: Tensor  # of the generator
    score_N: Tensor  # log-probability, the mixture with the pointer where there is one
    steps_Nl: Tensor | None  # that of each code
    extra_N: Tensor | None = None  # value, or perturbed score
    key_N: Tensor | None = None  # int64, names the prefix in sampling


@torch.no_grad()
def search(model: SearchModel, eligible: Eligible, config: SearchConfig, item_weight_M: Tensor | None = None,
           request_id_B: Tensor | None = None) -> BeamResult:
    """Find K legal leaves per request.

    Args:
        eligible: what each request may be shown. item_weight_M: [slots], from `Trie.slot_weights`; for softmax=prior.
        request_id_B: int64, for sampling: a request draws the same numbers whatever batch it is in.
    Returns: exactly K columns, by score; with strategy value by score + eta zscore(V), with gumbel by perturbed score, with sample in
        the order of the draws. A beam of at least the number of legal prefixes is exact.
    Raises: TrainingError when the model returns NaN.
    """
    trie, sampled = eligible.trie, config.strategy in ("sample", "gumbel")
    widths, heads = config.widths(trie.num_levels), len(config.heads)
    assert config.softmax != "prior" or item_weight_M is not None, "softmax=prior needs item_weight_M"
    assert not sampled or request_id_B is not None, f"strategy={config.strategy} needs request_id_B"
    num_searches = eligible.num_requests * heads
    prior = _Prior(eligible, item_weight_M) if config.softmax == "prior" else None
    copy = model.copies(eligible.num_requests, config.heads)
    pointer = Pointer.of(eligible, copy, heads) if copy is not None else None
    head_H = torch.tensor(config.heads, device=trie.device)
    draws = choose.Draws(config.seed, request_id_B.to(trie.device), widths[-1][0]) if sampled else None

    root_Q = torch.zeros(num_searches, device=trie.device)
    search_Q = torch.arange(num_searches, device=trie.device)
    beams = Beams(search_Q, torch.zeros_like(search_Q), search_Q.new_empty(num_searches, 0), root_Q, root_Q.clone(),
                  root_Q.new_empty(num_searches, 0))
    if config.strategy == "gumbel":
        beams.key_N, beams.extra_N = draws.root_key_B, draws.gumbel(draws.root_key_B)
    elif config.strategy == "value":
        beams.extra_N = root_Q.clone()
    for level in range(trie.num_levels):
        request_N = beams.search_N // heads
        log_probs_NV, state = model.log_probs(request_N, head_H[beams.search_N % heads], beams.codes_Nl)
        assert log_probs_NV.shape[0] == request_N.numel(), f"{tuple(log_probs_NV.shape)} for {request_N.numel()} prefixes"

        owner_M, child_M = eligible.children(level, request_N, beams.node_N)
        code_M = trie.codes_of(level, child_M)
        place_M = code_M.add_(owner_M, alpha=log_probs_NV.shape[1])
        step_M = log_probs_NV.reshape(-1).index_select(0, place_M).float()
        if prior is not None:
            step_M = prior.add(level, request_N, owner_M, child_M, step_M)
        if config.temperature != 1:
            step_M = step_M / config.temperature
        if config.softmax != "all":
            step_M -= _total(step_M, owner_M, place_M, log_probs_NV.shape).index_select(0, owner_M)
        log_p_gen_M = score_M = step_M + beams.log_p_gen_N.index_select(0, owner_M)
        if pointer is not None:
            score_M = pointer.mix(level, beams.search_N.index_select(0, owner_M), child_M, log_p_gen_M)
        if score_M.sum().isnan():  # -inf, a code that the model rules out, is not NaN
            raise TrainingError(f"the model returned NaN log-probabilities at level {level} of the beam search")

        first_Q = torch.searchsorted(owner_M, starts(beams.search_N, num_searches))  # of the children of each search
        width_Q = widths[level][0] if heads == 1 else torch.tensor(widths[level], device=trie.device).repeat(eligible.num_requests)
        extra_C = key_C = None
        if config.strategy == "beam":
            chosen_C = top_k(score_M, first_Q, width_Q)
        elif config.strategy == "value":
            proposed = choose.propose(score_M, owner_M, beams.search_N, beams.extra_N, num_searches, width_Q, config.guide)
            prefix, child = owner_M[proposed], child_M[proposed]
            value = model.values(state, prefix, trie.codes_of(level, child), level).float()
            if value.isnan().any():
                raise TrainingError(f"the value head returned NaN at level {level} of the beam search")
            kept = choose.keep_guided(score_M[proposed], value, beams.search_N[prefix], num_searches, width_Q, config.guide.eta)
            chosen_C, extra_C = proposed[kept], value[kept]
        elif config.strategy == "gumbel":
            key_M = draws.child_key(beams.key_N.index_select(0, owner_M), trie.codes_of(level, child_M))
            perturbed_M = choose.perturb(score_M, draws.gumbel(key_M), owner_M, beams.extra_N)
            chosen_C = top_k(perturbed_M, first_Q, width_Q)
            extra_C, key_C = perturbed_M[chosen_C], key_M[chosen_C]
        else:
            chosen_C = draws.sample(level, score_M, owner_M, request_N.numel())
        parent_C = owner_M.index_select(0, chosen_C)
        child_C = child_M.index_select(0, chosen_C)
        codes_Cl = torch.cat((beams.codes_Nl.index_select(0, parent_C), trie.codes_of(level, child_C)[:, None]), dim=1)
        score_C = score_M.index_select(0, chosen_C)
        step_C = score_C - beams.score_N.index_select(0, parent_C)
        steps_Cl = torch.cat((beams.steps_Nl.index_select(0, parent_C), step_C[:, None]), dim=1)
        beams = Beams(beams.search_N.index_select(0, parent_C), child_C, codes_Cl, log_p_gen_M.index_select(0, chosen_C), score_C,
                      steps_Cl, extra_C, key_C)

    if config.strategy == "sample":
        request_S, column_S, row_S = draws.paths()
        beams = Beams(*(None if part is None else part[row_S] for part in vars(beams).values()))
        return _as_result(beams, request_S, column_S, eligible.num_requests, widths[-1][0], pointer, config)
    if heads > 1:
        beams, pointer = _unite(beams, config, eligible, pointer)
    first_Q = starts(beams.search_N, eligible.num_requests)
    column_N = torch.arange(beams.node_N.numel(), device=trie.device) - first_Q.index_select(0, beams.search_N)
    return _as_result(beams, beams.search_N, column_N, eligible.num_requests, sum(widths[-1]), pointer, config)


def _total(step_M: Tensor, owner_M: Tensor, place_M: Tensor, shape: torch.Size) -> Tensor:
    """log sum exp over the children of each prefix [N]; 0 where none is possible, which leaves them so."""
    if 8 * step_M.numel() < shape.numel():
        return log_sum_exp(step_M, owner_M, shape[0])
    masked_NV = torch.full(shape, -torch.inf, device=step_M.device)  # rows are faster than segments unless most is empty
    masked_NV.view(-1).index_copy_(0, place_M, step_M)
    total_N = masked_NV.logsumexp(1)
    return torch.where(total_N > -torch.inf, total_N, 0)


class _Prior:
    """Log of the legal weight below each child, as the request sees it."""

    def __init__(self, eligible: Eligible, item_weight_M: Tensor) -> None:
        self._eligible = eligible
        self._weights, self._logs = eligible.legal.weights(item_weight_M)
        self._lost = eligible.excluded.lost_weight(eligible.trie, item_weight_M) if eligible.excluded else None

    def add(self, level: int, request_N: Tensor, owner_M: Tensor, child_M: Tensor, step_M: Tensor) -> Tensor:
        place_M = self._eligible.place(level, request_N, owner_M, child_M)
        log_M = self._logs[level].view(-1).index_select(0, place_M)
        if self._lost is not None:
            pairs, weight_X = self._lost[level]
            hit, pair = pairs.find(request_N.index_select(0, owner_M), child_M)
            left = self._weights[level].view(-1).index_select(0, place_M.index_select(0, hit)) - weight_X.index_select(0, pair)
            log_M[hit] = left.clamp(min=1e-30).log().float()  # legal, so something is left; the difference may round below it
        return step_M + log_M


def _unite(beams: Beams, config: SearchConfig, eligible: Eligible, pointer: Pointer | None) -> tuple[Beams, Pointer | None]:
    """Leaves of all heads of a request, each once: p(leaf) = sum over the heads that found it of weight times p_head(leaf)."""
    heads, leaves = len(config.heads), eligible.trie.num_leaves
    request_N = beams.search_N // heads
    log_weight_N = torch.tensor(config.shares, device=request_N.device).log()[beams.search_N % heads]
    key, place_N = torch.unique(request_N * leaves + beams.node_N, return_inverse=True)
    request, leaf = key // leaves, key % leaves
    weighted_N = beams.log_p_gen_N + log_weight_N
    if pointer is not None:
        weighted_N = weighted_N + pointer.log_rest_Q[beams.search_N]
    log_p_gen = torch.full_like(key, -torch.inf, dtype=weighted_N.dtype)
    reached = torch.zeros_like(key, dtype=torch.bool).index_fill_(0, place_N[weighted_N > -torch.inf], True)
    log_p_gen = torch.where(reached, log_sum_exp(weighted_N, place_N, len(key)), log_p_gen)
    score = log_p_gen
    if pointer is not None:
        pointer = pointer.united(config.shares)
        log_p_gen = torch.where(reached, log_p_gen - pointer.log_rest_Q[request], log_p_gen)
        score = pointer.mix(eligible.trie.num_levels - 1, request, leaf, log_p_gen)
    best = torch.full_like(score, -torch.inf).scatter_reduce(0, place_N, weighted_N, "amax")
    source = torch.zeros_like(key)  # the head most sure of a leaf speaks for its value
    is_best_N = weighted_N == best[place_N]
    source[place_N[is_best_N]] = is_best_N.nonzero().squeeze(1)
    order_score, value = score, None
    if beams.extra_N is not None:
        value = beams.extra_N[source]
        order_score = score + config.guide.eta * z_scores(value, request, eligible.num_requests)
    chosen = top_k(order_score, starts(request, eligible.num_requests), len(key))
    return Beams(request[chosen], leaf[chosen], beams.codes_Nl[source[chosen]], log_p_gen[chosen], score[chosen], None,
                 None if value is None else value[chosen]), pointer


def _as_result(beams: Beams, request_N: Tensor, column_N: Tensor, num_requests: int, k: int, pointer: Pointer | None,
               config: SearchConfig) -> BeamResult:
    def spread(values_N: Tensor | None, fill: float) -> Tensor | None:
        if values_N is None:
            return None
        return values_N.new_full((num_requests, k, *values_N.shape[1:]), fill).index_put_((request_N, column_N), values_N)

    return BeamResult(spread(beams.node_N, -1), spread(beams.score_N, -torch.inf), spread(beams.codes_Nl, -1),
                      spread(beams.steps_Nl, -torch.inf),
                      spread(beams.log_p_gen_N, -torch.inf) if pointer is not None else None, pointer,
                      spread(beams.extra_N, torch.nan) if config.strategy == "value" else None,
                      spread(beams.extra_N, -torch.inf) if config.strategy == "gumbel" else None)


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` split by weight in whole numbers, at least one each; what is left over goes to the largest fractions."""
    shares = [max(1, int(total * weight)) for weight in weights]
    by_fraction = sorted(range(len(weights)), key=lambda number: shares[number] - total * weights[number])
    for number in by_fraction[:max(0, total - sum(shares))]:
        shares[number] += 1
    while sum(shares) > total:
        shares[shares.index(max(shares))] -= 1
    return shares
