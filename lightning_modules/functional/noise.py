"""Noising and its algebra: x_t = alpha x_0 + sigma eps, for epsilon, velocity and flow networks.

Everything is computed in float32 or better, whatever comes in: in bfloat16 the noise coefficient of the first
timesteps rounds to zero, and small differences of errors drown in rounding.
"""

from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow"]


def at_least_float32(x: Tensor) -> Tensor:
    """Half-precision tensors become float32; float32 and float64 stay as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def per_sample(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) shaped (B, 1, 1, ...), so that it multiplies each sample of `like`."""
    return coefficient.reshape(-1, *[1] * (like.ndim - 1))


def draw_noise(like: Tensor, offset: float = 0.0) -> Tensor:
    """Standard normal noise, (B, C, h, w) like `like`, plus `offset` times one draw per sample and channel."""
    # Not randn_like, which fills in memory order: the same seed would give other noise for another memory format.
    noise = torch.randn(like.shape, device=like.device, dtype=like.dtype)
    if offset:
        noise = noise + offset * torch.randn(*like.shape[:2], 1, 1, device=like.device, dtype=like.dtype)
    return noise


def shift_noise_level(s: Tensor, shift: float) -> Tensor:
    """Move noise levels toward noise, as larger images need it (arXiv:2403.03206, eq. 23).

        s' = shift s / (1 + (shift - 1) s)

    Args:
        s: (n,) noise levels in [0, 1].
        shift: 1 changes nothing; the released models have 3.

    Returns:
        (n,) noise levels in [0, 1].
    """
    return shift * s / (1.0 + (shift - 1.0) * s)


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = alpha x_0 + sigma eps.

    Args:
        x0: (B, ...) clean samples.
        noise: (B, ...) standard normal.
        alpha: (B,) signal coefficients.
        sigma: (B,) noise coefficients.

    Returns:
        (B, ...) noised samples, float32 or better.
    """
    x0, noise = at_least_float32(x0), at_least_float32(noise)
    return per_sample(alpha, x0) * x0 + per_sample(sigma, x0) * noise


def regression_target(
    prediction_type: PredictionType, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """What a network of this type is trained to predict.

    epsilon: eps.  v_prediction: alpha eps - sigma x_0 (arXiv:2202.00512).  flow: eps - x_0 (arXiv:2403.03206).

    Raises:
        ValueError: for an unknown prediction type.
    """
    x0, noise = at_least_float32(x0), at_least_float32(noise)
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "v_prediction":
        return per_sample(alpha, x0) * noise - per_sample(sigma, x0) * x0
    if prediction_type == "flow":
        return noise - x0
    raise ValueError(f"Unknown prediction type {prediction_type!r}; known are epsilon, v_prediction and flow.")


def to_x0(prediction_type: PredictionType, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample that a prediction implies, (B, ...).

    epsilon: (x_t - sigma eps) / alpha.  v_prediction, with alpha^2 + sigma^2 = 1: alpha x_t - sigma v.
    flow, with alpha + sigma = 1: x_t - sigma v.
    """
    prediction, x_t = at_least_float32(prediction), at_least_float32(x_t)
    alpha, sigma = per_sample(alpha, x_t), per_sample(sigma, x_t)
    if prediction_type == "epsilon":
        return (x_t - sigma * prediction) / alpha
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * prediction
    if prediction_type == "flow":
        return x_t - sigma * prediction
    raise ValueError(f"Unknown prediction type {prediction_type!r}; known are epsilon, v_prediction and flow.")


def to_epsilon(
    prediction_type: PredictionType, prediction: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """The noise that a prediction implies, (B, ...).

    v_prediction: sigma x_t + alpha v.  flow: x_t + alpha v.
    """
    prediction, x_t = at_least_float32(prediction), at_least_float32(x_t)
    alpha, sigma = per_sample(alpha, x_t), per_sample(sigma, x_t)
    if prediction_type == "epsilon":
        return prediction
    if prediction_type == "v_prediction":
        return sigma * x_t + alpha * prediction
    if prediction_type == "flow":
        return x_t + alpha * prediction
    raise ValueError(f"Unknown prediction type {prediction_type!r}; known are epsilon, v_prediction and flow.")


def guide(negative: Tensor, positive: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv:2207.12598): negative + scale (positive - negative), float32 or better.

    Args:
        negative: (B, ...) prediction for the negative prompt, usually the empty one.
        positive: (B, ...) prediction for the prompt.
        scale: 1 is the prediction for the prompt alone.
    """
    negative, positive = at_least_float32(negative), at_least_float32(positive)
    return negative + scale * (positive - negative)


def per_sample_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each sample, the mean taken over all its elements: (B, ...) -> (B,), float32 or better.

    Both sides are widened before the subtraction. With the published code's float16 or bfloat16 reference errors,
    policy and reference of equal value differ by up to whole units of the loss's argument.
    """
    return (at_least_float32(prediction) - at_least_float32(target)).square().flatten(1).mean(1)


def repeat_pair(x: Tensor) -> Tensor:
    """(B, ...) -> (2B, ...): the same value for both images of a pair, in the preferred-first layout."""
    return torch.cat([x, x])
