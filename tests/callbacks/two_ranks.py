"""Fit, test and predict with every callback; run alone or under torchrun: `python -m tests.callbacks.two_ranks ...`."""

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch.distributed
from lightning.pytorch.strategies import ModelParallelStrategy

from callbacks.evaluation import Evaluation
from callbacks.export_pipeline import ExportPipeline
from callbacks.push_to_hub import PushToHub
from callbacks.sample_images import SampleImages
from callbacks.score_prompts import ScorePrompts
from callbacks.write_images import WriteImages
from tests.callbacks.runs import PROMPTS, Data, Redness, make_module, make_trainer


def main(pipeline: Path, folder: Path, strategy: str) -> None:
    pl.seed_everything(5, verbose=False)
    rewards = {"red": Redness()}
    callbacks = [
        SampleImages(PROMPTS, 2),
        ScorePrompts(rewards, PROMPTS, 2),
        ExportPipeline(2, merged=True),
        PushToHub("me/model"),
        Evaluation(rewards, save_images=True),
        WriteImages(),
    ]
    devices = 1 if strategy == "auto" else 2
    trainer = make_trainer(
        folder,
        callbacks,
        max_steps=3,
        accumulate_grad_batches=2 // devices,
        devices=devices,
        strategy=ModelParallelStrategy(2, 1) if strategy == "fsdp2" else strategy,
    )
    # SGD: Adam would blow up the rounding of gradients that are zero, and the two runs would drift apart.
    module, data = make_module(pipeline, lr=1.0, optimizer=torch.optim.SGD), Data()
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    trainer.predict(module, datamodule=data, return_predictions=False)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
