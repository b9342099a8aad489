"""Models for runs of the command line that take a second."""

import torch
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel


class LoggingModel(BoringModel):
    """Logs a metric at every step; counts how often it was built."""

    built = 0

    def __init__(self, fails_with: str | None = None) -> None:
        super().__init__()
        type(self).built += 1
        self.fails_with = fails_with
        if fails_with == "value":
            raise ValueError("fails_with is 'value'")
        if fails_with == "zero":
            1 // 0  # noqa: B018

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if self.fails_with == "bug":
            raise KeyError("a bug")
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log("train/loss", loss)
        return loss

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("test/weight", self.layer.weight.sum())


class Data(BoringDataModule):
    """64 random vectors."""


ARGUMENTS = [
    "--model=tests.cli.runs.LoggingModel",
    "--data=tests.cli.runs.Data",
    "--trainer.accelerator=cpu",
    "--trainer.max_steps=3",
    "--trainer.log_every_n_steps=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
