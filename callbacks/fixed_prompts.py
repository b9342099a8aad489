"""Images of fixed prompts at fixed seeds and steps, beside those of the starting policy: what two callbacks look at."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_modules.base import AlignmentModule


def read_prompts(prompts: list[str] | str) -> list[str]:
    """A list as it is, or the lines of a text file.

    Raises:
        ValueError: if there is no prompt, no such file, or a blank line between prompts.
    """
    if isinstance(prompts, str):
        path = Path(prompts)
        if not path.is_file():
            raise ValueError(
                f"prompts: there is no file {prompts!r} (looked in {Path.cwd()}); expected a text file with one prompt "
                "per line. A single prompt is written as a list: [a red circle]."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"prompts: {prompts!r} is not UTF-8 text ({error.reason} at byte {error.start}); expected a text file "
                "with one prompt per line."
            ) from error
        lines = text.rstrip().splitlines()
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise ValueError(f"prompts: line {number} of {prompts!r} is blank; expected one prompt per line.")
        prompts = [line.strip() for line in lines]
    if not prompts:
        raise ValueError("prompts: there is none; expected a list of prompts, or a text file with one per line.")
    return prompts


class FixedPrompts(pl.Callback):
    """Draws images at the start from the base, and every `every_n_steps` from the policy in training.

    The ranks share the prompts, each drawing the same number of images (the last ones repeat where the numbers do not
    divide), so that networks whose weights are spread over ranks can be sampled too. Two callbacks with the same
    prompts, seed and sampling settings draw once.
    """

    def __init__(
        self,
        prompts: list[str] | str,
        every_n_steps: int,
        seed: int,
        num_inference_steps: int | None,
        guidance_scale: float | None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; expected 1 or more optimizer steps.")
        self.prompts = read_prompts(prompts)
        self.every_n_steps = every_n_steps
        self.seed = seed
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.seen_step = 0
        self.drawn: tuple[Any, Tensor] | None = None

    @abstractmethod
    def start(self, trainer: pl.Trainer, pl_module: AlignmentModule, base_images: Tensor) -> None:
        """Receive this rank's share of the base's images, (share, 3, H, W) in [0, 1] on the CPU."""

    @abstractmethod
    def watch(self, trainer: pl.Trainer, pl_module: AlignmentModule, images: Tensor) -> None:
        """Receive the same images by the policy at `trainer.global_step`."""

    def share(self, trainer: pl.Trainer) -> list[int]:
        """Positions in the prompt list that this rank draws: every world-size-th, the same number on each rank."""
        per_rank = -(-len(self.prompts) // trainer.world_size)
        return [(trainer.global_rank + k * trainer.world_size) % len(self.prompts) for k in range(per_rank)]

    def gather(self, trainer: pl.Trainer, pl_module: AlignmentModule, values: Tensor) -> Tensor:
        """(share, ...) of each rank -> (number of prompts, ...) in their order, on every rank."""
        parts = trainer.strategy.all_gather(values.to(pl_module.device)).reshape(trainer.world_size, *values.shape)
        return parts.transpose(0, 1).flatten(0, 1)[: len(self.prompts)].cpu()

    def draw(self, trainer: pl.Trainer, pl_module: AlignmentModule, role: str) -> Tensor:
        settings = (tuple(self.prompts), self.seed, self.num_inference_steps, self.guidance_scale)
        request = (role, trainer.global_step, settings)
        for other in trainer.callbacks:
            if isinstance(other, FixedPrompts) and other.drawn is not None and other.drawn[0] == request:
                return other.drawn[1]
        positions = self.share(trainer)
        images = pl_module.backbone.generate(
            [self.prompts[position] for position in positions],
            [self.seed + position for position in positions],
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
        )
        self.drawn = (request, images)
        return images

    def on_train_start(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        self.seen_step = trainer.global_step  # a resumed run has seen the step that it resumes from
        with pl_module.backbone.reference():
            base_images = self.draw(trainer, pl_module, "base")
        self.start(trainer, pl_module, base_images)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: AlignmentModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0:
            self.look(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        self.look(trainer, pl_module)
        self.drawn = None

    def look(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        if trainer.global_step == self.seen_step:
            return  # a micro-batch without an optimizer step, or a fit whose last step was a regular one
        self.seen_step = trainer.global_step
        self.watch(trainer, pl_module, self.draw(trainer, pl_module, "current"))
