"""What the integration tests share: one tiny data set, built once by the real pipeline, and two uninterrupted runs on it."""

from pathlib import Path

import pytest
from pretrain_runs import NUM_STEPS, SECRET_URI, SECRETS, Pretraining, build_tiny_data, run_pretraining, write_configs


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with logs/, build.yaml, tokenizer.yaml and data/ (shards and tokenizer)."""
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_data(folder)
    return folder


@pytest.fixture(scope="session")
def python_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pretraining, Path]:
    """`python launch/pretrain.py` on data that does not exist yet, W&B offline. (finished job, run folder)."""
    folder = tmp_path_factory.mktemp("python")
    write_configs(folder, logs=tiny / "logs")
    overrides = [f"data.folder={folder}/data", f"data.build={folder}/build.yaml", f"data.fit_tokenizer={folder}/tokenizer.yaml",
                 f"run.folder={folder}/runs", "run.name=whole", "train.checkpoint.every_steps=1", f"train.checkpoint.keep_last={NUM_STEPS}",
                 f"data.loader.cache_dir={SECRET_URI}"]
    job = run_pretraining(folder / "job", overrides, launcher="python", wandb="offline", environment=SECRETS)
    return job, folder / "runs" / "whole"


@pytest.fixture(scope="session")
def torchrun_run(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pretraining, Path]:
    """`torchrun --nproc-per-node 2 launch/pretrain.py` to its end. (finished job, run folder)."""
    folder = tmp_path_factory.mktemp("torchrun")
    job = run_pretraining(folder / "job", [f"data.folder={tiny}/data", f"run.folder={folder}/runs", "run.name=whole"])
    return job, folder / "runs" / "whole"
