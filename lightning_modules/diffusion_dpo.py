"""Diffusion-DPO: direct preference optimization of diffusion models (arXiv:2311.12908), with hinge and IPO losses.

Which image of a pair is the better one, people have said, or a reward says so while the model trains (paper, 5.4).
"""

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
from lightning_modules.rewards.base import Reward, score_each

LossType = Literal["sigmoid", "hinge", "ipo"]


def dpo_margin(error: Tensor, reference_error: Tensor) -> Tensor:
    """How much more the policy gained over the reference on the preferred image than on the other one.

        margin = (r_w - e_w) - (r_l - e_l)

    Args:
        error: (2B,) policy errors, the B preferred images first.
        reference_error: (2B,) reference errors in the same order.

    Returns:
        (B,) margin; above zero, the policy denoises the preferred image relatively better.
    """
    gain_preferred, gain_rejected = (reference_error - error).chunk(2)
    return gain_preferred - gain_rejected


def preference_loss(margin: Tensor, beta: float, loss_type: LossType = "sigmoid") -> Tensor:
    """Loss of each pair as a function of its margin m, with b = beta / 2.

        sigmoid  -log sigmoid(b m)          arXiv:2311.12908, eq. 14
        hinge    max(0, 1 - b m)            SLiC, arXiv:2305.10425
        ipo      (m - 1 / (2 b))^2          arXiv:2310.12036

    One convention of beta for all three: errors are means over elements, and beta carries the factor 1/2 of the
    published script. The diffusers LoRA example has no such factor: its beta 2500 is 5000 here.

    Raises:
        ValueError: for an unknown loss type.
    """
    half_beta = 0.5 * beta
    if loss_type == "sigmoid":
        return -F.logsigmoid(half_beta * margin)
    if loss_type == "hinge":
        return F.relu(1.0 - half_beta * margin)
    if loss_type == "ipo":
        return (margin - 1.0 / (2.0 * half_beta)).square()
    raise ValueError(f"Unknown loss_type {loss_type!r}; known are sigmoid, hinge and ipo.")


def diffusion_dpo_loss(
    error: Tensor,
    reference_error: Tensor,
    beta: float,
    loss_type: LossType = "sigmoid",
    label: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Diffusion-DPO loss of each pair.

        loss = -log sigmoid( beta/2 * [ (r_w - e_w) - (r_l - e_l) ] )

    e is the policy's denoising error and r the frozen reference's, on the same noised latents; w is the preferred
    image of the pair, l the other. arXiv:2311.12908, with T * omega(lambda_t) folded into beta, as the published code
    does. A label p below 1 gives p * loss(m) + (1 - p) * loss(-m), the cross-entropy of an uncertain preference.

    Args:
        error: (2B,) policy errors, the B preferred images first; means over elements, float32 or better.
        reference_error: (2B,) reference errors in the same order, without gradient.
        beta: Strength of the pull toward the reference; the published launchers use 5000.
        loss_type: "sigmoid", or "hinge" or "ipo" (see `preference_loss`).
        label: (B,) probability that the first image is the better one; None means 1.

    Returns:
        (B,) loss and (B,) margin; a margin above zero means that the policy, relative to the reference, denoises the
        preferred image better than the other one.
    """
    margin = dpo_margin(error, reference_error)
    loss = preference_loss(margin, beta, loss_type)
    if label is not None:
        loss = label * loss + (1.0 - label) * preference_loss(-margin, beta, loss_type)
    return loss, margin.detach()


def implicit_accuracy(margin: Tensor, tie: float = 0.0) -> Tensor:
    """Share of pairs that the implicit reward ranks as the label does; a margin of exactly 0 counts `tie`."""
    return torch.where(margin == 0, tie, (margin > 0).float()).mean()


def second_is_better(scores: Tensor) -> Tensor:
    """AI feedback: whether the second image of each pair is the preferred one.

    Only a score strictly above the first one says so: at equal scores, and where one is NaN, the first image is
    preferred, as in the published code.

    Args:
        scores: (B, 2) of the first and the second stored image.

    Returns:
        (B,) bool.
    """
    return scores[:, 1] > scores[:, 0]


def swap_pairs(x: Tensor, swap: Tensor) -> Tensor:
    """(2B, ...) in the layout of pairs, with the two of each pair exchanged where `swap`, (B,) bool, says so."""
    first, second = x.chunk(2)
    swap = swap.reshape(-1, *[1] * (x.ndim - 1))
    return torch.cat([torch.where(swap, second, first), torch.where(swap, first, second)])


class DiffusionDPO(AlignmentModule):
    """Diffusion-DPO on image pairs: the denoiser learns to denoise preferred images better than rejected ones.

    Args:
        backbone: The diffusion model to align; its adapters, or all weights of its denoiser, are trained. The
            reference is the same model with adapters off, or a frozen low-precision copy.
        beta: Strength of the pull toward the reference. 5000 is the published launchers' value, 2000 the paper's main
            Stable Diffusion 1.5 result. Errors are means over elements and beta carries the factor 1/2; the diffusers
            LoRA example's 2500 is 5000 here.
        loss_type: sigmoid (the paper), hinge or ipo.
        optimizer: Built on the trained parameters only.
        prompt_dropout: Share of captions replaced by the empty one, in [0, 1].
        noise_offset: Standard deviation of an extra noise per pair and channel; 0 switches it off.
        feedback: Says, instead of people, which image of a training pair is the better one: it scores both as they are
            stored, with the caption. Needs `originals: true` of the data module; a tie goes to the first image. Scoring
            all pairs once (`main.py cache --rewards`) and training with the data module's `labels_from` costs less.
        tie_accuracy: What a pair of margin exactly 0 counts in the implicit accuracy: 0 as in the published script,
            0.5 as in the diffusers LoRA examples.
        validation_draws: Draws of noise and timestep per validation pair whose mean margin classifies it (paper, 5.5).
        lr_scheduler: Begins after the warm-up and is stepped after every optimizer step. Null keeps the rate constant.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        warmup_from_zero: Give the first optimizer step learning rate 0, as the published code does.
        scale_lr: Multiply the learning rate by the pairs of one optimizer step over all devices, as the published
            launchers do (1e-8 x 2048).
    """

    def __init__(
        self,
        backbone: Backbone,
        beta: float = 5000.0,
        loss_type: LossType = "sigmoid",
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5),
        prompt_dropout: float = 0.2,
        noise_offset: float = 0.0,
        feedback: Reward | None = None,
        tie_accuracy: float = 0.0,
        validation_draws: int = 10,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        warmup_from_zero: bool = False,
        scale_lr: bool = False,
    ) -> None:
        super().__init__(
            backbone, optimizer, lr_scheduler, warmup_steps, warmup_from_zero, scale_lr, keep_reference=True
        )
        if not beta > 0:
            raise ValueError(
                f"beta is {beta}; expected a positive number such as 5000 (a negative one flips all labels)."
            )
        if not 0.0 <= prompt_dropout <= 1.0:
            raise ValueError(f"prompt_dropout is {prompt_dropout}; expected a share of the captions, in [0, 1].")
        if validation_draws < 1:
            raise ValueError(f"validation_draws is {validation_draws}; expected 1 or more.")
        self.beta = beta
        self.loss_type: LossType = loss_type
        self.prompt_dropout = prompt_dropout
        self.noise_offset = noise_offset
        self.feedback = None if feedback is None else feedback.eval().requires_grad_(False)
        self.tie_accuracy = tie_accuracy
        self.validation_draws = validation_draws

    def setup(self, stage: str) -> None:
        """Load the reward before the networks: a wrong weight file is told of at once.

        Raises:
            ValueError: if there is feedback, and the data do not come with the images that it judges.
        """
        if self.feedback is None or stage != "fit":
            return
        if not getattr(self.trainer.datamodule, "originals", False):
            raise ValueError(
                "model.feedback judges images as they are stored, which the batches do not hold: set "
                "`data.init_args.originals: true`. Images that are cached are not read at all: have them scored once, "
                "by `python main.py cache --rewards`, and set `data.init_args.labels_from` instead of feedback."
            )
        self.feedback.load()
        self.feedback.requires_grad_(False)

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        feedback = {}
        if self.feedback is not None:
            batch, feedback["feedback_agreement"] = self.relabel(batch)
        prompts = drop_prompts(batch["prompts"], torch.rand(len(batch["prompts"]), device="cpu"), self.prompt_dropout)
        latents = self.backbone.latents(batch)  # (2B, C, h, w), preferred first
        condition = self.backbone.condition(batch, prompts)

        error, reference_error = self.denoising_errors(latents, condition)
        loss, margin = diffusion_dpo_loss(error, reference_error, self.beta, self.loss_type, batch["label"])
        loss = (batch["weight"] * loss).mean()

        error_preferred, error_rejected = error.chunk(2)
        reference_preferred, reference_rejected = reference_error.chunk(2)
        self.log_window(
            {
                "loss": loss,
                "implicit_accuracy": implicit_accuracy(margin, self.tie_accuracy),
                "margin": margin.mean(),
                "error_preferred": error_preferred.mean(),
                "error_rejected": error_rejected.mean(),
                "reference_error_preferred": reference_preferred.mean(),
                "reference_error_rejected": reference_rejected.mean(),
                **feedback,
            }
        )
        return loss

    @torch.no_grad()
    def relabel(self, batch: PairBatch) -> tuple[PairBatch, Tensor]:
        """Put the image first that the feedback prefers.

        Args:
            batch: Pairs in stored order, with `originals`.

        Returns:
            The pairs in their new order, all with label 1, and the share of them on which people agree.
        """
        scores = score_each(self.feedback, batch["originals"], batch["prompts"] * 2)
        swap = second_is_better(torch.stack(scores.chunk(2), dim=1)).to(batch["images"].device)
        people = batch["label"]
        agreement = torch.where(swap, 1.0 - people, people).mean()
        sides = {name: swap_pairs(batch[name], swap) for name in ("images", "original_sizes", "crops")}
        return {**batch, **sides, "label": torch.ones_like(people)}, agreement

    def denoising_errors(self, latents: Tensor, condition: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Errors of policy and reference, each (2B,) float32, at one drawn noise and timestep per pair."""
        # Both images of a pair see the same noise and timestep, so that only the images differ.
        pairs = latents[: len(latents) // 2]
        noise = repeat_pair(draw_noise(pairs, self.noise_offset))
        t = repeat_pair(self.backbone.sample_timesteps(len(pairs)))
        noised, target = self.backbone.add_noise(latents, noise, t)

        error = per_sample_mse(self.backbone.predict(noised, t, condition), target)
        with torch.no_grad(), self.backbone.reference():
            reference_error = per_sample_mse(self.backbone.predict(noised, t, condition), target)
        return error, reference_error

    def pair_terms(self, error: Tensor, reference_error: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each pair with this run's settings, and what its sigmoid sees, beta/2 times the margin; each (B,)."""
        loss, _ = diffusion_dpo_loss(error, reference_error, self.beta, self.loss_type)
        return loss, 0.5 * self.beta * dpo_margin(error, reference_error)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """The implicit reward as a classifier of held-out pairs: the sign of the mean margin over several draws."""
        latents = self.backbone.latents(batch)
        condition = self.backbone.condition(batch, batch["prompts"])
        draws = [self.denoising_errors(latents, condition) for _ in range(self.validation_draws)]
        margins = torch.stack([dpo_margin(error, reference_error) for error, reference_error in draws])
        losses = torch.stack(
            [diffusion_dpo_loss(*errors, self.beta, self.loss_type, batch["label"])[0] for errors in draws]
        )
        self.log_dict(
            {
                "val/loss": losses.mean(),
                "val/implicit_accuracy": implicit_accuracy(margins.mean(0), self.tie_accuracy),
                "val/margin": margins.mean(),
            },
            batch_size=len(batch["prompts"]),
            sync_dist=True,
        )
