"""What the integration tests share: one tiny data set, built once by the real pipeline."""

from pathlib import Path

import pytest

from pretrain_runs import build_tiny_data


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with logs/, build.yaml, tokenizer.yaml and data/ (shards and tokenizer)."""
    folder = tmp_path_factory.mktemp("tiny")
    build_tiny_data(folder)
    return folder
