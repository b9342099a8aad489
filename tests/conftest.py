"""Shared fixtures: one tiny pipeline of each family, saved once per session as users have theirs on disk."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

from tests.tiny import save_sd3, save_sd15, save_sdxl, save_sit


@pytest.fixture(autouse=True)
def _no_seed_of_an_earlier_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """`seed_everything` leaves its seed in the environment; every test starts without one."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Stable Diffusion 1.5 pipeline."""
    return save_sd15(tmp_path_factory.mktemp("sd15"))


@pytest.fixture(scope="session")
def sd21(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random pipeline with v-prediction, like Stable Diffusion 2.1."""
    return save_sd15(tmp_path_factory.mktemp("sd21"), prediction_type="v_prediction")


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Stable Diffusion XL pipeline."""
    return save_sdxl(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="session")
def sdxl_turbo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random pipeline with the scheduler of SDXL-Turbo."""
    return save_sdxl(tmp_path_factory.mktemp("sdxl_turbo"), turbo=True)


@pytest.fixture(scope="session")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Stable Diffusion 3.5 (medium) pipeline."""
    return save_sd3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="session")
def sit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random SiT of 10 classes, `sit.pt`, and its VAE, `vae/`."""
    return save_sit(tmp_path_factory.mktemp("sit"), image_size=32)
