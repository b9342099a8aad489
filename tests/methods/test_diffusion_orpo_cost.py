"""What one Diffusion-ORPO step costs at real size, counted on the meta device."""

import pytest
import torch
from peft import LoraConfig

from lightning_modules.backbones.base import Backbone
from lightning_modules.backbones.sd3 import SD3
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.diffusion_orpo import DiffusionORPO
from tests.methods.test_diffusion_dpo_cost import count_step
from tests.real_size import save_sd3_configs, save_sdxl_configs


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return save_sdxl_configs(tmp_path_factory.mktemp("real") / "sdxl")


def build(configs, lora: bool, family: type[Backbone] = SDXL, **settings) -> DiffusionORPO:
    backbone = family(str(configs), lora=LoraConfig(r=8, lora_alpha=8) if lora else None, **settings)
    module = DiffusionORPO(backbone)
    with torch.device("meta"):
        backbone.load(keep_reference=module.keep_reference, weights=False)
    backbone.denoiser.train()
    return module


def test_real_size_lora(configs):
    module = build(configs, lora=True)
    trained = module.trained_parameters()
    assert (len(trained), sum(p.numel() for p in trained.values())) == (1120, 11_612_160)
    networks = [n for n, p in module.backbone.named_parameters() if n.endswith("conv_in.weight") and "vae" not in n]
    assert networks == ["unet.conv_in.weight"]  # no second denoiser
    # Spec, section 13: 28.3; DPO's reference would add 13.5.
    assert 27.5 < count_step(module, from_pixels=False, size=1024) <= 28.5


@pytest.mark.slow
def test_real_size_lora_with_checkpointing(configs):
    module = build(configs, lora=True, gradient_checkpointing=True)
    assert count_step(module, from_pixels=False, size=1024) == pytest.approx(38.5, rel=0.01)  # spec, section 13


@pytest.mark.slow
def test_real_size_full_fine_tuning_is_three_forward_passes(configs):
    module = build(configs, lora=False)
    assert sum(p.numel() for n, p in module.backbone.named_parameters() if "unet" in n) == 2_567_463_684
    assert not hasattr(module.backbone, "reference_denoiser")
    assert count_step(module, from_pixels=False, size=1024) == pytest.approx(3 * 2 * 6.76, rel=0.01)


@pytest.mark.slow
def test_real_size_sd35_medium_lora(tmp_path):
    module = build(save_sd3_configs(tmp_path), lora=True, family=SD3)
    assert 54.5 < count_step(module, from_pixels=False, size=1024) <= 56  # DPO's reference would add 22.5
