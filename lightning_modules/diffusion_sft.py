"""Supervised fine-tuning of a diffusion model on captioned images."""

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from datamodules.batches import ImageBatch
from lightning_modules.backbones.base import Backbone
from lightning_modules.base import AlignmentModule
from lightning_modules.functional.noise import draw_noise, per_sample_mse
from lightning_modules.functional.prompts import drop_prompts


class DiffusionSFT(AlignmentModule):
    """Supervised fine-tuning: the ordinary denoising loss on captioned images (for pairs: on the preferred ones).

    loss = mean over images and elements of (prediction - target)^2, every image with its own noise and timestep.

    Args:
        backbone: The diffusion model to train.
        optimizer: Built on the trained parameters only.
        prompt_dropout: Share of captions replaced by the empty one, in [0, 1].
        noise_offset: Standard deviation of an extra noise per image and channel; 0 switches it off.
        lr_scheduler: Begins after the warm-up and is stepped after every optimizer step. Null keeps the rate constant.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        warmup_from_zero: Give the first optimizer step learning rate 0, as the published code does.
        scale_lr: Multiply the learning rate by the images of one optimizer step over all devices.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        prompt_dropout: float = 0.2,
        noise_offset: float = 0.0,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        warmup_from_zero: bool = False,
        scale_lr: bool = False,
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, warmup_steps, warmup_from_zero, scale_lr)
        if not 0.0 <= prompt_dropout <= 1.0:
            raise ValueError(f"prompt_dropout is {prompt_dropout}; expected a share of the captions, in [0, 1].")
        self.prompt_dropout = prompt_dropout
        self.noise_offset = noise_offset

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        prompts = drop_prompts(batch["prompts"], torch.rand(len(batch["prompts"]), device="cpu"), self.prompt_dropout)
        loss = self.denoising_loss(batch, prompts)
        self.log_window({"loss": loss})
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        loss = self.denoising_loss(batch, batch["prompts"])
        self.log("val/loss", loss, batch_size=len(batch["prompts"]), sync_dist=True)

    def pair_terms(self, error: Tensor, reference_error: Tensor | None) -> tuple[Tensor, None]:
        """(B,) loss of each pair of which the preferred image is trained on; there is no preference term."""
        return error.chunk(2)[0], None

    def denoising_loss(self, batch: ImageBatch, prompts: list[str]) -> Tensor:
        """Mean squared error of the prediction over a batch, the prompts perhaps dropped -> scalar float32."""
        latents = self.backbone.latents(batch)
        condition = self.backbone.condition(batch, prompts)
        noise = draw_noise(latents, self.noise_offset)
        t = self.backbone.sample_timesteps(len(latents))
        noised, target = self.backbone.add_noise(latents, noise, t)
        return per_sample_mse(self.backbone.predict(noised, t, condition), target).mean()
