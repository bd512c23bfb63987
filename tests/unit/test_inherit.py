"""What a later stage takes over from the run it starts from."""

import json
from pathlib import Path

import pytest

from gpr_dist.config import load_config
from gpr_dist.errors import CheckpointError
from gpr_dist.job import FinetuneConfig, PretrainConfig, inherit
from gpr_dist.training.checkpoint import FORMAT_VERSION, step_folder


def write_step(run: Path, step: int, config: PretrainConfig) -> Path:
    """The part of a checkpoint that says what it was trained with."""
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"format_version": FORMAT_VERSION, "config": config.model_dump(mode="json")}))
    return folder


@pytest.fixture
def pretrained(tmp_path):
    trained = load_config(PretrainConfig, None, [
        "model.width=48", "model.hsd.num_layers=3", "model.critic=true", "head_weights=[1, 0, 0, 0]", "engine.precision=bf16",
        "train.schedule.lr=0.5", "data.folder=d", "data.tokenizer=d/tokenizer-2", "data.shards=s3://d/train", "data.history=h",
        "data.softmax=legal", "data.history_events=7", "data.loader.global_batch_size=24", "item_loss_weight=3", "validation.max_rows=5"])
    write_step(tmp_path / "pre", 100, trained)
    return trained


def finetune(tmp_path, *overrides, **options):
    common = [f"init_from={tmp_path}/pre", f"run.folder={tmp_path}", "run.name=tuned"]
    return inherit(load_config(FinetuneConfig, None, [*common, *overrides]), **options)


def test_what_is_left_open_comes_from_the_source(pretrained, tmp_path):
    tuned = finetune(tmp_path)
    for part in ("data", "engine", "head_weights", "item_loss_weight", "value_loss_weight", "validation"):
        assert getattr(tuned, part) == getattr(pretrained, part), part
    assert tuned.model == pretrained.model.model_copy(update={"critic": False})  # the critic of HEPO is never taken over
    assert tuned.train == FinetuneConfig().train and tuned.run.name == "tuned"  # these are the new run's own


def test_what_is_said_wins_setting_by_setting(pretrained, tmp_path):
    tuned = finetune(tmp_path, "model.hsd.dropout=0.1", "data.loader.global_batch_size=8", "engine.zero_stage=1",
                     "validation.max_rows=null")
    assert tuned.model.hsd.dropout == 0.1 and tuned.model.hsd.num_layers == 3 and tuned.model.width == 48
    assert tuned.data.loader.global_batch_size == 8 and tuned.data.softmax == "legal" and tuned.data.shards == pretrained.data.shards
    assert tuned.engine.zero_stage == 1 and tuned.engine.precision == "bf16" and tuned.validation.max_rows is None


def test_another_data_folder_keeps_only_what_is_true_of_any(pretrained, tmp_path):
    tuned = finetune(tmp_path, "data.folder=other")
    assert (tuned.data.shards, tuned.data.tokenizer, tuned.data.history) == (None, None, None)
    assert (tuned.data.softmax, tuned.data.history_events, tuned.data.loader) == ("legal", 7, pretrained.data.loader)
    assert finetune(tmp_path, "data.folder=d").data == pretrained.data


def test_a_run_that_was_begun_goes_on_as_it_was(pretrained, tmp_path):
    """Whatever became of its source, and with a newest checkpoint that cannot be read."""
    own = load_config(FinetuneConfig, None, ["model.width=32", "model.critic=true"])
    write_step(tmp_path / "tuned", 7, own)
    (write_step(tmp_path / "tuned", 8, own) / "state.json").write_text("{")
    for source in ("pre", "gone"):
        assert finetune(tmp_path, f"init_from={tmp_path}/{source}").model == own.model


def test_without_a_source(tmp_path):
    with pytest.raises(CheckpointError, match=r"init_from .*/pre: no complete checkpoint and no bundle there"):
        finetune(tmp_path)
    assert finetune(tmp_path, missing_ok=True).model == FinetuneConfig().model
