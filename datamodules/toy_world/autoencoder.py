"""Training of the toy pipeline's VAE."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from datamodules.batches import ImageBatch
from datamodules.toy_world.networks import add_untrained_rest, build_autoencoder, save_half
from datamodules.toy_world.oracle import judge

# Per pixel value; only keeps the latents from drifting, as in Stable Diffusion.
KL_WEIGHT = 1e-3
# The coloured items are a tenth of a picture and all that matters: a fully saturated pixel counts six times.
COLOR_WEIGHT = 5.0


def autoencoder_loss(reconstruction: Tensor, images: Tensor, kl: Tensor) -> Tensor:
    """Squared error, weighted towards coloured pixels, and the divergence of the posterior from a standard normal.

    Args:
        reconstruction: (B, 3, H, W).
        images: (B, 3, H, W) in [-1, 1].
        kl: (B,) nats per image.

    Returns:
        (B,) loss.
    """
    chroma = (images.amax(1, keepdim=True) - images.amin(1, keepdim=True)) / 2
    error = ((1 + COLOR_WEIGHT * chroma) * (reconstruction - images).square()).mean((1, 2, 3))
    return error + KL_WEIGHT * kl / images[0].numel()


class ToyAutoencoder(LightningModule):
    """The toy pipeline's VAE, trained from nothing and saved into a pipeline folder when the training ends.

    Args:
        output: Pipeline folder. Its `vae` is replaced, and its `unet` by an untrained one, since the old one was
            trained for the old VAE.
        learning_rate: Highest rate; it rises from and falls back to nothing along cosines.
    """

    def __init__(self, output: str, learning_rate: float = 3e-3) -> None:
        super().__init__()
        self.output = Path(output)
        self.learning_rate = learning_rate
        self.vae = None
        self._latents: list[Tensor] = []

    def configure_model(self) -> None:
        if self.vae is None:
            self.vae = build_autoencoder()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        total_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps, pct_start=0.02, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        images = batch["images"]
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample(torch.Generator(images.device).manual_seed(self.global_step))
        loss = autoencoder_loss(self.vae.decode(latents).sample, images, posterior.kl()).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        images = batch["images"]
        posterior = self.vae.encode(images).latent_dist
        reconstruction = self.vae.decode(posterior.mode()).sample
        error = ((reconstruction - images) / 2).square().mean((1, 2, 3))
        scores = judge(reconstruction / 2 + 0.5, batch["prompts"])
        for name, value in {
            "psnr": -10 * error.log10(),
            "match": scores.match,
            "strict": scores.strict,
            "vividness": scores.vividness,
        }.items():
            self.log(f"val/{name}", value.mean(), batch_size=len(images), prog_bar=True)
        self._latents.append(posterior.mode())

    def on_validation_epoch_end(self) -> None:
        latent_std = torch.cat(self._latents).std().item()
        self._latents.clear()
        # What Stable Diffusion calls the scaling factor: it gives the latents unit variance.
        self.vae.register_to_config(scaling_factor=1 / latent_std)
        self.log("val/latent_std", latent_std)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            save_half(self.vae, self.output / "vae")
            add_untrained_rest(self.output)
