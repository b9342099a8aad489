"""A reward as a torchmetrics metric: averaged over batches and ranks."""

from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_modules.rewards.base import Reward


class RewardMetric(Metric):
    """Mean score of images, or their win rate against a baseline's scores.

        metric.update(images, prompts, baseline)
        self.log("val/pick_score", metric)

    Args:
        reward: What scores the images. It is not a part of the metric: it is neither saved nor moved with it.
        statistic: "mean", or "win_rate": the share of images that beat the baseline's, a tie counting one half.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    total: Tensor
    count: Tensor

    def __init__(self, reward: Reward, statistic: Literal["mean", "win_rate"] = "mean") -> None:
        super().__init__()
        if statistic not in ("mean", "win_rate"):
            raise ValueError(f"RewardMetric: statistic is {statistic!r}; expected mean or win_rate.")
        self._reward = (reward,)  # in a tuple, so that its weights stay out of every state dict
        self.statistic = statistic
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, prompts: list[str], baseline: Tensor | None = None) -> None:
        """Score a batch.

        Args:
            images: (B, 3, H, W) in [0, 1].
            prompts: B prompts.
            baseline: (B,) scores of the baseline's images for these prompts; needed for the win rate.

        Raises:
            ValueError: if a score is not a number, or the baseline is missing or of another length.
        """
        with torch.no_grad():
            scores = self._reward[0](images, prompts).to(self.total)
        check_scores("the images", scores, len(images))
        if self.statistic == "win_rate":
            if baseline is None:
                raise ValueError("RewardMetric: the win rate needs the baseline's scores, update(..., baseline).")
            check_scores("the baseline", baseline, len(images))
            scores = 0.5 + 0.5 * (scores - baseline.to(scores)).sign()
        self.total += scores.sum()
        self.count += len(scores)

    def compute(self) -> Tensor:
        """() float32; NaN before the first image."""
        return (self.total / self.count).float()


def check_scores(whose: str, scores: Tensor, number: int) -> None:
    """Refuse scores that would spoil a mean.

    Raises:
        ValueError: naming the first that is not finite.
    """
    if scores.shape != (number,):
        raise ValueError(f"RewardMetric: the scores of {whose} have shape {tuple(scores.shape)}; expected ({number},).")
    if not scores.isfinite().all():
        first = int((~scores.isfinite()).nonzero()[0])
        raise ValueError(f"RewardMetric: score {first} of {whose} is {scores[first].item()}; expected a finite number.")
