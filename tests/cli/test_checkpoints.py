"""Checkpoints are written whole or not at all; hostile, damaged and wrong ones stop a run before its model is built."""

import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules.cli.checkpoints import AtomicCheckpointIO, read_checkpoint
from main import main
from tests.cli.runs import ARGUMENTS, LoggingModel

ROOT = Path(__file__).parents[2]
CHECKPOINT = {"state_dict": {"weight": torch.zeros(3)}, "pytorch-lightning_version": "2.6.0"}


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    monkeypatch.setattr(LoggingModel, "built", 0)


def saving(lines: str) -> subprocess.CompletedProcess[str]:
    """Run a process that prepares itself with `lines` and then writes a megabyte over "model.ckpt"."""
    code = (
        "import os, resource, signal, torch\n"
        "from lightning_modules.cli.checkpoints import AtomicCheckpointIO\n"
        f"{lines}\n"
        "AtomicCheckpointIO().save_checkpoint({'state_dict': {'weight': torch.ones(2**18)}}, 'model.ckpt')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_checkpoint_is_written_and_read():
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, "new/folder/model.ckpt")
    read = AtomicCheckpointIO().load_checkpoint("new/folder/model.ckpt")
    assert torch.equal(read["state_dict"]["weight"], torch.zeros(3))
    assert os.listdir("new/folder") == ["model.ckpt"]


def test_kill_before_the_end_of_writing_leaves_the_old_checkpoint():
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, "model.ckpt")
    run = saving("os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL)")
    assert run.returncode == -signal.SIGKILL
    assert torch.equal(read_checkpoint(Path("model.ckpt"))["state_dict"]["weight"], torch.zeros(3))
    (part,) = set(os.listdir()) - {"model.ckpt"}
    assert part.endswith(".part")  # what the killed process leaves is not taken for a checkpoint


def test_full_disk_leaves_the_old_checkpoint_and_nothing_else():
    AtomicCheckpointIO().save_checkpoint(CHECKPOINT, "model.ckpt")
    run = saving("resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))")
    assert run.returncode == 1
    message = run.stderr.splitlines()[-1]
    assert message.startswith("OSError: could not write the checkpoint model.ckpt: ")
    assert "make room and continue with `--ckpt_path last`" in message
    assert torch.equal(read_checkpoint(Path("model.ckpt"))["state_dict"]["weight"], torch.zeros(3))
    assert os.listdir() == ["model.ckpt"]


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (3000, "error: cannot write the run's folder "),  # before the model is built
        (4200, "error: could not write the checkpoint runs/run/version_0/checkpoints/"),  # which has 4.6 kB
    ],
)
def test_full_disk_is_one_message(room: int, expected: str, capsys: pytest.CaptureFixture):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(SystemExit) as end:
            main(["fit", *ARGUMENTS])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert end.value.code == 1
    assert expected in err
    assert "Traceback" not in err
    assert not list(Path("runs").rglob("*.part"))


def test_runs_write_through_the_atomic_io():
    from lightning_modules.cli import app

    trainer = app.run(["fit", *ARGUMENTS]).trainer
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO


class Payload:
    """Unpickling this runs a command."""

    def __reduce__(self):
        return os.system, ("touch hacked",)


def write_hostile(path: Path) -> None:
    torch.save({**CHECKPOINT, "callbacks": Payload()}, path)


def write_hostile_in_the_old_format(path: Path) -> None:
    torch.save({**CHECKPOINT, "callbacks": Payload()}, path, _use_new_zipfile_serialization=False)


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"state_dict": Payload()}))


def write_truncated(path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.ones(10_000)}}, path)
    path.write_bytes(path.read_bytes()[:-15_000])


def write_empty(path: Path) -> None:
    path.write_bytes(b"")


def write_text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\n")


def write_weights(path: Path) -> None:
    torch.save({"unet.weight": torch.zeros(3)}, path)


def write_tensor(path: Path) -> None:
    torch.save(torch.zeros(3), path)


def write_folder(path: Path) -> None:
    path.mkdir()
    (path / "epoch=0.ckpt").write_bytes(b"")


def write_pipeline(path: Path) -> None:
    path.mkdir()
    (path / "model_index.json").write_text("{}")


def write_adapter(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (write_hostile, "is refused: it holds more than tensors"),
        (write_hostile_in_the_old_format, "is refused: it holds more than tensors"),
        (write_pickle, "is refused: it holds more than tensors"),
        (write_truncated, "is damaged or is no checkpoint"),
        (write_empty, "is damaged or is no checkpoint"),
        (write_text, "is damaged or is no checkpoint"),
        (write_weights, "its `state_dict` is missing"),
        (write_tensor, "its `state_dict` is missing"),
        (write_folder, "is a folder. Give the .ckpt file in it"),
        (write_pipeline, "is a model folder, not a checkpoint"),
        (write_adapter, "is a model folder, not a checkpoint"),
    ],
)
@pytest.mark.parametrize("command", ["fit", "test"])
def test_bad_checkpoint_stops_before_the_model(command: str, write, expected: str, capsys: pytest.CaptureFixture):
    write(Path("bad.ckpt"))
    with pytest.raises(SystemExit) as end:
        main([command, *ARGUMENTS, "--ckpt_path=bad.ckpt"])
    err = capsys.readouterr().err
    assert end.value.code == 1
    assert expected in err
    assert "bad.ckpt" in err
    assert "Traceback" not in err
    assert len(err[err.index("error:") :].splitlines()) == 1
    assert not Path("hacked").exists()
    assert LoggingModel.built == 0
    assert not list(Path("runs").rglob("version_*"))


def test_safetensors_are_pointed_to_pretrained(capsys: pytest.CaptureFixture):
    Path("unet.safetensors").write_bytes(b"x")
    with pytest.raises(SystemExit):
        main(["fit", *ARGUMENTS, "--ckpt_path=unet.safetensors"])
    assert "holds weights only. To start from them, set `model.init_args" in capsys.readouterr().err


def test_missing_checkpoint_is_a_usage_error(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        main(["fit", *ARGUMENTS, "--ckpt_path=runs/nope.ckpt"])
    assert end.value.code == 2
    assert "ckpt_path: runs/nope.ckpt does not exist" in capsys.readouterr().err


def test_weights_only_cannot_be_switched_off(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as end:
        main(["fit", *ARGUMENTS, "--weights_only=false"])
    assert end.value.code == 2
    assert "unrecognized arguments: --weights_only=false" in capsys.readouterr().err


def test_checkpoint_that_turns_hostile_after_the_check_is_still_refused():
    write_hostile(Path("bad.ckpt"))
    with pytest.raises(ValueError, match="is refused"):
        AtomicCheckpointIO().load_checkpoint("bad.ckpt")
    assert not Path("hacked").exists()
