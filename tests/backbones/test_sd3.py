"""The Stable Diffusion 3 backbone against diffusers and numbers known by hand; what it refuses."""

import math
import shutil

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig

from callbacks.export_pipeline import ExportPipeline
from lightning_modules.backbones.sd3 import SD3, shift_noise_level
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.diffusion_dpo import DiffusionDPO
from tests.callbacks.runs import Data, make_trainer
from tests.real_size import save_sd3_configs
from tests.tiny import save_sd3

PROMPTS = ["a red circle", "", "a ring"]


def lora(**settings) -> LoraConfig:
    return LoraConfig(**({"r": 2, "lora_alpha": 2, "init_lora_weights": "gaussian"} | settings))


def load(folder, adapters=None, keep_reference=False, dtype=torch.float32, **settings) -> SD3:
    backbone = SD3(str(folder), lora=adapters, **({"num_inference_steps": 2} | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        backbone.load(dtype, keep_reference=keep_reference)
    return backbone


def disturb(backbone: SD3) -> None:
    """Move every trained weight, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def pairs(n: int = 2, size: int = 16) -> dict:
    images = torch.rand(2 * n, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1
    return {"images": images, "prompts": PROMPTS[:n], "label": torch.ones(n), "weight": torch.ones(n)}


def inputs(backbone: SD3) -> tuple:
    """Three noised latents at uneven timesteps, and their prompts."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 16, 8, 8, generator=generator), torch.tensor([3.7, 500.2, 1000.0]), PROMPTS


def predict(backbone: SD3) -> torch.Tensor:
    x, t, prompts = inputs(backbone)
    return backbone.predict(x, t, backbone.encode_prompts(prompts))


def images_of(pipeline: StableDiffusion3Pipeline, **options) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(s) for s in (1, 2, 3)]
    return pipeline(PROMPTS, generator=generators, num_inference_steps=2, output_type="pt", **options).images


# --------------------------------------------------------------------------------------------------------------- flow


def test_noise_and_target_of_the_flow(sd3):
    backbone = load(sd3)
    x0, noise = torch.randn(2, 3, 16, 8, 8)
    x_t, target = backbone.add_noise(x0, noise, torch.tensor([0.0, 250.0, 1000.0]))
    torch.testing.assert_close(x_t, torch.stack([x0[0], 0.75 * x0[1] + 0.25 * noise[1], noise[2]]))
    assert torch.equal(target, noise - x0)
    torch.testing.assert_close(backbone.to_x0(target, x_t, torch.tensor([0.0, 250.0, 1000.0])), x0)


def test_noising_equals_diffusers_where_its_scheduler_has_the_timestep(sd3):
    backbone = load(sd3)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(sd3, subfolder="scheduler")
    t = scheduler.timesteps[[10, 400, 990]]
    x0, noise = torch.randn(2, 3, 16, 8, 8)
    torch.testing.assert_close(backbone.add_noise(x0, noise, t)[0], scheduler.scale_noise(x0, t, noise))


def test_the_shift_by_hand():
    s = torch.tensor([0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(shift_noise_level(s, 3.0), torch.tensor([0.0, 0.5, 0.75, 1.0]))
    assert torch.equal(shift_noise_level(s, 1.0), s)


@pytest.mark.parametrize("density", ["logit_normal", "uniform", "mode"])
def test_timesteps_have_diffusers_density_and_the_checkpoints_shift(sd3, density):
    backbone = load(sd3, timesteps=density, logit_mean=0.3, logit_std=0.7, mode_scale=0.8)
    torch.manual_seed(4)
    s = compute_density_for_timestep_sampling(density, 1000, logit_mean=0.3, logit_std=0.7, mode_scale=0.8)
    torch.manual_seed(4)
    t = backbone.sample_timesteps(1000)
    assert (t.dtype, backbone.num_timesteps) == (torch.float32, 1000)
    torch.testing.assert_close(t, 1000 * 3 * s / (1 + 2 * s))
    assert 0 <= t.min() < t.max() <= 1000


def test_a_higher_logit_mean_means_more_noise(sd3):
    few, many = (load(sd3, logit_mean=mean).sample_timesteps(500).mean() for mean in (-1.0, 1.0))
    assert many > few + 200


def test_the_shift_of_training_can_be_chosen_and_images_keep_the_checkpoints(sd3):
    backbone = load(sd3, timesteps="uniform", shift=1.0)
    t = backbone.sample_timesteps(20_000)
    assert t.mean() == pytest.approx(500, abs=10)
    assert torch.equal(backbone.time_grid(4), load(sd3).time_grid(4))


def test_the_time_grid_is_the_pipelines(sd3):
    backbone = load(sd3)
    seen = []
    backbone.transformer.register_forward_pre_hook(
        lambda _, inputs, keywords: seen.append(keywords["timestep"][0]), with_kwargs=True
    )
    backbone.generate(["a ring"], [1], num_inference_steps=5)
    grid = backbone.time_grid(5)
    torch.testing.assert_close(grid, torch.tensor([*seen, 0.0]))
    assert (grid[0], len(grid)) == (1000, 6)
    assert (grid.diff() < 0).all()


def test_timesteps_reach_the_network_in_float32(sd3):
    backbone = load(sd3, lora(), dtype=torch.bfloat16)
    seen = []
    backbone.transformer.time_text_embed.time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    predict(backbone)
    assert torch.equal(seen[0], torch.tensor([3.7, 500.2, 1000.0]))


# ------------------------------------------------------------------------------------------------------- conditioning


@pytest.mark.parametrize(("t5", "length"), [(True, 256), (True, 16), (False, 77)])
def test_prompts_are_encoded_as_the_pipeline_encodes_them(sd3, t5, length):
    backbone = load(sd3, t5=t5, max_sequence_length=length)
    left_out = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3, **left_out)
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False, max_sequence_length=length
        )
    condition = backbone.encode_prompts(PROMPTS)
    assert condition["prompt_embeds"].shape == (3, 77 + length, 32)
    torch.testing.assert_close(condition["prompt_embeds"], embeds)
    torch.testing.assert_close(condition["pooled_prompt_embeds"], pooled)
    assert (condition["prompt_embeds"][:, :77, 24:] == 0).all()
    assert (condition["prompt_embeds"][:, 77:] == 0).all() == (not t5)


def test_a_dropped_prompt_is_the_encoded_empty_one(sd3):
    backbone = load(sd3)
    condition = backbone.condition(pairs(), ["", "a ring"])
    empty, ring = backbone.encode_prompts([""]), backbone.encode_prompts(["a ring"])
    for name in condition:
        torch.testing.assert_close(condition[name][[0, 2]], empty[name].repeat(2, *[1] * (empty[name].ndim - 1)))
        torch.testing.assert_close(condition[name][1:2], ring[name])


@pytest.mark.parametrize(("letters", "announced"), [(14, []), (15, ["16 tokens"]), (90, ["77 tokens", "16 tokens"])])
def test_a_cut_prompt_is_announced_for_each_encoder(sd3, letters, announced, recwarn):
    backbone = load(sd3, max_sequence_length=16)  # T5 here has a token for each letter, one before and one after
    backbone.encode_prompts(["x" * letters])
    told = [str(warning.message) for warning in recwarn if "longer than" in str(warning.message)]
    assert all(number in "".join(told) for number in announced)
    assert bool(told) == bool(announced)


def test_a_pipeline_saved_without_t5_trains_and_samples(sd3, tmp_path):
    StableDiffusion3Pipeline.from_pretrained(sd3, text_encoder_3=None, tokenizer_3=None).save_pretrained(tmp_path)
    saved, left_out = load(tmp_path), load(sd3, t5=False)
    assert torch.equal(predict(saved), predict(left_out))
    assert torch.equal(saved.generate(PROMPTS, [1, 2, 3]), left_out.generate(PROMPTS, [1, 2, 3]))
    assert not torch.allclose(predict(saved), predict(load(sd3)))


def test_a_cache_can_tell_how_prompts_were_encoded(sd3):
    prints = []
    for settings in ({}, {"t5": False}, {"max_sequence_length": 77}):
        backbone = SD3(str(sd3), **settings)
        backbone.load(fingerprint=True)
        prints.append(backbone.fingerprints)
    assert prints[0].keys() == {"vae", "text_encoder", "text_encoder_2", "text_encoder_3", "max_sequence_length"}
    assert all(prints.count(one) == 1 for one in prints)


def test_t5_does_not_overflow_float16(sd3, tmp_path):
    """The real one's output projections exceed 65504 in float16."""
    folder = shutil.copytree(sd3, tmp_path / "loud")
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    with torch.no_grad():
        for block in pipeline.text_encoder_3.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.mul_(1e6)
    pipeline.text_encoder_3.save_pretrained(folder / "text_encoder_3")
    exact, half = (load(folder, dtype=dtype).encode_prompts(PROMPTS) for dtype in (torch.float32, torch.float16))
    states = exact["prompt_embeds"][:, 77:]
    assert torch.isfinite(half["prompt_embeds"]).all()
    torch.testing.assert_close(half["prompt_embeds"][:, 77:], states, rtol=0, atol=0.01 * states.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_only_matrices_and_convolutions_are_held_in_half_precision(sd3, dtype):
    backbone = load(sd3, lora(), dtype=dtype)
    block = backbone.transformer.transformer_blocks[0]
    assert block.attn.to_q.weight.dtype == dtype
    assert {p.dtype for p in backbone.parameters() if p.requires_grad} == {torch.float32}
    assert block.attn.norm_q.weight.dtype == backbone.transformer.pos_embed.pos_embed.dtype == torch.float32
    projection = backbone.text_encoder_3.encoder.block[0].layer[1].DenseReluDense
    assert projection.wi_0.weight.dtype == dtype
    assert projection.wo.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert backbone.vae.encoder.conv_in.weight.dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_latents_have_sixteen_channels_a_scale_and_a_shift(sd3):
    backbone = load(sd3)
    assert backbone.encode_moments(pairs()["images"]).shape == (4, 32, 8, 8)
    moments = torch.cat([torch.ones(1, 16, 8, 8), torch.full((1, 16, 8, 8), -100.0)], dim=1)
    expected = torch.full((1, 16, 8, 8), (1 - 0.0609) * 1.5305)
    torch.testing.assert_close(backbone.sample_latents(moments), expected, rtol=0, atol=3e-6)


def test_decoding_undoes_scale_and_shift_as_the_pipeline_does(sd3):
    backbone = load(sd3)
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3)
    latents = torch.randn(2, 16, 8, 8)
    expected = pipeline.vae.decode(latents / 1.5305 + 0.0609).sample
    torch.testing.assert_close(backbone.decode_latents(latents), expected)


# ---------------------------------------------------------------------------------------- adapters, reference, images


def test_adapters_lie_on_image_and_text_side_of_the_joint_attention(sd3):
    backbone = load(sd3, lora())
    found = {name.split(".lora_A")[0] for name, p in backbone.transformer.named_parameters() if ".lora_A" in name}
    sides = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    expected = {f"transformer_blocks.{block}.attn.{side}" for block in (0, 1) for side in sides}
    assert found == expected - {"transformer_blocks.1.attn.to_add_out"}  # the last block lets the text go


def test_the_second_attention_can_be_trained_too(sd3):
    backbone = load(sd3, lora(target_modules=["attn.to_q", "attn2.to_q"]))
    found = [name for name, _ in backbone.transformer.named_parameters() if "attn2.to_q.lora_A" in name]
    assert len(found) == 1


@pytest.mark.parametrize("adapters", [True, False])
def test_reference_is_the_starting_policy_also_after_training(sd3, adapters):
    backbone = load(sd3, lora() if adapters else None, keep_reference=True, dtype=torch.bfloat16)
    before = predict(backbone)
    disturb(backbone)
    trained = predict(backbone)
    with backbone.reference():
        assert torch.equal(predict(backbone), before)
    assert not torch.equal(trained, before)


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_starts_at_log_two(sd3, adapters, dtype):
    module = DiffusionDPO(SD3(str(sd3), lora=lora() if adapters else None))
    module.backbone.load(dtype, keep_reference=True)
    module.log_window = lambda metrics: None
    assert module.training_step(pairs(), 0).item() == pytest.approx(math.log(2), abs=5e-4)


def test_gradients_are_the_same_with_checkpointing(sd3):
    gradients = []
    for checkpointing in (False, True):
        backbone = load(sd3, lora(), gradient_checkpointing=checkpointing)
        disturb(backbone)
        backbone.denoiser.train()
        predict(backbone).square().mean().backward()
        gradients.append([p.grad for p in backbone.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_blocks_that_are_sharded_together(sd3):
    backbone = load(sd3)
    blocks = [m for m in backbone.denoiser.modules() if type(m).__name__ in backbone.denoiser._no_split_modules]
    assert blocks == list(backbone.transformer.transformer_blocks)


@pytest.mark.parametrize(("t5", "length"), [(True, 20), (False, 256)])
def test_generated_images_equal_the_bare_pipeline(sd3, t5, length):
    backbone = load(sd3, guidance_scale=3.0, chunk_size=2, t5=t5, max_sequence_length=length)
    left_out = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3, **left_out)
    expected = images_of(pipeline, guidance_scale=3.0, max_sequence_length=length)
    torch.testing.assert_close(backbone.generate(PROMPTS, [1, 2, 3]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model", ["sd3", "large"])
def test_lora_export_opens_in_diffusers(model, sd3, tmp_path):
    folder = sd3 if model == "sd3" else save_sd3(tmp_path / "large", large=True)
    backbone = load(folder, lora(lora_alpha=6), guidance_scale=3.0)
    disturb(backbone)
    backbone.export(tmp_path / "export", merged=True)
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    plain = images_of(pipeline, guidance_scale=3.0)
    pipeline.load_lora_weights(tmp_path / "export")
    trained = backbone.generate(PROMPTS, [1, 2, 3])
    torch.testing.assert_close(images_of(pipeline, guidance_scale=3.0), trained, rtol=0, atol=1e-5)
    assert (trained - plain).abs().max() > 0.02
    merged = StableDiffusion3Pipeline.from_pretrained(tmp_path / "export" / "merged")
    torch.testing.assert_close(images_of(merged, guidance_scale=3.0), trained, rtol=0, atol=1e-4)


def test_kohyas_layout_is_refused_before_training(sd3, tmp_path):
    module = DiffusionDPO(SD3(str(sd3), lora=lora(), num_inference_steps=2))
    with pytest.raises(ValueError, match=r"not written in kohya's layout.*ComfyUI reads diffusers' .*formats: \[diff"):
        make_trainer(tmp_path, [ExportPipeline(formats=["kohya"])]).fit(module, datamodule=Data())
    assert module.global_step == 0


@pytest.mark.parametrize("adapters", [True, False])
def test_a_pipeline_without_t5_is_exported_without_it(sd3, adapters, tmp_path):
    module = DiffusionDPO(SD3(str(sd3), lora=lora() if adapters else None, num_inference_steps=2, t5=False))
    trainer = make_trainer(tmp_path, [ExportPipeline(merged=adapters)], max_steps=1)
    trainer.fit(module, datamodule=Data())
    folder = next((tmp_path / "run").glob("*/export/merged" if adapters else "*/export"))
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    expected = module.backbone.generate(PROMPTS, [1, 2, 3])
    torch.testing.assert_close(images_of(pipeline, guidance_scale=7.5), expected, rtol=0, atol=1e-4)


def test_a_run_exports_what_the_family_has(sd3, tmp_path):
    module = DiffusionDPO(SD3(str(sd3), lora=lora(), num_inference_steps=2))
    trainer = make_trainer(tmp_path, [ExportPipeline()], max_steps=1)
    trainer.fit(module, datamodule=Data())
    assert [path.name for path in (tmp_path / "run").glob("*/export/*")] == ["pytorch_lora_weights.safetensors"]


# ----------------------------------------------------------------------------------------------------------- real size


@pytest.mark.parametrize(
    ("model", "parameters", "adapters"),
    [
        ("3-medium", 2_028_328_000, (382, 9_388_032)),
        ("3.5-medium", 2_243_171_520, (382, 9_388_032)),
        ("3.5-large", 8_056_627_520, (606, 23_580_672)),
    ],
)
def test_real_size(model, parameters, adapters, tmp_path):
    """Known as 2.03, 2.24 and 8.06 billion."""
    backbone = SD3(str(save_sd3_configs(tmp_path, model)), lora=LoraConfig(r=16))
    with torch.device("meta"):
        backbone.load(weights=False)
    trained = [p.numel() for p in backbone.parameters() if p.requires_grad]
    assert (len(trained), sum(trained)) == adapters
    assert sum(p.numel() for p in backbone.transformer.parameters()) - sum(trained) == parameters
    assert sum(p.numel() for p in backbone.text_encoder_3.parameters()) == 4_762_310_656


# ----------------------------------------------------------------------------------------------------------- refusals


def test_pipelines_of_the_other_families_are_refused(sd15, sdxl, sd3):
    for other in (sd15, sdxl):
        with pytest.raises(ValueError, match="SD3 expects text_encoder, text_encoder_2, text_encoder_3, transformer"):
            SD3(str(other))
    with pytest.raises(ValueError, match="is a StableDiffusion3Pipeline with .*transformer; SDXL expects"):
        SDXL(str(sd3))


@pytest.mark.parametrize("scheduler", [PNDMScheduler(), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)])
def test_schedulers_without_a_fixed_shift_are_refused(sd3, tmp_path, scheduler):
    pipeline = StableDiffusion3Pipeline.from_pretrained(sd3)
    pipeline.scheduler = scheduler
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"a {type(scheduler).__name__}, has no fixed shift"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("timesteps", "sigma_sqrt", "one of logit_normal, uniform, mode"),
        ("logit_std", 0.0, "a positive number"),
        ("mode_scale", 2.0, "a number from -1 to 1.75"),
        ("shift", -1.0, "a positive number, or null"),
        ("max_sequence_length", 513, "1 to 512 tokens"),
        ("scheduler", "DDIMScheduler", "one for flows"),
    ],
)
def test_impossible_settings_are_refused(sd3, setting, value, expected):
    with pytest.raises(ValueError, match=f"backbone.{setting} is {value!r}; expected {expected}"):
        SD3(str(sd3), **{setting: value})


def test_images_that_cannot_be_cut_into_patches_are_refused(sd3):
    backbone = load(sd3)
    with pytest.raises(ValueError, match="multiples of 4: set data.resolution"):
        backbone.predict(torch.zeros(1, 16, 7, 8), torch.tensor([5.0]), backbone.encode_prompts(["a"]))


def test_another_sampler_for_flows_can_be_chosen(sd3):
    backbone = load(sd3, scheduler="FlowMatchHeunDiscreteScheduler")
    images = backbone.generate(PROMPTS, [1, 2, 3])
    assert torch.isfinite(images).all()
    assert not torch.equal(images, load(sd3).generate(PROMPTS, [1, 2, 3]))
    assert torch.equal(backbone.time_grid(4), load(sd3).time_grid(4))
