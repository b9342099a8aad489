"""Rewards as metrics: over batches, over two ranks, and logged by Lightning."""

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_modules.rewards.base import Reward
from lightning_modules.rewards.metric import RewardMetric


class Redness(Reward):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.weight * images[:, 0].mean(dim=(1, 2))


class Undefined(Reward):
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor([0.0, float("nan")])


def images(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, 2, 2)


def test_mean_weighs_images_not_batches():
    metric = RewardMetric(Redness())
    metric.update(images(0.1, 0.2, 0.3), ["a"] * 3)
    metric.update(images(1.0), ["a"])
    assert metric.compute().item() == pytest.approx(0.4)
    metric.reset()
    metric.update(images(0.5), ["a"])
    assert metric.compute().item() == pytest.approx(0.5)


def test_win_rate_counts_a_tie_as_half():
    metric = RewardMetric(Redness(), "win_rate")
    metric.update(images(0.25, 0.5, 0.75), ["a"] * 3, torch.tensor([0.5, 0.5, 0.5]))
    metric.update(images(1.0), ["a"], torch.tensor([0.5]))
    assert metric.compute().item() == pytest.approx((0 + 0.5 + 1 + 1) / 4)


def test_weights_of_the_reward_stay_out_of_state_dicts():
    assert not list(torch.nn.ModuleDict({"metric": RewardMetric(Redness())}).state_dict())


def test_batch_value_is_returned_and_scored_once():
    reward, calls = Redness(), []
    metric = RewardMetric(reward)
    reward.register_forward_hook(lambda *_: calls.append(1))
    assert metric(images(0.5), ["a"]).item() == pytest.approx(0.5)
    assert metric(images(1.0), ["a"]).item() == pytest.approx(1.0)
    assert metric.compute().item() == pytest.approx(0.75)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("update", "message"),
    [
        (lambda: RewardMetric(Redness(), "median"), "statistic is 'median'; expected mean or win_rate"),
        (lambda: RewardMetric(Undefined()).update(images(0.1, 0.2), ["a"] * 2), "score 1 of the images is nan"),
        (lambda: RewardMetric(Redness(), "win_rate").update(images(0.1), ["a"]), "needs the baseline's scores"),
        (
            lambda: RewardMetric(Redness(), "win_rate").update(images(0.1), ["a"], torch.zeros(2)),
            r"of the baseline have shape \(2,\); expected \(1,\)",
        ),
        (
            lambda: RewardMetric(Redness(), "win_rate").update(images(0.1), ["a"], torch.tensor([float("inf")])),
            "score 0 of the baseline is inf",
        ),
    ],
)
def test_what_would_spoil_a_mean_is_named(update, message):
    with pytest.raises(ValueError, match=message):
        update()


class Logs(pl.LightningModule):
    """Validates 7 images, the i-th of redness i / 10, against a baseline of 0.3."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.win_rate = RewardMetric(Redness()), RewardMetric(Redness(), "win_rate")

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        prompts = ["a"] * len(batch)
        self.mean.update(images(*batch.tolist()), prompts)
        self.win_rate.update(images(*batch.tolist()), prompts, torch.full_like(batch, 0.3))
        self.log("val/red", self.mean)
        self.log("val/red_win_rate", self.win_rate)


def validate(devices: int) -> dict[str, float]:
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    values = torch.arange(7) / 10 if devices == 1 else torch.arange(8) / 10
    trainer.validate(Logs(), DataLoader(values, batch_size=2), verbose=False)
    return {name: round(value.item(), 6) for name, value in trainer.callback_metrics.items()}


def test_lightning_logs_it():
    assert validate(1) == {"val/red": 0.3, "val/red_win_rate": 0.5}


def test_two_ranks_log_what_all_images_give():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.rewards.test_metric"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("{'val/red': 0.35, 'val/red_win_rate': 0.5625}") == 2


if __name__ == "__main__":
    print(validate(2), flush=True)
    torch.distributed.destroy_process_group()
