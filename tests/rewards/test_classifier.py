"""The classifier reward: DINOv2 with a linear head from both published layouts, as class-conditional DMDR uses it."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.rewards.classifier import (
    ClassifierReward,
    DINOv2Score,
    normalise_and_resize,
    resize_positions,
    transformers_names,
)
from lightning_modules.weight_files import build_empty
from tests.rewards.tiny import random_images, random_weights

WIDTH, LAYERS, CLASSES, SIZE = 64, 5, 7, 28
LABELS = ["3", "0", "6"]


def meta_layout(width: int, layers: int, patch: int, grid: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape in the file of a DINOv2 as Meta publishes it."""
    layout = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 1 + grid**2, width),
        "mask_token": (1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    linears |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(layers):
        for name, (rows, columns) in linears.items():
            layout |= {f"blocks.{i}.{name}.weight": (rows, columns), f"blocks.{i}.{name}.bias": (rows,)}
        for name in ("norm1", "norm2"):
            layout |= {f"blocks.{i}.{name}.weight": (width,), f"blocks.{i}.{name}.bias": (width,)}
        layout |= {f"blocks.{i}.ls1.gamma": (width,), f"blocks.{i}.ls2.gamma": (width,)}
    return layout | {"norm.weight": (width,), "norm.bias": (width,)}


def published_forward(weights: dict[str, Tensor], pixels: Tensor) -> list[Tensor]:
    """DINOv2 written down once more: normalised tokens (B, 1 + N, D) of each layer, from Meta's names."""
    w = weights
    tokens = F.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    tokens = tokens.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(tokens), -1, -1), tokens], 1) + w["pos_embed"]
    outputs = []
    for i in range(LAYERS):
        b = {name.split(".", 2)[2]: value for name, value in w.items() if name.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, (WIDTH,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        q, k, v = F.linear(y, b["attn.qkv.weight"], b["attn.qkv.bias"]).chunk(3, -1)
        y = (q @ k.transpose(1, 2) / WIDTH**0.5).softmax(-1) @ v  # one head of 64
        x = x + b["ls1.gamma"] * F.linear(y, b["attn.proj.weight"], b["attn.proj.bias"])
        y = F.layer_norm(x, (WIDTH,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = F.linear(
            F.gelu(F.linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"])), b["mlp.fc2.weight"], b["mlp.fc2.bias"]
        )
        x = x + b["ls2.gamma"] * y
        outputs.append(F.layer_norm(x, (WIDTH,), w["norm.weight"], w["norm.bias"], 1e-6))
    return outputs


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Meta's files of a tiny DINOv2 with both kinds of heads."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.save(random_weights(meta_layout(WIDTH, LAYERS, 14, SIZE // 14)), folder / "network.pth")
    for name, parts in (("head", 2), ("head4", 5)):
        torch.save(random_weights({"weight": (CLASSES, parts * WIDTH), "bias": (CLASSES,)}), folder / f"{name}.pth")
    return folder


def build(files: Path, head: str = "head", **options) -> DINOv2Score:
    return DINOv2Score(str(files / "network.pth"), str(files / f"{head}.pth"), **({"image_size": SIZE} | options))


@pytest.mark.parametrize("head", ["head", "head4"])
def test_score_is_the_log_probability_of_the_class(files, head):
    images = random_images(3, 33, 30)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = F.interpolate((images - mean) / std, (SIZE, SIZE), mode="bicubic")
    layers = published_forward(torch.load(files / "network.pth", weights_only=True), pixels)
    classes = [layer[:, 0] for layer in (layers[-1:] if head == "head" else layers[-4:])]
    linear = torch.load(files / f"{head}.pth", weights_only=True)
    logits = F.linear(torch.cat([*classes, layers[-1][:, 1:].mean(1)], -1), linear["weight"], linear["bias"])
    expected = logits.log_softmax(-1)[torch.arange(3), torch.tensor([3, 0, 6])]
    torch.testing.assert_close(build(files, head)(images, LABELS), expected, rtol=1e-4, atol=1e-4)


def test_both_layouts_give_the_same_scores(files, tmp_path):
    reward = build(files)
    images = random_images(3, 40, 40)
    expected = reward(images, LABELS)
    reward.network.network.save_pretrained(tmp_path / "folder")
    torch.testing.assert_close(DINOv2Score(str(tmp_path / "folder"), image_size=SIZE)(images, LABELS), expected)


def test_gradient_is_what_finite_differences_say(files):
    reward = build(files, chunk_size=2)
    images = (0.1 + 0.8 * random_images(3, 33, 30)).requires_grad_()
    reward(images, LABELS).sum().backward()
    direction = torch.sign(images.grad)
    step = 1e-2 / direction.norm()
    with torch.no_grad():
        up, down = (reward(images + sign * step * direction, LABELS).double().sum() for sign in (1, -1))
    assert (up - down) / (2 * step) == pytest.approx((images.grad * direction).sum().item(), rel=0.02)
    assert reward.differentiable
    assert all(weight.grad is None for weight in reward.parameters())


def test_score_does_not_depend_on_the_precision_of_the_run(files):
    """A float32 image meets a half-precision network: the reward's own precision decides, and gradients come back."""
    images = random_images(2, 32, 32)
    plain = build(files)(images, LABELS[:2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(build(files)(images, LABELS[:2]), plain)
    low = build(files, precision="bfloat16")
    scores = low(images.requires_grad_(), LABELS[:2])
    assert scores.dtype == torch.float32
    scores.sum().backward()
    assert images.grad.dtype == torch.float32
    torch.testing.assert_close(scores.detach(), plain, rtol=0.05, atol=0.1)
    assert low.network.network.dinov2.layernorm.weight.dtype == torch.float32


def test_loading_draws_no_random_number_and_happens_once(files, tmp_path):
    build_from_files = build(files)
    build_from_files.load()
    build_from_files.network.network.save_pretrained(tmp_path)
    for reward in (build(files), DINOv2Score(str(tmp_path), image_size=SIZE)):
        before = torch.get_rng_state()
        reward.load()
        network = reward.network
        reward(random_images(3), LABELS)
        assert reward.network is network
        assert torch.equal(torch.get_rng_state(), before)
        assert not any(p.requires_grad for p in reward.parameters())


def test_the_class_that_the_gradient_follows_becomes_surer(files):
    reward = build(files)
    images = (0.3 + 0.4 * random_images(1, 32, 32)).requires_grad_()
    before = reward(images, ["2"])
    (gradient,) = torch.autograd.grad(before.sum(), images)
    assert reward((images + 0.02 * gradient / gradient.abs().max()).clamp(0, 1), ["2"]) > before


def test_a_subclass_with_another_classifier_needs_only_build():
    class Brightness(ClassifierReward):
        def build(self):
            mean = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3, False))
            mean[2].weight.data = torch.eye(3)
            return mean, lambda images: images

    images = torch.zeros(1, 3, 4, 4)
    images[:, 1] = 1.0
    assert Brightness()(images, ["1"]).item() == pytest.approx(1 - math.log(math.e + 2))


def test_images_are_normalised_then_resized_without_antialiasing():
    images = random_images(1, 37, 41)
    out = normalise_and_resize(images, 14)
    plain = F.interpolate(images, (14, 14), mode="bicubic")
    torch.testing.assert_close(out[:, 0] * 0.229 + 0.485, plain[:, 0], rtol=1e-4, atol=1e-5)
    assert (plain - F.interpolate(images, (14, 14), mode="bicubic", antialias=True)).abs().max() > 0.05


def test_positions_of_large_images_serve_small_ones():
    positions = torch.randn(1, 1 + 37**2, 8)
    small = resize_positions(positions, 16)
    assert small.shape == (1, 1 + 16**2, 8)
    assert torch.equal(small[:, 0], positions[:, 0])
    assert resize_positions(positions, 37) is not small
    ramp = torch.cat([torch.zeros(1, 1, 1), torch.arange(37.0).repeat(37)[None, :, None]], 1)  # grows with the column
    columns = resize_positions(ramp, 16)[0, 1:, 0].view(16, 16)
    torch.testing.assert_close(columns[0], columns[7])
    scale = 37 / 16.1  # half-pixel centres, at DINOv2's slightly larger size
    torch.testing.assert_close(columns[3, 2:14], (torch.arange(2, 14) + 0.5) * scale - 0.5, rtol=0, atol=0.06)


def test_real_size_on_the_meta_device():
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=224, num_labels=1000
    )
    network = build_empty(lambda: Dinov2ForImageClassification(config))
    layout = meta_layout(1024, 24, 14, 37)
    with torch.device("meta"):
        weights = {name: torch.empty(shape) for name, shape in layout.items()}
        weights["pos_embed"] = resize_positions(weights["pos_embed"], 16)
    renamed = {f"dinov2.{name}": tuple(value.shape) for name, value in transformers_names(weights).items()}
    body = {name: tuple(p.shape) for name, p in network.state_dict().items() if name.startswith("dinov2.")}
    assert renamed == body
    assert sum(p.numel() for p in network.dinov2.parameters()) == pytest.approx(303.2e6, rel=1e-3)
    assert sum(torch.Size(shape).numel() for shape in layout.values()) == pytest.approx(304.4e6, rel=1e-3)


@pytest.mark.parametrize("label", ["7", "-1", "a red circle", "", "1.0", "9" * 30, "²"])
def test_what_is_no_class_is_named(files, label):
    with pytest.raises(ValueError, match="no class of a classifier of 7 classes.*0 to 6"):
        build(files)(random_images(1), [label])


def wrong(files: Path, tmp_path: Path, what: str) -> tuple[str, str | None]:
    network, head = torch.load(files / "network.pth"), torch.load(files / "head.pth")
    if what == "registers":
        network["register_tokens"] = torch.zeros(1, 4, WIDTH)
    elif what == "missing":
        del network["blocks.1.ls1.gamma"]
    elif what == "clip":
        network = {"visual.proj": torch.zeros(2, 2)}
    elif what == "head":
        head = {"weight": torch.zeros(CLASSES, 3 * WIDTH), "bias": torch.zeros(CLASSES)}
    torch.save(network, tmp_path / "network.pth")
    torch.save(head, tmp_path / "head.pth")
    return str(tmp_path / "network.pth"), str(tmp_path / "head.pth")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("registers", "1 unknown .*register_tokens"),
        ("missing", "1 missing .*layer.1.layer_scale1.lambda1"),
        ("clip", "visual.proj.*expected the file of a DINOv2"),
        ("head", "weight .7, 192.*128 or 320 features"),
    ],
)
def test_files_of_other_networks_are_refused(files, tmp_path, what, message):
    with pytest.raises(ValueError, match=message):
        DINOv2Score(*wrong(files, tmp_path, what), image_size=SIZE).load()


def test_mistakes_are_named_before_anything_is_read(files, tmp_path):
    with pytest.raises(ValueError, match="is a file, which has no head"):
        DINOv2Score(str(files / "network.pth"))
    with pytest.raises(FileNotFoundError, match="head: there is no file"):
        DINOv2Score(str(files / "network.pth"), str(tmp_path / "gone.pth"))
    with pytest.raises(FileNotFoundError, match="has no config.json"):
        DINOv2Score(str(tmp_path))
    with pytest.raises(ValueError, match="image_size is 30; expected a multiple of the network's patch, 14"):
        build(files, image_size=30).load()
    (tmp_path / "config.json").write_text('{"model_type": "dinov2", "hidden_size": 64}')
    with pytest.raises(ValueError, match="no readable Dinov2ForImageClassification"):
        DINOv2Score(str(tmp_path)).load()


def test_a_folder_without_the_head_is_refused(files, tmp_path):
    reward = build(files)
    reward.load()
    reward.network.network.dinov2.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="missing keys: classifier"):
        DINOv2Score(str(tmp_path), image_size=SIZE).load()
