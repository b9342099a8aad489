"""What DMDR costs for one sample and update of the student, and what it holds, at real size on the meta device."""

from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.backbones.sd3 import SD3
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.dmdr import DMDR
from lightning_modules.rewards.base import Reward
from tests.real_size import save_sd3_configs, save_sdxl_configs

# Spec, section 16, TFLOP: the image towers of both rewards (ViT-H-14), forward and backward, and their two texts.
TOWERS, TEXTS = 2 * (0.34 + 0.35), 2 * 0.05
# The published SDXL recipe's adapters of the score network.
SDXL_TARGETS = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
    *("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
]


class Mean(Reward):
    """Costs nothing; its gradient goes through the decoder."""

    differentiable = True

    def forward(self, images: torch.Tensor, prompts: list[str], t: torch.Tensor | None = None) -> torch.Tensor:
        return images.mean((1, 2, 3))  # without the checks, which look at the values


@dataclass
class Cost:
    """TFLOP of one sample."""

    simulation: float = 0.0
    fake: float = 0.0
    text: float = 0.0
    decoder: float = 0.0  # forward and backward, of one image
    attention: float = 0.0  # of that, in the decoder's attention, which the spec's table leaves out
    total: float = 0.0  # of an inner step with an update of the student

    @property
    def student(self) -> float:
        """The student's update alone: its forward and backward pass, the queries of the scores, and the rewards."""
        return self.total - self.simulation - self.fake - self.text

    def update(self, simulation: float | None = None, ratio: int = 5) -> float:
        """An update of the student with its `ratio` inner steps; texts apart, as in the spec's table."""
        return ratio * ((self.simulation if simulation is None else simulation) + self.fake) + self.student

    def cold(self, simulation: float | None = None) -> float:
        """The same without rewards."""
        return self.update(simulation) - self.decoder

    def rewarded(self, simulation: float | None = None) -> float:
        """With the spec's rewards."""
        return self.update(simulation) + TOWERS + TEXTS


def lora(rank: int, alpha: int, targets: list[str] | None = None) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)


def build(family, configs, student: LoraConfig | None, score: LoraConfig, rewards=False, backbone=None, **settings):
    """The module as `load_networks` builds it, without weights; after the dynamic phase, as at most updates."""
    reward = {"rewards": {"r": Mean()}, "reward_weights": {"r": 0.3}} if rewards else {}
    module = DMDR(family(str(configs), lora=student, **backbone or {}), score, dynamic_steps=0, **reward, **settings)
    with torch.device("meta"):
        module.backbone.load(weights=False)
        module.backbone.add_score(module.score_lora, module.fake_scale, weights=False)
    for network in (module.backbone.denoiser, module.backbone.score_network):
        network.train()
    return module


class Optimizer:
    def step(self) -> None:
        pass

    def zero_grad(self) -> None:
        pass


def count(module: DMDR) -> Cost:
    """Count an inner step with an update of the student, by the module's own step; the first step is drawn."""
    cost = Cost()
    module.negatives(1)  # encoded once in a run
    module.inner_step, module.norm = module.ratio, torch.zeros(())
    module.optimizers = lambda: [Optimizer(), Optimizer()]
    module.manual_backward = lambda loss: loss.backward()
    module.seed_part = module.log = lambda *args, **kwargs: None
    with FlopCounterMode(display=False) as counter:

        def counted(part: str, owner, name: str) -> None:
            method = getattr(owner, name)

            def call(*args):
                before = counter.get_total_flops()
                result = method(*args)
                setattr(cost, part, getattr(cost, part) + (counter.get_total_flops() - before) / 1e12)
                return result

            setattr(owner, name, call)

        counted("simulation", module, "simulate")
        counted("fake", module, "train_fake")
        counted("text", module.backbone, "encode_prompts")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # there is none on meta
            patch.setattr(torch, "randint", lambda high, size, **_: torch.zeros(size, dtype=torch.int64))
            module.training_step({"prompts": ["a"], "visit": 0}, 0)
    cost.total = counter.get_total_flops() / 1e12
    if module.rewards:
        latents = torch.empty(1, *module.backbone.latent_shape, device="meta", requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            module.backbone.decode_for_rewards(latents).sum().backward()
        cost.decoder = counter.get_total_flops() / 1e12
        counts = counter.get_flop_counts()["Global"].items()
        cost.attention = sum(n for op, n in counts if "bmm" in str(op) or "attention" in str(op)) / 1e12
    return cost


def simulated_passes(module: DMDR) -> list[int]:
    """How often the student is asked in a simulation, for each step that may be drawn."""
    calls, draws = [], []

    def predict(x, t, condition):
        calls[-1] += 1
        return torch.empty_like(x)

    module.backbone.predict = predict
    n = len(module.backbone.few_step_timesteps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda high, size, **_: torch.full(size, draws[-1]))
        for step in range(n):
            draws.append(step)
            calls.append(0)
            module.simulate({}, 1)
    return calls


def tiny_decoder(module: DMDR) -> float:
    """TFLOP, forward and backward, of one image by the small decoder of `reward_vae`."""
    from diffusers import AutoencoderTiny

    with torch.device("meta"):
        vae = AutoencoderTiny(latent_channels=module.backbone.latent_shape[0]).requires_grad_(False).eval()
        latents = torch.empty(1, *module.backbone.latent_shape, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        vae.decode(latents).sample.sum().backward()
    return counter.get_total_flops() / 1e12


def storage(module: torch.nn.Module, prefix: str) -> int:
    """Elements of the frozen matrices of a network: what a second base would double."""
    return sum(p.numel() for n, p in module.named_parameters() if n.startswith(prefix) and not p.requires_grad)


@pytest.fixture(scope="module")
def sdxl_configs(tmp_path_factory):
    return save_sdxl_configs(tmp_path_factory.mktemp("real") / "sdxl")


@pytest.fixture(scope="module")
def sdxl(sdxl_configs):
    from diffusers import AutoencoderTiny

    options = {"num_steps": 1, "renoise": "uniform", "rewards": True}
    module = build(SDXL, sdxl_configs, None, lora(32, 32, SDXL_TARGETS), **options)
    with torch.device("meta"):
        module.backbone.add_module("tiny_vae", AutoencoderTiny().requires_grad_(False).eval())  # TAESDXL is the default
    return module


@pytest.mark.slow
def test_one_step_sdxl_holds_two_networks_and_costs_less_than_the_published_code(sdxl):
    denoiser, score = sdxl.network_parameters()
    assert sum(p.numel() for p in denoiser) == 2_567_463_684
    assert (len(score) // 2, sum(p.numel() for p in score)) == (788, 98_375_680)
    assert storage(sdxl.backbone, "score_denoiser.") == 2_567_463_684  # other weights: a frozen base of its own
    assert storage(sdxl.backbone, "unet.") == 0
    cost = count(sdxl)
    print(f"simulation and others {cost}, cold {cost.cold()}, RL {cost.rewarded()}", flush=True)
    assert cost.simulation == pytest.approx(6.76, rel=0.01)  # spec, section 16
    assert cost.decoder == pytest.approx(2 * 0.57, rel=0.02)
    assert 145 < cost.cold() <= 150
    assert cost.rewarded() <= 153


@pytest.mark.parametrize(
    ("model", "size", "adapters", "cold_limit", "rl_limit", "published"),
    [
        ("3-medium", 512, (37_552_128, 18_776_064), 69, 75, 75.2),
        pytest.param("3.5-large", 1024, (94_322_688, 47_161_344), 1104, 1125, 1125, marks=pytest.mark.slow),
    ],
)
def test_four_step_sd3_holds_one_base_and_costs_less_than_the_published_code(
    model, size, adapters, cold_limit, rl_limit, published, tmp_path
):
    settings = {"num_steps": 4, "shift": 3.0, "backbone": {"image_size": size, "max_sequence_length": 128}}
    configs = save_sd3_configs(tmp_path, model)
    module = build(SD3, configs, lora(64, 128), lora(32, 32), rewards=True, sampler="sde", **settings)
    assert tuple(sum(p.numel() for p in part) for part in module.network_parameters()) == adapters
    networks = [n for n, _ in module.backbone.named_parameters() if n.endswith("pos_embed.proj.weight")]
    assert networks == ["transformer.pos_embed.proj.weight"]  # one base for student, fake score and teacher
    base = {"3-medium": 2_028_328_000, "3.5-large": 8_056_627_520}[model]
    assert storage(module.backbone, "transformer.") == pytest.approx(base, rel=1e-3)

    cost = count(module)  # stops after the first step
    passes = {"sde": simulated_passes(module)}
    module.backbone.few_step = replace(module.backbone.few_step, mode="ode")
    passes["ode"] = simulated_passes(module)
    assert passes == {"sde": [1, 2, 3, 4], "ode": [4, 4, 4, 4]}  # "ode" needs the sample at the end
    ode, sde = (cost.simulation * sum(passes[mode]) / 4 for mode in ("ode", "sde"))
    small = cost.rewarded(ode) - cost.decoder + tiny_decoder(module)
    print(f"{model}: {cost}, cold {cost.cold(ode)}, RL {cost.rewarded(ode)}, SDE {cost.cold(sde)}", flush=True)
    print(f"{model}: RL with a small decoder {small}", flush=True)
    assert 0.95 * cold_limit < cost.cold(ode) <= cold_limit
    assert cost.cold(sde) <= 0.82 * cold_limit
    # Not within the limit of 75 for SD3-medium: within the spec's sum, whose decoder has no attention.
    assert cost.rewarded(ode) - cost.attention <= published
    assert small <= rl_limit
