"""Leave behind what diffusers and ComfyUI load, and prove that it loads."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_modules.backbones.base import SAMPLING_FILE, Backbone
from lightning_modules.base import AlignmentModule

# Largest difference of one forward pass, relative to its largest output. Both sides do the same operations on the same
# weights, so the difference is normally zero; a lost or wrongly scaled adapter is far above.
TOLERANCE = 1e-5
TOLERANCE_LOW_PRECISION = 1e-3
# Share of what the training brought about that may differ where factors were multiplied into weights, and, in units of
# the type's precision, where weights were rounded: the network magnifies both.
FOLDING = 5e-3
ROUNDINGS = 8
# Mean difference of the images, in [0, 1], that a distilled model and its export draw: a wrong timestep is far above.
IMAGE_TOLERANCE = 1e-3
IMAGE_TOLERANCE_LOW_PRECISION = 1e-2

LORA_FILE = "pytorch_lora_weights.safetensors"
LoraFormat = Literal["diffusers", "kohya"]
DenoiserCall = tuple[tuple[Any, ...], dict[str, Any], Tensor]  # positional inputs, keyword inputs, output


class ExportPipeline(pl.Callback):
    """Write `export/` into the run's folder when fit ends: the LoRA, or a whole pipeline if all weights were trained.

    The export is written beside its place, loaded again as a user would, and one forward pass of the denoiser is
    compared with the model in memory; of a distilled model an image is compared as well, drawn by the exported
    scheduler. Only then the export takes its place, replacing an earlier one. An interruption never leaves half an
    export under that name. Weights that FSDP2 has spread over the ranks are gathered first.

    Args:
        every_n_steps: Export during training too, every so many optimizer steps. Null exports at the end only.
        formats: Layouts of a LoRA's file. "diffusers" is pytorch_lora_weights.safetensors, for `load_lora_weights`;
            "kohya" is <name>.safetensors for ComfyUI, A1111 and sd-scripts. Null writes those of the family.
        merged: Write a LoRA into `merged/` as well, added to the weights of a whole pipeline: for users without PEFT.
        dtype: Type of the exported weights.
        name: Name of kohya's file, which is how ComfyUI lists it. Null takes the run's name.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        formats: list[LoraFormat] | None = None,
        merged: bool = False,
        dtype: Literal["float32", "float16"] = "float32",
        name: str | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; expected 1 or more optimizer steps, or null.")
        if formats is not None and not set(formats) <= {"diffusers", "kohya"} or formats == []:
            raise ValueError(f"formats is {formats}; expected diffusers, kohya or both, or null.")
        if dtype not in ("float32", "float16"):
            raise ValueError(f"dtype is {dtype!r}; expected float32 or float16.")
        if name is not None and (not re.fullmatch(r"\w[\w.-]*", name) or name.endswith(Path(LORA_FILE).stem)):
            raise ValueError(
                f"name is {name!r}; expected a file name of letters, digits, '.', '_' and '-', without .safetensors, "
                f"that is not diffusers' {Path(LORA_FILE).stem}."
            )
        self.every_n_steps = every_n_steps
        self.formats = formats
        self.merged = merged
        self.dtype = dtype
        self.name = name
        self.seen_step = 0
        self.impossible = False

    def setup(self, trainer: pl.Trainer, pl_module: AlignmentModule, stage: str) -> None:
        if stage == "fit" and pl_module.backbone.lora is None and (self.formats is not None or self.merged):
            raise ValueError(
                "ExportPipeline: `formats` and `merged` are about a LoRA, but this run trains all weights "
                "(backbone.lora is null) and exports a whole pipeline; leave both options out."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        self.seen_step = trainer.global_step
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "export"
        self.impossible = not can_export(trainer.strategy)
        if self.impossible:
            rank_zero_warn(
                f"ExportPipeline: under {type(trainer.strategy).__name__} no rank holds whole weights, so nothing is "
                "exported from this run. ddp, DeepSpeed stage 2 and FSDP2 (ModelParallelStrategy) export."
            )
        backbone = pl_module.backbone
        self.settings: dict[str, Any] = {"dtype": getattr(torch, self.dtype)}
        if backbone.lora is not None:
            formats = self.formats or backbone.lora_formats
            if "kohya" in formats:
                backbone.kohya_modules()  # raises if there is no such layout of these adapters
            name = self.name or file_name(trainer.loggers[0].name if trainer.loggers else None)
            self.settings |= {"formats": formats, "name": name, "merged": self.merged}

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
        partial = self.folder.with_name(".export.partial")
        if trainer.is_global_zero:
            shutil.rmtree(partial, ignore_errors=True)
        if trainer.is_global_zero or isinstance(trainer.strategy, ModelParallelStrategy):
            call = denoiser_call(backbone)
            backbone.export(partial, **self.settings)  # last, so that FSDP2 leaves all ranks in the same state
        if trainer.is_global_zero:
            check_export(backbone, partial, call, self.settings["dtype"])
            replace_folder(self.folder, partial)
            rank_zero_info(f"Exported to {self.folder}")
        trainer.strategy.barrier("export")


def can_export(strategy: Strategy) -> bool:
    """Whether some rank can hold the whole weights."""
    return not (isinstance(strategy, FSDPStrategy) or getattr(strategy, "zero_stage_3", False))


def file_name(run: str | None) -> str:
    """The name of a run as the name of its LoRA's file."""
    name = re.sub(r"[^\w.-]+", "-", run or "").strip(".-")
    return "lora" if not name or name.endswith(Path(LORA_FILE).stem) else name


def replace_folder(folder: Path, new: Path) -> None:
    """Rename `new` to `folder`; an earlier folder is moved aside first and deleted last."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    new.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


@torch.no_grad()
def check_export(backbone: Backbone, folder: Path, call: DenoiserCall, dtype: torch.dtype = torch.float32) -> None:
    """Load every part of an export as a user would and compare one forward pass with the network in memory.

    A merged pipeline is compared in float32 with the base and its LoRA: autocast would round its sums.

    Args:
        backbone: What was exported.
        folder: The export.
        call: Inputs and output of the network in memory.
        dtype: Type of the exported weights.

    Raises:
        RuntimeError: if the outputs differ by more than rounding.
    """
    inputs, keywords, output = call
    tolerance = TOLERANCE if backbone.compute_dtype == torch.float32 else TOLERANCE_LOW_PRECISION
    rounding = ROUNDINGS * torch.finfo(dtype).eps

    def run(pipeline: Any, autocast: bool = True) -> Tensor:
        network = getattr(pipeline, backbone.denoiser_name).eval().to(backbone.device)
        if autocast:
            with backbone.autocast():
                return network(*inputs, **keywords)[0]
        return network(*wide(inputs), **wide(keywords))[0]

    if backbone.lora is None:
        whole = backbone.open_pipeline(folder)
        compare(folder, run(whole), output, tolerance + rounding)
        compare_images(backbone, folder, getattr(whole, backbone.denoiser_name), dtype)
        return
    merged = folder / "merged"
    pipeline = backbone.load_pipeline()
    base_output, base_wide = run(pipeline), run(pipeline, autocast=False)
    for file in sorted(folder.glob("*.safetensors")):
        load_lora(pipeline, file)
        share = rounding if file.name == LORA_FILE else FOLDING + rounding
        compare(file, run(pipeline), output, tolerance, share, base_output)
        if file.name == LORA_FILE:
            compare_images(backbone, folder, getattr(pipeline, backbone.denoiser_name), dtype)
        output_wide = run(pipeline, autocast=False) if merged.exists() else None
        pipeline.unload_lora_weights()
    del pipeline
    if merged.exists():
        whole = backbone.open_pipeline(merged)
        compare(merged, run(whole, autocast=False), output_wide, TOLERANCE + rounding, FOLDING, base_wide)


def compare(
    path: Path,
    reloaded: Tensor,
    output: Tensor,
    tolerance: float,
    share: float = 0.0,
    base_output: Tensor | None = None,
) -> None:
    """Compare the output of a reloaded network with the expected one.

    Args:
        path: What was loaded.
        reloaded: Its output.
        output: The expected one.
        tolerance: Largest difference, relative to the largest output.
        share: Largest further difference, relative to the largest difference from the base.
        base_output: The base model's output.

    Raises:
        RuntimeError: if they differ by more.
    """
    largest = output.abs().max()
    allowed = tolerance * largest
    if base_output is not None:
        allowed += share * (output - base_output).abs().max()
    difference = (reloaded - output).abs().max()
    if not difference <= allowed:
        raise RuntimeError(
            f"The export in {str(path)!r} is not the trained model: loaded again by diffusers, one forward pass "
            f"differs by {difference / largest:.2e} of its largest value; at most {allowed / largest:.0e} is "
            "rounding. The export was left there for inspection; the weights are safe in the checkpoints."
        )


def compare_images(backbone: Backbone, folder: Path, network: torch.nn.Module, dtype: torch.dtype) -> None:
    """Compare an image of a distilled model with what diffusers draws by the exported network and scheduler.

    The pipeline of diffusers ends a flow at t = 0, so that the model in memory does so here, too, wherever its
    training does (0.001 as published, a difference of 0.001 times the velocity).

    Args:
        backbone: What was exported.
        folder: The export.
        network: The denoiser as it was loaded again.
        dtype: Type of the exported weights.

    Raises:
        RuntimeError: if they differ by more than rounding.
    """
    if backbone.few_step is None or not (folder / "scheduler").exists():
        return
    call = json.loads((folder / SAMPLING_FILE).read_text(encoding="utf-8"))
    pipeline, few_step = backbone.pipeline, backbone.few_step
    before = getattr(pipeline, backbone.denoiser_name), pipeline.scheduler
    try:
        backbone.few_step = replace(few_step, end=0.0, timesteps=tuple(backbone.few_step_timesteps.tolist()))
        expected = backbone.generate([backbone.example_prompt], seeds=[0])
        setattr(pipeline, backbone.denoiser_name, network)
        pipeline.scheduler = open_scheduler(folder / "scheduler")
        images = draw_by_pipeline(backbone, seed=0, **call)
    finally:
        backbone.few_step = few_step
        setattr(pipeline, backbone.denoiser_name, before[0])
        pipeline.scheduler = before[1]
    whole = backbone.compute_dtype == dtype == torch.float32
    allowed = IMAGE_TOLERANCE if whole else IMAGE_TOLERANCE_LOW_PRECISION
    difference = (images - expected).abs().mean()
    if not difference <= allowed:
        raise RuntimeError(
            f"The export in {str(folder)!r} does not sample as the student was trained to: with its scheduler an image "
            f"differs by {difference:.1e} on average; at most {allowed:.0e} is rounding. The export was left there for "
            "inspection; the weights are safe in the checkpoints."
        )


def draw_by_pipeline(backbone: Backbone, seed: int, **call: Any) -> Tensor:
    """(1, 3, H, W) float32 image of the example prompt by the pipeline as it is, on the CPU."""
    generator = [torch.Generator().manual_seed(seed)]
    if call["num_inference_steps"] > 1 and backbone.prediction_type == "flow":
        # The pipeline gives the schedulers of flows no generator, so that new noise would come from the global one.
        step = backbone.pipeline.scheduler.step
        backbone.pipeline.scheduler.step = partial(step, generator=generator)
    size = backbone.latent_shape[1] * backbone.pipeline.vae_scale_factor
    with backbone.autocast():
        images = backbone.pipeline(
            [backbone.example_prompt], height=size, width=size, generator=generator, output_type="pt", **call
        ).images
    return images.float().cpu()


def open_scheduler(folder: Path) -> Any:
    """The scheduler that was exported to a folder."""
    import diffusers

    name = json.loads((folder / "scheduler_config.json").read_text(encoding="utf-8"))["_class_name"]
    return getattr(diffusers, name).from_pretrained(folder)


def wide(value: Any) -> Any:
    """Inputs of a network with all floating-point tensors in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: wide(item) for key, item in value.items()}
    return tuple(wide(item) for item in value) if isinstance(value, tuple) else value


def denoiser_call(backbone: Backbone) -> DenoiserCall:
    """Inputs and output of the denoiser's first call when the pipeline draws a prompt in two steps."""
    calls = []
    handle = backbone.denoiser.register_forward_hook(
        lambda module, inputs, keywords, output: calls.append((inputs, keywords, output[0])), with_kwargs=True
    )
    try:
        backbone.generate([backbone.example_prompt], seeds=[0], num_inference_steps=2)
    finally:
        handle.remove()
    return calls[0]


def load_lora(pipeline: Any, file: Path) -> None:
    """Load a LoRA file into a pipeline."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns, at length, that the file has nothing for the text encoder
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    logging.set_verbosity(verbosity)
