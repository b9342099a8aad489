"""What SPO costs for one prompt at real size, counted on the meta device."""

import pytest
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.backbones.sd15 import SD15
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.rewards.base import Reward
from lightning_modules.spo import SPO, spo_loss
from tests.real_size import save_sd15_configs, save_sdxl_configs

# Spec, section 16: the step-aware preference model at its real size, TFLOP for one image and for one text.
JUDGE_IMAGE, JUDGE_TEXT = 0.335, 0.047


class Dice(Reward):
    """Scores far apart, so that all pairs are valid."""

    takes_timestep = True

    def __init__(self) -> None:
        super().__init__()
        self.images = 0

    def forward(self, images: torch.Tensor, prompts: list[str], t: torch.Tensor | None = None) -> torch.Tensor:
        self.images += len(images)
        return 100.0 * torch.arange(len(images)).float()


def build(family, configs, rank: int, **settings) -> SPO:
    module = SPO(family(str(configs), lora=LoraConfig(r=rank, lora_alpha=rank)), Dice(), **settings)
    with torch.device("meta"):
        module.backbone.load(keep_reference=True, weights=False)
    module.backbone.denoiser.train()
    module.prepare_steps()
    return module


def count(compute) -> float:
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops() / 1e12


def cost_per_prompt(module: SPO) -> dict[str, float]:
    """TFLOP of each part of a round, divided by its prompts; every pair is valid."""
    prompts, backbone = ["a", "b"], module.backbone
    network, rows = backbone.predict, [0]
    latents = torch.empty(1, *backbone.latent_shape, device="meta")
    t = torch.zeros(1, dtype=torch.int64, device="meta")

    def counted(x, t, condition):
        rows[0] += len(x)
        return torch.empty_like(x)

    backbone.predict = counted
    decode, decoded = backbone.decode_latents, [0]

    def decode_nothing(latents):
        decoded[0] += len(latents)
        return torch.zeros(len(latents), 3, 8, 8)

    backbone.decode_latents = decode_nothing
    module.prompts = prompts
    with torch.no_grad():
        text = count(lambda: module.condition([*prompts, ""]))
        pairs, _ = module.sample(prompts)
        one_row = count(lambda: network(latents, t, module.condition(["a"])))
        one_image = count(lambda: decode(latents))
    number = len(pairs["t"])
    assert number == len(prompts) * (module.num_steps - module.first_step)

    backbone.predict = network
    training = count(lambda: spo_loss(module.log_ratio(pairs), module.beta)[0].mean().backward())
    return {
        "text": text / 2,
        "sampling": rows[0] * one_row / 2,
        "decoding": decoded[0] * one_image / 2,
        "judge": module.judge.images * JUDGE_IMAGE / 2 + JUDGE_TEXT,
        "training": training / 2,
    }


@pytest.fixture(scope="module")
def sd15_configs(tmp_path_factory):
    return save_sd15_configs(tmp_path_factory.mktemp("real") / "sd15")


@pytest.fixture(scope="module")
def sdxl_configs(tmp_path_factory):
    return save_sdxl_configs(tmp_path_factory.mktemp("real") / "sdxl")


def test_sd15_costs_less_than_the_published_code(sd15_configs):
    module = build(SD15, sd15_configs, rank=4)
    assert sum(p.numel() for p in module.trained_parameters().values()) == 797_184
    cost = cost_per_prompt(module)
    assert cost["sampling"] == pytest.approx(104, rel=0.02)  # spec, section 16
    assert cost["decoding"] == pytest.approx(161, rel=0.02)
    assert 330 < sum(cost.values()) <= 370  # published: 448


@pytest.mark.slow
def test_sdxl_costs_less_than_the_published_code(sdxl_configs):
    module = build(SDXL, sdxl_configs, rank=64, candidates=2, inner_steps=3, threshold=0.4)
    trained = module.trained_parameters()
    assert (len(trained) // 2, sum(p.numel() for p in trained.values())) == (560, 92_897_280)
    cost = cost_per_prompt(module)
    assert cost["sampling"] == pytest.approx(473, rel=0.05)
    assert 1600 < sum(cost.values()) <= 1770  # published: 1936
