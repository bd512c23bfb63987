"""Rotary position embedding over packed rows (Su et al., 2104.09864)."""

from typing import Any

import torch
from torch import Tensor


def rotary_angles(position_T: Tensor, head_width: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's rotation, float32 [T, 1, head_width/2]; positions count from 0 in each row."""
    frequency = base ** (-torch.arange(0, head_width, 2, device=position_T.device, dtype=torch.float32) / head_width)
    angle = position_T.float()[:, None, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_THK: Tensor, cos_T1k: Tensor, sin_T1k: Tensor) -> Tensor:
    """Rotate queries or keys; dot products then depend on the distance of the two positions only."""
    return _Rotation.apply(x_THK, cos_T1k.to(x_THK.dtype), sin_T1k.to(x_THK.dtype))


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation back: a third of the passes over memory that its arithmetic would record."""

    @staticmethod
    def forward(ctx: Any, x_THK: Tensor, cos_T1k: Tensor, sin_T1k: Tensor) -> Tensor:
        ctx.save_for_backward(cos_T1k, sin_T1k)
        return _rotated(x_THK, cos_T1k, sin_T1k)

    @staticmethod
    def backward(ctx: Any, gradient_THK: Tensor) -> tuple[Tensor, None, None]:
        cos_T1k, sin_T1k = ctx.saved_tensors
        return _rotated(gradient_THK, cos_T1k, -sin_T1k), None, None


def _rotated(x_THK: Tensor, cos_T1k: Tensor, sin_T1k: Tensor) -> Tensor:
    first, second = x_THK.chunk(2, dim=-1)
    out_THK = torch.empty(x_THK.shape, dtype=x_THK.dtype, device=x_THK.device)
    out_first, out_second = out_THK.chunk(2, dim=-1)
    torch.mul(first, cos_T1k, out=out_first).addcmul_(second, sin_T1k, value=-1)
    torch.mul(second, cos_T1k, out=out_second).addcmul_(first, sin_T1k)
    return out_THK
