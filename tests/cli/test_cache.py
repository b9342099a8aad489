"""`python main.py cache` as a user gives it: killed, continued, on two ranks; and training from what it made."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lightning_modules.cli import app
from main import main
from tests.cli.runs import ARGUMENTS
from tests.datamodules.files import write_parquet

ROOT = Path(__file__).parents[2]
ROWS, ROWS_PER_SHARD = 60, 2


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])


@pytest.fixture(scope="module")
def recipe(sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training config with callbacks, a logger and limits, all of which are nothing to a cache."""
    folder = tmp_path_factory.mktemp("recipe")
    write_parquet(folder / "pairs/train.parquet", ROWS)
    write_parquet(folder / "pairs/validation.parquet", 4)
    lora = {"r": 2, "lora_alpha": 2, "init_lora_weights": "gaussian"}
    backbone = {"pretrained": str(sd15), "lora": lora, "num_inference_steps": 2}
    data = {"source": str(folder / "pairs"), "validation_split": "validation", "resolution": 16, "batch_size": 2}
    config = {
        "seed_everything": 5,
        "evaluate": False,
        "model": {
            "class_path": "lightning_modules.diffusion_dpo.DiffusionDPO",
            "init_args": {
                "backbone": {"class_path": "lightning_modules.backbones.sd15.SD15", "init_args": backbone},
                "beta": 100.0,
            },
        },
        "data": {"class_path": "datamodules.pickapic.PickAPicDataModule", "init_args": data},
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": 3,
            "limit_predict_batches": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "tensorboard"}},
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 1, "save_top_k": -1},
                },
                {"class_path": "callbacks.export_pipeline.ExportPipeline"},
            ],
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def whole(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted command writes."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    main(command(recipe, folder))
    return contents(folder)


def command(recipe: Path, folder: Path, *more: str) -> list[str]:
    return ["cache", f"--config={recipe}", f"--folder={folder}", f"--rows_per_shard={ROWS_PER_SHARD}", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def start(recipe: Path, folder: Path, *more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "main.py"), *command(recipe, folder, *more)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_after(process: subprocess.Popen, folder: Path, shards: int) -> None:
    """Kill the command and its ranks once so many shards have got their names."""
    deadline = time.monotonic() + 300
    while len(list(folder.glob("*.safetensors"))) < shards:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_cache_leaves_no_run_behind(
    recipe: Path, whole: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture
):
    main(command(recipe, tmp_path / "cache", "--trainer.enable_progress_bar=true"))
    assert "Encoding" in capsys.readouterr().out
    assert contents(tmp_path / "cache") == whole
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]  # no runs/, no tensorboard/
    # 40 + 3 rows are no ties; 41 prompts, with the empty one; the header and three indices.
    assert len(whole) == 20 + 2 + 21 + 4


@pytest.mark.parametrize("shards", [pytest.param(1, marks=pytest.mark.slow), 23])
def test_killed_command_continues_to_the_same_files(shards: int, recipe: Path, whole: dict[str, bytes], tmp_path: Path):
    folder = tmp_path / "cache"
    kill_after(start(recipe, folder), folder, shards)
    left = {name: file for name, file in contents(folder).items() if not name.endswith(".part")}
    assert shards <= len(list(folder.glob("*.safetensors"))) < len(whole) - 4
    assert left.items() <= whole.items()
    times = {name: (folder / name).stat().st_mtime_ns for name in left}
    main(command(recipe, folder))
    assert contents(folder) == whole
    assert {name: (folder / name).stat().st_mtime_ns for name in times} == times


def test_two_ranks_share_the_work_and_may_be_killed(recipe: Path, whole: dict[str, bytes], tmp_path: Path):
    folder = tmp_path / "cache"
    two = "--trainer.devices=2"
    kill_after(start(recipe, folder, two), folder, 9)
    assert len(list(folder.glob("*.safetensors"))) < len(whole) - 4
    process = start(recipe, folder, two)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert contents(folder) == whole
    assert output.count("The cache is complete") == 1


@pytest.mark.slow
def test_one_rank_goes_on_where_two_were_killed(recipe: Path, whole: dict[str, bytes], tmp_path: Path):
    folder = tmp_path / "cache"
    kill_after(start(recipe, folder, "--trainer.devices=2"), folder, 5)
    main(command(recipe, folder))
    assert contents(folder) == whole


def test_the_recipe_trains_from_its_cache(recipe: Path, tmp_path: Path):
    cache = "--data.init_args.cache=cached"
    main(["cache", f"--config={recipe}", cache, "--dtype=float32"])
    main(["fit", f"--config={recipe}", "--name=pixels"])
    main(["fit", f"--config={recipe}", "--name=cached", cache])
    losses = {}
    for name in ("pixels", "cached"):
        with open(f"runs/{name}/version_0/metrics.csv", newline="") as file:
            losses[name] = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert len(losses["pixels"]) == 3
    assert losses["cached"] == pytest.approx(losses["pixels"], abs=1e-5)
    assert Path("runs/cached/version_0/checkpoints").is_dir()
    main(["validate", f"--config={recipe}", "--name=cached", cache])
    # The config of a run is a config for its cache.
    main(["cache", "--config=runs/cached/version_0/config.yaml", "--dtype=float32"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "There is no folder to fill: give `--folder`, or set `data.init_args.cache`."),
        (["--folder=cache", "--data.init_args.random_crop=true"], "random_crop: true shows another part of an image"),
        (["--folder=cache", "--rows_per_shard=0"], "rows_per_shard is 0; expected 1 or more"),
        (["--folder=photos"], "holds other things (cat.png) and no cache"),
        (["--folder=photos/cat.png"], "is a file; expected a folder"),
        (["--folder=cache", "--trainer.precision=64-true"], "trainer.precision is '64-true'"),
        (["--folder=cache", "--ckpt_path=last"], "ckpt_path: no checkpoint holds encoders"),
        (["--folder=/proc/cache"], "The cache /proc/cache cannot be written"),
        (["--folder=cache", "--data.init_args.source=nowhere"], "'nowhere' does not exist"),
    ],
)
def test_mistake_is_one_message(arguments: list[str], expected: str, recipe: Path, capsys: pytest.CaptureFixture):
    Path("photos").mkdir()
    Path("photos/cat.png").write_bytes(b"")
    with pytest.raises(SystemExit) as end:
        app.run(["cache", f"--config={recipe}", *arguments])
    err = capsys.readouterr().err
    assert end.value.code == 1
    assert expected in err
    assert "Traceback" not in err
    assert not Path("cache").exists()


def test_cache_that_is_stale_stops_training_with_one_message(recipe: Path, capsys: pytest.CaptureFixture):
    main(command(recipe, Path("cached")))
    with pytest.raises(SystemExit) as end:
        main(["fit", f"--config={recipe}", "--data.init_args.cache=cached", "--data.init_args.augmentation=joint"])
    assert end.value.code == 1
    err = capsys.readouterr().err
    assert (
        "error: The cache cached is stale, it was made of images in another form: augmentation separate -> joint" in err
    )


def test_model_without_a_backbone_cannot_fill_a_cache(recipe: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["cache", *[a for a in ARGUMENTS if "logger" not in a], "--folder=cache"])
    assert "error: LoggingModel has no backbone" in capsys.readouterr().err
