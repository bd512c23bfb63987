"""HTE, the Hierarchical Token-wise Evaluator: expected value V_0 … V_L of a prefix of codes (GPR §3.3).

V_l = MLP_l([sg(h_l); Emb_1(z_1) + … + Emb_l(z_l)]), h_l being the decoder state from which z_l was chosen (V_0 sees the first state
alone). With Emb_l(z_l) only, V_3 explained less than V_1: a state that was trained to predict the next code forgets the value of the
earlier ones. Everything it reads is detached, so values never disturb the generator. Trained on log1p of the logged value. The critic
of the policy optimisation is a module of its own beside it: it learns other numbers, those of the simulation's rewards.
"""

import torch
from torch import Tensor, nn

# N targets or prefixes  L levels  D width


class HTE(nn.Module):
    """L+1 small MLPs."""

    def __init__(self, width: int, num_levels: int) -> None:
        super().__init__()
        self.root = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        self.levels = nn.ModuleList(nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 1)) for _ in range(num_levels))

    def forward(self, state_NLD: Tensor, code_NLD: Tensor, level: int | None = None) -> Tensor:
        """Returns: values [N, L+1] in log1p units of the logged value, float32.

        Args: level: if given, states are those of this level alone, [N, 1, D], codes are the embeddings of the levels up to it, and the
            result is V_{level+1} [N, 1].
        """
        state_NLD, prefix_NLD = state_NLD.detach(), code_NLD.detach().cumsum(1)
        if level is not None:
            return self._value(level, state_NLD[:, 0], prefix_NLD[:, -1])
        values = [self._value(number, state_NLD[:, number], prefix_NLD[:, number]) for number in range(len(self.levels))]
        return torch.cat([self.root(state_NLD[:, 0]).float(), *values], dim=1)

    def _value(self, level: int, state_ND: Tensor, prefix_ND: Tensor) -> Tensor:
        return self.levels[level](torch.cat((state_ND, prefix_ND), dim=-1)).float()


class Critic(HTE):
    """V(s), V(s, z_1), … V(s, z_1..L-1) for HEPO (GPR Eq. 10): [N, L] in units of the scaled reward; starts as 0 everywhere."""

    def __init__(self, width: int, num_levels: int) -> None:
        super().__init__(width, num_levels - 1)
        for part in (self.root, *self.levels):
            nn.init.zeros_(part[-1].weight)
            nn.init.zeros_(part[-1].bias)
