"""The Stable Diffusion 1.x/2.x backbone against diffusers, and what loading, adapters and reference promise."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig

from lightning_modules.backbones.base import Conditioning
from lightning_modules.backbones.sd15 import SD15

PROMPTS = ["a red circle", "a blue square", "a ring"]


def lora(**settings) -> LoraConfig:
    return LoraConfig(**({"r": 2, "lora_alpha": 2, "init_lora_weights": "gaussian"} | settings))


def load(folder, adapters=None, keep_reference=False, dtype=torch.float32, **settings) -> SD15:
    backbone = SD15(str(folder), lora=adapters, **({"num_inference_steps": 2} | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        backbone.load(dtype, keep_reference=keep_reference)
    return backbone


def disturb(backbone: SD15) -> None:
    """Move every trained weight, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def inputs(backbone: SD15, n: int = 3):
    x = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([10, 500, 990])[:n]
    return x, t, backbone.encode_prompts(PROMPTS[:n])


def test_coefficients_and_noising_equal_diffusers(sd15):
    backbone = load(sd15)
    scheduler = DDPMScheduler.from_config(backbone.pipeline.scheduler.config)
    x0, noise = torch.randn(2, 4, 4, 8, 8)
    t = torch.tensor([0, 1, 500, 999])
    x_t, target = backbone.add_noise(x0, noise, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, noise, t), rtol=1e-6, atol=1e-6)
    assert torch.equal(target, noise)
    torch.testing.assert_close(backbone.to_x0(noise, x_t, t)[:2], x0[:2], rtol=1e-4, atol=1e-4)


def test_velocity_checkpoints_get_the_velocity_target(sd21):
    backbone = load(sd21)
    assert backbone.prediction_type == "v_prediction"
    scheduler = DDPMScheduler.from_config(backbone.pipeline.scheduler.config)
    x0, noise = torch.randn(2, 3, 4, 8, 8)
    t = torch.tensor([0, 500, 999])
    torch.testing.assert_close(backbone.add_noise(x0, noise, t)[1], scheduler.get_velocity(x0, noise, t))


def test_prompts_are_encoded_as_the_pipeline_encodes_them(sd15):
    backbone = load(sd15)
    expected, _ = backbone.pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    torch.testing.assert_close(backbone.encode_prompts(PROMPTS)["prompt_embeds"], expected)


def test_a_prompt_beyond_the_window_is_announced(sd15):
    backbone = load(sd15)
    with pytest.warns(UserWarning, match="longer than the text encoder's 77 tokens"):
        backbone.encode_prompts(["x" * 200])


def test_generated_images_equal_the_bare_pipeline(sd15):
    backbone = load(sd15, guidance_scale=3.0)
    pipeline = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS,
        generator=[torch.Generator().manual_seed(s) for s in (1, 2, 3)],
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    torch.testing.assert_close(backbone.generate(PROMPTS, [1, 2, 3]), expected)


@pytest.mark.parametrize("chunk_size", [1, 2, 8])
def test_an_image_depends_on_its_prompt_and_seed_only(sd15, chunk_size):
    backbone = load(sd15, chunk_size=chunk_size)
    state = torch.get_rng_state()
    together = backbone.generate(PROMPTS, [7, 8, 9])
    alone = torch.cat([backbone.generate([p], [s]) for p, s in zip(PROMPTS, (7, 8, 9), strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=2 / 255)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(together[0], backbone.generate(PROMPTS[:1], [8])[0], atol=1e-2)


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_is_the_starting_policy_also_after_training(sd15, adapters, dtype):
    backbone = load(sd15, lora() if adapters else None, keep_reference=True, dtype=dtype)
    x, t, condition = inputs(backbone)
    before = backbone.predict(x, t, condition)
    disturb(backbone)
    trained = backbone.predict(x, t, condition)
    with backbone.reference():
        assert torch.equal(backbone.predict(x, t, condition), before)
        assert torch.isfinite(backbone.generate(PROMPTS[:1], [1])).all()
    assert not torch.equal(trained, before)
    assert torch.equal(backbone.predict(x, t, condition), trained)


def test_reference_without_a_kept_copy_is_read_again(sd15):
    backbone = load(sd15, keep_reference=False)
    x, t, condition = inputs(backbone)
    before = backbone.predict(x, t, condition)
    disturb(backbone)
    with backbone.reference():
        assert torch.equal(backbone.predict(x, t, condition), before)
    assert not hasattr(backbone, "reference_denoiser")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_reference_pass_leaves_the_policys_gradient_alone(sd15, checkpointing):
    gradients = []
    for with_reference in (False, True):
        backbone = load(sd15, lora(), gradient_checkpointing=checkpointing)
        disturb(backbone)
        backbone.denoiser.train()
        x, t, condition = inputs(backbone)
        loss = backbone.predict(x, t, condition).square().mean()
        if with_reference:
            with torch.no_grad(), backbone.reference():
                backbone.predict(x, t, condition)
        loss.backward()
        gradients.append({n: p.grad for n, p in backbone.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert any(gradient.abs().max() > 0 for gradient in gradients[0].values())


def test_lora_keeps_one_copy_of_the_unets_weights(sd15):
    backbone = load(sd15, lora(), keep_reference=True)
    plain = UNet2DConditionModel.from_pretrained(sd15, subfolder="unet").num_parameters()
    adapters = sum(p.numel() for p in backbone.denoiser.parameters() if p.requires_grad)
    assert sum(p.numel() for n, p in backbone.named_parameters() if "unet" in n or "denoiser" in n) == plain + adapters
    assert not hasattr(backbone, "reference_denoiser")


@pytest.mark.parametrize("adapters", [True, False])
def test_frozen_matrices_are_low_precision_and_trained_weights_float32(sd15, adapters):
    backbone = load(sd15, lora() if adapters else None, keep_reference=True, dtype=torch.bfloat16)
    assert {p.dtype for p in backbone.parameters() if p.requires_grad} == {torch.float32}
    assert backbone.vae.encoder.conv_in.weight.dtype == torch.bfloat16
    frozen = backbone.denoiser if adapters else backbone.reference_denoiser
    assert frozen.conv_in.weight.dtype == torch.bfloat16
    assert frozen.conv_norm_out.weight.dtype == torch.float32


def test_low_precision_storage_does_not_change_what_autocast_computes(sd15):
    backbone = load(sd15, lora(), dtype=torch.bfloat16)
    x, t, condition = inputs(backbone)
    wide = UNet2DConditionModel.from_pretrained(sd15, subfolder="unet")
    with torch.autocast("cpu", dtype=torch.bfloat16), backbone.reference():
        expected = wide(x, t, encoder_hidden_states=condition["prompt_embeds"]).sample
        assert torch.equal(backbone.predict(x, t, condition), expected)


def test_latents_decode_back_and_carry_gradients(sd15):
    backbone = load(sd15)
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    latents = backbone.encode_images(images)
    assert latents.shape == (5, 4, 8, 8)
    assert not latents.requires_grad
    assert not torch.equal(latents, backbone.encode_images(images))  # a draw from the posterior, each time anew
    latents.requires_grad_()
    backbone.decode_latents(latents).mean().backward()
    assert latents.grad.abs().max() > 0


def test_the_vae_chunk_size_changes_nothing(sd15):
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    results = []
    for chunk_size in (2, 8):
        backbone = load(sd15, chunk_size=chunk_size)
        torch.manual_seed(0)
        results.append(backbone.encode_images(images))
    torch.testing.assert_close(*results)


def test_lora_export_opens_in_diffusers(sd15, tmp_path):
    backbone = load(sd15, lora(lora_alpha=6))  # alpha differs from rank: the file must say so
    disturb(backbone)
    backbone.export(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None, requires_safety_checker=False)
    pipeline.load_lora_weights(tmp_path)
    x, t, condition = inputs(backbone)
    with torch.no_grad():
        torch.testing.assert_close(
            pipeline.unet(x, t, encoder_hidden_states=condition["prompt_embeds"]).sample,
            backbone.predict(x, t, condition),
            rtol=1e-5,
            atol=1e-5,
        )


def test_full_export_is_a_pipeline_whose_frozen_parts_are_untouched(sd15, tmp_path):
    backbone = load(sd15, dtype=torch.bfloat16)
    disturb(backbone)
    backbone.export(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None, requires_safety_checker=False)
    source = StableDiffusionPipeline.from_pretrained(sd15, safety_checker=None, requires_safety_checker=False)
    for name, tensor in pipeline.unet.state_dict().items():
        assert torch.equal(tensor, backbone.denoiser.state_dict()[name])
    for name, tensor in pipeline.vae.state_dict().items():
        assert torch.equal(tensor, source.vae.state_dict()[name])


def test_another_denoiser_is_start_and_reference(sd15, tmp_path):
    other = load(sd15)
    disturb(other)
    other.denoiser.save_pretrained(tmp_path / "aligned" / "unet")  # the layout of the published weights
    x, t, condition = inputs(other)
    expected = other.predict(x, t, condition)
    for keep in (True, False):
        backbone = load(sd15, denoiser=str(tmp_path / "aligned"), keep_reference=keep)
        assert torch.equal(backbone.predict(x, t, condition), expected)
        disturb(backbone)
        with backbone.reference():
            assert torch.equal(backbone.predict(x, t, condition), expected)


@pytest.mark.parametrize("source", ["vae", "."])
def test_a_vae_of_the_hub_has_its_config_at_the_top_or_in_a_pipelines_folder(sd15, sd21, source, tmp_path, monkeypatch):
    repository = tmp_path / "models--me--vae"
    shutil.copytree(sd15 / source, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    loaded = load(sd21, vae="me/vae").vae.state_dict()
    expected = load(sd15).vae.state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_conditioning_indexes_and_concatenates():
    condition = Conditioning(a=torch.arange(6).view(3, 2), b=torch.arange(3))
    assert Conditioning.cat([condition] * 2)["b"].tolist() == [0, 1, 2, 0, 1, 2]
    assert condition[1:]["a"].tolist() == [[2, 3], [4, 5]]
    assert Conditioning.cat([condition[:1], condition[2:]])["b"].tolist() == [0, 2]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", "there is no folder './nowhere'"),
        ("a/b/c", "there is no folder 'a/b/c'"),
        ("", "there is no folder ''"),
        (__file__, "is a file; expected a folder"),
        (str(__file__).rsplit("/", 1)[0], "has no model_index.json"),
    ],
)
def test_a_path_without_a_model_is_refused_at_construction(path, message):
    with pytest.raises(ValueError, match="backbone.pretrained: .*" + message.replace(".", r"\.")):
        SD15(path)


def test_an_unreachable_hub_id_is_one_clear_error():
    with pytest.raises(ValueError, match="cannot load 'nobody/nothing-here' as a StableDiffusionPipeline"):
        load("nobody/nothing-here")


def test_pickled_weights_are_not_read(sd15, tmp_path):
    folder = shutil.copytree(sd15, tmp_path / "pickled")
    state = UNet2DConditionModel.from_pretrained(sd15, subfolder="unet").state_dict()
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="with safetensors"):
        load(folder)


def test_damaged_weights_are_one_clear_error(sd15, tmp_path):
    folder = shutil.copytree(sd15, tmp_path / "damaged")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="backbone.pretrained: cannot load"):
        load(folder)


def test_a_prediction_type_of_another_family_is_refused(sd15, tmp_path):
    folder = shutil.copytree(sd15, tmp_path / "sample")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(ValueError, match="prediction_type 'sample'; SD15 trains epsilon and v_prediction"):
        load(folder)


def test_adapters_on_layers_that_do_not_exist_are_refused(sd15):
    with pytest.raises(ValueError, match=r"target_modules: \['to_q', 'to_k', 'to_v', 'to_out.0'\]"):
        load(sd15, lora(target_modules=["attn.nothing"]))


@pytest.mark.parametrize("setting", ["chunk_size", "num_inference_steps"])
def test_counts_below_one_are_refused(sd15, setting):
    with pytest.raises(ValueError, match="both must be 1 or more"):
        SD15(str(sd15), **{setting: 0})


def test_images_are_sampled_by_the_scheduler_that_is_asked_for(sd15):
    own, ddim = load(sd15, num_inference_steps=3), load(sd15, num_inference_steps=3, scheduler="DDIMScheduler")
    assert type(ddim.pipeline.scheduler).__name__ == "DDIMScheduler"
    assert ddim.pipeline.scheduler.config.steps_offset == 1
    assert not torch.equal(own.generate(["a ring"], [0]), ddim.generate(["a ring"], [0]))
    with pytest.raises(ValueError, match="no scheduler 'DDIM'; expected the name of a class, such as DDIMScheduler"):
        load(sd15, scheduler="DDIM")


@pytest.mark.parametrize("num_steps", [1, 7, 20, 30, 500, 999])
def test_time_grid_falls_from_noise_to_zero(num_steps, sd15):
    grid = load(sd15).time_grid(num_steps)
    assert len(grid) == num_steps + 1
    assert (grid.diff() < 0).all()
    assert grid[0] < 1000
    assert grid[-1] == 0


def test_time_grids_that_do_not_exist_are_refused(sd15, tmp_path):
    backbone = load(sd15)
    for number in (0, 1000):
        with pytest.raises(ValueError, match="expected 1 to 999"):
            backbone.time_grid(number)
    backbone.pipeline.scheduler.register_to_config(steps_offset=0)
    with pytest.raises(ValueError, match="steps_offset should be 1"):
        backbone.time_grid(20)
