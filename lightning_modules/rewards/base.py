"""The contract of every scorer: images and prompts in, one number per image out."""

import hashlib
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

# Settings that change no score, or follow from those that do.
WITHOUT_EFFECT = ("training", "differentiable", "chunk_size", "batch_size", "timeout", "retries", "pause")


class Reward(nn.Module):
    """Scores images against the prompts they were made for; higher is better.

    Construction is cheap and checks the settings; `load` reads the weights, once, at the latest when the first images
    come. A new reward writes `score`.

    Attributes:
        differentiable: Whether gradients flow from the scores to the images.
        takes_timestep: Whether `forward` takes, as its third argument, the (B,) timestep that each image was estimated
            at; such images may overshoot [0, 1] as a decoder leaves them.
    """

    differentiable: bool = False
    takes_timestep: bool = False

    def load(self, device: torch.device | None = None) -> None:
        """Read the weights if that has not been done; a reward without weights has nothing to do.

        Args:
            device: Where weights that are read now are put; the CPU if not given.
        """

    def describe(self) -> dict[str, Any]:
        """What the scores depend on: class, settings, and a hash of the weights, which must have been loaded."""
        settings = {
            name: str(value)
            for name, value in vars(self).items()
            if not name.startswith("_") and name not in WITHOUT_EFFECT
        }
        parts = {name: part.describe() for name, part in self.named_modules() if name and isinstance(part, Reward)}
        digest = hashlib.blake2b(digest_size=16)
        weights = self.state_dict()
        for name, tensor in sorted(weights.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
        about = {"class": f"{type(self).__module__}.{type(self).__qualname__}", "settings": settings}
        return about | ({"parts": parts} if parts else {}) | ({"weights": digest.hexdigest()} if weights else {})

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score every image.

        Args:
            images: (B, 3, H, W) in [0, 1], on any device.
            prompts: B prompts, one per image.

        Returns:
            (B,) float32 scores on the device of the images.

        Raises:
            ValueError: if the images are of another shape or range or hold NaN, or not every one has its prompt.
        """
        check_inputs(type(self).__name__, images, prompts)
        self.load(images.device)
        return self.score(images, prompts).float().to(images.device)

    @abstractmethod
    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores of images and prompts that have been checked."""


def score_each(reward: Reward, images: list[Tensor], prompts: list[str]) -> Tensor:
    """Score images of any sizes, as they are stored; those of one size together.

    Args:
        reward: The scorer.
        images: N images, each (3, H, W) uint8.
        prompts: N prompts.

    Returns:
        (N,) float32 scores on the device of the images.

    Raises:
        ValueError: if the scorer does not give one score for each image.
    """
    scores = torch.empty(len(images), device=images[0].device)
    for size in dict.fromkeys(image.shape for image in images):
        which = [number for number, image in enumerate(images) if image.shape == size]
        pixels = torch.stack([images[number] for number in which]).float() / 255
        answer = reward(pixels, [prompts[number] for number in which])
        if answer.shape != (len(which),):
            raise ValueError(
                f"{type(reward).__name__}: the scores of {len(which)} images have shape {tuple(answer.shape)}; "
                "expected one number for each image."
            )
        scores[which] = answer
    return scores


def check_inputs(name: str, images: Tensor, prompts: list[str]) -> None:
    """Refuse what a scorer would score without complaint, and wrongly.

    Raises:
        ValueError: naming the reward, what is wrong, and the image and prompt that it is wrong with.
    """
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        found = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name}: the images are of {found}; expected a tensor of shape (B, 3, H, W).")
    if not images.is_floating_point():
        raise ValueError(
            f"{name}: the images are {images.dtype}; expected floating point in [0, 1], such as `images / 255`."
        )
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise ValueError(f"{name}: prompts is {prompts!r:.80}; expected a list of strings, one per image.")
    if len(prompts) != len(images) or not len(images):
        raise ValueError(
            f"{name}: {len(images)} images and {len(prompts)} prompts; expected one prompt per image, and at least one."
        )
    low, high = torch.stack(torch.aminmax(images.detach())).tolist()  # NaN if any is; one wait for the device
    if not (low >= 0 and high <= 1):
        lows, highs = images.detach().amin(dim=(1, 2, 3)), images.detach().amax(dim=(1, 2, 3))
        i = int((~((lows >= 0) & (highs <= 1))).nonzero()[0])
        raise ValueError(
            f"{name}: image {i} (prompt {prompts[i][:60]!r}) has values from {lows[i]:.4g} to {highs[i]:.4g}; expected "
            "[0, 1]. Images in [-1, 1] become so by `(images + 1) / 2`; NaN comes from a model that has diverged."
        )
