"""What Stable Diffusion models have in common: text as tokens and, up to XL, a discrete DDPM schedule."""

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_modules.backbones.base import Backbone
from lightning_modules.functional.few_step import FewStepSampler, discrete_timesteps, epsilon_timesteps


def text_tokens(tokenizer: Any, prompts: list[str], length: int | None = None) -> Tensor:
    """(B, L) int64 tokens of B prompts, cut and padded; a cut is announced.

    Args:
        tokenizer: CLIP's or T5's.
        prompts: B prompts.
        length: L. Null takes the text encoder's window.
    """
    length = length or tokenizer.model_max_length
    tokens = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    for prompt, row in zip(prompts, tokens.tolist(), strict=True):
        # Only a prompt that fills the window can have been cut: its first end token is in the last slot.
        if row.index(tokenizer.eos_token_id) == length - 1 and len(tokenizer(prompt).input_ids) > length:
            rank_zero_warn(
                f"A prompt is longer than the text encoder's {length} tokens and is cut there, as in every Stable "
                f"Diffusion pipeline: {prompt[:60]!r}..."
            )
    return tokens


def training_schedule(backbone: Backbone) -> Tensor:
    """(T,) float64 on the CPU: the alphas_cumprod that the pipeline was trained with, whatever its sampler.

    Raises:
        ValueError: if the scheduler's config holds no DDPM schedule, or its prediction type is not trained here.
    """
    from diffusers import DDPMScheduler

    config = backbone.pipeline.scheduler.config
    where = f"backbone.pretrained: the scheduler of {backbone.pretrained!r}"
    family = type(backbone).__name__
    if "beta_schedule" not in config or config.get("use_flow_sigmas"):
        raise ValueError(
            f"{where}, a {config.get('_class_name')}, has no DDPM schedule (betas); {family} trains models that have "
            "one, not flow-matching or EDM models."
        )
    if config.get("prediction_type", "epsilon") not in ("epsilon", "v_prediction"):
        raise ValueError(
            f"{where} says prediction_type {config['prediction_type']!r}; {family} trains epsilon and v_prediction."
        )
    with torch.device("cpu"):  # also when the networks are on the meta device
        return DDPMScheduler.from_config(config).alphas_cumprod.double()


def hold_schedule(backbone: Backbone, alphas_cumprod: Tensor) -> None:
    """Give the backbone its prediction type, `num_timesteps` T and, as (T,) float32 buffers, `alphas` and `sigmas`."""
    backbone.prediction_type = backbone.pipeline.scheduler.config.get("prediction_type", "epsilon")
    backbone.num_timesteps = len(alphas_cumprod)
    for name, squares in (("alphas", alphas_cumprod), ("sigmas", 1 - alphas_cumprod)):
        backbone.register_buffer(name, squares.sqrt().float().to(backbone.device), persistent=False)


def ddim_grid(backbone: Backbone, num_steps: int) -> Tensor:
    """(N + 1,) int64 on the backbone's device: DDIM's timesteps for the checkpoint's schedule, then 0.

    As in the published SPO the last step lands on timestep 0 of the schedule, whose noise is small but not none,
    whatever `set_alpha_to_one` says.

    Raises:
        ValueError: if the schedule has no such steps.
    """
    from diffusers import DDIMScheduler

    T = backbone.num_timesteps
    if not 1 <= num_steps < T:
        raise ValueError(f"{num_steps} sampling steps: expected 1 to {T - 1}, the schedule has {T} timesteps.")
    scheduler = DDIMScheduler.from_config(backbone.pipeline.scheduler.config)
    scheduler.set_timesteps(num_steps)
    grid = torch.cat([scheduler.timesteps.cpu(), torch.zeros(1, dtype=torch.int64)])
    if grid[0] >= T or grid[-2] < 1:
        raise ValueError(
            f"{num_steps} sampling steps: the checkpoint's scheduler ({backbone.pretrained!r}) puts them at "
            f"{grid[0]} to {grid[-2]}, expected 1 to {T - 1}: its steps_offset should be 1 and its timestep_spacing "
            "leading, as those of Stable Diffusion are."
        )
    return grid.to(backbone.device)


class DiscreteSchedule(Backbone):
    """A backbone of T discrete timesteps, which `hold_schedule` has given its buffers."""

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
