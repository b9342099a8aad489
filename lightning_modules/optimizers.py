"""Optimizers of packages that need not be installed, in a form that every machine can read in a recipe."""

from collections.abc import Iterable

from torch import nn
from torch.optim import Optimizer


class AdamW8bit(Optimizer):
    """AdamW of bitsandbytes with moments in 8 bits: 6 bytes less per trained weight than torch's.

    bitsandbytes and a CUDA GPU are needed when it is built, not before.

    Args:
        params: The trained parameters.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
    """

    def __new__(
        cls,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> Optimizer:
        """An optimizer of the class in bitsandbytes."""
        from bitsandbytes import optim

        return optim.AdamW8bit(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
