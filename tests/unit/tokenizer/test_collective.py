"""Laws of the exact sums and of the shares, on one process; several are tests/integration/test_tokenizer_processes.py's."""

import math

import pytest
import torch

from gpr_dist.errors import TokenizerError
from gpr_dist.tokenizer import collective
from gpr_dist.tokenizer.collective import ExactSum, exact_sum, map_blocks, share, together

CPU = torch.device("cpu")


def test_the_order_of_the_parts_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(500, 7, generator=generator) * 10.0 ** torch.randint(-6, 6, (500, 7), generator=generator)
    shuffled = parts[torch.randperm(500, generator=generator)]
    assert torch.equal(exact_sum(parts), exact_sum(shuffled))
    assert (parts.numpy().cumsum(0)[-1] != shuffled.numpy().cumsum(0)[-1]).any()  # a plain sum does change
    torch.testing.assert_close(exact_sum(parts), parts.double().sum(0), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-320, 1e-300, 1e-12, 1.0, 1e12, 1e300])
def test_sums_are_right_at_any_magnitude(scale):
    parts = torch.tensor([[1.0, -3.0], [2.0, 4.0], [0.5, 1.0]], dtype=torch.float64) * scale
    torch.testing.assert_close(exact_sum(parts), parts.sum(0), rtol=1e-12, atol=0.0 if scale > 1e-290 else 1e-300)


def test_a_hundred_million_rows_do_not_overflow():
    rows, largest = 10**8, 40.0
    running = ExactSum((1,), rows * largest, CPU)
    for _ in range(10):
        running.add(torch.tensor([rows / 10 * largest]))
    assert float(running.total()) == rows * largest
    single = ExactSum((1,), rows * largest, CPU)
    single.add(torch.tensor([1e-3]))
    assert float(single.total()) == pytest.approx(1e-3, rel=1e-5)


def test_rows_are_added_where_their_index_says():
    rows = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    index = torch.arange(100) % 7
    running = ExactSum((7, 3), float(rows.abs().sum()), CPU)
    running.add_rows(index, rows)
    torch.testing.assert_close(running.total(), torch.zeros(7, 3, dtype=torch.float64).index_add_(0, index, rows.double()))


def test_a_part_that_is_not_finite_makes_the_sum_nan():
    for bad in (math.nan, math.inf):
        assert exact_sum(torch.tensor([[1.0, 2.0], [bad, 1.0]])).isnan().all()


def test_nothing_sums_to_zero():
    assert exact_sum(torch.zeros(0, 3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("num_blocks", [0, 1, 5, 1000])
def test_shares_are_a_partition_in_rank_order(num_blocks, monkeypatch):
    monkeypatch.setattr(collective, "world_size", lambda: 7)
    shares = [share(num_blocks, rank) for rank in range(7)]
    assert [block for part in shares for block in part] == list(range(num_blocks))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("threads", [1, 3])
def test_blocks_come_in_order_and_a_failing_one_stops_the_rest(threads):
    def square(start: int) -> int:
        assert torch.get_num_threads() == 1
        if start == 50:
            raise TokenizerError("block 50")
        return start * start

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert list(map_blocks(square, range(10), CPU)) == [start * start for start in range(10)]
        with pytest.raises(TokenizerError, match="block 50"):
            list(map_blocks(square, range(100), CPU))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_errors_alone_stay_what_they_are():
    with pytest.raises(OSError, match="disk"), together():
        raise OSError("disk")
