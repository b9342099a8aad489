"""8-bit AdamW: a recipe that names it is read anywhere, and says what is missing before a model is loaded."""

import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from jsonargparse import Namespace

from lightning_modules.cli.app import run
from lightning_modules.cli.machine import check_optimizer
from lightning_modules.optimizers import AdamW8bit

ROOT = Path(__file__).parents[2]
OURS = "lightning_modules.optimizers.AdamW8bit"


def sections(optimizer: str | None, accelerator: str = "auto") -> tuple[Namespace, Namespace]:
    """The model and trainer sections of a config."""
    settings = Namespace() if optimizer is None else Namespace(optimizer=Namespace(class_path=optimizer))
    return Namespace(class_path="x.Y", init_args=settings), Namespace(accelerator=accelerator)


@pytest.fixture
def bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """A stand-in for the package, and what its AdamW8bit was given."""
    given = []

    class Theirs(torch.optim.AdamW):
        def __init__(self, params, **settings):
            given.append(settings)
            super().__init__(params, **settings)

    package = types.ModuleType("bitsandbytes")
    package.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    package.optim = types.SimpleNamespace(AdamW8bit=Theirs)
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    return given


@pytest.fixture
def no_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "bitsandbytes" else find(name, *_))


@pytest.mark.parametrize("optimizer", [OURS, "bitsandbytes.optim.AdamW8bit"])
def test_what_is_missing_is_said(optimizer, no_bitsandbytes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(
        ValueError, match=r"not installed .* and a CUDA GPU, .*`--model\.optimizer torch\.optim\.AdamW`"
    ):
        check_optimizer(*sections(optimizer))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="uv sync --extra bitsandbytes") as error:
        check_optimizer(*sections(optimizer))
    assert "CUDA" not in str(error.value)


def test_a_gpu_is_asked_for(bitsandbytes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_optimizer(*sections(OURS))
    for accelerator, gpus in (("cpu", 1), ("auto", 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        with pytest.raises(ValueError, match="needs a CUDA GPU, which this run does not use. Without it"):
            check_optimizer(*sections(OURS, accelerator))


def test_other_optimizers_need_nothing(no_bitsandbytes):
    check_optimizer(*sections("torch.optim.AdamW"))
    check_optimizer(*sections(None))


def test_the_packages_class_gets_the_settings(bitsandbytes):
    optimizer = AdamW8bit([torch.nn.Parameter(torch.zeros(2))], lr=3e-5, weight_decay=0.02)
    assert type(optimizer).__name__ == "Theirs"
    assert bitsandbytes == [{"lr": 3e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.02}]


def test_a_run_without_it_stops_before_the_model_is_built(no_bitsandbytes, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "run.yaml"
    config.write_text(
        f"""
model:
  class_path: lightning_modules.diffusion_orpo.DiffusionORPO
  init_args:
    backbone: {{class_path: lightning_modules.backbones.sd15.SD15, init_args: {{pretrained: gone/gone}}}}
    optimizer: {{class_path: {OURS}, init_args: {{lr: 1.0e-5}}}}
data: {{class_path: datamodules.toy_world.data.ToyPairs}}
"""
    )
    with pytest.raises(SystemExit):
        run(["fit", "--config", str(config)])
    assert f"model.optimizer is {OURS}; it needs the package bitsandbytes" in capsys.readouterr().err
