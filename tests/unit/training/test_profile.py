"""A window of steps is recorded where it was asked for, and nothing anywhere else."""

import gzip
import json

import pytest
import torch

from gpr_dist.training.profile import ProfileConfig, profiled


def train(config, run, steps=8, rank=0, done=0):
    with profiled(config, run, rank, done) as step_profiled:
        for _ in range(done, steps):
            torch.randn(64, 64) @ torch.randn(64, 64)
            step_profiled()


def test_the_window_is_recorded_with_its_operators(tmp_path):
    train(ProfileConfig(start_step=5, num_steps=2, ranks=(3,)), tmp_path, rank=3, done=2)
    trace, table = sorted((tmp_path / "profile").iterdir())
    assert (trace.name, table.name) == ("steps-000005-000006-rank-00003.json.gz", "steps-000005-000006-rank-00003.txt")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep#")}
    assert len(steps) == 2 and sum(event.get("name") == "aten::mm" for event in events) == 2
    text = table.read_text()
    assert "aten::mm" in text and "by time of their own" in text and "by memory of their own" in text


@pytest.mark.parametrize(("config", "rank", "done"), [(ProfileConfig(), 0, 0), (ProfileConfig(start_step=5), 1, 0),
                                                      (ProfileConfig(start_step=5), 0, 5), (ProfileConfig(start_step=20), 0, 0)])
def test_off_on_other_ranks_after_a_resume_behind_it_or_beyond_the_end_nothing_is_written(tmp_path, config, rank, done):
    train(config, tmp_path, rank=rank, done=done)
    assert not (tmp_path / "profile").exists()
