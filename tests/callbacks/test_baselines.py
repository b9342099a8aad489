"""What `test` compares a model with: base, checkpoint, LoRA, pipeline, images, nothing; and what it refuses."""

import json
import shutil
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from callbacks.baselines import kind_of
from callbacks.ema import EMA
from callbacks.evaluation import Evaluation
from callbacks.export_pipeline import ExportPipeline
from callbacks.write_images import WriteImages
from datamodules.prompts import PromptDataModule, PromptList
from lightning_modules.backbones.base import Backbone
from tests.callbacks.evaluation_run import tuned_module
from tests.callbacks.runs import Data, Redness, make_module, make_trainer

PROMPTS = ["a red circle", "a blue square", "two green rings", "nothing"]


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(5, verbose=False)


def prompt_data(folder: Path, prompts: list[str] = PROMPTS, **settings) -> PromptDataModule:
    (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))
    return PromptDataModule(PromptList(str(folder / "prompts.txt"), **settings))


def compare(module, folder: Path, baseline: str | None, data: PromptDataModule | None = None, callbacks=()) -> dict:
    """results.json of a test of the module against a baseline."""
    folder.mkdir(exist_ok=True)
    evaluation = Evaluation({"red": Redness()}, baseline=baseline, save_images=True)
    trainer = make_trainer(folder, [*callbacks, evaluation])
    trainer.test(module, data or prompt_data(folder), verbose=False)
    return json.loads((Path(trainer.log_dir) / "evaluation" / "results.json").read_text())


def saved(folder: Path, role: str) -> torch.Tensor:
    """(4, 3, H, W) the last test's images in bytes."""
    run = max((folder / "run").glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    files = sorted((run / "evaluation" / "images").glob(f"*_{role}.png"))
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]).int()


def drawn(backbone: Backbone) -> torch.Tensor:
    return (backbone.generate(PROMPTS, [0, 1, 2, 3]) * 255).round().int()


@pytest.fixture(scope="module", params=[("sd15", True), ("sd15", False), ("sdxl", True), ("sd3", True)], ids=str)
def run(request, tmp_path_factory):
    """A fitted run that has kept a checkpoint and an export: family, pipeline, whether LoRA, folder, its images."""
    family, lora = request.param
    pipeline, folder = request.getfixturevalue(family), tmp_path_factory.mktemp("run")
    pl.seed_everything(6, verbose=False)
    module = make_module(pipeline, lora, lr=0.1 if lora else 1e-2)
    checkpoints = ModelCheckpoint(folder, "last", save_weights_only=True)
    trainer = make_trainer(folder, [ExportPipeline(), checkpoints], max_steps=2, enable_checkpointing=True)
    trainer.fit(module, datamodule=Data())
    export = Path(trainer.log_dir) / "export"
    return pipeline, lora, folder / "last.ckpt", export, drawn(module.backbone)


@pytest.mark.parametrize("kind", ["checkpoint", "export", "kohya"])
def test_a_runs_own_weights_come_back_from_its_files(run, tmp_path, kind):
    pipeline, lora, checkpoint, export, expected = run
    if kind == "kohya" and not (export / "run.safetensors").exists():
        pytest.skip("there is no such file of a full fine-tuning, nor of SD3")
    baseline = {"checkpoint": checkpoint, "export": export, "kohya": export / "run.safetensors"}[kind]
    found = compare(tuned_module(pipeline, lora=lora), tmp_path, str(baseline))
    assert found["baseline"]["kind"] == {"checkpoint": "checkpoint", "kohya": "lora"}.get(
        kind, "lora" if lora else "pipeline"
    )
    difference = (saved(tmp_path, "base") - expected).abs().max()
    assert difference <= 1
    assert (saved(tmp_path, "tuned") - expected).abs().max() > 5
    assert found["rewards"]["red"]["base"] != found["rewards"]["red"]["tuned"]


def test_the_pipeline_it_started_from_is_the_base(sd15, tmp_path):
    module = tuned_module(sd15)
    base, pipeline = (compare(module, tmp_path, baseline) for baseline in ("base", str(sd15)))
    assert base["rewards"] == pipeline["rewards"]
    assert base["baseline"]["policy"] == pipeline["baseline"]["policy"]  # so its images were not made again
    assert len(list((tmp_path / "run" / "images").glob("*/*.png"))) == 8


def test_a_checkpoint_with_an_average_is_judged_by_it(sd15, tmp_path):
    ema = EMA(decay=0.9)
    checkpoints = ModelCheckpoint(tmp_path, "last")
    trainer = make_trainer(tmp_path, [ema, checkpoints], max_steps=3, enable_checkpointing=True)
    module = make_module(sd15, lr=0.1)
    trainer.fit(module, datamodule=Data())
    expected = drawn(module.backbone)  # the average has been in place since the end of the fit
    compare(tuned_module(sd15), tmp_path, str(tmp_path / "last.ckpt"))
    assert (saved(tmp_path, "base") - expected).abs().max() <= 1


def test_the_average_is_what_is_tested_wherever_it_stands_among_the_callbacks(sd15, tmp_path):
    ema = EMA(decay=0.9)
    trainer = make_trainer(tmp_path, [ema], max_steps=3)
    module = make_module(sd15, lr=0.1)
    trainer.fit(module, datamodule=Data())
    expected = drawn(module.backbone)
    ema._put_weights_back(module)
    data = prompt_data(tmp_path)
    evaluation = Evaluation({"red": Redness()}, save_images=True)
    trainer = make_trainer(tmp_path, [evaluation, ema])
    trainer.test(module, data, verbose=False)
    assert (saved(tmp_path, "tuned") - expected).abs().max() <= 1


def test_images_of_anyone(sd15, tmp_path):
    module, folder = tuned_module(sd15), tmp_path / "theirs"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (200, 10 * i, 0)).save(
            folder / f"{i:05d}.{'png' if i % 2 else 'webp'}", lossless=True
        )
    found = compare(module, tmp_path, str(folder))
    expected = np.mean([(200 - 10 * i) / 255 for i in range(4)])
    assert found["rewards"]["red"]["base"] == pytest.approx(expected, abs=1e-6)
    assert found["rewards"]["red"]["win_rate"] == 0.0
    assert found["baseline"] == {"kind": "images", "path": str(folder)}


def test_what_predict_writes_is_a_baseline(sd15, tmp_path):
    module, data = tuned_module(sd15, seed=2), prompt_data(tmp_path, images_per_prompt=2)
    trainer = make_trainer(tmp_path, [WriteImages(str(tmp_path / "theirs"))])
    trainer.predict(module, data, return_predictions=False)
    found = compare(module, tmp_path, str(tmp_path / "theirs"), data)
    assert found["num_images"] == 8
    assert found["rewards"]["red"]["difference"] == pytest.approx(0.0, abs=1e-5)


def test_no_baseline(sd15, tmp_path):
    found = compare(tuned_module(sd15), tmp_path, None)
    assert sorted(found["rewards"]["red"]) == ["tuned", "tuned_interval"]
    low, high = found["rewards"]["red"]["tuned_interval"]
    assert low < found["rewards"]["red"]["tuned"] < high
    page = (tmp_path / "run" / "version_0" / "evaluation" / "results.md").read_text()
    assert "There is no baseline." in page
    assert f"| red | – | {found['rewards']['red']['tuned']:.4f} [" in page
    assert len(list((tmp_path / "run" / "images").glob("*/*.png"))) == 4


# ------------------------------------------------------------------------------------------------------------ refused


@pytest.fixture
def no_image(monkeypatch):
    monkeypatch.setattr(Backbone, "generate", lambda *_, **__: pytest.fail("an image was made"))


def their_images(folder: Path, number: int = 4, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> Path:
    folder.mkdir()
    for i in range(number):
        Image.new(mode, size).save(folder / f"{i:05d}.png")
    return folder


@pytest.mark.usefixtures("no_image")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "00002.png").unlink(), r"of the 4 images in .*theirs 1 are missing: 00002\.png\."),
        (lambda folder: [(folder / f"0000{i}.png").unlink() for i in (0, 3)], r"2 are missing: 00000\.png, 00003\.png"),
        (lambda folder: Image.new("RGB", (8, 12)).save(folder / "00001.png"), r"00001\.png \(8 x 12 pixels.*16 x 16"),
        (
            lambda folder: Image.new("RGBA", (16, 16)).save(folder / "00001.png"),
            r"00001\.png \(mode RGBA, expected RGB",
        ),
        (lambda folder: (folder / "00003.png").write_bytes(b"\x89PNG"), r"1 do not fit: 00003\.png \(no image\)"),
        (
            lambda folder: (folder / "metadata.jsonl").write_text(
                "".join(
                    json.dumps({"file_name": f"0000{i}.png", "prompt": "nothing" if i == 1 else prompt}) + "\n"
                    for i, prompt in enumerate(PROMPTS)
                )
            ),
            r"1 were made for other prompts: 00001\.png \(for 'nothing' instead of 'a blue square'\)",
        ),
        (
            lambda folder: (folder / "metadata.jsonl").write_text("[1]\n"),
            r"metadata\.jsonl is not what `predict` writes",
        ),
        (
            lambda folder: (folder / "metadata.jsonl").write_bytes(b"\xff"),
            r"metadata\.jsonl is not what `predict` writes",
        ),
    ],
)
def test_images_that_do_not_fit_are_named_before_one_is_made(sd15, tmp_path, spoil, message):
    spoil(their_images(tmp_path / "theirs"))
    with pytest.raises(ValueError, match=message):
        compare(make_module(sd15), tmp_path, str(tmp_path / "theirs"))


@pytest.mark.usefixtures("no_image")
def test_of_many_missing_images_the_first_are_named(sd15, tmp_path):
    folder = their_images(tmp_path / "theirs", 2)
    data = prompt_data(tmp_path, [f"thing {i}" for i in range(40)])
    with pytest.raises(ValueError, match=r"38 are missing: 00002\.png, .*00006\.png and 33 more"):
        compare(make_module(sd15), tmp_path, str(folder), data)


@pytest.mark.usefixtures("no_image")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: (path / "b").mkdir(), r"the folder .*b holds neither a pipeline .* It holds: nothing"),
        (lambda path: (path / "b").write_text("x"), r"b is a file of another kind; expected \.ckpt"),
        (lambda path: None, r"b' does not exist .*expected `base`, null, a \.ckpt file"),
        (lambda path: (path / "b").symlink_to(path / "nowhere"), "does not exist"),
    ],
)
def test_a_baseline_that_is_nothing_is_told_of_before_the_model_is_loaded(sd15, tmp_path, make, message, monkeypatch):
    monkeypatch.setattr(Backbone, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    make(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare(make_module(sd15), tmp_path, str(tmp_path / "b"))


def test_weights_of_another_model_are_refused(sd15, sdxl, tmp_path, monkeypatch):
    def fit(pipeline: Path, name: str, **settings) -> Path:
        checkpoints = ModelCheckpoint(tmp_path, name)
        trainer = make_trainer(tmp_path / name, [ExportPipeline(), checkpoints], max_steps=1, enable_checkpointing=True)
        trainer.fit(make_module(pipeline, **settings), datamodule=Data())
        return Path(trainer.log_dir) / "export"

    export = fit(sdxl, "xl")
    full = fit(sd15, "full", lora=False)
    (tmp_path / "noise.ckpt").write_bytes(b"\x00" * 1000)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    torch.save({"state_dict": {}, "callbacks": Path("/")}, tmp_path / "pickle.ckpt")
    broken = shutil.copytree(export, tmp_path / "broken")
    (broken / "pytorch_lora_weights.safetensors").write_bytes(b"\xff" * 100)
    monkeypatch.setattr(Backbone, "generate", lambda *_, **__: pytest.fail("an image was made"))
    module = make_module(sd15)
    for baseline, message in (
        (tmp_path / "xl.ckpt", "belongs to another model: it was written by DiffusionDPO on .*sdxl.*first difference"),
        (tmp_path / "full.ckpt", "belongs to another model"),
        (tmp_path / "noise.ckpt", "is damaged, or holds more than tensors"),
        (tmp_path / "pickle.ckpt", "is damaged, or holds more than tensors and plain values, which is never read"),
        (tmp_path / "foreign.ckpt", "is no checkpoint of this project"),
        (export, "does not fit .*sd15|changes nothing in the unet of .*sd15"),
        (broken, "does not fit .*sd15"),
        (sdxl, "each family has its own class|Each family has its own class"),
        ("nobody/nothing", "baseline 'nobody/nothing': .*cannot load 'nobody/nothing'"),
    ):
        with pytest.raises(ValueError, match=message) as info:
            compare(module, tmp_path, str(baseline))
        assert "baseline" in str(info.value)
    assert kind_of(str(full)) == "pipeline"


def test_a_checkpoint_trained_from_another_copy_is_announced(sd15, tmp_path):
    checkpoints = ModelCheckpoint(tmp_path, "last")
    trainer = make_trainer(tmp_path, [checkpoints], max_steps=1, enable_checkpointing=True)
    trainer.fit(make_module(sd15), datamodule=Data())
    copy = shutil.copytree(sd15, tmp_path / "copy")
    with pytest.warns(UserWarning, match=r"was trained from .*sd15.*compared on this run's .*copy"):
        compare(tuned_module(copy), tmp_path, str(tmp_path / "last.ckpt"))
