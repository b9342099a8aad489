"""The Stable Diffusion XL backbone against diffusers and the published programs' numbers; what it refuses."""

import json
import math
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from peft import LoraConfig

from lightning_modules.backbones.base import Conditioning
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.backbones.sdxl import SDXL, join_hidden_states, size_ids, turbo_timesteps, zero_terminal_snr
from lightning_modules.diffusion_dpo import DiffusionDPO
from tests.golden_cases import assert_golden, case_names, load_case

PROMPTS = ["a red circle", "a blue square", "a ring"]


def lora(**settings) -> LoraConfig:
    return LoraConfig(**({"r": 2, "lora_alpha": 2, "init_lora_weights": "gaussian"} | settings))


def load(folder, adapters=None, keep_reference=False, dtype=torch.float32, **settings) -> SDXL:
    backbone = SDXL(str(folder), lora=adapters, **({"num_inference_steps": 2} | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        backbone.load(dtype, keep_reference=keep_reference)
    return backbone


def disturb(backbone: SDXL) -> None:
    """Move every trained weight, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def pairs(n: int = 2, **changes) -> dict:
    """A batch of n pairs of 16 x 16 images."""
    images = torch.rand(2 * n, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    sizes = torch.arange(4 * n).reshape(2 * n, 2) + 500
    ones = torch.ones(n)
    batch = {"images": images, "prompts": PROMPTS[:n], "label": ones, "weight": ones}
    return batch | {"original_sizes": sizes, "crops": sizes - 490} | changes


def edited(folder, to, file, **changes):
    """A copy of a pipeline with changes in one of its JSON files; None takes a key out."""
    folder = shutil.copytree(folder, to)
    content = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return folder


# -------------------------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize(("name", "resolution", "n"), [("sdxl_1024", 1024, 2), ("sdxl_turbo_512", 512, 3)])
def test_golden_constant_size_ids(name, resolution, n):
    sizes = torch.full((n, 2), resolution)
    ids = size_ids(sizes, torch.zeros_like(sizes), (resolution, resolution))
    outputs = {f"time_ids_{name}_f32": ids, f"time_ids_{name}_f16": ids.half()}
    assert_golden("diffusion_dpo", "sdxl_time_ids_full", **outputs)


def test_golden_real_size_ids():
    tensors, _ = load_case("diffusion_dpo", "sdxl_time_ids_lora")
    rows = zip(tensors["original_hw"], tensors["crop_top_left"], tensors["resolution"].tolist(), strict=True)
    ids = torch.cat([size_ids(size[None], crop[None], (r, r)) for size, crop, r in rows])
    assert_golden("diffusion_dpo", "sdxl_time_ids_lora", time_ids=ids)


@pytest.mark.parametrize("case", case_names("diffusion_orpo", "time_ids_"))
def test_golden_size_ids_of_the_orpo_example(case):
    tensors, _ = load_case("diffusion_orpo", case)
    sizes, crops = tensors["original_sizes_hw"].repeat(2, 1), tensors["crop_top_lefts_yx"].repeat(2, 1)
    ids = size_ids(sizes, crops, (int(tensors["resolution"]),) * 2)
    assert ids.dtype == torch.float32
    assert torch.equal(ids.double(), tensors["add_time_ids_exact"])
    assert torch.equal(ids.to(tensors["add_time_ids"].dtype), tensors["add_time_ids"])


def test_golden_prompt_embeds():
    tensors, _ = load_case("diffusion_dpo", "sdxl_prompt_embeds")
    states = [[tensors[f"enc{i}_hidden{k}"] for k in range(n)] for i, n in ((1, 4), (2, 5))]
    pair = Conditioning.cat([Conditioning(embeds=join_hidden_states(*states), pooled=tensors["enc2_first_output"])] * 2)
    assert_golden(
        "diffusion_dpo", "sdxl_prompt_embeds", prompt_embeds_pairs=pair["embeds"], pooled_pairs=pair["pooled"]
    )


def test_golden_zero_terminal_snr():
    tensors, _ = load_case("diffusion_dpo", "zero_terminal_snr")
    rescaled = zero_terminal_snr(tensors["alphas_cumprod_before"].double())
    assert rescaled[-1] == 0
    assert_golden("diffusion_dpo", "zero_terminal_snr", alphas_cumprod=rescaled)


@pytest.mark.parametrize(("case", "folder"), [("trace_sdxl", "sdxl"), ("trace_sdxl_turbo", "sdxl_turbo")])
def test_golden_trace_of_schedule_and_size_ids(case, folder, request):
    backbone = load(request.getfixturevalue(folder))
    tensors, _ = load_case("diffusion_dpo", case)
    torch.testing.assert_close(backbone.alphas.square(), tensors["alphas_cumprod"], rtol=0, atol=2e-6)
    noisy, target = backbone.add_noise(tensors["latents"], tensors["noise"], tensors["timesteps"])
    torch.testing.assert_close(noisy, tensors["noisy_latents"], rtol=0, atol=1e-5)
    assert torch.equal(target, tensors["target"])
    assert torch.equal(backbone.whole_image_ids(4, 64, 64), tensors["time_ids"])


# ------------------------------------------------------------------------------------------------------ conditioning


def test_prompts_are_encoded_as_the_pipeline_encodes_them(sdxl):
    backbone = load(sdxl)
    embeds, _, pooled, _ = backbone.pipeline.encode_prompt(PROMPTS, device="cpu", do_classifier_free_guidance=False)
    condition = backbone.encode_prompts(PROMPTS)
    torch.testing.assert_close(condition["prompt_embeds"], embeds)
    torch.testing.assert_close(condition["pooled_prompt_embeds"], pooled)


def test_only_a_prompt_beyond_the_window_is_announced(sdxl, recwarn):
    backbone = load(sdxl)
    backbone.encode_prompts(["x" * 75, "!" * 75])  # the second tokenizer pads with "!"
    assert not [warning for warning in recwarn if "longer than" in str(warning.message)]
    with pytest.warns(UserWarning, match="longer than the text encoder's 77 tokens"):
        backbone.encode_prompts(["x" * 76])


@pytest.mark.parametrize("zeros", [False, True])
def test_empty_prompts_are_encoded_or_zero(sdxl, zeros):
    backbone = load(sdxl, zero_empty_prompt=zeros)
    condition = backbone.encode_prompts(["", "a ring", ""])
    for tensor in condition.values():
        assert (tensor[[0, 2]] == 0).all() == zeros
        assert tensor[1].abs().max() > 0
    plain = load(sdxl).encode_prompts(["a ring"])
    torch.testing.assert_close(condition["prompt_embeds"][1:2], plain["prompt_embeds"])


def test_a_cache_can_tell_zeros_from_encoded_empty_prompts(sdxl):
    prints = []
    for zeros in (False, True):
        backbone = SDXL(str(sdxl), zero_empty_prompt=zeros)
        backbone.load(fingerprint=True)
        prints.append(backbone.fingerprints)
    assert prints[0].keys() == {"vae", "text_encoder", "text_encoder_2"}
    assert prints[0] != prints[1]


def test_constant_size_ids_say_that_images_are_whole(sdxl):
    backbone = load(sdxl)
    expected = torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 4)
    batch = pairs()
    assert torch.equal(backbone.condition(batch, batch["prompts"])["time_ids"], expected)
    cached = {"moments": torch.zeros(4, 8, 8, 8), "prompts": batch["prompts"]}
    assert torch.equal(backbone.condition(cached, batch["prompts"])["time_ids"], expected)


def test_real_size_ids_are_each_images_own(sdxl):
    backbone = load(sdxl, size_conditions="real")
    batch = pairs(original_sizes=torch.tensor([[1025, 333], [20, 30], [40, 50], [60, 70]]))
    ids = backbone.condition(batch, batch["prompts"])["time_ids"]
    assert ids.dtype == torch.float32
    assert ids[0].tolist() == [1025, 333, 10, 11, 16, 16]
    assert ids[3].tolist() == [60, 70, 16, 17, 16, 16]


@pytest.mark.parametrize("missing", ["original_sizes", "crops"])
def test_real_size_ids_of_a_batch_without_sizes_are_refused(sdxl, missing):
    batch = pairs()
    del batch[missing]
    with pytest.raises(ValueError, match="size_conditions: real needs the `original_sizes` and `crops`"):
        load(sdxl, size_conditions="real").condition(batch, batch["prompts"])


def test_a_condition_without_sizes_means_whole_images(sdxl):
    backbone = load(sdxl)
    batch = pairs(1)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    condition = backbone.condition(batch, batch["prompts"])
    bare = Conditioning({name: tensor for name, tensor in condition.items() if name != "time_ids"})
    assert torch.equal(backbone.predict(x, t, bare), backbone.predict(x, t, condition))


def test_sizes_reach_the_network_in_float32(sdxl):
    backbone = load(sdxl, lora(), dtype=torch.bfloat16, size_conditions="real")
    seen = []
    backbone.unet.add_time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = pairs(1, original_sizes=torch.tensor([[1025, 333], [1025, 333]]))
    condition = backbone.condition(batch, batch["prompts"])
    one = backbone.predict(torch.zeros(2, 4, 8, 8), torch.tensor([5, 5]), condition)
    assert seen[0].dtype == torch.float32
    assert seen[0][:2].tolist() == [1025, 333]
    condition["time_ids"] = condition["time_ids"] + 300
    assert not torch.equal(one, backbone.predict(torch.zeros(2, 4, 8, 8), torch.tensor([5, 5]), condition))


# --------------------------------------------------------------------------------------------------------- timesteps


def test_turbo_is_recognised_by_its_scheduler(sdxl, sdxl_turbo, tmp_path, caplog):
    renamed = shutil.copytree(sdxl_turbo, tmp_path / "my-model")  # no "turbo" in its name
    with caplog.at_level("INFO"):
        assert load(renamed).turbo_choices == 3
    assert "has SDXL-Turbo's scheduler: timesteps 249, 499, 749" in caplog.text
    named = shutil.copytree(sdxl, tmp_path / "not-a-turbo")
    assert load(named).turbo_choices == 0


@pytest.mark.parametrize(
    ("timesteps", "expected"), [("turbo", {249, 499, 749}), ("turbo_published", {249, 499, 749, 999})]
)
def test_turbo_timesteps(sdxl, timesteps, expected):
    backbone = load(sdxl, timesteps=timesteps)
    t = backbone.sample_timesteps(1000)
    assert t.dtype == torch.int64
    assert set(t.tolist()) == expected
    shares = [(t == value).float().mean().item() for value in expected]
    assert shares == pytest.approx([1 / len(expected)] * len(expected), abs=0.06)
    assert backbone.coefficients(torch.tensor([999]))[0] == 0.0


def test_uniform_timesteps_cover_the_schedule(sdxl_turbo):
    backbone = load(sdxl_turbo, timesteps="uniform")
    t = backbone.sample_timesteps(20_000)
    assert (t.min(), t.max()) == (0, 999)
    assert len(t.unique()) > 990
    assert backbone.alphas[-1] > 0.05


def test_golden_turbo_timesteps():
    tensors, _ = load_case("diffusion_dpo", "pair_noising_turbo")
    t = turbo_timesteps(tensors["raw_timesteps"][: len(tensors["latents"]) // 2], choices=4)
    assert_golden("diffusion_dpo", "pair_noising_turbo", timesteps=torch.cat([t, t]))


def test_published_turbo_rule():
    draws = torch.tensor([0, 1, 2, 3, 4, 999])
    assert turbo_timesteps(draws, 4).tolist() == [249, 499, 749, 999, 249, 999]
    assert turbo_timesteps(draws, 3).tolist() == [249, 499, 749, 249, 499, 249]


def test_a_pair_at_the_dead_timestep_teaches_nothing(sdxl):
    """Why "turbo" leaves 999 out: nothing is left of the images, so both have the same input and target."""
    backbone = load(sdxl, timesteps="turbo_published")
    noise = torch.randn(1, 4, 8, 8).repeat(2, 1, 1, 1)
    noised, target = backbone.add_noise(torch.randn(2, 4, 8, 8), noise, torch.tensor([999, 999]))
    assert torch.equal(noised[0], noised[1])
    assert torch.equal(target[0], target[1])


# -------------------------------------------------------------------------------------- reference, precision, images


@pytest.mark.parametrize("adapters", [True, False])
def test_reference_is_the_starting_policy_also_after_training(sdxl, adapters):
    backbone = load(sdxl, lora() if adapters else None, keep_reference=True, dtype=torch.bfloat16)
    x, t, condition = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 990]), backbone.encode_prompts(PROMPTS)
    before = backbone.predict(x, t, condition)
    disturb(backbone)
    trained = backbone.predict(x, t, condition)
    with backbone.reference():
        assert torch.equal(backbone.predict(x, t, condition), before)
    assert not torch.equal(trained, before)


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_loss_starts_at_log_two(sdxl, adapters, dtype):
    module = DiffusionDPO(SDXL(str(sdxl), lora=lora() if adapters else None))
    module.backbone.load(dtype, keep_reference=True)
    module.log_window = lambda metrics: None
    assert module.training_step(pairs(), 0).item() == pytest.approx(math.log(2), abs=5e-4)


def dtypes_of_decoder(backbone) -> list[torch.dtype]:
    """What the VAE's decoder is given, and what its first convolution makes of it, while an image is made."""
    seen = []
    hook = backbone.vae.decoder.conv_in.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    images = backbone.generate(["a ring"], [1])
    hook.remove()
    assert torch.isfinite(images).all()
    return seen


@pytest.mark.parametrize(
    ("force_upcast", "dtype", "expected"),
    [
        (True, torch.float16, torch.float32),
        (False, torch.float16, torch.float16),
        (None, torch.float16, torch.float32),  # files that say nothing hold the original one
        (True, torch.bfloat16, torch.bfloat16),
        (False, torch.bfloat16, torch.bfloat16),
    ],
)
def test_a_vae_that_overflows_float16_stays_float32(sdxl, tmp_path, force_upcast, dtype, expected):
    vae = edited(sdxl, tmp_path / "fix", "vae/config.json", force_upcast=force_upcast) / "vae"
    backbone = load(sdxl, dtype=dtype, vae=str(vae))
    plain = load(sdxl)
    assert backbone.vae.encoder.conv_in.weight.dtype == expected
    images = pairs()["images"]
    assert backbone.encode_moments(images).dtype == expected
    tolerance = 1e-6 if expected == torch.float32 else 0.02
    torch.testing.assert_close(
        backbone.encode_moments(images).float(), plain.encode_moments(images), rtol=0, atol=tolerance
    )
    assert dtypes_of_decoder(backbone) == [expected]
    torch.testing.assert_close(
        backbone.generate(PROMPTS, [1, 2, 3]), plain.generate(PROMPTS, [1, 2, 3]), rtol=0, atol=0.05
    )


def test_generated_images_equal_the_bare_pipeline(sdxl):
    backbone = load(sdxl, guidance_scale=3.0, chunk_size=2)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPTS,
        generator=[torch.Generator().manual_seed(s) for s in (1, 2, 3)],
        num_inference_steps=2,
        guidance_scale=3.0,
        output_type="pt",
    ).images
    torch.testing.assert_close(backbone.generate(PROMPTS, [1, 2, 3]), expected)


def test_turbo_images_need_no_guidance(sdxl_turbo):
    backbone = load(sdxl_turbo, guidance_scale=0.0, num_inference_steps=4)
    calls = []
    backbone.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    images = backbone.generate(PROMPTS, [1, 2, 3])
    assert calls == [3] * 4  # once per step, not twice
    torch.testing.assert_close(images[1:2], backbone.generate(PROMPTS[1:2], [2]), rtol=0, atol=1e-4)


def test_latents_carry_sdxls_scaling(sdxl):
    backbone = load(sdxl)
    moments = torch.cat([torch.ones(1, 4, 8, 8), torch.full((1, 4, 8, 8), -100.0)], dim=1)
    torch.testing.assert_close(backbone.sample_latents(moments), torch.full((1, 4, 8, 8), 0.13025), rtol=0, atol=1e-6)


def test_lora_export_opens_in_diffusers(sdxl, tmp_path):
    backbone = load(sdxl, lora(lora_alpha=6))
    disturb(backbone)
    backbone.export(tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl)
    pipeline.load_lora_weights(tmp_path)
    x, t, condition = torch.randn(3, 4, 8, 8), torch.tensor([10, 500, 990]), backbone.encode_prompts(PROMPTS)
    added = {
        "text_embeds": condition["pooled_prompt_embeds"],
        "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]] * 3),
    }
    with torch.no_grad():
        theirs = pipeline.unet(x, t, encoder_hidden_states=condition["prompt_embeds"], added_cond_kwargs=added).sample
        torch.testing.assert_close(theirs, backbone.predict(x, t, condition), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes",
    [
        {"requires_aesthetics_score": True},
        {"text_encoder": [None, None], "tokenizer": [None, None]},
        {"text_encoder": None},
    ],
)
def test_the_refiner_is_refused_before_its_weights_are_read(sdxl, tmp_path, changes):
    folder = edited(sdxl, tmp_path / "refiner", "model_index.json", **changes)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="is the SDXL refiner, .* Expected a model such as stabilityai/stable-diff"):
        SDXL(str(folder))


def test_pipelines_of_the_other_family_are_refused(sd15, sdxl):
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline with text_encoder, unet; SDXL expects"):
        SDXL(str(sd15))
    with pytest.raises(ValueError, match="is a StableDiffusionXLPipeline with .*text_encoder_2, unet; SD15 expects"):
        SD15(str(sdxl))


def test_a_hub_pipeline_of_another_family_is_refused_before_its_download(sd15, monkeypatch):
    asked = []

    def download(repository, file, revision=None):
        asked.append((repository, file, revision))
        return str(sd15 / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(ValueError, match="'owner/model' is a StableDiffusionPipeline with text_encoder, unet; SDXL"):
        SDXL("owner/model", revision="v2").load()
    assert asked == [("owner/model", "model_index.json", "v2")]


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_a_damaged_index_is_refused(sdxl, tmp_path, content):
    folder = edited(sdxl, tmp_path / "damaged", "model_index.json")
    (folder / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match="backbone.pretrained: .*model_index.json .* copy the pipeline anew"):
        SDXL(str(folder))


@pytest.mark.parametrize(
    ("setting", "value", "known"),
    [("timesteps", "Turbo", "auto, uniform, turbo, turbo_published"), ("size_conditions", "own", "constant, real")],
)
def test_unknown_settings_are_refused(sdxl, setting, value, known):
    with pytest.raises(ValueError, match=f"backbone.{setting} is '{value}'; expected one of {known}"):
        SDXL(str(sdxl), **{setting: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction_type": "sample"}, "prediction_type 'sample'; SDXL trains epsilon and v_prediction"),
        ({"prediction_type": "flow_prediction"}, "prediction_type 'flow_prediction'"),
    ],
)
def test_prediction_types_that_are_not_trained_are_refused(sdxl, tmp_path, changes, message):
    backbone = SDXL(str(edited(sdxl, tmp_path / "odd", "scheduler/scheduler_config.json", **changes)))
    with pytest.raises(ValueError, match=message):
        backbone.load(weights=False)


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EDMEulerScheduler"])
def test_schedulers_without_a_ddpm_schedule_are_refused(sdxl, tmp_path, name):
    import diffusers

    folder = edited(sdxl, tmp_path / "flow", "model_index.json", scheduler=["diffusers", name])
    shutil.rmtree(folder / "scheduler")
    getattr(diffusers, name)().save_pretrained(folder / "scheduler")
    with pytest.raises(ValueError, match=f"a {name}, has no DDPM schedule"):
        load(folder)


def test_the_refiners_unet_is_refused(sdxl, tmp_path):
    folder = shutil.copytree(sdxl / "unet", tmp_path / "refiner" / "unet").parent
    config = json.loads((folder / "unet" / "config.json").read_text())
    config["projection_class_embeddings_input_dim"] -= config["addition_time_embed_dim"]  # five numbers, not six
    (folder / "unet" / "config.json").write_text(json.dumps(config))
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    with pytest.raises(ValueError, match="backbone.denoiser: the UNet of .* does not take SDXL's pooled text"):
        load(sdxl, denoiser=str(folder))


def test_velocity_checkpoints_get_the_velocity_target(sdxl, tmp_path):
    folder = edited(sdxl, tmp_path / "v", "scheduler/scheduler_config.json", prediction_type="v_prediction")
    backbone = load(folder)
    assert backbone.prediction_type == "v_prediction"
    x0, noise = torch.randn(2, 1, 4, 8, 8)
    alpha, sigma = backbone.coefficients(torch.tensor([500]))
    torch.testing.assert_close(
        backbone.add_noise(x0, noise, torch.tensor([500]))[1], alpha * noise - sigma * x0, rtol=1e-6, atol=1e-6
    )


def test_the_vae_can_be_replaced(sdxl, tmp_path):
    other = AutoencoderKL.from_pretrained(sdxl, subfolder="vae")
    with torch.no_grad():
        other.encoder.conv_in.weight.mul_(2)
    other.save_pretrained(tmp_path / "vae")
    assert torch.equal(load(sdxl, vae=str(tmp_path / "vae")).vae.encoder.conv_in.weight, other.encoder.conv_in.weight)
