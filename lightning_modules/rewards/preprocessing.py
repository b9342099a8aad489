"""From images in [0, 1] to what an image tower takes: the authors' way, and one that gradients pass."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Preprocessing:
    """Resize to S x S pixels (bicubic, antialiased), then (x - mean) / std.

    Attributes:
        size: S.
        fit: "crop", the shorter edge becomes S and the middle is cut out; "pad", the longer edge becomes S and zeros
            (black, before the normalisation) fill the square; "squash", both edges become S.
        eight_bit: Round to 8 bits first, as an image file holds it. Gradients end there.
        pil: Resize with Pillow, in 8 bits again; otherwise the float tensor is resized.
        crop_rounding: Where the cut begins when an odd number of pixels goes: "floor" in transformers, "even" (the
            nearest integer, a half to the even one) in torchvision.
        mean: Of each colour.
        std: Of each colour.
    """

    size: int = 224
    fit: Literal["crop", "pad", "squash"] = "crop"
    eight_bit: bool = True
    pil: bool = True
    crop_rounding: Literal["floor", "even"] = "floor"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def differentiable(self) -> "Preprocessing":
        """The same geometry on float tensors, so that gradients reach the images."""
        return replace(self, eight_bit=False, pil=False)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, 3, S, S) float32, normalised, on the same device."""
        images = images.float()
        if self.eight_bit:
            images = (images.detach() * 255).round() / 255
        height, width = self.resized(*images.shape[-2:])
        images = self.fill(resize_with_pil(images, height, width) if self.pil else resize(images, height, width))
        return (images - images.new_tensor(self.mean)[:, None, None]) / images.new_tensor(self.std)[:, None, None]

    def resized(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after the resize, before anything is cut or filled."""
        if self.fit == "squash":
            return self.size, self.size
        short, long = min(height, width), max(height, width)
        if self.fit == "crop":
            new_short, new_long = self.size, int(self.size * long / short)
        else:
            new_short, new_long = max(1, round(short * (self.size / long))), self.size
        return (new_short, new_long) if height <= width else (new_long, new_short)

    def fill(self, images: Tensor) -> Tensor:
        """Cut or fill to S x S."""
        height, width = images.shape[-2:]
        if self.fit == "pad":
            top, left = (self.size - height) // 2, (self.size - width) // 2
            return F.pad(images, (left, self.size - width - left, top, self.size - height - top))
        spare = [height - self.size, width - self.size]
        top, left = [n // 2 if self.crop_rounding == "floor" else round(n / 2) for n in spare]
        return images[..., top : top + self.size, left : left + self.size]


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic and antialiased whatever the version of torchvision, whose default changed in 0.17."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True)


def resize_with_pil(images: Tensor, height: int, width: int) -> Tensor:
    """The same by Pillow, image by image on the CPU, on and to 8 bits."""
    import numpy as np
    from PIL import Image

    if images.shape[-2:] == (height, width):
        return images
    arrays = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    resized = [Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC) for array in arrays]
    return torch.from_numpy(np.stack(resized)).to(images.device).permute(0, 3, 1, 2).float() / 255


def from_hf_processor(processor: Any) -> Preprocessing:
    """The preprocessing that a `CLIPImageProcessor` of transformers describes.

    Raises:
        ValueError: if it describes another one than resizing bicubically to a square.
    """
    size, crop = dict(processor.size), dict(processor.crop_size)
    edge = size.get("shortest_edge") or size.get("height")
    squash = size.get("shortest_edge") is None
    square = squash and size.get("height") == size.get("width") or not squash
    if not square or (crop.get("height"), crop.get("width")) != (edge, edge) or int(processor.resample) != 3:
        raise ValueError(
            f"preprocessor_config.json: size {size}, crop_size {crop}, resample {processor.resample}; expected a "
            "bicubic (3) resize to a square of the size of the crop, as CLIP's are."
        )
    return Preprocessing(
        edge, "squash" if squash else "crop", mean=tuple(processor.image_mean), std=tuple(processor.image_std)
    )
