"""Images are the same whatever the batch, and made once: across kills, ranks, batch sizes, runs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.evaluation import Evaluation
from callbacks.image_store import Painter, describe_policy, hash_of, hash_weights, image_size, write_image
from datamodules.prompts import PromptDataModule, PromptList
from lightning_modules.backbones.sd15 import SD15
from tests.callbacks.evaluation_run import evaluate, record_noise, tuned_module
from tests.callbacks.runs import Redness, make_module, make_trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(5, verbose=False)


def save_prompts(folder: Path, number: int) -> Path:
    file = folder / "prompts.txt"
    file.write_text("".join(f"{number} red things, number {i}\n" for i in range(number)))
    return file


def command(pipeline: Path, folder: Path, prompts: Path, batch_size: int, strategy: str = "auto") -> list[str]:
    launcher = [] if strategy == "auto" else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    arguments = map(str, (pipeline, folder, prompts, batch_size, strategy))
    return [sys.executable, *launcher, "-m", "tests.callbacks.evaluation_run", *arguments]


def run(*arguments) -> str:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command(*arguments), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def results(folder: Path) -> dict:
    return json.loads(max((folder / "run").glob("version_*/evaluation/results.json")).read_text())


def images(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in (folder / "images").rglob("*.png"):
        with Image.open(path) as image:
            found[path.name] = np.array(image).astype(int)
    return found


def largest_difference(folder: Path, other: Path) -> int:
    first, second = images(folder), images(other)
    assert first.keys() == second.keys()
    return max(np.abs(first[name] - second[name]).max() for name in first)


# ------------------------------------------------------------------------------------------------ the same everywhere


@pytest.fixture(scope="module")
def alone(sd15, tmp_path_factory):
    """An evaluation of 8 prompts, one image at a time."""
    folder = tmp_path_factory.mktemp("alone")
    prompts = save_prompts(folder, 8)
    evaluate(sd15, folder, prompts, batch_size=1)
    return folder


@pytest.mark.parametrize(("batch_size", "strategy"), [(3, "auto"), (8, "auto"), (3, "ddp")])
def test_images_do_not_depend_on_batch_size_or_ranks(sd15, alone, tmp_path, batch_size, strategy):
    if strategy == "auto":
        evaluate(sd15, tmp_path, alone / "prompts.txt", batch_size)
    else:
        run(sd15, tmp_path, alone / "prompts.txt", batch_size, strategy)
    assert len(images(tmp_path)) == 16  # base and tuned
    difference = largest_difference(alone, tmp_path)
    print(f"batch size {batch_size}, {strategy}: largest difference {difference}/255")
    assert difference <= 1  # 2 are allowed

    noise = {}
    for file in tmp_path.glob("noise_*.pt"):
        noise |= torch.load(file, weights_only=True)
    expected = torch.load(alone / "noise_0.pt", weights_only=True)
    assert noise.keys() == expected.keys() == set(range(8))
    assert all(torch.equal(noise[seed], expected[seed]) for seed in noise)
    assert results(tmp_path)["rewards"]["red"]["tuned"] == pytest.approx(
        results(alone)["rewards"]["red"]["tuned"], abs=1e-4
    )


def test_real_families_start_from_the_same_noise(sdxl):
    module, noise = make_module(sdxl), {}
    module.backbone.load()
    record_noise(module.backbone, noise)
    module.backbone.generate(["a", "b", "c"], [3, 4, 5])
    together = dict(noise)
    for seed in (3, 4, 5):
        module.backbone.generate(["a"], [seed])
    assert all(torch.equal(noise[seed], together[seed]) for seed in together)


# ---------------------------------------------------------------------------------------------------------- made once


@pytest.fixture(scope="module")
def whole(sd15, tmp_path_factory):
    """An uninterrupted evaluation of 24 prompts in batches of 4."""
    folder = tmp_path_factory.mktemp("whole")
    assert "48 images made, 0 were there" in run(sd15, folder, save_prompts(folder, 24), 4)
    return folder


def test_a_killed_test_goes_on_where_it_was(sd15, whole, tmp_path):
    prompts = whole / "prompts.txt"
    for enough in (5, 21):
        process = subprocess.Popen(
            command(sd15, tmp_path, prompts, 4),
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("images/*/*.png"))) < enough:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("images/*/*.png")}
    assert 21 <= len(before) < 48
    assert not list(tmp_path.glob("run/*/evaluation/results.json"))

    printed = run(sd15, tmp_path, prompts, 4)
    assert f"{48 - len(before)} images made, {len(before)} were there" in printed
    assert all(path.stat().st_mtime_ns == time_made for path, time_made in before.items())
    assert results(tmp_path) == results(whole)
    assert largest_difference(tmp_path, whole) == 0


@pytest.mark.slow
def test_two_ranks_go_on_from_what_one_has_made_and_the_other_way_round(sd15, whole, tmp_path):
    (tmp_path / "images").mkdir()
    for k, path in enumerate(sorted((whole / "images").glob("*/*.png"))):
        if k % 3:
            (tmp_path / "images" / path.parent.name).mkdir(exist_ok=True)
            os.link(path, tmp_path / "images" / path.parent.name / path.name)
    there = len(images(tmp_path))
    printed = run(sd15, tmp_path, whole / "prompts.txt", 4, "ddp")
    assert f"{48 - there} images made, {there} were there" in printed
    for role in ("base", "tuned"):
        found, expected = (results(folder)["rewards"]["red"][role] for folder in (tmp_path, whole))
        assert found == pytest.approx(expected, abs=1e-4)
    assert "0 images made, 48 were there" in run(sd15, tmp_path, whole / "prompts.txt", 8)


@pytest.mark.slow
def test_ranks_that_share_a_model_wait_for_each_other_where_one_has_more_to_make(sd15, tmp_path):
    prompts = save_prompts(tmp_path, 8)
    assert "16 images made, 0 were there" in run(sd15, tmp_path, prompts, 2, "fsdp2")
    expected = images(tmp_path)
    files = sorted((tmp_path / "images").glob("*/*.png"))
    for lacking in (files[:1], files[3:8]):  # in some batches one rank has to make an image, and the other none
        for file in lacking:
            file.unlink()
        assert f"{len(lacking)} images made, {16 - len(lacking)} were there" in run(sd15, tmp_path, prompts, 2, "fsdp2")
        again = images(tmp_path)
        assert max(np.abs(again[name] - expected[name]).max() for name in expected) <= 1


def counting(monkeypatch) -> list[int]:
    made = []
    generate = SD15.generate

    def count(self, prompts, seeds, **settings):
        made.append(len(prompts))
        return generate(self, prompts, seeds, **settings)

    monkeypatch.setattr(SD15, "generate", count)
    return made


def test_the_baselines_images_serve_the_next_run(sd15, tmp_path, monkeypatch):
    made = counting(monkeypatch)
    data = PromptDataModule(PromptList(str(save_prompts(tmp_path, 6)), batch_size=4))
    for seed, expected in ((1, 12), (2, 18), (1, 18)):
        trainer = make_trainer(tmp_path, [Evaluation({"red": Redness()})])
        trainer.test(tuned_module(sd15, seed), data, verbose=False)
        assert sum(made) == expected
    assert len(images(tmp_path / "run")) == 18


def test_more_prompts_or_images_of_each_leave_the_others_alone(sd15, tmp_path, monkeypatch):
    made = counting(monkeypatch)
    file, module = str(save_prompts(tmp_path, 6)), tuned_module(sd15)
    for settings, expected in (
        ({"max_prompts": 2}, 4),
        ({}, 12),
        ({"images_per_prompt": 2}, 24),
        ({"images_per_prompt": 3, "max_prompts": 2}, 28),
    ):
        trainer = make_trainer(tmp_path, [Evaluation({"red": Redness()})])
        trainer.test(module, PromptDataModule(PromptList(file, **settings)), verbose=False)
        assert sum(made) == expected


def test_a_repeated_prompt_is_drawn_at_each_of_its_seeds(sd15, tmp_path):
    (tmp_path / "p.txt").write_text("a\na\nb\n")
    trainer = make_trainer(tmp_path, [Evaluation({"red": Redness()})])
    trainer.test(tuned_module(sd15), PromptDataModule(PromptList(str(tmp_path / "p.txt"))), verbose=False)
    assert len(images(tmp_path / "run")) == 6
    found = json.loads((Path(trainer.log_dir) / "evaluation/results.json").read_text())
    assert (found["num_prompts"], found["num_images"]) == (2, 3)


# ------------------------------------------------------------------------------------------ what an image depends on


def policy_of(module, **options) -> str:
    return hash_of(describe_policy(module.backbone, hash_weights(module.backbone), **options))


def test_equal_models_have_equal_names_and_others_do_not(sd15, sd21, sdxl, tmp_path):
    plain = policy_of(tuned_module(sd15))
    assert policy_of(tuned_module(sd15)) == plain
    others = {
        "weights": tuned_module(sd15, seed=2),
        "one weight": tuned_module(sd15),
        "strength of the adapters": tuned_module(sd15),
        "steps": tuned_module(sd15),
        "guidance": tuned_module(sd15, guidance_scale=2.0),
        "schedule": tuned_module(sd21),
        "family": tuned_module(sdxl),
        "vae": tuned_module(sd15),
        "text encoder": tuned_module(sd15),
    }
    with torch.no_grad():
        next(iter(others["one weight"].trained_parameters().values())).view(-1)[0] += 1e-3
        next(others["vae"].backbone.vae.decoder.parameters()).view(-1)[0] += 1e-3
        next(others["text encoder"].backbone.text_encoder.parameters()).view(-1)[0] += 1e-3
    others["strength of the adapters"].backbone.denoiser.set_adapters(["default"], [0.5])
    others["steps"].backbone.num_inference_steps = 3
    names = {what: policy_of(module) for what, module in others.items()}
    assert len({plain, *names.values()}) == 10, names


def test_the_base_has_one_name_in_every_run(sd15):
    lora, full = tuned_module(sd15), tuned_module(sd15, lora=False)
    full.backbone.keep_reference()
    untrained = make_module(sd15, lora=False)
    untrained.backbone.load()
    names = {policy_of(lora, reference=True), policy_of(full, reference=True), policy_of(untrained)}
    assert len(names) == 1
    assert policy_of(full) not in names
    assert policy_of(lora) not in names


def test_prompt_and_seed_are_in_the_name(tmp_path):
    painter = Painter(None, {}, tmp_path)
    assert len({painter.path(prompt, seed) for prompt in ("a", "a ", "b") for seed in (0, 1)}) == 6


# ------------------------------------------------------------------------------------------------------- what breaks


def test_a_damaged_file_is_announced_and_made_again(sd15, tmp_path):
    module = tuned_module(sd15)
    painter = Painter(module.backbone, {}, tmp_path)
    first = painter(["a", "b"], [0, 1])
    painter.path("a", 0).write_bytes(painter.path("a", 0).read_bytes()[:60])
    painter.path("b", 1).write_bytes(b"")
    with pytest.warns(UserWarning, match=r"\.png is damaged .* and is made again"):
        again = painter(["a", "b"], [0, 1])
    assert torch.equal(first, again)
    assert painter.made == 4
    assert torch.equal(painter(["a", "b"], [0, 1]), first)


def test_fresh_and_kept_images_are_the_same_numbers(sd15, tmp_path, monkeypatch):
    backbone = tuned_module(sd15).backbone
    fresh = Painter(backbone, {}, tmp_path)(["a", "b"], [0, 1])
    torch.testing.assert_close(fresh, backbone.generate(["a", "b"], [0, 1]), rtol=0, atol=0.51 / 255)
    assert image_size(backbone) == tuple(fresh.shape[-2:]) == (16, 16)
    monkeypatch.setattr(backbone, "generate", lambda *_, **__: pytest.fail("an image was made"))
    assert torch.equal(Painter(backbone, {}, tmp_path)(["a", "b"], [0, 1]), fresh)


def test_an_image_of_nan_is_refused_and_not_kept(sd15, tmp_path):
    module = tuned_module(sd15)
    with torch.no_grad():
        next(iter(module.trained_parameters().values())).fill_(float("nan"))
    trainer = make_trainer(tmp_path, [Evaluation({"red": Redness()}, baseline=None)])
    data = PromptDataModule(PromptList(str(save_prompts(tmp_path, 2))))
    with pytest.raises(ValueError, match=r"image of prompt '2 red things, number 0' at seed 0 holds NaN: .*diverged"):
        trainer.test(module, data, verbose=False)
    assert not images(tmp_path / "run")


def test_a_full_disk_leaves_no_half_image(tmp_path, monkeypatch):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(
        OSError, match=re.escape(f"image {tmp_path}/ab/x.png: No space left on device. Those made so far")
    ):
        write_image(tmp_path / "ab" / "x.png", torch.zeros(3, 4, 4))
    assert list((tmp_path / "ab").iterdir()) == []


@pytest.mark.parametrize("setting", ["image_folder", "default_root_dir"])
def test_a_folder_that_cannot_be_written_is_told_of_before_the_model_is_loaded(sd15, tmp_path, setting, monkeypatch):
    monkeypatch.setattr(SD15, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("in the way")
    folders = {"image_folder": tmp_path / "images", "default_root_dir": tmp_path} | {setting: tmp_path / "file" / "x"}
    evaluation = Evaluation({"red": Redness()}, image_folder=str(folders["image_folder"]))
    trainer = make_trainer(tmp_path, [evaluation], logger=False, default_root_dir=folders["default_root_dir"])
    with pytest.raises(OSError, match=r"Evaluation: cannot write into .*file/x.*: Not a directory"):
        trainer.test(make_module(sd15), PromptDataModule(PromptList(str(save_prompts(tmp_path, 2)))), verbose=False)


def test_a_bad_prompt_list_is_told_of_before_the_model_is_loaded(sd15, tmp_path, monkeypatch):
    monkeypatch.setattr(SD15, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    (tmp_path / "p.txt").write_text("a\n\nb\n")
    trainer = make_trainer(tmp_path, [Evaluation({"red": Redness()})])
    with pytest.raises(ValueError, match="line 2: the prompt is ''"):
        trainer.test(make_module(sd15), PromptDataModule(PromptList(str(tmp_path / "p.txt"))), verbose=False)
