"""Leave behind what diffusers loads, and prove that it loads."""

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_modules.backbones.base import Backbone
from lightning_modules.base import AlignmentModule

# Largest difference of one forward pass, relative to its largest output. Both sides do the same operations on the same
# weights, so the difference is normally zero; a lost or wrongly scaled adapter is far above.
TOLERANCE = 1e-5
TOLERANCE_LOW_PRECISION = 1e-3

DenoiserCall = tuple[tuple[Any, ...], dict[str, Any], Tensor]  # positional inputs, keyword inputs, output


class ExportPipeline(pl.Callback):
    """Write `export/` into the run's folder when fit ends: the LoRA for `load_lora_weights`, or a whole pipeline.

    The export is written beside its place, loaded again as a user would, and one forward pass of the denoiser is
    compared with the model in memory; only then it takes its place, replacing an earlier one. An interruption never
    leaves half an export under that name. Weights that FSDP2 has spread over the ranks are gathered first.

    Args:
        every_n_steps: Export during training too, every so many optimizer steps. Null exports at the end only.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; expected 1 or more optimizer steps, or null.")
        self.every_n_steps = every_n_steps
        self.seen_step = 0
        self.impossible = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        self.seen_step = trainer.global_step
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "export"
        strategy = trainer.strategy
        self.impossible = isinstance(strategy, FSDPStrategy) or getattr(strategy, "zero_stage_3", False)
        if self.impossible:
            rank_zero_warn(
                f"ExportPipeline: under {type(strategy).__name__} no rank holds whole weights, so nothing is exported "
                "from this run. ddp, DeepSpeed stage 2 and FSDP2 (ModelParallelStrategy) export."
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: AlignmentModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.every_n_steps is not None and step % self.every_n_steps == 0 and step != self.seen_step:
            self.seen_step = step
            self.export(trainer, pl_module.backbone)

    def on_train_end(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        # Also when the last step has just been exported: an EMA puts its average in place at the end.
        self.export(trainer, pl_module.backbone)

    def export(self, trainer: pl.Trainer, backbone: Backbone) -> None:
        if self.impossible:
            return
        weights, call = {}, None
        if trainer.is_global_zero or isinstance(trainer.strategy, ModelParallelStrategy):
            call = denoiser_call(backbone)
            weights = gathered_weights(backbone.denoiser)  # last, so that FSDP2 leaves all ranks in the same state
        if trainer.is_global_zero:
            partial = self.folder.with_name(".export.partial")
            shutil.rmtree(partial, ignore_errors=True)
            handle = backbone.denoiser.register_state_dict_post_hook(
                lambda module, state, prefix, metadata: state.update({prefix + k: v for k, v in weights.items()})
            )
            backbone.export(partial)
            handle.remove()
            check_export(backbone, partial, call)
            replace_folder(self.folder, partial)
            rank_zero_info(f"Exported to {self.folder}")
        trainer.strategy.barrier("export")


def gathered_weights(denoiser: nn.Module) -> dict[str, Tensor]:
    """The trained weights that FSDP2 has spread over the ranks, whole and on the CPU; every rank must call it."""
    trained = [name for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    state = denoiser.state_dict()
    return {name: state[name].full_tensor().cpu() for name in trained if isinstance(state[name], DTensor)}


def replace_folder(folder: Path, new: Path) -> None:
    """Rename `new` to `folder`; an earlier folder is moved aside first and deleted last."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    new.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


@torch.no_grad()
def check_export(backbone: Backbone, folder: Path, call: DenoiserCall) -> None:
    """Load an export as a user would and compare one forward pass with the network in memory.

    Args:
        backbone: What was exported.
        folder: The export.
        call: Inputs and output of the network in memory.

    Raises:
        RuntimeError: if the outputs differ by more than the tolerance.
    """
    inputs, keywords, output = call
    with backbone.autocast():
        reloaded = load_exported_denoiser(backbone, folder)(*inputs, **keywords)[0]
    tolerance = TOLERANCE if backbone.compute_dtype == torch.float32 else TOLERANCE_LOW_PRECISION
    difference = ((reloaded - output).abs().max() / output.abs().max()).item()
    if not difference <= tolerance:
        raise RuntimeError(
            f"The export in {str(folder)!r} is not the trained model: loaded again by diffusers, one forward pass "
            f"differs by {difference:.2e} of its largest value; at most {tolerance:.0e} is rounding. The export was "
            "left there for inspection; the weights are safe in the checkpoints."
        )


def denoiser_call(backbone: Backbone) -> DenoiserCall:
    """Inputs and output of the denoiser's first call when the pipeline draws a prompt in two steps."""
    calls = []
    handle = backbone.denoiser.register_forward_hook(
        lambda module, inputs, keywords, output: calls.append((inputs, keywords, output[0])), with_kwargs=True
    )
    try:
        backbone.generate(["a red circle above a blue square"], seeds=[0], num_inference_steps=2)
    finally:
        handle.remove()
    return calls[0]


def load_exported_denoiser(backbone: Backbone, folder: Path) -> nn.Module:
    """The denoiser of a fresh pipeline: the exported one, or the base with the exported LoRA loaded."""
    if backbone.lora is None:
        pipeline = type(backbone.pipeline).from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    else:
        from diffusers.utils import logging

        pipeline = backbone.load_pipeline()
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it warns, at length, that the file has nothing for the text encoder
        pipeline.load_lora_weights(folder)
        logging.set_verbosity(verbosity)
    return getattr(pipeline, backbone.denoiser_name).eval().to(backbone.device)
