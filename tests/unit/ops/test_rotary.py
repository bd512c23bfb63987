"""Rotary positions: a rotation whose dot products depend on the distance only."""

import pytest
import torch

from gpr_dist.ops.rotary import rotary_angles, rotate

K = 8


def rotated(x, positions, dtype=torch.float32):
    return rotate(x.to(dtype).expand(len(positions), 1, K), *rotary_angles(torch.tensor(positions), K))


def test_dot_products_depend_on_the_distance_of_the_positions_only():
    torch.manual_seed(0)
    q, k = torch.randn(2, K)
    distances = []
    for distance in range(5):
        dots = [(rotated(q, [p + distance]) * rotated(k, [p])).sum() for p in (0, 1, 7, 300, 1500)]
        torch.testing.assert_close(torch.stack(dots), dots[0].expand(5), atol=2e-3, rtol=0)
        distances.append(float(dots[0]))
    assert len({round(d, 2) for d in distances}) == 5
    torch.testing.assert_close(rotated(q, [0])[0, 0], q)


def test_pairs_turn_as_complex_numbers():
    x = torch.randn(1, 1, K, dtype=torch.float64)
    position = 13
    angle = position * 10_000.0 ** (-torch.arange(0, K, 2, dtype=torch.float64) / K)
    turned = torch.complex(x[..., : K // 2], x[..., K // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(rotated(x, [position], torch.float64), torch.cat((turned.real, turned.imag), -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_precision_of_the_input_stays_and_late_positions_stay_distinct(dtype):
    x = torch.ones(K)
    out = rotated(x, [2000, 2001], dtype)
    assert out.dtype == dtype and (out[0] - out[1]).abs().max() > 0.1
