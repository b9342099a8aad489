"""A run: LightningCLI with a folder of its own, checkpoints that cannot break, and errors for people."""

import logging
import os
import re
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_modules.cli.caching import MACHINE, EncodingBar
from lightning_modules.cli.checkpoints import AtomicCheckpointIO, check_checkpoint
from lightning_modules.cli.machine import check_machine, check_optimizer
from lightning_modules.cli.parser import LimelightParser
from lightning_modules.cli.run_folder import RUNS, RunLogger, SaveRun, check_writable, last_checkpoint, run_name
from lightning_modules.cli.schema import import_rooms, save_schema

ROOT = Path(__file__).parents[2]
OURS = tuple(str(ROOT / room) for room in ("lightning_modules", "datamodules", "callbacks", "main.py"))

# Warnings of libraries about each other, or about what is meant: frozen networks stay in eval mode.
LIBRARY_NOISE = (
    r"Already found a `peft_config` attribute in the model",  # two adapters are meant
    r"`loftq_config` specified but will be ignored",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Found \d+ module\(s\) in eval mode at the start of training",
    r"The dirpath has changed from",
    r"Using ModelCheckpoint with manual optimization and every_n_train_steps",  # after the step, as everywhere
    r"You have overridden `on_before_batch_transfer`",
)


class App(LimelightParser):
    """Parses, checks, builds and runs one command."""

    def before_instantiate_classes(self) -> None:
        """Everything that can be wrong with a run and is known before a model is built."""
        config = self.config[self.subcommand]
        config.name = run_name(config.name, config.config)
        if self.subcommand == "cache":  # no run, and no folder of one
            self.save_config_callback = None
            defaults = self._parser("cache").get_defaults().trainer
            for name in vars(defaults).keys() - MACHINE:
                config.trainer[name] = defaults[name]
            check_machine(config.trainer)
            return
        self.save_config_callback = SaveRun
        check_machine(config.trainer)
        if self.subcommand == "fit":
            check_optimizer(config.model, config.trainer)
        check_writable(RUNS / config.name)
        if config.ckpt_path == "last":
            config.ckpt_path = str(last_checkpoint(RUNS / config.name))
        if config.ckpt_path is not None and "://" not in config.ckpt_path:
            check_checkpoint(Path(config.ckpt_path))

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; an error of a constructor is told without jsonargparse's account of it."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if not isinstance(cause, (ValueError, OSError, ImportError, MisconfigurationException)):
                raise cause from None  # a bug
            hint = "" if is_ours(cause) else " (LIMELIGHT_TRACEBACK=1 shows where this comes from)"
            raise ValueError(f"{cause}{hint}") from error

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        further = config["logger"] if isinstance(config["logger"], list) else [config["logger"]]
        name = self.config[self.subcommand].name
        if self.subcommand == "cache":
            config |= {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
            config["callbacks"] = [EncodingBar()] if config["enable_progress_bar"] is not False else []
        else:
            config["logger"] = [RunLogger(name), *(logger for logger in further if isinstance(logger, Logger))]
        config["callbacks"] = config["callbacks"] or []
        if not isinstance(config["callbacks"], list):
            config["callbacks"] = [config["callbacks"]]
        if config["default_root_dir"] is None and "SLURM_JOB_ID" in os.environ:
            # Lightning looks here for the checkpoint of a job that SLURM has started again: one folder per job.
            config["default_root_dir"] = str(RUNS / name / f"slurm_{os.environ['SLURM_JOB_ID']}")
        watched = any(isinstance(callback, ProgressBar) for callback in config["callbacks"])
        if config["enable_progress_bar"] is not False and not watched:
            # A terminal is redrawn; a log file gets a line now and then.
            bar = RichProgressBar() if sys.stdout.isatty() else TQDMProgressBar(refresh_rate=50)
            config["callbacks"].append(bar)
        trainer = super()._instantiate_trainer(config, callbacks)
        # FSDP2 and DeepSpeed write folders of shards in their own way.
        writes_files = type(trainer.strategy) in (SingleDeviceStrategy, DDPStrategy)
        if writes_files and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if subcommand != "cache":
            kwargs["weights_only"] = True
        if subcommand == "predict":
            kwargs["return_predictions"] = False  # written by a callback; thousands of images would fill the memory
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        super()._run_subcommand(subcommand)
        if subcommand != "cache":
            rank_zero_info(f"The run's folder is {self.trainer.log_dir}")

    def before_fit(self) -> None:
        """With `evaluate: true`, a missing or unreadable prompt list stops the run before the training."""
        if self.config.fit.evaluate and self.datamodule is not None:
            self.datamodule.trainer = self.trainer
            self.datamodule.setup("test")
            self.datamodule.test_dataloader()

    def after_fit(self) -> None:
        if self.config.fit.evaluate:
            self.trainer.test(self.model, datamodule=self.datamodule)


def run(args: list[str] | None = None) -> App:
    """Run one command; a user's mistake ends the process with one message and no traceback.

    Args:
        args: As on the command line, without the program's name. None takes them from there.
    """
    for message in LIBRARY_NOISE:
        warnings.filterwarnings("ignore", message)
    # Lightning advertises further packages at every start.
    rank_zero_log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero_log.addFilter(lambda record: not re.search("litlogger|litmodels", str(record.msg)))
    if import_rooms() and args is None and "LOCAL_RANK" not in os.environ:
        save_schema()
    try:
        return App(args)
    except (ValueError, OSError, MisconfigurationException) as error:
        if not is_users_mistake(error) or os.environ.get("LIMELIGHT_TRACEBACK") == "1":
            raise
        sys.stderr.write(f"error: {message_of(error)}\n")
        raise SystemExit(1) from None


def is_users_mistake(error: Exception) -> bool:
    """Whether our own code raised the error on purpose: libraries' errors and bugs keep their traceback."""
    if is_from_worker(error):
        files = re.findall(r'File "([^"]+)", line \d+', str(error))
        return bool(files) and files[-1].startswith(OURS)
    return isinstance(error, MisconfigurationException) or is_ours(error)


def is_ours(error: BaseException) -> bool:
    return traceback.extract_tb(error.__traceback__)[-1].filename.startswith(OURS)


def is_from_worker(error: Exception) -> bool:
    return re.match(r"Caught \w+ in DataLoader worker process", str(error)) is not None


def message_of(error: Exception) -> str:
    """The message; of an error that a data worker passed on, the part after its traceback."""
    if is_from_worker(error):
        return re.split(rf"\n{type(error).__name__}: ", str(error))[-1].strip()
    return str(error)
