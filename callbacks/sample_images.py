"""See what training does to the images of a few prompts."""

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from torch import Tensor

from callbacks.fixed_prompts import FixedPrompts
from callbacks.grids import draw_grid
from lightning_modules.base import AlignmentModule


class SampleImages(FixedPrompts):
    """Draw the same prompts at the same seeds with the base model and with the model in training, side by side.

    Every grid is saved as samples/step_000100.png in the run's folder, and sent to TensorBoard and W&B if the run logs
    there. Sampling never changes training: the weights that result are the same with and without it.

    Args:
        prompts: Prompts to draw, or a text file with one per line.
        every_n_steps: Optimizer steps between two grids; one more is drawn at the end of fit.
        seed: Seed of the first prompt's starting noise; the next prompt has the next seed.
        num_inference_steps: Sampling steps. Null takes the backbone's.
        guidance_scale: Classifier-free guidance. Null takes the backbone's.
        max_prompts: Draw only the first so many of the prompts, to bound the time.
    """

    def __init__(
        self,
        prompts: list[str] | str,
        every_n_steps: int = 100,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        max_prompts: int | None = None,
    ) -> None:
        super().__init__(prompts, every_n_steps, seed, num_inference_steps, guidance_scale, max_prompts)

    def start(self, trainer: pl.Trainer, pl_module: AlignmentModule, base_images: Tensor) -> None:
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "samples"
        self.base_images = self.gather(trainer, pl_module, base_images)

    def watch(self, trainer: pl.Trainer, pl_module: AlignmentModule, images: Tensor) -> None:
        images = self.gather(trainer, pl_module, images)
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        grid = draw_grid({"base": self.base_images, f"step {step}": images}, self.prompts)
        self.folder.mkdir(parents=True, exist_ok=True)
        grid.save(self.folder / f"step_{step:06d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("samples", np.asarray(grid), step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("samples", [grid], step=step)
