"""Two models on the same prompts and seeds: means, paired differences, win rates, and how sure they are."""

from typing import Any

import torch
from torch import Tensor

RESAMPLES = 10_000
BOOTSTRAP_SEED = 0


def wins(tuned: Tensor, base: Tensor) -> Tensor:
    """1 where the tuned score is higher, 0 where the base score is, one half for a tie; NaN stays NaN."""
    difference = tuned.double() - base.double()
    return torch.where(difference.isnan(), difference, 0.5 + 0.5 * difference.sign())


def means_by_group(values: Tensor, groups: Tensor) -> Tensor:
    """(n,) values and their group numbers 0..G-1 -> (G,) mean of each group."""
    zeros = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
    return zeros.index_add(0, groups, values.double()) / zeros.index_add(0, groups, torch.ones_like(values.double()))


def bootstrap_interval(
    values: Tensor, level: float = 0.95, resamples: int = RESAMPLES, seed: int = BOOTSTRAP_SEED
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of a mean.

    Args:
        values: (n,) independent values, one per prompt.
        level: Coverage.
        resamples: Number of resamples, each of n values drawn with replacement.
        seed: Equal seeds resample equally, whatever the values.

    Returns:
        The lower and upper end, or None for a single value, about whose spread nothing is known.
    """
    n = len(values)
    if n < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, 4_000_000 // n)  # bounds the memory to some 100 MB
    means = torch.cat(
        [
            values.double()[torch.randint(n, (min(at_once, resamples - start), n), generator=generator)].mean(dim=1)
            for start in range(0, resamples, at_once)
        ]
    )
    low, high = torch.quantile(means, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def compare(tuned: Tensor, base: Tensor | None, prompts: list[str]) -> dict[str, Any]:
    """Paired statistics of one reward.

    The prompt is the unit: images of the same prompt at several seeds are averaged first, because they are not
    independent. With one image per prompt these are the plain means over images.

    Args:
        tuned: (n,) scores of the tuned model's images.
        base: (n,) scores of the baseline's images at the same prompts and seeds; None without a baseline.
        prompts: n prompts.

    Returns:
        Without a baseline, `tuned` (mean) and `tuned_interval`. With one, `base` and `tuned` (means), `difference` and
        `win_rate`, the 95 % intervals of the last two (`difference_interval`, `win_rate_interval`), and `ties`, the
        share of equal scores. Intervals are None for a single prompt.
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    groups = torch.tensor([numbers[prompt] for prompt in prompts])
    mean = means_by_group(tuned, groups)
    if base is None:
        return {"tuned": mean.mean().item(), "tuned_interval": bootstrap_interval(mean)}
    difference = means_by_group(tuned.double() - base.double(), groups)
    win = means_by_group(wins(tuned, base), groups)
    return {
        "base": means_by_group(base, groups).mean().item(),
        "tuned": mean.mean().item(),
        "difference": difference.mean().item(),
        "difference_interval": bootstrap_interval(difference),
        "win_rate": win.mean().item(),
        "win_rate_interval": bootstrap_interval(win),
        "ties": means_by_group(tuned == base, groups).mean().item(),
    }
