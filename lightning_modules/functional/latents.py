"""From a VAE encoder's output to the latents that a denoiser is trained on."""

from torch import Tensor


def sample_posterior(
    mean: Tensor, logvar: Tensor, noise: Tensor, scaling_factor: float, shift_factor: float = 0.0
) -> Tensor:
    """z = (mean + exp(logvar / 2) noise - shift) * scale, the log-variance clamped to [-30, 20] as in diffusers.

    Args:
        mean: (B, C, h, w) float32.
        logvar: (B, C, h, w) float32, before the clamp.
        noise: (B, C, h, w) standard normal, drawn independently for the two images of a pair.
        scaling_factor: Of the VAE's config: 0.18215 for Stable Diffusion 1 and 2, 0.13025 for SDXL.
        shift_factor: Of the VAE's config; 0 before SD3.

    Returns:
        (B, C, h, w) latents.
    """
    return (mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * noise - shift_factor) * scaling_factor
