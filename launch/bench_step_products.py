"""The bare matrix products of a part of the training step: recorded once while it runs, then run again alone.

What remains of a part when everything else costs nothing. A rate below that of a large product is then the shapes' doing, and the
distance between a part and its bare products is ours.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}  # and where their factors begin


class Layout(NamedTuple):
    """A factor without its numbers."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> "Layout":
        return cls(x.shape, x.stride(), x.dtype)


class Products(TorchDispatchMode):
    """While open, keeps the layouts of all products of two matrices, of the backward pass too; small batched ones are attention's.

    Without those that have a side of at most `ignored`: norms find their parameters by type by such products.
    """

    def __init__(self, ignored: int) -> None:
        super().__init__()
        self.ignored = ignored
        self.layouts: list[tuple[Layout, Layout]] = []

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        if func in _PRODUCTS:
            a, b = args[_PRODUCTS[func]:][:2]
            if min(*a.shape, b.shape[1]) > self.ignored:
                self.layouts.append((Layout.of(a), Layout.of(b)))
        return func(*args, **(kwargs or {}))


class Bare:
    """The products again, on random numbers: factors of the same layout are one tensor, results are new each time."""

    def __init__(self, layouts: list[tuple[Layout, Layout]], device: torch.device) -> None:
        made = {layout: torch.empty_strided(*layout[:2], dtype=layout.dtype, device=device).uniform_(-1, 1)
                for layout in {layout for pair in layouts for layout in pair}}
        self.pairs = [(made[a], made[b]) for a, b in layouts]
        self.flops = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in self.pairs)

    def __call__(self) -> dict[str, int]:
        for a, b in self.pairs:
            a @ b
        return {"flops": self.flops}
