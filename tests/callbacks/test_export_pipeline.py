"""ExportPipeline: what it writes opens in diffusers and is the trained model; a bad export never takes its place."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from callbacks.ema import EMA
from callbacks.export_pipeline import ExportPipeline, check_export, denoiser_call
from lightning_modules.backbones.base import Backbone
from lightning_modules.backbones.sd15 import SD15
from tests.callbacks.runs import PROMPTS, Data, make_module, make_trainer

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(5, verbose=False)


def images_of(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)]
    return pipeline(PROMPTS, generator=generators, num_inference_steps=2, output_type="pt").images


def exported(base: Path, export: Path, lora: bool) -> torch.Tensor:
    """Images of an export, opened as the page of diffusers says."""
    if not lora:
        return images_of(StableDiffusionPipeline.from_pretrained(export))
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(export)
    return images_of(pipeline)


@pytest.mark.parametrize("model", ["sd15", "sd21"])
@pytest.mark.parametrize("lora", [True, False])
def test_diffusers_draws_the_same_images_from_the_export(model, lora, tmp_path, request):
    base = request.getfixturevalue(model)
    module = make_module(base, lora, lr=0.1)
    trainer = make_trainer(tmp_path, [ExportPipeline()], max_steps=2)
    trainer.fit(module, datamodule=Data())

    export = Path(trainer.log_dir) / "export"
    assert (export / (LORA if lora else "model_index.json")).is_file()
    assert sorted(path.name for path in export.parent.glob(".export*")) == []
    trained = module.backbone.generate(PROMPTS, [0, 1, 2])
    torch.testing.assert_close(exported(base, export, lora), trained, rtol=0, atol=1e-5)
    assert (images_of(StableDiffusionPipeline.from_pretrained(base)) - trained).abs().max() > 0.02


@pytest.mark.parametrize("lora", [True, False])
def test_mixed_precision_exports_too(sd15, tmp_path, lora):
    trainer = make_trainer(tmp_path, [ExportPipeline()], max_steps=2, precision="bf16-mixed")
    module = make_module(sd15, lora, lr=0.1)
    trainer.fit(module, datamodule=Data())
    with torch.autocast("cpu", torch.bfloat16):
        images = exported(sd15, Path(trainer.log_dir) / "export", lora)
    torch.testing.assert_close(images.float(), module.backbone.generate(PROMPTS, [0, 1, 2]), rtol=0, atol=1e-2)


def test_a_lora_on_another_denoiser_is_compared_on_that_denoiser(sd15, sd21, tmp_path):
    module = make_module(sd15, lr=0.1, denoiser=str(sd21))
    trainer = make_trainer(tmp_path, [ExportPipeline()], max_steps=1)
    trainer.fit(module, datamodule=Data())
    assert (Path(trainer.log_dir) / "export" / LORA).is_file()


def test_exports_during_training_replace_each_other(sd15, tmp_path):
    steps = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            export = Path(trainer.log_dir) / "export" / LORA
            steps.append(load_file(export) if export.exists() else None)

    trainer = make_trainer(tmp_path, [ExportPipeline(every_n_steps=2), Watch()], max_steps=4)
    trainer.fit(make_module(sd15), datamodule=Data())
    assert steps[0] is None
    assert steps[1].keys() == steps[2].keys() == steps[3].keys()
    assert all(torch.equal(steps[1][name], steps[2][name]) for name in steps[1])
    assert any(not torch.equal(steps[2][name], steps[3][name]) for name in steps[1])


def test_the_export_holds_the_average_when_there_is_one(sd15, tmp_path):
    module, ema = make_module(sd15), EMA(decay=0.9)
    trainer = make_trainer(tmp_path, [ema, ExportPipeline(every_n_steps=3)], max_steps=3)
    trainer.fit(module, datamodule=Data())
    saved = load_file(Path(trainer.log_dir) / "export" / LORA)
    assert len(saved) == len(ema.average)
    for name, average in ema.average.items():
        for ours, theirs in (("backbone.", ""), ("lora_A.default", "lora.down"), ("lora_B.default", "lora.up")):
            name = name.replace(ours, theirs)
        assert torch.equal(saved[name], average)


# ------------------------------------------------------------------------------------------------------ what goes wrong


@pytest.fixture
def trained(sd15, tmp_path):
    """A trained LoRA's backbone and its export."""
    module = make_module(sd15, lr=0.1)
    trainer = make_trainer(tmp_path, [ExportPipeline()], max_steps=2)
    trainer.fit(module, datamodule=Data())
    return module, Path(trainer.log_dir) / "export"


def test_a_lost_adapter_is_noticed(trained):
    module, export = trained
    tensors = load_file(export / LORA)
    name = next(name for name in tensors if "lora.up" in name)
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, export / LORA)
    with pytest.raises(RuntimeError, match="is not the trained model: .* differs by .* at most 1e-05 is rounding"):
        check_export(module.backbone, export, denoiser_call(module.backbone))


def test_a_wrong_adapter_scale_is_noticed(trained):
    module, export = trained
    weights = load_file(export / LORA)
    save_file(weights, export / LORA)  # without the metadata that holds alpha
    with pytest.raises(RuntimeError, match="is not the trained model"):
        check_export(module.backbone, export, denoiser_call(module.backbone))


def test_weights_that_are_no_numbers_are_noticed(trained):
    module, export = trained
    with torch.no_grad():
        next(iter(module.trained_parameters().values())).fill_(float("nan"))
    module.backbone.export(export)
    with pytest.raises(RuntimeError, match="differs by nan"):
        check_export(module.backbone, export, denoiser_call(module.backbone))


def test_an_interrupted_export_leaves_the_earlier_one_whole(sd15, tmp_path, monkeypatch):
    export, calls = SD15.export, []

    def stop_at_the_second(self: Backbone, folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 2:
            folder.mkdir()
            (folder / LORA).write_bytes(b"half")
            raise OSError("No space left on device")
        export(self, folder)

    monkeypatch.setattr(SD15, "export", stop_at_the_second)
    trainer = make_trainer(tmp_path, [ExportPipeline(every_n_steps=1)], max_steps=2)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(make_module(sd15), datamodule=Data())
    assert load_file(Path(trainer.log_dir) / "export" / LORA)

    # The half export does not hinder the next one.
    callback = ExportPipeline()
    callback.folder = Path(trainer.log_dir) / "export"
    callback.export(trainer, trainer.lightning_module.backbone)
    assert load_file(callback.folder / LORA)
    assert not list(callback.folder.parent.glob(".export*"))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        ExportPipeline(every_n_steps=0)
