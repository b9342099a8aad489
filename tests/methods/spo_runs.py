"""Stand-in judges and runs of SPO on tiny pipelines, shared by its tests.

`python -m tests.methods.spo_runs FILE.json` makes runs in processes of their own, on one or two ranks, killed or not.
"""

import csv
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

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
from lightning_modules.rewards.step_preference import StepPreference
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


class Dice(Reward):
    """Says nothing about the images: standard normal numbers, so that pairs are selected at random."""

    takes_timestep = True

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return torch.randn(len(images))

    def forward(self, images: torch.Tensor, prompts: list[str], t: torch.Tensor | None = None) -> torch.Tensor:
        return self.score(images, prompts)


class Contrary(StepPreference):
    """A step-aware preference model with its sign flipped."""

    def forward(self, images: torch.Tensor, prompts: list[str], t: torch.Tensor | None = None) -> torch.Tensor:
        return -super().forward(images, prompts, t)


class FollowTheWinner(SPO):
    """Goes on from the best candidate instead of a random one."""

    def score(self, *args: Any) -> torch.Tensor:
        self.last_scores = super().score(*args)
        return self.last_scores

    def choose(self, n: int) -> torch.Tensor:
        return self.last_scores.argmax(0)


class OnRankZero(Stripes):
    """Scores apart on the first rank, all alike on the others; on none of them if asked."""

    def __init__(self, nowhere: bool = False) -> None:
        super().__init__()
        self.nowhere = nowhere

    def forward(self, images: torch.Tensor, prompts: list[str], t: torch.Tensor | None = None) -> torch.Tensor:
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        return super().forward(images, prompts, t) * float(first and not self.nowhere)


class Kill(pl.Callback):
    """Kills the process without warning.

    Args:
        batch: After the Lightning batch of this number; 0 never.
        epoch: At the end of the epoch of this number; 0 never.
    """

    def __init__(self, batch: int = 0, epoch: int = 0) -> None:
        self.batch = batch
        self.epoch = epoch
        self.batches = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.batches += 1
        if self.batches == self.batch:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        if trainer.current_epoch + 1 == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)


class KeepPairs(pl.Callback):
    """Writes the pairs that each rank has been dealt in each round, and the prompts of all ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer, pl_module) -> None:
        begin_round = pl_module.begin_round

        def keeping(prompts):
            begin_round(prompts)
            name = f"pairs_{pl_module.rounds - 1}_{trainer.global_rank}.pt"
            torch.save({"pairs": pl_module.pairs, "prompts": pl_module.prompts, "mine": prompts}, self.folder / name)

        pl_module.begin_round = keeping


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
    """A small SPO of seed 11: 6 steps, pairs from the third on, 3 candidates, micro-batches of 3 pairs."""
    pl.seed_everything(11, verbose=False)
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
    trainer = {"max_epochs": 2, "precision": "32-true", "devices": 1} | trainer
    runner = pl.Trainer(
        accelerator="cpu",
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


def run_one(folder: str, pretrained: str, **settings) -> None:
    """One run on tiny SD 1.5; which judge and which death are told by name."""
    folder = Path(folder)
    judge = {"stripes": Stripes, "rank_zero": OnRankZero}[settings.pop("judge", "stripes")]
    kill = Kill(**settings.pop("kill", {}))
    options = settings.pop("options", {})
    if (lr := options.pop("sgd", None)) is not None:
        options["optimizer"] = lambda parameters: torch.optim.SGD(parameters, lr=lr)
    module = build(Path(pretrained), judge(**settings.pop("judge_options", {})), **options)
    if settings.get("devices", 1) > 1:
        settings["strategy"] = "ddp_fork"
    fit(module, folder, callbacks=[KeepPairs(folder), kill], **settings)


def main(runs: list[dict]) -> None:
    """Each run in a process of its own, forked from here, where nothing has been computed yet: no import twice."""
    exits = []
    for settings in runs:
        folder = Path(settings["folder"])
        folder.mkdir(parents=True)
        sys.stderr.flush()
        if (child := os.fork()) == 0:
            try:
                run_one(**settings)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        exits.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.stdout.write(json.dumps(exits))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
