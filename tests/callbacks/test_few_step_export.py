"""What a distilled model leaves behind samples at the trained timesteps, in diffusers, without being told them."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DiffusionPipeline

from callbacks.export_pipeline import ExportPipeline, check_export, denoiser_call
from callbacks.push_to_hub import PushToHub
from lightning_modules.backbones.base import Backbone
from tests.callbacks.test_push_to_hub import card, run_snippet
from tests.methods.dmdr_runs import build, fit, loaded

FOUR = {"num_steps": 4, "timesteps": [999, 749, 499, 249]}


def student(pretrained: Path, family: str, adapters: bool, **settings) -> Backbone:
    """A student whose weights are away from the base's."""
    return loaded(build(pretrained, family, adapters, **settings)).backbone


def export(backbone: Backbone, folder: Path, **settings) -> None:
    """Export, and the check that the callback makes of it."""
    call = denoiser_call(backbone)
    backbone.export(folder, **settings)
    check_export(backbone, folder, call)


def opened(pretrained: Path, folder: Path) -> Any:
    """What the model card tells users to do: a whole pipeline as it is, a LoRA with the scheduler beside it."""
    if (folder / "model_index.json").exists():
        return DiffusionPipeline.from_pretrained(folder)
    pipeline = DiffusionPipeline.from_pretrained(pretrained)
    pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    pipeline.scheduler = getattr(diffusers, config["_class_name"]).from_pretrained(folder, subfolder="scheduler")
    return pipeline


def drawn(pipeline: Any, seed: int, **call) -> tuple[torch.Tensor, list[float]]:
    """An image, and the timesteps that the network was told."""
    told: list[float] = []
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    handle = network.register_forward_pre_hook(
        lambda module, inputs, keywords: told.append(float(keywords.get("timestep", [*inputs, None, None][1]).max())),
        with_kwargs=True,
    )
    generator = torch.Generator().manual_seed(seed)
    if "FlowMatchLCM" in type(pipeline.scheduler).__name__:
        pipeline.scheduler.step = partial(pipeline.scheduler.step, generator=generator)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a ring", generator=generator, output_type="pt", height=16, width=16, **call).images
    handle.remove()
    return image, told


@pytest.mark.parametrize(
    ("family", "adapters", "settings"),
    [
        ("sdxl", False, {"num_steps": 1}),
        ("sdxl", True, FOUR),
        ("sd15", True, FOUR),
        ("sd15", False, {"num_steps": 1}),
        ("sd21", True, FOUR | {"sampler": "ode"}),
        ("sd3", True, {"num_steps": 4, "sampler": "ode", "shift": 5.0, "end_time": 0.0}),
        ("sd3", True, {"num_steps": 3, "sampler": "sde", "shift": 3.0, "end_time": 0.0}),
        ("sd3", False, {"num_steps": 1, "sampler": "ode", "end_time": 0.0}),
    ],
)
def test_the_export_draws_what_the_student_draws(family, adapters, settings, request, tmp_path):
    """With nothing but the number of steps and guidance 1 (and, for SD3, the text length that was trained)."""
    pretrained = request.getfixturevalue(family)
    backbone = student(pretrained, family, adapters, **settings)
    export(backbone, tmp_path)
    call = json.loads((tmp_path / "sampling.json").read_text())
    text = {"max_sequence_length": 16} if family == "sd3" else {}
    assert call == {"num_inference_steps": settings["num_steps"], "guidance_scale": 1.0} | text
    image, told = drawn(opened(pretrained, tmp_path), seed=7, **call)
    torch.testing.assert_close(torch.tensor(told), backbone.few_step_timesteps.to(torch.float32), rtol=0, atol=2e-3)
    expected = backbone.generate(["a ring"], [7])
    torch.testing.assert_close(image, expected, rtol=0, atol=2e-4)
    with torch.no_grad(), backbone.reference():
        assert (backbone.generate(["a ring"], [7]) - expected).abs().max() > 0.02


def test_published_end_of_a_flow_costs_a_thousandth_of_the_velocity(sd3, tmp_path):
    """diffusers ends at 0, the published training at 0.001: far below a grey level (1 / 255), and said on the page."""
    backbone = student(sd3, "sd3", True, num_steps=4, sampler="ode", shift=5.0)
    export(backbone, tmp_path)
    image, _ = drawn(opened(sd3, tmp_path), 7, **json.loads((tmp_path / "sampling.json").read_text()))
    assert 0 < (image - backbone.generate(["a ring"], [7])).abs().max() < 1 / 255


def test_timesteps_that_no_scheduler_takes_are_told_and_warned_of(sd15, tmp_path):
    backbone = student(sd15, "sd15", True, num_steps=4)
    with pytest.warns(UserWarning, match=r"\[999, 749, 500, 250\], which no scheduler of diffusers takes by itself"):
        export(backbone, tmp_path)
    call = json.loads((tmp_path / "sampling.json").read_text())
    assert call == {"num_inference_steps": 4, "guidance_scale": 1.0, "timesteps": [999, 749, 500, 250]}
    image, told = drawn(opened(sd15, tmp_path), 7, **call)
    assert told == [999, 749, 500, 250]
    torch.testing.assert_close(image, backbone.generate(["a ring"], [7]), rtol=0, atol=2e-4)


def test_merged_pipeline_has_the_scheduler_too(sd15, tmp_path):
    backbone = student(sd15, "sd15", True, **FOUR)
    export(backbone, tmp_path, merged=True, formats=("diffusers", "kohya"))
    call = json.loads((tmp_path / "sampling.json").read_text())
    image, told = drawn(DiffusionPipeline.from_pretrained(tmp_path / "merged"), 7, **call)
    assert told == [999, 749, 499, 249]
    torch.testing.assert_close(image, backbone.generate(["a ring"], [7]), rtol=0, atol=2e-3)


@pytest.mark.parametrize("damage", ["shift", "timesteps"])
def test_an_export_that_samples_otherwise_is_refused(damage, sd3, sd15, tmp_path):
    """What the published demo does (T2), and a list that is a step off."""
    family, pretrained = ("sd3", sd3) if damage == "shift" else ("sd15", sd15)
    settings = {"num_steps": 4, "sampler": "ode", "shift": 5.0} if damage == "shift" else FOUR
    backbone = student(pretrained, family, True, **settings)
    call = denoiser_call(backbone)
    backbone.export(tmp_path)
    check_export(backbone, tmp_path, call)
    scheduler = type(backbone.pipeline.scheduler)
    if damage == "shift":
        diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0).save_pretrained(tmp_path / "scheduler")
    else:
        told = json.loads((tmp_path / "sampling.json").read_text()) | {"timesteps": [999, 666, 333, 1]}
        (tmp_path / "sampling.json").write_text(json.dumps(told))
    with pytest.raises(RuntimeError, match="does not sample as the student was trained to"):
        check_export(backbone, tmp_path, call)
    assert type(backbone.pipeline.scheduler) is scheduler  # the run's own pipeline is as it was


def test_a_model_that_was_not_distilled_keeps_its_scheduler(sd15, tmp_path):
    backbone = student(sd15, "sd15", True, **FOUR)
    backbone.few_step = None
    backbone.export(tmp_path)
    assert not (tmp_path / "sampling.json").exists()
    assert not (tmp_path / "scheduler").exists()


@pytest.mark.parametrize(
    ("family", "settings"),
    [("sd15", FOUR), ("sd3", {"num_steps": 4, "sampler": "sde", "shift": 3.0, "end_time": 0.0})],
)
def test_the_model_cards_snippet_draws_what_the_student_draws(family, settings, request, tmp_path):
    pretrained = request.getfixturevalue(family)
    module = build(pretrained, family, lr=0.05, **settings)
    callbacks = [ExportPipeline(), PushToHub("me/model", base_model="me/base")]
    run = Path(fit(module, tmp_path, max_steps=1, callbacks=callbacks).log_dir)
    page = card(run)[1]
    assert "Distilled to 4 steps without guidance" in page
    if family == "sd3":  # its pipeline draws the noise between the steps globally, so the image is another one
        assert "torch.manual_seed(0)" in page
        assert "max_sequence_length=16," in page
        assert run_snippet(page, tmp_path, model=run / "hub", base=pretrained).isfinite().all()
        return
    image = run_snippet(page, tmp_path, model=run / "hub", base=pretrained)
    expected = module.backbone.generate(["a lighthouse on a cliff at sunset"], [0])[0]
    torch.testing.assert_close(image, expected, rtol=0, atol=2e-4)
