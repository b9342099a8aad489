"""On the embedded world the evaluation of a DPO run tells the truth: all of it once more, from its files alone."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from datamodules.toy_world.oracle import judge
from lightning_modules.cli.app import run

ROOT = Path(__file__).parents[2]
PIPELINE = ROOT / "datamodules" / "toy_world" / "pipeline"
NUMBER = 48
ORACLE = "lightning_modules.rewards.toy_oracle.ToyOracle"
REWARDS = {part: {"class_path": ORACLE, "init_args": {"part": part}} for part in ("vividness", "match")}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """The folder of a short DPO run on vividness labels that has evaluated itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        fitted = run(
            [
                *("fit", "--config", str(ROOT / "cli_configs/toy/dpo.yaml")),
                f"--model.init_args.backbone.init_args.pretrained={PIPELINE}",
                "--data.init_args.source=world",
                "--data.init_args.num_pairs=256",
                f"--data.init_args.num_test_prompts={NUMBER}",
                "--trainer.max_steps=25",
                "--trainer.limit_val_batches=0",
                "--trainer.callbacks=callbacks.export_pipeline.ExportPipeline",
                "--trainer.callbacks+=callbacks.evaluation.Evaluation",
                "--trainer.callbacks.save_images=true",
                f"--trainer.callbacks.rewards={json.dumps(REWARDS)}",
            ]
        )
        return Path(fitted.trainer.log_dir).absolute()


def saved(evaluation: Path, role: str) -> np.ndarray:
    """(N, H, W, 3) bytes."""
    files = sorted((evaluation / "evaluation" / "images").glob(f"*_{role}.png"))
    return np.stack([np.asarray(Image.open(file)) for file in files])


def scores(images: np.ndarray, prompts: list[str], part: str) -> np.ndarray:
    """(N,) of the oracle, one image after the other."""
    pixels = torch.from_numpy(images.astype(np.float32) / 255).permute(0, 3, 1, 2)
    return np.array([getattr(judge(pixels[i : i + 1], [prompts[i]]), part).item() for i in range(len(prompts))])


def prompts_of(evaluation: Path) -> list[str]:
    with open(evaluation / "evaluation" / "scores.csv", newline="") as file:
        return [row["prompt"] for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["vividness", "match"])
def test_the_numbers_follow_from_the_saved_images(evaluation, part):
    found = json.loads((evaluation / "evaluation" / "results.json").read_text())["rewards"][part]
    prompts = prompts_of(evaluation)
    assert prompts == (PIPELINE.parent / "prompts" / "heldout.txt").read_text().split("\n")[:NUMBER]
    tuned, base = (scores(saved(evaluation, role), prompts, part) for role in ("tuned", "base"))
    won = (tuned > base) + 0.5 * (tuned == base)
    print(part, json.dumps(found))
    assert found["tuned"] == pytest.approx(tuned.mean(), abs=1e-6)
    assert found["base"] == pytest.approx(base.mean(), abs=1e-6)
    assert found["difference"] == pytest.approx((tuned - base).mean(), abs=1e-6)
    assert found["win_rate"] == pytest.approx(won.mean(), abs=1e-9)
    assert found["ties"] == pytest.approx((tuned == base).mean(), abs=1e-9)

    random = np.random.default_rng(3)
    rows = random.integers(NUMBER, size=(20_000, NUMBER))
    # Two bootstraps of some 10,000 resamples know an end to a few hundredths of the standard error; a win rate of few
    # prompts moves in steps of half a prompt.
    for name, values, step in (("win_rate", won, 0.5 / NUMBER), ("difference", tuned - base, 0.0)):
        expected = np.percentile(values[rows].mean(axis=1), [2.5, 97.5])
        tolerance = 0.1 * values.std() / np.sqrt(NUMBER) + step
        assert found[f"{name}_interval"] == pytest.approx(expected, abs=tolerance)


@pytest.mark.slow
def test_the_saved_images_are_those_of_base_and_export(evaluation):
    pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    prompts = prompts_of(evaluation)[:8]

    def draw() -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in range(8)]
        images = pipeline(prompts, generator=generators, num_inference_steps=20, guidance_scale=2.0).images
        return np.stack([np.asarray(image) for image in images]).astype(int)

    base, tuned = saved(evaluation, "base")[:8].astype(int), saved(evaluation, "tuned")[:8].astype(int)
    assert np.abs(draw() - base).max() <= 2
    pipeline.load_lora_weights(evaluation / "export", weight_name="pytorch_lora_weights.safetensors")
    assert np.abs(draw() - tuned).max() <= 2
    assert np.abs(tuned - base).max() > 20
