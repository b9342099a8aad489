"""Cost of one Diffusion-ORPO pair at SDXL's size, and of a step on the embedded world, counted: for the method's page.

python -m tests.benchmarks.diffusion_orpo_cost
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.backbones.sd15 import SD15
from lightning_modules.base import AlignmentModule
from lightning_modules.diffusion_dpo import DiffusionDPO
from lightning_modules.diffusion_orpo import DiffusionORPO
from lightning_modules.diffusion_sft import DiffusionSFT
from tests.methods.test_diffusion_dpo_cost import count_step
from tests.methods.test_diffusion_orpo_cost import build
from tests.pairs import RandomPairs
from tests.real_size import save_sdxl_configs

TOY = Path(__file__).parents[2] / "datamodules" / "toy_world" / "pipeline"


def count_toy_step(method: type[AlignmentModule], number: int) -> float:
    """GFLOP of one training step on so many pictures or pairs of the embedded world, LoRA of rank 8, from pixels."""
    module = method(SD15(str(TOY), lora=LoraConfig(r=8, lora_alpha=8)), prompt_dropout=0.0)
    module.backbone.load()
    module.backbone.denoiser.train()
    module.log_window = lambda metrics: None
    batch = RandomPairs(batch_size=number, image_size=32, images_only=method is DiffusionSFT).make_batch(0)
    with FlopCounterMode(display=False) as counter:
        module.training_step(batch, 0).backward()
    return counter.get_total_flops() / 1e9


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        configs = save_sdxl_configs(Path(folder) / "sdxl")
        for name, lora in (("all weights", False), ("LoRA, rank 8", True)):
            for checkpointing in (False, True):
                recomputed = ", checkpointing" if checkpointing else ""
                for pixels in (False, True):
                    module = build(configs, lora, gradient_checkpointing=checkpointing)
                    source = "pixels" if pixels else "latents"
                    print(f"{name}{recomputed}, from {source}: {count_step(module, pixels, 1024):.2f} TFLOP per pair")
    torch.manual_seed(0)
    for method in (DiffusionORPO, DiffusionDPO, DiffusionSFT):
        print(f"embedded world, {method.__name__}: {count_toy_step(method, 32):.2f} GFLOP per step of 32")


if __name__ == "__main__":
    main()
