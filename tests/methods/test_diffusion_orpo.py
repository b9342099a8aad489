"""Diffusion-ORPO as a module: one network and one pass, what is logged, what is refused."""

import csv
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig

from lightning_modules.backbones.sd15 import SD15
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.diffusion_orpo import DiffusionORPO
from tests.pairs import RandomPairs

VARIANTS = ("margin", "odds_ratio", "mapo", "reference")


def make_orpo(folder: Path, lora: bool = True, lr: float = 1e-3, **settings) -> DiffusionORPO:
    adapters = LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian") if lora else None
    return DiffusionORPO(
        SD15(str(folder), lora=adapters),
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr),
        validation_draws=2,
        **settings,
    )


def fit(module: DiffusionORPO, folder: Path, **settings) -> list[dict[str, float]]:
    """Train on random pairs; the logged values of every row of metrics.csv."""
    options = {
        "accelerator": "cpu",
        "max_steps": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
    }
    trainer = pl.Trainer(**(options | settings), logger=CSVLogger(folder, flush_logs_every_n_steps=1))
    trainer.fit(module, datamodule=RandomPairs())
    with open(Path(trainer.log_dir) / "metrics.csv", newline="") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(11, verbose=False)


@pytest.mark.parametrize("lora", [True, False])
def test_a_step_is_one_pass_of_one_network(sd15, tmp_path, lora, monkeypatch):
    module = make_orpo(sd15, lora)
    module.backbone.load()
    passes = []
    predict = module.backbone.predict
    monkeypatch.setattr(module.backbone, "predict", lambda *args: passes.append(len(args[0])) or predict(*args))
    monkeypatch.setattr(module.backbone, "reference", lambda: pytest.fail("the reference was asked for"))
    fit(module, tmp_path)
    assert passes == [4, 4]  # two steps, two pairs each
    assert not hasattr(module.backbone, "reference_denoiser")
    assert not module.keep_reference


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_its_float32_weights(sd15, tmp_path, variant, precision):
    module = make_orpo(sd15, variant=variant)
    rows = fit(module, tmp_path, precision=precision)
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in rows)
    trained = module.trained_parameters()
    assert all(parameter.dtype == torch.float32 for parameter in trained.values())
    assert any(parameter.abs().sum() > 0 for name, parameter in trained.items() if "lora_B" in name)


def test_what_is_logged_belongs_together(sd15, tmp_path):
    beta = 0.3
    for row in fit(make_orpo(sd15, beta=beta, scale=50.0), tmp_path):
        assert row["train/loss"] == pytest.approx(row["train/sft"] + row["train/or_term"])
        assert row["train/sft"] == pytest.approx(row["train/error_preferred"])
        assert row["train/margin"] == pytest.approx(
            row["train/error_rejected"] - row["train/error_preferred"], rel=1e-4
        )
        assert row["train/log_odds"] == pytest.approx(50 * row["train/margin"], rel=1e-4)
        assert row["train/reward_preferred"] == pytest.approx(-beta * row["train/error_preferred"])
        assert row["train/reward_rejected"] == pytest.approx(-beta * row["train/error_rejected"])
        assert row["train/accuracy"] in (0.0, 0.5, 1.0)
        assert sum(row[f"train/margin_quarter_{q}"] for q in (1, 2, 3, 4)) == pytest.approx(row["train/margin"])


def test_accumulating_two_batches_logs_their_mean(sd15, tmp_path):
    single = fit(make_orpo(sd15, lr=0.0), tmp_path / "single")
    double = fit(make_orpo(sd15, lr=0.0), tmp_path / "double", max_steps=1, accumulate_grad_batches=2)
    for column in ("loss", "sft", "or_term", "margin", "accuracy", "margin_quarter_1"):
        mean = (single[0][f"train/{column}"] + single[1][f"train/{column}"]) / 2
        assert double[0][f"train/{column}"] == pytest.approx(mean, rel=1e-5, abs=1e-9)


def test_validation_logs_the_classifier_and_leaves_training_as_it_was(sd15, tmp_path):
    without = fit(make_orpo(sd15), tmp_path / "without")
    rows = fit(make_orpo(sd15), tmp_path / "with", limit_val_batches=2, val_check_interval=1)
    assert [row for row in rows if "train/loss" in row] == without
    validated = [row for row in rows if "val/loss" in row]
    assert len(validated) == 2
    for row in validated:
        assert row["val/accuracy"] in (0.0, 0.25, 0.5, 0.75, 1.0)
        assert row["val/loss"] > 0
        assert abs(row["val/margin"]) < 1


def test_an_image_against_itself_has_no_margin(sd15):
    """Both images of a pair see the same noise at the same timestep."""
    module = make_orpo(sd15)
    module.backbone.load()
    latents = torch.randn(3, 4, 8, 8)
    prompts = module.backbone.encode_prompts(["a", "b", "c"])
    error, t = module.denoising_errors(torch.cat([latents, latents]), prompts.cat([prompts, prompts]))
    preferred, rejected = error.chunk(2)
    torch.testing.assert_close(preferred, rejected)
    assert t.shape == (3,)
    assert len(set(preferred.tolist())) == 3


@pytest.mark.parametrize("number", [1, 3])
def test_cached_moments_and_embeddings_train_as_pixels_do(sd15, tmp_path, number):
    module = make_orpo(sd15, prompt_dropout=0.5)
    module.backbone.load()
    module.log_window = lambda metrics: None
    batch = RandomPairs(batch_size=number).make_batch(0)
    embeddings = {prompt: dict(module.backbone.encode_prompts([prompt])) for prompt in {*batch["prompts"], ""}}
    cached = batch | {"moments": module.backbone.encode_moments(batch["images"]), "embeddings": embeddings}
    del cached["images"]
    losses = []
    for data in (batch, cached):
        torch.manual_seed(0)
        losses.append(module.training_step(data, 0))
    torch.testing.assert_close(losses[1], losses[0])


def test_a_pair_of_weight_zero_teaches_nothing(sd15):
    module = make_orpo(sd15)
    module.backbone.load()
    module.log_window = lambda metrics: None
    batch = RandomPairs(batch_size=2).make_batch(0) | {"weight": torch.zeros(2)}
    loss = module.training_step(batch, 0)
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in module.trained_parameters().values())


@pytest.mark.parametrize("family", [SD15, SDXL])
def test_a_bf16_run_can_draw_its_images(family, request):
    """The published script stops at its last images: bfloat16 latents meet a float32 VAE."""
    backbone = family(str(request.getfixturevalue(family.__name__.lower())), num_inference_steps=2)
    backbone.load(torch.bfloat16)
    images = backbone.generate(["a ring", "a cross"], seeds=[0, 0])
    assert images.shape == (2, 3, 16, 16)
    assert torch.isfinite(images).all()


@pytest.mark.parametrize(
    ("variant", "option", "value"),
    [
        ("odds_ratio", "scale", 250.0),
        ("mapo", "scale", 2.0),
        ("reference", "scale", 2.0),
        ("margin", "mse_floor", 1e-3),
        ("mapo", "mse_floor", 1e-3),
        ("margin", "k", 1.0),
        ("odds_ratio", "t_scale", 1.0),
        ("reference", "rejected_error_limit", 1.0),
    ],
)
def test_an_option_that_the_variant_does_not_read_is_refused(sd15, variant, option, value):
    with pytest.raises(ValueError, match=f"{option} is {value}, but variant: {variant} does not read it"):
        make_orpo(sd15, variant=variant, **{option: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "odds"}, "variant is 'odds'; expected one of margin, odds_ratio, mapo, reference"),
        ({"beta": 0.0}, "beta is 0.0; expected a positive number"),
        ({"beta": float("nan")}, "beta is nan"),
        ({"scale": -1.0}, "scale is -1.0; expected a positive number"),
        ({"variant": "odds_ratio", "mse_floor": 0.0}, "mse_floor is 0.0"),
        ({"variant": "mapo", "k": 0.0}, "k is 0.0"),
        ({"rejected_error_limit": 0.0}, "rejected_error_limit is 0.0"),
        ({"prompt_dropout": 1.5}, "prompt_dropout is 1.5"),
        ({"validation_draws": 0}, "validation_draws is 0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
    ],
)
def test_impossible_options_are_refused(sd15, settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionORPO(SD15(str(sd15)), **settings)
