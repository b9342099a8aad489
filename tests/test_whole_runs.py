"""Whole runs as a user starts them: config, parquet pairs and a pipeline on disk; killed, resumed, exported, tested."""

import copy
import csv
import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

from lightning_modules.cli.app import run
from lightning_modules.rewards.base import Reward
from lightning_modules.rewards.step_preference import StepPreference, pixels_for_spm
from lightning_modules.rewards.step_preference import export as export_step_preference
from tests.rewards.tiny import save_hf_clip

ROOT = Path(__file__).parents[1]
METHODS = {
    "dpo": "lightning_modules.diffusion_dpo.DiffusionDPO",
    "orpo": "lightning_modules.diffusion_orpo.DiffusionORPO",
    "sft": "lightning_modules.diffusion_sft.DiffusionSFT",
    "spo": "lightning_modules.spo.SPO",
}
# What a method has beyond a backbone and an optimizer.
OPTIONS = {
    "spo": {
        "judge": {"class_path": "tests.methods.spo_runs.Stripes", "init_args": {"strength": 1e7}},
        "num_steps": 4,
        "first_step": 1,
        "candidates": 2,
        "train_batch_size": 2,
    },
}
BACKBONES = {
    "StableDiffusionPipeline": {"class_path": "lightning_modules.backbones.sd15.SD15", "init_args": {}},
    "StableDiffusionXLPipeline": {
        "class_path": "lightning_modules.backbones.sdxl.SDXL",
        "init_args": {"size_conditions": "real"},
    },
    "StableDiffusion3Pipeline": {
        "class_path": "lightning_modules.backbones.sd3.SD3",
        "init_args": {"max_sequence_length": 32},
    },
}

ADAMW = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}}


class Brightness(Reward):
    """Mean pixel value."""

    def forward(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))


class Kill(pl.Callback):
    """Kills the process without warning after so many micro-batches.

    Args:
        after: Number of micro-batches.
    """

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.after:
            os.kill(os.getpid(), signal.SIGKILL)


def write_pairs(file: Path, number: int) -> Path:
    """Pick-a-Pic rows with images of odd sizes; every fifth is a tie."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = random.Random(number)

    def picture() -> bytes:
        buffer = io.BytesIO()
        size = (rng.randrange(16, 30), rng.randrange(16, 30))
        Image.frombytes("RGB", size, rng.randbytes(size[0] * size[1] * 3)).save(buffer, format="PNG")
        return buffer.getvalue()

    labels = [(0.5 if i % 5 == 4 else float(rng.randrange(2))) for i in range(number)]
    columns = {
        "caption": [f"picture {i}" for i in range(number)],
        "jpg_0": [picture() for _ in range(number)],
        "jpg_1": [picture() for _ in range(number)],
        "label_0": labels,
        "num_example_per_prompt": [1 + i % 3 for i in range(number)],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file)
    return file


def config(pretrained: Path, data: Path, method: str = "dpo", lora: bool = True, **settings) -> dict:
    backbone = copy.deepcopy(BACKBONES[json.loads((pretrained / "model_index.json").read_text())["_class_name"]])
    backbone["init_args"] |= {"pretrained": str(pretrained), "num_inference_steps": 2, "chunk_size": 4}
    optimizer = copy.deepcopy(ADAMW)
    if lora:
        backbone["init_args"]["lora"] = {"r": 2, "lora_alpha": 2, "init_lora_weights": "gaussian"}
    elif "sdxl" in backbone["class_path"]:
        optimizer = yaml.safe_load((ROOT / "cli_configs/dpo/sdxl.yaml").read_text())["model"]["init_args"]["optimizer"]
        optimizer["init_args"]["lr"] = 1e-3
    prompts = {"source": str((data if data.is_dir() else data.parent) / "prompts.txt")}
    pairs = {
        "class_path": "datamodules.pickapic.PickAPicDataModule",
        "init_args": {
            "source": str(data),
            "resolution": 16,
            "batch_size": 2,
            "random_crop": True,
            "preferred_only": method == "sft",
            "num_workers": settings.pop("num_workers", 0),
            "test_prompts": prompts,
        },
    }
    stream = {
        "class_path": "datamodules.prompt_stream.PromptStream",
        "init_args": {"prompts": prompts, "batch_size": 2, "test_prompts": prompts},
    }
    return {
        "seed_everything": 5,
        "model": {
            "class_path": METHODS.get(method, "lightning_modules.dmdr.DMDR"),
            "init_args": {
                "backbone": backbone,
                "optimizer": optimizer,
                "warmup_steps": 2,
                **OPTIONS.get(method, {}),
            },
        },
        "data": stream if method == "spo" else pairs,
        "trainer": {
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 1, "save_top_k": -1, "filename": "{step}"},
                },
                *settings.pop("callbacks", []),
            ],
            **settings,
        },
    }


def write_config(file: Path, content: dict) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return str(file)


def metrics(folder: Path) -> dict[int, dict[str, str]]:
    with open(folder / "metrics.csv", newline="") as file:
        return {int(row["step"]): row for row in csv.DictReader(file)}


def read_rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.txt").write_text("a red circle\na blue square\nthree rings\n")
    return write_pairs(tmp_path / "data" / "train.parquet", 17)  # 14 without the ties


# In every test run LoRA on three families, and all weights on the first; the others by hand.
RUNS = [(True, family) for family in ("sd15", "sdxl", "sd3")] + [(False, "sd15")]
MORE = [(True, "sd21")] + [(False, family) for family in ("sd21", "sdxl", "sd3")]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("lora", "family"), [*RUNS, *(pytest.param(*run, marks=pytest.mark.slow) for run in MORE)])
def test_fit_saves_resumes_and_exports(method, family, lora, data, tmp_path, request):
    pretrained = request.getfixturevalue(family)
    export = {"class_path": "callbacks.export_pipeline.ExportPipeline"}
    yaml_file = write_config(tmp_path / "c" / "run.yaml", config(pretrained, data, method, lora, callbacks=[export]))
    whole = Path(run(["fit", "--config", yaml_file, "--trainer.max_steps=4"]).trainer.log_dir)
    checkpoints = sorted((whole / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == [f"step={k}.ckpt" for k in (1, 2, 3, 4)]

    resumed = run(["fit", "--config", yaml_file, "--trainer.max_steps=4", f"--ckpt_path={checkpoints[1]}"])
    again = Path(resumed.trainer.log_dir)
    assert again != whole
    expected = weights(checkpoints[3])
    assert all(torch.equal(tensor, expected[k]) for k, tensor in weights(again / "checkpoints/step=4.ckpt").items())
    assert metrics(again) == {step: row for step, row in metrics(whole).items() if step >= 2}
    assert len(metrics(again)) == 2

    source = DiffusionPipeline.from_pretrained(pretrained if lora else again / "export")
    if lora:
        source.load_lora_weights(again / "export", weight_name="pytorch_lora_weights.safetensors")
    backbone = resumed.model.backbone
    x, t = torch.randn(1, *backbone.latent_shape), torch.tensor([500])
    condition = backbone.encode_prompts(["a ring"])
    with torch.no_grad():
        ours = backbone.predict(x, t, condition)
        setattr(backbone.pipeline, backbone.denoiser_name, getattr(source, backbone.denoiser_name))
        theirs = backbone.predict(x, t, condition)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_a_step_preference_model_fits_resumes_and_exports(family, data, tmp_path, request):
    """Labels with ties, weights by prompt; the best checkpoint as published SPO reads it."""
    clip = tmp_path / "clip"
    save_hf_clip(clip)
    write_pairs(data.parent / "validation.parquet", 5)
    best = {"monitor": "val/accuracy", "mode": "max", "filename": "best", "save_weights_only": True}
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": best}]
    content = config(request.getfixturevalue(family), data.parent, lora=False, callbacks=callbacks, max_steps=4)
    model, settings = content["model"]["init_args"], content["data"]["init_args"]
    content["model"]["class_path"] = "lightning_modules.step_preference_model.StepPreferenceModel"
    model |= {"clip": str(clip), "processor": str(clip), "optimizer": ADAMW, "validation_timesteps": [0, 501, 951]}
    settings |= {"ties": "keep", "validation_split": "validation", "resize": "bicubic"}
    settings |= {"horizontal_flip": False, "columns": {"pairs_per_prompt": "num_example_per_prompt"}}
    content["trainer"] |= {"val_check_interval": 2, "gradient_clip_val": 1.0}
    yaml_file = write_config(tmp_path / "c" / "run.yaml", content)
    whole = Path(run(["fit", "--config", yaml_file]).trainer.log_dir)

    resumed = run(["fit", "--config", yaml_file, f"--ckpt_path={whole}/checkpoints/step=2.ckpt"])
    again, expected = Path(resumed.trainer.log_dir), weights(whole / "checkpoints/step=4.ckpt")
    found = weights(again / "checkpoints/step=4.ckpt")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    rows = [read_rows(folder / "metrics.csv") for folder in (again, whole)]
    # The validation at step 2 comes after the checkpoint, and is made up for.
    assert rows[0] == [row for row in rows[1] if row["val/accuracy"] or int(row["step"]) >= 2]
    assert float(rows[0][-1]["val/pairs"]) == 5.0

    for name in ("best.ckpt", "step=4.ckpt"):
        export_step_preference(str(again / "checkpoints" / name), str(tmp_path / "spm.bin"), str(clip))
    exported = torch.load(tmp_path / "spm.bin", weights_only=True)
    assert {key for key in exported if "position_ids" not in key} == set(expected)
    assert all(torch.equal(tensor, exported[name]) for name, tensor in expected.items())
    images, t = torch.rand(2, 3, 16, 16), torch.tensor([1, 951])
    judge = StepPreference(str(tmp_path / "spm.bin"), str(clip), str(clip))
    pixels = pixels_for_spm(2 * images - 1, "scoring", **resumed.model.image_settings)
    with torch.no_grad():
        text = resumed.model.model.encode_text(resumed.model.tokenize(["a ring", "a ring"]))
        ours = resumed.model.model.score(resumed.model.model.encode_image(pixels, t), text)
    torch.testing.assert_close(judge(images, ["a ring"] * 2, t), ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "lora"), [("sd15", True), ("sdxl", False), ("sd3", True)])
def test_dmdr_leaves_what_its_page_says_resumes_and_is_judged_against_its_teacher(family, lora, tmp_path, request):
    pretrained = request.getfixturevalue(family)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\nthree rings\n")
    rewards = {"brightness": {"class_path": "tests.test_whole_runs.Brightness"}}
    callbacks = [
        {
            "class_path": "callbacks.sample_images.SampleImages",
            "init_args": {"prompts": ["a ring"], "every_n_steps": 1},
        },
        {"class_path": "callbacks.export_pipeline.ExportPipeline"},
        {"class_path": "callbacks.save_adapters.SaveAdapters", "init_args": {"every_n_steps": 1}},
        {"class_path": "callbacks.evaluation.Evaluation", "init_args": {"rewards": rewards}},
    ]
    content = config(pretrained, tmp_path / "prompts.txt", "dmdr", lora, callbacks=callbacks, max_steps=2)
    content["data"] = {
        "class_path": "datamodules.prompt_stream.PromptStream",
        "init_args": {"prompts": {"source": "prompts.txt"}, "batch_size": 2, "test_prompts": {"source": "prompts.txt"}},
    }
    options = content["model"]["init_args"]
    del options["warmup_steps"]
    options |= {"score_lora": {"r": 2, "lora_alpha": 2, "init_lora_weights": "gaussian"}, "num_steps": 2, "ratio": 2}
    yaml_file = write_config(tmp_path / "c" / "run.yaml", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        folder = Path(run(["fit", "--config", yaml_file, "--evaluate=true"]).trainer.log_dir).absolute()
        checkpoint = folder / "checkpoints" / "step=1.ckpt"
        again = Path(run(["fit", "--config", yaml_file, f"--ckpt_path={checkpoint}"]).trainer.log_dir).absolute()

    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step_000001.png", "step_000002.png"]
    names = ["lora_gen", "lora_gui"] if lora else ["lora_gui"]
    assert sorted(path.name for path in folder.glob("lora_*")) == names
    for name in names:
        assert sorted(path.name for path in (folder / name).iterdir()) == ["step-000001", "step-000002"]
        files = sorted(path.name for path in (folder / name / "step-000002").iterdir())
        assert files == ["adapter_config.json", "adapter_model.safetensors", "scale.json"]
    assert (folder / "export").is_dir()
    assert (folder / "config.yaml").is_file()
    for network, steps in (("gui", [0, 1, 2, 3, 4]), ("gen", [3, 5])):
        lines = (folder / "loss_logs" / f"loss_{network}_log.jsonl").read_text().splitlines()
        assert [json.loads(line)["in_s"] for line in lines] == steps
    result = json.loads((folder / "evaluation" / "results.json").read_text())
    assert result["few_step"]["num_steps"] == 2
    assert result["rewards"]["brightness"]["difference"] != 0.0

    expected = weights(folder / "checkpoints" / "step=2.ckpt")
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in weights(again / "checkpoints/step=2.ckpt").items()
    )
    whole, resumed = (
        {step: {k: v for k, v in row.items() if k.startswith("train/")} for step, row in metrics(run_folder).items()}
        for run_folder in (folder, again)
    )
    assert resumed == {1: whole[1]}
    assert float(whole[1]["train/dmd"]) > 0


@pytest.mark.parametrize(
    ("workers", "accumulate", "kill_after"), [pytest.param(0, 1, 9, marks=pytest.mark.slow), (2, 3, 11)]
)
def test_killed_run_resumes_exactly(workers, accumulate, kill_after, sd15, data, tmp_path):
    """14 pairs in micro-batches of 2: the kill falls into the second pass, with accumulation inside a window."""
    options = {"num_workers": workers, "accumulate_grad_batches": accumulate, "max_steps": 12 // accumulate + 1}
    plain = write_config(tmp_path / "c" / "plain.yaml", config(sd15, data, **options))
    kill = {"class_path": "tests.test_whole_runs.Kill", "init_args": {"after": kill_after}}
    killed = write_config(tmp_path / "c" / "killed.yaml", config(sd15, data, callbacks=[kill], **options))

    process = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "main.py"), "fit", "--config", killed, "--name=job"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    resumed = Path(run(["fit", "--config", plain, "--name=job", "--ckpt_path=last"]).trainer.log_dir)
    whole = Path(run(["fit", "--config", plain, "--name=whole"]).trainer.log_dir)

    last = f"checkpoints/step={options['max_steps']}.ckpt"
    expected = weights(whole / last)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed / last).items())
    steps_before = kill_after // accumulate
    before, after = metrics(tmp_path / "runs/job/version_0"), metrics(resumed)
    assert before | after == metrics(whole)
    assert min(after) <= steps_before


@pytest.mark.parametrize(
    ("prompts", "message"),
    [(None, "no prompts to make images from"), ({"source": "gone.txt"}, "gone.txt does not exist")],
)
def test_evaluation_without_prompts_stops_before_the_training(prompts, message, sd15, data, tmp_path, capsys):
    content = config(sd15, data, max_steps=2)
    content["data"]["init_args"]["test_prompts"] = prompts
    with pytest.raises(SystemExit):
        run(["fit", "--config", write_config(tmp_path / "c" / "run.yaml", content), "--evaluate=true"])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/**/*.ckpt"))


def test_validate_test_and_predict_use_the_checkpoint(sd15, data, tmp_path):
    write_pairs(data.parent / "validation.parquet", 5)
    rewards = {
        "brightness": {"class_path": "tests.test_whole_runs.Brightness"},
    }
    callbacks = [
        {"class_path": "callbacks.evaluation.Evaluation", "init_args": {"rewards": rewards}},
        {"class_path": "callbacks.write_images.WriteImages"},
    ]
    content = config(sd15, data.parent, callbacks=callbacks, max_steps=2)
    content["data"]["init_args"]["validation_split"] = "validation"
    content["model"]["init_args"]["validation_draws"] = 2
    yaml_file = write_config(tmp_path / "c" / "run.yaml", content)
    fitted = run(["fit", "--config", yaml_file, "--evaluate=true"])
    folder = Path(fitted.trainer.log_dir)
    after_fit = json.loads((folder / "evaluation" / "results.json").read_text())

    checkpoint = f"--ckpt_path={folder}/checkpoints/step=2.ckpt"
    tested = Path(run(["test", "--config", yaml_file, checkpoint]).trainer.log_dir)
    assert json.loads((tested / "evaluation" / "results.json").read_text())["rewards"] == after_fit["rewards"]
    validated = run(["validate", "--config", yaml_file, checkpoint]).trainer.callback_metrics
    assert 0.0 <= validated["val/implicit_accuracy"] <= 1.0
    predicted = Path(run(["predict", "--config", yaml_file, checkpoint]).trainer.log_dir)
    assert len(list((predicted / "images").glob("*.png"))) == 3
    base = Path(run(["test", "--config", yaml_file]).trainer.log_dir)  # without a checkpoint: the base against itself
    result = json.loads((base / "evaluation" / "results.json").read_text())["rewards"]["brightness"]
    assert result["win_rate"] == 0.5
    assert result["difference"] == 0.0
