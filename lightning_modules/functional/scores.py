"""Rewards from feature vectors, and the hinge by which a reward becomes a loss."""

import torch.nn.functional as F
from torch import Tensor


def cosine_score(image: Tensor, text: Tensor) -> Tensor:
    """(B, D) image and text features of any length -> (B,) cosine; a text of one row serves all images."""
    return (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(dim=-1)


def relative_score(image: Tensor, positive: Tensor, negative: Tensor, k: float) -> Tensor:
    """Semantic relative preference of SRPO, arXiv:2509.06942: what a wanted word adds to the score.

        score = <image, (1 + k) positive - negative>,  all three of unit length, their combination not again

    Args:
        image: (B, D) image features.
        positive: (B, D) features of the prompts with a wanted word in front.
        negative: (B, D) features of the prompts with an unwanted word in front.
        k: What is left of the plain score; 0.1 is DMDR's.

    Returns:
        (B,) scores, near k times the plain score.
    """
    direction = (1 + k) * F.normalize(positive, dim=-1) - F.normalize(negative, dim=-1)
    return (F.normalize(image, dim=-1) * direction).sum(dim=-1)


def reward_hinge(score: Tensor, enough: float = 0.7) -> Tensor:
    """(B,) scores -> (B,) losses relu(enough - score): nothing is gained beyond `enough`.

    Cosines of CLIP and HPS lie far below the published 0.7, so that the gradient is that of -score.
    """
    return F.relu(enough - score)
