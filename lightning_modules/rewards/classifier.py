"""An image classifier as a reward: how surely it sees the class that the image was made for."""

import re
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.rewards.network import NetworkReward, Precision
from lightning_modules.weight_files import build_empty, check_file, check_source, first_line, fit, read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HEAD_WIDTH = 64  # of every published DINOv2
PUBLISHED_OFFSET = 0.1  # added to the size to which DINOv2's own code interpolates its positions
# DINOv2's own names -> those of transformers, after the queries, keys and values have been taken apart.
NAMES = (
    (r"^(cls_token|mask_token)$", r"embeddings.\1"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^norm\.", "layernorm."),
    (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.", ".attention."),
    (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
)


def normalise_and_resize(images: Tensor, size: int) -> Tensor:
    """What the published class-conditional DMDR gives its classifier: ImageNet's normalisation, then bicubic, no
    antialiasing.

    Args:
        images: (B, 3, H, W) in [0, 1].
        size: Edge of the result in pixels; both edges of the image become that long.

    Returns:
        (B, 3, size, size) float32; gradients flow through.
    """
    images = images.float()
    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    return F.interpolate((images - mean) / std, (size, size), mode="bicubic", align_corners=False)


class ClassifierReward(NetworkReward):
    """The hook for classifiers: a subclass writes `build`, and gradients, precision and chunks are there.

    `build` gives a network that maps (B, 3, S, S) prepared images to (B, number of classes) logits, and what prepares
    images. The "prompts" are class numbers as text, as `LabelsDataModule` gives them. The score is

        log p(class | image) = -cross-entropy,

    0 at best, so that a loss is `-weight * score`.

    Args:
        precision: Of the matrices and of what is computed; norms, logits and scores are float32.
        chunk_size: Images scored at once.
    """

    def __init__(self, precision: Precision = "float32", chunk_size: int = 16) -> None:
        super().__init__("differentiable", precision, chunk_size)

    @abstractmethod
    def build(self) -> tuple[nn.Module, Any]:
        """The network with its weights, and the preprocessing, which gradients must pass."""

    def differentiable_preprocessing(self, published: Any) -> Any:
        return published

    def score_pixels(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        logits = self.network(pixels).float()
        labels = self.labels(prompts, logits.shape[-1])
        return -F.cross_entropy(logits, labels.to(logits.device), reduction="none")

    def labels(self, prompts: list[str], num_classes: int) -> Tensor:
        """(B,) int64 class numbers.

        Raises:
            ValueError: naming the first that is not a class of this classifier.
        """
        for prompt in prompts:
            if not re.fullmatch("[0-9]{1,9}", prompt.strip()) or int(prompt) >= num_classes:
                raise ValueError(
                    f"{type(self).__name__}: {prompt[:40]!r} is no class of a classifier of {num_classes} classes; "
                    f"expected a number from 0 to {num_classes - 1}, as LabelsDataModule gives them."
                )
        return torch.tensor([int(prompt) for prompt in prompts])


class DINOv2Logits(nn.Module):
    """Logits of a linear head on DINOv2's features.

    Args:
        network: `Dinov2ForImageClassification`; the width of its head says what the head sees: twice the network's, the
            last layer's class token and the mean of its patches; five times, the class tokens of the last four layers
            and that mean.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.layers = network.classifier.in_features // network.config.hidden_size - 1

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, number of classes)."""
        body = self.network.dinov2
        output = body(pixels, output_hidden_states=True)
        last = [body.layernorm(states) for states in output.hidden_states[-self.layers :]]
        return self.network.classifier(torch.cat([*(states[:, 0] for states in last), last[-1][:, 1:].mean(1)], dim=-1))


class DINOv2Score(ClassifierReward):
    """How surely a DINOv2 with a linear head sees the class: log p, the reward of class-conditional DMDR.

    Args:
        network: Folder or hub id of a `Dinov2ForImageClassification`, such as facebook/dinov2-large-imagenet1k-1-layer;
            or, with `head`, Meta's own file of the network, dinov2_vitl14_pretrain.pth.
        head: Meta's file of a linear head on it, dinov2_vitl14_linear_head.pth or dinov2_vitl14_linear4_head.pth.
        image_size: Pixels that the network sees; 224 as published.
        precision: Of the network's matrices; norms, logits and scores are float32.
        chunk_size: Images scored at once.
    """

    def __init__(
        self,
        network: str,
        head: str | None = None,
        image_size: int = 224,
        precision: Precision = "float32",
        chunk_size: int = 16,
    ) -> None:
        super().__init__(precision, chunk_size)
        if image_size < 1:
            raise ValueError(f"DINOv2Score: image_size is {image_size}; expected 1 or more pixels.")
        if head is None:
            if Path(network).is_file():
                raise ValueError(
                    f"DINOv2Score.network: {network!r} is a file, which has no head; give the linear head's file as "
                    "`head`, or a folder of a Dinov2ForImageClassification."
                )
            check_source("DINOv2Score.network", network, "config.json")
        else:
            check_file("DINOv2Score.network", network)
            check_file("DINOv2Score.head", head)
        self.source = network
        self.head = head
        self.image_size = image_size

    def build(self) -> tuple[nn.Module, Any]:
        network = self.from_folder() if self.head is None else self.from_files(self.head)
        patch = network.config.patch_size
        if self.image_size % patch:
            raise ValueError(
                f"DINOv2Score: image_size is {self.image_size}; expected a multiple of the network's patch, {patch}."
            )
        return DINOv2Logits(network), lambda images: normalise_and_resize(images, self.image_size)

    def from_folder(self) -> nn.Module:
        """transformers' own format."""
        from transformers import Dinov2ForImageClassification

        option = f"DINOv2Score.network: {self.source!r}"
        try:
            with torch.random.fork_rng(devices=[]):
                network, found = Dinov2ForImageClassification.from_pretrained(
                    self.source, output_loading_info=True, use_safetensors=True, dtype=torch.float32
                )
        except (OSError, ValueError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{option} is no readable Dinov2ForImageClassification ({first_line(error)}); expected config.json and "
                "model.safetensors as `save_pretrained` writes them."
            ) from error
        wrong = {name: sorted(map(str, found[name])) for name in found if name.endswith("_keys") and found[name]}
        if wrong:
            problems = "; ".join(f"{name.replace('_', ' ')}: {', '.join(keys[:4])}" for name, keys in wrong.items())
            raise ValueError(f"{option} does not hold the weights of a Dinov2ForImageClassification: {problems}.")
        return network

    def from_files(self, head: str) -> nn.Module:
        """Meta's two files."""
        from transformers import Dinov2Config, Dinov2ForImageClassification

        option = "DINOv2Score.network"
        weights = read_weights(option, Path(self.source))
        linear = read_weights("DINOv2Score.head", Path(head))
        if "cls_token" not in weights or "blocks.0.mlp.fc1.weight" not in weights or "pos_embed" not in weights:
            raise ValueError(
                f"{option}: {self.source!r} holds {', '.join(list(weights)[:4])}, ...; expected the file of a DINOv2 "
                "without registers as Meta publishes it (cls_token, pos_embed, blocks.0.mlp.fc1.weight, ...)."
            )
        width, patch = weights["cls_token"].shape[-1], weights["patch_embed.proj.weight"].shape[-1]
        wide = [tuple(value.shape) for name, value in linear.items() if name == "weight"]
        if set(linear) != {"weight", "bias"} or wide[0][1] not in (2 * width, 5 * width):
            raise ValueError(
                f"DINOv2Score.head: {head!r} holds {', '.join(f'{k} {tuple(v.shape)}' for k, v in linear.items())}; "
                f"expected weight and bias of a linear layer on {2 * width} or {5 * width} features of this network."
            )
        config = Dinov2Config(
            hidden_size=width,
            num_hidden_layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
            num_attention_heads=max(1, width // HEAD_WIDTH),
            mlp_ratio=len(weights["blocks.0.mlp.fc1.weight"]) // width,
            patch_size=patch,
            image_size=self.image_size,
            num_labels=len(linear["weight"]),
        )
        network = build_empty(lambda: Dinov2ForImageClassification(config))
        if wide[0][1] == 5 * width:
            network.classifier = build_empty(lambda: nn.Linear(5 * width, len(linear["weight"])))
        weights["pos_embed"] = resize_positions(weights["pos_embed"], self.image_size // patch)
        renamed = {f"dinov2.{name}": value for name, value in transformers_names(weights).items()}
        renamed |= {f"classifier.{name}": value for name, value in linear.items()}
        return fit(option, Path(self.source), renamed, network)


def transformers_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """DINOv2's own state dict under transformers' names; queries, keys and values become three matrices."""
    split: dict[str, Tensor] = {}
    for name, value in weights.items():
        if ".attn.qkv." in name:
            parts = value.chunk(3)
            split |= {name.replace("qkv", f"{letter}_proj"): part for letter, part in zip("qkv", parts, strict=True)}
        else:
            split[name] = value
    renamed = {}
    for name, value in split.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Positions for another number of patches, as DINOv2's own code makes them.

    Args:
        positions: (1, 1 + N, D): of the class token, and of a square of N patches.
        grid: Patches along an edge of the images to come.

    Returns:
        (1, 1 + grid * grid, D) float32.
    """
    of_class, of_patches = positions.float().split([1, positions.shape[1] - 1], dim=1)
    edge = round(of_patches.shape[1] ** 0.5)
    if edge == grid:
        return positions.float()
    square = of_patches.unflatten(1, (edge, edge)).permute(0, 3, 1, 2)
    factor = (grid + PUBLISHED_OFFSET) / edge
    resized = F.interpolate(square, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([of_class, resized.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
