"""Caches of small data sets, and training from them, in this process."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig
from torch import Tensor

from datamodules.pickapic import PickAPicDataModule
from lightning_modules.backbones.base import Backbone
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.base import AlignmentModule
from lightning_modules.cli.caching import CachingTrainer
from lightning_modules.diffusion_dpo import DiffusionDPO

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def pairs(source: Path | str, **settings: Any) -> PickAPicDataModule:
    return PickAPicDataModule(str(source), **{"resolution": 16, "batch_size": 2, **settings})


def dpo(pretrained: Path, family: type[Backbone] = SD15, **settings: Any) -> DiffusionDPO:
    adapters = LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian")
    return DiffusionDPO(
        family(str(pretrained), lora=adapters, num_inference_steps=2, **settings),
        beta=100.0,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        prompt_dropout=0.3,
        validation_draws=2,
    )


def fill(folder: Path, model: AlignmentModule, data: PickAPicDataModule, trainer: Any = (), **options: Any) -> Path:
    """Fill a cache as `main.py cache` does."""
    options = {"dtype": "float32", "rows_per_shard": 4} | options
    CachingTrainer(**QUIET | dict(trainer)).cache(model, data, str(folder), **options)
    return folder


@dataclass
class Run(pl.Callback):
    """What a run trained on, and what came out."""

    losses: list[float] = field(default_factory=list)
    batches: list[dict] = field(default_factory=list)
    validation: dict[str, float] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.losses.append(outputs["loss"].item())
        self.batches.append(batch)

    def on_fit_end(self, trainer, pl_module) -> None:
        self.validation = {name: value.item() for name, value in trainer.callback_metrics.items() if "val/" in name}
        self.weights = {name: p.detach().clone() for name, p in pl_module.trained_parameters().items()}


def train(model: AlignmentModule, data: PickAPicDataModule, checkpoint: Path | None = None, **settings: Any) -> Run:
    """A run of four steps and, where the data have a validation split, a validation after it."""
    run = Run()
    options = {"max_steps": 4, "num_sanity_val_steps": 0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    callbacks = [run, *settings.pop("callbacks", [])]
    trainer = pl.Trainer(**QUIET | options | settings, callbacks=callbacks)
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return run
