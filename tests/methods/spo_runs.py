"""Stand-in judges and runs of SPO on tiny pipelines, shared by its tests."""

import csv
import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig

from datamodules.prompt_stream import PromptStream
from datamodules.prompts import PromptList
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.cli.run_folder import SaveMetrics
from lightning_modules.rewards.base import Reward
from lightning_modules.spo import SPO


class Stripes(Reward):
    """Likes some columns of the image, in another way at every timestep; deterministic, and hard to please twice.

    Args:
        strength: Of the scores.
        kill_at: Number of the call at which the process dies; 0 never.
    """

    takes_timestep = True

    def __init__(self, strength: float = 20_000.0, kill_at: int = 0) -> None:
        super().__init__()
        self.strength = strength
        self.kill_at = kill_at
        self.calls: list[tuple[list[str], list[float]]] = []

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        raise AssertionError("asked without a timestep")

    def forward(self, images: torch.Tensor, prompts: list[str], t: torch.Tensor | None = None) -> torch.Tensor:
        assert len(images) == len(prompts) == len(t)
        self.calls.append((prompts, t.tolist()))
        if len(self.calls) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        column = torch.arange(images.shape[-1], device=images.device)
        liked = torch.cos(column[None] * (1 + t[:, None].float() / 300))
        return self.strength * (images.float().mean((1, 2)) * liked).mean(1)


class Plain(Reward):
    """Brightness of a finished image, times a factor."""

    def __init__(self, factor: float = 1000.0) -> None:
        super().__init__()
        self.factor = factor
        self.seen: list[tuple[float, float]] = []

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        self.seen.append((images.min().item(), images.max().item()))
        return self.factor * images.mean((1, 2, 3))


class OnRankZero(Stripes):
    """Scores apart on the first rank, all alike on the others; on none of them if asked."""

    def __init__(self, nowhere: bool = False) -> None:
        super().__init__()
        self.nowhere = nowhere

    def forward(self, images: torch.Tensor, prompts: list[str], t: torch.Tensor | None = None) -> torch.Tensor:
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        return super().forward(images, prompts, t) * float(first and not self.nowhere)


class Spy(pl.Callback):
    """What every Lightning batch did: visit, optimizer steps before and after, pairs left."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, int, int]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.before = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.rows.append((batch["visit"], self.before, trainer.global_step, pl_module.pairs_left))


def write_prompts(folder: Path, number: int = 7) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "prompts.txt"
    file.write_text("\n".join(f"picture {i}" for i in range(number)) + "\n")
    return file


def build(pretrained: Path, judge: Reward | None = None, lora: bool = True, family=SD15, lr=1e-3, **settings) -> SPO:
    """A small SPO: 6 steps, pairs from the third on, 3 candidates, micro-batches of 3 pairs."""
    adapters = LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian") if lora else None
    settings = {
        "num_steps": 6,
        "first_step": 2,
        "candidates": 3,
        "threshold": 0.3,
        "train_batch_size": 3,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=lr),
    } | settings
    return SPO(family(str(pretrained), lora=adapters), judge or Stripes(), **settings)


def fit(module: SPO, folder: Path, ckpt_path: Path | None = None, callbacks=(), batch_size=2, prompts=7, **trainer):
    """Fit on numbered prompts with a checkpoint after every optimizer step."""
    pl.seed_everything(11, verbose=False)
    trainer = {"max_epochs": 2, "precision": "32-true"} | trainer
    runner = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(folder, name="", version="log", flush_logs_every_n_steps=1),
        callbacks=[
            ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}"),
            SaveMetrics(),
            *callbacks,
        ],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **trainer,
    )
    data = PromptStream(PromptList(str(write_prompts(folder, prompts))), batch_size)
    runner.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return runner


def rows(folder: Path) -> list[dict[str, str]]:
    """The lines of metrics.csv without empty cells, and without repeated ones."""
    with open(folder / "log" / "metrics.csv", newline="") as file:
        lines = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    lines = [line for line in lines if line.keys() - {"epoch", "step"}]
    return [line for number, line in enumerate(lines) if number == 0 or line != lines[number - 1]]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]
