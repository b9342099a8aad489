"""Prompt dropout, which keeps the unconditional half of classifier-free guidance trained."""

from torch import Tensor


def drop_prompts(prompts: list[str], draws: Tensor, probability: float) -> list[str]:
    """Replace a prompt by the empty one where its uniform draw is below `probability`.

    Args:
        prompts: B prompts.
        draws: (B,) uniform in [0, 1), on the CPU.
        probability: Share of prompts to drop, in [0, 1].
    """
    return ["" if draw < probability else prompt for prompt, draw in zip(prompts, draws.tolist(), strict=True)]
