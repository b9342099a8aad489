"""SPO: step-aware preference optimization (arXiv:2406.04314).

The policy samples, and at every step draws K next latents from one and the same. A judge that knows the timestep says
which of them is best and which is worst; on these pairs DPO is made of the exact probabilities of single steps.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.loops.utilities import _block_parallel_sync_behavior
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from datamodules.batches import TrainingPrompts
from lightning_modules.backbones.base import Backbone, Conditioning
from lightning_modules.base import AlignmentModule, batch_seed
from lightning_modules.functional.noise import draw_noise
from lightning_modules.functional.steps import denoise, draw_step, log_probability, reverse_step
from lightning_modules.rewards.base import Reward

# M pairs: `t` and `s` (M,), the timesteps before and after the step; `x_t` and `x_s` (M, 2, C, h, w), the latents then,
# the preferred one first; `shared` (M,), whether both come from one x_t; `prompt` (M,), number of the prompt.
Pairs = dict[str, Tensor]
LEAST_NOISE = 0.01  # sigma at which a step of a flow may land
EMPTY_ROUNDS = 3  # in a row without a pair, until the run says so


def select_pair(scores: Tensor, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Best and worst of the K candidates of each prompt, and whether they differ enough.

        valid  <=>  softmax([s_best, s_worst]) differs by more than tau  <=>  tanh((s_best - s_worst) / 2) > tau

    Args:
        scores: (K, B), finite.
        threshold: tau, in [0, 1).

    Returns:
        (B,) number of the best, (B,) number of the worst, and (B,) bool; a tie is never valid.
    """
    gap = scores.amax(0) - scores.amin(0)
    return scores.argmax(0), scores.argmin(0), (0.5 * gap).tanh() > threshold


def rollout(
    x: Tensor,
    grid: Tensor,
    predict: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    step: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    score: Callable[[Tensor, Tensor], Tensor],
    draw: Callable[[int], Tensor],
    choose: Callable[[int], Tensor],
    candidates: int,
    first_step: int,
    inner_steps: int,
    threshold: float,
    extend_last: bool,
    noisy_end: bool = False,
) -> tuple[Pairs, Tensor]:
    """Sample B images and keep, from step d on, the best and the worst of K candidates wherever a judge sees a gap.

    Steps i < d are ordinary. At step d one latent branches into K, each of which takes J further steps of its own. Then
    the K finished images that the network expects are judged, at the timestep where the candidates stand; a random one
    of them, not the best, branches again, from the prediction that was judged. The last candidates are judged as they
    are, at the last timestep; if that one has noise, by the network's prediction too. Every step of a group of J + 1
    makes a pair of the group's best and worst candidate.

    Args:
        x: (B, C, h, w) pure noise.
        grid: (N + 1,) decreasing timesteps.
        predict: (x_t, t) -> x_0 and eps, guided; rows are B, or K B with row k B + b for candidate k of prompt b.
        step: (x_0, eps, t, s) -> mean and standard deviation of the step from t to s.
        score: (latents of K B finished images, t) -> (K, B) scores on the CPU.
        draw: n -> (n, C, h, w) standard normal noise.
        choose: B -> (B,) number of the candidate that goes on, on the CPU.
        candidates: K, 2 or more.
        first_step: d.
        inner_steps: J.
        threshold: tau of `select_pair`.
        extend_last: Let the last step extend its group, however long that is, as the published code does for SDXL.
        noisy_end: Whether there is noise left at the last timestep, so that x must be denoised before it is judged.

    Returns:
        The valid pairs, in the order of events, steps and prompts, `prompt` counting the B; and (E, K, B) scores of the
        E events.
    """
    B, num_steps = len(x), len(grid) - 1
    group: list[tuple[int, Tensor, Tensor]] = []  # step, latents before (B rows if they branch there, else K B), after
    kept: list[Pairs] = []
    events: list[Tensor] = []

    def judge(images: Tensor, t: Tensor) -> None:
        scores = score(images, t)
        best, worst, valid = select_pair(scores, threshold)
        prompt = valid.nonzero()[:, 0]
        rows = torch.stack([best[prompt], worst[prompt]], dim=1) * B + prompt[:, None]  # (M, 2)
        for number, (i, before, after) in enumerate(group):
            kept.append(
                {
                    "t": grid[i].repeat(len(prompt)),
                    "s": grid[i + 1].repeat(len(prompt)),
                    "x_t": before[rows % len(before)],
                    "x_s": after[rows],
                    "shared": torch.full((len(prompt),), number == 0),
                    "prompt": prompt,
                }
            )
        events.append(scores)

    for i in range(num_steps):
        t, s = grid[i], grid[i + 1]
        x_0, epsilon = predict(x, t)
        extends = i > first_step and (len(group) <= inner_steps or (extend_last and i == num_steps - 1))
        branches = i >= first_step and not extends
        if branches and group:
            judge(x_0, t)
            rows = choose(B) * B + torch.arange(B)
            x, x_0, epsilon, group = x[rows], x_0[rows], epsilon[rows], []
        mean, std = step(x_0, epsilon, t, s)
        after = draw_step(mean, std, draw(candidates * B if branches else len(x)))
        if i >= first_step:
            group.append((i, x, after))
        x = after
    judge(predict(x, grid[-1])[0] if noisy_end else x, grid[-1])
    return {name: torch.cat([pairs[name] for pairs in kept]) for name in kept[0]}, torch.stack(events)


def spo_loss(log_ratio: Tensor, beta: float, clip: float = 0.1, pessimistic: bool = False) -> tuple[Tensor, Tensor]:
    """SPO loss of each pair.

        ln r = clamp( log p(x_s | x_t) - log p_ref(x_s | x_t), ln(1 - eps), ln(1 + eps) )
        loss = -log sigmoid( beta (ln r_w - ln r_l) )

    A clipped ratio has no gradient. Differs: the published code clamps the ratio instead of its logarithm, which gives
    the same values, but a NaN gradient where exp overflows.

    Args:
        log_ratio: (2B,) policy's less reference's log-probability, the B preferred latents first.
        beta: Strength of the preference; 10 as published, for log-probabilities that are means over elements.
        clip: eps, in (0, 1).
        pessimistic: Leave a ratio that is on the wrong side (the preferred latent less probable than under the
            reference, the other one more) unclipped, so that it keeps its gradient.

    Returns:
        (B,) loss and (B,) clipped margin ln r_w - ln r_l.
    """
    low, high = math.log1p(-clip), math.log1p(clip)
    preferred, rejected = log_ratio.chunk(2)
    preferred = preferred.clamp(None if pessimistic else low, high)
    rejected = rejected.clamp(low, None if pessimistic else high)
    margin = preferred - rejected
    return -F.logsigmoid(beta * margin), margin.detach()


def share_of_rank(order: Tensor, rank: int, world_size: int) -> Tensor:
    """The part of an order of pairs that a rank trains on: equal parts; what is left over is dropped."""
    share = len(order) // world_size
    return order[rank * share : (rank + 1) * share]


def gather_pairs(pairs: Pairs, prompts: list[str], world_size: int) -> tuple[Pairs, list[str]]:
    """The pairs and prompts of all ranks in rank order, on every rank; the ranks may have any number of pairs.

    Args:
        pairs: Of this rank, on its device.
        prompts: That `prompt` counts.
        world_size: Number of ranks; every one must call this.
    """
    if world_size == 1:
        return pairs, prompts
    of_ranks: list[tuple[int, list[str]]] = [(0, [])] * world_size
    torch.distributed.all_gather_object(of_ranks, (len(pairs["t"]), prompts))
    rank, largest = torch.distributed.get_rank(), max(count for count, _ in of_ranks)
    before = sum(len(texts) for _, texts in of_ranks[:rank])
    pairs = {**pairs, "prompt": pairs["prompt"] + before}
    gathered = {}
    for name, tensor in pairs.items():
        padded = torch.cat([tensor, tensor.new_zeros(largest - len(tensor), *tensor.shape[1:])])
        parts = [torch.empty_like(padded) for _ in of_ranks]
        torch.distributed.all_gather(parts, padded)
        gathered[name] = torch.cat([part[:count] for part, (count, _) in zip(parts, of_ranks, strict=True)])
    return gathered, [text for _, texts in of_ranks for text in texts]


class SPO(AlignmentModule):
    """SPO: the policy samples, a judge compares candidates of single steps, and the policy learns from these pairs.

    A round samples one batch of prompts on every device, pools the pairs of all devices, deals them out evenly, and
    trains once on each. In the Trainer a round is a fixed number of batches, as many as it could have micro-batches of
    pairs: the first one samples, and each of them trains on one micro-batch while there are any. Optimizer steps alone
    count as steps: `max_steps`, checkpoints and logs follow them.

    Args:
        backbone: The diffusion model to align; its adapters, or all weights of its denoiser, are trained. The
            reference is the same model with adapters off, or a frozen low-precision copy.
        judge: Scores the images that the model expects at some timestep: a step-aware preference model; or any reward,
            which sees the image without the timestep.
        num_steps: N, sampling steps of a rollout.
        eta: Share of the noise that each step draws anew, in (0, 1].
        guidance_scale: Classifier-free guidance of sampling and training; 1 or less switches it off.
        first_step: d, the step at which candidates are first drawn, in [0, N).
        candidates: K, next latents drawn from one; 2 or more.
        inner_steps: J, further steps that a candidate takes before it is judged: 0 for Stable Diffusion 1.5 as
            published, 3 for SDXL, where one step changes too little.
        threshold: A pair is kept if the softmax of its two scores differs by more, in [0, 1).
        beta: Strength of the preference, for log-probabilities that are means over elements.
        clip: Probability ratios to the reference are clipped to [1 - clip, 1 + clip].
        pessimistic: Do not clip a ratio that is on the wrong side, so that it is drawn back; the published code does
            clip it.
        guided_loss: Use guidance in the loss too; false trains on the prediction for the prompt alone.
        train_batch_size: Pairs per device and micro-batch.
        accumulate_grad_batches: Micro-batches per optimizer step. A window that a round leaves unfinished is finished
            by the next round, as published.
        flush: Take the optimizer step at the end of a round, with the micro-batches that there are.
        gradient_clip_val: Largest norm of the gradient; null does not clip, as published (its clipping had no effect).
            The norm before clipping is logged either way.
        optimizer: Built on the trained parameters only.
        lr_scheduler: Begins after the warm-up and is stepped after every optimizer step. Null keeps the rate constant.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
    """

    replaces = {"gradient_clip_val": "gradient_clip_val", "accumulate_grad_batches": "accumulate_grad_batches"}

    def __init__(
        self,
        backbone: Backbone,
        judge: Reward,
        num_steps: int = 20,
        eta: float = 1.0,
        guidance_scale: float = 5.0,
        first_step: int = 4,
        candidates: int = 4,
        inner_steps: int = 0,
        threshold: float = 0.3,
        beta: float = 10.0,
        clip: float = 0.1,
        pessimistic: bool = False,
        guided_loss: bool = True,
        train_batch_size: int = 10,
        accumulate_grad_batches: int = 1,
        flush: bool = False,
        gradient_clip_val: float | None = 1.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=6e-5, weight_decay=1e-4),
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, warmup_steps, keep_reference=True)
        for name, holds, expected in (
            ("num_steps", num_steps >= 1, "1 or more"),
            ("eta", 0.0 < eta <= 1.0, "above 0 and at most 1: a step without noise has no probability"),
            ("guidance_scale", guidance_scale >= 0.0, "0 or more; 1 or less switches guidance off"),
            ("first_step", 0 <= first_step < num_steps, f"0 to {num_steps - 1}, a step of the num_steps"),
            ("candidates", candidates >= 2, "2 or more, to have a better and a worse one"),
            ("inner_steps", inner_steps >= 0, "0 or more"),
            ("threshold", 0.0 <= threshold < 1.0, "a difference of two probabilities, in [0, 1)"),
            ("beta", beta > 0.0, "a positive number (a negative one prefers the worst)"),
            ("clip", 0.0 < clip < 1.0, "above 0 and below 1"),
            ("train_batch_size", train_batch_size >= 1, "1 or more pairs"),
            ("accumulate_grad_batches", accumulate_grad_batches >= 1, "1 or more micro-batches"),
            ("gradient_clip_val", gradient_clip_val is None or gradient_clip_val > 0.0, "a positive number, or null"),
        ):
            if not holds:
                raise ValueError(f"model.{name} is {locals()[name]}; expected {expected}.")
        parts = [part for part in judge.modules() if isinstance(part, Reward) and part.takes_timestep]
        if parts and not judge.takes_timestep:
            raise ValueError(
                f"model.judge is a {type(judge).__name__}, which would ask its {type(parts[0]).__name__} without the "
                "timestep, as if all images were finished; give the step-aware model alone."
            )
        self.automatic_optimization = False  # rounds differ in their number of optimizer steps
        self.judge = judge.eval().requires_grad_(False)
        self.num_steps = num_steps
        self.eta = eta
        self.guidance_scale = guidance_scale
        self.first_step = first_step
        self.candidates = candidates
        self.inner_steps = inner_steps
        self.threshold = threshold
        self.beta = beta
        self.clip = clip
        self.pessimistic = pessimistic
        self.guided_loss = guided_loss
        self.train_batch_size = train_batch_size
        self.accumulate_grad_batches = accumulate_grad_batches
        self.flush = flush
        self.gradient_clip_val = gradient_clip_val

        self.pairs: Pairs = {}  # of this rank and round, not yet trained on
        self.prompts: list[str] = []  # of all ranks' pairs
        self.encoded: dict[str, Conditioning] = {}
        self.rounds = 0  # begun
        self.accumulated = 0  # micro-batches since the last optimizer step
        self.rounds_without_pairs = 0
        self.tally = torch.zeros(num_steps, 4)  # pairs, margins, right ones, clipped ratios of each timestep

    # -------------------------------------------------------------------------------------------------- preparation

    def setup(self, stage: str) -> None:
        """Load the judge before the networks: a wrong weight file is told of at once.

        Raises:
            ValueError: if the data are not prompts, or the strategy cannot be used.
        """
        if stage != "fit":
            return
        if isinstance(self.trainer.strategy, DeepSpeedStrategy):
            raise ValueError(
                "trainer.strategy is DeepSpeed, which keeps gradients where SPO cannot accumulate and clip them; use "
                "DDP (cli_configs/trainer/ddp.yaml) or FSDP2 (fsdp2.yaml)."
            )
        if self.trainer.datamodule is not None and not hasattr(self.trainer.datamodule, "visits"):
            raise ValueError(
                f"data.class_path is {type(self.trainer.datamodule).__name__}; SPO makes its own images and needs "
                "prompts only: use datamodules.prompt_stream.PromptStream."
            )
        self.judge.load()
        self.judge.requires_grad_(False)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.prepare_steps()
        self.tally = self.tally.to(self.device)
        if self.pairs:  # all that the ranks had left when the checkpoint was written
            share = share_of_rank(torch.arange(self.pairs_left), self.trainer.global_rank, self.trainer.world_size)
            self.pairs = {name: tensor[share].to(self.device) for name, tensor in self.pairs.items()}

    def prepare_steps(self) -> None:
        """Lay out the sampling steps.

        A flow's last steps land where there is hardly any noise, or none: candidates would look alike, and their
        probabilities be many times as sensitive as others', or not exist. The steps end before them, and the last
        candidates are judged by the prediction that stands there. Stable Diffusion 1.5 and SDXL lose none.

        Raises:
            ValueError: if a step has no probability, or starts where nothing is left of the image, or none is left to
                make pairs of.
        """
        self.grid = self.backbone.time_grid(self.num_steps)
        self.noisy_end = self.backbone.prediction_type == "flow"
        if self.noisy_end and self.backbone.device.type != "meta":
            _, sigma = self.backbone.coefficients(self.grid)
            self.grid = self.grid[sigma >= LEAST_NOISE]
        if self.first_step > len(self.grid) - 2:
            raise ValueError(
                f"model.first_step is {self.first_step}; expected 0 to {len(self.grid) - 2}: of {self.num_steps} steps "
                f"{self.num_steps + 1 - len(self.grid)} land where there is too little noise for candidates to differ."
            )
        alpha, sigma = self.backbone.coefficients(self.grid)
        _, std = reverse_step(alpha[1:], alpha[1:], (alpha[:-1], sigma[:-1]), (alpha[1:], sigma[1:]), self.eta)
        possible = (std > 0) & ((alpha[:-1] > 0) | (self.backbone.prediction_type != "epsilon"))
        if self.backbone.device.type != "meta" and not possible.all():
            i = int(possible.logical_not().nonzero()[0])
            raise ValueError(
                f"The step from timestep {self.grid[i]} to {self.grid[i + 1]} of {self.backbone.pretrained!r} has "
                f"standard deviation {std[i]:.3g} and starts at signal {alpha[i]:.3g}; SPO needs both above 0. Models "
                "for few steps, such as SDXL-Turbo, cannot be trained with it."
            )

    def visits_per_batch(self, batch_size: int) -> int:
        """Micro-batches of pairs that a round can have at most; see `PromptStream`."""
        return math.ceil(batch_size * (self.num_steps - self.first_step) / self.train_batch_size)

    # ----------------------------------------------------------------------------------------------------- training

    def training_step(self, batch: TrainingPrompts, batch_idx: int) -> None:
        if batch["visit"] == 0:
            self.begin_round(batch["prompts"])
        if not self.pairs_left:
            return
        pairs = {name: tensor[: self.train_batch_size] for name, tensor in self.pairs.items()}
        log_ratio = self.log_ratio(pairs)
        loss, margin = spo_loss(log_ratio, self.beta, self.clip, self.pessimistic)
        self.log_pairs(pairs, log_ratio.detach(), loss, margin)
        if self.pairs_left == len(pairs["t"]):  # before the optimizer's hooks, after which Lightning forgets
            self.log_timesteps()

        stays_open = self.window_stays_open()
        with _block_parallel_sync_behavior(self.trainer.strategy, block=stays_open):
            self.manual_backward(loss.mean() / self.window_size)
        self.pairs = {name: tensor[self.train_batch_size :] for name, tensor in self.pairs.items()}
        self.accumulated += 1
        if not stays_open:
            self.take_step()

    def on_before_batch_transfer(self, batch: TrainingPrompts, dataloader_idx: int) -> TrainingPrompts:
        self.log_at_optimizer_steps()
        return batch

    @torch.no_grad()
    def begin_round(self, prompts: list[str]) -> None:
        """Sample B prompts, pool the pairs of all ranks and deal them out."""
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        if self.pairs_left:
            rank_zero_warn(
                f"{self.pairs_left} pairs of the round that was resumed are dropped on every device: with these "
                "settings a round has fewer micro-batches than they need."
            )
        self.encoded = {"": self.encoded[""]} if "" in self.encoded else {}
        self.seed_batch("rollout", self.rounds)
        self.trained_network.eval()
        pairs, scores = self.sample(prompts)
        self.trained_network.train()
        torch.clear_autocast_cache()  # weights that were cast without a gradient must not serve the loss

        pairs = {name: tensor.to(self.device) for name, tensor in pairs.items()}
        pairs, self.prompts = gather_pairs(pairs, prompts, world_size)
        seed = batch_seed(self.run_seed, "pairs", self.rounds)
        self.rounds += 1
        order = torch.randperm(len(pairs["t"]), generator=torch.Generator().manual_seed(seed))
        mine = share_of_rank(order, rank, world_size)
        self.pairs = {name: tensor[mine] for name, tensor in pairs.items()}
        self.log_round(scores, len(order) / (len(self.prompts) * (len(self.grid) - 1 - self.first_step)))

    def sample(self, prompts: list[str]) -> tuple[Pairs, Tensor]:
        """Pairs and scores of a rollout of B prompts."""
        B, shape, device = len(prompts), self.backbone.latent_shape, self.backbone.device
        condition = self.condition(prompts)

        def draw(n: int) -> Tensor:
            return draw_noise(torch.empty(n, *shape, device=device))

        return rollout(
            draw(B),
            self.grid,
            predict=lambda x, t: self.denoise(
                x, t.expand(len(x)), Conditioning.cat([condition] * (len(x) // B)), self.guidance_scale
            ),
            step=lambda x_0, epsilon, t, s: self.step(x_0, epsilon, t.expand(len(x_0)), s.expand(len(x_0))),
            score=lambda latents, t: self.score(latents, t, prompts),
            draw=draw,
            choose=self.choose,
            candidates=self.candidates,
            first_step=self.first_step,
            inner_steps=self.inner_steps,
            threshold=self.threshold,
            extend_last=self.inner_steps > 0,
            noisy_end=self.noisy_end,
        )

    def choose(self, n: int) -> Tensor:
        """(n,) number of the candidate that goes on, on the CPU: any of them, however it was judged."""
        return torch.randint(self.candidates, (n,), device="cpu")

    def score(self, latents: Tensor, t: Tensor, prompts: list[str]) -> Tensor:
        """The judge's scores of the images of (K B, C, h, w) finished latents, (K, B) on the CPU.

        Raises:
            ValueError: if it gives anything but one finite number for each image.
        """
        images, prompts_of_images = self.backbone.decode_latents(latents) / 2 + 0.5, prompts * self.candidates
        with torch.autocast(images.device.type, enabled=False):
            if self.judge.takes_timestep:
                scores = self.judge(images, prompts_of_images, t.expand(len(images)))
            else:
                scores = self.judge(images.clamp(0, 1), prompts_of_images)
        if scores.shape != (len(images),):
            raise ValueError(
                f"model.judge ({type(self.judge).__name__}) gave scores of shape {tuple(scores.shape)} for "
                f"{len(images)} images; expected one number for each."
            )
        scores = scores.float().cpu()
        if not scores.isfinite().all():
            i = int(scores.isfinite().logical_not().nonzero()[0])
            raise ValueError(
                f"model.judge ({type(self.judge).__name__}) scored an image of prompt {prompts_of_images[i][:60]!r} at "
                f"timestep {float(t):g} as {scores[i].item()}; expected a finite number. Look at its weights; a policy "
                "that has diverged makes images of NaN."
            )
        return scores.reshape(self.candidates, len(prompts))

    def condition(self, prompts: list[str]) -> Conditioning:
        """Conditioning of B prompts. Each is encoded once in a round, alone, so that it does not depend on others."""
        for prompt in prompts:
            if prompt not in self.encoded:
                self.encoded[prompt] = self.backbone.encode_prompts([prompt])
        return Conditioning.cat([self.encoded[prompt] for prompt in prompts])

    def denoise(self, x_t: Tensor, t: Tensor, condition: Conditioning, guidance_scale: float) -> tuple[Tensor, Tensor]:
        """The acting policy's x_0 and eps, (n, C, h, w) float32, of n latents, timesteps and prompts."""
        if guidance_scale > 1:
            negative = self.backbone.as_negative(self.condition([""] * len(x_t)))
            prediction = self.backbone.predict_guided(x_t, t, condition, negative, guidance_scale)
        else:
            prediction = self.backbone.predict(x_t, t, condition)
        return denoise(self.backbone.prediction_type, prediction, x_t, self.backbone.coefficients(t))

    def step(self, x_0: Tensor, epsilon: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of n steps from t to s."""
        return reverse_step(x_0, epsilon, self.backbone.coefficients(t), self.backbone.coefficients(s), self.eta)

    def log_ratio(self, pairs: Pairs) -> Tensor:
        """Policy's less reference's log-probability of M pairs' steps, (2M,), the preferred ones first.

        Where both latents of a pair come from the same one, the networks see it once.
        """
        number = torch.arange(len(pairs["t"]), device=pairs["shared"].device)
        apart = number[~pairs["shared"]]
        rows = torch.cat(
            [number, apart]
        )  # pair of each row: all preferred ones, then the others with an x_t of their own
        x_t = torch.cat([pairs["x_t"][:, 0], pairs["x_t"][apart, 1]])
        t, s = pairs["t"][rows], pairs["s"][rows]
        condition = self.condition([self.prompts[i] for i in pairs["prompt"][rows].tolist()])
        row_of_rejected = number.clone()
        row_of_rejected[apart] = len(number) + torch.arange(len(apart), device=number.device)
        row_of = torch.cat([number, row_of_rejected])
        x_s = pairs["x_s"].transpose(0, 1).flatten(0, 1)

        def log_probability_of_steps() -> Tensor:
            guidance_scale = self.guidance_scale if self.guided_loss else 1.0
            mean, std = self.step(*self.denoise(x_t, t, condition, guidance_scale), t, s)
            return log_probability(x_s, mean[row_of], std[row_of])

        policy = log_probability_of_steps()
        with torch.no_grad(), self.backbone.reference():
            reference = log_probability_of_steps()
        return policy - reference

    # ------------------------------------------------------------------------------------------------ optimizer steps

    @property
    def pairs_left(self) -> int:
        """Pairs of this rank and round that have not been trained on."""
        return len(self.pairs["t"]) if self.pairs else 0

    @property
    def window_size(self) -> int:
        if not self.flush:
            return self.accumulate_grad_batches
        left = math.ceil(self.pairs_left / self.train_batch_size)
        return min(self.accumulate_grad_batches, self.accumulated + left)

    def window_stays_open(self) -> bool:
        return self.accumulated + 1 < self.window_size

    def take_step(self) -> None:
        optimizer = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        self.lr_schedulers().step()
        self.accumulated = 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Log the gradient's norm, and clip it: gradients are unscaled and averaged over ranks here."""
        parameters = [p for p in self.trained_parameters().values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if self.gradient_clip_val is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip_val, norm)
        self.log("train/gradient_norm", norm.full_tensor() if isinstance(norm, DTensor) else norm)

    # -------------------------------------------------------------------------------------------------------- logging

    def log_pairs(self, pairs: Pairs, log_ratio: Tensor, loss: Tensor, margin: Tensor) -> None:
        preferred, rejected = log_ratio.chunk(2)
        low, high = math.log1p(-self.clip), math.log1p(self.clip)
        right = (1 + (preferred - rejected).sign()) / 2  # a tie, as at the start, is half right
        clipped = ((log_ratio < low) | (log_ratio > high)).float().reshape(2, -1).mean(0)
        self.log_window(
            {
                "loss": loss.mean(),
                "margin": margin.mean(),
                "pair_accuracy": right.mean(),
                "log_ratio_preferred": preferred.mean(),
                "log_ratio_rejected": rejected.mean(),
                "ratio_preferred": preferred.clamp(low, high).exp().mean(),
                "ratio_rejected": rejected.clamp(low, high).exp().mean(),
                "clip_share": clipped.mean(),
            }
        )
        at = (pairs["t"][:, None] == self.grid[:-1]).float()  # (M, steps)
        values = torch.stack([torch.ones_like(right), preferred - rejected, right, clipped], dim=1)
        self.tally[: at.shape[1]] += (at[:, :, None] * values[:, None]).sum(0)

    def log_timesteps(self) -> None:
        """Log, at the end of a round, the unclipped margin, pair accuracy and clip share of each timestep."""
        counts, *sums = self.trainer.strategy.reduce(self.tally, reduce_op="sum").T.cpu()
        for name, values in zip(("margin", "pair_accuracy", "clip_share"), sums, strict=True):
            for t, count, value in zip(self.grid.tolist(), counts, values, strict=False):
                if count:
                    self.log(f"timestep/{name}_{t:04.0f}", value / count)
        self.tally = torch.zeros_like(self.tally)

    def log_round(self, scores: Tensor, valid_share: float) -> None:
        """Log what a rollout gave, and warn if it has been nothing for some time.

        Args:
            scores: (E, K, B) of this rank.
            valid_share: Kept pairs of all ranks, of those that there could have been.
        """
        scores = self.trainer.strategy.all_gather(scores.to(self.device))
        self.log("rollout/score_mean", scores.mean())
        self.log("rollout/score_std", scores.std())
        self.log("rollout/valid_share", valid_share, prog_bar=True)
        self.rounds_without_pairs = 0 if self.pairs_left else self.rounds_without_pairs + 1
        if self.rounds_without_pairs == EMPTY_ROUNDS:
            gaps = scores.amax(-2) - scores.amin(-2)
            rank_zero_warn(
                f"{EMPTY_ROUNDS} rounds in a row gave no pairs to train on. The scores of candidates differ by "
                f"{gaps.mean():.3g} on average and {gaps.max():.3g} at most; a pair is kept above "
                f"{2 * math.atanh(self.threshold):.3g} (threshold {self.threshold}). Lower model.threshold, or look at "
                "the judge's weights."
            )

    # -------------------------------------------------------------------------------------------- checkpoints, resume

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is left of the round beside the rest: its pairs came from weights that are no more."""
        super().on_save_checkpoint(checkpoint)
        if self._trainer is None or not self.trainer.training:
            return
        about = checkpoint["limelight"]
        about["rounds"] = self.rounds
        about["accumulated"] = self.accumulated
        about["rounds_without_pairs"] = self.rounds_without_pairs
        if self.pairs_left:
            pairs, _ = gather_pairs(self.pairs, [], self.trainer.world_size)
            about["pairs"] = {name: tensor.cpu() for name, tensor in pairs.items()}
            about["prompts"] = self.prompts
            about["tally"] = self.trainer.strategy.reduce(self.tally.clone(), reduce_op="sum").cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        about = checkpoint["limelight"]
        self.rounds = about.get("rounds", 0)
        self.accumulated = about.get("accumulated", 0)
        self.rounds_without_pairs = about.get("rounds_without_pairs", 0)
        self.pairs = about.get("pairs", {})
        self.prompts = about.get("prompts", [])
        if "tally" in about and self.trainer.is_global_zero and len(about["tally"]) == self.num_steps:
            self.tally = about["tally"]

    def _fit_is_inside_window(self) -> bool:
        return self._trainer is not None and self.trainer.training and self.accumulated > 0
