"""ExportPipeline: what it writes opens in diffusers and is the trained model; a bad export never takes its place."""

import re
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from callbacks.ema import EMA
from callbacks.export_pipeline import LORA_FILE as LORA
from callbacks.export_pipeline import ExportPipeline, check_export, denoiser_call, file_name
from lightning_modules.backbones.base import Backbone
from lightning_modules.backbones.sd15 import SD15
from tests.callbacks.runs import PROMPTS, Data, make_module, make_trainer


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(5, verbose=False)


PIPELINES = {"sd15": StableDiffusionPipeline, "sd21": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
EVERYWHERE = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj"]
EVERYWHERE += ["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out", "downsamplers.0.conv", "upsamplers.0.conv"]
EVERYWHERE += ["linear_1", "linear_2"]


def images_of(pipeline: DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1, 2)]
    return pipeline(PROMPTS, generator=generators, num_inference_steps=2, guidance_scale=7.5, output_type="pt").images


def drawn_with(base: Path, file: Path) -> torch.Tensor:
    """Images of the base with a LoRA file, as the page of diffusers says."""
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    return images_of(pipeline)


def exported(base: Path, export: Path, lora: bool) -> torch.Tensor:
    """Images of an export, opened as the page of diffusers says."""
    if not lora:
        return images_of(DiffusionPipeline.from_pretrained(export))
    pipeline = DiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(export)
    return images_of(pipeline)


@pytest.mark.parametrize("model", PIPELINES)
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
    assert (images_of(DiffusionPipeline.from_pretrained(base)) - trained).abs().max() > 0.02


ADAPTERS = {
    "alpha is not the rank": {"r": 2, "lora_alpha": 6},
    "every kind of layer": {"r": 2, "lora_alpha": 3, "target_modules": EVERYWHERE},
    "ranks and alphas differ": {"r": 2, "rank_pattern": {"to_q": 4}, "alpha_pattern": {"to_k": 3}, "lora_alpha": 2},
    "rank-stabilised": {"r": 3, "lora_alpha": 5, "use_rslora": True},
}


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@pytest.mark.parametrize("adapters", ADAPTERS)
def test_both_layouts_and_the_merged_pipeline_change_the_image_as_the_policy_does(model, adapters, tmp_path, request):
    base = request.getfixturevalue(model)
    module = make_module(base, LoraConfig(**ADAPTERS[adapters]), lr=0.1)
    trainer = make_trainer(tmp_path, [ExportPipeline(merged=True, name="my.lora")], max_steps=2)
    trainer.fit(module, datamodule=Data())

    export = Path(trainer.log_dir) / "export"
    assert sorted(path.name for path in export.iterdir()) == ["merged", "my.lora.safetensors", LORA]
    trained = module.backbone.generate(PROMPTS, [0, 1, 2])
    plain = images_of(DiffusionPipeline.from_pretrained(base))
    assert (plain - trained).abs().max() > 0.02
    torch.testing.assert_close(drawn_with(base, export / LORA), trained, rtol=0, atol=1e-5)
    torch.testing.assert_close(drawn_with(base, export / "my.lora.safetensors"), trained, rtol=0, atol=1e-5)
    merged = PIPELINES[model].from_pretrained(export / "merged")
    assert not any("lora" in name for name in merged.unet.state_dict())
    torch.testing.assert_close(images_of(merged), trained, rtol=0, atol=1e-4)


def test_dora_is_exported_for_diffusers_and_merged_but_not_in_kohyas_layout(sd15, tmp_path):
    module = make_module(sd15, LoraConfig(r=2, lora_alpha=4, use_dora=True), lr=0.1)
    with pytest.raises(ValueError, match=r"kohya's layout: an adapter is a DoraLinearVariant.*formats: \[diffusers\]"):
        make_trainer(tmp_path, [ExportPipeline()]).fit(module, datamodule=Data())

    trainer = make_trainer(tmp_path, [ExportPipeline(formats=["diffusers"], merged=True)], max_steps=2)
    trainer.fit(module, datamodule=Data())
    export = Path(trainer.log_dir) / "export"
    trained = module.backbone.generate(PROMPTS, [0, 1, 2])
    torch.testing.assert_close(drawn_with(sd15, export / LORA), trained, rtol=0, atol=1e-5)
    merged = images_of(StableDiffusionPipeline.from_pretrained(export / "merged"))
    torch.testing.assert_close(merged, trained, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("model", "lora"), [("sd15", True), ("sdxl", True), ("sd15", False)])
def test_half_precision_halves_the_files_and_rounds_the_images(model, lora, tmp_path, request):
    base = request.getfixturevalue(model)
    module = make_module(base, lora, lr=0.1)
    trainer = make_trainer(tmp_path, [ExportPipeline(dtype="float16", merged=lora)], max_steps=2)
    trainer.fit(module, datamodule=Data())
    export = Path(trainer.log_dir) / "export"
    trained = module.backbone.generate(PROMPTS, [0, 1, 2])
    files = (
        [export / LORA, export / "run.safetensors"] if lora else [export / "unet/diffusion_pytorch_model.safetensors"]
    )
    for file in files:
        weights = {name: tensor for name, tensor in load_file(file).items() if not name.endswith(".alpha")}
        assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
        if lora:
            torch.testing.assert_close(drawn_with(base, file), trained, rtol=0, atol=5e-3)
    whole = PIPELINES[model].from_pretrained(export / "merged" if lora else export, dtype=torch.float32)
    torch.testing.assert_close(images_of(whole), trained, rtol=0, atol=2e-2)


def test_exporting_a_merged_pipeline_does_not_touch_the_training(sd15, tmp_path):
    ends = []
    for callbacks in ([], [ExportPipeline(every_n_steps=1, merged=True, dtype="float16")]):
        module = make_module(sd15, lr=0.1)
        pl.seed_everything(5, verbose=False)
        make_trainer(tmp_path, callbacks, max_steps=3).fit(module, datamodule=Data())
        ends.append({name: weight.clone() for name, weight in module.backbone.named_parameters()})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("lora", [True, False])
def test_an_export_does_not_say_where_it_was_made(sd15, lora, tmp_path):
    module = make_module(sd15, lora)
    trainer = make_trainer(tmp_path, [ExportPipeline(merged=lora)], max_steps=1)
    trainer.fit(module, datamodule=Data())
    files = [path for path in (Path(trainer.log_dir) / "export").rglob("*") if path.is_file()]
    assert len(files) > 4
    for file in files:
        assert str(sd15).encode() not in file.read_bytes(), file


@pytest.mark.parametrize("lora", [True, False])
def test_mixed_precision_exports_too(sd15, tmp_path, lora):
    trainer = make_trainer(tmp_path, [ExportPipeline(merged=lora)], max_steps=2, precision="bf16-mixed")
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


@pytest.mark.parametrize("file", [LORA, "run.safetensors"])
def test_a_lost_adapter_is_noticed(trained, file):
    module, export = trained
    with safe_open(export / file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(export / file)
    name = next(name for name in tensors if re.search("lora.up", name))
    tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, export / file, metadata)
    with pytest.raises(RuntimeError, match=f"{file}' is not the trained model: .* differs by .* is rounding"):
        check_export(module.backbone, export, denoiser_call(module.backbone))


def test_a_lost_alpha_is_noticed(trained):
    module, export = trained
    tensors = load_file(export / "run.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "alpha" not in name}, export / "run.safetensors")
    with pytest.raises(RuntimeError, match="run.safetensors' is not the trained model"):
        check_export(module.backbone, export, denoiser_call(module.backbone))


def test_a_merged_pipeline_without_the_lora_is_noticed(trained, sd15):
    module, export = trained
    shutil.copytree(sd15, export / "merged")
    with pytest.raises(RuntimeError, match="merged' is not the trained model"):
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

    def stop_at_the_second(self: Backbone, folder: Path, **settings: Any) -> None:
        calls.append(folder)
        if len(calls) == 2:
            folder.mkdir()
            (folder / LORA).write_bytes(b"half")
            raise OSError("No space left on device")
        export(self, folder, **settings)

    monkeypatch.setattr(SD15, "export", stop_at_the_second)
    trainer = make_trainer(tmp_path, [ExportPipeline(every_n_steps=1)], max_steps=2)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(make_module(sd15), datamodule=Data())
    assert load_file(Path(trainer.log_dir) / "export" / LORA)

    # The half export does not hinder the next one.
    callback = ExportPipeline()
    callback.on_train_start(trainer, trainer.lightning_module)
    callback.export(trainer, trainer.lightning_module.backbone)
    assert load_file(callback.folder / LORA)
    assert not list(callback.folder.parent.glob(".export*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps is 0"),
        ({"formats": []}, r"formats is \[\]; expected diffusers, kohya or both"),
        ({"formats": ["onnx"]}, "expected diffusers, kohya or both"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected float32 or float16"),
        ({"name": "../up"}, "expected a file name of letters"),
        ({"name": "my_pytorch_lora_weights"}, "is not diffusers' pytorch_lora_weights"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ExportPipeline(**settings)


@pytest.mark.parametrize("settings", [{"formats": ["kohya"]}, {"merged": True}])
def test_lora_settings_of_a_run_that_trains_all_weights_are_refused_before_loading(settings, sd15, tmp_path):
    module = make_module(sd15, lora=False)
    with pytest.raises(ValueError, match="trains all weights .* leave both options out"):
        make_trainer(tmp_path, [ExportPipeline(**settings)]).fit(module, datamodule=Data())
    assert not module.backbone.loaded


@pytest.mark.parametrize(
    "setting",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["conv_in"]},
        {"layer_replication": [(0, 1)]},
    ],
)
def test_adapters_that_change_more_than_themselves_are_refused_at_construction(setting, sd15):
    with pytest.raises(ValueError, match=rf"backbone.lora.{next(iter(setting))} is .* its adapters off"):
        make_module(sd15, LoraConfig(**setting))


def test_the_files_name_is_the_runs_unless_that_is_no_name():
    assert file_name("dpo-sd15_lora") == "dpo-sd15_lora"
    assert file_name("my run/2") == "my-run-2"
    assert file_name(None) == file_name("..") == file_name("pytorch_lora_weights") == "lora"
