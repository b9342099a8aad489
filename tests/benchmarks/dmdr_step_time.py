"""Seconds, memory and utilisation of DMDR's updates at real size with random weights, by Lightning's own loop.

    python -m tests.benchmarks.dmdr_step_time --model sdxl --strategy zero2 --batch 8          (one H200)
    python -m tests.benchmarks.dmdr_step_time --model sd35-medium --strategy auto --batch 4
    python -m tests.benchmarks.dmdr_step_time --model tiny --device cpu --batch 2 --updates 2

Prints one line of JSON: seconds and counted TFLOP of an update of the student with its inner steps, peak memory, and
the share of the GPU's dense bfloat16 rate that was used (`--peak-tflops`, 989 for an H200).
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from peft import LoraConfig

from datamodules.prompt_stream import PromptStream
from datamodules.prompts import PromptList
from lightning_modules.backbones.base import Backbone
from lightning_modules.backbones.sd3 import SD3
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.dmdr import DMDR
from tests.methods.test_dmdr_cost import SDXL_TARGETS, count
from tests.real_size import save_sd3_configs, save_sdxl_configs
from tests.tiny import save_sd3

RATIO = 5


def random_weights(backbone: Backbone, device: str) -> Backbone:
    """Let a backbone build its networks from their configs on `device`, with small random weights instead of files."""
    load, add_score = backbone.load, backbone.add_score

    def build(*args, **kwargs) -> None:
        with torch.device(device):
            load(*args, **kwargs | {"weights": False})

    def build_score(lora: LoraConfig, scale: float) -> None:
        with torch.device(device):
            add_score(lora, scale, weights=False)

    backbone.load, backbone.add_score = build, build_score
    return backbone


def build(model: str, folder: Path, device: str, checkpointing: bool) -> DMDR:
    """The published recipe's networks: SDXL in one step, all weights trained; SD3 in four, by adapters."""
    settings = {"gradient_checkpointing": checkpointing, "chunk_size": 2}
    adapters, score = LoraConfig(r=64, lora_alpha=128), LoraConfig(r=32, lora_alpha=32)
    options = {"num_steps": 4, "sampler": "ode", "shift": 3.0, "dynamic_steps": 2000}
    if model == "sdxl":
        configs, adapters = save_sdxl_configs(folder), None
        score.target_modules = SDXL_TARGETS
        options = {"num_steps": 1, "renoise": "uniform", "dynamic_steps": 0}
    elif model == "tiny":
        configs = save_sd3(folder)
        settings["max_sequence_length"] = 16
    else:
        configs = save_sd3_configs(folder, {"sd3-medium": "3-medium", "sd35-medium": "3.5-medium"}[model])
        settings |= {"max_sequence_length": 128, "image_size": 512 if model == "sd3-medium" else 1024}
    backbone = (SDXL if model == "sdxl" else SD3)(str(configs), lora=adapters, **settings)
    return DMDR(random_weights(backbone, device), score, ratio=RATIO, **options)


class Clock(pl.Callback):
    """Seconds between updates of the student."""

    def __init__(self) -> None:
        self.updates: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: DMDR, *_) -> None:
        if len(self.updates) < pl_module.generator_step:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
            self.updates.append(time.perf_counter())


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, float | str | None]:
    """Train for some updates and report; see the module's docstring."""
    cuda = arguments.device == "cuda"
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(f"a picture of thing number {i}" for i in range(997)) + "\n")
    strategies = {"zero2": lambda: DeepSpeedStrategy(stage=2, exclude_frozen_parameters=True), "auto": lambda: "auto"}
    clock = Clock()
    trainer = pl.Trainer(
        accelerator="gpu" if cuda else "cpu",
        devices=1,
        strategy=strategies[arguments.strategy](),
        precision="bf16-mixed",
        max_steps=arguments.updates,
        callbacks=[clock],
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = build(arguments.model, folder / "model", arguments.device, not arguments.no_checkpointing)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.fit(module, datamodule=PromptStream(PromptList(str(prompts)), arguments.batch))
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None

    between = [after - before for before, after in zip(clock.updates, clock.updates[1:], strict=False)]
    seconds = statistics.median(between)
    counted = build(arguments.model, folder / "counted", "meta", checkpointing=False)
    counted.backbone.load()
    counted.backbone.add_score(counted.score_lora, counted.fake_scale)
    teraflop = count(counted).update(ratio=RATIO) * arguments.batch
    return {
        "model": arguments.model,
        "strategy": arguments.strategy,
        "batch": arguments.batch,
        "checkpointing": not arguments.no_checkpointing,
        "seconds_per_update": seconds,
        "seconds_per_inner_step": seconds / RATIO,
        "tflop_per_update": teraflop,
        "model_flops_utilisation": teraflop / seconds / arguments.peak_tflops,
        "peak_gib": peak,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def main(arguments: list[str] | None = None) -> dict[str, float | str | None]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["sdxl", "sd3-medium", "sd35-medium", "tiny"], default="sdxl")
    parser.add_argument("--strategy", choices=["auto", "zero2"], default="auto")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batch", type=int, default=4, help="Prompts of an inner step.")
    parser.add_argument("--updates", type=int, default=6, help="Updates of the student; the first is not timed.")
    parser.add_argument("--no-checkpointing", action="store_true", help="Keep activations: faster, more memory.")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="Dense bfloat16 rate of the GPU.")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(parser.parse_args(arguments), Path(folder))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
