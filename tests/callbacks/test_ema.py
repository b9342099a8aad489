"""The moving average of the trained weights: its values, where it acts, and exact resume."""

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from callbacks.ema import EMA


class Slope(LightningModule):
    """One trained weight that every step lowers by exactly 1, and one frozen weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.0]))
        self.frozen = nn.Parameter(torch.tensor([7.0]), requires_grad=False)
        self.seen = {"validate": [], "test": [], "train": []}

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=1.0)

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(self.weight.item())
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.seen["validate"].append(self.weight.item())

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(self.weight.item())


def fit(folder, ema, max_steps, ckpt_path=None, **options):
    module = Slope()
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ema],
        **options,
    )
    data = DataLoader(torch.zeros(100))
    trainer.fit(
        module, data, DataLoader(torch.zeros(1)) if "val_check_interval" in options else None, ckpt_path=ckpt_path
    )
    return trainer, module


def test_the_average_follows_its_formula(tmp_path):
    # Weights -1, -2, -3; decays 2/11, 3/12, 4/13, all below 0.9.
    _, module = fit(tmp_path, ema := EMA(decay=0.9), max_steps=3)
    first = 2 / 11 * 0 + 9 / 11 * -1
    second = 3 / 12 * first + 9 / 12 * -2
    third = 4 / 13 * second + 9 / 13 * -3
    assert ema.average["weight"].item() == pytest.approx(third)
    assert module.weight.item() == pytest.approx(third)  # in place after the fit


def test_the_decay_bounds_the_memory(tmp_path):
    _, module = fit(tmp_path, EMA(decay=0.0), max_steps=4)
    assert module.weight.item() == -4.0


def test_only_trained_weights_are_copied(tmp_path):
    fit(tmp_path, ema := EMA(), max_steps=1)
    assert list(ema.average) == ["weight"]


def test_accumulated_batches_count_as_one_update(tmp_path):
    fit(tmp_path, ema := EMA(), max_steps=2, accumulate_grad_batches=3)
    assert ema.updates == 2


def test_validation_and_test_see_the_average_and_training_does_not(tmp_path):
    trainer, module = fit(tmp_path, ema := EMA(), max_steps=4, val_check_interval=2, num_sanity_val_steps=0)
    assert module.seen["train"] == [0.0, -1.0, -2.0, -3.0]
    after_two = 3 / 12 * (9 / 11 * -1) + 9 / 12 * -2
    assert module.seen["validate"][0] == pytest.approx(after_two)
    trainer.test(module, DataLoader(torch.zeros(1)), verbose=False)
    assert module.seen["test"] == [pytest.approx(ema.average["weight"].item())]


def test_resume_repeats_the_uninterrupted_run_exactly(tmp_path):
    _, whole = fit(tmp_path, whole_ema := EMA(), max_steps=7)
    trainer, _ = fit(tmp_path, EMA(), max_steps=4)  # saved after the fit, with the average in place
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    _, resumed = fit(tmp_path, resumed_ema := EMA(), max_steps=7, ckpt_path=tmp_path / "four.ckpt")
    assert resumed.seen["train"] == whole.seen["train"][4:]
    assert torch.equal(resumed_ema.average["weight"], whole_ema.average["weight"])
    assert resumed_ema.updates == 7


def test_a_fresh_process_tests_the_average_of_a_checkpoint(tmp_path):
    trainer, _ = fit(tmp_path, ema := EMA(), max_steps=4)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    module = Slope()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    tester = Trainer(default_root_dir=tmp_path, callbacks=[EMA()], **options)
    tester.test(module, DataLoader(torch.zeros(1)), ckpt_path=tmp_path / "four.ckpt", verbose=False)
    assert module.seen["test"] == [pytest.approx(ema.average["weight"].item())]


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_that_is_no_average_is_refused(decay):
    with pytest.raises(ValueError, match="expected a number in"):
        EMA(decay=decay)
