"""Scores of small data sets, in this process."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.pickapic import PickAPicDataModule
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.cli.caching import CachingTrainer
from lightning_modules.diffusion_sft import DiffusionSFT
from lightning_modules.rewards.base import Reward
from tests.datamodules.caches import QUIET


class Redness(Reward):
    """How red an image is, times a weight; remembers what it was shown."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight
        self._seen: list[tuple[tuple[int, ...], str]] = []

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        self._seen += [(tuple(images.shape[1:]), prompt) for prompt in prompts]
        return self.weight * images[:, 0].mean(dim=(1, 2))


class Learned(Reward):
    """One weight for each colour."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def load(self, device: torch.device | None = None) -> None:
        if not hasattr(self, "linear"):
            self.linear = torch.nn.Linear(3, 1, bias=False)
            torch.nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(self.seed))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.linear(images.mean(dim=(2, 3)))[:, 0]


class Constant(Reward):
    """The same answer for every image."""

    def __init__(self, score: float) -> None:
        super().__init__()
        self.constant = score

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.full((len(images),), self.constant)


def score(
    folder: Path, sd15: Path, data: PickAPicDataModule, rewards: dict[str, Reward] | None = None, **options: Any
) -> Path:
    """Score pairs as `main.py cache --encode false` does; the folder of the first reward's scores."""
    rewards = rewards or {"red": Redness()}
    options = {"rows_per_shard": 2, "encode": False} | options
    CachingTrainer(**QUIET).cache(DiffusionSFT(SD15(str(sd15))), data, str(folder), rewards=rewards, **options)
    return folder / "scores" / next(iter(rewards))
