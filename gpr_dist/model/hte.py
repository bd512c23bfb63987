"""HTE, the Hierarchical Token-wise Evaluator: expected value V_0 … V_L of a prefix of codes (GPR §3.3).

V_l = MLP_l([sg(h_l); Emb_1(z_1) + … + Emb_l(z_l)]), h_l being the decoder state from which z_l was chosen (V_0 sees the first state
alone). With Emb_l(z_l) only, V_3 explained less than V_1: a state that was trained to predict the next code forgets the value of the
earlier ones. Everything it reads is detached, so values never disturb the generator. Trained on log1p of the logged value.
"""

import torch
from torch import Tensor, nn

# N targets or prefixes  L levels  l of them  D width


class HTE(nn.Module):
    """L+1 small MLPs."""

    def __init__(self, width: int, num_levels: int) -> None:
        super().__init__()
        self.root = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
        self.levels = nn.ModuleList(nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, 1)) for _ in range(num_levels))

    def forward(self, state_NLD: Tensor, code_NLD: Tensor, level: int | None = None) -> Tensor:
        """Returns: values [N, L+1] in log1p units of the logged value, float32.

        Args: level: if given, states and codes are those of this level alone, [N, 1, D], and so is the result: V_{level+1} [N, 1].
        """
        state_NLD, code_NLD = state_NLD.detach(), code_NLD.detach()
        if level is not None:
            return self.levels[level](torch.cat((state_NLD[:, 0], code_NLD[:, 0]), dim=-1)).float()
        values = [self.root(state_NLD[:, 0])]
        for number, mlp in enumerate(self.levels):
            values.append(mlp(torch.cat((state_NLD[:, number], code_NLD[:, number]), dim=-1)))
        return torch.cat(values, dim=1).float()
