"""Noise as a function of what it is for: the same request gets the same numbers in training, rollout and update, on any rank. Dropout."""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from gpr_dist.hashing import mix_tensor

# N keys

_TABLE_ROWS = 1 << 12  # of dropout's table; a megabyte at width 128


def hashed_uniform(key_N: Tensor, count: int, seed: int = 0) -> Tensor:
    """float32 [N, count] in (0, 1) from int64 keys, by the SplitMix64 finaliser."""
    counter = torch.arange(1, count + 1, device=key_N.device) * -7_046_029_254_386_353_131  # the golden ratio as 64 bits
    offset = (seed * 0x2545F4914F6CDD1 + 2**63) % 2**64 - 2**63  # as it would wrap around in an int64
    x = mix_tensor(key_N + offset)[:, None] + counter
    return ((mix_tensor(x) >> 40) & 0xFFFFFF).float() / 2.0**24 + 2.0**-25


def hashed_normal(key_N: Tensor, count: int, seed: int = 0) -> Tensor:
    """Standard normal float32 [N, count] from int64 keys (Box–Muller)."""
    uniform = hashed_uniform(key_N, 2 * count, seed)
    return (-2 * uniform[:, :count].log()).sqrt() * (2 * math.pi * uniform[:, count:]).cos()


def dropout(x: Tensor, p: float, training: bool, key_N: Tensor | None = None, salt: int = 0) -> Tensor:
    """Dropout whose mask is a function of each row's key, so that it is the same on any number of ranks and after a restart.

    Args:
        x: [..., D]. p: share dropped, rounded to 16 bits.
        key_N: int64 of the leading shape of x, e.g. `Batch.noise_T`; None = torch's generator. salt: tells uses of one key apart.
    The bits of a row are the exclusive or of two rows of a fixed random table, chosen by hash: 16 million masks for two gathers of 16
    bits an element, where drawing them costs several times as much.
    """
    drop = round(p * 65536)
    if not training or not drop:
        return x
    if key_N is not None:
        hashed = mix_tensor(key_N.reshape(-1) + (salt + 1) * 88_172_645_463_325)
        table = _random_bits(x.shape[-1], x.device)
        bits = table.index_select(0, hashed & (_TABLE_ROWS - 1)) ^ table.index_select(0, (hashed >> 32) & (_TABLE_ROWS - 1))
        bits = bits.view(x.shape)
    elif x.device.type == "cpu":  # one random number holds four: a third of F.dropout's time
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:x.numel()].view(x.shape)
    else:
        return F.dropout(x, p, training)
    return x * ((bits >= drop - 32768).to(x.dtype) * (65536 / (65536 - drop)))


@cache
def _random_bits(width: int, device: torch.device) -> Tensor:
    """int16 [rows, width], the same in every process."""
    generator = torch.Generator().manual_seed(width)
    return torch.randint(-32768, 32768, (_TABLE_ROWS, width), dtype=torch.int16, generator=generator).to(device)
