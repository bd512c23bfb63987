"""External knowledge: m vectors per user, made offline from text by a frozen encoder, as extra keys and values of the PTD (GPR §3.2).

They stand before every decoded sequence of the user in the self-attention, so that they reach it whatever the intent window. A user
without text has one learned "absent" vector in each place.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from gpr_dist.config import Config
from gpr_dist.schema import Batch

# B rows  m vectors  E their width  D model width


class KnowledgeConfig(Config):
    """External knowledge; the widths are filled in from the data."""

    num_vectors: int = Field(0, ge=0)
    """knowledge vectors m per user; 0 = none (from the shards)"""
    width: int = Field(0, ge=0)
    """their width E (from the shards)"""


class Knowledge(nn.Module):
    """Projects the vectors to the model's width."""

    def __init__(self, width: int, config: KnowledgeConfig) -> None:
        super().__init__()
        self.project = nn.Linear(config.width, width)
        self.place_mD = nn.Parameter(torch.randn(config.num_vectors, width) * 0.02)
        self.absent_mD = nn.Parameter(torch.randn(config.num_vectors, width) * 0.02)

    def forward(self, batch: Batch) -> Tensor:
        """[B, m, D]; a user whose vectors are all zero has none."""
        known_B11 = (batch.knowledge_BmE != 0).any(-1, keepdim=True).any(1, keepdim=True)
        vectors_BmD = self.project(batch.knowledge_BmE.to(self.place_mD.dtype))
        return torch.where(known_B11, vectors_BmD, self.absent_mD) + self.place_mD
