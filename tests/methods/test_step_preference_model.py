"""Training of a step preference model on tiny networks: what is trained, on what, how it resumes, how it is judged."""

import csv
import json
import logging
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from diffusers import AutoencoderTiny
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig
from torch import Tensor

from lightning_modules.backbones.sd15 import SD15
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.functional.noise import guide
from lightning_modules.rewards.base import Reward
from lightning_modules.rewards.step_preference import StepPreference, export, pixels_for_spm
from lightning_modules.step_preference_model import LogarithmicWarmup, StepPreferenceModel, noise_of
from tests.pairs import WeightedPairs
from tests.rewards.tiny import save_hf_clip


class Brightness(Reward):
    """Mean pixel value, many times."""

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return 100 * images.mean((1, 2, 3))


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    save_hf_clip(folder)
    return folder


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(11, verbose=False)


def make(folder: Path, clip: Path, lr: float = 1e-3, family=SD15, **settings) -> StepPreferenceModel:
    backbone = family(str(folder), chunk_size=settings.pop("chunk_size", 3), **settings.pop("backbone", {}))
    optimizer = settings.pop("optimizer", lambda p: torch.optim.AdamW(p, lr=lr))
    return StepPreferenceModel(backbone, str(clip), str(clip), optimizer=optimizer, **settings)


def fit(module: StepPreferenceModel, folder: Path, data=None, ckpt_path=None, **settings) -> pl.Trainer:
    options = {
        "accelerator": "cpu",
        "max_steps": 4,
        "logger": CSVLogger(folder, name="", version="log", flush_logs_every_n_steps=1),
        "log_every_n_steps": 1,
        "callbacks": [ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")],
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
    }
    trainer = pl.Trainer(**(options | settings))
    trainer.fit(module, datamodule=data or WeightedPairs(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def metrics(folder: Path) -> dict[int, dict[str, str]]:
    with open(folder / "log" / "metrics.csv", newline="") as file:
        return {int(row["step"]): row for row in csv.DictReader(file) if row["train/loss"]}


def weights(module: StepPreferenceModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.trained_parameters().items()}


# -------------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_only_the_clip_is_trained_and_a_checkpoint_holds_it_under_the_official_names(family, clip, tmp_path, request):
    folder = request.getfixturevalue(family)
    module = make(folder, clip, family={"sd15": SD15, "sdxl": SDXL}[family])
    before = {}

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            before.update({name: p.clone() for name, p in pl_module.backbone.named_parameters()})
            assert not pl_module.backbone.unet.training
            assert pl_module.model.training

    trainer = fit(module, tmp_path, max_steps=3, callbacks=[Watch(), ModelCheckpoint(tmp_path, filename="last")])
    assert all(torch.equal(p, before[name]) for name, p in module.backbone.named_parameters())
    assert not any(p.requires_grad for p in module.backbone.parameters())
    trained = module.trained_parameters()
    assert {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]} == set(
        map(id, trained.values())
    )

    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name, _ in module.model.named_parameters()}
    assert checkpoint["limelight"]["pretrained"] == str(folder)
    ignored = set(module._ddp_params_and_buffers_to_ignore)
    everything = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    assert everything - ignored == set(trained)


def test_checkpoint_export_and_reward_agree(sd15, clip, tmp_path):
    module = make(sd15, clip, lr=1e-2)
    fit(module, tmp_path)
    export(str(tmp_path / "step=4.ckpt"), str(tmp_path / "spm.bin"), str(clip))
    images, t = torch.rand(2, 3, 16, 16), torch.tensor([1, 951])
    prompts = ["a red circle", "two green rings"]
    with torch.no_grad():
        pixels = pixels_for_spm(2 * images - 1, "scoring", **module.image_settings)
        text = module.model.encode_text(module.tokenize(prompts))
        expected = module.model.score(module.model.encode_image(pixels, t), text)
    for file in ("step=4.ckpt", "spm.bin"):
        scores = StepPreference(str(tmp_path / file), str(clip), str(clip))(images, prompts, t)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    module = make(sd15, clip, weights=str(tmp_path / "spm.bin"), lr=0.0)
    fit(module, tmp_path / "again", max_steps=1)
    saved = torch.load(tmp_path / "spm.bin", weights_only=True)
    assert all(torch.equal(p, saved[name]) for name, p in weights(module).items())


def test_half_precision_trains_float32_weights(sd15, clip, tmp_path):
    module = make(sd15, clip)
    fit(module, tmp_path, precision="bf16-mixed")
    assert all(p.dtype == torch.float32 for p in module.trained_parameters().values())
    assert module.backbone.unet.mid_block.resnets[0].conv1.weight.dtype == torch.bfloat16
    assert len(metrics(tmp_path)) == 4


# ---------------------------------------------------------------------------------------------- on what it is trained


def started(folder: Path, clip: Path, tmp_path: Path, **settings) -> StepPreferenceModel:
    """A module whose networks are there, and which a trainer knows."""
    module = make(folder, clip, lr=0.0, **settings)
    fit(module, tmp_path, max_steps=1)
    return module


def spy(module: StepPreferenceModel) -> list[tuple]:
    """Everything that the diffusion model is asked from now on."""
    calls, predict = [], module.backbone.predict

    def recording(x_t, t, condition):
        calls.append((x_t, t, condition, predict(x_t, t, condition)))
        return calls[-1][-1]

    module.backbone.predict = recording
    return calls


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_estimates_are_what_the_formulas_say(family, clip, tmp_path, request):
    kind = {"sd15": SD15, "sdxl": SDXL}[family]
    module = started(request.getfixturevalue(family), clip, tmp_path, family=kind, chunk_size=8)
    batch = WeightedPairs().make_batch(0)
    latents, noise, t = torch.randn(4, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([951, 3])
    decoded = []
    decode = module.backbone.decode_latents
    module.backbone.decode_latents = lambda x: decoded.append(x) or decode(x)
    calls = spy(module)
    pixels = module.noised_pixels(batch, latents, noise, t)

    ((x_t, asked, condition, prediction),) = calls
    alpha, sigma = (c.double()[:, None, None, None] for c in module.backbone.coefficients(t))
    expected = torch.cat([alpha * half + sigma * noise for half in latents.chunk(2)])
    torch.testing.assert_close(x_t.double(), torch.cat([expected, expected]), rtol=1e-5, atol=1e-5)
    assert asked.tolist() == [951, 3] * 4  # both images of a pair, negatives and prompts
    negative, positive = condition[:4], condition[4:]
    own = module.backbone.encode_prompts(batch["prompts"])
    assert torch.equal(positive["prompt_embeds"], torch.cat([own["prompt_embeds"]] * 2))
    if family == "sdxl":
        assert not negative["prompt_embeds"].any()
        assert not negative["pooled_prompt_embeds"].any()
        assert torch.equal(negative["time_ids"], positive["time_ids"])
        assert negative["time_ids"].any()
    else:
        empty = module.backbone.encode_prompts([""])["prompt_embeds"]
        torch.testing.assert_close(negative["prompt_embeds"], empty.expand(4, -1, -1))
    guided = guide(*prediction.chunk(2), 5.0).double()
    x0 = (expected - torch.cat([sigma, sigma]) * guided) / torch.cat([alpha, alpha])
    torch.testing.assert_close(decoded[0].double(), x0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pixels, pixels_for_spm(decode(decoded[0]), "training", **module.image_settings))

    module.backbone.chunk_size = 3
    torch.testing.assert_close(module.noised_pixels(batch, latents, noise, t), pixels, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["decoded_noisy", "clean"])
def test_other_inputs_do_not_ask_the_diffusion_model(kind, sd15, clip, tmp_path):
    module = started(sd15, clip, tmp_path, input_kind=kind)
    calls, batch, told = spy(module), WeightedPairs().make_batch(0), []
    encode = module.model.encode_image
    module.model.encode_image = lambda pixels, t: told.append((pixels, t)) or encode(pixels, t)
    module.log_window = lambda metrics: None
    module.training_step(batch, 0)
    ((pixels, t),) = told
    assert not calls
    clean = pixels_for_spm(batch["images"], "training", **module.image_settings)
    assert torch.equal(pixels, clean) == (kind == "clean")
    assert t.any() == (kind != "clean")
    assert torch.equal(t[:2], t[2:])


def test_timesteps_and_time_conditioning_are_what_is_asked_for(sd15, clip, tmp_path):
    module = started(sd15, clip, tmp_path, timesteps=[1, 501])
    assert set(module.draw_timesteps(64).tolist()) == {1, 501}
    told, encode = [], module.model.encode_image
    module.model.encode_image = lambda pixels, t: told.append(t) or encode(pixels, t)
    module.log_window = lambda metrics: None
    module.time_conditioning = False
    module.training_step(WeightedPairs().make_batch(0), 0)
    assert not told[0].any()


def test_cached_moments_and_embeddings_give_the_same_pixels(sd15, clip, tmp_path):
    module = started(sd15, clip, tmp_path)
    batch = WeightedPairs().make_batch(0)
    prompts = [*batch["prompts"], ""]
    cached = {k: v for k, v in batch.items() if k != "images"}
    cached["moments"] = module.backbone.encode_moments(batch["images"])
    cached["embeddings"] = {prompt: dict(module.backbone.encode_prompts([prompt])) for prompt in prompts}
    drawn = []
    for given in (batch, cached):
        torch.manual_seed(0)
        latents = module.backbone.latents(given)
        noise, t = torch.randn(2, 4, 8, 8), torch.tensor([951, 3])
        drawn.append(module.noised_pixels(given, latents, noise, t))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=1e-4, atol=1e-4)
    restored = module.backbone.decode_latents(
        module.backbone.sample_latents(cached["moments"], torch.zeros(4, 4, 8, 8))
    )
    expected = pixels_for_spm(restored, "training", **module.image_settings)
    torch.testing.assert_close(module.clean_pixels(cached), expected)


def test_a_tiny_decoder_takes_the_place_of_the_vaes(sd15, clip, tmp_path):
    settings = {"block_out_channels": (8,) * 2, "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    settings |= {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    settings.pop("block_out_channels")
    AutoencoderTiny(**settings, latent_channels=4).save_pretrained(tmp_path / "taesd")
    module = started(sd15, clip, tmp_path / "a", tiny_decoder=str(tmp_path / "taesd"))
    module.backbone.decode_latents = None
    latents = torch.randn(2, 4, 8, 8)
    assert torch.equal(module.decode(latents), module.tiny.decode(latents).sample)
    assert not any("tiny" in name for name in module.trained_parameters())
    AutoencoderTiny(**settings, latent_channels=16).save_pretrained(tmp_path / "taesd3")
    with pytest.raises(ValueError, match="decodes 16 channels, but the latents have 4"):
        started(sd15, clip, tmp_path / "b", tiny_decoder=str(tmp_path / "taesd3"))


# ------------------------------------------------------------------------------------------------------------- labels


def test_feedback_labels_images_as_stored_or_as_shown(sd15, clip, tmp_path):
    module = started(sd15, clip, tmp_path, feedback=Brightness())
    shown = torch.cat([torch.full((3, 3, 4, 4), v) for v in (0.0, 0.5, 0.5)])
    shown = torch.stack([shown[0] + v for v in (0.0, 0.5, 0.5, 0.5, 0.0, 0.501)])
    batch = {"images": shown, "prompts": ["a"] * 3, "label": torch.ones(3)}
    assert module.labels(batch).tolist() == [0.0, 1.0, 0.5]
    stored = [torch.full((3, 4 + i, 5), v, dtype=torch.uint8) for i, v in enumerate((9, 0, 0, 0, 9, 0))]
    assert module.labels(batch | {"originals": stored}).tolist() == [1.0, 0.0, 0.5]
    module.feedback = None
    assert module.labels(batch).tolist() == [1.0, 1.0, 1.0]


def test_feedback_cannot_judge_cached_images(sd15, clip, tmp_path):
    module = started(sd15, clip, tmp_path, feedback=Brightness())
    with pytest.raises(ValueError, match=r"cache --rewards.*labels_from"):
        module.labels({"moments": torch.zeros(2, 8, 8, 8), "prompts": ["a"], "label": torch.ones(1)})


def test_feedback_is_neither_trained_nor_saved(sd15, clip, tmp_path):
    module = make(sd15, clip, feedback=StepPreference(None, str(clip), str(clip), allow_untrained=True))
    fit(module, tmp_path, max_steps=1)
    assert not any("feedback" in name for name in module.trained_parameters())
    assert not any("feedback" in name for name in torch.load(tmp_path / "step=1.ckpt", weights_only=True)["state_dict"])
    assert not module.feedback.network.training


# ---------------------------------------------------------------------------------------------- optimizer steps, resume


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_weights_are_normalised_over_the_optimizer_step(clip_norm, sd15, clip, tmp_path):
    """Two micro-batches of two rows make the update of one of four: rows of clean images need no random numbers."""
    updates = []
    for size, accumulate in ((4, 1), (2, 2), (1, 4)):
        module = make(sd15, clip, optimizer=sgd, input_kind="clean")
        folder = tmp_path / f"{size}"
        options = {"accumulate_grad_batches": accumulate, "max_steps": 2, "gradient_clip_val": clip_norm}
        fit(module, folder, WeightedPairs(size), **options)
        updates.append(weights(module))
    for other in updates[1:]:
        for name, value in updates[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)
    start = weights(started(sd15, clip, tmp_path / "start"))
    assert any(not torch.allclose(start[name], value, atol=1e-4) for name, value in updates[0].items())


def test_loss_of_a_step_is_the_weighted_mean(sd15, clip, tmp_path):
    module = make(sd15, clip, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), input_kind="clean")
    fit(module, tmp_path, WeightedPairs(6), max_steps=1)
    batch = WeightedPairs(6).make_batch(0)
    with torch.no_grad():
        image, text = module.features(module.clean_pixels(batch), batch["prompts"], torch.zeros(6, dtype=torch.long))
        first, second = module.model.score(image, torch.cat([text, text])).double().chunk(2)
    p = torch.stack([first, second], 1).softmax(1)
    loss = -(batch["label"] * p[:, 0].log() + (1 - batch["label"]) * p[:, 1].log())
    loss = loss + torch.where(batch["label"] == 0.5, torch.tensor(0.5).log(), 0.0)
    expected = (loss * batch["weight"]).sum() / batch["weight"].sum()
    row = metrics(tmp_path)[0]
    assert float(row["train/loss"]) == pytest.approx(expected.item(), rel=1e-5)
    assert float(row["train/weight"]) == pytest.approx(batch["weight"].mean().item(), rel=1e-5)


def test_a_single_pair_and_ties_only_train_too(sd15, clip, tmp_path):
    data = WeightedPairs(1)
    make_batch = data.make_batch
    data.make_batch = lambda k: make_batch(k) | {"label": torch.full((1,), 0.5)}
    module = make(sd15, clip, optimizer=sgd, chunk_size=1)
    fit(module, tmp_path, data, max_steps=3)
    assert all(value.isfinite().all() for value in weights(module).values())
    rows = metrics(tmp_path)
    assert all(float(row["train/loss"]) > 0 and float(row["train/accuracy"]) == 0.5 for row in rows.values())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resumed_run_equals_the_uninterrupted_one(accumulate, sd15, clip, tmp_path):
    options = {"accumulate_grad_batches": accumulate, "gradient_clip_val": 1.0}
    whole = make(sd15, clip, lr_scheduler=lambda o: LogarithmicWarmup(o, 2, 5))
    fit(whole, tmp_path / "whole", **options)
    expected = weights(whole)
    for step in (1, 3):
        again = make(sd15, clip, lr_scheduler=lambda o: LogarithmicWarmup(o, 2, 5))
        fit(again, tmp_path / f"{step}", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt", **options)
        assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())
        assert metrics(tmp_path / f"{step}") == {k: row for k, row in metrics(tmp_path / "whole").items() if k >= step}


def test_checkpoint_inside_an_accumulation_window_resumes_exactly(sd15, clip, tmp_path):
    options = {"accumulate_grad_batches": 3, "max_steps": 2}
    whole = make(sd15, clip, optimizer=sgd)
    fit(whole, tmp_path / "whole", **options)

    class SaveInside(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")
                trainer.should_stop = True

    fit(make(sd15, clip, optimizer=sgd), tmp_path / "stopped", callbacks=[SaveInside()], **options)
    again = make(sd15, clip, optimizer=sgd)
    fit(again, tmp_path / "resumed", ckpt_path=tmp_path / "inside.ckpt", **options)
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(again).items())
    assert metrics(tmp_path / "resumed") == {1: metrics(tmp_path / "whole")[1]}


def test_a_schedule_that_ends_before_the_run_is_refused(sd15, clip, tmp_path):
    module = make(sd15, clip, lr_scheduler=lambda o: LogarithmicWarmup(o, 2, 3))
    with pytest.raises(ValueError, match="max_steps is 4, but the learning rate of .* is 0 after total_steps: 3"):
        fit(module, tmp_path, max_steps=4)


def test_published_schedule_reaches_the_optimizer(sd15, clip, tmp_path):
    rates = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    module = make(sd15, clip, lr=2.0, lr_scheduler=lambda o: LogarithmicWarmup(o, 2, 4), input_kind="clean")
    fit(module, tmp_path, callbacks=[Watch()])
    assert rates == pytest.approx([0.0, 2.0, 2.0, 1.0])  # the first update is not at the full rate


# --------------------------------------------------------------------------------------------------------- validation


def validated(module: StepPreferenceModel, folder: Path, batch_size: int, rows: int = 12) -> dict[str, float]:
    data = WeightedPairs(batch_size)
    data.val_dataloader = lambda: data.loader(12_000 // batch_size)
    trainer = fit(
        module, folder, data, max_steps=1, limit_val_batches=rows // batch_size, val_check_interval=1, callbacks=[]
    )
    return {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def test_accuracy_depends_on_neither_batch_size_nor_seed(sd15, clip, tmp_path):
    results = []
    for seed, size in ((1, 2), (2, 4), (3, 12)):
        pl.seed_everything(seed, verbose=False)
        results.append(validated(make(sd15, clip, lr=0.0), tmp_path / f"{seed}", size))
    assert results[0] == results[1] == results[2]
    result = results[0]
    assert result["val/pairs"] == 12
    each = [result[f"val/accuracy_t{t}"] for t in (0, 251, 501, 701, 951)]
    assert result["val/accuracy"] == pytest.approx(sum(each) / 5)
    assert result["val/standard_error"] == pytest.approx(sum((a * (1 - a) / 12) ** 0.5 for a in each) / 5)
    assert len(set(each)) > 1


def test_accuracy_counts_what_the_scores_say(sd15, clip, tmp_path):
    module = make(sd15, clip, lr=0.0, validation_timesteps=[0])
    result = validated(module, tmp_path, 4)
    correct = 0.0
    with torch.no_grad():
        for batch in (WeightedPairs(1).make_batch(12_000 + i) for i in range(12)):
            pixels = pixels_for_spm(batch["images"], "training", **module.image_settings)
            image, text = module.features(pixels, batch["prompts"], torch.zeros(1, dtype=torch.long))
            first, second = module.model.score(image, torch.cat([text, text])).tolist()
            tie = batch["label"].item() == 0.5
            correct += 0.5 if tie or first == second else float(first > second)
    assert result["val/accuracy"] == pytest.approx(correct / 12)


def test_tied_labels_can_be_left_out(sd15, clip, tmp_path):
    result = validated(make(sd15, clip, lr=0.0, validation_ties="drop", validation_timesteps=[501]), tmp_path, 4)
    assert result["val/pairs"] == 8  # every third row is a tie
    module = make(sd15, clip, lr=0.0, validation_ties="drop", feedback=Brightness())
    module.feedback.score = lambda images, prompts: images.new_zeros(len(images))
    with pytest.raises(ValueError, match="There is no pair to validate on"):
        validated(module, tmp_path / "b", 4)


def test_equal_scores_count_as_ties(sd15, clip, tmp_path):
    module = make(sd15, clip, lr=0.0)
    data = WeightedPairs(2)
    make_batch = data.make_batch

    def twins(k):
        batch = make_batch(k)
        return batch | {"images": torch.cat([batch["images"][:2]] * 2), "ids": batch["ids"]}

    data.make_batch = twins
    module.validation_timesteps = (0,)
    trainer = fit(module, tmp_path, data, max_steps=1, limit_val_batches=2, val_check_interval=1, callbacks=[])
    assert trainer.callback_metrics["val/accuracy"] == 0.5
    assert trainer.callback_metrics["val/equal_scores"] == 1.0


def test_noise_belongs_to_a_pair_and_a_purpose():
    like = torch.zeros(9, 4, 8, 8)
    noise = noise_of(["a", "b"], "noise 251", like)
    assert noise.shape == (2, 4, 8, 8)
    assert torch.equal(noise[1], noise_of(["b"], "noise 251", like)[0])
    assert not torch.equal(noise[1], noise_of(["b"], "noise 501", like)[0])
    assert noise.std() == pytest.approx(1.0, abs=0.1)


def test_validation_leaves_training_as_it_was(sd15, clip, tmp_path):
    plain = make(sd15, clip)
    fit(plain, tmp_path / "plain")
    watched = make(sd15, clip)
    fit(watched, tmp_path / "watched", limit_val_batches=2, val_check_interval=1)
    assert all(torch.equal(value, weights(watched)[name]) for name, value in weights(plain).items())


def test_best_checkpoint_is_the_most_accurate_one(sd15, clip, tmp_path):
    best = ModelCheckpoint(tmp_path, monitor="val/accuracy", mode="max", filename="best")
    module = make(sd15, clip, lr=1e-2)
    trainer = fit(module, tmp_path, max_steps=6, limit_val_batches=4, val_check_interval=2, callbacks=[best])
    with open(tmp_path / "log" / "metrics.csv", newline="") as file:
        seen = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]]
    assert len(seen) == 3
    assert trainer.checkpoint_callback.best_model_score.item() == pytest.approx(max(seen))


# --------------------------------------------------------------------------------------------------------- bad inputs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clip": "./gone"}, "model.clip: there is no folder './gone'"),
        ({"processor": "./gone"}, "model.processor: there is no folder './gone'"),
        ({"weights": "gone.bin"}, "model.weights: there is no file 'gone.bin'"),
        ({"tiny_decoder": "./gone"}, "model.tiny_decoder: there is no folder './gone'"),
        ({"feedback_threshold": 1.5}, r"feedback_threshold is 1.5; expected a difference of probabilities"),
        ({"input_kind": "noisy"}, "expected x0_estimate, decoded_noisy or clean"),
        ({"validation_ties": "keep"}, "expected half or drop"),
        ({"validation_timesteps": []}, "validation_timesteps is \\[\\]; expected different timesteps"),
        ({"validation_timesteps": [1, 1]}, "expected different timesteps"),
        ({"timesteps": [-1]}, "timesteps is \\[-1\\]; expected different timesteps, 0 or more"),
        ({"warmup_steps": -1}, "expected 0 or more optimizer steps"),
    ],
)
def test_wrong_settings_are_told_at_once(settings, message, sd15, clip):
    options = {"clip": str(clip), "processor": str(clip)} | settings
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        StepPreferenceModel(SD15(str(sd15)), **options)


def test_adapters_are_refused(sd15, clip):
    with pytest.raises(ValueError, match="the diffusion model stays as it is here"):
        StepPreferenceModel(SD15(str(sd15), lora=LoraConfig(r=2)), str(clip), str(clip))


def test_single_images_are_refused(sd15, clip, tmp_path):
    data = WeightedPairs()
    data.preferred_only = True
    with pytest.raises(ValueError, match=r"data\.init_args\.preferred_only gives only the preferred ones"):
        fit(make(sd15, clip), tmp_path, data)


def test_timesteps_beyond_the_schedule_are_refused(sd15, clip, tmp_path):
    with pytest.raises(ValueError, match=r"validation_timesteps goes to 1000, but the schedule .* ends at 999"):
        fit(make(sd15, clip, validation_timesteps=[1000]), tmp_path)


def test_a_clip_of_another_size_is_told(sd15, clip, tmp_path):
    save_hf_clip(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["vision_config"]["hidden_size"] = 48
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model.clip: the weights in .* do not fit the network"):
        fit(make(sd15, tmp_path / "other"), tmp_path)


def test_checkpoint_of_another_clip_is_refused(sd15, clip, tmp_path):
    fit(make(sd15, clip), tmp_path, max_steps=1)
    module = make(sd15, clip)
    save_hf_clip(tmp_path / "deeper")
    checkpoint = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    about = checkpoint["limelight"]
    about["trained"] = {name: shape for name, shape in about["trained"].items() if ".layers.1." not in name}
    torch.save(checkpoint, tmp_path / "shallow.ckpt")
    with pytest.raises(ValueError, match="belongs to another model: it was written by StepPreferenceModel"):
        fit(module, tmp_path / "b", ckpt_path=tmp_path / "shallow.ckpt")


def test_it_makes_no_images(sd15, clip, tmp_path):
    module = started(sd15, clip, tmp_path)
    with pytest.raises(ValueError, match="makes no images to test"):
        module.on_test_start()
    with pytest.raises(ValueError, match="makes no images"):
        module.predict_step({}, 0)


def test_reward_of_a_run_says_for_which_model_it_is(sd15, clip, tmp_path, caplog):
    fit(make(sd15, clip), tmp_path, max_steps=1)
    with caplog.at_level(logging.INFO):
        StepPreference(str(tmp_path / "step=1.ckpt"), str(clip), str(clip)).load()
    assert f"was trained on what {sd15} makes" in caplog.text
