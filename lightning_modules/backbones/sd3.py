"""Stable Diffusion 3 and 3.5: rectified flow in 16 latent channels, a joint transformer, three text encoders."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_modules.backbones.base import Backbone, Conditioning
from lightning_modules.backbones.stable_diffusion import text_tokens
from lightning_modules.functional.few_step import FewStepSampler, flow_times
from lightning_modules.functional.noise import shift_noise_level

Timesteps = Literal["logit_normal", "uniform", "mode"]


def join_text(clip: list[Tensor], t5: Tensor) -> Tensor:
    """(B, 77 + L, D): both CLIP encoders' states side by side, widened with zeros to T5's, and T5's after them.

    Args:
        clip: (B, 77, D1) and (B, 77, D2), the hidden states before the last.
        t5: (B, L, D) with D >= D1 + D2.
    """
    side_by_side = torch.cat(clip, dim=-1)
    widened = torch.nn.functional.pad(side_by_side, (0, t5.shape[-1] - side_by_side.shape[-1]))
    return torch.cat([widened, t5.to(widened.dtype)], dim=1)


class SD3(Backbone):
    """Stable Diffusion 3 or 3.5 (medium, large): rectified flow, x_t = (1 - s) x_0 + s eps with s = t / 1000.

    Timesteps are floats from 0 to 1000. LoRA goes by default on the eight projections of the joint attention, image and
    text side, as in diffusers' SD3 example; 3.5-medium's second attention (attn2.to_q, ...) can be named besides.

    Args:
        timesteps: Density of the noise level s in training, before the shift: "logit_normal" (the paper's choice),
            "uniform", or "mode", which is heavier in the middle or at the ends.
        logit_mean: Of logit_normal; above 0 means more noise.
        logit_std: Of logit_normal.
        mode_scale: Of mode, from -1 to 1.75; above 0 is heavier in the middle.
        shift: Moves the noise levels of training toward noise; 1 leaves them. Null takes the checkpoint's (3 in the
            released models, for images of 1024 x 1024). Images are always made with the checkpoint's.
        t5: Load the third text encoder, T5-XXL: 4.8 billion weights, 9.5 GB in half precision. Without it zeros stand
            in its place, in training and in images. A pipeline that is exported then has none: diffusers opens it with
            `from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)`.
        max_sequence_length: Tokens that T5 reads, up to 512; longer prompts are cut. The CLIP encoders read 77.
    """

    pipeline_class_name = "StableDiffusion3Pipeline"
    denoiser_name = "transformer"
    denoiser_class_name = "SD3Transformer2DModel"
    text_encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    lora_formats = ("diffusers",)
    prediction_type = "flow"

    def __init__(
        self,
        pretrained: str,
        timesteps: Timesteps = "logit_normal",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        shift: float | None = None,
        t5: bool = True,
        max_sequence_length: int = 256,
        **settings: Any,
    ) -> None:
        super().__init__(pretrained, **settings)
        flow = self.scheduler is None or self.scheduler.startswith("FlowMatch")
        for name, value, possible, expected in (
            ("timesteps", timesteps, timesteps in get_args(Timesteps), f"one of {', '.join(get_args(Timesteps))}"),
            ("logit_std", logit_std, logit_std > 0, "a positive number"),
            ("mode_scale", mode_scale, -1 <= mode_scale <= 1.75, "a number from -1 to 1.75 (paper, section 3.1)"),
            ("shift", shift, shift is None or shift > 0, "a positive number, or null for the checkpoint's"),
            ("max_sequence_length", max_sequence_length, 1 <= max_sequence_length <= 512, "1 to 512 tokens"),
            ("scheduler", self.scheduler, flow, "one for flows, such as FlowMatchHeunDiscreteScheduler"),
        ):
            if not possible:
                raise ValueError(f"backbone.{name} is {value!r}; expected {expected}.")
        self.timesteps = timesteps
        self.logit_mean = logit_mean
        self.logit_std = logit_std
        self.mode_scale = mode_scale
        self.shift = shift
        self.max_sequence_length = max_sequence_length
        self.left_out = () if t5 else ("text_encoder_3", "tokenizer_3")

    @property
    def pipeline_options(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    def check_parts(self, index: dict[str, Any]) -> None:
        if "text_encoder_3" in index:  # null in a pipeline that was saved without T5
            index = index | {"text_encoder_3": ["transformers", "T5EncoderModel"]}
        super().check_parts(index)

    def _after_load(self) -> None:
        schedule = self.pipeline.scheduler.config
        if "shift" not in schedule or schedule.get("use_dynamic_shifting"):
            raise ValueError(
                f"backbone.pretrained: the scheduler of {self.pretrained!r}, a {schedule.get('_class_name')}, has no "
                "fixed shift; SD3 expects a FlowMatchEulerDiscreteScheduler without use_dynamic_shifting."
            )
        self.schedule = schedule
        self.num_timesteps = schedule["num_train_timesteps"]
        self.training_shift = schedule["shift"] if self.shift is None else self.shift
        if self.fingerprints:  # what else a cache of embeddings depends on
            self.fingerprints["max_sequence_length"] = str(self.max_sequence_length)
            self.fingerprints.setdefault("text_encoder_3", "zeros")

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """`prompt_embeds` (B, 77 + L, D) of all three encoders, `pooled_prompt_embeds` (B, P1 + P2) of both CLIPs."""
        states, pooled = [], []
        for number in ("", "_2"):
            tokens = text_tokens(getattr(self.pipeline, f"tokenizer{number}"), prompts).to(self.device)
            with self.autocast():
                output = getattr(self, f"text_encoder{number}")(tokens, output_hidden_states=True)
            states.append(output.hidden_states[-2])
            pooled.append(output[0])
        if self.pipeline.text_encoder_3 is None:
            size = (len(prompts), self.max_sequence_length, self.transformer.config.joint_attention_dim)
            t5 = torch.zeros(size, device=self.device)
        else:
            tokens = text_tokens(self.pipeline.tokenizer_3, prompts, self.max_sequence_length).to(self.device)
            with self.autocast():
                t5 = self.text_encoder_3(tokens)[0]
        return Conditioning(prompt_embeds=join_text(states, t5), pooled_prompt_embeds=torch.cat(pooled, dim=-1))

    def sample_timesteps(self, n: int) -> Tensor:
        """(n,) float32 in [0, 1000]: noise levels of the chosen density, shifted."""
        from diffusers.training_utils import compute_density_for_timestep_sampling

        # Differs: diffusers' example takes the density's draw as an index that counts down from noise, so that there
        # logit_mean > 0 means less noise; here it means more, as in the paper.
        s = compute_density_for_timestep_sampling(
            self.timesteps, n, self.logit_mean, self.logit_std, self.mode_scale, device=self.device
        )
        return self.num_timesteps * shift_noise_level(s, self.training_shift)

    def time_grid(self, num_steps: int) -> Tensor:
        """(N + 1,) float32: the timesteps of the checkpoint's sampler, from 1000 on, and 0, which has no noise."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        if num_steps < 1:
            raise ValueError(f"{num_steps} sampling steps: expected 1 or more.")
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.schedule)
        scheduler.set_timesteps(num_steps)
        return (self.num_timesteps * scheduler.sigmas).to(self.device)

    def timesteps_at(self, levels: Tensor) -> Tensor:
        """(n,) float32 in [0, 1000]."""
        return self.num_timesteps * levels.to(self.device)

    def few_step_grid(self, sampler: FewStepSampler) -> Tensor:
        """(N,) float32: 1000 times the shifted times. Not rounded, as diffusers' samplers do not round either."""
        return self.num_timesteps * flow_times(sampler.num_steps, sampler.shift, sampler.end)[:-1].to(self.device)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = t.float() / self.num_timesteps
        return 1.0 - s, s

    def predict(self, x_t: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        patch = self.transformer.config.patch_size
        if x_t.shape[-2] % patch or x_t.shape[-1] % patch:
            pixels = patch * self.pipeline.vae_scale_factor
            raise ValueError(f"SD3 takes images whose height and width are multiples of {pixels}: set data.resolution.")
        with self.autocast():
            return self.pipeline.transformer(
                x_t,
                encoder_hidden_states=condition["prompt_embeds"],
                pooled_projections=condition["pooled_prompt_embeds"],
                timestep=t,  # float32: half precision would merge neighbouring ones
            ).sample

    def kohya_modules(self) -> dict[str, tuple[str, float]]:
        raise ValueError(
            "ExportPipeline: an SD3 LoRA is not written in kohya's layout. sd-scripts trains SD3 with query, key and "
            "value in one matrix, and diffusers does not read such files, so that the export could not be checked. "
            "ComfyUI reads diffusers' layout of SD3: leave `formats` out, or give `formats: [diffusers]`."
        )
