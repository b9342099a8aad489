"""What one Diffusion-DPO step costs at real size, counted on the meta device."""

import pytest
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.backbones.base import Backbone
from lightning_modules.backbones.sd3 import SD3
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.diffusion_dpo import DiffusionDPO
from tests.real_size import save_sd3_configs, save_sd15_configs, save_sdxl_configs


def build(folder, lora: bool, family: type[Backbone] = SD15, **settings) -> DiffusionDPO:
    backbone = family(str(folder), lora=LoraConfig(r=8, lora_alpha=8) if lora else None, **settings)
    module = DiffusionDPO(backbone)
    with torch.device("meta"):
        backbone.load(keep_reference=True, weights=False)
    return module


def count_step(module: DiffusionDPO, from_pixels: bool, size: int = 512) -> float:
    """TFLOP of one training step on one pair: forward and backward of the policy, forward of the reference."""
    module.log_window = lambda metrics: None
    images, ones = torch.empty(2, 3, size, size, device="meta"), torch.ones(1, device="meta")
    with FlopCounterMode(display=False) as counter:
        if not from_pixels:
            channels = module.backbone.latent_shape[0]
            module.backbone.encode_images = lambda images: torch.empty(2, channels, size // 8, size // 8, device="meta")
        batch = {"images": images, "prompts": ["a"], "label": ones, "weight": ones}
        module.training_step(batch, 0).backward()
    return counter.get_total_flops() / 1e12


@pytest.fixture(scope="module")
def sd15_configs(tmp_path_factory):
    return save_sd15_configs(tmp_path_factory.mktemp("real") / "sd15")


def test_real_size_full_fine_tuning(sd15_configs):
    module = build(sd15_configs, lora=False)
    assert sum(p.numel() for p in module.trained_parameters().values()) == 859_520_964
    assert sum(p.numel() for p in module.backbone.text_encoder.parameters()) == 123_060_480
    assert count_step(module, from_pixels=True) <= 8.75
    latents = count_step(module, from_pixels=False)
    assert 6.3 <= latents <= 6.5  # below: a forward pass would be missing


def test_real_size_lora(sd15_configs):
    module = build(sd15_configs, lora=True)
    assert sum(p.numel() for p in module.trained_parameters().values()) == 1_594_368
    total = sum(p.numel() for n, p in module.backbone.named_parameters() if "unet" in n or "denoiser" in n)
    assert total == 859_520_964 + 1_594_368  # one copy of the UNet
    assert count_step(module, from_pixels=False) <= 5.1  # spec, section 17: 3.44 for the policy, 1.61 for the reference


@pytest.fixture(scope="module")
def sdxl_configs(tmp_path_factory):
    return save_sdxl_configs(tmp_path_factory.mktemp("real") / "sdxl")


@pytest.mark.slow
def test_real_size_sdxl_full_fine_tuning(sdxl_configs):
    module = build(sdxl_configs, lora=False, family=SDXL)
    assert sum(p.numel() for p in module.trained_parameters().values()) == 2_567_463_684
    # Spec, section 17: 77.4 with the script's recomputation of 13.52.
    assert count_step(module, from_pixels=True, size=1024) == pytest.approx(77.4 - 13.52, rel=0.005)


def test_real_size_sdxl_lora(sdxl_configs):
    module = build(sdxl_configs, lora=True, family=SDXL)
    trained = module.trained_parameters()
    assert (len(trained), sum(p.numel() for p in trained.values())) == (1120, 11_612_160)
    total = sum(p.numel() for n, p in module.backbone.named_parameters() if "unet" in n or "denoiser" in n)
    assert total == 2_567_463_684 + 11_612_160  # one copy of the UNet
    assert 41 <= count_step(module, from_pixels=False, size=1024) <= 42  # below: a forward pass would be missing


@pytest.mark.slow
def test_real_size_sd35_medium_lora(tmp_path):
    module = build(save_sd3_configs(tmp_path), lora=True, family=SD3)
    assert sum(p.numel() for p in module.trained_parameters().values()) == 4_694_016
    # DMDR's spec, 17: 11.0 for one image's forward pass with 205 text tokens, here 333; T5 reads a caption in 2.3.
    assert 77 <= count_step(module, from_pixels=False, size=1024) <= 79  # below: a forward pass would be missing
