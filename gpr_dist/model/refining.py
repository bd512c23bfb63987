"""The refining token of the PTD: a small diffusion model of the ad to come, conditioned on the thinking tokens (GPR §3.2, Fig. 2c).

One transformer block predicts x₀ = LN(Σ_l Emb_l(z_l*)) from (x_t, C, t). Training noises the target's x₀ for the loss alone; what the
decoder reads always comes from pure noise and C, in training too, so that the target cannot leak. Noise is a function of the request.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpr_dist.ops.noise import hashed_normal, hashed_uniform

# Q sequences  D width

_OFFSET = 0.008  # of the cosine schedule (Nichol & Dhariwal, 2102.09672): keeps the first steps from being too small


def signal(t_Q: Tensor) -> Tensor:
    """Share of x₀ in the variance at time t in [0, 1]: 1 at 0, about 0 at 1 (cosine schedule); never quite 0, since we divide by it."""
    return ((t_Q + _OFFSET) / (1 + _OFFSET) * math.pi / 2).cos().square().clamp(1e-4, 1 - 1e-4)


def clean(embedding_QD: Tensor) -> Tensor:
    """x₀ of an ad: its summed code embeddings, normalised and detached, so that the tables are not pulled towards what is easy."""
    return F.layer_norm(embedding_QD.detach(), embedding_QD.shape[-1:])


class Refiner(nn.Module):
    """Denoiser and its DDIM sampler."""

    def __init__(self, width: int, ffn_multiple: float, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.time = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        inner = max(width, int(ffn_multiple * width))
        self.ffn = nn.Sequential(nn.Linear(width, inner), nn.SiLU(), nn.Linear(inner, width))
        self.out = nn.Linear(width, width)

    def forward(self, condition_QD: Tensor, key_Q: Tensor, target_QD: Tensor | None = None) -> Tensor:
        """Without a target: the refining tokens [Q, D], sampled and detached. With one: the diffusion loss [Q] at a time of their own.

        Args: key_Q: int64, what the noise is a function of. target_QD: from `clean`.
        """
        if target_QD is None:
            with torch.no_grad():
                return self._sample(condition_QD.detach(), key_Q)
        noise_QD = hashed_normal(key_Q, target_QD.shape[1], seed=1).to(target_QD.dtype)
        t_Q = hashed_uniform(key_Q, 1, seed=2)[:, 0]
        keep_Q1 = signal(t_Q)[:, None].to(target_QD.dtype)
        noised_QD = keep_Q1.sqrt() * target_QD + (1 - keep_Q1).sqrt() * noise_QD
        return (self._denoise(noised_QD, condition_QD, t_Q) - target_QD).square().mean(-1).float()

    def _sample(self, condition_QD: Tensor, key_Q: Tensor) -> Tensor:
        """DDIM (2010.02502) from pure noise in `num_steps` steps: deterministic given the noise."""
        x_QD = hashed_normal(key_Q, condition_QD.shape[1]).to(condition_QD.dtype)
        clean_QD = x_QD
        for step in range(self.num_steps, 0, -1):
            t_Q = torch.full_like(key_Q, step / self.num_steps, dtype=torch.float32)
            clean_QD = self._denoise(x_QD, condition_QD, t_Q)
            now, then = (signal(time)[:, None].to(x_QD.dtype) for time in (t_Q, t_Q - 1 / self.num_steps))
            noise_QD = (x_QD - now.sqrt() * clean_QD) / (1 - now).sqrt()
            x_QD = then.sqrt() * clean_QD + (1 - then).sqrt() * noise_QD
        return clean_QD

    def _denoise(self, x_QD: Tensor, condition_QD: Tensor, t_Q: Tensor) -> Tensor:
        """x₀ as far as (x_t, C, t) tell: a transformer block over the two tokens C and x_t, read at x_t."""
        time_QD = self.time(torch.stack((t_Q, signal(t_Q).sqrt()), 1).to(x_QD.dtype))
        tokens_Q2D = torch.stack((condition_QD, x_QD + time_QD), 1)
        q, k, v = self.qkv(self.norms[0](tokens_Q2D)).chunk(3, dim=-1)
        weights = (q[:, 1:] @ k.transpose(1, 2) * q.shape[-1] ** -0.5).float().softmax(-1).to(v.dtype)
        h_QD = tokens_Q2D[:, 1] + self.attention_out(weights @ v)[:, 0]
        h_QD = h_QD + self.ffn(self.norms[1](h_QD))
        return self.out(self.norms[2](h_QD))
