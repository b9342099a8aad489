"""DMDR: distribution matching distillation together with rewards, for generators of few steps (arXiv:2511.13649).

A student learns to make in one to four steps what its teacher makes in many. A fake score, which is continually fitted
to the student's own samples, says where they lie; the difference to the teacher says where they should go; rewards say
what people like besides. Teacher and fake score are one network: the fake is its adapter, the teacher the same network
with less and less of it.
"""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer, do_nothing_closure
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from peft import LoraConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from datamodules.batches import TrainingPrompts
from lightning_modules.backbones.base import SCORE, Backbone, Conditioning, check_lora
from lightning_modules.base import AlignmentModule, batch_seed, configured_learning_rate
from lightning_modules.functional.few_step import FewStepSampler, SamplerMode, clean_estimate
from lightning_modules.functional.noise import add_noise, draw_noise, per_sample, per_sample_mse
from lightning_modules.functional.scores import reward_hinge
from lightning_modules.rewards.base import Reward

Simulation = Literal["published", "dmd2"]
Renoise = Literal["beta", "uniform"]
# What the student is trained on: `x_in` (B, C, h, w) and `t` (B,), its input; `x0` (B, C, h, w), its sample, which the
# fake score is fitted to.
Sample = dict[str, Tensor]
BUCKET = 2**25  # elements of gradients that the ranks exchange at once
FIRST_TIME = 0.001  # the smallest renoise time: below the end of a flow's trajectory the direction would be reversed


def distribution_matching(x0: Tensor, x0_teacher: Tensor, x0_fake: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the student's samples from where the fake score sees them to where the teacher does.

        D = (x0_fake - x0_teacher) / (mean over C, h, w of |x0 - x0_teacher| + 1e-8)
        loss = 1/2 mean over C, h, w of (x0 - stopgrad(x0 - D))^2,  so that d(mean loss) / d(x0) = D / numel

    Everything is float32: in float16 the 1e-8 would be 0. Where the teacher or the fake score is NaN or infinite,
    D is 0: such a sample teaches nothing, and is counted.

    Args:
        x0: (B, C, h, w) the student's clean samples, with gradient.
        x0_teacher: (B, C, h, w) what the teacher takes the noised samples to be.
        x0_fake: (B, C, h, w) what the fake score takes them to be.

    Returns:
        (B,) loss, (B, C, h, w) direction D without gradient, and the number of its values that were replaced.
    """
    x0, x0_teacher, x0_fake = x0.float(), x0_teacher.detach().float(), x0_fake.detach().float()
    sample = x0.detach()
    scale = (sample - x0_teacher).abs().flatten(1).mean(1) + 1e-8
    direction = ((sample - x0_teacher) - (sample - x0_fake)) / per_sample(scale, sample)
    finite = direction.isfinite()
    direction = torch.where(finite, direction, 0.0)
    loss = 0.5 * (x0 - (sample - direction)).square().flatten(1).mean(1)
    return loss, direction, finite.logical_not().sum()


def dynamic_decay(step: int, dynamic_steps: int) -> float:
    """c = 1/2 (1 + cos(pi min(step / dynamic_steps, 1))): 1 at first, 0 after the dynamic phase; 1 if there is none."""
    if dynamic_steps == 0:
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * min(step / dynamic_steps, 1.0)))


def teacher_scale_at(step: int, dynamic_steps: int, start: float) -> float:
    """Dynamic distribution guidance: the strength of the fake score's adapter in the teacher.

        s(g) = start c while g < dynamic_steps, else 0

    The teacher begins near the fake score and drifts to the pure base.

    Args:
        step: g, generator updates done.
        dynamic_steps: Length of the dynamic phase; 0 means that there is none, so that the scale is 0.
        start: Scale at the start.
    """
    return start * dynamic_decay(step, dynamic_steps) if step < dynamic_steps else 0.0


def renoise_law_at(step: int, dynamic_steps: int, alpha: float, beta: float) -> tuple[float, float]:
    """Dynamic renoise sampling: alpha and beta of the Beta law of renoise times.

        alpha(g) = 1 + (alpha - 1) c,  beta(g) = 1 + (beta - 1) c

    With (4, 1.5) it begins at high noise (mean 0.73) and ends uniform. Without a dynamic phase it stays what it is.
    """
    decay = dynamic_decay(step, dynamic_steps)
    return 1.0 + (alpha - 1.0) * decay, 1.0 + (beta - 1.0) * decay


def uniform_times(draws: Tensor) -> Tensor:
    """(n,) uniform draws in [0, 1] -> (n,) renoise times 0.001 + 0.999 u."""
    return FIRST_TIME + (1.0 - FIRST_TIME) * draws


def draw_renoise_times(n: int, law: Renoise, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """(n,) float32 renoise times in [0.001, 1], drawn on the CPU.

    Args:
        n: Number of samples.
        law: "uniform", or "beta" for Beta(alpha, beta), which the published code calls logit_normal.
        alpha: Above 0.
        beta: Above 0.

    Raises:
        ValueError: for an unknown law.
    """
    if law == "uniform":
        return uniform_times(torch.rand(n, device="cpu"))
    if law == "beta":
        draws = torch.distributions.Beta(torch.tensor(alpha), torch.tensor(beta)).sample((n,))
        # Differs: the published code keeps smaller ones, where the direction of a flow is reversed.
        return draws.clamp(FIRST_TIME, 1.0)
    raise ValueError(f"Unknown law of renoise times {law!r}; known are uniform and beta.")


def generator_input(
    x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor, first: Tensor, pure_noise: Tensor
) -> Tensor:
    """What the student is given at its drawn step: its own sample, noised; pure noise at the first step.

        x_in = alpha x0 + sigma noise

    Args:
        x0: (B, C, h, w) samples, predicted AT the drawn step, as published (or at the end of the trajectory).
        noise: (B, C, h, w) unit noise.
        alpha: (B,) signal coefficient of the drawn step.
        sigma: (B,) its noise coefficient.
        first: (B,) bool, whether the drawn step is the first one.
        pure_noise: (B, C, h, w) unit noise for those.
    """
    return torch.where(per_sample(first, x0), pure_noise, add_noise(x0, noise, alpha, sigma))


def updates_generator(inner_step: int, ratio: int) -> bool:
    """Whether the student is updated in inner step i: every `ratio`-th, and not the very first."""
    return inner_step > 0 and inner_step % ratio == 0


def draw_guidance(scale: float, jitter: float) -> float:
    """The teacher's guidance scale of one micro-batch, w ~ U(scale - jitter, scale + jitter); 1 or less as it is."""
    return scale + jitter * (2.0 * float(torch.rand((), device="cpu")) - 1.0) if scale > 1.0 else scale


def average_gradients(parameters: list[nn.Parameter], bucket: int = BUCKET) -> None:
    """Average the gradients of one network over the ranks, in flat buckets; parameters without one are left out.

    Args:
        parameters: The same on every rank, and with gradients of the same ones.
        bucket: Elements exchanged at once; a larger gradient goes alone.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    while gradients:
        number, elements = 1, gradients[0].numel()
        while number < len(gradients) and elements + gradients[number].numel() <= bucket:
            elements += gradients[number].numel()
            number += 1
        together, gradients = gradients[:number], gradients[number:]
        flat = torch.cat([gradient.flatten() for gradient in together])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        parts = flat.split([gradient.numel() for gradient in together])
        torch._foreach_copy_(together, [part.view_as(gradient) for part, gradient in zip(parts, together, strict=True)])


def append_json_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Append one JSON object per line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


class DMDR(AlignmentModule):
    """DMDR: distil a diffusion model to one to four steps, and raise rewards on the way.

    Every batch is an inner step: the student makes samples, the fake score is fitted to them; every `ratio`-th time the
    student is updated too. `max_steps`, checkpoints and logs count updates of the student, the generator. The first
    stage (cold start) matches distributions only; the second one starts from its weights, with rewards.

    Args:
        backbone: The model to distil. With `lora`, the student is its adapters, and one frozen network serves all
            roles; without, the student is all its weights, and the score network is a second, frozen one.
            `guidance_scale` and `num_inference_steps` are those of the multi-step teacher's images.
        score_lora: Settings of the fake score's adapter, published with rank and alpha 32.
        num_steps: n, steps of the student.
        sampler: "sde" adds fresh noise between the steps; "ode" follows the predicted noise, as published for SD3.
        shift: Moves the student's times toward noise; published: 3 for SD3-medium, 5 for SD3.5-large.
        end_time: Of flows: the time at which a sample is taken to be clean; published: 0.001 for SD3, 0 for SiT.
        timesteps: The student's timesteps, in the model's own unit and decreasing, instead of the published ones.
        simulation: "published" noises the sample that was predicted at the drawn step; "dmd2" gives the student what it
            meets when it samples, and fits the fake score to what it makes of that, after the student's update.
        shared_step: Draw one step for all samples of an inner step, of all GPUs, as DMD2 does, instead of one for each:
            with "sde" the simulation stops there, which saves (n - 1) / 2 of n passes. Null shares it where that saves
            something.
        ratio: R, inner steps for one update of the student.
        fake_scale: Strength of the score adapter as the fake score.
        teacher_scale: Its strength in the teacher at the start of the dynamic phase.
        dynamic_steps: Generator updates over which teacher and renoise times change; 0 for no dynamic phase: the
            teacher is the base, and a Beta law stays as it is.
        renoise: Law of renoise times: "beta" (called logit_normal in the published code) or "uniform".
        renoise_alpha: Of the Beta law at the start.
        renoise_beta: Of the Beta law at the start.
        guidance_scale: Of the teacher; 1 or less switches it off.
        guidance_jitter: Half width of the interval from which it is drawn for each micro-batch.
        pipeline_negative: Guide away from what the pipeline uses without a negative prompt (zeros for SDXL), instead of
            the encoded empty prompt, as published.
        dm_weight: Weight of distribution matching; 0 leaves rewards alone (which collapses: for comparison).
        rewards: Name -> differentiable reward of the student's images.
        reward_weights: Name -> weight, for the same names.
        hinge: A reward's loss is relu(hinge - score), so that nothing is gained beyond it; null: -score.
        relative: Names of rewards that are scored relatively, as SRPO does (HPSv2 can): against a wanted and an
            unwanted word before the prompt.
        wanted_words: One is drawn for each micro-batch.
        unwanted_words: One is drawn for each micro-batch.
        srpo_k: What is left of the plain score.
        cold_start_steps: Generator updates before the rewards join in, within one run.
        straight_through: Let gradients pass where an image leaves [0, 1]; otherwise saturated pixels have none.
        reward_vae: Folder or hub id of an AutoencoderTiny, such as madebyollin/taesdxl, that decodes what rewards see:
            little compute and memory, and no overflow in float16. Null takes the model's own.
        micro_batch_size: Prompts of one pass through the networks; a batch is split into such parts, and each network
            is stepped once for all of them. Null takes the whole batch.
        gradient_clip_val: Largest norm of each network's gradient; null does not clip.
        start_weights: File of weights that a student without `lora` starts from, in place of the base's, which the
            score network keeps: DMD2's one-step SDXL (.bin), or another state dict of the denoiser.
        start_from: Checkpoint (.ckpt) of another run of the same model, usually the cold start's: its weights are where
            this run starts. Learning rates are this run's.
        keep_optimizers: Take over that run's optimizer states too.
        optimizer: Of the student.
        score_optimizer: Of the fake score.
    """

    replaces = {
        "gradient_clip_val": "gradient_clip_val",
        "accumulate_grad_batches": "micro_batch_size, and a larger data.batch_size",
    }

    def __init__(
        self,
        backbone: Backbone,
        score_lora: LoraConfig,
        num_steps: int = 4,
        sampler: SamplerMode = "sde",
        shift: float = 1.0,
        end_time: float = 0.001,
        timesteps: list[float] | None = None,
        simulation: Simulation = "published",
        shared_step: bool | None = None,
        ratio: int = 5,
        fake_scale: float = 2.0,
        teacher_scale: float = 0.5,
        dynamic_steps: int = 2000,
        renoise: Renoise = "beta",
        renoise_alpha: float = 4.0,
        renoise_beta: float = 1.5,
        guidance_scale: float = 7.0,
        guidance_jitter: float = 0.5,
        pipeline_negative: bool = False,
        dm_weight: float = 1.0,
        rewards: dict[str, Reward] | None = None,
        reward_weights: dict[str, float] | None = None,
        hinge: float | None = 0.7,
        relative: list[str] | None = None,
        wanted_words: tuple[str, ...] = ("Natural-lighting", "Detailed", "Realistic"),
        unwanted_words: tuple[str, ...] = ("Painting", "CG Render", "Oil"),
        srpo_k: float = 0.1,
        cold_start_steps: int = 0,
        straight_through: bool = False,
        reward_vae: str | None = None,
        micro_batch_size: int | None = None,
        gradient_clip_val: float | None = 1.0,
        start_weights: str | None = None,
        start_from: str | None = None,
        keep_optimizers: bool = False,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.01),
        score_optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=5e-7, weight_decay=0.0),
    ) -> None:
        super().__init__(backbone, optimizer)
        rewards, reward_weights, relative = rewards or {}, reward_weights or {}, relative or []
        times = timesteps or [1.0]
        for name, holds, expected in (
            ("score_lora", score_lora is not None, "the adapter's settings: without it teacher and fake score are one"),
            ("num_steps", num_steps >= 1, "1 or more"),
            ("sampler", sampler in get_args(SamplerMode), f"one of {', '.join(get_args(SamplerMode))}"),
            ("shift", shift > 0.0, "a positive number; 1 changes nothing"),
            ("end_time", 0.0 <= end_time < 1.0, "a time in [0, 1)"),
            ("timesteps", timesteps is None or len(timesteps) == num_steps, f"{num_steps} numbers, or null"),
            ("timesteps", all(a > b > 0 for a, b in zip(times, times[1:], strict=False)), "decreasing numbers above 0"),
            ("simulation", simulation in get_args(Simulation), f"one of {', '.join(get_args(Simulation))}"),
            ("ratio", ratio >= 1, "1 or more inner steps"),
            ("fake_scale", fake_scale > 0.0, "a positive number: without the adapter the fake score is the teacher"),
            ("teacher_scale", teacher_scale >= 0.0, "0 or more"),
            ("dynamic_steps", dynamic_steps >= 0, "0 or more generator updates"),
            ("renoise", renoise in get_args(Renoise), f"one of {', '.join(get_args(Renoise))}"),
            ("renoise_alpha", renoise_alpha > 0.0, "a positive number"),
            ("renoise_beta", renoise_beta > 0.0, "a positive number"),
            ("guidance_jitter", 0.0 <= guidance_jitter < max(guidance_scale, 1.0), "0 or more, less than the guidance"),
            ("dm_weight", dm_weight > 0.0 or (dm_weight == 0.0 and rewards), "a positive number; 0 needs rewards"),
            ("reward_weights", rewards.keys() == reward_weights.keys(), f"a weight for each of {sorted(rewards)}"),
            ("relative", set(relative) <= rewards.keys(), f"names of rewards, of {sorted(rewards)}"),
            ("wanted_words", len(wanted_words) >= 1, "one or more"),
            ("unwanted_words", len(unwanted_words) >= 1, "one or more"),
            ("cold_start_steps", cold_start_steps >= 0, "0 or more generator updates"),
            ("cold_start_steps", cold_start_steps == 0 or dm_weight > 0, "0 where dm_weight is 0: nothing would train"),
            ("micro_batch_size", micro_batch_size is None or micro_batch_size >= 1, "1 or more prompts, or null"),
            ("gradient_clip_val", gradient_clip_val is None or gradient_clip_val > 0.0, "a positive number, or null"),
            ("reward_vae", reward_vae is None or bool(rewards), "null where there are no rewards"),
            ("start_weights", start_weights is None or backbone.lora is None, "null, as backbone.lora is set"),
            ("start_weights", start_weights is None or start_from is None, "null, as start_from has the weights"),
            ("keep_optimizers", start_from is not None or not keep_optimizers, "false where start_from is null"),
        ):
            if not holds:
                raise ValueError(f"model.{name} is {locals()[name]!r}; expected {expected}.")
        for name, reward in rewards.items():
            if not reward.differentiable:
                raise ValueError(
                    f"model.rewards.{name}: {type(reward).__name__} gives no gradient with these settings; the student "
                    "learns by the gradient of its images. Rewards with a network have preprocessing: differentiable."
                )
            if name in relative and not hasattr(reward, "relative"):
                raise ValueError(
                    f"model.relative: {type(reward).__name__} ({name}) has no relative score; HPSv2 has one."
                )
        check_lora(score_lora, "model.score_lora")
        self.automatic_optimization = False  # two networks, one of them at every R-th batch only
        backbone.few_step = FewStepSampler(
            num_steps, sampler, shift, end_time, None if timesteps is None else tuple(timesteps)
        )
        self.score_lora = score_lora
        self.simulation = simulation
        self.shared_step = sampler == "sde" if shared_step is None else shared_step
        self.ratio = ratio
        self.fake_scale = fake_scale
        self.teacher_scale = teacher_scale
        self.dynamic_steps = dynamic_steps
        self.renoise: Renoise = renoise
        self.renoise_alpha = renoise_alpha
        self.renoise_beta = renoise_beta
        self.guidance_scale = guidance_scale
        self.guidance_jitter = guidance_jitter
        self.pipeline_negative = pipeline_negative
        self.dm_weight = dm_weight
        self.rewards = nn.ModuleDict({name: reward.eval().requires_grad_(False) for name, reward in rewards.items()})
        self.reward_weights = reward_weights
        self.hinge = hinge
        self.relative = relative
        self.wanted_words = wanted_words
        self.unwanted_words = unwanted_words
        self.srpo_k = srpo_k
        self.cold_start_steps = cold_start_steps
        self.straight_through = straight_through
        self.reward_vae = reward_vae
        self.micro_batch_size = micro_batch_size
        self.gradient_clip_val = gradient_clip_val
        self.start_weights = start_weights
        self.start_from = start_from
        self.keep_optimizers = keep_optimizers
        self.score_optimizer = score_optimizer

        self.inner_draws: torch.Generator | None = None  # what all ranks and micro-batches draw alike
        self.averages = False  # whether the ranks' gradients are averaged here, by `average_gradients`
        self.last_part = True  # whether the optimizers are stepped after this micro-batch
        # Under DeepSpeed, which has one optimizer, the student's: the fake score's, and its own loss scale for float16.
        self.fake_optimizer: torch.optim.Optimizer | None = None
        self.fake_scaler: torch.amp.GradScaler | None = None
        self.withheld: list[tuple[nn.Parameter, Tensor]] = []  # and what is kept from its engine, which casts it
        self.norm: Tensor | None = None  # of the gradient that was stepped last
        self.inner_step = 0  # begun
        self.generator_step = 0  # updates of the student done
        self.negative: Conditioning | None = None
        self.since_update: list[Tensor] = []  # the fake score's losses since the student's last update
        self.losses: dict[str, list[tuple[int, int, dict[str, Tensor]]]] = {"gui": [], "gen": []}  # not yet written

    # -------------------------------------------------------------------------------------------------- preparation

    def setup(self, stage: str) -> None:
        """Load the rewards before the networks: a wrong weight file is told of at once.

        Raises:
            ValueError: if the data are not prompts, or the strategy cannot be used.
        """
        if stage != "fit":
            return
        self.check_strategy()
        data = self.trainer.datamodule
        if data is not None and not hasattr(data, "visits"):
            raise ValueError(
                f"data.class_path is {type(data).__name__}; DMDR makes its own images and needs prompts only: use "
                "datamodules.prompt_stream.PromptStream."
            )
        batch_size = getattr(data, "batch_size", None)
        if self.micro_batch_size is not None and batch_size is not None and batch_size % self.micro_batch_size:
            raise ValueError(
                f"model.micro_batch_size is {self.micro_batch_size} and data.batch_size {batch_size}; expected a part "
                "that divides it: every micro-batch counts the same in the mean."
            )
        if self.start_weights is not None and not Path(self.start_weights).is_file():
            raise ValueError(
                f"model.start_weights: there is no file {self.start_weights!r} (looked in {Path.cwd()}); expected the "
                "downloaded weights of a denoiser, such as DMD2's one-step SDXL."
            )
        if self.start_from is not None and Path(self.start_from).is_dir():
            raise ValueError(
                f"model.start_from: {self.start_from!r} is a folder, as DeepSpeed writes them; make a file of it "
                "with Lightning's convert_zero_checkpoint_to_fp32_state_dict(folder, file) of "
                "lightning.pytorch.utilities.deepspeed."
            )
        if self.start_from is not None and not Path(self.start_from).is_file():
            raise ValueError(
                f"model.start_from: there is no file {self.start_from!r} (looked in {Path.cwd()}); expected a "
                "checkpoint (.ckpt) of a run of this model, usually the cold start's."
            )
        for reward in self.rewards.values():
            reward.load()
        self.rewards.requires_grad_(False)

    def check_strategy(self) -> None:
        """Stop where the Trainer's strategy cannot train two networks as they are to be trained.

        Raises:
            ValueError: naming the strategy and the setting.
        """
        strategy = self.trainer.strategy
        if isinstance(strategy, FSDPStrategy):
            raise ValueError(
                "trainer.strategy is FSDP's first version, which clips the gradients of both networks as one; use "
                "FSDP2 (cli_configs/trainer/fsdp2.yaml) or DDP (ddp.yaml)."
            )
        whole = self.backbone.few_step.mode == "ode" and self.simulation == "published"
        if isinstance(strategy, ModelParallelStrategy) and not (self.shared_step or whole):
            raise ValueError(
                "model.shared_step is false, and trainer.strategy FSDP2 (ModelParallelStrategy), under which all ranks "
                "have to ask the network equally often; set model.shared_step: true, or use DDP."
            )
        if not isinstance(strategy, DeepSpeedStrategy):
            return
        if strategy.config.get("zero_optimization", {}).get("stage") == 3:
            raise ValueError(
                "trainer.strategy is DeepSpeed with ZeRO stage 3, which splits the fake score's weights, that its one "
                "engine does not train; use stage 2 (cli_configs/trainer/zero2.yaml) or FSDP2 (fsdp2.yaml)."
            )
        if self.keep_optimizers:
            raise ValueError(
                "model.keep_optimizers: DeepSpeed cannot read another run's optimizer states; set it to false, or "
                "continue that run itself with --ckpt_path."
            )
        clip = self.gradient_clip_val or 0.0
        if strategy.config.setdefault("gradient_clipping", clip) != clip:
            raise ValueError(
                f"DeepSpeed's gradient_clipping is {strategy.config['gradient_clipping']} and model.gradient_clip_val "
                f"{self.gradient_clip_val}; leave the first one out."
            )

    def visits_per_batch(self, batch_size: int) -> int:
        """A batch of prompts is used once; see `PromptStream`."""
        return 1

    def load_networks(self, fingerprint: bool) -> None:
        super().load_networks(fingerprint)
        self.backbone.add_score(self.score_lora, self.fake_scale)
        if self.reward_vae is not None and self.trainer.state.fn == "fit":
            self.backbone.load_tiny_vae(self.reward_vae)
        if self.start_weights is not None and self.trainer.state.fn == "fit":
            self.backbone.load_start_weights(self.start_weights)
        if self.start_from is not None and self.trainer.state.fn == "fit":
            checkpoint = torch.load(self.start_from, map_location="cpu", weights_only=True)
            self.check_trained(checkpoint)
            self.check_scale(checkpoint["limelight"])
            fake = checkpoint["limelight"].get("fake", {"weights": {}})  # DeepSpeed converts what its engine trains
            self.load_state_dict(checkpoint["state_dict"] | fake["weights"], strict=False)
            rank_zero_info(f"Starting from the weights of {self.start_from}")
        # DDP would broadcast what every rank has read from the same files, and reserve buckets as large as everything
        # that is trained for an exchange that `average_gradients` makes; it wants one parameter.
        names = [name for name, _ in [*self.named_parameters(), *self.named_buffers()]]
        names.remove(next(iter(self.trained_parameters())))
        self._ddp_params_and_buffers_to_ignore = names

    def network_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """What is trained of the student, and of the fake score."""
        score = {id(parameter) for parameter in self.backbone.score_parameters()}
        trained = self.trained_parameters().values()
        return [p for p in trained if id(p) not in score], [p for p in trained if id(p) in score]

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The student's and the fake score's, with constant learning rates; to DeepSpeed, the student's alone."""
        student, fake = self.network_parameters()
        optimizers = [self.optimizer(student), self.score_optimizer(fake)]
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            # A second parameter group of the engine's optimizer would move without a gradient, by decay and moments.
            self.fake_optimizer = optimizers.pop()
            half = self.backbone.compute_dtype == torch.float16
            self.fake_scaler = torch.amp.GradScaler(self.trainer.strategy.root_device.type, enabled=half)
            # The engine comes next; it casts every weight to half precision, and sends it to all ranks.
            trained = {id(parameter) for parameter in student}
            self.withheld = [(p, p.data) for p in self.parameters() if id(p) not in trained]
            for parameter, data in self.withheld:
                parameter.data = data.new_empty(0)
        return optimizers

    def on_fit_start(self) -> None:
        for parameter, data in self.withheld:
            parameter.data = data.to(self.device)
        self.withheld = []

    def on_train_start(self) -> None:
        if self.keep_optimizers and self.inner_step == 0:
            states = torch.load(self.start_from, map_location="cpu", weights_only=True)["optimizer_states"]
            for optimizer, state in zip(self.trainer.optimizers, states, strict=True):
                optimizer.load_state_dict(state)
        super().on_train_start()
        self.averages = isinstance(self.trainer.strategy, DDPStrategy)
        if self.fake_optimizer is not None:
            self.trainer.model.optimizer.clip_grad = self.gradient_clip_val or 0.0  # not the checkpoint's
        self.since_update = [loss.to(self.device) for loss in self.since_update]
        grid = self.backbone.few_step_timesteps
        alpha, _ = self.backbone.coefficients(self.backbone.timesteps_at(torch.ones(1)))
        if self.backbone.prediction_type == "epsilon" and not alpha > 0:
            raise ValueError(
                f"The schedule of {self.backbone.pretrained!r} ends in pure noise, where a noise prediction says "
                "nothing about the image: models such as SDXL-Turbo cannot be distilled with it."
            )
        rank_zero_info(f"The student's timesteps: {', '.join(f'{t:g}' for t in grid.tolist())}")

    def _apply_configured_learning_rate(self) -> None:
        """After a resume, or with kept optimizer states: the rates of this run's config."""
        rates = (configured_learning_rate(self.optimizer), configured_learning_rate(self.score_optimizer))
        optimizers = self.trainer.optimizers + ([] if self.fake_optimizer is None else [self.fake_optimizer])
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                if group["lr"] != rate:
                    rank_zero_info(f"Learning rate {rate:.4g} instead of the checkpoint's {group['lr']:.4g}.")
                    group["lr"] = rate

    # ----------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: TrainingPrompts, batch_idx: int) -> None:
        prompts = batch["prompts"]
        size = self.micro_batch_size or len(prompts)
        parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        optimizers = self.optimizers()
        student, fake = optimizers if self.fake_optimizer is None else (optimizers, self.fake_optimizer)
        turn = updates_generator(self.inner_step, self.ratio)
        fake_losses, terms, samples = [], [], []

        if self.simulation == "published":  # first the fake score, then the student, which makes another sample
            for number, part in enumerate(parts):
                self.seed_part("fake", number, len(parts))
                condition = self.backbone.encode_prompts(part)
                sample = self.simulate(condition, len(part))
                fake_losses.append(self.train_fake(sample["x0"], condition, len(parts)))
                samples.append((sample, condition, part))
            self.step_fake(fake, torch.stack(fake_losses).mean())
            for number, (sample, condition, part) in enumerate(samples if turn else []):
                self.seed_part("student", number, len(parts))
                x0 = self.student(sample, condition)
                terms.append(self.train_student(x0, condition, part, len(parts)))
            if turn:
                self.step_student(student)
        else:  # first the student; what it makes of its input serves the fake score as well
            for number, part in enumerate(parts):
                self.seed_part("student", number, len(parts))
                condition = self.backbone.encode_prompts(part)
                sample = self.simulate(condition, len(part))
                with torch.set_grad_enabled(turn):
                    x0 = self.student(sample, condition)
                if turn:
                    terms.append(self.train_student(x0, condition, part, len(parts)))
                samples.append((x0.detach(), condition))
            torch.clear_autocast_cache()
            if turn:
                self.step_student(student)
            for number, (x0, condition) in enumerate(samples):
                self.seed_part("fake", number, len(parts))
                fake_losses.append(self.train_fake(x0, condition, len(parts)))
            self.step_fake(fake, torch.stack(fake_losses).mean())
        self.inner_step += 1
        if turn:
            self.log_update({name: torch.stack([term[name] for term in terms]).mean() for name in terms[0]})

    def seed_part(self, stage: str, number: int, parts: int) -> None:
        """Make the random numbers of a micro-batch a function of the run's seed and its place among all of them."""
        place = (self.inner_step * self.trainer.world_size + self.trainer.global_rank) * parts + number
        torch.manual_seed(batch_seed(self.run_seed, stage, place))
        self.last_part = number + 1 == parts
        self.inner_draws = torch.Generator().manual_seed(batch_seed(self.run_seed, "inner step", self.inner_step))

    @torch.no_grad()
    def simulate(self, condition: Conditioning, B: int) -> Sample:
        """Let the student sample from noise, and draw the step of each sample at which it is trained."""
        backbone = self.backbone
        grid = backbone.few_step_timesteps
        if self.shared_step:
            step = torch.randint(len(grid), (1,), generator=self.inner_draws).expand(B)
        else:
            step = torch.randint(len(grid), (B,), device="cpu")
        last = int(step.max())

        def draw() -> Tensor:
            return draw_noise(torch.empty(B, *backbone.latent_shape, device=backbone.device))

        rows, t = torch.arange(B), grid[step.to(grid.device)]
        if self.simulation == "dmd2":
            inputs, _ = backbone.sample_in_few_steps(draw(), condition, draw, last)
            sample = {"x_in": torch.stack(inputs)[step, rows], "t": t}
        else:
            whole = backbone.few_step.mode == "ode"  # the sample at the end is noised again, whatever the step
            _, clean = backbone.sample_in_few_steps(draw(), condition, draw, len(grid) if whole else last + 1)
            x0 = clean[-1] if whole else torch.stack(clean)[step, rows]
            first = (step == 0).to(x0.device)
            x_in = generator_input(x0, draw(), *backbone.coefficients(t), first, draw())
            sample = {"x_in": x_in, "t": t, "x0": x0}
        torch.clear_autocast_cache()  # weights that were cast without a gradient must not serve the losses
        return sample

    def student(self, sample: Sample, condition: Conditioning) -> Tensor:
        """The student's clean sample (B, C, h, w) at its drawn step, float32; no guidance."""
        return self.clean(self.backbone.predict(sample["x_in"], sample["t"], condition), sample["x_in"], sample["t"])

    def clean(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean sample that a prediction implies, (B, C, h, w) float32."""
        coefficients = self.backbone.coefficients(t)
        return clean_estimate(self.backbone.prediction_type, prediction, x_t, *coefficients, self.backbone.few_step.end)

    def draw_timesteps(self, n: int) -> Tensor:
        """(n,) timesteps at which samples are noised for the scores, in the backbone's unit."""
        law = renoise_law_at(self.generator_step, self.dynamic_steps, self.renoise_alpha, self.renoise_beta)
        return self.backbone.timesteps_at(draw_renoise_times(n, self.renoise, *law))

    def train_fake(self, x0: Tensor, condition: Conditioning, parts: int) -> Tensor:
        """Fit the fake score to the student's samples: the loss of denoising them, backward included."""
        t = self.draw_timesteps(len(x0))
        x_t, target = self.backbone.add_noise(x0, draw_noise(x0), t)
        with self.backbone.role(SCORE, self.fake_scale):
            loss = per_sample_mse(self.backbone.predict(x_t, t, condition), target).mean()
            if self.fake_optimizer is None:
                self.manual_backward(loss / parts)
            else:
                self.fake_scaler.scale(loss / parts).backward()
        return loss.detach()

    def train_student(self, x0: Tensor, condition: Conditioning, prompts: list[str], parts: int) -> dict[str, Tensor]:
        """Distribution matching and rewards on the student's clean samples, backward included.

        Returns:
            What is logged of them, by name.
        """
        losses, logged = [], {}
        if self.generator_step >= self.cold_start_steps:
            for name, score in self.score_rewards(x0, prompts).items():
                loss = -score if self.hinge is None else reward_hinge(score, self.hinge)
                losses.append(self.reward_weights[name] * loss.mean())
                logged[name] = score.mean()
        if self.dm_weight > 0:
            t = self.draw_timesteps(len(x0))
            x_t, _ = self.backbone.add_noise(x0.detach(), draw_noise(x0), t)
            x0_teacher, x0_fake = self.query_scores(x_t, t, condition)
            loss, _, replaced = distribution_matching(x0, x0_teacher, x0_fake)
            losses.append(self.dm_weight * loss.mean())
            logged |= {"dmd": loss.mean(), "replaced": replaced.float()}
        total = torch.stack(losses).sum()
        self.manual_backward(total / parts)
        return {name: value.detach() for name, value in {"loss": total, **logged}.items()}

    @torch.no_grad()
    def query_scores(self, x_t: Tensor, t: Tensor, condition: Conditioning) -> tuple[Tensor, Tensor]:
        """What the teacher, with guidance, and the fake score, without, take noised samples to be, (B, C, h, w)."""
        backbone = self.backbone
        with backbone.role(SCORE, self.fake_scale):
            fake = self.clean(backbone.predict(x_t, t, condition), x_t, t)
        guidance = draw_guidance(self.guidance_scale, self.guidance_jitter)
        with backbone.role(SCORE, teacher_scale_at(self.generator_step, self.dynamic_steps, self.teacher_scale)):
            if guidance > 1:
                prediction = backbone.predict_guided(x_t, t, condition, self.negatives(len(x_t)), guidance)
            else:
                prediction = backbone.predict(x_t, t, condition)
            teacher = self.clean(prediction, x_t, t)
        torch.clear_autocast_cache()
        return teacher, fake

    def negatives(self, n: int) -> Conditioning:
        """The empty condition of n samples; it is encoded once."""
        if self.negative is None:
            empty = self.backbone.encode_prompts([""])
            self.negative = self.backbone.as_negative(empty) if self.pipeline_negative else empty
        return Conditioning.cat([self.negative] * n)

    def score_rewards(self, x0: Tensor, prompts: list[str]) -> dict[str, Tensor]:
        """Name -> (B,) score of the student's images, with gradient."""
        if not self.rewards:
            return {}
        images = self.backbone.decode_for_rewards(x0) / 2 + 0.5
        inside = images.clamp(0, 1)
        images = images + (inside - images).detach() if self.straight_through else inside
        words = (self.wanted_words, self.unwanted_words)
        wanted, unwanted = (choice[int(torch.randint(len(choice), (), device="cpu"))] for choice in words)
        scores = {}
        with torch.autocast(images.device.type, enabled=False):
            for name, reward in self.rewards.items():
                if name in self.relative:
                    scores[name] = reward.relative(images, prompts, wanted, unwanted, self.srpo_k)
                else:
                    scores[name] = reward(images, prompts)
        return scores

    # ------------------------------------------------------------------------------------------------ optimizer steps

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backward pass without DDP's exchange, which takes both networks for one and waits for all gradients."""
        model = self.trainer.model
        if self.fake_optimizer is not None:
            model.set_gradient_accumulation_boundary(self.last_part)
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            super().manual_backward(loss, *args, **kwargs)

    def exchange(self, optimizer: LightningOptimizer | torch.optim.Optimizer) -> None:
        """Average the stepped network's gradients over the ranks; before they are unscaled: all see an overflow."""
        if self.averages:
            average_gradients([parameter for group in optimizer.param_groups for parameter in group["params"]])

    def step_student(self, optimizer: LightningOptimizer) -> None:
        if self.fake_optimizer is None:
            self.exchange(optimizer)
        optimizer.step()
        if self.fake_optimizer is not None:  # the engine has exchanged and clipped
            self.norm = torch.as_tensor(self.trainer.model.get_global_grad_norm(), device=self.device)
        optimizer.zero_grad()
        self.generator_step += 1

    def step_fake(self, optimizer: LightningOptimizer | torch.optim.Optimizer, loss: Tensor) -> None:
        """Step the fake score, unseen by the Trainer, whose steps are the student's."""
        self.exchange(optimizer)
        if self.fake_optimizer is None:
            optimizer._on_before_step = optimizer._on_after_step = do_nothing_closure
            optimizer.step()
        else:
            self.fake_scaler.unscale_(optimizer)
            self.on_before_optimizer_step(optimizer)
            self.fake_scaler.step(optimizer)
            self.fake_scaler.update()
        optimizer.zero_grad()
        self.since_update.append(loss)
        self.losses["gui"].append((self.inner_step, self.generator_step, {"diff": loss, "gradient_norm": self.norm}))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip a network's gradient: it is unscaled, and averaged over the ranks, here."""
        if self.fake_optimizer not in (None, optimizer):
            return  # the engine clips
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.gradient_clip_val is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip_val, norm)
        self.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm

    # -------------------------------------------------------------------------------------------------------- logging

    def on_before_batch_transfer(self, batch: TrainingPrompts, dataloader_idx: int) -> TrainingPrompts:
        self.log_at_optimizer_steps()
        return batch

    def log_update(self, terms: dict[str, Tensor]) -> None:
        """Log an update of the student, and what the fake score lost since the one before."""
        terms["gradient_norm"] = self.norm
        self.losses["gen"].append((self.inner_step, self.generator_step, terms))
        terms = terms | {"fake_loss": torch.stack(self.since_update).mean()}
        self.since_update = []
        for name, value in terms.items():
            self.log(f"train/{name}", value, prog_bar=name in ("loss", "fake_loss"), sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: TrainingPrompts, batch_idx: int) -> None:
        turned = bool(self.losses["gen"]) and self.losses["gen"][-1][0] == self.inner_step
        if turned and self.generator_step % self.trainer.log_every_n_steps == 0:
            self.write_losses()

    def on_train_end(self) -> None:
        self.write_losses()

    def write_losses(self) -> None:
        """Append the losses that were kept to `loss_logs/` of the run's folder, means over the ranks.

        Raises:
            ValueError: if a loss is not finite.
        """
        rows = [row for kept in self.losses.values() for row in kept]
        if not rows:
            return
        values = torch.stack([value.float() for *_, terms in rows for value in terms.values()])
        numbers = iter(self.trainer.strategy.reduce(values, reduce_op="mean").tolist())
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "loss_logs"
        for network, kept in self.losses.items():
            lines = [
                {"in_s": inner, "glo_s": step, **{name: next(numbers) for name in terms}} for inner, step, terms in kept
            ]
            self.losses[network] = []
            if self.trainer.is_global_zero:
                append_json_lines(folder / f"loss_{network}_log.jsonl", lines)
            for line in lines:
                for name in ("diff", "loss"):
                    if not math.isfinite(line.get(name, 0.0)):
                        raise ValueError(
                            f"The {'fake score' if network == 'gui' else 'student'} lost {line[name]} at inner step "
                            f"{line['in_s']}. Lower the learning rates, or use bf16-mixed instead of 16-mixed "
                            "precision; then resume from the last checkpoint with --ckpt_path."
                        )

    # -------------------------------------------------------------------------------------------- checkpoints, resume

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the counters, and the score adapter's strength: without it the adapter is not the fake score."""
        super().on_save_checkpoint(checkpoint)
        about = checkpoint["limelight"]
        about["inner_step"] = self.inner_step
        about["generator_step"] = self.generator_step
        about["fake_scale"] = self.fake_scale
        about["since_update"] = [self._rank_mean(loss) for loss in self.since_update]
        if self.fake_optimizer is not None:  # DeepSpeed writes and converts what its engine trains
            score = {id(parameter) for parameter in self.backbone.score_parameters()}
            about["fake"] = {
                "optimizer": self.fake_optimizer.state_dict(),
                "scaler": self.fake_scaler.state_dict(),
                "weights": {n: p.detach().cpu() for n, p in self.trained_parameters().items() if id(p) in score},
            }
        if self._trainer is not None and self.trainer.training:
            self.write_losses()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        about = checkpoint["limelight"]
        self.inner_step = about["inner_step"]
        self.generator_step = about["generator_step"]
        self.since_update = about["since_update"]
        self.check_scale(about)
        if self.fake_optimizer is not None:
            self.fake_optimizer.load_state_dict(about["fake"]["optimizer"])
            self.fake_scaler.load_state_dict(about["fake"]["scaler"])

    def check_scale(self, about: dict[str, Any]) -> None:
        if about["fake_scale"] != self.fake_scale:
            rank_zero_warn(
                f"The checkpoint's score adapter was trained at fake_scale {about['fake_scale']}; with this run's "
                f"{self.fake_scale} it is another fake score at first."
            )
