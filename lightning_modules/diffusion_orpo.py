"""Diffusion-ORPO: fine-tuning on preferred images with a preference term, without a reference (after arXiv:2403.07691).

Four forms of that term: a margin of errors, the odds ratio of ORPO, MaPO (arXiv:2406.06424), and the published code's.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from datamodules.batches import PairBatch
from lightning_modules.backbones.base import Backbone
from lightning_modules.base import AlignmentModule
from lightning_modules.functional.noise import draw_noise, per_sample_mse, repeat_pair
from lightning_modules.functional.prompts import drop_prompts

Variant = Literal["margin", "odds_ratio", "mapo", "reference"]
LogOdds = Callable[[Tensor, Tensor], Tensor]
NUM_QUARTERS = 4  # parts of the timestep range for which the margin is logged


def margin_log_odds(preferred: Tensor, rejected: Tensor, scale: float = 1.0) -> Tensor:
    """scale * (l - w): the published term with its sign put right.

    Args:
        preferred: (B,) errors w of the preferred images.
        rejected: (B,) errors l of the other ones.
        scale: Errors differ by about 0.01, where the sigmoid is a straight line; 250 is MaPO's steepness.
    """
    return scale * (rejected - preferred)


def odds_ratio_log_odds(preferred: Tensor, rejected: Tensor, mse_floor: float = 1e-6) -> Tensor:
    """log of odds(exp(-w)) / odds(exp(-l)), odds(p) = p / (1 - p): ORPO with an error as negative log-probability.

    For small errors log(l / w): a ratio, to which a noise level with small errors is no smaller matter. The gradient
    with respect to an error m is about 1 / m, and 0 up to the floor.

    Args:
        preferred: (B,) errors w of the preferred images.
        rejected: (B,) errors l of the other ones.
        mse_floor: Smaller errors count as this.
    """
    return log_expm1(raise_to(mse_floor, rejected)) - log_expm1(raise_to(mse_floor, preferred))


def log_expm1(x: Tensor) -> Tensor:
    """log(exp(x) - 1), x > 0; the plain form overflows from 89 on, and log(1 - exp(-x)) loses the digits of small x."""
    return x + (-torch.expm1(-x)).log()


def raise_to(floor: float, x: Tensor) -> Tensor:
    """max(x, floor), without gradient at the floor and below."""
    return torch.where(x > floor, x, floor)


def mapo_log_odds(preferred: Tensor, rejected: Tensor, k: float = 0.5, t_scale: float = 1000.0) -> Tensor:
    """t_scale * (f(k w) - f(k l)), f(x) = x / (exp(x) - 1): MaPO, arXiv:2406.06424. About t_scale k / 2 * (l - w).

    Args:
        preferred: (B,) errors w of the preferred images.
        rejected: (B,) errors l of the other ones.
        k: The published code's snr_value.
        t_scale: The published code has the number of training timesteps here.
    """
    return t_scale * (mapo_score(k * preferred) - mapo_score(k * rejected))


def mapo_score(x: Tensor) -> Tensor:
    """x / (exp(x) - 1) for x >= 0, with value and gradient accurate and finite from 0 to infinity."""
    # Each branch sees a harmless x where the other one is taken: where() alone would let 0 * inf into the gradient.
    small = x < 0.05
    near, far = torch.where(small, x, 0.0), torch.where(small, 1.0, x)
    series = 1 - near / 2 + near**2 / 12 - near**4 / 720 + near**6 / 30240
    return torch.where(small, series, far * (-far).exp() / -torch.expm1(-far))


def reference_log_odds(preferred: Tensor, rejected: Tensor) -> Tensor:
    """w - l, the published code: the sign is reversed, and the term rewards a *larger* error on the preferred image."""
    return preferred - rejected


def diffusion_orpo_loss(
    error: Tensor,
    log_odds: LogOdds,
    beta: float,
    label: Tensor | None = None,
    rejected_error_limit: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The two terms of the Diffusion-ORPO loss of each pair, loss = w + preference term.

        preference term = -beta * log sigmoid( log_odds(w, l) )

    w is the denoising error on the preferred image of the pair and l on the other, at one noise and timestep. A label p
    below 1 gives p * loss(w, l) + (1 - p) * loss(l, w).

    Args:
        error: (2B,) errors, the B preferred images first; means over elements, float32 or better.
        log_odds: One of the functions above: (B,) w and l -> (B,).
        beta: Weight of the preference term.
        label: (B,) probability that the first image is the better one; None means 1.
        rejected_error_limit: The preference term takes larger errors of rejected images for this one, and so does not
            drive them further; None lets them grow.

    Returns:
        (B,) supervised term, (B,) preference term, and (B,) log-odds w over l, without gradient; above zero (with
        `reference_log_odds`: below), the preferred image is denoised better.
    """

    def terms(preferred: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        limited = rejected if rejected_error_limit is None else rejected.clamp_max(rejected_error_limit)
        odds = log_odds(preferred, limited)
        return preferred, -beta * F.logsigmoid(odds), odds.detach()

    preferred, rejected = error.chunk(2)
    supervised, preference, odds = terms(preferred, rejected)
    if label is not None:
        other_supervised, other_preference, _ = terms(rejected, preferred)
        supervised = label * supervised + (1.0 - label) * other_supervised
        preference = label * preference + (1.0 - label) * other_preference
    return supervised, preference, odds


def margin_by_quarter(margin: Tensor, t: Tensor, num_timesteps: int) -> Tensor:
    """What the pairs of each quarter of the timesteps contribute to the mean margin.

    Args:
        margin: (B,) margins.
        t: (B,) timesteps from 0 to `num_timesteps`, integers or not.
        num_timesteps: Timesteps of the training schedule.

    Returns:
        (4,), the least noise first; the four add up to the mean. With uniform timesteps four times one of them is, on
        average, the mean of its quarter.
    """
    quarter = (t * NUM_QUARTERS / num_timesteps).long().clamp(max=NUM_QUARTERS - 1)  # a flow's noise is at the end
    return torch.stack([(margin * (quarter == q)).mean() for q in range(NUM_QUARTERS)])


class DiffusionORPO(AlignmentModule):
    """Diffusion-ORPO on image pairs: fine-tuning on preferred images, with a term that sets them apart from the others.

    One network and one forward pass; there is no reference model that would hold the policy back.

    Args:
        backbone: The diffusion model to align; its adapters, or all weights of its denoiser, are trained.
        variant: What is compared. margin: the difference of the errors (default); odds_ratio: ORPO's odds ratio; mapo:
            MaPO; reference: the published code, whose sign is reversed, so that the term works against the labels.
        beta: Weight of the preference term beside the fine-tuning. For odds_ratio 0.005 to 0.02: its gradient is large
            where errors are small.
        scale: Of the margin: 1 keeps the term linear, 250 is as steep as MaPO.
        mse_floor: Of the odds ratio: smaller errors count as this. 1e-3 caps its gradient at 1000.
        k: Of MaPO: factor of the errors.
        t_scale: Of MaPO: factor of the log-odds.
        rejected_error_limit: Errors on rejected images above this are not driven up any further. Null lets them grow.
        optimizer: Built on the trained parameters only.
        prompt_dropout: Share of captions replaced by the empty one, in [0, 1].
        noise_offset: Standard deviation of an extra noise per pair and channel; 0 switches it off.
        validation_draws: Draws of noise and timestep per validation pair whose mean margin classifies it.
        lr_scheduler: Begins after the warm-up and is stepped after every optimizer step. Null keeps the rate constant.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        warmup_from_zero: Give the first optimizer step learning rate 0, as the published code does.
        scale_lr: Multiply the learning rate by the pairs of one optimizer step over all devices.
    """

    def __init__(
        self,
        backbone: Backbone,
        variant: Variant = "margin",
        beta: float = 0.1,
        scale: float = 1.0,
        mse_floor: float = 1e-6,
        k: float = 0.5,
        t_scale: float = 1000.0,
        rejected_error_limit: float | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        prompt_dropout: float = 0.0,
        noise_offset: float = 0.0,
        validation_draws: int = 10,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        warmup_from_zero: bool = False,
        scale_lr: bool = False,
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, warmup_steps, warmup_from_zero, scale_lr)
        log_odds: dict[Variant, LogOdds] = {
            "margin": partial(margin_log_odds, scale=scale),
            "odds_ratio": partial(odds_ratio_log_odds, mse_floor=mse_floor),
            "mapo": partial(mapo_log_odds, k=k, t_scale=t_scale),
            "reference": reference_log_odds,
        }
        if variant not in log_odds:
            raise ValueError(f"variant is {variant!r}; expected one of {', '.join(log_odds)}.")
        for name, value, unused, readers in (
            ("scale", scale, 1.0, ("margin",)),
            ("mse_floor", mse_floor, 1e-6, ("odds_ratio",)),
            ("k", k, 0.5, ("mapo",)),
            ("t_scale", t_scale, 1000.0, ("mapo",)),
            ("rejected_error_limit", rejected_error_limit, None, ("margin", "odds_ratio", "mapo")),
        ):
            if variant not in readers and value != unused:
                raise ValueError(
                    f"{name} is {value}, but variant: {variant} does not read it; leave it out, or choose variant: "
                    f"{' or '.join(readers)}."
                )
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; expected a positive number.")
        if not beta > 0:
            raise ValueError(f"beta is {beta}; expected a positive number such as 0.1 (DiffusionSFT has no such term).")
        if not 0.0 <= prompt_dropout <= 1.0:
            raise ValueError(f"prompt_dropout is {prompt_dropout}; expected a share of the captions, in [0, 1].")
        if validation_draws < 1:
            raise ValueError(f"validation_draws is {validation_draws}; expected 1 or more.")
        self.log_odds = log_odds[variant]
        self.beta = beta
        self.rejected_error_limit = rejected_error_limit
        self.prompt_dropout = prompt_dropout
        self.noise_offset = noise_offset
        self.validation_draws = validation_draws

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        prompts = drop_prompts(batch["prompts"], torch.rand(len(batch["prompts"]), device="cpu"), self.prompt_dropout)
        latents = self.backbone.latents(batch)  # (2B, C, h, w), preferred first
        condition = self.backbone.condition(batch, prompts)

        error, t = self.denoising_errors(latents, condition)
        supervised, preference, odds = self.loss_terms(error, batch["label"])
        supervised = (batch["weight"] * supervised).mean()
        preference = (batch["weight"] * preference).mean()
        loss = supervised + preference

        preferred, rejected = error.detach().chunk(2)
        margin = rejected - preferred
        quarters = margin_by_quarter(margin, t, self.backbone.num_timesteps)
        self.log_window(
            {
                "loss": loss,
                "sft": supervised,
                "or_term": preference,
                "error_preferred": preferred.mean(),
                "error_rejected": rejected.mean(),
                "log_odds": odds.mean(),
                "accuracy": (margin > 0).float().mean(),
                "reward_preferred": -self.beta * preferred.mean(),
                "reward_rejected": -self.beta * rejected.mean(),
                "margin": margin.mean(),
                **{f"margin_quarter_{q + 1}": quarters[q] for q in range(NUM_QUARTERS)},
            }
        )
        return loss

    def denoising_errors(self, latents: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Errors, (2B,) float32, at one drawn noise and timestep per pair, and these timesteps, (B,)."""
        # Both images of a pair see the same noise and timestep, so that only the images differ.
        pairs = latents[: len(latents) // 2]
        noise = repeat_pair(draw_noise(pairs, self.noise_offset))
        t = self.backbone.sample_timesteps(len(pairs))
        noised, target = self.backbone.add_noise(latents, noise, repeat_pair(t))
        return per_sample_mse(self.backbone.predict(noised, repeat_pair(t), condition), target), t

    def loss_terms(self, error: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Supervised term, preference term and log-odds of each pair with this run's settings, each (B,)."""
        return diffusion_orpo_loss(error, self.log_odds, self.beta, label, self.rejected_error_limit)

    def pair_terms(self, error: Tensor, reference_error: Tensor | None) -> tuple[Tensor, Tensor]:
        """Loss of each pair with this run's settings, and the log-odds that its sigmoid sees; each (B,)."""
        supervised, preference, odds = self.loss_terms(error, torch.ones_like(error[: len(error) // 2]))
        return supervised + preference, odds

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Loss on held-out pairs, and the error as their classifier: the sign of the mean margin over several draws."""
        latents = self.backbone.latents(batch)
        condition = self.backbone.condition(batch, batch["prompts"])
        errors = torch.stack([self.denoising_errors(latents, condition)[0] for _ in range(self.validation_draws)])
        losses = torch.stack([sum(self.loss_terms(error, batch["label"])[:2]) for error in errors])
        preferred, rejected = errors.chunk(2, dim=1)
        margin = (rejected - preferred).mean(0)
        self.log_dict(
            {
                "val/loss": losses.mean(),
                "val/accuracy": (margin > 0).float().mean(),
                "val/margin": margin.mean(),
            },
            batch_size=len(batch["prompts"]),
            sync_dist=True,
        )
