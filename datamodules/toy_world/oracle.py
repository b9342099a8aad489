"""The pixel oracle: reads from a picture whether it shows what its caption says, and how vivid it is.

Letters: `B` pictures, `S` side in pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.toy_world.render import coverage, pixel_grid, shape_distances
from datamodules.toy_world.scenes import COLORS, LAYOUTS, SHAPES, parse

MIN_CHROMA = 0.16  # the background is grey; a pixel with more chroma than this belongs to an item
MIN_AREA = 0.012  # of the picture; less of a colour than this is a speck


@dataclass(frozen=True)
class OracleScores:
    """What the oracle saw, one number per picture, each (B,) float32 in [0, 1]."""

    match: Tensor  # how well the picture shows the caption: the four parts below together
    strict: Tensor  # 1 where every part is right, else 0
    vividness: Tensor  # saturation and brightness of what is coloured; captions never mention it
    shape: Tensor
    color: Tensor
    layout: Tensor
    purity: Tensor  # share of what is coloured that the caption asked for

    @property
    def both(self) -> Tensor:
        """Match and vividness in one number; vividness alone can at most double it, so that match comes first."""
        return self.match * (0.5 + 0.5 * self.vividness)


def judge(images: Tensor, captions: list[str]) -> OracleScores:
    """Judge pictures against captions.

    Nearly everything is read from masks, which are piecewise constant, so that only `vividness`, and `both` through it,
    have a gradient in the pixels; it is that of the mean chroma of the coloured pixels.

    Args:
        images: (B, 3, S, S) in [0, 1].
        captions: B captions of the toy world.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"toy world: the oracle judges square pictures (B, 3, S, S), got {tuple(images.shape)}.")
    if len(images) != len(captions):
        raise ValueError(f"toy world: {len(images)} pictures but {len(captions)} captions; expected one each.")
    scenes = [parse(caption) for caption in captions]
    images = images.float().clamp(0, 1)
    B, device = len(images), images.device
    chroma, hue = _chroma_and_hue(images)
    colored = chroma > MIN_CHROMA
    double = torch.tensor([len(s.items) == 2 for s in scenes], device=device)
    column = torch.tensor([s.layout == LAYOUTS[1] for s in scenes], device=device)

    # Each item is looked for by its colour, and its shape read from the mask of that colour.
    found, x, y, area, color, shape, top = [], [], [], [], [], [], []
    for which in range(2):
        items = [s.items[min(which, len(s.items) - 1)] for s in scenes]
        wanted_hue = torch.tensor([COLORS.index(item.color) for item in items], device=device)
        wanted_shape = torch.tensor([SHAPES.index(item.shape) for item in items], device=device)
        mask = _without_specks(colored & (hue == wanted_hue[:, None, None]))
        overlap = _overlap_with_shapes(mask)
        wanted_overlap = overlap[torch.arange(B, device=device), wanted_shape]
        area.append(mask.mean((1, 2)))
        found.append(area[-1] > MIN_AREA)
        for centres, axis in zip((x, y), pixel_grid(images.shape[-1], device), strict=True):
            centres.append((mask * axis).sum((1, 2)) / mask.sum((1, 2)).clamp(min=1))
        top.append((overlap.argmax(1) == wanted_shape) & found[-1])
        color.append((area[-1] / (4 * MIN_AREA)).clamp(0, 1))
        shape.append(((wanted_overlap - 0.4) / 0.4).clamp(0, 1) * torch.where(top[-1], 1.0, 0.4) * found[-1])

    # Two items: far apart along the named axis, and further than across it.
    dx, dy = (x[1] - x[0]).abs(), (y[1] - y[0]).abs()
    along, across = torch.where(column, dy, dx), torch.where(column, dx, dy)
    layout = (along / 0.5).clamp(0, 1) * torch.where(along > across, 1.0, 0.5) * (along > 0.5 * across)
    layout = torch.where(double, layout * found[0] * found[1], 1.0)

    asked_for = area[0] + area[1] * double
    colored_share = colored.float().mean((1, 2))
    purity = ((asked_for / colored_share.clamp(min=1e-6) - 0.4) / 0.5).clamp(0, 1)

    parts = color[0] + shape[0]
    parts = torch.where(double, (parts + color[1] + shape[1] + layout) / 5, parts / 2)
    right = [(c > 0.5) & t for c, t in zip(color, top, strict=True)]
    strict = right[0] & (right[1] | ~double) & (layout > 0.6) & (purity > 0.5)

    mean_chroma = (chroma * colored).sum((1, 2)) / colored.sum((1, 2)).clamp(min=1)
    vividness = ((mean_chroma - 0.2) / 0.75).clamp(0, 1) * (colored_share > 2 * MIN_AREA)
    return OracleScores(
        match=parts * (0.3 + 0.7 * purity),
        strict=strict.float(),
        vividness=vividness,
        shape=torch.where(double, (shape[0] + shape[1]) / 2, shape[0]),
        color=torch.where(double, (color[0] + color[1]) / 2, color[0]),
        layout=layout,
        purity=purity,
    )


def _chroma_and_hue(images: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S, S) chroma in [0, 1], with gradient, and the hue rounded to an index of `COLORS`."""
    value, largest = images.max(1)
    chroma = value - images.min(1).values
    red, green, blue = images.detach().unbind(1)
    divisor = chroma.detach().clamp(min=1e-6)
    hue = torch.where(
        largest == 0,
        (green - blue) / divisor,
        torch.where(largest == 1, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    return chroma, hue.round().long() % len(COLORS)


def _without_specks(mask: Tensor) -> Tensor:
    """The mask as 0 and 1, without pixels that have fewer than two neighbours of eight in it."""
    mask = mask.float()
    neighbours = F.avg_pool2d(mask[:, None], 3, stride=1, padding=1)[:, 0] * 9 - mask
    return mask * (neighbours > 1.5)


def _overlap_with_shapes(mask: Tensor) -> Tensor:
    """(B, shapes) intersection over union of a mask and each shape drawn to the mask's bounding box."""
    x0, x1 = _extent(mask.amax(1))
    y0, y1 = _extent(mask.amax(2))
    half_x, half_y = (x1 - x0) / 2, (y1 - y0) / 2
    radius = torch.maximum(half_x, half_y)[:, None].repeat(1, len(SHAPES))
    radius[:, SHAPES.index("square")] /= 0.88
    radius[:, SHAPES.index("triangle")] = half_y * 2 / 1.85  # a triangle reaches from -r to 0.85 r
    cx = ((x0 + x1) / 2)[:, None]
    cy = ((y0 + y1) / 2)[:, None].repeat(1, len(SHAPES))
    sunk = torch.zeros_like(radius)
    sunk[:, SHAPES.index("triangle")] = 0.075

    best = torch.zeros_like(radius)
    # A box is known to a pixel only, so slightly smaller and larger shapes are tried too.
    for scale in (0.92, 1.0, 1.08):
        r = radius * scale
        inside = (coverage(shape_distances(cx, cy + sunk * r, r, mask.shape[-1])) > 0.5).float()
        intersection = (inside * mask[:, None]).sum((2, 3))
        union = torch.maximum(inside, mask[:, None]).sum((2, 3)).clamp(min=1)
        best = torch.maximum(best, intersection / union)
    return best


def _extent(profile: Tensor) -> tuple[Tensor, Tensor]:
    """Where a (B, S) profile of 0 and 1 begins and ends, in coordinates; the whole picture if it is empty."""
    size = profile.shape[-1]
    first = profile.argmax(1)
    last = size - 1 - profile.flip(1).argmax(1)
    return first / size * 2 - 1, (last + 1) / size * 2 - 1
