"""ImageReward: weights in the layout of ImageReward.pt against BLIP written out from the papers."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as V

from lightning_modules.rewards.image_reward import ImageReward
from lightning_modules.rewards.preprocessing import CLIP_MEAN, CLIP_STD
from tests.rewards.test_clip_family import as_pil
from tests.rewards.tiny import (
    BERT_VOCABULARY,
    image_reward_layout,
    random_images,
    random_weights,
    save_bert_tokenizer,
)

SIZES = {"vision_width": 128, "vision_layers": 2, "patch": 8, "patches": 9, "text_width": 64, "text_layers": 3}
SIZES |= {"text_inner": 96, "vocabulary": 13, "positions": 40}
PROMPTS = ["a red circle", "a blue square, a red circle.", "a red circle", "of", "blue " * 60]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    weights = random_weights(image_reward_layout(**SIZES))
    torch.save(weights, folder / "ImageReward.pt")
    save_bert_tokenizer(folder / "bert")
    return folder, weights


def tokens_of(prompt: str) -> list[int]:
    """[CLS] words [SEP] [PAD] ..., 35 in all."""
    words = prompt.replace(",", " ,").replace(".", " .").split()[:33]
    numbers = [BERT_VOCABULARY.index(word) for word in ["[CLS]", *words, "[SEP]"]]
    return numbers + [0] * (35 - len(numbers))


def score_by_hand(weights: dict[str, Tensor], pixels: Tensor, tokens: Tensor) -> Tensor:
    """The whole network in float64, from the published names alone."""
    w = {name: value.double() for name, value in weights.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (x.unflatten(-1, (-1, 64)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(64)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    vision = "blip.visual_encoder."
    kernel = w[f"{vision}patch_embed.proj.weight"]
    x = F.conv2d(pixels.double(), kernel, w[f"{vision}patch_embed.proj.bias"], stride=kernel.shape[-1])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w[f"{vision}cls_token"].expand(len(x), -1, -1), x], 1) + w[f"{vision}pos_embed"]
    for i in range(SIZES["vision_layers"]):
        block = f"{vision}blocks.{i}."
        x = x + linear(
            f"{block}attn.proj", attention(*linear(f"{block}attn.qkv", norm(f"{block}norm1", x, 1e-6)).chunk(3, -1))
        )
        x = x + linear(f"{block}mlp.fc2", F.gelu(linear(f"{block}mlp.fc1", norm(f"{block}norm2", x, 1e-6))))
    patches = norm(f"{vision}norm", x, 1e-6)

    text = "blip.text_encoder."
    mask = tokens != 0
    h = w[f"{text}embeddings.word_embeddings.weight"][tokens]
    h = h + w[f"{text}embeddings.position_embeddings.weight"][: tokens.shape[1]]
    h = norm(f"{text}embeddings.LayerNorm", h, 1e-12)
    for i in range(SIZES["text_layers"]):
        layer = f"{text}encoder.layer.{i}."
        for name, source, keep in (("attention", None, mask), ("crossattention", patches, None)):
            seen = h if source is None else source
            q, k, v = (
                linear(f"{layer}{name}.self.{part}", at) for part, at in (("query", h), ("key", seen), ("value", seen))
            )
            dense = linear(f"{layer}{name}.output.dense", attention(q, k, v, keep))
            h = norm(f"{layer}{name}.output.LayerNorm", dense + h, 1e-12)
        inner = F.gelu(linear(f"{layer}intermediate.dense", h))
        h = norm(f"{layer}output.LayerNorm", linear(f"{layer}output.dense", inner) + h, 1e-12)
    score = h[:, 0]
    for k in (0, 2, 4, 6, 7):
        score = linear(f"mlp.layers.{k}", score)
    return (score.squeeze(1) - 0.16717362830052426) / 1.0333394966054072


@pytest.mark.parametrize("size", [(24, 24), (40, 40), (24, 39), (51, 30)])  # 39: a crop that begins at half a pixel
def test_score_equals_the_network_written_out(saved, size):
    folder, weights = saved
    images = random_images(5, *size)
    pixels = torch.stack(
        [V.to_tensor(V.center_crop(V.resize(image, 24, V.InterpolationMode.BICUBIC), 24)) for image in as_pil(images)]
    )
    tokens = torch.tensor([tokens_of(prompt) for prompt in PROMPTS])
    expected = score_by_hand(weights, V.normalize(pixels, CLIP_MEAN, CLIP_STD), tokens)

    score = ImageReward(str(folder / "ImageReward.pt"), str(folder / "bert"), chunk_size=2)(images, PROMPTS)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.double(), expected, rtol=1e-4, atol=1e-4)
    assert score.std() > 0.1


def test_score_depends_on_image_and_prompt(saved):
    folder, _ = saved
    reward = ImageReward(str(folder / "ImageReward.pt"), str(folder / "bert"))
    images = random_images(2)
    score = reward(images, ["a red circle"] * 2)
    assert score[0] != score[1]
    assert (reward(images, ["a blue square"] * 2) - score).abs().min() > 1e-3


def test_differentiable_comes_near_the_published_path(saved):
    folder, _ = saved
    images = random_images(5, 48, 48)
    paths = [
        ImageReward(str(folder / "ImageReward.pt"), str(folder / "bert"), preprocessing=preprocessing)(images, PROMPTS)
        for preprocessing in ("published", "differentiable")
    ]
    assert 0 < (paths[0] - paths[1]).abs().max() < 0.05 * paths[0].std()


def test_low_precision_comes_near(saved):
    folder, _ = saved
    exact, near = (
        ImageReward(str(folder / "ImageReward.pt"), str(folder / "bert"), precision=precision)(random_images(), PROMPTS)
        for precision in ("float32", "bfloat16")
    )
    assert (exact - near).abs().max() < 0.2 * exact.std()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {f"model.{name}": value for name, value in w.items()}, "is no ImageReward.pt"),
        (lambda w: {n: v for n, v in w.items() if n != "mlp.layers.7.bias"}, r"1 missing \(head.7.bias\)"),
        (lambda w: w | {"extra": torch.zeros(1)}, r"1 unknown \(extra\)"),
        (lambda w: w | {"mlp.layers.0.weight": torch.zeros(1024, 65)}, r"head.0.weight \(1024, 65\) instead of"),
        (lambda w: w | {"blip.text_encoder.embeddings.position_ids": torch.ones(1, 40)}, "1 unknown"),
    ],
)
def test_other_layouts_are_refused(saved, tmp_path, change, message):
    folder, weights = saved
    torch.save(change(weights), tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=message):
        ImageReward(str(tmp_path / "ImageReward.pt"), str(folder / "bert")).load()


def test_tokenizer_of_another_model_is_refused(saved, tmp_path):
    folder, _ = saved
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT_VOCABULARY, "more"]) + "\n")
    with pytest.raises(ValueError, match="has 14 tokens, but the network knows 13"):
        ImageReward(str(folder / "ImageReward.pt"), str(tmp_path)).load()
