"""Exponential moving average of the trained weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn


class EMA(Callback):
    """Keeps an exponential moving average of the trained weights and puts it in their place whenever they are judged.

    The average acts during validation, test and prediction, while samples are drawn, and from the end of the fit on, so
    that exports hold it. Frozen weights are never copied: with adapters the average is as small as they are.
    Checkpoints hold the weights and the average, and a resumed run repeats the uninterrupted one exactly. In a YAML,
    name it before the callbacks that export or draw.

    Args:
        decay: Share of the old average that an optimizer step keeps, in [0, 1). During the first steps it is smaller,
            (1 + n) / (10 + n) after n steps, so that the random start is soon forgotten.
    """

    def __init__(self, decay: float = 0.995) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA: decay is {decay}; expected a number in [0, 1), for example 0.995.")
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._set_aside: dict[str, Tensor] = {}  # the trained weights while the average is in their place
        self._seen_step = 0

    # ------------------------------------------------------------------------------------------------- averaging

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_weights_back(pl_module)
        weights = _trained(pl_module)
        if not self.average:
            self.average = {name: weight.detach().clone() for name, weight in weights.items()}
        self.average = {name: tensor.to(weights[name].device) for name, tensor in self.average.items()}
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._seen_step:  # inside an accumulation window
            return
        self._seen_step = trainer.global_step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = _trained(pl_module)
        torch._foreach_lerp_(
            [self.average[name] for name in weights], [weight.detach() for weight in weights.values()], 1 - decay
        )

    # -------------------------------------------------------------------------------------------- taking the place

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_average_in_place(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._put_weights_back(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_average_in_place(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_average_in_place(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._put_average_in_place(pl_module)

    @torch.no_grad()
    def _put_average_in_place(self, pl_module: LightningModule) -> None:
        if self._set_aside or not self.average:
            return
        for name, weight in _trained(pl_module).items():
            self._set_aside[name] = weight.detach().clone()
            weight.copy_(self.average[name])

    @torch.no_grad()
    def _put_weights_back(self, pl_module: LightningModule) -> None:
        for name, weight in _trained(pl_module).items():
            if name in self._set_aside:
                weight.copy_(self._set_aside[name])
        self._set_aside = {}

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": self.average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.updates = state_dict["updates"]
        self.average = state_dict["average"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A checkpoint written while the average is in place, at the end of a validation say, keeps the trained weights.
        checkpoint["state_dict"].update(self._set_aside)


def _trained(pl_module: LightningModule) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in pl_module.named_parameters() if weight.requires_grad}


@contextmanager
def average_acts(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Inside, the run's average acts as in a validation, where the run keeps one."""
    averages = [callback for callback in trainer.callbacks if isinstance(callback, EMA) and not callback._set_aside]
    for callback in averages:
        callback._put_average_in_place(pl_module)
    try:
        yield
    finally:
        for callback in averages:
            callback._put_weights_back(pl_module)
