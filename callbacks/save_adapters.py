"""Adapters in PEFT's layout, for those who go on with them in PEFT itself."""

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from callbacks.export_pipeline import can_export, replace_folder
from lightning_modules.backbones.base import GENERATOR, SCORE
from lightning_modules.base import AlignmentModule

FOLDERS = {GENERATOR: "lora_gen", SCORE: "lora_gui"}


class SaveAdapters(pl.Callback):
    """Write a distillation's adapters as lora_gen/step-000100 (the student) and lora_gui/step-000100 (the fake score).

    `PeftModel.from_pretrained(network, folder)` reads them. `scale.json` beside an adapter holds the factor on its
    strength with which it was trained: without it the fake score's adapter is not the fake score. A student of which
    all weights are trained has no adapter; ExportPipeline writes its pipeline.

    Args:
        every_n_steps: Write during training too, every so many updates of the student. Null writes at the end only.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"SaveAdapters: every_n_steps is {every_n_steps}; expected 1 or more, or null.")
        self.every_n_steps = every_n_steps
        self.seen_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        self.seen_step = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: AlignmentModule, *args: object) -> None:
        step = trainer.global_step
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step != self.seen_step:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        if trainer.global_step != self.seen_step:
            self.save(trainer, pl_module)

    def save(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        self.seen_step = trainer.global_step
        if not can_export(trainer.strategy):
            return  # ExportPipeline says why
        run, backbone = Path(trainer.log_dir or trainer.default_root_dir), pl_module.backbone
        for adapter, name in FOLDERS.items():
            if adapter == GENERATOR and backbone.lora is None:
                continue
            partial = run / name / ".partial"
            backbone.save_adapter(partial, adapter)
            if trainer.is_global_zero:
                replace_folder(run / name / f"step-{trainer.global_step:06d}", partial)
        trainer.strategy.barrier("adapters")
        rank_zero_info(f"Saved the adapters of step {trainer.global_step} in {run}")
