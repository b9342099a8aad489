"""diffusers schedulers for distilled models, with settings by which their own steps are the trained ones."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.functional.few_step import SamplerMode
from lightning_modules.functional.noise import PredictionType

TIME_TOLERANCE = 2e-6  # of t in 0..1: both sides compute in float32
Found = tuple[Any, dict[str, list[float]]]


def few_step_scheduler(
    timesteps: Sequence[float], mode: SamplerMode, prediction_type: PredictionType, config: dict[str, Any]
) -> Found:
    """The scheduler with which a diffusers pipeline samples as a model was distilled to.

    Its settings are chosen so that `set_timesteps(n)` gives the trained timesteps; this is checked by calling it. Where
    no settings do, the pipeline has to be told them, and the second result says how.

    Args:
        timesteps: The n trained timesteps, decreasing, as the network is told them.
        mode: "sde" or "ode".
        prediction_type: What the network predicts.
        config: Of the scheduler of the pipeline that the model comes from.

    Returns:
        The scheduler, and the arguments of the pipeline's call besides number of steps and guidance: none, or
        `timesteps` or `sigmas`.
    """
    with torch.device("cpu"):  # it computes with its numbers, also beside networks on the meta device
        if prediction_type == "flow":
            return flow_scheduler(timesteps, mode, config["num_train_timesteps"])
        return discrete_scheduler([round(t) for t in timesteps], mode, config)


def discrete_scheduler(timesteps: list[int], mode: SamplerMode, config: dict[str, Any]) -> Found:
    """LCM's scheduler (x_0, then new noise) for "sde", DDIM's for "ode", on the model's own schedule."""
    from diffusers import DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LCMScheduler

    n = len(timesteps)
    betas = DDPMScheduler.from_config(config).betas
    schedule = {name: config[name] for name in ("beta_start", "beta_end", "beta_schedule") if name in config}
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        schedule = {"trained_betas": betas.tolist()}
    # The offset acts on nothing here; without it Stable Diffusion's pipeline warns of an old config.
    kept = {"prediction_type": config.get("prediction_type", "epsilon"), "steps_offset": 1}
    schedule |= {"num_train_timesteps": len(betas)} | kept
    if mode == "ode" and n > 1:
        spacing = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
        ddim = DDIMScheduler(**schedule, **spacing)
        ddim.set_timesteps(n)
        later = [t - len(betas) // n for t in timesteps]
        if ddim.timesteps.tolist() == timesteps and later[:-1] == timesteps[1:] and later[-1] < 0:
            return ddim, {}
        # Euler's steps in sigma are DDIM's, and it can be told its timesteps. Leading: x starts as sqrt(sigma^2 + 1).
        return EulerDiscreteScheduler(**schedule, timestep_spacing="leading"), {"timesteps": timesteps}
    # The boundary condition of consistency models is switched off: c_skip = 0, c_out = 1.
    lcm = {"clip_sample": False, "set_alpha_to_one": True, "timestep_scaling": 1e6}
    whole = schedule | {"original_inference_steps": len(betas)}
    # It counts down from its schedule's end, so that a lower start needs a shorter schedule.
    first = timesteps[0] + 1
    short = {"num_train_timesteps": first, "original_inference_steps": first, "trained_betas": betas[:first].tolist()}
    for settings in (whole, kept | short):
        scheduler = LCMScheduler(**settings, **lcm)
        scheduler.set_timesteps(n)
        if scheduler.timesteps.tolist() == timesteps:
            return scheduler, {}
    return LCMScheduler(**whole, **lcm), {"timesteps": timesteps}


def flow_scheduler(timesteps: Sequence[float], mode: SamplerMode, num_timesteps: int) -> Found:
    """Euler's scheduler of flows for "ode", the one that adds new noise for "sde". Both end at t = 0."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    scheduler_class = FlowMatchLCMScheduler if mode == "sde" else FlowMatchEulerDiscreteScheduler
    times = torch.tensor(timesteps, dtype=torch.float64) / num_timesteps
    last = {"shift_terminal": float(times[-1])} if len(times) > 1 else {}
    shifts = [1.0]
    if len(times) > 2 and (shift := stretched_shift(times, num_timesteps)) is not None:
        shifts.append(shift)
    for shift in shifts:
        scheduler = scheduler_class(num_train_timesteps=num_timesteps, shift=shift, **last)
        scheduler.set_timesteps(len(times))
        if (scheduler.sigmas[:-1].double() - times).abs().max() < TIME_TOLERANCE:
            return scheduler, {}
    return scheduler_class(num_train_timesteps=num_timesteps, shift=1.0), {"sigmas": times.tolist()}


def stretched_shift(times: Tensor, num_timesteps: int) -> float | None:
    """The shift with which diffusers' flow schedulers, told the last time too, step at trained times.

    They space u evenly from 1 down to their smallest shifted noise level, shift it,

        t = S u / (1 + (S - 1) u),

    and stretch 1 - t linearly so that the last t is `shift_terminal`. Trained times are the same curve of an even u
    with another spacing. Of both curves 1 - t_k is proportional to k / (1 - c k), and equal c is a quadratic equation
    for S.

    Args:
        times: (n,) float64 from 1 down, n of 3 or more.
        num_timesteps: T; the smallest noise level before the shift is 1 / T.

    Returns:
        S, or None if no shift gives the curvature c.
    """
    half, gaps = (len(times) - 1) // 2, len(times) - 1
    near, far = (1 - times[[half, 2 * half]]).tolist()  # far apart, because times are rounded to float32
    if times[0] != 1 or far == near:
        return None
    c = (far - 2 * near) / (2 * half * (far - near))
    # (S - 1) (1 - m) = c gaps S (1 + (S - 1) m),  m = 1 / T
    m = 1 / num_timesteps
    square, linear, constant = c * gaps * m, (1 - m) * (c * gaps - 1), 1 - m
    if abs(square) < 1e-12:  # a straight line
        return -constant / linear
    inside = linear * linear - 4 * square * constant
    if inside < 0:
        return None
    roots = [(-linear + sign * math.sqrt(inside)) / (2 * square) for sign in (-1, 1)]
    return min((root for root in roots if root > 0), default=None)
