"""Several rewards as one."""

import math

import torch
from torch import Tensor, nn

from lightning_modules.rewards.base import Reward


class WeightedSum(Reward):
    """Sum of weight times score. Gradients flow if they do in every part.

    Scores of different rewards differ in scale: a cosine varies by hundredths, ImageReward by ones.

    Args:
        rewards: Name -> reward.
        weights: Name -> weight, for the same names; a negative one asks for less.
    """

    def __init__(self, rewards: dict[str, Reward], weights: dict[str, float]) -> None:
        super().__init__()
        if not rewards or set(rewards) != set(weights):
            raise ValueError(
                f"WeightedSum: rewards are {', '.join(rewards) or 'none'} and weights {', '.join(weights) or 'none'}; "
                "expected one weight for each reward, by the same names."
            )
        if bad := {name: weight for name, weight in weights.items() if not math.isfinite(weight)}:
            raise ValueError(f"WeightedSum: the weights {bad} are not finite numbers.")
        self.rewards = nn.ModuleDict(rewards)
        self.weights = dict(weights)
        self.differentiable = all(reward.differentiable for reward in rewards.values())

    def load(self, device: torch.device | None = None) -> None:
        for reward in self.rewards.values():
            reward.load(device)

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return sum(self.weights[name] * reward(images, prompts) for name, reward in self.rewards.items())
