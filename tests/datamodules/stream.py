"""A tiny training run that remembers which rows it saw, for the tests of the sample order."""

import contextlib
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.sampling import ResumableDataModule, evaluation_loader


class Echo(Dataset):
    """Gives back what it was asked for."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, key: Any) -> Any:
        return key


class EchoData(ResumableDataModule):
    def __init__(self, num_rows: int = 10, batch_size: int = 2, num_workers: int = 0, num_val: int = 3) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.num_val = num_val

    def train_dataloader(self) -> DataLoader:
        return self.stream_loader(Echo(self.num_rows), self.batch_size, self.num_workers, list)

    def val_dataloader(self) -> DataLoader:
        return evaluation_loader(self.trainer, Echo(self.num_val), 2, 0, list)

    test_dataloader = predict_dataloader = val_dataloader


class Recorder(pl.LightningModule):
    """Remembers every training batch, a list of (row, position); its weight is a fingerprint of what was trained on.

    Args:
        log: File stem; each rank appends its batches to `<log>.<rank>` as they come.
    """

    def __init__(self, log: str | None = None) -> None:
        super().__init__()
        self.log_stem = log
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[tuple[int, int]]] = []
        self.validated: list[list[int]] = []

    def training_step(self, batch: list, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        self.write(batch)
        return self.weight * sum(row + 1 for row, _ in batch) + self.weight**2

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.validated.append(batch)
        self.write(batch)

    def write(self, batch: list) -> None:
        if self.log_stem is not None:
            with open(f"{self.log_stem}.{self.global_rank}", "a") as file:
                file.write(json.dumps(batch) + "\n")

    test_step = predict_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def quiet_trainer(**kwargs: Any) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
    }
    return pl.Trainer(**{**defaults, **kwargs})


class Killed(Exception):
    pass


class SaveAndDie(pl.Callback):
    """Writes a checkpoint when `hook` is called for the n-th time, then stops the run as a crash would."""

    def __init__(self, hook: str, number: int, path: Path, hard: bool = False) -> None:
        self.count = 0

        def strike(trainer: pl.Trainer, *args: Any) -> None:
            self.count += 1
            if self.count == number:
                trainer.save_checkpoint(path)
                if hard:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise Killed

        setattr(self, hook, strike)


def fit(data: EchoData, checkpoint: Path | None = None, killer: SaveAndDie | None = None, **kwargs: Any) -> Recorder:
    """One run, until its end or until it is killed."""
    module = Recorder()
    trainer = quiet_trainer(**{"callbacks": [killer] if killer else None, **kwargs})
    with contextlib.suppress(Killed):
        trainer.fit(module, data, ckpt_path=checkpoint)
    return module


def run_process(options: dict[str, Any]) -> None:
    """Body of a process that a test may kill, or that starts ranks; writes what it saw to files."""
    multiprocessing.set_start_method("fork", force=True)  # loader workers die with this process, as in a user's run
    killer = SaveAndDie(**options["kill"], hard=True) if "kill" in options else None
    trainer = quiet_trainer(callbacks=[killer] if killer else None, **options["trainer"])
    module = Recorder(options["log"])
    trainer.fit(module, datamodule=EchoData(**options["data"]), ckpt_path=options.get("checkpoint"))
    Path(options["log"] + ".weight").write_text(repr(module.weight.item()))
