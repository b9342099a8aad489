"""Watch rewards rise (or not) on a few prompts while the model trains."""

import lightning.pytorch as pl
import torch
from torch import Tensor

from callbacks.evaluation import score_images
from callbacks.fixed_prompts import FixedPrompts
from callbacks.statistics import wins
from lightning_modules.base import AlignmentModule
from lightning_modules.rewards.base import Reward


class ScorePrompts(FixedPrompts):
    """Score images of fixed prompts and seeds with any rewards, against the base model's images at the same seeds.

    Logs `val/<name>`, the mean score of the model in training, and `val/<name>_win_rate`, the share of prompts on which
    it beats the base (a tie counts one half). Checkpoints can follow either (`monitor: val/<name>`).

    Args:
        rewards: Name -> reward, for example `{match: {class_path: lightning_modules.rewards.toy_oracle.ToyOracle}}`.
        prompts: Prompts to draw, or a text file with one per line. A prompt that is listed twice gets two seeds.
        every_n_steps: Optimizer steps between two scorings; one more is made at the end of fit.
        seed: Seed of the first prompt's starting noise; the next prompt has the next seed.
        num_inference_steps: Sampling steps. Null takes the backbone's.
        guidance_scale: Classifier-free guidance. Null takes the backbone's.
        max_prompts: Draw only the first so many of the prompts, to bound the time.
    """

    def __init__(
        self,
        rewards: dict[str, Reward],
        prompts: list[str] | str,
        every_n_steps: int = 100,
        seed: int = 0,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        max_prompts: int | None = None,
    ) -> None:
        super().__init__(prompts, every_n_steps, seed, num_inference_steps, guidance_scale, max_prompts)
        if not rewards:
            raise ValueError(
                "rewards: there is none; expected a name and a reward, such as {match: {class_path: ...}}."
            )
        self.rewards = {name: reward.eval().requires_grad_(False) for name, reward in rewards.items()}

    def setup(self, trainer: pl.Trainer, pl_module: AlignmentModule, stage: str) -> None:
        if stage == "fit":
            for reward in self.rewards.values():
                reward.load()  # a wrong weight file is told of before the first image is made

    def start(self, trainer: pl.Trainer, pl_module: AlignmentModule, base_images: Tensor) -> None:
        for reward in self.rewards.values():
            reward.to(pl_module.device)
        self.base_scores = self.score(trainer, pl_module, base_images)

    def watch(self, trainer: pl.Trainer, pl_module: AlignmentModule, images: Tensor) -> None:
        scores = self.score(trainer, pl_module, images)
        metrics = {}
        for column, name in enumerate(self.rewards):
            metrics[f"val/{name}"] = scores[:, column].mean()
            metrics[f"val/{name}_win_rate"] = wins(scores[:, column], self.base_scores[:, column]).mean().float()
        # Straight to the loggers, so that log_every_n_steps does not decide which of these rare values are kept.
        for logger in trainer.loggers:
            logger.log_metrics({name: value.item() for name, value in metrics.items()}, step=trainer.global_step)
        trainer.callback_metrics.update(metrics)

    def score(self, trainer: pl.Trainer, pl_module: AlignmentModule, images: Tensor) -> Tensor:
        """(number of prompts, number of rewards) scores of all ranks' images, in the order of the prompts."""
        prompts = [self.prompts[position] for position in self.share(trainer)]
        scores = score_images(self.rewards, images, prompts, pl_module.backbone.chunk_size, pl_module.device)
        return self.gather(trainer, pl_module, torch.stack(list(scores.values()), dim=1))
