"""LAION's aesthetic predictors: a linear map, or a stack of them, on CLIP ViT-L/14 image features."""

from itertools import pairwise
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.rewards.network import NetworkReward, Precision, PreprocessingMode
from lightning_modules.rewards.preprocessing import Preprocessing
from lightning_modules.rewards.towers import Towers, load_hf_clip
from lightning_modules.weight_files import check_file, check_sha256, check_source, read_weights

PUBLISHED = "sac+logos+ava1-l14-linearMSE.pth"
PUBLISHED_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
LAYERS = ("layers.0", "layers.2", "layers.4", "layers.6", "layers.7")  # dropout lies between them, nothing else


class AestheticHead(nn.Module):
    """Linear layers without anything between them, which in evaluation are one affine map: folded, in float64.

    Args:
        weights: State dict of one layer (`weight`, `bias`; LAION's first predictor) or of five (`layers.0.weight`, ...;
            the improved one).
        where: The option and the file, for messages.

    Raises:
        ValueError: if it is neither, or the layers do not lead from one to the next, and to one number.
    """

    def __init__(self, weights: dict[str, Tensor], where: str) -> None:
        super().__init__()
        names = [""] if "weight" in weights else [f"{name}." for name in LAYERS]
        if set(weights) != {name + part for name in names for part in ("weight", "bias")}:
            raise ValueError(
                f"{where}: the head holds {', '.join(sorted(weights)[:4])}, ...; expected weight and bias, or each of "
                f"{', '.join(LAYERS)} with .weight and .bias."
            )
        layers = [(weights[name + "weight"].double(), weights[name + "bias"].double()) for name in names]
        fits = all(m.ndim == 2 and b.shape == m.shape[:1] for m, b in layers)
        if not fits or len(layers[-1][0]) != 1 or any(len(m) != n.shape[1] for (m, _), (n, _) in pairwise(layers)):
            shapes = ", ".join(str(tuple(m.shape)) for m, _ in layers)
            raise ValueError(f"{where}: layers of the shapes {shapes} do not lead to one number.")
        direction, offset = layers[0]
        for matrix, bias in layers[1:]:
            direction, offset = matrix @ direction, matrix @ offset + bias
        self.register_buffer("direction", direction[0].float())
        self.register_buffer("offset", offset[0].float())

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) image features, of any length -> (B,) scores."""
        return (F.normalize(features, dim=-1) * self.direction).sum(dim=-1) + self.offset


class AestheticNetwork(nn.Module):
    """The image tower and the head."""

    def __init__(self, towers: Towers, head: AestheticHead) -> None:
        super().__init__()
        self.towers = towers
        self.head = head


class AestheticScore(NetworkReward):
    """How beautiful people find the image, about 4.5 to 6.5 of 10; the prompt plays no part.

    "differentiable" preprocessing cuts the same square as the published one.

    Args:
        head: sac+logos+ava1-l14-linearMSE.pth, whose SHA-256 is checked under that name, or a head of that layout, or
            LAION's first one, sa_0_4_vit_l_14_linear.pth.
        clip: Folder or hub id of CLIP ViT-L/14 in transformers' layout.
        preprocessing: "published", or "differentiable" for gradients.
        precision: Of the image tower's matrices; the head and the scores are float32.
        chunk_size: Images scored at once.
    """

    def __init__(
        self,
        head: str,
        clip: str = "openai/clip-vit-large-patch14",
        preprocessing: PreprocessingMode = "published",
        precision: Precision = "float32",
        chunk_size: int = 16,
    ) -> None:
        super().__init__(preprocessing, precision, chunk_size)
        check_file("AestheticScore.head", head)
        if Path(head).name == PUBLISHED:
            check_sha256("AestheticScore.head", Path(head), PUBLISHED_SHA256)
        check_source("AestheticScore.clip", clip, "config.json")
        self.head = head
        self.clip = clip

    def build(self) -> tuple[nn.Module, Preprocessing]:
        option = "AestheticScore.head"
        head = AestheticHead(read_weights(option, Path(self.head)), f"{option}: {self.head!r}")
        towers, preprocessing = load_hf_clip("AestheticScore.clip", self.clip)
        wide = towers.clip.config.projection_dim
        if len(head.direction) != wide:
            raise ValueError(
                f"{option}: {self.head!r} takes {len(head.direction)} features, but {self.clip!r} makes {wide}; "
                "expected the head and the CLIP that belong together (ViT-L/14 makes 768)."
            )
        towers.clip.text_model = None  # a third of the weights, and never used
        return AestheticNetwork(towers, head), preprocessing

    def score_pixels(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return self.network.head(self.network.towers.encode_images(pixels).float())
