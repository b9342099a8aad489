"""Cost of one Diffusion-DPO pair at real size, counted on the meta device: the table in cli_configs/dpo/README.md.

python -m tests.benchmarks.diffusion_dpo_cost
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.backbones.base import Conditioning
from lightning_modules.diffusion_dpo import DiffusionDPO
from tests.methods.test_diffusion_dpo_cost import build, count_step
from tests.real_size import save_sd15_configs

# Of SD 1.5 at 512 x 512, to recognise attention matrices by their shape.
HEADS, PIXELS, TOKENS = 8, (4096, 1024, 256, 64), 77


def teraflop(function: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e12


def count_parts(module: DiffusionDPO) -> dict[str, float]:
    """TFLOP of each part of a training step on one pair of 512 x 512 images."""
    backbone = module.backbone
    latents = torch.empty(2, 4, 64, 64, device="meta")
    t = torch.zeros(2, dtype=torch.long, device="meta")
    condition = Conditioning.cat([backbone.encode_prompts(["a"])] * 2)
    predictions = []
    parts = {"policy, forward": teraflop(lambda: predictions.append(backbone.predict(latents, t, condition)))}
    parts["policy, backward"] = teraflop(lambda: predictions[0].sum().backward())
    with torch.no_grad(), backbone.reference():
        parts["reference, forward"] = teraflop(lambda: backbone.predict(latents, t, condition))
    parts["VAE, 2 images"] = teraflop(lambda: backbone.encode_images(torch.empty(2, 3, 512, 512, device="meta")))
    parts["text, 1 caption"] = teraflop(lambda: backbone.encode_prompts(["a"]))
    return parts


def count_activations(module: DiffusionDPO) -> float:
    """GiB that one pair keeps for the backward pass in float32, without the attention matrices, which fused kernels
    never store."""
    backbone = module.backbone
    weights = {parameter.untyped_storage()._cdata for parameter in backbone.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and not is_attention_matrix(tensor):
            kept[storage._cdata] = storage  # held, so that no address is used twice
        return tensor

    latents = torch.empty(2, 4, 64, 64, device="meta")
    condition = Conditioning.cat([backbone.encode_prompts(["a"])] * 2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prediction = backbone.predict(latents, torch.zeros(2, dtype=torch.long, device="meta"), condition)
    del prediction
    return sum(storage.nbytes() for storage in kept.values()) / 2**30


def is_attention_matrix(tensor: Tensor) -> bool:
    """Whether a shape is (2 images x 8 heads, queries, keys)."""
    if tensor.ndim < 3 or tensor.shape[:-2].numel() != 2 * HEADS:
        return False
    queries, keys = tensor.shape[-2:]
    return queries in PIXELS and keys in (*PIXELS, TOKENS)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        configs = save_sd15_configs(Path(folder) / "sd15")
        for name, lora in (("all weights", False), ("LoRA, rank 8", True)):
            module = build(configs, lora)
            print(f"{name}: {sum(p.numel() for p in module.trained_parameters().values()):,} trained parameters")
            for part, cost in count_parts(module).items():
                print(f"  {part:<45} {cost:6.3f} TFLOP")
            print(f"  {'kept for the backward pass, float32':<45} {count_activations(module):6.2f} GiB")
            module.backbone.denoiser.enable_gradient_checkpointing()
            module.backbone.denoiser.train()
            recomputed = count_parts(module)
            print(f"  {'with checkpointing: policy, backward':<45} {recomputed['policy, backward']:6.3f} TFLOP")
            print(f"  {'with checkpointing: kept':<45} {count_activations(module):6.2f} GiB")
            module = build(configs, lora)
            print(f"  {'one training step from pixels':<45} {count_step(module, from_pixels=True):6.3f} TFLOP")
            print(f"  {'one training step from latents':<45} {count_step(module, from_pixels=False):6.3f} TFLOP")


if __name__ == "__main__":
    main()
