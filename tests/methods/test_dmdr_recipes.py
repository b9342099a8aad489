"""DMDR's recipes: the published values, and the trained weights that they come to at real size."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from lightning_modules.backbones.sd3 import SD3
from lightning_modules.backbones.sdxl import SDXL
from tests.real_size import save_sd3_configs, save_sdxl_configs

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in ROOT.glob("cli_configs/dmdr/*.yaml"))
# recipe -> student's and score's learning rate, batch per GPU, updates, guidance, steps, shift, renoise, dynamic steps
PUBLISHED = {
    "sdxl_cold_start": (1e-7, 1e-7, 8, 3000, 7.0, 1, None, "uniform", 0),
    "sdxl_refl": (5e-8, 5e-8, 4, 1000, 7.0, 1, None, "uniform", 0),
    "sd3_medium_cold_start": (1e-6, 5e-7, 8, 2000, 7.0, 4, 3.0, "beta", 2000),
    "sd3_medium_refl": (5e-7, 2e-7, 4, 2000, 7.0, 4, 3.0, "uniform", 0),
    "sd3_medium_srpo": (5e-7, 2e-7, 4, 300, 7.0, 4, 3.0, "uniform", 0),
    "sd35_large_cold_start": (1e-6, 2e-8, 4, 2000, 4.0, 4, 5.0, "beta", 2000),
    "sd35_large_refl": (1e-7, 5e-9, 2, 1000, 4.0, 4, 5.0, "uniform", 0),
    "sd35_large_srpo": (1e-7, 5e-9, 2, 300, 4.0, 4, 5.0, "uniform", 0),
    "sit_cold_start": (2e-5, 2e-5, 64, 20000, 1.0, 1, 1.0, "beta", 10000),
    "sit_dino": (1e-5, 1e-5, 24, 2000, 1.0, 1, 1.0, "uniform", 0),
}
WEIGHTS = {
    "sdxl_refl": {"clip": 0.3, "hps": 0.3},
    "sd3_medium_refl": {"clip": 0.3, "hps": 0.3},
    "sd3_medium_srpo": {"clip": 0.1, "hps": 5.0},
    "sd35_large_refl": {"clip": 0.1, "hps": 0.1},
    "sd35_large_srpo": {"clip": 0.1, "hps": 5.0},
    "sit_dino": {"dino": 0.05},
}


def config_of(name: str) -> dict[str, Any]:
    """As it stands in the file: tests/test_docs.py parses every one."""
    return yaml.safe_load((ROOT / f"cli_configs/dmdr/{name}.yaml").read_text())


def look_up(config: dict[str, Any], path: str) -> Any:
    """The value of `model.optimizer.lr`, through the init_args between; None where the file leaves it out."""
    for key in path.split("."):
        config = config.get("init_args", config).get(key)
        if config is None:
            return None
    return config


def lora_of(settings: dict[str, Any] | None) -> LoraConfig | None:
    return None if settings is None else LoraConfig(**settings)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_values(name):
    config = config_of(name)
    options = (
        *("model.optimizer.lr", "model.score_optimizer.lr", "data.batch_size", "trainer.max_steps"),
        *("model.guidance_scale", "model.num_steps", "model.shift", "model.renoise", "model.dynamic_steps"),
    )
    assert tuple(look_up(config, option) for option in options) == PUBLISHED[name]
    assert look_up(config, "model.optimizer.weight_decay") == 0.01
    assert look_up(config, "model.score_optimizer.weight_decay") == 0.0
    assert (look_up(config, "model.ratio"), look_up(config, "model.fake_scale")) == (5, 2.0)
    assert look_up(config, "model.gradient_clip_val") == 1.0
    assert look_up(config, "seed_everything") == 30
    assert look_up(config, "trainer.precision") == ("bf16-mixed" if name.startswith("sd3") else "16-mixed")
    score, lora = look_up(config, "model.score_lora"), look_up(config, "model.backbone.lora")
    assert (score["r"], score["lora_alpha"]) == (32, 32)
    assert (lora is not None) == name.startswith("sd3")
    assert lora is None or (lora["r"], lora["lora_alpha"]) == (64, 128)
    assert look_up(config, "model.sampler") == ("ode" if name.startswith("sd3") else "sde")
    if look_up(config, "model.dynamic_steps"):
        assert look_up(config, "model.teacher_scale") == (0.75 if name.startswith("sit") else 0.5)
    if look_up(config, "model.renoise") == "beta":
        assert (look_up(config, "model.renoise_alpha"), look_up(config, "model.renoise_beta")) == (4.0, 1.5)
    if name.startswith("sd3"):
        assert look_up(config, "model.backbone.max_sequence_length") == 128
        assert look_up(config, "model.backbone.image_size") == (512 if "medium" in name else 1024)
        assert look_up(config, "model.end_time") == 0.001
    if name.startswith("sit"):
        assert (look_up(config, "model.end_time"), look_up(config, "model.guidance_jitter")) == (0.0, 0.0)
    else:
        assert look_up(config, "model.guidance_jitter") == 0.5


@pytest.mark.parametrize("name", NAMES)
def test_rewards_come_in_the_second_stage_with_the_published_weights(name):
    config = config_of(name)
    rewards = look_up(config, "model.rewards")
    if name.endswith("cold_start"):
        assert rewards is None
        assert look_up(config, "model.start_from") is None
        return
    weights = WEIGHTS.get(name, {"clip": 0.3, "hps": 0.3})
    assert look_up(config, "model.reward_weights") == weights
    assert set(rewards) == set(weights)
    stage1 = look_up(config, "model.start_from").split("/")[1].removeprefix("dmdr-")
    assert (ROOT / f"cli_configs/dmdr/{stage1}.yaml").exists()
    assert look_up(config, "model.hinge") == (None if name == "sit_dino" else 0.7)
    assert look_up(config, "model.relative") == (["hps"] if name.endswith("srpo") else None)
    if name.endswith("refl"):
        assert rewards["hps"]["init_args"]["magic_prompt"] == "Realistic photo"


def test_a_second_stage_trains_what_the_first_did():
    for name in NAMES:
        config = config_of(name)
        if (start := look_up(config, "model.start_from")) is not None:
            first = config_of(start.split("/")[1].removeprefix("dmdr-"))
            for option in ("model.backbone", "model.score_lora", "model.num_steps", "model.shift", "model.end_time"):
                assert look_up(config, option) == look_up(first, option), (name, option)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model", "modules", "score", "student"),
    [
        ("sdxl_cold_start", None, 788, 98_375_680, 2_567_463_684),
        ("sdxl_4step_cold_start", None, 788, 98_375_680, 196_751_360),
        ("sd3_medium_cold_start", "3-medium", 191, 18_776_064, 37_552_128),
        ("sd35_medium_cold_start", "3.5-medium", 191, 18_776_064, 37_552_128),
        ("sd35_large_cold_start", "3.5-large", 303, 47_161_344, 94_322_688),
    ],
)
def test_real_size(name, model, modules, score, student, tmp_path: Path):
    """Trained weights, modules with adapters, one network or two; the SiT's are counted in test_sit.py."""
    config = config_of(name)
    lora, image_size = lora_of(look_up(config, "model.backbone.lora")), look_up(config, "model.backbone.image_size")
    folder = save_sdxl_configs(tmp_path) if model is None else save_sd3_configs(tmp_path, model)
    family = SDXL if model is None else SD3
    backbone = family(str(folder), lora=lora, gradient_checkpointing=True, image_size=image_size)
    with torch.device("meta"):
        backbone.load(torch.bfloat16, weights=False)
        backbone.add_score(lora_of(look_up(config, "model.score_lora")), 2.0, weights=False)
    layers = {name for name, layer in backbone.score_network.named_modules() if isinstance(layer, LoraLayer)}
    assert len(layers) == modules
    assert not [name for name in layers if "attn2" in name and model]
    adapters = sum(p.numel() for p in backbone.score_parameters())
    assert adapters == score
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) - adapters == student
    assert (backbone.score_network is backbone.denoiser) == (lora is not None)
    assert backbone.latent_shape == ((16, image_size // 8, image_size // 8) if image_size else (4, 128, 128))
    if lora is not None and model is None:
        backbone.kohya_modules()  # every adapter has its name for ComfyUI
