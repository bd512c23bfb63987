"""A job that was given credentials by its environment and its command line leaves them nowhere: its folder, its output, W&B's files."""

import re

from pretrain_runs import SECRETS

from gpr_dist.config import load_config
from gpr_dist.job import PretrainConfig, stored_config
from gpr_dist.training import checkpoint

PARTS = ("AKIAIOSFODNN7EXAMPLE", "not/escaped/secret", "escaped/secret", "FwoGZXIvYXdz")


def files_with(folder, words):
    return sorted(f"{path.relative_to(folder)}: {word}" for path in folder.rglob("*") if path.is_file() for word in words
                  if word.encode() in path.read_bytes())


def test_no_file_and_no_output_of_a_job_holds_a_secret(python_run):
    job, run = python_run
    secrets = (*SECRETS.values(), *PARTS)
    assert files_with(run.parents[1], secrets) == []  # data, run folder with checkpoints and W&B's files, stdout and stderr
    assert not [secret for secret in secrets if secret in job.stdout + job.stderr]
    assert re.findall(rb"pretrain\.py|cache_dir", b"".join(path.read_bytes() for path in run.rglob("*.wandb")))  # W&B was told


def test_what_is_left_of_the_config_can_be_used(python_run):
    _, run = python_run
    stored = "s3://bucket/cache?region=eu"
    assert load_config(PretrainConfig, run / "config.yaml").data.loader.cache_dir == stored
    assert stored_config(run)["data"]["loader"]["cache_dir"] == stored
    newest = checkpoint.find_checkpoint(run)
    assert checkpoint.read_state(newest)["config"]["data"]["loader"]["cache_dir"] == stored
