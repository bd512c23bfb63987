"""A GPR model as the beam search sees it: encode a batch once, then log-probabilities of the next code."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpr_dist.model.ptd import Opening
from gpr_dist.schema import Batch


class ModelDecoder:
    """Implements `evaluation.evaluate.Decoder` with MTP head `head` of a model or of an engine around it."""

    def __init__(self, model: Callable[..., Any], device: torch.device | str, head: int = 0) -> None:
        self.model, self.device, self.head = model, device, head
        self._batch: Batch | None = None

    def start(self, batch: Batch) -> Opening:
        self._batch = batch.to(self.device)
        return self.model(self._batch, task="encode", heads=(self.head,))

    def step_log_probs(self, state: Opening, request_index_N: Tensor, prefix_codes_Nl: Tensor) -> Tensor:
        head_N = torch.full_like(request_index_N, self.head)
        return self.model(self._batch, task="decode", opening=state, request_N=request_index_N, head_N=head_N, prefix_Nl=prefix_codes_Nl)
