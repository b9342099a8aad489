"""What every run leaves behind, and how it begins and ends."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_modules.cli import app, checkpoints, run_folder
from main import main
from tests.cli.runs import ARGUMENTS, LoggingModel

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setattr(LoggingModel, "built", 0)


def rows(version: str) -> list[dict[str, str]]:
    with open(f"{version}/metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def error_of(capsys: pytest.CaptureFixture, *arguments: str, command: str = "fit") -> str:
    """Message of a run that must end with status 1 and without a traceback."""
    with pytest.raises(SystemExit) as end:
        main([command, *ARGUMENTS, *arguments])
    assert end.value.code == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err[err.index("error: ") :]


def test_run_folder_holds_metrics_config_and_environment():
    main(["fit", *ARGUMENTS, "--name=first"])
    version = Path("runs/first/version_0")
    assert {path.name for path in version.iterdir()} >= {
        "metrics.csv",
        "config.yaml",
        "environment.json",
        "checkpoints",
    }
    assert [float(row["train/loss"]) > 0 for row in rows(version) if row["train/loss"]] == [True] * 3
    config = yaml.safe_load((version / "config.yaml").read_text())
    assert (config["name"], config["trainer"]["max_steps"], config["seed_everything"]) == ("first", 3, 0)
    environment = json.loads((version / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__
    assert len(environment["git_commit"]) == 40
    assert environment["devices"]


def test_saved_config_repeats_the_run():
    main(["fit", *ARGUMENTS, "--name=first"])
    main(["fit", "--config", "runs/first/version_0/config.yaml"])
    first, again = rows("runs/first/version_0"), rows("runs/first/version_1")
    assert first == again
    assert len(first) >= 3


def test_metrics_are_on_disk_at_every_logged_step(monkeypatch: pytest.MonkeyPatch):
    seen = []
    step = LoggingModel.training_step

    def watching_step(self: LoggingModel, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        file = Path("runs/run/version_0/metrics.csv")
        seen.append(len(file.read_text().splitlines()) if file.exists() else 0)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LoggingModel, "training_step", watching_step)
    main(["fit", *ARGUMENTS])
    assert seen == [0, 2, 3]


def test_metrics_of_a_step_are_on_disk_before_its_checkpoint(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def replace(part: Path, path: Path) -> None:
        seen.append([path.name, *(row["step"] for row in rows("runs/run/version_0") if row["train/loss"])])
        os.rename(part, path)

    monkeypatch.setattr(checkpoints.os, "replace", replace)
    main(["fit", *ARGUMENTS, "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2"])
    assert seen == [["epoch=0-step=2.ckpt", "0", "1"]]
    assert [row["step"] for row in rows("runs/run/version_0") if row["train/loss"]] == ["0", "1", "2"]


def test_name_is_folder_and_stem_of_the_first_config():
    Path("toy").mkdir()
    Path("toy/dpo.yaml").write_text("seed_everything: 3\n")
    Path("overlay.yaml").write_text("evaluate: false\n")
    main(["fit", "--config=toy/dpo.yaml", "--config=overlay.yaml", *ARGUMENTS])
    assert [path.name for path in Path("runs").iterdir()] == ["toy-dpo"]


@pytest.mark.parametrize("name", ["", "a/b", "..", "/tmp/x"])
def test_name_must_be_one_folder(name: str, capsys: pytest.CaptureFixture):
    assert "expected one folder name without slashes" in error_of(capsys, f"--name={name}")
    assert LoggingModel.built == 0


def test_further_loggers_follow_the_csv():
    main(["fit", *ARGUMENTS, "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=tb"])
    assert len(rows("runs/run/version_0")) >= 3
    assert list(Path("tb").rglob("events.out.tfevents.*"))


def test_csv_is_kept_where_loggers_are_switched_off():
    main(["fit", *ARGUMENTS, "--trainer.logger=false"])
    assert len(rows("runs/run/version_0")) >= 3


def test_two_loggers_never_share_a_version():
    one, other = run_folder.RunLogger("same"), run_folder.RunLogger("same")
    assert (one.version, other.version) == (0, 1)
    assert run_folder.RunLogger("same").version == 2


def test_other_ranks_make_no_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_folder.rank_zero_only, "rank", 1)
    assert run_folder.RunLogger("same").version == 0
    assert not Path("runs").exists()


def test_resumed_run_has_its_own_version_and_leaves_the_old_one():
    main(["fit", *ARGUMENTS])
    before = {path: path.read_bytes() for path in Path("runs").rglob("*") if path.is_file()}
    main(["fit", *ARGUMENTS, "--trainer.max_steps=5", "--ckpt_path=last"])
    assert {path: path.read_bytes() for path in before} == before
    assert [row["step"] for row in rows("runs/run/version_1") if row["train/loss"]] == ["3", "4"]
    config = yaml.safe_load(Path("runs/run/version_1/config.yaml").read_text())
    assert config["ckpt_path"] == "runs/run/version_0/checkpoints/epoch=0-step=3.ckpt"


def test_last_is_the_newest_checkpoint_of_the_name():
    for version, name, age in ((0, "step=9.ckpt", 30), (1, "step=2.ckpt", 10), (2, ".step=3.ckpt.17.part", 0)):
        path = Path(f"runs/run/version_{version}/checkpoints", name)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
        os.utime(path, (1e9 - age, 1e9 - age))
    assert run_folder.last_checkpoint(Path("runs/run")).name == "step=2.ckpt"


def test_last_passes_over_a_link_whose_checkpoint_is_gone():
    folder = Path("runs/run/version_0/checkpoints")
    folder.mkdir(parents=True)
    (folder / "step=2.ckpt").write_bytes(b"")
    (folder / "last.ckpt").symlink_to("step=1.ckpt")
    assert run_folder.last_checkpoint(Path("runs/run")).name == "step=2.ckpt"


def test_last_without_a_checkpoint_is_an_error(capsys: pytest.CaptureFixture):
    assert "there is no checkpoint below runs/run" in error_of(capsys, "--ckpt_path=last")
    assert LoggingModel.built == 0


def test_evaluate_tests_the_final_weights():
    main(["fit", *ARGUMENTS, "--evaluate=true"])
    (row,) = [row for row in rows("runs/run/version_0") if row.get("test/weight")]
    checkpoint = torch.load("runs/run/version_0/checkpoints/epoch=0-step=3.ckpt", weights_only=True)
    assert float(row["test/weight"]) == pytest.approx(checkpoint["state_dict"]["layer.weight"].sum().item())


def test_without_evaluate_nothing_is_tested():
    main(["fit", *ARGUMENTS])
    assert "test/weight" not in rows("runs/run/version_0")[0]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_checkpoint_is_read_by_other_commands(command: str):
    main(["fit", *ARGUMENTS])
    main([command, *ARGUMENTS, "--ckpt_path=last"])
    assert Path("runs/run/version_1/config.yaml").exists()


def test_mistake_of_the_user_is_one_message(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch):
    err = error_of(capsys, "--trainer.precision=64-true")
    assert err.splitlines()[0].startswith("error: trainer.precision is '64-true'; expected one of 32-true, bf16-mixed")
    monkeypatch.setenv("LIMELIGHT_TRACEBACK", "1")
    with pytest.raises(ValueError, match="expected one of 32-true"):
        main(["fit", *ARGUMENTS, "--trainer.precision=64-true"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--model.fails_with=value"],
            "error: fails_with is 'value' (LIMELIGHT_TRACEBACK=1 shows where this comes from)",
        ),
        (
            ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.save_top_k=-2"],
            "error: Invalid value for save_top_k",
        ),
        (["--trainer.max_time=soon"], "error: "),
        (["--trainer.limit_val_batches=1.5"], "error: "),
    ],
)
def test_constructor_that_refuses_its_arguments_is_one_message(arguments, expected: str, capsys):
    err = error_of(capsys, *arguments)
    assert err.startswith(expected)
    assert "Union" not in err
    assert len(err.splitlines()) <= 3


def test_bug_of_a_constructor_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        main(["fit", *ARGUMENTS, "--model.fails_with=zero"])


def test_bug_keeps_its_traceback():
    with pytest.raises(KeyError, match="a bug"):
        main(["fit", *ARGUMENTS, "--model.fails_with=bug"])


def test_error_of_a_library_keeps_its_traceback():
    with pytest.raises(FileNotFoundError) as caught:
        torch.load("nowhere.pt")
    assert not app.is_users_mistake(caught.value)


def test_error_from_a_data_worker_loses_the_workers_traceback():
    where = ROOT / "datamodules/pickapic.py"
    text = f'Original Traceback (most recent call last):\n  File "{where}", line 3, in get\nValueError: row 7 is bad.'
    error = ValueError(f"Caught ValueError in DataLoader worker process 0.\n{text}")
    assert app.is_users_mistake(error)
    assert app.message_of(error) == "row 7 is bad."
    assert not app.is_users_mistake(ValueError(str(error).replace(str(where), "/site-packages/numpy/core.py")))


def test_runs_that_is_a_file_stops_before_the_model(capsys: pytest.CaptureFixture):
    Path("runs").write_text("")
    assert "cannot write the run's folder" in error_of(capsys)
    assert LoggingModel.built == 0


def test_folder_that_cannot_be_written_stops_before_the_model(capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(app, "RUNS", Path("/proc/runs"))  # permission bits do not hold for root; /proc does
    err = error_of(capsys)
    assert "cannot write the run's folder /proc/runs/run" in err
    assert "start the command in a folder that you may write to" in err
    assert LoggingModel.built == 0


def test_progress_bar_of_the_yaml_is_the_only_one():
    trained = app.run(["fit", *ARGUMENTS, "--trainer.enable_progress_bar=true", "--trainer.callbacks=TQDMProgressBar"])
    assert [type(callback).__name__ for callback in trained.trainer.callbacks].count("TQDMProgressBar") == 1


def test_console_entry_point_is_declared():
    command = [sys.executable, "-c", "from importlib.metadata import entry_points as e; print(e(name='limelight'))"]
    assert "main:main" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
