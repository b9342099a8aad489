"""Pictures of scenes, drawn from signed distance functions.

What a caption does not mention varies freely: size, place along the free axis, order, the grey background, and
*vividness*, the saturation and brightness of the items: the hidden style axis that preferences can be about.

Coordinates run from -1 to 1 over the picture, y downwards. Letters: `B` pictures, `S` side in pixels.
"""

import math

import torch
from torch import Tensor

from datamodules.toy_world.scenes import COLORS, LAYOUTS, SHAPES, Scene


def render(scenes: list[Scene], generator: torch.Generator, size: int = 32, vividness: Tensor | None = None) -> Tensor:
    """Draw one picture per scene.

    Args:
        scenes: B scenes.
        generator: Source of everything that the captions leave open.
        size: Side of the pictures in pixels.
        vividness: (B,) in [0, 1]; None draws it evenly.

    Returns:
        (B, 3, size, size) float32 in [0, 1].
    """
    B = len(scenes)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(B, generator=generator)

    double = torch.tensor([len(s.items) == 2 for s in scenes])
    column = torch.tensor([s.layout == LAYOUTS[1] for s in scenes])

    # One item lies anywhere that it fits; two lie on either side of the middle, in either order.
    radius = torch.where(double, uniform(0.30, 0.42), uniform(0.35, 0.65))
    other_radius = uniform(0.30, 0.42)
    anywhere_x, anywhere_y = uniform(-1, 1) * (0.9 - radius), uniform(-1, 1) * (0.9 - radius)
    along = uniform(0.46, 0.54) * torch.where(uniform(0, 1) < 0.5, 1.0, -1.0)
    across, other_across = uniform(-0.45, 0.45), uniform(-0.45, 0.45)
    x = torch.where(double, torch.where(column, across, along), anywhere_x)
    y = torch.where(double, torch.where(column, along, across), anywhere_y)
    other_x = torch.where(column, other_across, -along)
    other_y = torch.where(column, -along, other_across)

    drawn_vividness = uniform(0, 1)
    vividness = drawn_vividness if vividness is None else vividness
    saturation, value = 0.40 + 0.60 * vividness, 0.60 + 0.40 * vividness

    images = _grey_ramp(uniform(0.12, 0.88), uniform(0.0, 0.12), uniform(0.0, 2 * math.pi), size)
    for which, (cx, cy, r) in enumerate([(x, y, radius), (other_x, other_y, other_radius)]):
        items = [s.items[min(which, len(s.items) - 1)] for s in scenes]
        hue = torch.tensor([COLORS.index(item.color) for item in items])
        shape = torch.tensor([SHAPES.index(item.shape) for item in items])
        distance = shape_distances(cx[:, None], cy[:, None], r[:, None], size)[torch.arange(B), shape]
        opacity = coverage(distance)[:, None]  # (B, 1, S, S)
        if which == 1:
            opacity = opacity * double[:, None, None, None]
        rgb = _hsv_to_rgb(hue, saturation, value)[:, :, None, None]
        images = images * (1 - opacity) + rgb * opacity
    return images


def pixel_grid(size: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """x and y of the pixel centres, each (S, S)."""
    centres = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    return x, y


def shape_distances(cx: Tensor, cy: Tensor, radius: Tensor, size: int) -> Tensor:
    """Signed distance, negative inside, from every pixel to every shape.

    Args:
        cx: (B, shapes) or (B, 1) centres, shapes in the order of `SHAPES`.
        cy: (B, shapes) or (B, 1) centres.
        radius: (B, shapes) or (B, 1) half-extents.
        size: Side of the pictures in pixels.

    Returns:
        (B, shapes, S, S).
    """
    B, K = len(cx), len(SHAPES)
    grid_x, grid_y = pixel_grid(size, cx.device)
    x = grid_x - cx.expand(B, K)[:, :, None, None]
    y = grid_y - cy.expand(B, K)[:, :, None, None]
    r = radius.expand(B, K)[:, :, None, None]
    from_centre = (x * x + y * y).sqrt()

    circle = from_centre[:, 0] - r[:, 0]
    square = torch.maximum(x[:, 1].abs(), y[:, 1].abs()) - 0.88 * r[:, 1]
    # Apex up at -r, base at 0.85 r; (0.894, 0.447) is the unit normal of the flank, whose slope is 2.
    triangle = torch.maximum(y[:, 2] - 0.85 * r[:, 2], 0.894 * x[:, 2].abs() - 0.447 * (y[:, 2] + r[:, 2]))
    arm = 0.34 * r[:, 3]  # half the width of a bar
    cross = torch.minimum(
        torch.maximum(x[:, 3].abs() - r[:, 3], y[:, 3].abs() - arm),
        torch.maximum(y[:, 3].abs() - r[:, 3], x[:, 3].abs() - arm),
    )
    ring = (from_centre[:, 4] - 0.75 * r[:, 4]).abs() - 0.25 * r[:, 4]
    return torch.stack([circle, square, triangle, cross, ring], dim=1)


def coverage(distance: Tensor) -> Tensor:
    """How much of each pixel lies inside a shape, in [0, 1]: anti-aliasing one pixel wide."""
    return (0.5 - distance * distance.shape[-1] / 2).clamp(0, 1)


def _grey_ramp(level: Tensor, slope: Tensor, angle: Tensor, size: int) -> Tensor:
    x, y = pixel_grid(size)
    across = x * angle.cos()[:, None, None] + y * angle.sin()[:, None, None]
    grey = (level[:, None, None] + slope[:, None, None] * across).clamp(0, 1)
    return grey[:, None].expand(-1, 3, -1, -1)


def _hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """(B, 3) red, green, blue; the hue counts sixths of the circle."""
    k = (torch.tensor([5, 3, 1]) + hue[:, None]) % 6
    weight = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * weight)
