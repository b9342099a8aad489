"""Grids: pixels that are the images' pixels, and captions that fit."""

import torch
from PIL import ImageFont

from callbacks.grids import LARGEST_CELL, MOST_LINES, TEXT_SIZE, draw_grid, to_pil, wrap


def test_pixels_are_rounded_and_clipped():
    image = torch.tensor([0.0, 0.5, 1.0, -3.0, 7.0, 0.25]).reshape(1, 1, 6).expand(3, 1, 6)
    assert [to_pil(image).getpixel((x, 0)) for x in range(6)] == [(v, v, v) for v in (0, 128, 255, 0, 255, 64)]


def test_a_caption_is_broken_between_words():
    font = ImageFont.load_default(size=TEXT_SIZE)
    lines = wrap("a red  circle\nabove a blue square", 100, font)
    assert " ".join(lines) == "a red circle above a blue square"
    assert len(lines) > 1
    assert all(font.getlength(line) <= 100 for line in lines)


def test_a_word_wider_than_the_line_is_broken_and_a_long_caption_ends_in_dots():
    font = ImageFont.load_default(size=TEXT_SIZE)
    lines = wrap("W" * 1000, 100, font)
    assert len(lines) == MOST_LINES
    assert lines[-1].endswith("W...")
    assert all(font.getlength(line) <= 100 for line in lines)


def test_small_images_are_enlarged_by_a_whole_factor_beside_each_other():
    red, blue = torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16)
    red[:, 0], blue[:, 2] = 1.0, 1.0
    grid = draw_grid({"base": red, "step 7": blue}, ["one", "two"])
    colours = {colour: count for count, colour in grid.getcolors(1 << 20)}
    assert colours[(255, 0, 0)] == colours[(0, 0, 255)] == 2 * 160 * 160
    assert grid.getpixel((10, 40)) == (255, 0, 0)
    assert grid.getpixel((10 + 160 + 8, 40)) == (0, 0, 255)


def test_the_caption_is_drawn_under_its_row_whatever_its_letters():
    images = torch.ones(1, 3, 160, 160)
    for caption, colours in (("", 1), ("日本語 é |`*\u202e", 2)):
        grid = draw_grid({"base": images}, [caption])
        under = grid.crop((0, 26 + 160, grid.width, grid.height))
        assert min(len(under.getcolors(1 << 20)), 2) == colours


def test_large_images_are_shrunk():
    grid = draw_grid({"base": torch.rand(1, 3, 1024, 768, generator=torch.Generator().manual_seed(0))}, ["x"])
    assert grid.width == 384 + 16
    assert LARGEST_CELL < grid.height < LARGEST_CELL + 100
