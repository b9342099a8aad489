"""`python main.py cache --rewards...` as a user gives it: on two ranks, from YAML, and what is told of mistakes."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_modules.cli import app
from main import main
from tests.datamodules.files import write_parquet

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])


@pytest.fixture(scope="module")
def recipe(sd15: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training config that names the scores before they are there."""
    folder = tmp_path_factory.mktemp("recipe")
    captions = ["a red circle and a blue square in a row"]
    write_parquet(folder / "pairs/train.parquet", 24, caption=24 * captions)
    write_parquet(folder / "pairs/validation.parquet", 4, caption=4 * captions)
    lora = {"r": 2, "lora_alpha": 2, "init_lora_weights": "gaussian"}
    backbone = {"pretrained": str(sd15), "lora": lora, "num_inference_steps": 2}
    data = {"source": str(folder / "pairs"), "validation_split": "validation", "resolution": 16, "batch_size": 2}
    data |= {"labels_from": "scores/red"}
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
            "max_steps": 2,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
        },
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))
    return folder / "recipe.yaml"


def command(recipe: Path, folder: Path | str = ".", reward: str = "tests.datamodules.scoring.Redness") -> list[str]:
    scoring = ["--encode=false", "--rows_per_shard=3", f"--rewards.red={reward}"]
    return ["cache", f"--config={recipe}", f"--folder={folder}", *scoring]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_scores_are_made_and_trained_on(recipe: Path, caplog: pytest.LogCaptureFixture):
    main(command(recipe))
    assert [path.name for path in Path().iterdir()] == ["scores"]
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        main(["fit", f"--config={recipe}", "--name=scored"])
    assert "labels_from scores/red: 16 pairs of split 'train'" in caplog.text
    assert list(Path("runs/scored").glob("version_0/metrics.csv"))


def test_feedback_trains_from_yaml(recipe: Path):
    more = {
        "model": {"init_args": {"feedback": {"class_path": "tests.datamodules.scoring.Redness"}}},
        "data": {"init_args": {"originals": True, "labels_from": None}},
    }
    Path("feedback.yaml").write_text(yaml.safe_dump(more))
    main(["fit", f"--config={recipe}", "--config=feedback.yaml", "--name=online"])
    header = Path("runs/online/version_0/metrics.csv").read_text().splitlines()[0]
    assert "train/feedback_agreement" in header.split(",")


@pytest.mark.slow
def test_two_ranks_write_what_one_writes(recipe: Path, tmp_path: Path):
    main(command(recipe, "one"))
    process = subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *command(recipe, "two"), "--trainer.devices=2"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert contents(tmp_path / "two/scores/red") == contents(tmp_path / "one/scores/red")
    assert len(contents(tmp_path / "one/scores/red")) == 1 + 6 + 1  # 16 pairs and 3 to validate on


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rewards.red=ToyOracle", "--rewards.red.part=loud"], "part: expected one of ['match', 'strict'"),
        (
            ["--rewards.red=CLIPScore", "--rewards.red.pretrained=/no/clip"],
            "there is no folder '/no/clip'",
        ),
        (["--rewards.red=ToyOracle"], "the oracle judges square pictures"),
        (["--rewards=null"], "There is nothing to do: encode is false"),
    ],
)
def test_mistake_is_one_message(arguments: list[str], expected: str, recipe: Path, capsys: pytest.CaptureFixture):
    given = [word for word in command(recipe) if not word.startswith("--rewards")]
    with pytest.raises(SystemExit) as end:
        app.run([*given, *arguments])
    err = capsys.readouterr().err
    assert end.value.code in (1, 2)
    assert expected in err
    assert "Traceback" not in err


def test_scores_that_are_not_there_yet_are_told_of(recipe: Path, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit):
        main(["fit", f"--config={recipe}"])
    err = capsys.readouterr().err
    assert "error: There are no scores in scores/red (no scores.json). Have them scored: `python main.py cache`" in err
