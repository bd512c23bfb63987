"""GPR: assembles input embedding → HSD → PTD → HTE and nothing more (GPR, arXiv 2511.10138, Fig. 2).

Every use of the network goes through `GPR.forward`, also encoding and decoding at evaluation: DeepSpeed's ZeRO-3 hooks start at the
root module's call.
"""

from dataclasses import dataclass
from typing import Any

from pydantic import model_validator
from torch import Tensor, nn

from gpr_dist.config import Config
from gpr_dist.model.embedding import CodeEmbedding, EmbeddingConfig, TokenEmbedding
from gpr_dist.model.hsd import HSD, HSDConfig
from gpr_dist.model.hte import HTE
from gpr_dist.model.ptd import PTD, Intents, PTDConfig, log_probs
from gpr_dist.schema import Batch

# T packed tokens  D width  R requests  N targets  L levels  V codes per level


class GPRConfig(Config):
    """The whole model. The last five fields are filled in from the data and the tokenizer."""

    width: int = 128
    """model width D"""
    num_mtp_heads: int = 4
    """MTP heads P; head j predicts the j-th next ad"""
    embedding: EmbeddingConfig = EmbeddingConfig()
    """input embeddings"""
    hsd: HSDConfig = HSDConfig()
    """journey encoder"""
    ptd: PTDConfig = PTDConfig()
    """code decoder"""
    num_levels: int = 3
    """levels L of a semantic ID (from the tokenizer)"""
    codebook_size: int = 256
    """codes V per level (from the tokenizer)"""
    num_user_features: int = 0
    """categorical fields of a U token (from the shards)"""
    num_env_features: int = 0
    """categorical fields of an E token (from the shards)"""

    @model_validator(mode="after")
    def _check(self) -> "GPRConfig":
        problems = []
        for part, heads in (("hsd", self.hsd.num_heads), ("ptd", self.ptd.num_heads)):
            if self.width % heads or self.width // heads % 2:
                problems.append(f"{part}.num_heads={heads} must divide width={self.width} into even head widths")
        if problems:
            raise ValueError("; ".join(problems))
        return self


@dataclass
class GPROutput:
    """What the objectives need."""

    logits_NLV: Tensor
    values_NL1: Tensor  # [N, L+1], log1p units


class GPR(nn.Module):
    """The one model."""

    def __init__(self, config: GPRConfig) -> None:
        super().__init__()
        self.config = config
        self.codes = CodeEmbedding(config.num_levels, config.codebook_size, config.width)
        self.tokens = TokenEmbedding(config.embedding, config.width, config.num_user_features, config.num_env_features)
        self.hsd = HSD(config.width, config.hsd)
        self.ptd = PTD(config.width, config.num_mtp_heads, config.num_levels, config.ptd)
        self.hte = HTE(config.width, config.num_levels)

    def forward(self, batch: Batch, task: str = "train", **arguments: Any) -> Any:
        """task: train → GPROutput for the batch's targets; encode → Intents; decode → log-probabilities of the next code."""
        if task == "train":
            return self._train(batch)
        if task == "encode":
            return self._encode(batch)
        assert task == "decode", task
        return self._decode(**arguments)

    def _encode(self, batch: Batch) -> Intents:
        return Intents(self.hsd(self.tokens(batch, self.codes), batch), batch, self.config.ptd.intent_window)

    def _train(self, batch: Batch) -> GPROutput:
        code_NLD = self.codes(batch.target_codes_NL)
        state_NLD = self.ptd(self._encode(batch), batch.target_request_N, batch.target_head_N, code_NLD[:, :-1])
        return GPROutput(self.codes(state_NLD, task="logits"), self.hte(state_NLD, code_NLD))

    def _decode(self, intents: Intents, request_N: Tensor, head_N: Tensor, prefix_Nl: Tensor) -> Tensor:
        """Log-probabilities [N, V] of the code after each prefix; requests in any order."""
        state_NlD = self.ptd(intents, request_N, head_N, self.codes(prefix_Nl))
        return log_probs(self.codes(state_NlD, task="logits")[:, -1])
