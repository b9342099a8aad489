"""The life of a method outside its training step: optimizer, randomness, small checkpoints, resume, test images."""

import copy
import hashlib
import math
import os
import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from datamodules.batches import PromptBatch
from lightning_modules.backbones.base import Backbone

COMPUTE_DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# What the Trainer has where it is not asked to do what some methods do themselves.
UNSET = {"gradient_clip_val": (None, 0), "accumulate_grad_batches": (1,)}


def batch_seed(seed: int, stage: str, index: int) -> int:
    """The random seed of micro-batch `index` of a stage: well mixed, so that neighbours share nothing."""
    digest = hashlib.blake2b(f"{seed}/{stage}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def warmup_factor(step: int, warmup_steps: int, from_zero: bool = False) -> float:
    """Share of the learning rate that optimizer step `step` (0-based) uses.

    (k + 1) / W during the first W steps, then 1. The published code uses k / W (`from_zero`), whose first step has
    learning rate 0 and is wasted.
    """
    return min(1.0, (step if from_zero else step + 1) / max(1, warmup_steps))


def scaled_learning_rate(lr: float, effective_pairs: int) -> float:
    """The `scale_lr` rule of the published scripts: base rate times the samples of one optimizer step."""
    return lr * effective_pairs


def configured_learning_rate(optimizer: OptimizerCallable) -> float:
    """The learning rate with which a config builds an optimizer."""
    return optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]


def compute_dtype(trainer: pl.Trainer) -> torch.dtype:
    """What a Trainer asks the networks to compute in.

    Raises:
        ValueError: if its precision is not one of ours.
    """
    precision = str(trainer.precision)
    if precision not in COMPUTE_DTYPES:
        raise ValueError(
            f"trainer.precision is {precision!r}; expected one of {', '.join(COMPUTE_DTYPES)}. Trained weights stay "
            "float32 (updates of 1e-5 vanish in half precision); frozen networks are held in low precision with either "
            "mixed setting."
        )
    return COMPUTE_DTYPES[precision]


def describe_encoders(backbone: Backbone) -> dict[str, Any]:
    """Everything but its input that the encodings of a backbone, loaded with `fingerprint=True`, depend on.

    Returns:
        Names of the family and of the dtype it computes in; hashes of the encoders' weights, and of what the tokenizers
        make of a probe.
    """
    probe = "A photo of 3 Ünïcode cats, sitting (or: lying) on a mat; 'painted' in oil by: someone -- 4k, 平仮名!"
    encoders = dict(backbone.fingerprints)
    for name, part in backbone.pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            tokens = part(probe, padding="max_length", max_length=part.model_max_length, truncation=True).input_ids
            encoders[name] = hashlib.blake2b(str(tokens).encode(), digest_size=16).hexdigest()
    return {
        "family": type(backbone).__name__,
        "encoders": encoders,
        "compute_dtype": str(backbone.compute_dtype).removeprefix("torch."),
    }


def available_room(folder: Path) -> int:
    """Free bytes on the disk that holds `folder` (which need not exist yet)."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


class AlignmentModule(pl.LightningModule):
    """What every method shares. It owns no training step.

    A checkpoint holds the trained weights only, and a run's random numbers are a function of (seed, position in the
    data), so that a resumed run repeats the uninterrupted one bit for bit and the number of GPUs does not matter:
    micro-batch k of the run draws the same noise on whichever rank it lands.

    Args:
        backbone: The diffusion model to train.
        optimizer: Built on the trained parameters only.
        lr_scheduler: Begins after the warm-up and is stepped after every optimizer step. Null keeps the rate constant.
        warmup_steps: Optimizer steps over which the learning rate rises linearly.
        warmup_from_zero: Give the first optimizer step learning rate 0, as the published code does.
        scale_lr: Multiply the learning rate by the samples of one optimizer step (per-device batch x accumulation x
            devices), as the published launchers do.
        keep_reference: Whether the method asks for the frozen starting policy during training.
    """

    # Of methods that step their optimizers themselves: setting of the Trainer -> what to set in its place.
    replaces: dict[str, str] = {}

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        warmup_steps: int = 0,
        warmup_from_zero: bool = False,
        scale_lr: bool = False,
        keep_reference: bool = False,
    ) -> None:
        super().__init__()
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps is {warmup_steps}; expected 0 or more optimizer steps.")
        self.backbone = backbone
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup_steps = warmup_steps
        self.warmup_from_zero = warmup_from_zero
        self.scale_lr = scale_lr
        self.keep_reference = keep_reference
        self.strict_loading = False  # checkpoints hold the trained weights only; on_load_checkpoint compares names
        self.run_seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        self._window: dict[str, Tensor] = {}
        self._pending_gradients: dict[str, Tensor] = {}
        self._missed_validation: dict[str, int] | None = None

    # ---------------------------------------------------------------------------------------------------- building

    def configure_callbacks(self) -> list[pl.Callback]:
        """None; the first place where the Trainer's settings can be seen.

        Raises:
            ValueError: if the Trainer is asked for what a method does itself that steps its optimizers itself.
        """
        name = type(self).__name__
        for setting, ours in self.replaces.items():
            if (value := getattr(self.trainer, setting)) not in UNSET[setting]:
                raise ValueError(f"trainer.{setting} is {value}; {name} does this itself: set model.{ours} instead.")
        by_time = any(getattr(callback, "_train_time_interval", None) for callback in self.trainer.checkpoint_callbacks)
        if by_time and not self.automatic_optimization:
            raise ValueError(
                "ModelCheckpoint.train_time_interval: Lightning saves no checkpoints by time for a method that steps "
                f"its optimizers itself, as {name} does; use every_n_train_steps."
            )
        return []

    def configure_model(self) -> None:
        """Load the networks once, in the precision that the Trainer asks for; shard the trained one under FSDP2.

        Raises:
            ValueError: if the data come from a cache that other encoders have filled.
        """
        cache = getattr(self.trainer.datamodule, "cached", None)
        if self.backbone.loaded:
            if cache is not None:
                cache.check_encoders(describe_encoders(self.backbone))
            return
        # New weights start from the run's seed: the same on every rank and in every repetition.
        root = self.trainer.strategy.root_device
        with torch.random.fork_rng(devices=[root] if root.type == "cuda" else []):
            torch.manual_seed(batch_seed(self.run_seed, "initial weights", 0))
            self.load_networks(fingerprint=cache is not None)
        if cache is not None:
            cache.check_encoders(describe_encoders(self.backbone))
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            self.backbone.shard(self.device_mesh)

    def load_networks(self, fingerprint: bool) -> None:
        """Read the weights. A method that trains another network than the backbone's loads both here.

        Args:
            fingerprint: As in `Backbone.load`.
        """
        self.backbone.load(compute_dtype(self.trainer), keep_reference=self.keep_reference, fingerprint=fingerprint)

    @property
    def trained_network(self) -> nn.Module:
        """The network that the optimizer changes."""
        return self.backbone.denoiser

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of everything that the optimizer may change."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def effective_batch(self) -> int:
        """Samples (pairs, for pair methods) of one optimizer step over all devices."""
        batch_size = getattr(self.trainer.datamodule, "batch_size", None)
        if batch_size is None:
            raise ValueError(
                "scale_lr: true multiplies the learning rate by the samples of one optimizer step, but the data module "
                "has no `batch_size`. Set scale_lr: false and give the final learning rate."
            )
        return batch_size * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def configure_optimizers(self) -> dict[str, Any]:
        parameters = list(self.trained_parameters().values())
        if not parameters:
            raise ValueError("There is nothing to train: no parameter requires a gradient.")
        optimizer = self.optimizer(parameters)
        if self.scale_lr:
            for group in optimizer.param_groups:
                group["lr"] = scaled_learning_rate(group["lr"], self.effective_batch())
            rank_zero_info(f"scale_lr: {self.effective_batch()} samples a step, learning rate {group['lr']:.4g}")

        def factor(step: int) -> float:
            return warmup_factor(step, self.warmup_steps, self.warmup_from_zero)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        if self.lr_scheduler is not None:
            scheduler = torch.optim.lr_scheduler.SequentialLR(
                optimizer, [scheduler, self.lr_scheduler(optimizer)], milestones=[self.warmup_steps]
            )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # -------------------------------------------------------------------------------------------------- randomness

    def seed_batch(self, stage: str, index: int) -> None:
        """Make the random numbers of the next step a function of the run's seed and the batch's global position."""
        torch.manual_seed(batch_seed(self.run_seed, stage, index * self.trainer.world_size + self.trainer.global_rank))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seed_batch("train", self.trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seed_batch("validate", batch_idx)

    # ----------------------------------------------------------------------------------------------------- logging

    @property
    def window_size(self) -> int:
        """Micro-batches of the present optimizer step."""
        return self.trainer.accumulate_grad_batches

    def window_stays_open(self) -> bool:
        """Whether the optimizer step comes after a later micro-batch than the present one."""
        return self.trainer.fit_loop._should_accumulate()

    def log_window(self, metrics: dict[str, Tensor]) -> None:
        """Log the mean of each metric over the micro-batches and ranks of one optimizer step, without a host sync.

        Args:
            metrics: Name -> scalar of this micro-batch; the name gets the prefix "train/".
        """
        share = 1.0 / self.window_size
        for name, value in metrics.items():
            self._window[name] = self._window.get(name, 0.0) + value.detach().float() * share
        if self.window_stays_open():
            return
        if self.trainer._logger_connector.should_update_logs:
            self._stop_on_non_finite(self._window)
        for name, value in self._window.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", sync_dist=True)
        self._window = {}

    def log_at_optimizer_steps(self) -> None:
        """For methods that step their optimizer themselves, in the first hook of a batch: let loggers count such steps.

        Not every batch makes one.
        """
        if self.trainer.training:
            loop = self.trainer.fit_loop.epoch_loop
            loop._batches_that_stepped = self.trainer.global_step
            loop._results.reset()  # the metrics of earlier batches would be logged again

    def _stop_on_non_finite(self, metrics: dict[str, Tensor]) -> None:
        loss = metrics.get("loss")
        if loss is not None and not torch.isfinite(loss):
            raise ValueError(
                f"The training loss is {loss.item()} at optimizer step {self.global_step}. Lower the learning rate, "
                "set trainer.gradient_clip_val, or use bf16-mixed instead of 16-mixed precision; then resume from the "
                "last checkpoint with --ckpt_path."
            )

    # ------------------------------------------------------------------------------------------ checkpoints, resume

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained weights; add what exact resume needs beyond Lightning's own state."""
        trained = self.trained_parameters()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["limelight"] = {
            "method": type(self).__name__,
            "backbone": type(self.backbone).__name__,
            "pretrained": self.backbone.pretrained,
            "seed": self.run_seed,
            "trained": {name: tuple(parameter.shape) for name, parameter in trained.items()},
        }
        # A checkpoint inside an accumulation window (interrupt, time limit) carries what was gathered so far.
        if self._fit_is_inside_window():
            gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
            for kind, tensors in (("gradients", gradients), ("metrics", self._window)):
                checkpoint["limelight"][kind] = {name: self._rank_mean(tensor) for name, tensor in tensors.items()}

        if self._validation_is_next():
            step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
            checkpoint["limelight"]["before_validation"] = {"epoch": self.trainer.current_epoch, "step": step}

    def _rank_mean(self, tensor: Tensor) -> Tensor:
        """Mean over the ranks, on the CPU. FSDP2 has reduced its shards of gradients already."""
        if isinstance(tensor, DTensor):
            return tensor.full_tensor().cpu()
        return self.trainer.strategy.reduce(tensor.clone(), reduce_op="mean").cpu()

    def _fit_is_inside_window(self) -> bool:
        if self._trainer is None or not self.trainer.training:
            return False
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        return self.automatic_optimization and self.trainer.fit_loop._should_accumulate() and progress.current.ready > 0

    def _validation_is_next(self) -> bool:
        if self._trainer is None or not self.trainer.training:
            return False
        fit, progress = self.trainer.fit_loop, self.trainer.fit_loop.epoch_loop.batch_progress.total
        return progress.processed > progress.completed and fit.epoch_loop._should_check_val_fx(fit._data_fetcher)

    def check_trained(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint says of itself, if it holds the weights that are trained here.

        Raises:
            ValueError: if the checkpoint belongs to another method or model.
        """
        ours = {name: tuple(parameter.shape) for name, parameter in self.trained_parameters().items()}
        about = checkpoint.get("limelight", {})
        # FSDP2 has taken the weights out by now, so the checkpoint says itself what it holds.
        saved = about.get("trained", {})
        if saved != ours:
            other = sorted(set(saved.items()) ^ set(ours.items()))
            raise ValueError(
                "The checkpoint belongs to another model: it was written by "
                f"{about.get('method', 'an unknown method')} on {about.get('pretrained', 'an unknown model')} with "
                f"{len(saved)} trained tensors, while this run trains {len(ours)}; the first difference is "
                f"{other[0][0]} of shape {other[0][1]}. Use the config.yaml saved beside the checkpoint's folder."
            )
        return about

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the checkpoint with this model before it is trained.

        Raises:
            ValueError: if the checkpoint belongs to another method or model.
        """
        about = self.check_trained(checkpoint)
        if about.get("seed", self.run_seed) != self.run_seed:
            rank_zero_warn(
                f"The checkpoint was written with seed {about['seed']}, this run asks for {self.run_seed}; the "
                "resumed run continues with the checkpoint's seed."
            )
            self.run_seed = about["seed"]
        self._pending_gradients = about.get("gradients", {})
        self._window = about.get("metrics", {})
        self._missed_validation = about.get("before_validation")

    def on_train_start(self) -> None:
        self._check_room()
        self._apply_configured_learning_rate()
        for name, parameter in self.trained_parameters().items():
            if name in self._pending_gradients:
                gradient = self._pending_gradients[name].to(parameter.device, parameter.dtype)
                if isinstance(parameter, DTensor):
                    gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
                parameter.grad = gradient
        self._pending_gradients = {}
        self._window = {name: value.to(self.device) for name, value in self._window.items()}
        self.trained_network.train()
        if self._missed_validation is not None:
            self._validate_at(**self._missed_validation)
            self._missed_validation = None

    def _validate_at(self, epoch: int, step: int) -> None:
        """Run the validation that the checkpoint was written before: the Trainer takes it for done.

        Args:
            epoch: Number that the Trainer had for the epoch then.
            step: Number that its loggers had for the step.
        """
        fit, connector = self.trainer.fit_loop, self.trainer._logger_connector
        loop, epochs, first = fit.epoch_loop, fit.epoch_progress.current, connector._first_loop_iter
        batches = copy.deepcopy(loop.val_loop.batch_progress)
        now = epochs.completed, loop._batches_that_stepped
        epochs.completed, loop._batches_that_stepped = epoch, step
        self.trainer.validating = True
        loop.val_loop.restarting = False
        loop.val_loop.run()
        self.trainer.training = True
        epochs.completed, loop._batches_that_stepped = now
        connector._first_loop_iter = first
        if loop.restarting:  # in the middle of an epoch: now the Trainer counts these batches itself
            loop.val_loop.batch_progress = batches

    def _check_room(self) -> None:
        """Stop before the first step when a checkpoint would not fit on the disk."""
        weights = sum(p.numel() * p.element_size() for p in self.trained_parameters().values())
        needed = 4 * weights  # weights and two optimizer moments, written beside the previous checkpoint
        folder = self.trainer.log_dir or self.trainer.default_root_dir
        if folder and available_room(folder) < needed:
            raise ValueError(
                f"The disk of {folder} has {available_room(folder) / 2**20:.0f} MiB free, but one checkpoint of this "
                f"run needs about {needed / 2**20:.0f} MiB. Free some space or set another output folder."
            )

    def _apply_configured_learning_rate(self) -> None:
        """After a resume, follow the learning rate of this run's config, not the one stored in the checkpoint."""
        for optimizer, config in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=False):
            fresh = configured_learning_rate(self.optimizer)
            if self.scale_lr:
                fresh = scaled_learning_rate(fresh, self.effective_batch())
            for scheduler in getattr(config.scheduler, "_schedulers", [config.scheduler]):
                scheduler.base_lrs = [fresh] * len(optimizer.param_groups)
            for group in optimizer.param_groups:
                if not math.isclose(group["initial_lr"], fresh, rel_tol=1e-12):
                    rank_zero_info(f"Resumed with learning rate {fresh:.4g} (checkpoint: {group['initial_lr']:.4g}).")
                    group["lr"] *= fresh / group["initial_lr"]
                    group["initial_lr"] = fresh

    # ------------------------------------------------------------------------------------------ images for evaluation

    def test_step(self, batch: PromptBatch, batch_idx: int) -> PromptBatch:
        """The batch: a callback (`callbacks/evaluation.py`) makes the images that are not there, and scores them."""
        return batch

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> dict[str, Any]:
        """Images of the trained policy; the batch, with `images` (B, 3, H, W) in [0, 1] on the CPU."""
        return {**batch, "images": self.backbone.generate(batch["prompts"], batch["seeds"])}
