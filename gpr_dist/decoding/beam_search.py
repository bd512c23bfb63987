"""Plain beam search with a function as the model: `search.py` and `ranking.py` for callers that need nothing more."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpr_dist.decoding.legality import Eligible
from gpr_dist.decoding.ranking import rank_items
from gpr_dist.decoding.search import BeamResult, SearchConfig, Softmax, search
from gpr_dist.decoding.trie import Trie
from gpr_dist.schema import CopyMass

# B requests  K results  N alive prefixes  V codes per level  l codes of a prefix  Gr eligibility groups

__all__ = ["BeamResult", "Softmax", "beam_search", "expand_items"]

StepLogProbs = Callable[[Tensor, Tensor], Tensor]
"""(request_N int64 ascending, prefix_codes_Nl int64) -> log p of the next code, float [N, V]; N may be 0, l = 0 at the first level."""


class _Function:
    """A `SearchModel` without values."""

    def __init__(self, step_log_probs: StepLogProbs, copy: CopyMass | None) -> None:
        self._step_log_probs, self._copy = step_log_probs, copy

    def log_probs(self, request_N: Tensor, head_N: Tensor, prefix_Nl: Tensor) -> tuple[Tensor, None]:
        return self._step_log_probs(request_N, prefix_Nl), None

    def values(self, state: None, row_M: Tensor, code_M: Tensor, level: int) -> Tensor:
        raise NotImplementedError("a function of log-probabilities has no values")

    def copies(self, num_requests: int, heads: tuple[int, ...]) -> CopyMass | None:
        return self._copy


def beam_search(step_log_probs: StepLogProbs, trie: Trie, legal: Sequence[Tensor], request_group_B: Tensor,
                beam_width: int | Sequence[int] = 128, normalise: Softmax = "all", item_weight_M: Tensor | None = None,
                exclude: tuple[Tensor, Tensor] | None = None, copy: CopyMass | None = None) -> BeamResult:
    """The K legal leaves with the largest probability that survive the beam.

    Args:
        step_log_probs: the model; log-softmax over all V codes of the level whose number is the prefix length.
        legal: `Legal`, e.g. from `LegalCache`, or bool [Gr, n_l] per level from `Trie.legal_nodes`.
        request_group_B: row of `legal` for each request.
        beam_width: prefixes kept per request, one number or one per level; K = the last.
        normalise: "all" scores a path by the full-softmax probabilities, so leaves are ranked by p(leaf) of a model trained on the
            full softmax, exactly: restricting to eligible leaves divides all of them by the same p(eligible). "legal" renormalises
            every step over the prefix's legal children: the distribution of a policy that samples legal codes (GPR Eq. 3, 9), right
            for models trained that way; otherwise it favours leaves whose siblings are switched off. "prior" = "legal" with
            probabilities times the legal `item_weight_M` below each child.
        exclude: (request int64, item) pairs that may not be shown, in any order.
        copy: the pointer to past items, e.g. of `ModelSearch.copies`; None = the generator alone.
    Returns: BeamResult with exactly K columns. With K >= the number of legal prefixes at every level it equals brute force.
    Raises: TrainingError when the model returns NaN.
    """
    config = SearchConfig(width=beam_width if isinstance(beam_width, int) else tuple(beam_width), softmax=normalise)
    return search(_Function(step_log_probs, copy), Eligible.of(trie, legal, request_group_B, exclude), config, item_weight_M)


def expand_items(result: BeamResult, trie: Trie, legal_slots: Tensor, request_group_B: Tensor, item_weight_M: Tensor, k: int,
                 normalise: Softmax = "all") -> tuple[Tensor, Tensor]:
    """`rank_items` by probability, without exclusions.

    Args: legal_slots: bool [Gr, slots], the last entry of the `legal` of the search.
    Returns: (item_BK int64 catalogue indices, -1 where there are fewer than k; score_BK float32, -inf there).
    """
    above = [torch.empty(0, 0, dtype=torch.bool, device=trie.device)] * trie.num_levels
    ranked = rank_items(result, Eligible.of(trie, [*above, legal_slots], request_group_B), item_weight_M, k, normalise)
    return ranked.item_BK, ranked.score_BK
