"""Images in rows under headings, with the prompt of each row in words that can be read."""

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

SMALLEST_CELL = 160  # pixels; smaller images are enlarged by whole factors, so that a caption fits under them
LARGEST_CELL = 512  # pixels; larger images are shrunk
MARGIN = 8
TEXT_SIZE = 14
LINE_HEIGHT = 18
MOST_LINES = 4


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [0, 1] -> an 8-bit RGB image."""
    pixels = (image.detach().float().clamp(0.0, 1.0) * 255.0).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break a text into at most `MOST_LINES` lines of `width` pixels; what does not fit ends in three dots."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".lstrip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:  # a word that is wider than the line is broken anywhere
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) > MOST_LINES:
        last = lines[MOST_LINES - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: MOST_LINES - 1], last + "..."]
    return lines


def draw_grid(columns: dict[str, Tensor], captions: list[str]) -> Image.Image:
    """Draw one row of images per caption and one column per heading; the caption stands under its row.

    Args:
        columns: Heading -> (R, 3, H, W) images in [0, 1]; every column has the same shape.
        captions: R captions.
    """
    height, width = next(iter(columns.values())).shape[-2:]
    factor = max(1, -(-SMALLEST_CELL // max(height, width)))
    shrink = min(1.0, LARGEST_CELL / max(height, width))
    cell_width, cell_height = round(width * factor * shrink), round(height * factor * shrink)
    resample = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS

    font = ImageFont.load_default(size=TEXT_SIZE)
    total_width = MARGIN + len(columns) * (cell_width + MARGIN)
    lines = [wrap(caption, total_width - 2 * MARGIN, font) for caption in captions]
    total_height = LINE_HEIGHT + MARGIN + sum(cell_height + len(row) * LINE_HEIGHT + 2 * MARGIN for row in lines)
    grid = Image.new("RGB", (total_width, total_height), "white")
    draw = ImageDraw.Draw(grid)
    for column, heading in enumerate(columns):
        draw.text((MARGIN + column * (cell_width + MARGIN), MARGIN // 2), heading, fill="black", font=font)
    top = LINE_HEIGHT + MARGIN
    for row, caption in enumerate(lines):
        for column, images in enumerate(columns.values()):
            cell = to_pil(images[row]).resize((cell_width, cell_height), resample)
            grid.paste(cell, (MARGIN + column * (cell_width + MARGIN), top))
        draw.text((MARGIN, top + cell_height + MARGIN // 2), "\n".join(caption), fill="black", font=font, spacing=3)
        top += cell_height + len(caption) * LINE_HEIGHT + 2 * MARGIN
    return grid
