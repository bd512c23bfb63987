"""Noise as a function of what it is for: the same request gets the same numbers in training, rollout and update, on any rank. Dropout."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# N keys


def hashed_uniform(key_N: Tensor, count: int, seed: int = 0) -> Tensor:
    """float32 [N, count] in (0, 1) from int64 keys, by the SplitMix64 finaliser."""
    counter = torch.arange(1, count + 1, device=key_N.device) * -7_046_029_254_386_353_131  # the golden ratio as 64 bits
    offset = (seed * 0x2545F4914F6CDD1 + 2**63) % 2**64 - 2**63  # as it would wrap around in an int64
    x = _mix(key_N + offset)[:, None] + counter
    return ((_mix(x) >> 40) & 0xFFFFFF).float() / 2.0**24 + 2.0**-25


def hashed_normal(key_N: Tensor, count: int, seed: int = 0) -> Tensor:
    """Standard normal float32 [N, count] from int64 keys (Box–Muller)."""
    uniform = hashed_uniform(key_N, 2 * count, seed)
    return (-2 * uniform[:, :count].log()).sqrt() * (2 * math.pi * uniform[:, count:]).cos()


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout; on a CPU with a probability rounded to 16 bits, of which one random number holds four: a third of the time."""
    drop = round(p * 65536)
    if x.device.type != "cpu" or not training or not drop:
        return F.dropout(x, p, training)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:x.numel()].view(x.shape)
    return x * ((bits >= drop - 32768).to(x.dtype) * (65536 / (65536 - drop)))


def _mix(x: Tensor) -> Tensor:
    """Products wrap around; `>>` keeps the sign, so it is masked away."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4_658_895_280_553_007_687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7_723_592_293_110_705_685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
