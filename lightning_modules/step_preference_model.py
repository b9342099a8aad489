"""The step-aware preference model of SPO: which of two images people prefer, judged at any step of their making.

arXiv:2406.04314, section 3. A CLIP that is told the timestep sees what the frozen diffusion model takes two noised
images to be, and learns the preference that people have between the clean ones. `rewards/step_preference.py` holds the
network, its pixels and its files.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor, nn

from datamodules.batches import PairBatch, PromptBatch
from lightning_modules.backbones.base import Backbone, check_model_path, load_component
from lightning_modules.base import AlignmentModule, batch_seed, compute_dtype
from lightning_modules.functional.noise import draw_noise, repeat_pair
from lightning_modules.rewards.base import Reward, score_each
from lightning_modules.rewards.step_preference import (
    PICKSCORE,
    PICKSCORE_PROCESSOR,
    check_step_preference_sources,
    load_step_preference,
    pixels_for_spm,
)

InputKind = Literal["x0_estimate", "decoded_noisy", "clean"]


def pair_loss(score_0: Tensor, score_1: Tensor, label: Tensor) -> Tensor:
    """Cross entropy of each pair, less what no scores could avoid.

        p_0 = exp(z_0) / (exp(z_0) + exp(z_1)),   loss = -label log p_0 - (1 - label) log(1 - p_0) - H(label)

    z are the scores; H, the label's entropy, is log 2 for a tie and 0 for a decision. So a perfect tie costs nothing,
    and a tie draws the two scores together.

    Args:
        score_0: (B,) of the first images.
        score_1: (B,) of the second images.
        label: (B,) probability that the first image is the better one; 0.5 is a tie.

    Returns:
        (B,) loss.
    """
    margin = score_0 - score_1
    unavoidable = torch.special.entr(label) + torch.special.entr(1.0 - label)
    return -label * F.logsigmoid(margin) - (1.0 - label) * F.logsigmoid(-margin) - unavoidable


def in_batch_loss(image: Tensor, text: Tensor, scale: Tensor, label: Tensor) -> Tensor:
    """CLIP's contrast with all other texts and images of the batch, each image of a pair weighted by its label.

        image part:  sum over k of label_k * cross entropy of image k over all texts
        text part:   sum over k of label_k * cross entropy of the text over all images, with target image k, - H(label)
        loss = (image part + text part) / 2

    Args:
        image: (2B, D) unit features, the B first images first.
        text: (B, D) unit features.
        scale: Of the cosines, exp(logit_scale).
        label: (B,) probability that the first image is the better one.

    Returns:
        (B,) loss.
    """
    B = len(text)
    logits = scale * image @ text.T  # (2B, B)
    first, second = torch.arange(B, device=image.device), torch.arange(B, 2 * B, device=image.device)
    of_image, of_text = logits.log_softmax(1), logits.T.log_softmax(1)
    image_part = -label * of_image[first, first] - (1.0 - label) * of_image[second, first]
    text_part = -label * of_text[first, first] - (1.0 - label) * of_text[first, second]
    unavoidable = torch.special.entr(label) + torch.special.entr(1.0 - label)
    return (image_part + text_part - unavoidable) / 2


def weighted_share(loss: Tensor, weight: Tensor, total: Tensor | float, world_size: int = 1) -> Tensor:
    """This rank's part of sum(weight * loss) / sum(weight), the sums running over all ranks.

    Averaged over the ranks, as DDP averages gradients, the parts give the whole; only `total` has to be exchanged.

    Args:
        loss: (B,) of this rank's pairs.
        weight: (B,) one over the number of pairs of the same prompt.
        total: Sum of the weights over all ranks.
        world_size: Number of ranks.
    """
    return world_size * (weight * loss).sum() / total


def pseudo_label(score_0: Tensor, score_1: Tensor, threshold: float) -> Tensor:
    """Labels by a reward: 1 or 0 where the softmax of the two scores differs by more than the threshold, else 0.5.

    Args:
        score_0: (B,) of the first images.
        score_1: (B,) of the second images.
        threshold: Of p_0 - p_1; 0.1 is a difference of scores of 0.2007.

    Returns:
        (B,) probability that the first image is the better one.
    """
    advantage = torch.tanh((score_0 - score_1) / 2)  # p_0 - p_1
    return torch.where(advantage.abs() > threshold, (advantage > 0).to(advantage.dtype), 0.5)


def pair_correct(score_0: Tensor, score_1: Tensor, label: Tensor, tie: float = 0.0) -> Tensor:
    """(B,) how far the scores rank each pair as its label does: 1 or 0, for a label of 0.5 one half.

    Args:
        score_0: (B,) of the first images.
        score_1: (B,) of the second images.
        label: (B,) probability that the first image is the better one.
        tie: What exactly equal scores count; 0 in the published code.
    """
    correct = torch.where(score_0 > score_1, label, 1.0 - label)
    return torch.where(score_0 == score_1, tie, correct)


def logarithmic_warmup(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the learning rate that optimizer step `step` (0-based) uses.

        n < W:  ln(n + 1) / ln(W)        else:  max(0, (N - n) / (N - W))

    It rises fast: at a fifth of the warm-up it is at three quarters. Step 0 has rate 0.
    """
    if step < warmup_steps:
        return math.log(step + 1) / math.log(warmup_steps) if warmup_steps > 1 else 1.0
    return max(0.0, (total_steps - step) / (total_steps - warmup_steps))


class LogarithmicWarmup(torch.optim.lr_scheduler.LambdaLR):
    """Learning rate of the published run: a logarithmic warm-up from 0, then a line to 0.

    Args:
        optimizer: Whose rate it is.
        warmup_steps: Optimizer steps of the warm-up.
        total_steps: Optimizer steps of the run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> None:
        if not 0 <= warmup_steps < total_steps:
            raise ValueError(
                f"LogarithmicWarmup: warmup_steps is {warmup_steps} and total_steps {total_steps}; expected a warm-up "
                "shorter than the run."
            )
        self.total_steps = total_steps
        super().__init__(optimizer, lambda step: logarithmic_warmup(step, warmup_steps, total_steps))


class StepPreferenceModel(AlignmentModule):
    """Trains a CLIP that is told the timestep to prefer the images that people prefer, at every step of their making.

    Both images of a pair are noised at the same timestep with the same noise; the frozen diffusion model estimates the
    clean images from them, and the decoded estimates are scored. All weights of the CLIP are trained.

    Args:
        backbone: The frozen diffusion model that makes the estimates; its `chunk_size` is how many images it treats at
            once. The trained model is for SPO with the same one.
        clip: Folder or hub id of the CLIP to start from, in transformers' layout.
        processor: Folder or hub id of its tokenizer and preprocessor_config.json.
        weights: File with other weights to start from: a published .bin, .safetensors, or a checkpoint of such a run.
        feedback: Says, instead of people, which image is the better one. It judges the images as they are stored if the
            data module has `originals: true`, else as they are shown to the VAE. Scoring all pairs once (`main.py cache
            --rewards`) and training with the data module's `labels_from` costs less.
        feedback_threshold: Pairs whose softmax of feedback scores differs by no more than this are ties.
        input_kind: What is scored: "x0_estimate"; "decoded_noisy", the noised latents decoded as they are; or "clean",
            the images themselves at timestep 0.
        guidance_scale: Of the classifier-free guidance of the estimates.
        timesteps: Train on these only, each as often as the others. Null draws as the backbone does.
        time_conditioning: Without it the CLIP is told timestep 0 always, to see what the timestep is worth.
        in_batch: Contrast every image with the other prompts of the batch, and every prompt with the other images, as
            CLIP is trained; the published runs contrast only the two images of a pair.
        antialias: Smooth images before they are shrunk for the CLIP. The published weights were trained without; the
            reward `StepPreference` must be told the same.
        tiny_decoder: Folder or hub id of a small decoder for the same latents (diffusers' AutoencoderTiny, such as
            madebyollin/taesd or madebyollin/taesdxl) in place of the VAE's: much less work, other images.
        gradient_checkpointing: Recompute the layers of the image tower in the backward pass: less memory.
        optimizer: Built on the weights of the CLIP only.
        validation_timesteps: Where accuracy is measured; 0 means the clean images.
        validation_ties: What becomes of validation pairs whose label is a tie: "half", they count one half, as in the
            published code with people's labels; "drop", they do not count, as there with a reward's.
        lr_scheduler: Begins after the warm-up and is stepped after every optimizer step. Null keeps the rate constant.
            The published one is `LogarithmicWarmup` in this file, with no other warm-up.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        warmup_from_zero: Give the first optimizer step learning rate 0.
        scale_lr: Multiply the learning rate by the pairs of one optimizer step over all devices.
    """

    def __init__(
        self,
        backbone: Backbone,
        clip: str = PICKSCORE,
        processor: str = PICKSCORE_PROCESSOR,
        weights: str | None = None,
        feedback: Reward | None = None,
        feedback_threshold: float = 0.1,
        input_kind: InputKind = "x0_estimate",
        guidance_scale: float = 5.0,
        timesteps: list[int] | None = None,
        time_conditioning: bool = True,
        in_batch: bool = False,
        antialias: bool = False,
        tiny_decoder: str | None = None,
        gradient_checkpointing: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=3e-6, weight_decay=0.3),
        validation_timesteps: tuple[int, ...] = (0, 251, 501, 701, 951),
        validation_ties: Literal["half", "drop"] = "half",
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        warmup_from_zero: bool = False,
        scale_lr: bool = False,
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, warmup_steps, warmup_from_zero, scale_lr)
        check_step_preference_sources("model", weights, clip, processor)
        if tiny_decoder is not None:
            check_model_path("model.tiny_decoder", tiny_decoder, "config.json", "vae")
        if backbone.lora is not None:
            raise ValueError(
                "model.backbone.lora: the diffusion model stays as it is here, and what is trained is the CLIP. Leave "
                "`lora` out; another denoiser for the estimates is given by `model.backbone.denoiser`."
            )
        if not 0.0 <= feedback_threshold < 1.0:
            raise ValueError(
                f"feedback_threshold is {feedback_threshold}; expected a difference of probabilities, in [0, 1)."
            )
        if input_kind not in ("x0_estimate", "decoded_noisy", "clean"):
            raise ValueError(f"input_kind is {input_kind!r}; expected x0_estimate, decoded_noisy or clean.")
        if validation_ties not in ("half", "drop"):
            raise ValueError(f"validation_ties is {validation_ties!r}; expected half or drop.")
        for name, given in (("timesteps", timesteps), ("validation_timesteps", validation_timesteps)):
            if given is not None and (len(set(given)) != len(given) or not given or min(given) < 0):
                raise ValueError(f"{name} is {list(given)}; expected different timesteps, 0 or more, and at least one.")
        self.clip = clip
        self.processor = processor
        self.weights = weights
        self.feedback = None if feedback is None else feedback.eval().requires_grad_(False)
        self.feedback_threshold = feedback_threshold
        self.input_kind: InputKind = input_kind
        self.guidance_scale = guidance_scale
        self.timesteps = timesteps
        self.time_conditioning = time_conditioning
        self.in_batch = in_batch
        self.antialias = antialias
        self.tiny_decoder = tiny_decoder
        self.gradient_checkpointing = gradient_checkpointing
        self.validation_timesteps = tuple(validation_timesteps)
        self.validation_ties = validation_ties
        self.model: Any = None
        self.tiny: Any = None

    # ---------------------------------------------------------------------------------------------------- building

    def setup(self, stage: str) -> None:
        """Load the feedback before the networks: a wrong weight file is told of at once.

        Raises:
            ValueError: if the data module gives single images, or the schedule of the rate is over before the run.
        """
        if getattr(self.trainer.datamodule, "preferred_only", False):
            raise ValueError(
                "StepPreferenceModel compares the two images of a pair, but data.init_args.preferred_only gives only "
                "the preferred ones. Leave it out."
            )
        if stage == "fit" and self.lr_scheduler is not None:
            schedule = self.lr_scheduler(self.optimizer([nn.Parameter(torch.zeros(1))]))
            if isinstance(schedule, LogarithmicWarmup) and self.trainer.max_steps > schedule.total_steps:
                raise ValueError(
                    f"trainer.max_steps is {self.trainer.max_steps}, but the learning rate of model.lr_scheduler is 0 "
                    f"after total_steps: {schedule.total_steps}. Give both the same number."
                )
        if self.feedback is not None:
            self.feedback.load()
            self.feedback.requires_grad_(False)

    def load_networks(self, fingerprint: bool) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            raise ValueError("StepPreferenceModel is not sharded: use one device, DDP (trainer/ddp.yaml) or ZeRO-2.")
        if isinstance(self.trainer.strategy, DeepSpeedStrategy) and self.trainer.accumulate_grad_batches > 1:
            raise ValueError(
                "The weights of the pairs are normalised over an optimizer step, for which DeepSpeed does not show the "
                "gradients: use accumulate_grad_batches: 1 with a larger batch_size, or DDP."
            )
        option = "model.clip" if self.weights is None else "model.weights"
        towers, images = load_step_preference(option, self.weights, self.clip, self.processor, untrained=True)
        self.backbone.load(compute_dtype(self.trainer), fingerprint=fingerprint, frozen=True)
        self.use(towers.clip, towers.tokenize, images.size, images.mean, images.std)
        last = self.backbone.num_timesteps - 1
        for name, given in (("timesteps", self.timesteps), ("validation_timesteps", self.validation_timesteps)):
            if given is not None and max(given) > last:
                raise ValueError(f"model.{name} goes to {max(given)}, but the schedule of the backbone ends at {last}.")
        if self.tiny_decoder is not None:
            self.tiny = load_tiny_decoder(self.tiny_decoder, self.backbone.vae.config.latent_channels)
        # What is not trained is the same on every rank anyway.
        trained = self.trained_parameters()
        self._ddp_params_and_buffers_to_ignore = [
            name for name, _ in (*self.named_parameters(), *self.named_buffers()) if name not in trained
        ]

    def use(self, model: nn.Module, tokenize: Any, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        """Train this network, with images of this size and these colours."""
        self.model = model.requires_grad_(True)
        self.model.gradient_checkpointing = self.gradient_checkpointing
        self.tokenize = tokenize
        self.image_settings = {"size": size, "mean": mean, "std": std, "antialias": self.antialias}

    @property
    def trained_network(self) -> nn.Module:
        return self.model

    # ---------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        label = self.labels(batch)
        t = self.draw_timesteps(len(batch["prompts"]))
        if self.input_kind == "clean":
            t = torch.zeros_like(t)
            pixels = self.clean_pixels(batch)
        else:
            latents = self.backbone.latents(batch)  # (2B, C, h, w)
            noise = draw_noise(latents[: len(latents) // 2])
            pixels = self.noised_pixels(batch, latents, noise, t)

        image, text = self.features(pixels, batch["prompts"], t)
        first, second = self.model.score(image, repeat_pair(text)).chunk(2)
        B, weight, world_size = len(label), batch["weight"], self.trainer.world_size
        total = self.trainer.strategy.reduce(weight.sum(), reduce_op="sum")
        if self.in_batch:
            loss = self.contrast(image, text, label, weight) / total
        else:
            loss = weighted_share(pair_loss(first, second, label), weight, total, world_size)

        mean_weight, accumulated = total / (world_size * B), self.trainer.accumulate_grad_batches
        self.window_weight = self._window.get("weight", 0.0) + mean_weight / accumulated
        self.log_window(
            {
                "loss": loss,
                "accuracy": pair_correct(first, second, label, tie=0.5).mean(),
                "margin": ((first - second) * (2.0 * label - 1.0)).mean(),
                "score": torch.cat([first, second]).mean(),
                "weight": mean_weight,
            }
        )
        return loss if accumulated == 1 else loss * mean_weight

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide by the weights of all pairs of the optimizer step, which are known only now that it is complete."""
        if self.trainer.accumulate_grad_batches > 1:
            for parameter in self.trained_parameters().values():
                parameter.grad /= self.window_weight

    @torch.no_grad()
    def labels(self, batch: PairBatch) -> Tensor:
        """(B,) probability that the first image of each pair is the better one: people's word, or the feedback's.

        Raises:
            ValueError: if there are no images that the feedback could judge.
        """
        if self.feedback is None:
            return batch["label"]
        prompts = batch["prompts"] * 2
        if "originals" in batch:
            scores = score_each(self.feedback, batch["originals"], prompts)
        elif "images" in batch:
            scores = self.feedback(batch["images"] / 2 + 0.5, prompts)
        else:
            raise ValueError(
                "model.feedback judges images, but those of a cache are not read at all. Have them scored once, by "
                "`python main.py cache --rewards`, and set `data.init_args.labels_from` instead of feedback."
            )
        return pseudo_label(*scores.to(batch["label"]).chunk(2), self.feedback_threshold)

    def draw_timesteps(self, n: int) -> Tensor:
        """(n,) training timesteps."""
        if self.timesteps is None:
            return self.backbone.sample_timesteps(n)
        choices = torch.tensor(self.timesteps, device=self.device)
        return choices[torch.randint(len(choices), (n,), device=self.device)]

    @torch.no_grad()
    def noised_pixels(self, batch: PairBatch, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the diffusion model takes the noised images of each pair to be, ready for the CLIP.

        Args:
            batch: B pairs.
            latents: (2B, C, h, w) of their images.
            noise: (B, C, h, w), the same for both images of a pair, so that only the images differ.
            t: (B,) timesteps, likewise.

        Returns:
            (2B, 3, S, S) float32.
        """
        condition = self.backbone.condition(batch, batch["prompts"])
        negative = self.backbone.as_negative(self.backbone.condition(batch, [""]))
        t = repeat_pair(t)
        x_t, _ = self.backbone.add_noise(latents, repeat_pair(noise), t)
        parts = []
        for rows in torch.arange(len(x_t), device=t.device).split(self.backbone.chunk_size):
            x = x_t[rows]
            if self.input_kind == "x0_estimate":
                prediction = self.backbone.predict_guided(
                    x, t[rows], condition[rows], negative[rows], self.guidance_scale
                )
                x = self.backbone.to_x0(prediction, x, t[rows])
            parts.append(pixels_for_spm(self.decode(x), "training", **self.image_settings))
        return torch.cat(parts)

    @torch.no_grad()
    def clean_pixels(self, batch: PairBatch) -> Tensor:
        """(2B, 3, S, S) of the images as they are; of cached ones, as the decoder gives them back."""
        images = batch.get("images")
        if images is None:
            moments = batch["moments"]
            images = self.decode(self.backbone.sample_latents(moments, torch.zeros_like(moments.chunk(2, dim=1)[0])))
        return pixels_for_spm(images, "training", **self.image_settings)

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) latents -> (N, 3, H, W) images, about [-1, 1]."""
        if self.tiny is None:
            return self.backbone.decode_latents(latents)
        with self.backbone.autocast():
            return self.tiny.decode(latents / self.tiny.config.scaling_factor).sample.float()

    def features(self, pixels: Tensor, prompts: list[str], t: Tensor) -> tuple[Tensor, Tensor]:
        """(2B, P) features of the images of B pairs at their (B,) timesteps, and (B, P) of their prompts."""
        t = repeat_pair(t if self.time_conditioning else torch.zeros_like(t))
        return self.model.encode_image(pixels, t), self.model.encode_text(self.tokenize(prompts).to(self.device))

    def contrast(self, image: Tensor, text: Tensor, label: Tensor, weight: Tensor) -> Tensor:
        """Weighted sum of `in_batch_loss` over the pairs of all ranks, whose features come with their gradients."""
        with torch.autocast(self.device.type, enabled=False):
            features = [F.normalize(part.float(), dim=-1) for part in (*image.chunk(2), text)]
            first, second, text = (self.all_gather(part, sync_grads=True).flatten(0, -2) for part in features)
            label, weight = (self.all_gather(part).flatten() for part in (label, weight))
            scale = self.model.logit_scale.float().exp()
            return (weight * in_batch_loss(torch.cat([first, second]), text, scale, label)).sum()

    # -------------------------------------------------------------------------------------------------- validation

    def on_validation_epoch_start(self) -> None:
        self.counts = torch.zeros(len(self.validation_timesteps), 3, device=self.device)

    def validation_step(self, batch: PairBatch, batch_idx: int) -> None:
        """Count the pairs that are ranked rightly at each timestep, with noise that belongs to pair and timestep."""
        label = self.labels(batch)
        counted = label != 0.5 if self.validation_ties == "drop" else torch.ones_like(label, dtype=torch.bool)
        if max(self.validation_timesteps) > 0:
            moments = batch["moments"] if "moments" in batch else self.backbone.encode_moments(batch["images"])
            like = moments.chunk(2, dim=1)[0]
            images = [f"{name}/{which}" for which in (0, 1) for name in batch["ids"]]
            latents = self.backbone.sample_latents(moments, noise_of(images, "posterior", like))
        for row, step in enumerate(self.validation_timesteps):
            t = torch.full((len(label),), step, device=self.device)
            if step == 0 or self.input_kind == "clean":
                pixels, t = self.clean_pixels(batch), torch.zeros_like(t)
            else:
                pixels = self.noised_pixels(batch, latents, noise_of(batch["ids"], f"noise {step}", like), t)
            image, text = self.features(pixels, batch["prompts"], t)
            first, second = self.model.score(image, repeat_pair(text)).chunk(2)
            correct, equal = pair_correct(first, second, label, tie=0.5), first == second
            self.counts[row] += torch.stack([part[counted].sum() for part in (correct, equal, counted)])

    def on_validation_epoch_end(self) -> None:
        """Log accuracy at each timestep and over all of them: exact over all ranks, every pair once."""
        correct, equal, pairs = self.trainer.strategy.reduce(self.counts, reduce_op="sum").unbind(1)
        if not pairs.any():
            raise ValueError(
                "There is no pair to validate on: all labels are ties, which validation_ties: drop leaves out."
            )
        accuracy = correct / pairs
        metrics = {f"val/accuracy_t{t}": a for t, a in zip(self.validation_timesteps, accuracy, strict=True)}
        metrics["val/accuracy"] = accuracy.mean()
        # Of each timestep; that of the mean is smaller, by how much depends on how the timesteps agree.
        metrics["val/standard_error"] = (accuracy * (1 - accuracy) / pairs).sqrt().mean()
        metrics["val/equal_scores"] = (equal / pairs).mean()
        metrics["val/pairs"] = pairs[0]
        self.log_dict(metrics, sync_dist=True)

    # ---------------------------------------------------------------------------------------------- no images to make

    def on_test_start(self) -> None:
        raise ValueError(
            "StepPreferenceModel makes no images to test. Its accuracy is measured by `python main.py validate`; as a "
            "scorer of images it is lightning_modules.rewards.step_preference.StepPreference."
        )

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        raise ValueError("StepPreferenceModel makes no images; `predict` is for methods that train a denoiser.")


def noise_of(names: list[str], purpose: str, like: Tensor) -> Tensor:
    """Standard normal noise that depends on name and purpose only, not on batch, rank or run.

    Args:
        names: N names.
        purpose: What it is for.
        like: Has the shape of one sample behind its first dimension, the device and the type.

    Returns:
        (N, ...) noise.
    """
    draws = []
    for name in names:
        generator = torch.Generator().manual_seed(batch_seed(0, f"{name} {purpose}", 0))
        draws.append(torch.randn(like.shape[1:], generator=generator))
    return torch.stack(draws).to(like.device, torch.float32)


def load_tiny_decoder(path: str, latent_channels: int) -> nn.Module:
    """A small decoder, frozen.

    Raises:
        ValueError: if it is not for latents of so many channels.
    """
    from diffusers import AutoencoderTiny

    tiny = load_component(AutoencoderTiny, path, "vae").requires_grad_(False).eval()
    if tiny.config.latent_channels != latent_channels:
        raise ValueError(
            f"model.tiny_decoder: {path!r} decodes {tiny.config.latent_channels} channels, but the latents have "
            f"{latent_channels}; expected the small decoder of the same family."
        )
    return tiny
