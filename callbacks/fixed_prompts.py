"""Images of fixed prompts at fixed seeds and steps, beside those of the starting policy: what two callbacks look at."""

import time
from abc import abstractmethod
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from callbacks.ema import average_acts
from callbacks.sampling_bar import sampling_bar
from lightning_modules.base import AlignmentModule

LARGE_SHARE = 0.25  # of a run's time; more is announced
LONG = 60.0  # seconds; less is not worth a word


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
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"prompts: {prompts!r} is not UTF-8 text ({error.reason} at byte {error.start}); expected a text file "
                "with one prompt per line."
            ) from error
        lines = text.rstrip().split("\n") if text.strip() else []
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise ValueError(f"prompts: line {number} of {prompts!r} is blank; expected one prompt per line.")
            if "\0" in line:
                raise ValueError(
                    f"prompts: line {number} of {prompts!r} holds NUL characters: the file is probably UTF-16. Save it "
                    "as UTF-8."
                )
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
        max_prompts: int | None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; expected 1 or more optimizer steps.")
        if max_prompts is not None and max_prompts < 1:
            raise ValueError(f"max_prompts is {max_prompts}; expected 1 or more, or null for all.")
        self.prompts = read_prompts(prompts)[:max_prompts]
        self.every_n_steps = every_n_steps
        self.seed = seed
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.seen_step = 0
        self.drawn: tuple[Any, Tensor] | None = None
        self.spent = 0.0  # seconds
        self.announced = False

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
        positions, chunk_size = self.share(trainer), pl_module.backbone.chunk_size
        parts = []
        with sampling_bar(trainer, len(positions)) as drawn:
            for start in range(0, len(positions), chunk_size):
                chunk = positions[start : start + chunk_size]
                parts.append(
                    pl_module.backbone.generate(
                        [self.prompts[position] for position in chunk],
                        [self.seed + position for position in chunk],
                        num_inference_steps=self.num_inference_steps,
                        guidance_scale=self.guidance_scale,
                    )
                )
                drawn(len(chunk))
        images = torch.cat(parts)
        self.drawn = (request, images)
        return images

    def on_train_start(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        self.seen_step = trainer.global_step  # a resumed run has seen the step that it resumes from
        self.begun = time.monotonic()
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
        start = time.monotonic()
        with average_acts(trainer, pl_module):
            images = self.draw(trainer, pl_module, "current")
        self.watch(trainer, pl_module, images)
        self.spent += time.monotonic() - start
        self.announce_cost()

    def announce_cost(self) -> None:
        """Say once that the watching takes a large part of the run's time."""
        share = self.spent / (time.monotonic() - self.begun)
        if self.spent > LONG and share > LARGE_SHARE and not self.announced:
            self.announced = True
            rank_zero_warn(
                f"{type(self).__name__}: {100 * share:.0f} % of the time since the start of training went into drawing "
                f"{len(self.prompts)} images every {self.every_n_steps} steps. `max_prompts`, `every_n_steps` and "
                "`num_inference_steps` bound it."
            )
