"""Stable Diffusion XL and SDXL-Turbo: a latent UNet with two text encoders that is told the image's sizes as well."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from datamodules.batches import ImageBatch, PairBatch
from lightning_modules.backbones.base import Conditioning, is_component
from lightning_modules.backbones.lora_files import sgm_names
from lightning_modules.backbones.stable_diffusion import DiscreteSchedule, hold_schedule, text_tokens, training_schedule

SizeConditions = Literal["constant", "real"]
Timesteps = Literal["auto", "uniform", "turbo", "turbo_published"]


def size_ids(original_sizes: Tensor, crops: Tensor, target_size: tuple[int, int]) -> Tensor:
    """What SDXL is told about each image (arXiv:2307.01952, section 2.2).

        [height, width, top, left, target height, target width]

    Args:
        original_sizes: (N, 2) height and width of each image as stored, in pixels.
        crops: (N, 2) top and left of its crop, counted after the resize.
        target_size: Height and width of the training images, in pixels.

    Returns:
        (N, 6) float32, on the device of `original_sizes`.
    """
    target = torch.tensor([target_size], device=original_sizes.device).expand(len(original_sizes), 2)
    # Differs: float32 always; the published code's bfloat16 rounds sizes above 256 (1025 becomes 1024).
    return torch.cat([original_sizes, crops, target], dim=1).float()


def join_hidden_states(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """(B, L, D1 + D2): of the hidden states of both text encoders the last but one, side by side."""
    return torch.cat([first[-2], second[-2]], dim=-1)


def zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """A schedule whose last timestep is pure noise (arXiv:2305.08891, algorithm 1).

        r = sqrt(abar),  r' = (r - r_T) r_1 / (r_1 - r_T),  abar' = r'^2

    Args:
        alphas_cumprod: (T,) abar, decreasing.

    Returns:
        (T,) abar': the first value is kept, the last is 0.
    """
    r = alphas_cumprod.sqrt()
    return ((r - r[-1]) * r[0] / (r[0] - r[-1])).square()


def turbo_timesteps(draws: Tensor, choices: int, num_timesteps: int = 1000) -> Tensor:
    """SDXL-Turbo's timesteps: 249, 499, 749 and, as the last of four choices, 999.

    Args:
        draws: (B,) integers of any range.
        choices: 3, or 4 as published.
        num_timesteps: Of the schedule.

    Returns:
        (B,) int64 timesteps: 250 (draw mod choices) + 249.
    """
    step = num_timesteps // 4
    return step * (draws % choices) + step - 1


class SDXL(DiscreteSchedule):
    """Stable Diffusion XL or SDXL-Turbo, epsilon or v-prediction as the checkpoint's scheduler says. Not the refiner.

    Args:
        size_conditions: What the model is told about each image's size and crop. "constant" says that it was as large
            as it is in training and not cropped, whatever it was, as the published full script does; "real" says
            how large it is in the data and where it was cropped, as the LoRA example does.
        timesteps: "uniform" over the schedule, or "turbo": 249, 499 and 749 of the schedule rescaled to zero terminal
            signal. "turbo_published" draws 999 as well, where nothing is left of the image and a pair teaches nothing.
            "auto" takes "turbo" for a checkpoint with SDXL-Turbo's scheduler, else "uniform".
        zero_empty_prompt: Train empty (also dropped) prompts on zeros, as SDXL's pipeline samples without a negative
            prompt, instead of on the encoded empty text, as the published code does.
    """

    pipeline_class_name = "StableDiffusionXLPipeline"
    denoiser_name = "unet"
    denoiser_class_name = "UNet2DConditionModel"
    text_encoder_names = ("text_encoder", "text_encoder_2")
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    kohya_version = "sdxl_base_v1-0"

    def __init__(
        self,
        pretrained: str,
        size_conditions: SizeConditions = "constant",
        timesteps: Timesteps = "auto",
        zero_empty_prompt: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__(pretrained, **settings)
        for name, value, known in (
            ("size_conditions", size_conditions, get_args(SizeConditions)),
            ("timesteps", timesteps, get_args(Timesteps)),
        ):
            if value not in known:
                raise ValueError(f"backbone.{name} is {value!r}; expected one of {', '.join(known)}.")
        self.size_conditions = size_conditions
        self.timesteps = timesteps
        self.zero_empty_prompt = zero_empty_prompt

    def check_parts(self, index: dict[str, Any]) -> None:
        if index.get("requires_aesthetics_score") or (
            is_component(index.get("text_encoder_2")) and not is_component(index.get("text_encoder"))
        ):
            raise ValueError(
                f"backbone.pretrained: {self.pretrained!r} is the SDXL refiner, which finishes the base model's "
                "images and is told an aesthetic score instead of a size; it is not trained here. Expected a model "
                "such as stabilityai/stable-diffusion-xl-base-1.0, or stabilityai/sdxl-turbo."
            )
        super().check_parts(index)

    def _after_load(self) -> None:
        config = self.unet.config
        sizes = (config.projection_class_embeddings_input_dim or 0) - self.text_encoder_2.config.projection_dim
        if config.addition_embed_type != "text_time" or sizes != 6 * config.addition_time_embed_dim:
            raise ValueError(
                f"backbone.{'denoiser' if self.denoiser_path else 'pretrained'}: the UNet of "
                f"{self.denoiser_path or self.pretrained!r} does not take SDXL's pooled text and six size numbers; "
                "expected a UNet of SDXL's base model or of SDXL-Turbo."
            )
        alphas_cumprod = training_schedule(self)
        timesteps = self.timesteps
        if timesteps == "auto":
            timesteps = "turbo" if has_turbo_scheduler(self.pipeline) else "uniform"
            if timesteps == "turbo":
                rank_zero_info(f"{self.pretrained} has SDXL-Turbo's scheduler: timesteps 249, 499, 749 (turbo).")
        if self.fingerprints and self.zero_empty_prompt:
            self.fingerprints["empty_prompt"] = "zeros"  # a cache made without the option holds other embeddings
        self.turbo_choices = {"uniform": 0, "turbo": 3, "turbo_published": 4}[timesteps]
        hold_schedule(self, zero_terminal_snr(alphas_cumprod) if self.turbo_choices else alphas_cumprod)

    @property
    def vae_overflows_float16(self) -> bool:
        """As SDXL's pipeline sees it: also when the VAE's config says nothing, since the original one does overflow."""
        return self.vae.config.get("force_upcast", False)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """`prompt_embeds` (B, L, D1 + D2) of both encoders, `pooled_prompt_embeds` (B, P) of the second."""
        outputs = []
        for number in ("", "_2"):
            tokens = text_tokens(getattr(self.pipeline, f"tokenizer{number}"), prompts).to(self.device)
            with self.autocast():
                outputs.append(getattr(self, f"text_encoder{number}")(tokens, output_hidden_states=True))
        embeds = join_hidden_states(outputs[0].hidden_states, outputs[1].hidden_states)
        pooled = outputs[1][0]
        if self.zero_empty_prompt:
            full = torch.tensor([[prompt != ""] for prompt in prompts], device=self.device)
            embeds, pooled = embeds * full[:, None], pooled * full
        return Conditioning(prompt_embeds=embeds, pooled_prompt_embeds=pooled)

    def as_negative(self, empty: Conditioning) -> Conditioning:
        """Zeros instead of the encoded empty prompt, as SDXL's pipeline has it without a negative prompt."""
        if not self.pipeline.config.get("force_zeros_for_empty_prompt", True):
            return empty
        return Conditioning({k: v if k == "time_ids" else torch.zeros_like(v) for k, v in empty.items()})

    def add_sizes(self, condition: Conditioning, batch: PairBatch | ImageBatch) -> Conditioning:
        """Add `time_ids` (N, 6): constant, or from the batch's original sizes and crops.

        Raises:
            ValueError: for real size conditions of a batch without sizes.
        """
        moments = batch.get("moments")
        height, width = batch["images"].shape[-2:] if moments is None else self.pixels(moments)
        if self.size_conditions == "constant":
            ids = self.whole_image_ids(len(condition["prompt_embeds"]), height, width)
        elif "original_sizes" in batch and "crops" in batch:
            ids = size_ids(batch["original_sizes"], batch["crops"], (height, width)).to(self.device)
        else:
            raise ValueError(
                "backbone.size_conditions: real needs the `original_sizes` and `crops` of every image, but the batch "
                f"holds only {', '.join(batch)}. Use a data module that gives them, or size_conditions: constant."
            )
        return Conditioning({**condition, "time_ids": ids})

    def pixels(self, latents: Tensor) -> tuple[int, int]:
        """Height and width of the images that latents (or moments) stand for."""
        height, width = latents.shape[-2:]
        return height * self.pipeline.vae_scale_factor, width * self.pipeline.vae_scale_factor

    def whole_image_ids(self, n: int, height: int, width: int) -> Tensor:
        """(n, 6) ids of images that were as large as they are and are not cropped."""
        sizes = torch.tensor([[height, width]], device=self.device).expand(n, 2)
        return size_ids(sizes, torch.zeros_like(sizes), (height, width))

    def sample_timesteps(self, n: int) -> Tensor:
        """(n,) int64: uniform over the training timesteps, or SDXL-Turbo's."""
        if not self.turbo_choices:
            return super().sample_timesteps(n)
        draws = torch.randint(0, self.turbo_choices, (n,), device=self.device)
        return turbo_timesteps(draws, self.turbo_choices, len(self.alphas))

    def predict(self, x_t: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        """The acting network's prediction, (B, C, h, w); without `time_ids`, of whole images of their own size."""
        time_ids = condition.get("time_ids")
        if time_ids is None:
            time_ids = self.whole_image_ids(len(x_t), *self.pixels(x_t))
        with self.autocast():
            return self.pipeline.unet(
                x_t,
                t,
                encoder_hidden_states=condition["prompt_embeds"],
                added_cond_kwargs={"text_embeds": condition["pooled_prompt_embeds"], "time_ids": time_ids},
            ).sample

    def kohya_names(self) -> dict[str, str]:
        """Stability's names: kohya trains SDXL on its original code, not on diffusers'."""
        return sgm_names(self.unet)


def has_turbo_scheduler(pipeline: Any) -> bool:
    """Whether a pipeline samples as SDXL-Turbo does: ancestral Euler, steps counted from the schedule's end."""
    config = pipeline.scheduler.config
    return (
        config.get("_class_name") == "EulerAncestralDiscreteScheduler" and config.get("timestep_spacing") == "trailing"
    )
