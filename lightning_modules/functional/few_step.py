"""Sampling in few steps: the times of a distilled model, and the trajectory that it takes through them.

Times t run from 1, pure noise, to 0. A step estimates the clean sample, and then either adds fresh noise to it (SDE,
the multi-step consistency sampler of DMD2, arXiv:2405.14867) or follows the noise that the estimate implies (ODE).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_modules.functional.noise import (
    PredictionType,
    add_noise,
    at_least_float32,
    per_sample,
    shift_noise_level,
    to_x0,
)
from lightning_modules.functional.steps import Coefficients, denoise

SamplerMode = Literal["sde", "ode"]
ONE_STEP_TIMESTEP = 399  # what a one-step noise-prediction model is told of pure noise; 999 gives noise artefacts


def flow_times(num_steps: int, shift: float = 1.0, end: float = 0.001) -> Tensor:
    """Times of a flow model's few steps.

        u = linspace(1, end, n + 1),  t = shift u / (1 + (shift - 1) u),  the last one `end` itself

    Args:
        num_steps: n.
        shift: 3 for SD3-medium, 5 for SD3.5-large, 1 for SiT.
        end: Time at which the clean sample is taken: 0.001 for SD3, 0 for SiT.

    Returns:
        (n + 1,) float32, decreasing from 1 to `end`. In half precision 0.8336 would become 0.832.
    """
    times = shift_noise_level(torch.linspace(1.0, end, num_steps + 1), shift)
    times[-1] = end
    return times


def epsilon_timesteps(num_steps: int, shift: float = 1.0, num_timesteps: int = 1000) -> Tensor:
    """Timesteps of the few steps of a model with a discrete schedule.

        round(linspace(999, 0, n + 1)) without the last; 399 for one step; a shift acts on t / 1000

    Returns:
        (n,) int64, decreasing: 999, 749, 500, 250 for four.
    """
    if num_steps == 1:
        return torch.tensor([ONE_STEP_TIMESTEP * num_timesteps // 1000])
    times = torch.linspace(num_timesteps - 1, 0, num_steps + 1)[:-1] / num_timesteps
    return discrete_timesteps(shift_noise_level(times, shift) if shift != 1 else times, num_timesteps)


def discrete_timesteps(times: Tensor, num_timesteps: int = 1000) -> Tensor:
    """(n,) times in [0, 1] -> (n,) int64 timesteps, clamp(round(1000 t), 0, 999), computed in float32."""
    return (times.float() * num_timesteps).round().clamp(0, num_timesteps - 1).long()


def clean_estimate(
    prediction_type: PredictionType, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor, end: float = 0.0
) -> Tensor:
    """The sample at the end of the trajectory that a prediction implies, in float32 or better.

        flow: x_t + (end - t) v        epsilon and v_prediction: x_0, whatever `end` is

    Args:
        prediction_type: What the network predicts.
        prediction: (B, ...).
        x_t: (B, ...).
        alpha: (B,) signal coefficients.
        sigma: (B,) noise coefficients; of a flow, the times t.
        end: Time of the end, in [0, 1).

    Returns:
        (B, ...).
    """
    if prediction_type == "flow":
        prediction, x_t = at_least_float32(prediction), at_least_float32(x_t)
        return x_t + (end - per_sample(sigma, x_t)) * prediction
    return to_x0(prediction_type, prediction, x_t, alpha, sigma)


def few_step_trajectory(
    x: Tensor,
    timesteps: Tensor,
    predict: Callable[[Tensor, Tensor], Tensor],
    coefficients: Callable[[Tensor], Coefficients],
    draw: Callable[[], Tensor],
    prediction_type: PredictionType,
    mode: SamplerMode = "sde",
    end: float = 0.0,
    steps: int | None = None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Sample in few steps, without guidance. The last clean estimate is the sample.

        sde: x = alpha_s x_0 + sigma_s noise          ode: x = alpha_s x_0 + sigma_s eps; of a flow, x + (s - t) v

    Args:
        x: (B, ...) unit noise.
        timesteps: (n,) in the network's own unit, decreasing.
        predict: (x_t, (B,) timesteps) -> (B, ...) prediction.
        coefficients: (B,) timesteps -> alpha and sigma.
        draw: Gives (B, ...) unit noise, before every step but the first; not asked in "ode".
        prediction_type: What the network predicts.
        mode: "sde" or "ode".
        end: See `clean_estimate`.
        steps: Ask the network so many times, from 0 to n; n times if not given.

    Returns:
        What the network was given at each step, (B, ...), and, if it stops early, what it would be given at the next
        one; and its clean estimates, (B, ...) float32, one for each time it was asked.
    """
    inputs, clean = [x], []
    for number in range(len(timesteps) if steps is None else steps):
        t = timesteps[number].expand(len(x))
        now = coefficients(t)
        prediction = predict(x, t)
        clean.append(clean_estimate(prediction_type, prediction, x, *now, end))
        if number + 1 < len(timesteps):
            then = coefficients(timesteps[number + 1].expand(len(x)))
            if mode == "sde":
                x = add_noise(clean[-1], draw(), *then)
            else:
                x = add_noise(*denoise(prediction_type, prediction, x, now), *then)
            inputs.append(x)
    return inputs, clean


@dataclass(frozen=True)
class FewStepSampler:
    """How a distilled model makes its images: what is fixed by its training.

    Attributes:
        num_steps: n.
        mode: "sde" or "ode".
        shift: Of the times.
        end: Time at which a flow's sample is taken, in [0, 1).
        timesteps: The n timesteps in the network's own unit, where they are not the published ones.
    """

    num_steps: int
    mode: SamplerMode = "sde"
    shift: float = 1.0
    end: float = 0.0
    timesteps: tuple[float, ...] | None = None
