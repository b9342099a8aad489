"""Small runs that the callbacks are tried on: real method, real backbone, tiny pipeline."""

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.batches import PromptBatch
from datamodules.sampling import evaluation_loader
from lightning_modules.backbones.sd3 import SD3
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.diffusion_dpo import DiffusionDPO
from lightning_modules.rewards.base import Reward
from tests.pairs import RandomPairs

PROMPTS = ["a red circle", "a blue square", "two green rings"]


class Redness(Reward):
    """How much more red than green an image is."""

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return (images[:, 0] - images[:, 1]).mean(dim=(1, 2))


class Undefined(Reward):
    """NaN for one prompt, 0 for the others."""

    def __init__(self, prompt: str) -> None:
        super().__init__()
        self.prompt = prompt

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([float("nan") if prompt == self.prompt else 0.0 for prompt in prompts])


class Data(RandomPairs):
    """Random pairs to train on, and prompts with seeds 10, 11, ... for test and predict."""

    def __init__(self, prompts: list[str] = PROMPTS, seeds: list[int] | None = None, batch_size: int = 2) -> None:
        super().__init__(batch_size=batch_size)
        self.prompts = prompts
        self.seeds = seeds or [10 + i for i in range(len(prompts))]

    def prompt_loader(self) -> DataLoader:
        def collate(positions: list[int]) -> PromptBatch:
            return PromptBatch(
                prompts=[self.prompts[i] for i in positions], seeds=[self.seeds[i] for i in positions], index=positions
            )

        return evaluation_loader(self.trainer, range(len(self.prompts)), 2, 0, collate)

    def test_dataloader(self) -> DataLoader:
        return self.prompt_loader()

    def predict_dataloader(self) -> DataLoader:
        return self.prompt_loader()


def make_module(
    folder: Path,
    lora: bool | LoraConfig = True,
    lr: float = 1e-2,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    **settings: Any,
) -> DiffusionDPO:
    if isinstance(lora, bool):
        lora = LoraConfig(r=2, lora_alpha=4) if lora else None
    family = SDXL if (folder / "text_encoder_2").is_dir() else SD15
    family = SD3 if (folder / "transformer").is_dir() else family
    backbone = family(str(folder), lora=lora, num_inference_steps=2, **settings)
    return DiffusionDPO(backbone, beta=2000.0, optimizer=lambda p: optimizer(p, lr=lr))


def make_trainer(folder: Path, callbacks: list[pl.Callback], **settings: Any) -> pl.Trainer:
    options = {
        "accelerator": "cpu",
        "max_steps": 4,
        "log_every_n_steps": 1,
        "logger": CSVLogger(folder, name="run"),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(callbacks=callbacks, **(options | settings))


def logged(trainer: pl.Trainer, column: str) -> dict[int, float]:
    """Step -> value of one column of the run's metrics.csv."""
    with open(Path(trainer.log_dir) / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}
