"""MPS, the multi-dimensional preference score, CVPR 2024: a CLIP ViT-H/14 whose image tokens look at the prompt."""

from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.functional.scores import cosine_score
from lightning_modules.rewards.network import EmbeddingReward, Precision, PreprocessingMode
from lightning_modules.rewards.preprocessing import Preprocessing
from lightning_modules.rewards.towers import empty_hf_clip, hf_image_processor, hf_tokenizer
from lightning_modules.weight_files import build_empty, check_file, check_source, find, fit, read_weights

# Words of the overall preference, from the published evaluation code.
OVERALL = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
RELEVANT = 0.3  # in the evaluation code; the model's own forward pass has 0.01

# Names in the published module -> names here; what they have in common stays.
NAMES = {".0.fn.": ".look.", ".1.fn.": ".think.", "ff.0.": "ff_in.", "ff.2.": "ff_out.", "ff_out.1.": "ff_out."}


def gated(x: Tensor) -> Tensor:
    """SwiGLU: the first half of the features, gated by the second."""
    x, gate = x.chunk(2, dim=-1)
    return F.silu(gate) * x


def rotate(x: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Rotary position embedding of (..., N, d), the two halves of the features being the pairs."""
    angles = torch.arange(x.shape[-2], device=x.device)[:, None] * inverse_frequencies
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Heads of queries (B, N, h d) over one shared head of keys and values (B, M, d) -> (B, N, h d)."""
    B, N, wide = q.shape
    heads = wide // k.shape[-1]
    q = q.reshape(B, N, heads, -1).transpose(1, 2)
    k, v = (x[:, None].expand(-1, heads, -1, -1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).reshape(B, N, wide)


class Look(nn.Module):
    """Image tokens look at the prompt's tokens; a gated layer beside it."""

    def __init__(self, width: int, inner: int, head: int, ff: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * head, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)
        self.ff_in = nn.Linear(width, 2 * ff, bias=False)
        self.ff_out = nn.Linear(ff, width, bias=False)

    def forward(self, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        x = self.norm(x)
        seen = attend(self.to_q(x), *self.to_kv(text).chunk(2, dim=-1), bias.to(x.dtype))
        return self.to_out(seen) + self.ff_out(gated(self.ff_in(x)))


class Think(nn.Module):
    """Image tokens look at one another, in rotary positions; a gated layer beside it."""

    def __init__(self, width: int, inner: int, head: int, ff: int) -> None:
        super().__init__()
        self.parts = (inner, head, head, 2 * ff)
        self.norm = nn.LayerNorm(width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(inner, width, bias=False)
        self.ff_out = nn.Linear(ff, width, bias=False)
        self.rotary_emb = nn.Module()
        self.rotary_emb.register_buffer("inv_freq", torch.empty(head // 2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, ff = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        B, N, wide = q.shape
        q = rotate(q.reshape(B, N, -1, k.shape[-1]).transpose(1, 2), self.rotary_emb.inv_freq)
        q = q.transpose(1, 2).reshape(B, N, wide)
        seen = attend(q.to(v.dtype), rotate(k, self.rotary_emb.inv_freq).to(v.dtype), v)
        return self.attn_out(seen) + self.ff_out(gated(ff))


class MPSNetwork(nn.Module):
    """CLIP and the layers on top of it, at the published size unless told otherwise.

    Args:
        clip: `CLIPModel` of transformers.
        tokenize: Texts -> (B, L) token numbers.
        layers: Pairs of `Look` and `Think`.
        width: Of the projected tokens.
        inner: Width of all heads together.
        head: Width of one.
        ff: Width of the gated layers.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenize: Any,
        layers: int = 4,
        width: int = 1024,
        inner: int = 1024,
        head: int = 64,
        ff: int = 4096,
    ) -> None:
        super().__init__()
        self.model = clip
        self.tokenize = tokenize
        sizes = (width, inner, head, ff)
        self.cross_model = nn.Module()
        self.cross_model.layers = nn.ModuleList(
            nn.ModuleDict({"look": Look(*sizes), "think": Think(*sizes)}) for _ in range(layers)
        )

    def encode_texts(self, texts: list[str]) -> Tensor:
        """B texts -> (B, 1 + L, D): the feature of the whole text, then those of its tokens, padding included."""
        tokens = self.tokenize(texts).to(self.model.logit_scale.device)
        text = self.model.text_model(input_ids=tokens)
        return self.model.text_projection(torch.cat([text.pooler_output[:, None], text.last_hidden_state], dim=1))

    def forward(self, pixels: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        """Image features that have seen the prompt.

        Args:
            pixels: (B, 3, S, S).
            text: (B, L, D) features of the prompts' tokens.
            condition: (L, D) features of the tokens of the words that matter.

        Returns:
            (B, D) features.
        """
        relevance = (text @ condition.T).amax(dim=-1)  # (B, L)
        # Differs: the published code divides by the maximum over the batch, so that prompts would change each other's
        # scores; it evaluates one prompt at a time, and so does this.
        relevance = relevance / relevance.amax(dim=-1, keepdim=True)
        bias = torch.where(relevance > RELEVANT, 0.0, float("-inf"))[:, None, None]  # heads and image tokens alike

        x = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).last_hidden_state)
        for layer in self.cross_model.layers:
            x = x + layer["look"](x, text, bias)
            x = x + layer["think"](x)
        return x[:, 0]


def from_published(name: str) -> str:
    """The network's name of a weight of the published module."""
    if name.startswith("cross_model."):
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours, 1)
    return name


def sizes_of(weights: dict[str, Tensor]) -> dict[str, int]:
    """Sizes of the layers on top of CLIP that a published state dict belongs to.

    Raises:
        KeyError: if one of the weights that tell is missing.
    """
    first = "cross_model.layers.0.0.fn."
    inner, width = weights[f"{first}to_q.weight"].shape
    return {
        "layers": next(i for i in count() if f"cross_model.layers.{i}.0.fn.to_q.weight" not in weights),
        "width": width,
        "inner": inner,
        "head": weights[f"{first}to_kv.weight"].shape[0] // 2,
        "ff": weights[f"{first}ff.2.weight"].shape[1],
    }


class MPS(EmbeddingReward):
    """How people prefer the image for the prompt in what the condition names: exp(logit_scale) times a cosine.

    The published file is a pickled program, which is not read: save its state dict once, in the authors' environment,
    `torch.save(torch.load("MPS_overall_checkpoint.pth", weights_only=False).state_dict(), "mps.pt")`.

    Args:
        weights: State dict of the published module: CLIP under `model.`, the layers on top under `cross_model.`.
        clip: Folder or hub id of the CLIP it was made from: its config, tokenizer and image processor.
        condition: The words that matter.
        preprocessing: "published", or "differentiable" for gradients.
        precision: Of the matrices; the scores are float32.
        chunk_size: Images scored at once.
    """

    kept_texts: ClassVar[int] = 256  # all tokens of a prompt: 300 kB

    def __init__(
        self,
        weights: str,
        clip: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        condition: str = OVERALL,
        preprocessing: PreprocessingMode = "published",
        precision: Precision = "float32",
        chunk_size: int = 16,
    ) -> None:
        super().__init__(preprocessing, precision, chunk_size)
        check_file("MPS.weights", weights)
        check_source("MPS.clip", clip, "config.json")
        self.weights = weights
        self.clip = clip
        self.condition = condition

    def build(self) -> tuple[nn.Module, Preprocessing]:
        option, file = "MPS.weights", Path(self.weights)
        weights = read_weights(option, file)
        try:
            sizes = sizes_of(weights)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{option}: {self.weights!r} is no state dict of MPS ({error} is missing or of another shape); it has "
                f"{', '.join(sorted(weights)[:3])}, ..."
            ) from error
        clip = empty_hf_clip("MPS.clip", find("MPS.clip", self.clip, ("config.json",)))
        tokenize = hf_tokenizer("MPS.clip", self.clip, clip.config.text_config)
        network = build_empty(lambda: MPSNetwork(clip, tokenize, **sizes))
        fit(option, file, {from_published(name): value for name, value in weights.items()}, network)
        return network, hf_image_processor("MPS.clip", self.clip, clip)

    def score_pixels(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        text, condition = self.text_features(prompts), self.text_features([self.condition])[0]
        features = self.network(pixels, text[:, 1:], condition[1:])
        return self.network.model.logit_scale.exp() * cosine_score(features.float(), text[:, 0])
