"""SampleImages and ScorePrompts: what they draw and log, and that training does not notice them."""

import csv
import os
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from diffusers import StableDiffusionPipeline
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from PIL import Image, ImageChops
from rich.progress import Progress

from callbacks.ema import EMA
from callbacks.evaluation import Evaluation
from callbacks.export_pipeline import ExportPipeline
from callbacks.fixed_prompts import read_prompts
from callbacks.grids import draw_grid
from callbacks.sample_images import SampleImages
from callbacks.score_prompts import ScorePrompts
from lightning_modules.backbones.sd15 import SD15
from tests.callbacks.runs import PROMPTS, Data, Redness, logged, make_module, make_trainer


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(5, verbose=False)


def grids(trainer: pl.Trainer) -> list[str]:
    return sorted(path.name for path in (Path(trainer.log_dir) / "samples").iterdir())


def plain_images(folder: Path, seeds: list[int]) -> torch.Tensor:
    """Images of the saved pipeline by diffusers alone."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(PROMPTS, generator=generators, num_inference_steps=2, output_type="pt").images


# ------------------------------------------------------------------------------------------------------------ prompts


def test_prompts_come_from_a_list_or_from_the_lines_of_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n  ein blaues Viereck: größer \n\n", encoding="utf-8")
    assert read_prompts(str(file)) == ["a red circle", "ein blaues Viereck: größer"]
    assert read_prompts(["a", "a", ""]) == ["a", "a", ""]
    file.write_text("\ufeffa\u2028b\r\nc", encoding="utf-8")
    assert read_prompts(str(file)) == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\n\ntwo\n", "line 2 of .* is blank"),
        (b"\n", "there is none"),
        (b"\xff\xfe", "not UTF-8"),
        ("größer".encode("latin-1"), "not UTF-8"),
        ("a\nb\n".encode("utf-16-le"), "line 1 of .* holds NUL characters: the file is probably UTF-16"),
        (None, "there is no file .*one prompt per line"),
    ],
)
def test_a_bad_prompt_file_is_refused(tmp_path, content, message):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        SampleImages(str(file))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        SampleImages(PROMPTS, every_n_steps=0)
    with pytest.raises(ValueError, match="max_prompts is 0"):
        SampleImages(PROMPTS, max_prompts=0)
    with pytest.raises(ValueError, match="prompts: there is none"):
        SampleImages([])
    with pytest.raises(ValueError, match="rewards: there is none"):
        ScorePrompts({}, PROMPTS)


# ---------------------------------------------------------------------------------------------------------- the grids


def test_a_grid_every_n_optimizer_steps_and_one_at_the_end(sd15, tmp_path):
    trainer = make_trainer(tmp_path, [SampleImages(PROMPTS, every_n_steps=2)], max_steps=5, accumulate_grad_batches=2)
    trainer.fit(make_module(sd15), datamodule=Data())
    assert grids(trainer) == ["step_000002.png", "step_000004.png", "step_000005.png"]


@pytest.mark.parametrize("lora", [True, False])
def test_the_grid_shows_the_base_beside_the_trained_model(sd15, tmp_path, lora):
    module = make_module(sd15, lora, lr=0.1)
    trainer = make_trainer(tmp_path, [SampleImages(PROMPTS, every_n_steps=100, seed=7)], max_steps=2)
    trainer.fit(module, datamodule=Data())

    current = module.backbone.generate(PROMPTS, [7, 8, 9])
    base = plain_images(sd15, [7, 8, 9])
    assert (current - base).abs().max() > 0.02
    with Image.open(Path(trainer.log_dir) / "samples/step_000002.png") as grid:
        difference = ImageChops.difference(grid, draw_grid({"base": base, "step 2": current}, PROMPTS))
    assert max(high for _, high in difference.getextrema()) <= 1  # one grey level: batches of other sizes round apart


def test_sampling_settings_go_to_the_backbone(sd15, tmp_path):
    module = make_module(sd15)
    callback = SampleImages(PROMPTS, num_inference_steps=3, guidance_scale=1.0)
    make_trainer(tmp_path, [callback], max_steps=1).fit(module, datamodule=Data())
    with module.backbone.reference():
        expected = module.backbone.generate(PROMPTS, [0, 1, 2], num_inference_steps=3, guidance_scale=1.0)
    torch.testing.assert_close(callback.base_images, expected, rtol=0, atol=1e-6)


def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(sd15, tmp_path):
    def run(folder: Path, max_steps: int, ckpt_path: Path | None = None) -> pl.Trainer:
        checkpoints = ModelCheckpoint(tmp_path / "ckpt", "{step}", every_n_train_steps=2, save_top_k=-1)
        callbacks = [SampleImages(PROMPTS, every_n_steps=1), checkpoints]
        trainer = make_trainer(folder, callbacks, max_steps=max_steps, enable_checkpointing=True)
        trainer.fit(make_module(sd15), datamodule=Data(), ckpt_path=ckpt_path)
        return trainer

    whole = run(tmp_path / "whole", 4)
    resumed = run(tmp_path / "resumed", 4, tmp_path / "ckpt" / "step=2.ckpt")
    assert grids(whole) == [f"step_00000{step}.png" for step in (1, 2, 3, 4)]
    assert grids(resumed) == ["step_000003.png", "step_000004.png"]
    for name in grids(resumed):
        pictures = [(Path(trainer.log_dir) / "samples" / name).read_bytes() for trainer in (whole, resumed)]
        assert pictures[0] == pictures[1]


def test_callbacks_with_the_same_prompts_draw_once(sd15, tmp_path, monkeypatch):
    drawn = []
    generate = SD15.generate

    def counting(self, prompts, seeds, **settings):
        drawn.append(len(prompts))
        return generate(self, prompts, seeds, **settings)

    monkeypatch.setattr(SD15, "generate", counting)
    callbacks = [SampleImages(PROMPTS, 1), ScorePrompts({"red": Redness()}, PROMPTS, 1)]
    make_trainer(tmp_path / "same", callbacks, max_steps=2).fit(make_module(sd15), datamodule=Data())
    assert drawn == [3, 3, 3]  # the base, and two steps

    drawn.clear()
    callbacks = [SampleImages(PROMPTS, 1), ScorePrompts({"red": Redness()}, PROMPTS, 1, seed=1)]
    make_trainer(tmp_path / "other", callbacks, max_steps=2).fit(make_module(sd15), datamodule=Data())
    assert drawn == [3] * 6


# ------------------------------------------------------------------------------------------------ budget, bar, average


def test_a_budget_takes_the_first_prompts_of_a_long_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"thing {i}\n" for i in range(100_000)))
    assert SampleImages(str(file), max_prompts=2).prompts == ["thing 0", "thing 1"]
    assert ScorePrompts({"red": Redness()}, PROMPTS, max_prompts=1).prompts == PROMPTS[:1]


def test_a_large_share_of_time_is_announced_once(sd15, tmp_path, monkeypatch):
    monkeypatch.setattr("callbacks.fixed_prompts.LONG", 0.0)
    monkeypatch.setattr("callbacks.fixed_prompts.LARGE_SHARE", 0.0)
    trainer = make_trainer(tmp_path, [SampleImages(PROMPTS, 1)], max_steps=3)
    with pytest.warns(UserWarning, match="went into drawing") as caught:
        trainer.fit(make_module(sd15), datamodule=Data())
    told = [str(warning.message) for warning in caught if "went into drawing" in str(warning.message)]
    assert len(told) == 1
    assert "SampleImages: " in told[0]
    assert "drawing 3 images every 1 steps. `max_prompts`" in told[0]


def test_a_short_time_is_not_worth_a_word(sd15, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(tmp_path, [SampleImages(PROMPTS, 1)], max_steps=2)
        trainer.fit(make_module(sd15), datamodule=Data())
    assert not [warning for warning in caught if "went into drawing" in str(warning.message)]


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_the_progress_bar_shows_the_drawing_and_goes_on(sd15, tmp_path, monkeypatch, bar):
    lines: list[tuple[str, int]] = []
    update_task, update_line = Progress.update, Tqdm.update

    def watch_task(self, task_id, *, advance=None, **settings):
        lines.append((self._tasks[task_id].description, advance or 0))
        update_task(self, task_id, advance=advance, **settings)

    def watch_line(self, n=1):
        lines.append((self.desc, n))
        return update_line(self, n)

    monkeypatch.setattr(Progress, "update", watch_task)
    monkeypatch.setattr(Tqdm, "update", watch_line)
    module, shown = make_module(sd15, chunk_size=2), bar()
    trainer = make_trainer(tmp_path, [SampleImages(PROMPTS, 2), shown], enable_progress_bar=True)
    trainer.fit(module, datamodule=Data())
    drawn = [number for name, number in lines if name.startswith("Sampling") and number]
    assert drawn == [2, 1] * 3  # at the start, and after steps 2 and 4
    if bar is TQDMProgressBar:
        assert shown.train_progress_bar.n == 4
    assert trainer.global_step == 4


def test_samples_and_scores_are_those_of_the_average(sd15, tmp_path):
    trainer = make_trainer(
        tmp_path,
        [ema := EMA(decay=0.9), SampleImages(PROMPTS, 2), ScorePrompts({"red": Redness()}, PROMPTS, 2)],
        max_steps=2,
    )
    module = make_module(sd15, lr=0.1)
    trainer.fit(module, datamodule=Data())
    average = module.backbone.generate(PROMPTS, [0, 1, 2])  # in place since the end of the fit
    ema._put_weights_back(module)
    weights = module.backbone.generate(PROMPTS, [0, 1, 2])
    red, other = ((images[:, 0] - images[:, 1]).mean().item() for images in (average, weights))
    assert logged(trainer, "val/red")[2] == pytest.approx(red, abs=1e-6)
    assert abs(red - other) > 1e-4


# ---------------------------------------------------------------------------------------------------------- the scores


def test_scores_are_the_rewards_of_the_images_and_wins_over_the_base(sd15, tmp_path):
    module = make_module(sd15)
    trainer = make_trainer(tmp_path, [ScorePrompts({"red": Redness()}, PROMPTS, every_n_steps=2)], max_steps=3)
    trainer.fit(module, datamodule=Data())

    images, base = module.backbone.generate(PROMPTS, [0, 1, 2]), plain_images(sd15, [0, 1, 2])
    red = [(image[0] - image[1]).mean().item() for image in images]
    base_red = [(image[0] - image[1]).mean().item() for image in base]
    assert sorted(logged(trainer, "val/red")) == [2, 3]
    assert logged(trainer, "val/red")[3] == pytest.approx(sum(red) / 3, abs=1e-6)
    won = sum(a > b for a, b in zip(red, base_red, strict=True)) / 3
    assert logged(trainer, "val/red_win_rate")[3] == pytest.approx(won)
    assert trainer.callback_metrics["val/red_win_rate"].item() == pytest.approx(won)


def test_an_untrained_adapter_ties_with_its_base(sd15, tmp_path):
    trainer = make_trainer(tmp_path, [ScorePrompts({"red": Redness()}, PROMPTS, every_n_steps=1)], max_steps=1)
    trainer.fit(make_module(sd15, lr=0.0), datamodule=Data())
    assert logged(trainer, "val/red_win_rate") == {1: 0.5}


def test_a_checkpoint_can_follow_a_score(sd15, tmp_path):
    best = ModelCheckpoint(tmp_path, "{step}", monitor="val/red", mode="max", every_n_train_steps=1)
    callbacks = [ScorePrompts({"red": Redness()}, PROMPTS, every_n_steps=1), best]
    trainer = make_trainer(tmp_path, callbacks, max_steps=3, enable_checkpointing=True)
    trainer.fit(make_module(sd15), datamodule=Data())
    scores = logged(trainer, "val/red")
    assert best.best_model_score.item() == pytest.approx(max(scores.values()))
    assert best.best_model_path.endswith(f"step={max(scores, key=scores.get)}.ckpt")


# --------------------------------------------------------------------------------------------- training does not notice


@pytest.mark.parametrize("lora", [True, False])
def test_training_is_bit_equal_with_and_without_the_callbacks(sd15, tmp_path, lora):
    def run(name: str, callbacks: list[pl.Callback]) -> tuple[dict[int, float], dict[str, torch.Tensor], list[bool]]:
        pl.seed_everything(5, verbose=False)
        module = make_module(sd15, lora, lr=1e-3)
        modes = []

        class Modes(pl.Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                modes.append([part.training for part in pl_module.modules()])

        trainer = make_trainer(tmp_path / name, [*callbacks, Modes()], max_steps=4, accumulate_grad_batches=2)
        trainer.fit(module, datamodule=Data())
        return logged(trainer, "train/loss"), module.trained_parameters(), modes

    rewards = {"red": Redness()}
    watchers = [SampleImages(PROMPTS, 1), ScorePrompts(rewards, PROMPTS, 2, seed=3), ExportPipeline(2)]
    losses, weights, modes = run("alone", [])
    watched_losses, watched_weights, watched_modes = run("watched", [*watchers, Evaluation(rewards)])
    assert len(losses) == 4
    assert watched_losses == losses
    assert watched_modes == modes
    assert all(torch.equal(weights[name], watched_weights[name]) for name in weights)


@pytest.mark.parametrize("lora", [True, False])
def test_metrics_of_training_are_bit_equal_with_and_without_validation(sd15, tmp_path, lora):
    def run(name: str, callbacks: list[pl.Callback], **settings) -> tuple[dict, dict]:
        pl.seed_everything(5, verbose=False)
        module = make_module(sd15, lora, lr=1e-3)
        trainer = make_trainer(tmp_path / name, callbacks, accumulate_grad_batches=2, **settings)
        trainer.fit(module, datamodule=Data())
        columns = read_metrics(trainer)
        return {name: columns[name] for name in columns if name.startswith("train/")}, columns

    plain, _ = run("plain", [])
    validation = {"limit_val_batches": 3, "val_check_interval": 2, "check_val_every_n_epoch": None}
    watchers = [
        EMA(0.9),
        SampleImages(PROMPTS, 1),
        ScorePrompts({"red": Redness()}, PROMPTS, 1, seed=4, num_inference_steps=3),
    ]
    watched, everything = run("watched", watchers, **validation, num_sanity_val_steps=2)
    assert {"train/loss", "train/implicit_accuracy"} <= plain.keys()
    assert watched == plain
    assert len(plain["train/loss"]) == 4
    assert len(everything["val/red"]) == 4
    assert [name for name in everything if name.startswith("val/") and "red" not in name]


def read_metrics(trainer: pl.Trainer) -> dict[str, dict[int, float]]:
    """Column -> step -> value of metrics.csv."""
    with open(Path(trainer.log_dir) / "metrics.csv", newline="") as file:
        columns = next(csv.reader(file))
    return {column: logged(trainer, column) for column in columns if column not in ("step", "epoch")}


# ------------------------------------------------------------------------------------------------------------- loggers


def test_grids_and_scores_reach_csv_tensorboard_and_wandb(sd15, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loggers = [
        CSVLogger(tmp_path, name="run"),
        TensorBoardLogger(tmp_path, name="tensorboard"),
        WandbLogger(save_dir=tmp_path, project="limelight"),
    ]
    callbacks = [SampleImages(PROMPTS, 2), ScorePrompts({"red": Redness()}, PROMPTS, 2)]
    # log_every_n_steps must not decide whether these rare values are kept.
    trainer = make_trainer(tmp_path, callbacks, max_steps=4, logger=loggers, log_every_n_steps=50)
    trainer.fit(make_module(sd15), datamodule=Data())
    scores = logged(trainer, "val/red")
    assert sorted(scores) == [2, 4]
    assert trainer.log_dir == loggers[0].log_dir

    events = EventAccumulator(loggers[1].log_dir).Reload()
    assert [event.step for event in events.Images("samples")] == [2, 4]
    assert {event.step: event.value for event in events.Scalars("val/red")} == pytest.approx(scores)
    with Image.open(Path(trainer.log_dir) / "samples/step_000004.png") as grid:
        assert (events.Images("samples")[1].width, events.Images("samples")[1].height) == grid.size

    summary = dict(loggers[2].experiment.summary)
    assert summary["val/red"] == pytest.approx(scores[4])
    assert summary["trainer/global_step"] == 4
    folder = Path(loggers[2].experiment.dir)
    loggers[2].experiment.finish()
    pictures = sorted((folder / "media" / "images").iterdir(), key=os.path.getmtime)
    assert [path.name.split("_")[0] for path in pictures] == ["samples", "samples"]
    assert list(folder.parent.glob("run-*.wandb"))
