"""Stable Diffusion 1.x and 2.x: a latent UNet with one CLIP text encoder, epsilon or v-prediction."""

import torch
from torch import Tensor

from lightning_modules.backbones.base import Backbone, Conditioning
from lightning_modules.backbones.stable_diffusion import ddim_grid, hold_schedule, text_tokens, training_schedule
from lightning_modules.functional.few_step import FewStepSampler, discrete_timesteps, epsilon_timesteps


class SD15(Backbone):
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

    def sample_timesteps(self, n: int) -> Tensor:
        """(n,) int64, uniform over the training timesteps."""
        return torch.randint(0, len(self.alphas), (n,), device=self.device)

    def time_grid(self, num_steps: int) -> Tensor:
        """(N + 1,) int64: DDIM's timesteps, the last step landing on 0."""
        return ddim_grid(self, num_steps)

    def timesteps_at(self, levels: Tensor) -> Tensor:
        """(n,) int64, the nearest ones of the training schedule."""
        return discrete_timesteps(levels, self.num_timesteps).to(self.device)

    def few_step_grid(self, sampler: FewStepSampler) -> Tensor:
        """(N,) int64: 999, 749, 500, 250 for four steps; 399 for one."""
        return epsilon_timesteps(sampler.num_steps, sampler.shift, self.num_timesteps).to(self.device)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alphas[t], self.sigmas[t]

    def predict(self, x_t: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        with self.autocast():
            return self.pipeline.unet(x_t, t, encoder_hidden_states=condition["prompt_embeds"]).sample

    @property
    def kohya_version(self) -> str:
        """sd_v1 or sd_v2 (told apart by the text encoder's width), with _v for v-prediction."""
        version = "sd_v2" if self.text_encoder.config.hidden_size == 1024 else "sd_v1"
        return version + ("_v" if self.prediction_type == "v_prediction" else "")
