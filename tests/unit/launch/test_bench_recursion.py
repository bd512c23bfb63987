"""Recursion benchmark: the router sends exactly the share asked for, and every share is timed."""

import torch
from documents import launch_module

from gpr_dist.model.hsd import HSD, HSDConfig

HSD_CONFIG = HSDConfig(num_layers=3, num_heads=2, recursions=3)


def test_the_share_asked_for_passes_again(monkeypatch):
    bench = launch_module("bench_recursion")
    batch = bench.generate_batch(bench.GPRConfig(width=16), 3, 40, 2, 2, 0.3, 0)
    encoder, passed = HSD(16, HSD_CONFIG), []
    run = HSD._run
    monkeypatch.setattr(HSD, "_run", lambda self, layers, x, rows: (passed.append(len(x)), run(self, layers, x, rows))[1])
    for share in (0.0, 0.25, 1.0):
        passed.clear()
        assert bench.timed(encoder, torch.randn(batch.num_tokens, 16), batch, share, iter(range(2)).__next__) == 1
        total, again = batch.num_tokens, int(batch.num_tokens * share)
        assert passed == [total, total, again, again, total]


def test_every_share_is_reported(capsys):
    bench = launch_module("bench_recursion")
    found = bench.run_bench(bench.RecursionBenchConfig(width=16, hsd=HSD_CONFIG, rows=2, tokens=30, shares=(0.0, 1.0), repetitions=1))
    assert list(found) == ["without recursion", "0% again", "100% again"] and all(seconds > 0 for seconds in found.values())
    assert "1.00 x" in capsys.readouterr().out
