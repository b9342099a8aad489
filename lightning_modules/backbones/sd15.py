"""Stable Diffusion 1.x and 2.x: a latent UNet with one CLIP text encoder, epsilon or v-prediction."""

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_modules.backbones.base import Backbone, Conditioning


class SD15(Backbone):
    """Stable Diffusion 1.x or 2.x (epsilon or v-prediction, as the checkpoint's scheduler says)."""

    pipeline_class_name = "StableDiffusionPipeline"
    denoiser_name = "unet"
    denoiser_class_name = "UNet2DConditionModel"
    text_encoder_names = ("text_encoder",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def _after_load(self) -> None:
        from diffusers import DDPMScheduler

        config = self.pipeline.scheduler.config
        # The training schedule, whatever the sampler; on the CPU also when the networks are on the meta device.
        with torch.device("cpu"):
            alphas_cumprod = DDPMScheduler.from_config(config).alphas_cumprod.double()
        self.prediction_type = config.get("prediction_type", "epsilon")
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"backbone.pretrained: the scheduler of {self.pretrained!r} says prediction_type "
                f"{self.prediction_type!r}; SD15 trains epsilon and v_prediction."
            )
        self.num_timesteps = len(alphas_cumprod)
        device = self.device
        self.register_buffer("alphas", alphas_cumprod.sqrt().float().to(device), persistent=False)
        self.register_buffer("sigmas", (1 - alphas_cumprod).sqrt().float().to(device), persistent=False)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """`prompt_embeds` (B, L, D): the text encoder's last hidden state after its final norm, no attention mask."""
        tokenizer = self.pipeline.tokenizer
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).input_ids
        # The slot before the end token is a real word only when the prompt fills the text encoder's window.
        special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
        full = [prompt for prompt, row in zip(prompts, tokens[:, -2].tolist(), strict=True) if row not in special]
        for prompt in full:
            if len(tokenizer(prompt).input_ids) > tokenizer.model_max_length:
                rank_zero_warn(
                    f"A prompt is longer than the text encoder's {tokenizer.model_max_length} tokens and is cut there, "
                    f"as in every Stable Diffusion pipeline: {prompt[:60]!r}..."
                )
        with self.autocast():
            embeds = self.text_encoder(tokens.to(self.device))[0]
        return Conditioning(prompt_embeds=embeds)

    def sample_timesteps(self, n: int) -> Tensor:
        """(n,) int64, uniform over the training timesteps."""
        return torch.randint(0, len(self.alphas), (n,), device=self.device)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.alphas[t], self.sigmas[t]

    def predict(self, x_t: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        with self.autocast():
            return self.pipeline.unet(x_t, t, encoder_hidden_states=condition["prompt_embeds"]).sample
