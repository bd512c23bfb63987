"""Rotary position embedding over packed rows (Su et al., 2104.09864)."""

import torch
from torch import Tensor


def rotary_angles(position_T: Tensor, head_width: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's rotation, float32 [T, 1, head_width/2]; positions count from 0 in each row."""
    frequency = base ** (-torch.arange(0, head_width, 2, device=position_T.device, dtype=torch.float32) / head_width)
    angle = position_T.float()[:, None, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_THK: Tensor, cos_T1k: Tensor, sin_T1k: Tensor) -> Tensor:
    """Rotate queries or keys; dot products then depend on the distance of the two positions only."""
    first, second = x_THK.chunk(2, dim=-1)
    cos, sin = cos_T1k.to(x_THK.dtype), sin_T1k.to(x_THK.dtype)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
