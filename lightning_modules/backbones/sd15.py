"""Stable Diffusion 1.x and 2.x: a latent UNet with one CLIP text encoder, epsilon or v-prediction."""

import torch
from torch import Tensor

from lightning_modules.backbones.base import Conditioning
from lightning_modules.backbones.stable_diffusion import DiscreteSchedule, hold_schedule, text_tokens, training_schedule


class SD15(DiscreteSchedule):
    """Stable Diffusion 1.x or 2.x (epsilon or v-prediction, as the checkpoint's scheduler says)."""

    pipeline_class_name = "StableDiffusionPipeline"
    denoiser_name = "unet"
    denoiser_class_name = "UNet2DConditionModel"
    text_encoder_names = ("text_encoder",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def _after_load(self) -> None:
        hold_schedule(self, training_schedule(self))

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """`prompt_embeds` (B, L, D): the text encoder's last hidden state after its final norm, no attention mask."""
        tokens = text_tokens(self.pipeline.tokenizer, prompts)
        with self.autocast():
            embeds = self.text_encoder(tokens.to(self.device))[0]
        return Conditioning(prompt_embeds=embeds)

    def predict(self, x_t: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        with self.autocast():
            return self.pipeline.unet(x_t, t, encoder_hidden_states=condition["prompt_embeds"]).sample

    @property
    def kohya_version(self) -> str:
        """sd_v1 or sd_v2 (told apart by the text encoder's width), with _v for v-prediction."""
        version = "sd_v2" if self.text_encoder.config.hidden_size == 1024 else "sd_v1"
        return version + ("_v" if self.prediction_type == "v_prediction" else "")
