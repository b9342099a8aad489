"""Cost of one Diffusion-DPO pair at real size, counted on the meta device: the table in cli_configs/dpo/README.md.

python -m tests.benchmarks.diffusion_dpo_cost
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.backbones.base import Backbone, Conditioning
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.diffusion_dpo import DiffusionDPO
from tests.methods.test_diffusion_dpo_cost import build, count_step
from tests.real_size import save_sd15_configs, save_sdxl_configs

TOKENS = 77


def teraflop(function: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e12


def count_parts(module: DiffusionDPO, size: int) -> dict[str, float]:
    """TFLOP of each part of a training step on one pair of size x size images."""
    backbone = module.backbone
    latents = torch.empty(2, 4, size // 8, size // 8, device="meta")
    t = torch.zeros(2, dtype=torch.long, device="meta")
    condition = Conditioning.cat([backbone.encode_prompts(["a"])] * 2)
    predictions = []
    parts = {"policy, forward": teraflop(lambda: predictions.append(backbone.predict(latents, t, condition)))}
    parts["policy, backward"] = teraflop(lambda: predictions[0].sum().backward())
    with torch.no_grad(), backbone.reference():
        parts["reference, forward"] = teraflop(lambda: backbone.predict(latents, t, condition))
    parts["VAE, 2 images"] = teraflop(lambda: backbone.encode_images(torch.empty(2, 3, size, size, device="meta")))
    parts["text, 1 caption"] = teraflop(lambda: backbone.encode_prompts(["a"]))
    return parts


def count_activations(module: DiffusionDPO, size: int) -> float:
    """GiB that one pair keeps for the backward pass in float32, without the attention matrices, which fused kernels
    never store."""
    backbone = module.backbone
    weights = {parameter.untyped_storage()._cdata for parameter in backbone.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and not is_attention_matrix(tensor, backbone, size):
            kept[storage._cdata] = storage  # held, so that no address is used twice
        return tensor

    latents = torch.empty(2, 4, size // 8, size // 8, device="meta")
    condition = Conditioning.cat([backbone.encode_prompts(["a"])] * 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = backbone.predict(latents, torch.zeros(2, dtype=torch.long, device="meta"), condition)
    del prediction
    return sum(storage.nbytes() for storage in kept.values()) / 2**30


def is_attention_matrix(tensor: Tensor, backbone: Backbone, size: int) -> bool:
    """Whether a shape is (2 images x heads, queries, keys) of one of the UNet's levels."""
    if tensor.ndim < 3:
        return False
    config = backbone.denoiser.config
    levels = range(len(config.block_out_channels))
    # diffusers calls the number of heads attention_head_dim.
    heads = {config.attention_head_dim} if isinstance(config.attention_head_dim, int) else {*config.attention_head_dim}
    pixels = [(size // 8 // 2**level) ** 2 for level in levels]
    queries, keys = tensor.shape[-2:]
    return tensor.shape[:-2].numel() / 2 in heads and queries in pixels and keys in (*pixels, TOKENS)


def print_costs(configs: Path, family: type[Backbone], size: int) -> None:
    for name, lora in (("all weights", False), ("LoRA, rank 8", True)):
        module = build(configs, lora, family)
        trained = sum(p.numel() for p in module.trained_parameters().values())
        print(f"{family.__name__} at {size}, {name}: {trained:,} trained parameters")
        for part, cost in count_parts(module, size).items():
            print(f"  {part:<45} {cost:6.3f} TFLOP")
        print(f"  {'kept for the backward pass, float32':<45} {count_activations(module, size):6.2f} GiB")
        print(f"  {'one training step from pixels':<45} {count_step(module, True, size):6.3f} TFLOP")
        print(f"  {'one training step from latents':<45} {count_step(module, False, size):6.3f} TFLOP")
        module = build(configs, lora, family, gradient_checkpointing=True)
        recomputed = count_parts(module, size)
        print(f"  {'with checkpointing: policy, backward':<45} {recomputed['policy, backward']:6.3f} TFLOP")
        print(f"  {'with checkpointing: kept':<45} {count_activations(module, size):6.2f} GiB")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print_costs(save_sd15_configs(Path(folder) / "sd15"), SD15, 512)
        sdxl = save_sdxl_configs(Path(folder) / "sdxl")
        for size in (1024, 512):
            print_costs(sdxl, SDXL, size)


if __name__ == "__main__":
    main()
