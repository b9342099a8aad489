"""The shared life cycle: learning rate, randomness, small checkpoints and what they refuse, resume."""

import csv
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig

from lightning_modules.backbones.sd15 import SD15
from lightning_modules.base import batch_seed, scaled_learning_rate, warmup_factor
from lightning_modules.diffusion_dpo import DiffusionDPO
from lightning_modules.diffusion_sft import DiffusionSFT
from tests.golden_cases import assert_golden, load_case
from tests.pairs import RandomPairs


def make_dpo(folder: Path, lora: bool = True, lr: float = 1e-3, **settings) -> DiffusionDPO:
    adapters = LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian") if lora else None
    backbone = SD15(str(folder), lora=adapters, num_inference_steps=2)
    return DiffusionDPO(backbone, beta=2000.0, optimizer=lambda p: torch.optim.AdamW(p, lr=lr), **settings)


def make_trainer(folder: Path, **settings) -> pl.Trainer:
    options = {
        "accelerator": "cpu",
        "max_steps": 4,
        "log_every_n_steps": 1,
        "logger": CSVLogger(folder, flush_logs_every_n_steps=1),
        "callbacks": [ModelCheckpoint(every_n_train_steps=1, save_top_k=-1, filename="{step}")],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
    }
    return pl.Trainer(**(options | settings))


def metrics(trainer: pl.Trainer, column: str = "train/loss") -> dict[int, float]:
    with open(Path(trainer.log_dir) / "metrics.csv", newline="") as file:
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row[column]}


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(11, verbose=False)


def test_golden_warmup():
    tensors, params = load_case("diffusion_dpo", "lr_warmup")
    lr = [params["lr"] * warmup_factor(k, params["warmup_steps"], from_zero=True) for k in range(params["total_steps"])]
    rows = torch.tensor(lr, dtype=torch.float64).expand(len(tensors["world_sizes"]), -1)
    assert_golden("diffusion_dpo", "lr_warmup", lr_per_step=rows)


def test_warmup_does_not_waste_its_first_step():
    assert [warmup_factor(k, 4) for k in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup_factor(0, 0) == 1.0


def test_golden_learning_rate_scaling():
    tensors, _ = load_case("diffusion_dpo", "lr_scaling")
    pairs = tensors["grad_accum"] * tensors["batch"] * tensors["world_size"]
    rates = [scaled_learning_rate(lr, n) for lr, n in zip(tensors["base_lr"].tolist(), pairs.tolist(), strict=True)]
    scaled = torch.tensor(rates, dtype=torch.float64)
    assert_golden("diffusion_dpo", "lr_scaling", effective_pairs=pairs, scaled_lr=scaled)


def test_scale_lr_and_warmup_reach_the_optimizer(sd15, tmp_path):
    module = make_dpo(sd15, lr=1e-6, scale_lr=True, warmup_steps=2)
    rates = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    trainer = make_trainer(tmp_path, max_steps=3, accumulate_grad_batches=2, callbacks=[Watch()])
    trainer.fit(module, datamodule=RandomPairs(batch_size=3))
    assert rates == pytest.approx([3e-6, 6e-6, 6e-6])  # 1e-6 x 3 pairs x 2 micro-steps x 1 device, half at first


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_a_schedule_begins_after_the_warmup(sd15, tmp_path, warmup_steps):
    rates = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    def cosine(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)

    module = make_dpo(sd15, lr=1e-6, warmup_steps=warmup_steps, lr_scheduler=cosine)
    make_trainer(tmp_path, max_steps=warmup_steps + 4, callbacks=[Watch()]).fit(module, datamodule=RandomPairs())
    expected = [0.5e-6, 1e-6][:warmup_steps] + [1e-6 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]
    assert rates == pytest.approx(expected)


def test_batch_seeds_differ_between_stages_seeds_and_positions():
    seeds = {batch_seed(seed, stage, k) for seed in range(3) for stage in ("train", "validate") for k in range(50)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("lora", [True, False])
def test_loss_starts_at_log_two(sd15, tmp_path, lora):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(make_dpo(sd15, lora), datamodule=RandomPairs())
    assert metrics(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("precision", ["bf16-mixed"])
def test_loss_starts_at_log_two_in_half_precision_too(sd15, tmp_path, lora, precision):
    trainer = make_trainer(tmp_path, max_steps=2, precision=precision)
    trainer.fit(make_dpo(sd15, lora), datamodule=RandomPairs())
    losses = metrics(trainer)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[1] != losses[0]


@pytest.mark.parametrize("lora", [True, False])
def test_checkpoint_holds_the_trained_weights_only(sd15, tmp_path, lora):
    module = make_dpo(sd15, lora)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, datamodule=RandomPairs())
    checkpoint = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert set(checkpoint["state_dict"]) == set(module.trained_parameters())
    assert all(("lora_" in name) == lora for name in checkpoint["state_dict"])
    assert not any("reference" in name or "vae" in name for name in checkpoint["state_dict"])


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_equals_the_uninterrupted_one(sd15, tmp_path, lora, accumulate):
    whole = make_trainer(tmp_path / "whole", accumulate_grad_batches=accumulate)
    module = make_dpo(sd15, lora, warmup_steps=3)
    whole.fit(module, datamodule=RandomPairs())
    expected = {name: parameter.detach().clone() for name, parameter in module.trained_parameters().items()}

    for step in (1, 3):
        checkpoint = Path(whole.checkpoint_callback.dirpath) / f"step={step}.ckpt"
        resumed = make_trainer(tmp_path / f"from_{step}", accumulate_grad_batches=accumulate)
        module = make_dpo(sd15, lora, warmup_steps=3)
        resumed.fit(module, datamodule=RandomPairs(), ckpt_path=checkpoint, weights_only=True)
        assert resumed.global_step == 4
        for name, parameter in module.trained_parameters().items():
            assert torch.equal(parameter, expected[name]), name
        after = metrics(resumed)
        assert after == {k: v for k, v in metrics(whole).items() if k >= step}
        assert len(after) == 4 - step


def test_checkpoint_inside_an_accumulation_window_resumes_exactly(sd15, tmp_path):
    whole = make_trainer(tmp_path / "whole", accumulate_grad_batches=3, max_steps=2)
    module = make_dpo(sd15)
    whole.fit(module, datamodule=RandomPairs())

    class SaveInside(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:  # the second micro-batch of the second window
                trainer.save_checkpoint(tmp_path / "inside.ckpt")
                trainer.should_stop = True

    stopped = make_trainer(tmp_path / "stopped", accumulate_grad_batches=3, max_steps=2, callbacks=[SaveInside()])
    stopped.fit(make_dpo(sd15), datamodule=RandomPairs())
    resumed = make_trainer(tmp_path / "resumed", accumulate_grad_batches=3, max_steps=2)
    again = make_dpo(sd15)
    resumed.fit(again, datamodule=RandomPairs(), ckpt_path=tmp_path / "inside.ckpt", weights_only=True)
    assert resumed.global_step == 2
    assert metrics(resumed) == {1: metrics(whole)[1]}
    for name, parameter in again.trained_parameters().items():
        assert torch.equal(parameter, module.trained_parameters()[name]), name


def test_validation_that_was_interrupted_is_run_after_resuming(sd15, tmp_path):
    options = {"limit_val_batches": 2, "val_check_interval": 2, "check_val_every_n_epoch": None}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.fit(make_dpo(sd15), datamodule=RandomPairs())
    assert list(metrics(whole, "val/loss")) == [1, 3]
    for step, expected in ((1, [1, 3]), (2, [1, 3]), (3, [3])):
        checkpoint = Path(whole.checkpoint_callback.dirpath) / f"step={step}.ckpt"
        resumed = make_trainer(tmp_path / f"from_{step}", **options)
        resumed.fit(make_dpo(sd15), datamodule=RandomPairs(), ckpt_path=checkpoint, weights_only=True)
        assert metrics(resumed, "val/loss") == {at: metrics(whole, "val/loss")[at] for at in expected}
        assert metrics(resumed) == {k: v for k, v in metrics(whole).items() if k >= step}


def test_changed_learning_rate_is_honoured_on_resume(sd15, tmp_path):
    first = make_trainer(tmp_path / "a", max_steps=1)
    first.fit(make_dpo(sd15, lr=1e-3), datamodule=RandomPairs())
    resumed = make_trainer(tmp_path / "b", max_steps=2)
    resumed.fit(make_dpo(sd15, lr=5e-5), datamodule=RandomPairs(), ckpt_path=first.checkpoint_callback.best_model_path)
    assert resumed.optimizers[0].param_groups[0]["lr"] == pytest.approx(5e-5)


def test_resume_continues_with_the_seed_of_the_checkpoint(sd15, tmp_path):
    first = make_trainer(tmp_path / "a", max_steps=1)
    first.fit(make_dpo(sd15), datamodule=RandomPairs())
    pl.seed_everything(12, verbose=False)
    module = make_dpo(sd15)
    with pytest.warns(UserWarning, match="continues with the checkpoint's seed"):
        make_trainer(tmp_path / "b", max_steps=2).fit(
            module, datamodule=RandomPairs(), ckpt_path=first.checkpoint_callback.best_model_path
        )
    assert module.run_seed == 11


def test_checkpoint_of_another_model_is_refused(sd15, tmp_path):
    first = make_trainer(tmp_path / "a", max_steps=1)
    first.fit(make_dpo(sd15, lora=False), datamodule=RandomPairs())
    with pytest.raises(ValueError, match="belongs to another model: it was written by DiffusionDPO"):
        make_trainer(tmp_path / "b").fit(
            make_dpo(sd15, lora=True), datamodule=RandomPairs(), ckpt_path=first.checkpoint_callback.best_model_path
        )


def test_validation_leaves_training_as_it_was(sd15, tmp_path):
    without = make_trainer(tmp_path / "without")
    without.fit(make_dpo(sd15), datamodule=RandomPairs())
    with_validation = make_trainer(tmp_path / "with", limit_val_batches=2, val_check_interval=1)
    with_validation.fit(make_dpo(sd15, validation_draws=2), datamodule=RandomPairs())
    assert metrics(with_validation) == metrics(without)
    assert len(metrics(with_validation, "val/implicit_accuracy")) > 1


def test_accumulating_two_batches_logs_their_mean(sd15, tmp_path):
    single = make_trainer(tmp_path / "single", max_steps=2)
    single.fit(make_dpo(sd15, lr=0.0), datamodule=RandomPairs())
    double = make_trainer(tmp_path / "double", max_steps=1, accumulate_grad_batches=2)
    double.fit(make_dpo(sd15, lr=0.0), datamodule=RandomPairs())
    for column in ("train/loss", "train/error_preferred", "train/reference_error_rejected"):
        a, b = metrics(single, column), metrics(double, column)
        assert b[0] == pytest.approx((a[0] + a[1]) / 2, rel=1e-6)


def test_precision_that_would_swallow_updates_is_refused(sd15, tmp_path):
    with pytest.raises(ValueError, match="expected one of 32-true, bf16-mixed, 16-mixed"):
        make_trainer(tmp_path, precision="bf16-true").fit(make_dpo(sd15), datamodule=RandomPairs())


def test_a_loss_that_is_not_finite_stops_the_run(sd15, tmp_path):
    module = make_dpo(sd15, lr=1e30)
    with pytest.raises(ValueError, match="training loss is .* at optimizer step"):
        make_trainer(tmp_path, max_steps=20).fit(module, datamodule=RandomPairs())


def test_a_disk_without_room_for_a_checkpoint_stops_the_run(sd15, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_modules.base.available_room", lambda folder: 1000)
    with pytest.raises(ValueError, match="MiB free, but one checkpoint of this run needs"):
        make_trainer(tmp_path).fit(make_dpo(sd15), datamodule=RandomPairs())


def test_sft_trains_on_the_images_it_is_given(sd15, tmp_path):
    backbone = SD15(str(sd15), lora=None)
    module = DiffusionSFT(backbone, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), prompt_dropout=0.0)
    trainer = make_trainer(tmp_path, max_steps=40)
    trainer.fit(module, datamodule=RandomPairs(images_only=True))
    losses = list(metrics(trainer).values())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    assert not hasattr(backbone, "reference_denoiser")
