"""Around a training job's loop: who counts popularity, and when nobody does."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from journeys_fixture import NUM_ITEMS, random_journeys, write_split

from gpr_dist import start
from gpr_dist.data.eligibility import Eligibility
from gpr_dist.job import PretrainConfig
from gpr_dist.tokenizer.config import TokenizerConfig
from gpr_dist.tokenizer.fit import fit_tokenizer
from gpr_dist.training.loop import Progress


@pytest.fixture
def opened(tmp_path, monkeypatch):
    """`open_validation` of one rank on data in tmp_path; (call, log of what was done)."""
    embeddings = np.random.default_rng(0).normal(size=(NUM_ITEMS, 4)).astype(np.float32)
    semantic_ids = fit_tokenizer(embeddings, TokenizerConfig(codebook_size=8, device="cpu"), "c0ffee")
    eligibility = Eligibility([], np.arange(NUM_ITEMS, dtype=np.int32), NUM_ITEMS)
    config = PretrainConfig(data={"folder": tmp_path / "data"}, run={"folder": tmp_path / "runs", "name": "r"})
    count, done = start.save_popularity, []
    monkeypatch.setattr(start, "save_popularity", lambda *arguments: (done.append("counted"), count(*arguments)))

    def together(action, only_if):
        done.append("waited")
        if only_if:
            action()

    monkeypatch.setattr(start, "together", together)

    def call(rank):
        engine = SimpleNamespace(rank=rank, world_size=2, device="cpu", all_reduce=None)
        done.clear()
        job = start.Job(config, {}, semantic_ids, engine, eligibility, None, None, None, None)
        return start.open_validation(job, None), tuple(done)

    return call


def write(folder: Path, *splits: str) -> None:
    for seed, split in enumerate(splits):
        write_split(folder / "data" / "shards" / split, random_journeys(60, seed))


def test_rank_0_counts_and_the_others_read(opened, tmp_path):
    write(tmp_path, "train", "validation")
    validate, done = opened(rank=0)
    assert callable(validate) and done == ("waited", "counted")
    (tmp_path / "data" / "shards" / "train" / "manifest.json").unlink()  # another rank needs none of the training journeys
    validate, done = opened(rank=1)
    assert callable(validate) and done == ("waited",)
    assert np.load(tmp_path / "runs" / "r" / "popularity.npy", allow_pickle=False).shape == (NUM_ITEMS,)


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
