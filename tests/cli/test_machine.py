"""Overlays parse over every recipe and build their strategy; what this machine cannot run says so at once."""

import subprocess
import sys
import types
from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml
from jsonargparse import Namespace

from lightning_modules.cli.machine import check_machine
from lightning_modules.cli.parser import LimelightParser
from main import main
from tests.cli.runs import ARGUMENTS, LoggingModel

ROOT = Path(__file__).parents[2]
OVERLAYS = {path.stem: path for path in sorted((ROOT / "cli_configs/trainer").glob("*.yaml"))}
RECIPES = [path for path in sorted((ROOT / "cli_configs").rglob("*.yaml")) if path.parent.name != "trainer"]


@pytest.fixture(scope="module")
def parser() -> jsonargparse.ArgumentParser:
    return jsonargparse.capture_parser(lambda: LimelightParser(["fit"]))


def trainer_settings(**settings) -> Namespace:
    return Namespace(
        **{"strategy": "auto", "precision": None, "accelerator": "auto", "devices": 1, "num_nodes": 1} | settings
    )


# In every test run the first recipe of a method; the others, which differ from it where no overlay does, by hand.
FIRST = {path.parent: path for path in reversed(RECIPES)}.values()
MARKED = [path if path in FIRST else pytest.param(path, marks=pytest.mark.slow) for path in RECIPES]


@pytest.mark.parametrize("recipe", MARKED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_overlay_parses_over_the_recipe(recipe: Path, parser: jsonargparse.ArgumentParser):
    for overlay in OVERLAYS.values():
        config = parser.parse_args(["fit", "--config", str(recipe), "--config", str(overlay)]).fit
        for key, value in yaml.safe_load(overlay.read_text())["trainer"].items():
            if not isinstance(value, dict):
                assert config.trainer[key] == value


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlay_starts_with_its_command(name: str):
    text = OVERLAYS[name].read_text()
    comment = text[: text.index("trainer:")]
    assert f"--config cli_configs/trainer/{name}.yaml" in comment


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1gpu", "auto"),
        ("2nodes", "DDPStrategy"),
        ("bf16", "auto"),
        ("cpu_smoke", "auto"),
        ("ddp", "DDPStrategy"),
        ("fp16", "auto"),
        ("fsdp2", "ModelParallelStrategy"),
        ("zero2", "DeepSpeedStrategy"),
        ("zero3_offload", "DeepSpeedStrategy"),
    ],
)
def test_strategy_of_the_overlay_builds(name: str, expected: str, parser, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    pretend_deepspeed(monkeypatch)
    arguments = ["fit", "--config", str(RECIPES[0]), "--config", str(OVERLAYS[name])]
    strategy = parser.parse_args(arguments).fit.trainer.strategy
    if expected == "auto":
        assert strategy == "auto"
        return
    section = jsonargparse.ArgumentParser()
    from lightning.pytorch.strategies import Strategy

    section.add_subclass_arguments(Strategy, "strategy")
    built = section.instantiate_classes(Namespace(strategy=strategy)).strategy
    assert type(built).__name__ == expected
    if name == "zero2":
        assert built.config["zero_optimization"]["stage"] == 2
        assert built.exclude_frozen_parameters
    if name == "zero3_offload":
        assert built.config["zero_optimization"]["stage"] == 3
        assert built.config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
        assert built.config["zero_force_ds_cpu_optimizer"] is False


def pretend_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DeepSpeedStrategy's constructor asks of the package."""
    from lightning.pytorch.strategies import deepspeed

    package = types.ModuleType("deepspeed")
    package.utils = types.SimpleNamespace(logging=types.SimpleNamespace(logger=types.SimpleNamespace(setLevel=print)))
    monkeypatch.setitem(sys.modules, "deepspeed", package)
    monkeypatch.setattr(deepspeed, "_DEEPSPEED_AVAILABLE", True)
    monkeypatch.setattr(deepspeed, "_DEEPSPEED_GREATER_EQUAL_0_16", True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without GPUs cannot run")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("1gpu", "torch sees no CUDA GPU"),
        ("ddp", "torch sees no CUDA GPU"),
        ("2nodes", "torch sees no CUDA GPU"),
        ("fsdp2", "FSDP2 (ModelParallelStrategy), which needs CUDA GPUs"),
        ("zero2", "DeepSpeed, which is not installed: `uv sync --extra deepspeed`"),
        ("zero3_offload", "DeepSpeed, which is not installed: `uv sync --extra deepspeed`"),
        ("fp16", "precision 16-mixed needs a GPU; on the CPU use 32-true or bf16-mixed."),
    ],
)
def test_overlay_that_cannot_run_here_stops_before_the_model(
    name: str, expected: str, capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setattr(LoggingModel, "built", 0)
    with pytest.raises(SystemExit) as end:
        main(["fit", *ARGUMENTS[:2], "--config", str(OVERLAYS[name])])
    err = capsys.readouterr().err
    assert end.value.code == 1
    assert expected in err
    assert len(err[err.index("error:") :].splitlines()) == 1
    assert LoggingModel.built == 0
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["cpu_smoke", "bf16"])
def test_overlay_for_any_machine_trains(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    main(["fit", "--config", str(OVERLAYS[name]), *ARGUMENTS])
    assert Path("runs/trainer-" + name, "version_0/metrics.csv").exists()


@pytest.mark.slow
def test_ddp_overlay_trains_on_two_cpu_processes(tmp_path: Path):
    overlay = ["--config", str(OVERLAYS["ddp"]), "--trainer.devices=2"]
    command = [sys.executable, str(ROOT / "main.py"), "fit", *overlay, *ARGUMENTS, "--evaluate=true"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    assert [path.name for path in (tmp_path / "runs/trainer-ddp").iterdir()] == ["version_0"]
    assert list((tmp_path / "runs/trainer-ddp/version_0/checkpoints").glob("*.ckpt"))


@pytest.mark.parametrize("precision", ["64-true", "16-true", "bf16-true", "transformer-engine", "16", "bf16"])
def test_other_precisions_are_refused(precision: str):
    with pytest.raises(ValueError, match="expected one of 32-true, bf16-mixed, 16-mixed"):
        check_machine(trainer_settings(precision=precision))


@pytest.mark.parametrize("precision", [None, "32-true", "bf16-mixed"])
def test_precisions_for_the_cpu_are_accepted(precision: str | None):
    check_machine(trainer_settings(precision=precision, accelerator="cpu"))


def test_more_devices_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_machine(trainer_settings(accelerator="gpu", devices=2))
    with pytest.raises(ValueError, match=r"this machine has 2 GPU\(s\): set `--trainer.devices 2`"):
        check_machine(trainer_settings(accelerator="gpu", devices=8))


def test_fsdp2_refuses_loss_scaling(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="use precision: bf16-mixed"):
        check_machine(trainer_settings(strategy=Namespace(class_path="l.ModelParallelStrategy"), precision="16-mixed"))


def test_two_nodes_without_a_launcher_do_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="Start every node with torchrun or srun"):
        check_machine(trainer_settings(num_nodes=2))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    check_machine(trainer_settings(num_nodes=2))
