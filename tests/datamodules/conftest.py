"""Keeps what `datasets` converts out of the user's cache."""

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    import datasets

    before, folder = datasets.config.HF_DATASETS_CACHE, tmp_path_factory.mktemp("datasets")
    datasets.config.HF_DATASETS_CACHE = folder
    datasets.disable_progress_bars()
    yield folder
    datasets.config.HF_DATASETS_CACHE = before
