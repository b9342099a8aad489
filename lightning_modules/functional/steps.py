"""One stochastic reverse step for every family: a Gaussian around what the network takes the finished sample to be.

With x_t = alpha_t x_0 + sigma_t eps, the step from t to the earlier s is

    v = eta^2 (sigma_s^2 / sigma_t^2) (sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2)
    x_s = alpha_s x_0 + sqrt(sigma_s^2 - v) eps + sqrt(v) z,    z ~ N(0, I)

For alpha^2 + sigma^2 = 1 it is DDIM's (arXiv:2010.02502), of a flow it keeps the same marginals. Timesteps, their
coefficients and eta are arguments: nothing here remembers how many steps somebody else samples with.
"""

import math

import torch
from torch import Tensor

from lightning_modules.functional.noise import PredictionType, at_least_float32, per_sample, to_epsilon, to_x0

Coefficients = tuple[Tensor, Tensor]  # alpha and sigma, each (B,)


def denoise(
    prediction_type: PredictionType, prediction: Tensor, x_t: Tensor, now: Coefficients
) -> tuple[Tensor, Tensor]:
    """The finished sample and the noise that a prediction implies.

    Args:
        prediction_type: What the network predicts.
        prediction: (B, ...) already guided.
        x_t: (B, ...) samples.
        now: Coefficients of x_t.

    Returns:
        (B, ...) x_0 and (B, ...) eps, float32 or better.
    """
    return to_x0(prediction_type, prediction, x_t, *now), to_epsilon(prediction_type, prediction, x_t, *now)


def reverse_step(
    x_0: Tensor, epsilon: Tensor, now: Coefficients, then: Coefficients, eta: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of p(x_s | x_t).

    Args:
        x_0: (B, ...) finished samples, as predicted at t (clamped or not).
        epsilon: (B, ...) noise, as predicted at t.
        now: Coefficients of t.
        then: Coefficients of s, the earlier timestep on which the step lands.
        eta: Share of the noise that is drawn anew, in [0, 1]; 0 is deterministic.

    Returns:
        (B, ...) mean, through which gradients flow, and (B,) standard deviation, 0 where s has no noise.
    """
    (alpha_t, sigma_t), (alpha_s, sigma_s) = now, then
    # With r = alpha_t sigma_s / (alpha_s sigma_t): v = (eta sigma_s)^2 (1 - r^2), no difference of large numbers.
    renewed = eta**2 * (1.0 - (alpha_t * sigma_s / (alpha_s * sigma_t)).square())
    kept = sigma_s * (1.0 - renewed).sqrt()
    mean = per_sample(alpha_s, x_0) * x_0 + per_sample(kept, epsilon) * epsilon
    return mean, sigma_s * renewed.sqrt()


def log_probability(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density of x under independent Gaussians, as the MEAN over the elements of each sample.

        mean over C, H, W of  -(x - mean)^2 / (2 std^2) - ln std - ln sqrt(2 pi)

    Args:
        x: (B, ...) samples, taken as constants.
        mean: (B, ...).
        std: (B,) above 0.

    Returns:
        (B,) float32 or better.
    """
    distance = (at_least_float32(x.detach()) - mean).square().flatten(1).mean(1)
    return -distance / (2.0 * std.square()) - std.log() - 0.5 * math.log(2.0 * math.pi)


def draw_step(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """x_s = mean + std z: (B, ...) and (B,), or one mean for K candidates each.

    Args:
        mean: (B, ...).
        std: (B,).
        noise: (K B, ...) standard normal, row k B + b for candidate k of sample b.

    Returns:
        (K B, ...) in the same order.
    """
    copies = len(noise) // len(mean)
    return torch.cat([mean] * copies) + per_sample(torch.cat([std] * copies), noise) * noise
