"""The folder of a run, runs/<name>/version_N: made once, never shared, with everything needed to repeat the run."""

import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

RUNS = Path("runs")
PACKAGES = ("limelight", "lightning", "diffusers", "transformers", "peft", "datasets", "deepspeed")


class RunLogger(CSVLogger):
    """metrics.csv in the run's folder, written at every logged step.

    The folder is made by the first process that asks, with a number that no other run has: two runs that start in the
    same second do not write into each other.
    """

    def __init__(self, name: str) -> None:
        super().__init__(RUNS, name=name, flush_logs_every_n_steps=1)
        self._last: tuple[int | None, dict[str, Any]] | None = None

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if metrics.keys() <= {"epoch"}:  # a batch that logged nothing
            return
        if (step, metrics) != self._last:  # written with the checkpoint
            super().log_metrics(metrics, step)
        self._last = step, dict(metrics)

    def _get_next_version(self) -> int:
        version = super()._get_next_version()
        while rank_zero_only.rank == 0:
            try:
                os.makedirs(Path(self.root_dir, f"version_{version}"))
                break
            except FileExistsError:
                version += 1
        return version


class SaveMetrics(Callback):
    """Writes the metrics of a step before its checkpoint gets its name: the Trainer would do so after it.

    A run killed in between and resumed would lack them.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        progress, connector = trainer.fit_loop.epoch_loop.batch_progress.total, trainer._logger_connector
        at_end_of_batch = trainer.training and progress.processed > progress.completed
        if at_end_of_batch and connector.should_update_logs and not trainer.fit_loop._should_accumulate():
            metrics = {name: value.item() for name, value in connector.metrics["log"].items()}
            if metrics:
                logger = trainer.loggers[0]
                step = trainer.fit_loop.epoch_loop._batches_that_stepped
                logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step)
                logger.save()


class SaveRun(SaveMetrics, SaveConfigCallback):
    """Saves the resolved config and the environment before the first step."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = trainer.loggers[0].log_dir  # trainer.log_dir would wait for the other ranks, which are not here
        Path(folder, "environment.json").write_text(json.dumps(describe_environment(), indent=2) + "\n")


def describe_environment() -> dict[str, Any]:
    """What a reader needs besides the config: code, versions, command and devices."""
    versions = {"torch": torch.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "command": shlex.join(sys.argv),
        "git_commit": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        or [f"CPU ({platform.machine()}, {os.cpu_count()} cores)"],
        "versions": versions,
    }


def git(*arguments: str) -> str | None:
    """Output of a git command in the checkout that runs, or None outside one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def run_name(name: str | None, configs: list[Any] | None) -> str:
    """The given name, else folder and stem of the first config: cli_configs/toy/dpo.yaml -> toy-dpo."""
    if name is None:
        files = [Path(str(config)).absolute() for config in configs or [] if config is not None]
        return f"{files[0].parent.name}-{files[0].stem}" if files else "run"
    if not name or name != Path(name).name or name in (".", ".."):
        raise ValueError(f"name is {name!r}; expected one folder name without slashes, as `name: my-run`.")
    return name


def check_writable(folder: Path) -> None:
    """Raise before anything is built if the run's folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
    except OSError as error:
        raise OSError(
            f"cannot write the run's folder {folder.absolute()}: {error.strerror}. Runs go to ./runs/<name>: start "
            "the command in a folder that you may write to and that has room."
        ) from None


def last_checkpoint(folder: Path) -> Path:
    """The newest checkpoint below runs/<name>, whichever version wrote it."""
    # A kill between the removal of a checkpoint and the renewal of last.ckpt leaves that link without its file.
    found = [path for path in folder.glob("version_*/**/*.ckpt") if path.exists()]
    if not found:
        raise FileNotFoundError(
            f"--ckpt_path last: there is no checkpoint below {folder}. Give the path of a .ckpt file, or leave the "
            "option out to start from the beginning."
        )
    return max(found, key=lambda path: path.stat().st_mtime_ns)
