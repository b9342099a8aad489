"""Runs of DMDR in one process of several: `python -m tests.methods.dmdr_ranks FILE.json`, once for each rank."""

import importlib
import json
import math
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch.distributed.tensor import DTensor

from lightning_modules.backbones.base import SCORE
from lightning_modules.dmdr import DMDR
from tests.methods.dmdr_runs import Brightness, build, fit


class Watch(pl.Callback):
    """What each step of an optimizer found: whose gradients there were, and what the networks were asked before it."""

    def __init__(self) -> None:
        self.steps: list[tuple[bool, bool]] = []  # whether (student, fake score) had gradients
        self.seen: list[float] = []  # sum of what the networks were given

    def on_train_start(self, trainer: pl.Trainer, pl_module: DMDR) -> None:
        predict = pl_module.backbone.predict

        def recording(x_t, t, condition):
            self.seen.append(x_t.double().sum().item())
            return predict(x_t, t, condition)

        pl_module.backbone.predict = recording

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: DMDR, optimizer) -> None:
        self.steps.append(tuple(has_gradient(part) for part in pl_module.network_parameters()))


def has_gradient(parameters: list[torch.nn.Parameter]) -> bool:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return any((g.to_local() if isinstance(g, DTensor) else g).abs().max() > 0 for g in gradients)


def break_teacher(module: DMDR) -> None:
    """NaN in the teacher's first sample on the last rank, at the second update of the student."""
    clean = module.clean

    def sometimes(prediction, x_t, t):
        x0 = clean(prediction, x_t, t)
        turn = module.generator_step == 1 and module.global_rank == module.trainer.world_size - 1
        if turn and module.backbone.acting[0] == SCORE and module.backbone.acting[1] != module.fake_scale:
            x0[0] = math.nan
        return x0

    module.clean = sometimes


class SaveAt(pl.Callback):
    """Saves a checkpoint after one inner step."""

    def __init__(self, inner_step: int, file: Path) -> None:
        self.inner_step, self.file = inner_step, file

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if pl_module.inner_step == self.inner_step:
            trainer.save_checkpoint(self.file)


def let_deepspeed_run_on_the_cpu() -> None:
    """Lightning refuses DeepSpeed without CUDA, which itself runs on the CPU too (DS_ACCELERATOR=cpu)."""
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import deepspeed

    deepspeed.CUDAAccelerator, deepspeed._validate_device_index_selection = CPUAccelerator, lambda devices: None
    DeepSpeedStrategy.root_device = property(lambda self: torch.device("cpu", 0))
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # would be compiled; gloo does


def one_run(folder: Path, pretrained: str, strategy: str = "auto", ranks: int = 1, **settings) -> DMDR:
    """A run on `ranks` processes, of which this is one: 4 prompts to an inner step, in parts of 2.

    Args:
        folder: Of the run; what each rank saw goes to `rank_<number>.json`.
        pretrained: Folder of a tiny pipeline.
        strategy: "auto", "ddp", "fsdp2", or "zero2" (DeepSpeed, see `let_deepspeed_run_on_the_cpu`).
        ranks: Number of processes.
        settings: `save_at`, an inner step; `ckpt_path`; `broken`, whether the teacher fails once; `max_steps`; else
            DMDR's.
    """
    save_at, ckpt_path = settings.pop("save_at", None), settings.pop("ckpt_path", None)
    max_steps, broken, precision = (
        settings.pop(name, default) for name, default in (("max_steps", 2), ("broken", False), ("precision", "32-true"))
    )
    pl.seed_everything(11, verbose=False)  # before the module, which remembers it
    reward = {"rewards": {"b": Brightness()}, "reward_weights": {"b": 1.0}}
    module = build(Path(pretrained), **{"ratio": 2, "micro_batch_size": 2} | reward | settings)
    if broken:
        break_teacher(module)
    watch = Watch()
    if strategy == "zero2":
        let_deepspeed_run_on_the_cpu()
    strategies = {
        "auto": lambda: "auto",
        "ddp": lambda: DDPStrategy(gradient_as_bucket_view=True),
        "fsdp2": lambda: ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=False),
        "zero2": lambda: DeepSpeedStrategy(stage=2, exclude_frozen_parameters=True, process_group_backend="gloo"),
    }
    runner = fit(
        module,
        folder,
        max_steps,
        ckpt_path,
        [watch, *([] if save_at is None else [SaveAt(save_at, folder / "between.ckpt")])],
        batch_size=4 // ranks,
        strategy=strategies[strategy](),
        devices=ranks,
        precision=precision,
    )
    watched = {"steps": watch.steps, "seen": watch.seen, "global_step": runner.global_step}
    (folder / f"rank_{runner.global_rank}.json").write_text(json.dumps(watched))
    return module


if __name__ == "__main__":
    for name, settings in json.loads(Path(sys.argv[1]).read_text()).items():
        one_run(Path(sys.argv[1]).parent / name, **settings)
