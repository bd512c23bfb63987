"""Losses of ten optimizer steps of a tiny model, kept in a file: a refactor must reproduce them.

After a change that is meant to change the numbers:  python tests/golden/test_golden_losses.py --rewrite
"""

import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]  # for --rewrite; pytest has set them already

from random_batches import random_batch  # noqa: E402
from tiny_model import loss_share  # noqa: E402

from gpr_dist.model.gpr import GPR, GPRConfig  # noqa: E402

FILE = Path(__file__).parent / "step_losses_cpu.txt"
NUM_STEPS, MICRO_BATCHES = 10, 2


def step_losses() -> list[float]:
    """Plain PyTorch, float32, one thread; SGD with momentum, because Adam's first steps turn rounding noise into whole updates."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPR(GPRConfig(width=32, codebook_size=16, num_user_features=2, num_env_features=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for step in range(NUM_STEPS):
        batches = [random_batch(step % 2 * MICRO_BATCHES + i, num_rows=4) for i in range(MICRO_BATCHES)]
        num_targets = sum(batch.num_targets for batch in batches)
        optimizer.zero_grad()
        shares = [loss_share(model, batch, num_targets) for batch in batches]
        sum(shares).backward()
        optimizer.step()
        losses.append(sum(float(share.detach()) for share in shares))
    torch.set_num_threads(threads)
    return losses


def test_ten_steps_reproduce_the_file():
    expected = [float(line) for line in FILE.read_text().split()]
    assert len(expected) == NUM_STEPS and expected[-1] < expected[0] - 0.1
    assert step_losses() == pytest.approx(expected, rel=1e-6)  # SIMD widths differ by 2e-7


if __name__ == "__main__":
    assert sys.argv[1:] == ["--rewrite"], f"usage: python {sys.argv[0]} --rewrite"
    FILE.write_text("".join(f"{loss:.9f}\n" for loss in step_losses()))
    print(FILE.read_text(), end="")
