"""Run a learning panel, maybe under torchrun: `python -m tests.callbacks.panel_ranks SOURCE MODEL FOLDER STRATEGY`."""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from callbacks.learning_panel import LearningPanel
from tests.callbacks.runs import make_module, make_trainer
from tests.datamodules.caches import pairs


def main(source: Path, pipeline: Path, folder: Path, strategy: str) -> None:
    pl.seed_everything(5, verbose=False)
    devices = 1 if strategy == "auto" else 2
    trainer = make_trainer(
        folder,
        [LearningPanel(num_pairs=5, num_buckets=2)],
        devices=devices,
        strategy=ModelParallelStrategy(2, 1) if strategy == "fsdp2" else strategy,
        accumulate_grad_batches=2 // devices,
        val_check_interval=4 // devices,  # micro-batches: two steps
        check_val_every_n_epoch=None,
        limit_val_batches=1.0,
        num_sanity_val_steps=0,
    )
    # SGD: Adam would blow up the rounding of gradients that are zero, and the two runs would drift apart.
    module = make_module(pipeline, lr=1.0, optimizer=torch.optim.SGD)
    trainer.fit(module, datamodule=pairs(source, validation_split="validation", batch_size=1))
    if trainer.is_global_zero:
        found = {name: value.item() for name, value in trainer.callback_metrics.items() if "panel" in name}
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4])
