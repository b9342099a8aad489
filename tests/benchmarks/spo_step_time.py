"""Rounds of SPO at real size with random weights: prompts per second, MFU, peak memory.

    python -m tests.benchmarks.spo_step_time --output runs/spo_h200.json
    python -m tests.benchmarks.spo_step_time --tiny --output /tmp/spo.json

SD 1.5 at 512 px, LoRA of rank 4, K = 4, 20 steps, ten prompts a round, a judge of ViT-H's size with time weights; the
threshold is 0, so that all pairs count: the dearest round. One round warms up, `--rounds` are timed, and one more is
counted. MFU is the counted FLOPs a second over `--peak`, dense TFLOP/s of the card in half precision.

The published code is not timed beside it: it needs torch 2.3.0, diffusers 0.26.1 and released weights, none of which a
machine without a network can get.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from datamodules.prompt_stream import PromptStream
from datamodules.prompts import PromptList
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.base import COMPUTE_DTYPES
from lightning_modules.rewards.step_preference import StepPreference, TimeConditionedCLIP
from lightning_modules.rewards.towers import Towers, hf_image_processor, hf_tokenizer
from lightning_modules.spo import SPO
from tests.real_size import save_sd15_configs
from tests.tiny import save_clip_tokenizer, save_sd15

VIT_H = {
    "text_config": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "projection_dim": 1024,
}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY_CLIP = {
    "text_config": SMALL | {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513},
    "vision_config": SMALL | {"image_size": 28, "patch_size": 14},
    "projection_dim": 16,
}


class RandomJudge(StepPreference):
    """A step-aware preference model with the weights of its initialisation, made on the device."""

    def __init__(self, folder: Path, config: CLIPConfig, device: torch.device) -> None:
        size = config.vision_config.image_size
        config.save_pretrained(save_clip_tokenizer(folder))
        CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size).save_pretrained(folder)
        super().__init__(None, str(folder), str(folder), allow_untrained=True, chunk_size=64)
        self.config = config
        self.device_of_network = device

    def build(self) -> Any:
        with torch.device(self.device_of_network):
            network = TimeConditionedCLIP(CLIPModel(self.config))
        tokenize = hf_tokenizer("judge", self.clip, self.config.text_config)
        return Towers(network, tokenize), hf_image_processor("judge", self.clip, network)


class Clock(pl.Callback):
    """Seconds of each round, the work on the device included, and what was left when it began."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.valid: list[float] = []
        self.begun = 0.0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if batch["visit"] == 0:
            synchronize(pl_module.device)
            self.begun = time.perf_counter()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch["visit"] == 0:
            self.valid.append(float(trainer.callback_metrics["rollout/valid_share"]))
        if batch["visit"] == pl_module.visits_per_batch(len(batch["prompts"])) - 1:
            synchronize(pl_module.device)
            self.seconds.append(time.perf_counter() - self.begun)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build(tiny: bool, folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[SPO, int]:
    """The module with its networks on the device, and the prompts of a round."""
    config = CLIPConfig(**(TINY_CLIP if tiny else VIT_H))
    judge = RandomJudge(folder / "judge", config, device)
    if tiny:
        pretrained, prompts, settings = save_sd15(folder / "model"), 2, {"num_steps": 6, "first_step": 2}
    else:
        pretrained, prompts, settings = save_sd15_configs(folder / "model"), 10, {}
    lora = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian")
    backbone = SD15(str(pretrained), lora=lora, chunk_size=16)
    module = SPO(backbone, judge, threshold=0.0, **settings)
    with torch.device(device):
        backbone.load(dtype, keep_reference=True, weights=tiny)
    return module, prompts


def measure(tiny: bool, precision: str, rounds: int, peak: float) -> dict[str, Any]:
    """One precision's numbers."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        pl.seed_everything(0, verbose=False)
        module, prompts = build(tiny, Path(folder), device, COMPUTE_DTYPES[precision])
        file = Path(folder) / "prompts.txt"
        file.write_text("\n".join(f"a photo of {i} foxes on a hill, dramatic light" for i in range(prompts)))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

        def fit(epochs: int) -> None:
            trainer = pl.Trainer(
                accelerator="auto",
                devices=1,
                precision=precision,
                max_epochs=epochs,
                callbacks=[clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            trainer.fit(module, datamodule=PromptStream(PromptList(str(file)), prompts))

        fit(1 + rounds)
        timed = clock.seconds[1:]
        peak_memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
        with FlopCounterMode(display=False) as counter:
            fit(1)
    tera = counter.get_total_flops() / 1e12
    second = sum(timed) / len(timed)
    return {
        "precision": precision,
        "prompts_per_round": prompts,
        "seconds_per_round": timed,
        "prompts_per_second": prompts / second,
        "valid_share": clock.valid,
        "tflop_per_prompt": tera / prompts,
        "tflop_per_second": tera / second,
        "mfu": tera / second / peak,
        "peak_memory_gib": peak_memory,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--precision", nargs="+", default=["bf16-mixed", "16-mixed"], choices=sorted(COMPUTE_DTYPES))
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--peak", type=float, default=989.0, help="dense TFLOP/s of the device; an H200's in bfloat16")
    parser.add_argument("--tiny", action="store_true", help="tiny networks: does the script run?")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; expected 1 or more")
    torch.set_float32_matmul_precision("high")
    results = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "tiny": options.tiny,
        "peak_tflops": options.peak,
        "runs": [measure(options.tiny, p, options.rounds, options.peak) for p in options.precision],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=2) + "\n")
    sys.stdout.write(options.output.read_text())


if __name__ == "__main__":
    main()
