"""Scores, image pipelines, hinges and gradients equal what the published programs gave."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.functional.scores import cosine_score, relative_score, reward_hinge
from lightning_modules.rewards.aesthetic import LAYERS, AestheticHead
from lightning_modules.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing, resize
from tests.golden_cases import assert_golden, load_case

PIPELINES = "scorer_image_pipelines"
HPS = Preprocessing(40, "pad", pil=False)  # as HPSv2.build makes it, at the size of the golden case


def golden_image(i: int) -> Tensor:
    return load_case("diffusion_dpo", PIPELINES)[0][f"image{i}"].permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("i", [0, 1, 2])
def test_image_pipelines_equal_the_published_ones(i):
    assert_golden("diffusion_dpo", PIPELINES, **{f"hps_pixels{i}": HPS(golden_image(i))})
    assert_golden("diffusion_dpo", PIPELINES, **{f"clip_pixels{i}": Preprocessing(40)(golden_image(i))})


@pytest.mark.parametrize("i", [0, 1, 2])
def test_differentiable_pipelines_stay_near_the_published_ones(i):
    assert_golden("diffusion_dpo", PIPELINES, **{f"hps_pixels{i}": HPS.differentiable()(golden_image(i))})
    assert_golden(
        "diffusion_dpo", PIPELINES, **{f"clip_pixels{i}": Preprocessing(40).differentiable()(golden_image(i))}
    )


def test_pillow_reproduces_the_published_crop_to_the_bit():
    published = load_case("diffusion_dpo", PIPELINES)[0]
    for i in range(3):
        torch.testing.assert_close(
            Preprocessing(40)(golden_image(i))[0], published[f"clip_pixels{i}"], atol=1e-5, rtol=0
        )


def test_scores_of_given_features():
    case, _ = load_case("diffusion_dpo", "clip_style_scores")
    cosine = cosine_score(case["image_embeds"], case["text_embeds"])
    scaled = case["logit_scale"].exp() * cosine
    assert_golden(
        "diffusion_dpo",
        "clip_style_scores",
        pickscore_cosine=cosine,
        pickscore_scaled=scaled,
        pickscore_probs=scaled.softmax(0),
        hps_score=cosine,
        clip_score=cosine,
    )


def test_aesthetic_head_of_the_described_weights():
    sizes = [(1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)]
    weights = {}
    for k, (name, (rows, columns)) in enumerate(zip(LAYERS, sizes, strict=True)):
        i, j = torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64)
        weights[f"{name}.weight"] = torch.cos(0.37 * i[:, None] + 0.11 * j + k) * 1.5 / columns**0.5
        weights[f"{name}.bias"] = 0.05 * torch.sin(i + k)
    embeds = load_case("diffusion_dpo", "aesthetic_head")[0]["embeds"]
    in_float32 = AestheticHead({name: value.float() for name, value in weights.items()}, "test")(embeds)
    assert_golden("diffusion_dpo", "aesthetic_head", score_formula_weights=in_float32)
    in_float64 = AestheticHead(weights, "test")(embeds)
    assert_golden("diffusion_dpo", "aesthetic_head", score_formula_weights_f64=in_float64)


def test_dmdr_scores_hinges_and_their_gradients():
    case, _ = load_case("dmdr", "reward_scores")
    close = {"rtol": 1e-5, "atol": 1e-6}
    score = cosine_score(case["image"], case["text"])
    torch.testing.assert_close(score, case["clip_score"], **close)
    torch.testing.assert_close(reward_hinge(score).mean(), case["clip_hinge"], **close)
    for k, expected, gradient in zip(case["ks"].tolist(), case["srpo_score"], case["srpo_hinge_grad"], strict=True):
        image = case["image"].clone().requires_grad_()
        score = relative_score(image, case["text"], case["text_neg"], k)
        torch.testing.assert_close(score, expected, **close)
        reward_hinge(score).mean().backward()
        torch.testing.assert_close(image.grad, gradient, **close)


@pytest.mark.parametrize("name", ["reward_refl", "reward_srpo"])
def test_dmdr_gradients_reach_the_latents_through_clamp_and_resize(name):
    case, _ = load_case("dmdr", name)
    close = {"rtol": 1e-4, "atol": 1e-5}
    x0 = case["x0"].clone().requires_grad_()
    z = x0 / case["vae_scaling"].item() + case["vae_shift"].item()
    decoded = F.interpolate(z[:, :3], scale_factor=4, mode="nearest")  # the stub decoder of the golden case
    torch.testing.assert_close(decoded, case["decoded"], **close)
    images = (decoded * 0.5 + 0.5).clamp(0, 1)

    # As HPSv2.differentiable_preprocessing makes it, at the size of the golden case.
    pixels = replace(HPS.differentiable(), size=14, fit="squash")(images)
    torch.testing.assert_close(pixels, case["pixels"], **close)

    clip = cosine_score(pixels.flatten(1) @ case["clip_proj"], case["clip_text"])
    features = pixels.flatten(1) @ case["hps_proj"]
    if name == "reward_srpo":
        hps = relative_score(features, case["hps_text"], case["hps_text_neg"], case["srpo_k"].item())
    else:
        hps = cosine_score(features, case["hps_text"])
    torch.testing.assert_close(clip, case["clip_score"], **close)
    torch.testing.assert_close(hps, case["hps_score"], **close)

    clip_hinge, hps_hinge = reward_hinge(clip).mean(), reward_hinge(hps).mean()
    torch.testing.assert_close(clip_hinge, case["clip_hinge"], **close)
    torch.testing.assert_close(hps_hinge, case["hps_hinge"], **close)
    total = case["dmd_loss"] + case["clip_weight"].item() * clip_hinge + case["hps_weight"].item() * hps_hinge
    torch.testing.assert_close(total, case["total"], **close)
    total.backward()
    torch.testing.assert_close(x0.grad, case["dtotal_dx0"], rtol=1e-3, atol=1e-7)


def test_clip_constants_are_the_published_ones():
    assert CLIP_MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert CLIP_STD == (0.26862954, 0.26130258, 0.27577711)


def test_antialiasing_does_not_depend_on_a_default():
    """A checkerboard of single pixels turns grey, as it must when shrunk four times."""
    board = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    assert (resize(board.float().expand(1, 3, 64, 64), 16, 16) - 0.5).abs().max() < 0.02
