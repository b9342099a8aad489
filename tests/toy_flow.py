"""The shipped toy model as a flow, without training: the same network, asked at the same signal-to-noise ratio."""

import torch
from torch import Tensor

from lightning_modules.backbones.base import Conditioning
from lightning_modules.backbones.sd3 import shift_noise_level
from lightning_modules.backbones.sd15 import SD15


class ToyFlow(SD15):
    """SD15 whose latents are (1 - s) x_0 + s eps, timesteps 1000 s, and whose prediction is eps - x_0.

    Images are still made by the pipeline of the ordinary model, whose weights these are.

    Args:
        shift: Of the sampling steps, as SD 3's.
    """

    def __init__(self, pretrained: str, shift: float = 1.0, **settings) -> None:
        super().__init__(pretrained, **settings)
        self.shift = shift

    def _after_load(self) -> None:
        super()._after_load()
        self.prediction_type = "flow"

    def time_grid(self, num_steps: int) -> Tensor:
        s = shift_noise_level(torch.linspace(1, 0.001, num_steps), self.shift)
        return (1000 * torch.cat([s, torch.zeros(1)])).to(self.device)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - t / 1000, t / 1000

    def predict(self, x_t: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        known = (self.sigmas / self.alphas).log()  # rising with the ordinary timestep
        s = (t / 1000).double()
        ratio = (s / (1 - s)).log().clamp(known[0].item(), known[-1].item()).to(known.dtype)
        after = torch.searchsorted(known, ratio).clamp(1, len(known) - 1)
        part = (ratio - known[after - 1]) / (known[after] - known[after - 1])
        alpha = (1 + (2 * ratio).exp()).rsqrt()
        sigma = ratio.exp() * alpha
        # (1 - s) x_0 + s eps, made alpha x_0 + sigma eps
        x = x_t * (sigma / s.to(sigma.dtype))[:, None, None, None]
        epsilon = super().predict(x, after - 1 + part, condition).float()
        x_0 = (x - sigma[:, None, None, None] * epsilon) / alpha[:, None, None, None]
        return epsilon - x_0
