"""The toy world's pixel oracle as a reward."""

from typing import Literal

from torch import Tensor

from datamodules.toy_world.oracle import judge
from lightning_modules.rewards.base import Reward


class ToyOracle(Reward):
    """Reads from the pixels what the toy world's preferences are about. Understands captions of the toy world only.

    Args:
        part: "match", how well a picture shows its caption; "strict", 1 where everything is right, else 0; "vividness",
            the saturation and brightness of the coloured shapes, which captions never mention; "both",
            match * (0.5 + 0.5 * vividness). All lie in [0, 1].

    Gradients flow through vividness, so that "vividness" and "both" are differentiable: every pixel that is coloured is
    pulled toward more colour. The score is the oracle's own (rank correlation 1), and a picture that it scores 0 has no
    gradient: of 64 held-out captions none as drawn or as the toy pipeline samples them in 20 steps, 31 % as it samples
    them in 2 steps, undistilled and without guidance.
    """

    def __init__(self, part: Literal["match", "strict", "vividness", "both"] = "match") -> None:
        super().__init__()
        if part not in ("match", "strict", "vividness", "both"):
            raise ValueError(f"ToyOracle: part is {part!r}; expected match, strict, vividness or both.")
        self.part = part
        self.differentiable = part in ("vividness", "both")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return getattr(judge(images, prompts), self.part)
