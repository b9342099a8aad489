"""The contract of every scorer: images and prompts in, one number per image out."""

from abc import abstractmethod

from torch import Tensor, nn


class Reward(nn.Module):
    """Scores images against the prompts they were made for; higher is better.

    Attributes:
        differentiable: Whether gradients flow from the scores to the images.
    """

    differentiable: bool = False

    @abstractmethod
    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Score every image.

        Args:
            images: (B, 3, H, W) in [0, 1].
            prompts: B prompts, one per image.

        Returns:
            (B,) float32 scores on the device of the images.
        """
