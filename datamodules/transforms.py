"""From stored images to training tensors: decode, resize, crop, flip, scale to [-1, 1]."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # Pillow knows many more, some of which run other programs


class View(NamedTuple):
    """What the model is shown of one image."""

    pixels: Tensor  # (3, R, R) float32 in [-1, 1]; from a cache, moments (2C, h, w) instead
    original_size: tuple[int, int]  # height and width as stored
    crop: tuple[int, int]  # top and left of the crop in the resized (and, if flipped, mirrored) image


def decode_image(stored: bytes | Path, resolution: int) -> Image.Image:
    """Decode one stored image to RGB.

    Args:
        stored: Encoded bytes, or the file.
        resolution: Edge that the image is going to be resized to, which bounds how long it may be.

    Raises:
        ValueError: if there is no image, or one of damaging size.
    """
    try:
        with Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            # What resizing the shorter edge will make of it: a strip of one pixel would fill any memory.
            pixels = width * height * max(1.0, resolution / min(width, height)) ** 2
            rgb = image.convert("RGB") if pixels <= Image.MAX_IMAGE_PIXELS else None
    except UnidentifiedImageError as error:
        raise ValueError(f"is not an image of a known format ({', '.join(IMAGE_FORMATS)})") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow raises on damaged data
        raise ValueError(f"is a damaged image ({error})") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"is too large an image ({error})") from error
    if rgb is None:
        raise ValueError(
            f"is too large or too long an image ({width} x {height}; limit {Image.MAX_IMAGE_PIXELS} pixels after its "
            f"shorter edge is resized to {resolution})"
        )
    return rgb


def crop_offsets(
    height: int, width: int, resolution: int, random_crop: bool, generator: np.random.Generator
) -> tuple[int, int]:
    """Top and left of a square crop, in the centre or uniform over all that fit."""
    if random_crop:
        return (
            int(generator.integers(height - resolution, endpoint=True)),
            int(generator.integers(width - resolution, endpoint=True)),
        )
    return round((height - resolution) / 2), round((width - resolution) / 2)


def view_image(
    image: Image.Image,
    resolution: int,
    random_crop: bool,
    horizontal_flip: bool,
    generator: np.random.Generator,
    bicubic: bool = False,
) -> View:
    """One RGB image by itself, as the published full script and the LoRA SD example treat it.

    PIL bilinear resize (antialiased) of the shorter edge to R, crop R x R, flip with probability 0.5, [0, 1],
    (x - 0.5) / 0.5.

    Args:
        image: As decoded, RGB.
        resolution: R.
        random_crop: Crop anywhere instead of in the centre.
        horizontal_flip: Mirror half of the images.
        generator: Decides crop and flip.
        bicubic: Resize bicubically, and round the place of a centre crop down, as CLIP's image processor does.
    """
    from torchvision.transforms import functional as F

    original_size = (image.height, image.width)
    image = F.resize(image, resolution, F.InterpolationMode.BICUBIC if bicubic else F.InterpolationMode.BILINEAR)
    top, left = crop_offsets(image.height, image.width, resolution, random_crop, generator)
    if bicubic and not random_crop:
        top, left = (image.height - resolution) // 2, (image.width - resolution) // 2
    view = F.crop(image, top, left, resolution, resolution)
    if horizontal_flip and generator.random() < 0.5:
        view, left = F.hflip(view), image.width - resolution - left
    return View(F.to_tensor(view).sub_(0.5).div_(0.5), original_size, (top, left))


def view_pair_jointly(
    image_0: Image.Image,
    image_1: Image.Image,
    resolution: int,
    random_crop: bool,
    horizontal_flip: bool,
    generator: np.random.Generator,
) -> tuple[View, View]:
    """Both RGB images of a pair in the same crop and flip, as the published LoRA SDXL example treats them.

    PIL bicubic resize of image 1 to the size of image 0, [0, 1], tensor resize (bilinear, antialiased) of the shorter
    edge to R, flip of both with probability 0.5, crop R x R, (x - 0.5) / 0.5. Both report the size of image 0. The
    crop is made, and reported, after the flip.

    Args:
        image_0: First stored image, RGB.
        image_1: Second stored image, RGB.
        resolution: R.
        random_crop: Crop anywhere instead of in the centre.
        horizontal_flip: Mirror half of the pairs.
        generator: Decides crop and flip.
    """
    from torchvision.transforms import functional as F

    original_size = (image_0.height, image_0.width)
    image_1 = image_1.resize(image_0.size, Image.Resampling.BICUBIC)
    pixels = torch.cat([F.to_tensor(image_0), F.to_tensor(image_1)])
    pixels = F.resize(pixels, resolution, F.InterpolationMode.BILINEAR, antialias=True)
    if horizontal_flip and generator.random() < 0.5:
        pixels = pixels.flip(-1)
    crop = crop_offsets(pixels.shape[1], pixels.shape[2], resolution, random_crop, generator)
    pixels = F.crop(pixels, *crop, resolution, resolution).sub_(0.5).div_(0.5)
    return View(pixels[:3], original_size, crop), View(pixels[3:], original_size, crop)
