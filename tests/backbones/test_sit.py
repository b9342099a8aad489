"""SiT as a backbone: classes as prompts, two networks, strict files, images, export."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from callbacks.export_pipeline import check_export, denoiser_call
from lightning_modules.backbones.base import GENERATOR, SCORE
from lightning_modules.backbones.sit import SiT, load_network
from lightning_modules.functional.few_step import FewStepSampler, few_step_trajectory
from tests.golden_cases import load_case


def build(sit: Path, loaded: bool = True, score: bool = True, **settings) -> SiT:
    """A tiny SiT, with a score network whose adapters, like the student, are away from where they start."""
    options = {"vae": str(sit / "vae"), "size": "T/2", "num_classes": 10, "image_size": 32, "num_inference_steps": 3}
    backbone = SiT(str(sit / "sit.pt"), **(options | settings))
    if not loaded:
        return backbone
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        backbone.load()
        if score:
            backbone.add_score(LoraConfig(r=3, lora_alpha=6), 2.0)
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return backbone


def call(backbone: SiT, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, *backbone.latent_shape, generator=generator)
    return x, torch.tensor([0.1, 0.5, 1.0]), backbone.encode_prompts(["3", "", "9"])


def test_classes_are_prompts(sit):
    backbone = build(sit, score=False)
    assert backbone.encode_prompts(["3", "", " 07 "])["labels"].tolist() == [3, 10, 7]
    for wrong in ("10", "-1", "a cat", "1.5", "²", "9" * 30):
        with pytest.raises(ValueError, match=f"{re.escape(wrong[:40])}.* is no class; expected a number from 0 to 9"):
            backbone.encode_prompts(["3", wrong])


def test_flow_goes_from_noise_at_1_to_images_at_0(sit):
    backbone = build(sit, score=False)
    x0, noise = torch.randn(2, 3, 4, 4, 4)
    t = torch.tensor([0.0, 0.25, 1.0])
    x_t, target = backbone.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t[1], 0.75 * x0[1] + 0.25 * noise[1])
    assert torch.equal(target, noise - x0)
    torch.testing.assert_close(backbone.to_x0(target, x_t, t), x0)
    assert backbone.time_grid(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert backbone.timesteps_at(torch.tensor([0.3])).tolist() == pytest.approx([0.3])
    draws = backbone.sample_timesteps(1000)
    assert 0 <= draws.min() < 0.05
    assert 0.95 < draws.max() < 1


def test_the_network_is_told_t_itself(sit):
    backbone = build(sit, score=False)
    x, t, condition = call(backbone)
    expected = backbone.transformer(x, t, torch.tensor([3, 10, 9]))
    assert torch.equal(backbone.predict(x, t, condition), expected)


def test_roles(sit):
    backbone = build(sit)
    inputs = call(backbone)
    base = load_network(str(sit / "sit.pt"), backbone.config)
    with torch.no_grad():
        student = backbone.predict(*inputs)
        assert torch.equal(student, backbone.transformer(inputs[0], inputs[1], inputs[2]["labels"]))
        pure = base(inputs[0], inputs[1], inputs[2]["labels"])
        with backbone.role(SCORE, 0.0):
            assert torch.equal(backbone.predict(*inputs), pure)
        with backbone.reference():
            assert torch.equal(backbone.predict(*inputs), pure)
        with backbone.role(SCORE, 0.5):  # alpha / rank = 2
            fake = backbone.predict(*inputs)
        expected = backbone.score_denoiser(inputs[0], inputs[1], inputs[2]["labels"], 1.0)
        assert torch.equal(fake, expected)
        assert not torch.allclose(fake, pure, atol=1e-3)
        assert torch.equal(backbone.predict(*inputs), student)


def test_gradients_reach_the_acting_network_alone(sit):
    backbone = build(sit)
    score = {id(parameter) for parameter in backbone.score_parameters()}
    trained = {name: p for name, p in backbone.named_parameters() if p.requires_grad}
    assert {name for name, p in trained.items() if id(p) in score} == {
        f"score_denoiser.blocks.{i}.attn.lora.lora_{which}" for i in (0, 1) for which in ("QA", "QB", "VA", "VB")
    }
    for role in ((GENERATOR, 1.0), (SCORE, 2.0)):
        backbone.zero_grad()
        with backbone.role(*role):
            output = backbone.predict(*call(backbone))
        output.square().mean().backward()
        reached = {id(p) for p in trained.values() if p.grad is not None and p.grad.abs().max() > 0}
        assert reached
        assert reached <= score if role[0] == SCORE else not reached & score


def test_recomputation_changes_no_gradient(sit):
    found = []
    for recompute in (False, True):
        backbone = build(sit, gradient_checkpointing=recompute)
        with backbone.role(SCORE, 2.0):
            output = backbone.predict(*call(backbone))
        with torch.no_grad(), backbone.role(SCORE, 0.5):
            backbone.predict(*call(backbone, 1))
        output.square().mean().backward()
        found.append([parameter.grad for parameter in backbone.score_parameters()])
    for gradient, again in zip(*found, strict=True):
        torch.testing.assert_close(gradient, again, rtol=0, atol=0)


@pytest.mark.parametrize(("std", "expected"), [(None, 1 / 8), (1.0, 1.0)])
def test_new_adapters_leave_the_base_as_it_is(sit, std, expected):
    backbone = build(sit, score=False, adapter_std=std)
    backbone.add_score(LoraConfig(r=8, lora_alpha=8), 2.0)
    factors = torch.cat([block.attn.lora.lora_QA.detach() for block in backbone.score_denoiser.blocks])
    assert factors.std().item() == pytest.approx(expected, rel=0.15)
    with torch.no_grad(), backbone.role(SCORE, 2.0):
        fake = backbone.predict(*call(backbone))
    with torch.no_grad(), backbone.role(SCORE, 0.0):
        torch.testing.assert_close(backbone.predict(*call(backbone)), fake)


def test_projection_heads_are_left_out_and_that_is_said(sit, caplog):
    with caplog.at_level("INFO"):
        backbone = build(sit, score=False)
    assert "6 tensors of projection heads" in caplog.text
    assert not [name for name in backbone.state_dict() if "projectors" in name]
    saved = torch.load(sit / "sit.pt", weights_only=True)
    network = load_network(str(sit / "sit.pt"), backbone.config).state_dict()
    assert network.keys() == {name for name in saved if not name.startswith("projectors.")}
    assert all(torch.equal(value, saved[name]) for name, value in network.items())


def test_a_training_checkpoints_average_is_taken(sit, tmp_path):
    config = build(sit, loaded=False).config
    weights = torch.load(sit / "sit.pt", weights_only=True)
    torch.save({"model": {name: 0 * w for name, w in weights.items()}, "ema": weights, "steps": 4}, tmp_path / "c.pt")
    network = load_network(str(tmp_path / "c.pt"), config)
    assert torch.equal(network.blocks[1].attn.proj.weight, weights["blocks.1.attn.proj.weight"])


def other_file(sit: Path, folder: Path, change: str) -> Path:
    weights = torch.load(sit / "sit.pt", weights_only=True)
    if change == "missing":
        del weights["blocks.1.mlp.fc2.bias"]
    elif change == "renamed":
        weights = {f"decoder_{name}" if name.startswith("blocks") else name: w for name, w in weights.items()}
    elif change == "sigma":  # a network that predicts variances too
        weights["final_layer.linear.weight"] = torch.zeros(32, 32)
    elif change == "classes":
        weights["y_embedder.embedding_table.weight"] = torch.zeros(1001, 32)
    elif change == "adapters":
        weights["blocks.0.attn.lora.lora_QA"] = torch.zeros(32, 4)
    torch.save(weights, folder / "other.pt")
    return folder / "other.pt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", "1 missing .blocks.1.mlp.fc2.bias"),
        ("renamed", "missing .blocks.0.attn.qkv.weight.* unknown .decoder_blocks.0"),
        ("sigma", "1 of another shape .final_layer.linear.weight .32, 32. instead of .16, 32"),
        ("classes", "embedding_table.weight .1001, 32. instead of .11, 32"),
        ("adapters", "1 unknown .blocks.0.attn.lora.lora_QA"),
    ],
)
def test_files_of_other_networks_are_refused(sit, tmp_path, change, message):
    config = build(sit, loaded=False).config
    with pytest.raises(ValueError, match=message):
        load_network(str(other_file(sit, tmp_path, change)), config)


def test_mistakes_in_settings_are_named_before_anything_is_read(sit):
    for settings, message in (
        ({"size": "XL/5"}, "there is no size 'XL/5'"),
        ({"num_classes": 0}, "backbone.num_classes is 0; expected 1 or more"),
        ({"image_size": 36}, "backbone.image_size is 36; expected a multiple of 8"),
        ({"image_size": 24}, "backbone.image_size is 24; SiT-T/2 takes multiples of 16"),
        ({"adapter_std": 0.0}, "backbone.adapter_std is 0.0; expected a positive number"),
        ({"vae": str(sit)}, None),
        ({"vae": str(sit / "gone")}, "backbone.vae: there is no folder"),
    ):
        if message is None:
            build(sit, loaded=False, **settings)  # a folder with the VAE in its usual subfolder
            continue
        with pytest.raises(ValueError, match=re.escape(message)):
            build(sit, loaded=False, **settings)
    with pytest.raises(FileNotFoundError, match="backbone.pretrained: there is no file"):
        SiT(str(sit / "gone.pt"), vae=str(sit / "vae"))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"target_modules": ["qkv"]}, "target_modules"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_settings_that_its_adapters_do_not_have_are_refused(sit, settings, name):
    backbone = build(sit, score=False)
    with pytest.raises(ValueError, match=f"model.score_lora.{name} is .*have a rank"):
        backbone.add_score(LoraConfig(r=3, **settings), 2.0)


def test_low_precision_holds_matrices_low_and_decodes_in_float32(sit):
    backbone = build(sit, loaded=False)
    backbone.load(torch.bfloat16)
    backbone.add_score(LoraConfig(r=3), 2.0)
    assert backbone.score_denoiser.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert backbone.score_denoiser.blocks[0].attn.lora.lora_QA.dtype == torch.float32
    assert backbone.transformer.blocks[0].attn.qkv.weight.dtype == torch.float32  # trained
    z = torch.randn(2, *backbone.latent_shape, requires_grad=True)
    images = backbone.decode_latents(z)
    plain = backbone.vae.decode(z.detach() / 0.18215).sample
    torch.testing.assert_close(images.detach(), plain)
    images.mean().backward()
    assert z.grad.abs().max() > 0
    with backbone.role(SCORE, 2.0):
        backbone.predict(*call(backbone)).float().square().mean().backward()
    assert backbone.score_denoiser.blocks[0].attn.lora.lora_QB.grad.dtype == torch.float32


def test_the_teachers_images_are_euler_steps_with_guidance(sit):
    backbone = build(sit)
    with backbone.reference():
        images = backbone.generate(["3", "9"], [1, 2])
        guided = backbone.generate(["3", "9"], [1, 2], guidance_scale=4.0)
        alone = backbone.generate(["9"], [2], num_inference_steps=3)
    assert images.shape == (2, 3, 32, 32)
    assert (guided - images).abs().max() > 1e-3
    torch.testing.assert_close(alone[0], images[1], rtol=1e-4, atol=1e-4)
    base = load_network(str(sit / "sit.pt"), backbone.config)
    x = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for t in (1.0, 2 / 3, 1 / 3):
            x = x - base(x, torch.tensor([t]), torch.tensor([9])) / 3
        expected = (backbone.vae.decode(x / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(alone, expected, rtol=1e-3, atol=1e-4)


def test_golden_sampler():
    case, _ = load_case("dmdr", "sampler_class_1step")
    backbone = SiT.__new__(SiT)
    sampler = FewStepSampler(1, shift=float(case["shift"]), end=0.0)
    torch.nn.Module.__init__(backbone)
    backbone.transformer = torch.nn.Linear(1, 1)  # says where the backbone is
    grid = backbone.few_step_grid(sampler)
    torch.testing.assert_close(grid, case["t_steps"], rtol=1e-4, atol=1e-5)
    told, draws = [], iter(case["noises"])

    def predict(x, t):
        told.append(t)
        return 0.6 * x + 0.2 * torch.sin(torch.pi * t).view(-1, 1, 1, 1) + 0.05 * case["y"].view(-1, 1, 1, 1)

    clean = few_step_trajectory(
        case["init"], grid, predict, backbone.coefficients, lambda: next(draws), "flow", "sde", sampler.end
    )[1]
    torch.testing.assert_close(torch.stack(clean), case["all_x0"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.stack(told), case["model_times"], rtol=1e-4, atol=1e-5)


def test_export_is_the_published_layout_and_can_be_trained_on(sit, tmp_path):
    backbone = build(sit)
    backbone.few_step = FewStepSampler(2, end=0.0)
    reached = denoiser_call(backbone)
    backbone.export(tmp_path)
    check_export(backbone, tmp_path, reached)
    assert json.loads((tmp_path / "sampling.json").read_text()) == {"timesteps": [1.0, 0.5], "mode": "sde", "end": 0.0}
    weights = load_file(tmp_path / "model.safetensors")
    published = torch.load(sit / "sit.pt", weights_only=True)
    assert weights.keys() == {name for name in published if not name.startswith("projectors.")}
    again = SiT(str(tmp_path / "model.safetensors"), str(sit / "vae"), "T/2", 10, 32)
    again.load()
    again.few_step = backbone.few_step
    torch.testing.assert_close(again.generate(["3"], [5]), backbone.generate(["3"], [5]))
    weights["blocks.0.attn.proj.weight"][0] += 1.0
    from safetensors.torch import save_file

    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match="is not the trained model"):
        check_export(backbone, tmp_path, reached)


def test_score_adapters_are_saved_with_their_strength(sit, tmp_path):
    backbone = build(sit)
    backbone.save_adapter(tmp_path, SCORE)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    saved = {name: backbone.score_denoiser.get_parameter(name) for name in tensors}
    assert len(tensors) == len(backbone.score_parameters()) == 8
    assert all(torch.equal(value, saved[name]) for name, value in tensors.items())
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {"r": 3, "lora_alpha": 6.0}
    assert json.loads((tmp_path / "scale.json").read_text()) == {"scale": 2.0}


def test_real_size_on_the_meta_device(tmp_path):
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=256,
        ).save_config(tmp_path)
    (tmp_path / "sit.pt").touch()
    backbone = SiT(str(tmp_path / "sit.pt"), str(tmp_path))
    with torch.device("meta"):
        backbone.load(torch.bfloat16, weights=False)
        backbone.add_score(LoraConfig(r=32, lora_alpha=32), 2.0, weights=False)
        score = sum(p.numel() for p in backbone.score_parameters())
        trained = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    assert score == pytest.approx(4.13e6, rel=1e-3)
    assert trained - score == pytest.approx(674.8e6, rel=1e-3)
    assert backbone.latent_shape == (4, 32, 32)
    assert backbone.vae.config.scaling_factor == 0.18215
