"""The SiT network (arXiv:2401.08740) in the published key layout: a transformer on latents that is told a class."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Depth, width and heads of the published sizes; the patch is 2, 4 or 8.
SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
FREQUENCIES = 256  # length of the sinusoid of the time
MLP_RATIO = 4
NORM_EPS = 1e-6


@dataclass(frozen=True)
class SiTConfig:
    """Shape of a SiT.

    Attributes:
        depth: Blocks.
        width: Channels of a token.
        heads: Of the attention.
        patch_size: Edge of the square of latents that one token stands for.
        in_channels: Channels of the latents, in and out.
        sample_size: Height and width of the latents; 32 for images of 256 x 256.
        num_classes: Classes; the label of that number means "no class".
    """

    depth: int = 28
    width: int = 1152
    heads: int = 16
    patch_size: int = 2
    in_channels: int = 4
    sample_size: int = 32
    num_classes: int = 1000


def preset(size: str, sample_size: int = 32, num_classes: int = 1000) -> SiTConfig:
    """The shape of a published size.

    Args:
        size: S, B, L or XL, a slash, and the patch: 2, 4 or 8.
        sample_size: Height and width of the latents.
        num_classes: Classes, without "no class".

    Raises:
        ValueError: if there is no such size.
    """
    letters, _, patch = size.partition("/")
    if letters not in SIZES or patch not in ("2", "4", "8"):
        raise ValueError(
            f"SiT: there is no size {size!r}; expected one of {', '.join(SIZES)}, a slash and a patch of 2, 4 or 8, "
            "such as XL/2."
        )
    depth, width, heads = SIZES[letters]
    return SiTConfig(depth, width, heads, int(patch), sample_size=sample_size, num_classes=num_classes)


def time_sinusoid(t: Tensor, dim: int = FREQUENCIES, max_period: float = 10_000.0) -> Tensor:
    """Sinusoid of times, cosines first.

    Args:
        t: (B,) times, in 0..1 for SiT.
        dim: Length of the embedding, even.
        max_period: The slowest wave's.

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def position_table(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine embedding of the tokens of a square grid, row by row.

    The first half of a token's channels tells its column, the second its row; of each, sines first.

    Args:
        width: Channels of a token, a multiple of 4.
        grid: Tokens along an edge.

    Returns:
        (1, grid * grid, width) float32.
    """
    frequencies = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (grid, width / 2)
    columns = waves[None].expand(grid, grid, -1)
    rows = waves[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, width).float()


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(B, L, D) tokens scaled and shifted by (B, D) of their sample."""
    return x * (1 + scale[:, None]) + shift[:, None]


class QueryValueAdapter(nn.Module):
    """Low-rank change of the projected queries and values.

        q <- q + s q (QA QB),  v <- v + s v (VA VB)

    QB and VB start at zero. Unlike LoRA's, its input is the projected q itself, not what is projected.

    Args:
        width: Channels of q and of v, all heads together.
        rank: Of the change.
        std: Of QA and VA, which start as normal; published: 1.
    """

    def __init__(self, width: int, rank: int, std: float = 1.0) -> None:
        super().__init__()
        self.lora_QA = nn.Parameter(std * torch.randn(width, rank))
        self.lora_QB = nn.Parameter(torch.zeros(rank, width))
        self.lora_VA = nn.Parameter(std * torch.randn(width, rank))
        self.lora_VB = nn.Parameter(torch.zeros(rank, width))

    def forward(self, q: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(B, L, D) queries and values, changed."""
        return q + scale * (q @ self.lora_QA @ self.lora_QB), v + scale * (v @ self.lora_VA @ self.lora_VB)


class SiTAttention(nn.Module):
    """Self-attention whose queries, keys and values come from one matrix.

    Args:
        width: Channels of a token.
        heads: Of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, adapter_scale: float) -> Tensor:
        """(B, L, D) -> (B, L, D); without adapter, or at scale 0, nothing of it is computed."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        if adapter_scale != 0:
            q, v = self.lora(q, v, adapter_scale)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SiTMlp(nn.Module):
    """Two layers with a tanh-approximated GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by what the sample is told (adaLN-zero)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, NORM_EPS, elementwise_affine=False)
        self.attn = SiTAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, NORM_EPS, elementwise_affine=False)
        self.mlp = SiTMlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, told: Tensor, adapter_scale: float) -> Tensor:
        """(B, L, D) tokens and (B, D) of what the sample is told -> (B, L, D)."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation(told).chunk(6, dim=-1)
        x = x + gate[:, None] * self.attn(modulate(self.norm1(x), shift, scale), adapter_scale)
        return x + mlp_gate[:, None] * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))


class SiTFinalLayer(nn.Module):
    """From tokens to patches."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(told).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class SiTNetwork(nn.Module):
    """SiT: the velocity noise - x_0 of latents x_t = (1 - t) x_0 + t noise, given time and class.

    Args:
        config: Its shape.

    Raises:
        ValueError: if the parts of the shape do not fit each other.
    """

    _no_split_modules = ("SiTBlock",)

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        width, patch, channels = config.width, config.patch_size, config.in_channels
        if width % config.heads or width % 4 or config.sample_size % patch:
            raise ValueError(
                f"SiT: width {width} with {config.heads} heads, latents of {config.sample_size} in patches of {patch}; "
                "the width must be a multiple of the heads and of 4, the latents of the patch."
            )
        self.config = config
        self.gradient_checkpointing = False
        # As published the names are those of two embedding modules with one layer each.
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch, patch)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))}
        )
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, width)})
        self.register_buffer("pos_embed", position_table(width, config.sample_size // patch))  # never trained
        self.blocks = nn.ModuleList(SiTBlock(width, config.heads) for _ in range(config.depth))
        self.final_layer = SiTFinalLayer(width, patch * patch * channels)

    def add_adapter(self, rank: int, std: float = 1.0) -> None:
        """Put a trainable `QueryValueAdapter` into every attention.

        Raises:
            ValueError: for a rank below 1.
        """
        if rank < 1:
            raise ValueError(f"SiT: the rank of the adapter is {rank}; expected 1 or more.")
        device = self.pos_embed.device
        for block in self.blocks:
            block.attn.lora = QueryValueAdapter(self.config.width, rank, std).to(device)

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.blocks[0].attn, "lora")

    def enable_gradient_checkpointing(self, function: Callable[..., Any] | None = None) -> None:
        """Recompute every block in the backward pass. The adapter's scale is an argument, so recomputation keeps it.

        Args:
            function: Called as `function(block, *inputs)` instead of torch's checkpoint.
        """
        self.gradient_checkpointing = True
        self._checkpoint = function or partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, adapter_scale: float = 0.0) -> Tensor:
        """The velocity.

        Args:
            x: (B, C, h, w) noised latents.
            t: (B,) times, 0 clean to 1 noise.
            y: (B,) int64 labels; `num_classes` means "no class".
            adapter_scale: Of the adapters; 0 switches them off.

        Returns:
            (B, C, h, w).

        Raises:
            ValueError: for latents of another size than the positions are for, or a scale without adapters.
        """
        size, patch = self.config.sample_size, self.config.patch_size
        if x.shape[-2:] != (size, size):
            raise ValueError(f"SiT takes latents of {size} x {size}, not {x.shape[-2]} x {x.shape[-1]}.")
        if adapter_scale != 0 and not self.has_adapter:
            raise ValueError(f"SiT: the scale of the adapter is {adapter_scale}, but the network has none.")
        tokens = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        told = self.t_embedder["mlp"](time_sinusoid(t)) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._checkpoint(block, tokens, told, adapter_scale)
            else:
                tokens = block(tokens, told, adapter_scale)
        patches = self.final_layer(tokens, told).unflatten(1, (size // patch, size // patch))
        patches = patches.unflatten(-1, (patch, patch, self.config.in_channels))  # B, rows, columns, p, p, C
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(x.shape)
