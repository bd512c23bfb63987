"""A GPR model as the search sees it: encode a batch once, then log-probabilities of the next code, and values where they guide."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gpr_dist.model.ptd import Opening
from gpr_dist.schema import Batch, CopyMass

# N prefixes, of requests in ascending order  V codes per level  D width  M (prefix, code) pairs


class ModelDecoder:
    """Implements `evaluation.evaluate.Decoder` with MTP head `head` of a model or of an engine around it."""

    def __init__(self, model: Callable[..., Any], device: torch.device | str, head: int = 0, heads: Sequence[int] | None = None) -> None:
        """Args: head: the one that `step_log_probs` speaks for. heads: all that are encoded, for `searcher`; default: `head` alone."""
        self.model, self.device, self.head, self.heads = model, device, head, tuple(heads or (head,))
        self._batch: Batch | None = None

    def start(self, batch: Batch) -> Opening:
        self._batch = batch.to(self.device)
        return self.model(self._batch, task="encode", heads=self.heads)

    def copy_mass(self, state: Opening) -> CopyMass | None:
        """What each request of the batch may copy; none = the model has no pointer."""
        return None if state.copying is None else state.copying.of_items(self._batch, self.head)

    def step_log_probs(self, state: Opening, request_index_N: Tensor, prefix_codes_Nl: Tensor) -> Tensor:
        head_N = torch.full_like(request_index_N, self.head)
        return self.model(self._batch, task="decode", opening=state, request_N=request_index_N, head_N=head_N, prefix_Nl=prefix_codes_Nl)

    def searcher(self, state: Opening, first_request: int = 0) -> "ModelSearch":
        """The model for `decoding.search.search` over the batch's requests from `first_request` on. Args: state: from `start`."""
        return ModelSearch(self.model, self._batch, state, first_request)


@dataclass(frozen=True)
class ModelSearch:
    """Implements `decoding.search.SearchModel`."""

    model: Callable[..., Any]
    batch: Batch
    opening: Opening
    first_request: int

    def log_probs(self, request_N: Tensor, head_N: Tensor, prefix_Nl: Tensor) -> tuple[Tensor, Tensor]:
        return self.model(self.batch, task="decode", opening=self.opening, request_N=request_N + self.first_request, head_N=head_N,
                          prefix_Nl=prefix_Nl, with_state=True)

    def values(self, state_N2D: Tensor, row_M: Tensor, code_M: Tensor, level: int) -> Tensor:
        return self.model(self.batch, task="values", state_M2D=state_N2D.index_select(0, row_M), code_M=code_M, level=level)

    def copies(self, num_requests: int, heads: tuple[int, ...]) -> CopyMass | None:
        copying = self.opening.copying
        if copying is None:
            return None
        copy, last_request = copying.of_items(self.batch, heads[0]), self.first_request + num_requests
        first, last = torch.searchsorted(copy.request_M, copy.request_M.new_tensor([self.first_request, last_request])).tolist()
        gate_BH = copying.log_gate_RP[self.first_request : last_request, list(heads)].float()
        return replace(copy, request_M=copy.request_M[first:last] - self.first_request, item_M=copy.item_M[first:last],
                       log_mass_M=copy.log_mass_M[first:last], log_gate_B=gate_BH)
