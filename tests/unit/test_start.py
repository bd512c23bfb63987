"""Around a training job's loop: popularity is counted in shares, and not at all without validation."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from journeys_fixture import NUM_ITEMS, random_journeys, write_split

from gpr_dist import start
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.evaluation.baselines import BaselineConfig, weigh_counts
from gpr_dist.job import PretrainConfig
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.fit import fit_tokenizer
from gpr_dist.training.loop import Progress


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """`open_validation` of one rank on data in tmp_path; (rank, ranks, what the others counted) → what validates, counts made here."""
    embeddings = np.random.default_rng(0).normal(size=(NUM_ITEMS, 4)).astype(np.float32)
    semantic_ids = fit_tokenizer(embeddings, TokenizerConfig(codebook_size=8, device="cpu"), "c0ffee")
    eligibility = Eligibility([], np.arange(NUM_ITEMS, dtype=np.int32), NUM_ITEMS)
    config = PretrainConfig(data={"folder": tmp_path / "data"}, run={"folder": tmp_path / "runs", "name": "r"})
    count, shares = start.count_before, []

    def count_share(*arguments):
        shares.append(count(*arguments))
        return shares[-1]

    monkeypatch.setattr(start, "count_before", count_share)
    monkeypatch.setattr(start, "together", lambda action, only_if: action() if only_if else None)

    def call(rank, world_size=2, others=0.0):
        engine = SimpleNamespace(rank=rank, world_size=world_size, device="cpu", all_reduce=lambda counts: counts + others)
        shares.clear()
        job = start.Job(config, {}, semantic_ids, engine, eligibility, None, None, None, None)
        return start.open_validation(job, None), tuple(shares)

    return call


def write(folder: Path, *splits: str) -> None:
    for seed, split in enumerate(splits):
        write_split(folder / "data" / "shards" / split, random_journeys(60, seed))


def test_every_rank_counts_its_share_and_rank_0_writes_the_sum(opened, tmp_path):
    write(tmp_path, "train", "validation")
    path = tmp_path / "runs" / "r" / "popularity.npy"
    validate, (other,) = opened(rank=1)
    assert callable(validate) and not path.exists()
    validate, (mine,) = opened(rank=0, others=other)
    assert callable(validate) and 0 < mine.sum() < (mine + other).sum()
    _, (alone,) = opened(rank=0, world_size=1)
    np.testing.assert_array_equal(mine + other, alone)
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), weigh_counts(alone, BaselineConfig()))


@pytest.mark.parametrize("rows", [None, 0])
def test_without_a_validation_split_nobody_counts(opened, tmp_path, rows):
    write(tmp_path, "train")
    if rows is not None:
        write_split(tmp_path / "data" / "shards" / "validation", random_journeys(rows))
    assert opened(rank=0) == (None, ()) and not (tmp_path / "runs").exists()


def test_a_stopped_run_leaves_with_the_code_asked_for():
    config = PretrainConfig(run={"stopped_exit_code": 75}, train={"schedule": {"num_steps": 10, "warmup_steps": 0}})
    assert [start.exit_code(config, Progress(step=step)) for step in (0, 9, 10)] == [75, 75, 0]
    assert start.exit_code(PretrainConfig(), Progress(step=1)) == 0
