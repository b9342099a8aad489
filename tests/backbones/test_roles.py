"""Student, fake score and teacher on one network or two: who acts, what gets a gradient, what recomputation does."""

import pytest
import torch
from peft import LoraConfig

from lightning_modules.backbones.base import GENERATOR, SCORE, Backbone
from tests.methods.dmdr_runs import backbone_of, lora

FAMILY_NAMES = ["sd15", "sdxl", "sd3"]


def with_score(family: str, pretrained, adapters: bool = True, score: LoraConfig | None = None, **settings) -> Backbone:
    backbone = backbone_of(family, pretrained, adapters, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        backbone.load()
        backbone.add_score(score or lora(alpha=2), 2.0)
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return backbone


def inputs(backbone: Backbone, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, *backbone.latent_shape, generator=generator)
    return x, backbone.timesteps_at(torch.tensor([0.5, 0.8])), backbone.encode_prompts(["a ring", "a dog"])


def gradients(backbone: Backbone) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in backbone.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    backbone.zero_grad()
    return found


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_without_adapters_the_network_is_the_base_to_the_bit(family, adapters, request):
    pretrained = request.getfixturevalue(family)
    backbone, base = with_score(family, pretrained, adapters), backbone_of(family, pretrained)
    base.load()
    call = inputs(backbone)
    with torch.no_grad(), base.reference():
        expected = base.predict(*call)
    with torch.no_grad():
        for role in ((SCORE, 0.0), (None, 1.0)):
            if adapters or role[0] == SCORE:
                with backbone.role(*role):
                    assert torch.equal(backbone.predict(*call), expected)
        with backbone.reference():
            assert torch.equal(backbone.predict(*call), expected)
        student = backbone.predict(*call)
        assert not torch.allclose(student, expected, atol=1e-4)
        with backbone.role(SCORE, 2.0):
            fake = backbone.predict(*call)
        assert not torch.allclose(fake, expected, atol=1e-4)
        assert torch.equal(backbone.predict(*call), student)  # whatever acted before


def test_the_score_adapter_acts_with_its_scale(sd15):
    backbone, twice = with_score("sd15", sd15), with_score("sd15", sd15, score=lora(alpha=4))
    call = inputs(backbone)
    with torch.no_grad():
        with backbone.role(SCORE, 2.0):
            fake = backbone.predict(*call)
        with twice.role(SCORE, 1.0):  # twice the alpha at half the scale
            torch.testing.assert_close(twice.predict(*call), fake)
        with twice.role(SCORE, 2.0):
            assert not torch.allclose(twice.predict(*call), fake)


@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_only_the_acting_network_gets_gradients(family, adapters, request):
    backbone = with_score(family, request.getfixturevalue(family), adapters)
    before = {name for name, p in backbone.named_parameters() if p.requires_grad}
    backbone.predict(*inputs(backbone)).square().mean().backward()
    student = gradients(backbone)
    with backbone.role(SCORE, 2.0):
        output = backbone.predict(*inputs(backbone))
    output.square().mean().backward()  # after the role has ended
    fake = gradients(backbone)
    assert student
    assert fake
    assert all(f".{SCORE}." in name for name in fake)
    assert not any(f".{SCORE}." in name for name in student)
    assert {id(p) for p in backbone.score_parameters()} == {
        id(p) for n, p in backbone.named_parameters() if f".{SCORE}." in n and p.requires_grad
    }
    assert {name for name, p in backbone.named_parameters() if p.requires_grad} == before
    with backbone.role(SCORE, 0.0):
        assert not backbone.predict(*inputs(backbone)).requires_grad


def gradients_of_all_roles(backbone: Backbone) -> list[dict[str, torch.Tensor]]:
    """Gradients where other roles act between a forward and its backward pass, and when it comes."""
    found = []
    for role, between in (((GENERATOR, 1.0), (SCORE, 2.0)), ((SCORE, 2.0), (GENERATOR, 1.0)), ((SCORE, 0.5), None)):
        with backbone.role(*role):
            output = backbone.predict(*inputs(backbone))
        if between is not None:
            with torch.no_grad(), backbone.role(*between):
                backbone.predict(*inputs(backbone, seed=1))
            with torch.no_grad(), backbone.role(SCORE, 0.0):
                backbone.predict(*inputs(backbone, seed=1))
        output.square().mean().backward()
        found.append(gradients(backbone))
    return found


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("adapters", [True, False])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_checkpointing_changes_no_gradient(family, adapters, rank, request):
    """With equal ranks a wrong adapter at recomputation would be silent, with different ones an error."""
    pretrained, score = request.getfixturevalue(family), lora(rank, rank)
    plain = with_score(family, pretrained, adapters, score)
    again = with_score(family, pretrained, adapters, lora(rank, rank), gradient_checkpointing=True)
    recomputed = []
    modules = [m for m in again.denoiser.modules() if getattr(m, "gradient_checkpointing", False)]
    assert modules
    for module in modules[0].modules():
        module.register_forward_hook(lambda *_: recomputed.append(again.acting))
    for expected, actual in zip(gradients_of_all_roles(plain), gradients_of_all_roles(again), strict=True):
        assert expected.keys() == actual.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=0, atol=0)
    assert (SCORE, 2.0) in recomputed or not adapters
    assert again.acting == (GENERATOR, 1.0)


def test_a_forgotten_role_would_be_seen(sd15):
    """The test above can fail: with torch's own checkpoint function the gradient is another one."""
    plain = with_score("sd15", sd15)
    wrong = with_score("sd15", sd15, gradient_checkpointing=True)
    wrong.denoiser.enable_gradient_checkpointing()
    expected = gradients_of_all_roles(plain)[1]
    with wrong.role(SCORE, 2.0):
        output = wrong.predict(*inputs(wrong))
    output.square().mean().backward()
    actual = gradients(wrong)
    assert expected.keys() != actual.keys() or any(
        not torch.allclose(actual[name], expected[name], rtol=1e-3) for name in expected
    )


def test_adapters_off_are_not_computed(sd15):
    from torch.utils.flop_counter import FlopCounterMode

    backbone, flops = with_score("sd15", sd15), []
    for role in ((None, 1.0), (SCORE, 0.0), (SCORE, 1.0)):
        with torch.no_grad(), backbone.role(*role), FlopCounterMode(display=False) as counter:
            backbone.predict(*inputs(backbone))
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] < flops[2]


def test_one_network_serves_all_roles_of_a_lora_student(sd3):
    one, two = with_score("sd3", sd3), with_score("sd3", sd3, adapters=False)
    assert one.score_network is one.denoiser
    assert not hasattr(one, "score_denoiser")
    assert two.score_network is not two.denoiser


def test_frozen_parts_of_the_score_network_are_held_in_low_precision(sdxl):
    backbone = backbone_of("sdxl", sdxl, adapters=False)
    backbone.load(torch.bfloat16)
    backbone.add_score(lora(), 2.0)
    linear = backbone.score_denoiser.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert linear.base_layer.weight.dtype == torch.bfloat16
    assert {p.dtype for p in backbone.parameters() if p.requires_grad} == {torch.float32}


def test_wrong_targets_of_the_score_adapter_are_named(sd15):
    backbone = backbone_of("sd15", sd15)
    backbone.load()
    with pytest.raises(ValueError, match="model.score_lora: peft cannot place"):
        backbone.add_score(LoraConfig(r=2, target_modules=["attn.to_z"]), 2.0)


# --------------------------------------------------------------------------------------------------------- few steps


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_distilled_policy_makes_its_images_in_few_steps(family, request):
    from lightning_modules.functional.few_step import FewStepSampler

    backbone = with_score(family, request.getfixturevalue(family))
    before = backbone.generate(["a ring"], [4])
    with backbone.reference():
        base = backbone.generate(["a ring", "a dog"], [4, 5])
    calls = []
    backbone.denoiser.register_forward_hook(
        lambda module, args, kwargs, output: calls.append(len(output[0])), with_kwargs=True
    )
    state = torch.get_rng_state()
    for mode in ("sde", "ode"):
        backbone.few_step, calls[:] = FewStepSampler(3, mode, end=0.001), []
        images = backbone.generate(["a ring", "a dog"], [4, 5], num_inference_steps=9, guidance_scale=3.0)
        assert calls == [2, 2, 2]  # without guidance
        assert images.shape == base.shape
        assert 0 <= images.min() < images.max() <= 1
        torch.testing.assert_close(backbone.generate(["a dog"], [5]), images[1:], rtol=1e-4, atol=1e-5)
        with backbone.reference():  # the teacher as before
            assert torch.equal(backbone.generate(["a ring", "a dog"], [4, 5]), base)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(before, images[:1])


def test_the_starting_noise_is_the_pipelines(sd15):
    from lightning_modules.functional.few_step import FewStepSampler

    backbone, seen = with_score("sd15", sd15), []
    backbone.denoiser.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    backbone.generate(["a ring"], [4], guidance_scale=1.0)
    backbone.few_step = FewStepSampler(1)
    backbone.generate(["a ring"], [4])
    torch.testing.assert_close(seen[-1], seen[0] / backbone.pipeline.scheduler.init_noise_sigma)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("adapters", [True, False])
def test_a_saved_adapter_is_what_peft_loads(adapters, sd15, tmp_path):
    import json

    from diffusers import UNet2DConditionModel
    from peft import PeftModel

    backbone = with_score("sd15", sd15, adapters)
    x, t, condition = inputs(backbone)
    for name, scale in ((SCORE, 2.0), (GENERATOR, 1.0))[: 2 if adapters else 1]:
        with torch.no_grad(), backbone.role(name, scale):
            expected = backbone.predict(x, t, condition)
        backbone.save_adapter(tmp_path / name, name)
        assert json.loads((tmp_path / name / "scale.json").read_text()) == {"scale": scale}
        network = PeftModel.from_pretrained(
            UNet2DConditionModel.from_pretrained(sd15, subfolder="unet"), tmp_path / name
        )
        for layer in network.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", scale)
        with torch.no_grad():
            actual = network.base_model.model(x, t, encoder_hidden_states=condition["prompt_embeds"]).sample
        torch.testing.assert_close(actual, expected)


def test_an_images_identity_has_the_few_steps_and_not_the_score_adapter(sd15):
    from callbacks.image_store import describe_policy, hash_weights
    from lightning_modules.functional.few_step import FewStepSampler

    plain, scored = backbone_of("sd15", sd15), backbone_of("sd15", sd15)
    for backbone in (plain, scored):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            backbone.load()
    scored.add_score(lora(), 2.0)
    assert hash_weights(plain) == hash_weights(scored)
    before = describe_policy(scored, hash_weights(scored))
    scored.few_step = FewStepSampler(4)
    hashes = hash_weights(scored)
    assert describe_policy(scored, hashes)["few_step"]["num_steps"] == 4
    assert describe_policy(scored, hashes) != before
    assert "few_step" not in describe_policy(scored, hashes, reference=True)


def test_the_reference_of_a_full_student_is_the_frozen_score_network(sd15):
    from callbacks.image_store import describe_policy, hash_weights

    backbone, base = with_score("sd15", sd15, adapters=False), backbone_of("sd15", sd15)
    base.load()
    hashes = hash_weights(backbone)
    expected = describe_policy(base, hash_weights(base), reference=True)["weights"]["denoiser"]
    assert describe_policy(backbone, hashes, reference=True)["weights"]["denoiser"] == expected
    assert hashes["denoiser"] != expected


def test_a_small_decoder_makes_the_rewards_images(sd15, tmp_path):
    from diffusers import AutoencoderTiny

    backbone = with_score("sd15", sd15)
    z = torch.randn(2, *backbone.latent_shape, requires_grad=True)
    torch.testing.assert_close(backbone.decode_for_rewards(z), backbone.decode_latents(z))
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    AutoencoderTiny(**channels, **blocks, latent_channels=4).save_pretrained(tmp_path / "tiny")
    backbone.load_tiny_vae(str(tmp_path / "tiny"))
    images = backbone.decode_for_rewards(z)
    assert images.shape == (2, 3, 16, 16)
    images.sum().backward()
    assert z.grad.abs().max() > 0
    assert not any(p.requires_grad for p in backbone.tiny_vae.parameters())
    with pytest.raises(ValueError, match="model.reward_vae: cannot load"):
        backbone.load_tiny_vae(str(sd15 / "vae"))
