"""CLIP, PickScore and HPS: tiny networks in the published layouts against the libraries that wrote them."""

import copy
import json
import shutil

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTokenizer

from lightning_modules.rewards.base import Reward
from lightning_modules.rewards.clip import CLIPScore
from lightning_modules.rewards.hps import HPSv2
from lightning_modules.rewards.pickscore import PickScore
from lightning_modules.rewards.preprocessing import CLIP_MEAN, CLIP_STD
from tests.rewards.tiny import (
    OPEN_CLIP,
    OPEN_CLIP_NAME,
    TOY_CLIP,
    open_clip_weights,
    random_images,
    register_open_clip,
    save_hf_clip,
    save_processor,
)

PROMPTS = ["a red circle", "a blue square", "a red circle", "two green rings", "a yellow triangle above a red ring"]
CLOSE = {"atol": 2e-6, "rtol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip_family")
    register_open_clip(folder / "configs")
    torch.save({"state_dict": open_clip_weights()}, folder / "HPS_v2_tiny.pt")
    torch.save(open_clip_weights(), folder / "weights.bin")
    return folder


def as_pil(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray(np.asarray((x * 255).round().byte().permute(1, 2, 0))) for x in images]


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def hf_pixels(images: Tensor, size: int = 28) -> Tensor:
    """Shorter edge by Pillow, centre crop, as transformers 4.30 did it."""
    prepared = []
    for image in as_pil(images):
        width, height = image.size
        scale = size / min(width, height)
        image = image.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - size) // 2, (image.height - size) // 2
        prepared.append(np.asarray(image.crop((left, top, left + size, top + size))))
    return normalised(torch.tensor(np.stack(prepared)).permute(0, 3, 1, 2) / 255)


def open_clip_score(weights: dict[str, Tensor], pixels: Tensor, prompts: list[str], quick_gelu: bool = False) -> Tensor:
    """By open_clip's own classes, tokenizer and loading."""
    model = open_clip.create_model(OPEN_CLIP_NAME, force_quick_gelu=quick_gelu)
    model.load_state_dict(weights)
    model.eval()
    with torch.no_grad():
        image = model.encode_image(pixels, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(OPEN_CLIP_NAME)(prompts), normalize=True)
    return (image * text).sum(-1)


# ------------------------------------------------------------------------------------------------ transformers' layout


@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize("eos", [561, 2])  # 2: older configs, where the text ends at the largest token number
@pytest.mark.parametrize("size", [(40, 40), (28, 55), (51, 30)])  # 55: 27 pixels go, 13 of them on the left
def test_pickscore_equals_clip_of_transformers(tmp_path, pickled, eos, size):
    clip = save_hf_clip(tmp_path / "pick", pickled, eos)
    save_processor(tmp_path / "processor")
    images = random_images(5, *size)
    tokens = CLIPTokenizer.from_pretrained(TOY_CLIP)(
        PROMPTS, padding="max_length", max_length=16, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        logits = clip(input_ids=tokens.input_ids, pixel_values=hf_pixels(images)).logits_per_image.diagonal()

    arguments = {"pretrained": str(tmp_path / "pick"), "processor": str(tmp_path / "processor"), "chunk_size": 2}
    cosine = PickScore(**arguments)(images, PROMPTS)
    torch.testing.assert_close(cosine, logits / torch.tensor(3.0).exp(), **CLOSE)
    assert cosine.std() > 0.01
    torch.testing.assert_close(PickScore(**arguments, logit_scale=True)(images, PROMPTS), logits, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(CLIPScore(str(tmp_path / "pick"))(images, PROMPTS), cosine)


def test_older_processor_files_are_read(tmp_path):
    """openai/clip-vit-large-patch14 has whole numbers where newer files name edges."""
    save_hf_clip(tmp_path)
    new = CLIPScore(str(tmp_path))(random_images(5, 40, 51), PROMPTS)
    old = {"crop_size": 28, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 28}
    old |= {"feature_extractor_type": "CLIPFeatureExtractor", "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    torch.testing.assert_close(CLIPScore(str(tmp_path))(random_images(5, 40, 51), PROMPTS), new)


def test_clip_score_prefers_the_right_captions_of_the_toy_world():
    from datamodules.toy_world.render import render
    from datamodules.toy_world.scenes import parse

    captions = ["a red circle", "a blue square", "a green triangle", "a red circle and a blue square in a row"]
    images = render([parse(caption) for caption in captions], torch.Generator().manual_seed(0))
    reward = CLIPScore(str(TOY_CLIP))
    scores = torch.stack([reward(images, [caption] * 4) for caption in captions])  # (captions, images)
    assert scores.argmax(1).tolist() == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------ open_clip's layout


@pytest.mark.parametrize("size", [(40, 40), (28, 61), (51, 30)])
def test_hps_equals_open_clip_with_longest_edge_and_padding(folder, size):
    images = random_images(5, *size)
    prompts = ["A &amp;amp; Circle ", "a  red circle", *PROMPTS[2:]]
    scale = 28 / max(size)
    height, width = round(size[0] * scale), round(size[1] * scale)
    eight_bit = (images * 255).round() / 255
    resized = F.interpolate(eight_bit, (height, width), mode="bicubic", antialias=True)
    padded = torch.zeros(5, 3, 28, 28)
    top, left = (28 - height) // 2, (28 - width) // 2
    padded[:, :, top : top + height, left : left + width] = resized
    expected = open_clip_score(open_clip_weights(), normalised(padded), prompts)

    score = HPSv2(str(folder / "HPS_v2_tiny.pt"), model=OPEN_CLIP_NAME, chunk_size=3)(images, prompts)
    torch.testing.assert_close(score, expected, **CLOSE)
    assert score.std() > 0.01


def test_differentiable_hps_squashes_as_dmdr_does(folder):
    images = random_images(5, 51, 30)
    squashed = F.interpolate(images, (28, 28), mode="bicubic", antialias=True)
    expected = open_clip_score(open_clip_weights(), normalised(squashed), PROMPTS)
    reward = HPSv2(str(folder / "HPS_v2_tiny.pt"), model=OPEN_CLIP_NAME, preprocessing="differentiable")
    torch.testing.assert_close(reward(images, PROMPTS), expected, **CLOSE)


def test_magic_prompt_and_relative_score(folder):
    images = random_images()
    reward = HPSv2(str(folder / "HPS_v2_tiny.pt"), model=OPEN_CLIP_NAME)
    magic = HPSv2(str(folder / "HPS_v2_tiny.pt"), model=OPEN_CLIP_NAME, magic_prompt="Realistic photo")
    torch.testing.assert_close(
        magic(images, PROMPTS), reward(images, [f"Realistic photo {prompt}" for prompt in PROMPTS])
    )

    wanted = reward(images, [f"Realistic. {prompt}" for prompt in PROMPTS])
    unwanted = reward(images, [f"Painting. {prompt}" for prompt in PROMPTS])
    relative = magic.relative(images, PROMPTS, positive="Realistic", negative="Painting", k=0.1)
    torch.testing.assert_close(relative, 1.1 * wanted - unwanted, **CLOSE)


@pytest.mark.parametrize("size", [(40, 40), (28, 55), (57, 30)])  # 55: 27 pixels go, 14 of them on the left
def test_weight_file_equals_open_clip_and_its_own_transform(folder, size):
    _, _, transform = open_clip.create_model_and_transforms(OPEN_CLIP_NAME)
    images = random_images(5, *size)
    pixels = torch.stack([transform(image) for image in as_pil(images)])
    expected = open_clip_score(open_clip_weights(), pixels, PROMPTS)
    score = CLIPScore(str(folder / "weights.bin"), model=OPEN_CLIP_NAME)(images, PROMPTS)
    torch.testing.assert_close(score, expected, **CLOSE)
    scaled = CLIPScore(str(folder / "weights.bin"), model=OPEN_CLIP_NAME, logit_scale=True)(images, PROMPTS)
    torch.testing.assert_close(scaled, expected * torch.tensor(3.0).exp(), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("beside", [False, True])
def test_folder_says_that_it_is_quick_gelu_and_squashed(folder, tmp_path, beside):
    """As apple/DFN5B-CLIP-ViT-H-14 does; also for a weight file that its config lies beside."""
    config = {"model_cfg": copy.deepcopy(OPEN_CLIP), "preprocess_cfg": {"resize_mode": "squash"}}
    config["model_cfg"]["quick_gelu"] = True
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    shutil.copy(folder / "weights.bin", tmp_path / "open_clip_pytorch_model.bin")
    images = random_images(5, 51, 30)
    squashed = [np.asarray(image.resize((28, 28), Image.Resampling.BICUBIC)) for image in as_pil(images)]
    pixels = normalised(torch.tensor(np.stack(squashed)).permute(0, 3, 1, 2) / 255)
    quick, plain = (open_clip_score(open_clip_weights(), pixels, PROMPTS, quick) for quick in (True, False))
    assert (quick - plain).abs().max() > 1e-4

    source = str(tmp_path / "open_clip_pytorch_model.bin" if beside else tmp_path)
    torch.testing.assert_close(CLIPScore(source)(images, PROMPTS), quick, **CLOSE)
    if beside:
        torch.testing.assert_close(CLIPScore(source, quick_gelu=False)(images, PROMPTS), plain, **CLOSE)


@pytest.mark.parametrize(
    ("name", "quick_gelu", "fit"),
    [
        ("Apple_CLIP-H-14-224.bin", True, "squash"),  # DMDR's
        ("DFN5B-CLIP-ViT-H-14/open_clip_pytorch_model.bin", True, "squash"),
        ("h14_fullcc2.5b.pt", True, "shortest"),
        ("h14_v1.2_altogether.pt", False, "shortest"),
        ("CLIP-ViT-H-14-laion2B-s32B-b79K/open_clip_pytorch_model.bin", False, "shortest"),
        ("mine.bin", None, None),
    ],
)
def test_names_of_published_files_tell_the_activation(tmp_path, name, quick_gelu, fit):
    from lightning_modules.rewards.clip import weight_file_config

    config = weight_file_config(tmp_path / name, "ViT-H-14", None)
    assert config["model_cfg"].get("quick_gelu") is quick_gelu
    assert config.get("preprocess_cfg", {}).get("resize_mode") == fit
    assert weight_file_config(tmp_path / name, "ViT-H-14", False)["model_cfg"]["quick_gelu"] is False


def test_open_clip_text_is_cleaned_as_published():
    """Broken characters mended, HTML unescaped twice, blanks squeezed, lower case; zeros fill, the end token ends."""
    from lightning_modules.rewards.towers import open_clip_tokenizer

    tokenize = open_clip_tokenizer(OPEN_CLIP["text_cfg"])
    clean, messy, long = tokenize(["a & b", "  A &amp;amp;\n b ", "circle " * 100])
    assert torch.equal(clean, messy)
    assert clean[:5].tolist() == [49406, 320, 261, 321, 49407]  # start, a, &, b, end
    assert clean[5:].abs().sum() == 0
    assert long.shape == (77,)
    assert long[-1] == 49407


# ------------------------------------------------------------------------------------------------ all of them


def rewards(folder, pick, **options) -> dict[str, Reward]:
    return {
        "hf": CLIPScore(str(pick), **options),
        "pick": PickScore(str(pick), str(pick), **options),
        "open_clip": CLIPScore(str(folder / "weights.bin"), model=OPEN_CLIP_NAME, **options),
        "hps": HPSv2(str(folder / "HPS_v2_tiny.pt"), model=OPEN_CLIP_NAME, **options),
    }


@pytest.fixture(scope="module")
def pick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pick")
    save_hf_clip(folder)
    return folder


@pytest.mark.parametrize("name", ["hf", "pick", "open_clip", "hps"])
def test_scores_do_not_depend_on_the_chunks(folder, pick, name):
    whole, parts = (rewards(folder, pick, chunk_size=size)[name](random_images(), PROMPTS) for size in (16, 2))
    torch.testing.assert_close(whole, parts, **CLOSE)


@pytest.mark.parametrize("name", ["hf", "pick", "open_clip", "hps"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_low_precision_comes_near_and_returns_float32(folder, pick, name, precision):
    exact = rewards(folder, pick)[name](random_images(), PROMPTS)
    reward = rewards(folder, pick, precision=precision)[name]
    near = reward(random_images(), PROMPTS)
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, exact, atol=0.03, rtol=0)
    norms = [layer for layer in reward.network.modules() if isinstance(layer, torch.nn.LayerNorm)]
    matrices = [layer for layer in reward.network.modules() if isinstance(layer, torch.nn.Linear)]
    assert {layer.weight.dtype for layer in norms} == {torch.float32}
    assert {layer.weight.dtype for layer in matrices} == {getattr(torch, precision)}


@pytest.mark.parametrize("size", [32, 64])
def test_preprocessings_differ_by_little(size):
    """Measured on the toy world's CLIP: at most 0.009, 0.002 on average, where scores of noise spread by 0.39."""
    images, prompts = random_images(64, size, size), ["a red circle", "a blue square"] * 32
    published = CLIPScore(str(TOY_CLIP))(images, prompts)
    differentiable = CLIPScore(str(TOY_CLIP), preprocessing="differentiable")(images, prompts)
    assert 0 < (published - differentiable).abs().max() < 0.015
    assert (published - differentiable).abs().mean() < 0.003


@pytest.mark.parametrize("name", ["hf", "pick", "open_clip", "hps"])
def test_trainer_precision_changes_no_score(folder, pick, name):
    reward = rewards(folder, pick)[name]
    plain = reward(random_images(), PROMPTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        reward._texts.clear()
        torch.testing.assert_close(reward(random_images(), PROMPTS), plain, atol=0, rtol=0)
