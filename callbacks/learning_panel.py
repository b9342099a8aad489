"""Does a run learn from its pairs, and at which timesteps? Measured on held-out pairs, without sampling an image."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from peft.tuners.lora import LoraLayer
from torch import Tensor

from callbacks.panel_picture import draw_panel
from datamodules.batches import PairBatch
from lightning_modules.backbones.base import Backbone, Conditioning
from lightning_modules.base import AlignmentModule, batch_seed

SATURATED = 0.05  # a pair whose gradient has less than this share of the largest one hardly moves the weights
TIMESTEP_DRAWS = 2**16  # from which the share of every bucket in training is taken
FACTS = ("error_preferred", "error_rejected", "reference_preferred", "reference_rejected", "between", "drift")
PAIRED = ("images", "moments", "original_sizes", "crops")  # what a batch holds of each image
PairTerms = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def spread(number: int, of: int) -> Tensor:
    """(number,) indices below `of`, evenly spread in whatever order they are taken: steps of the golden section."""
    return ((torch.arange(number, dtype=torch.float64) + 0.5) * 0.6180339887498949 % 1.0 * of).long()


def gradient_norms(facts: dict[str, Tensor], pair_terms: PairTerms) -> Tensor:
    """How hard each pair pulls at the network's prediction.

    A pair's loss L depends on its two errors e = mean (p - y)^2 of a prediction p with N elements and its target y:

        g = dL/dp_w + dL/dp_l = 2/N [ dL/de_w (p_w - y_w) + dL/de_l (p_l - y_l) ]

    The two parts are added before the norm is taken, because one network makes both predictions: where both images are
    nearly the same noise, what is asked of one is taken back by the other. The network's Jacobian is left out, which
    would take a backward pass. On the toy world's LoRA (48 pairs, five buckets from little noise to much) the gradients
    of the weights have 48, 26, 16, 7 and 3 % of the sum of norms at the start, and g has 37, 24, 19, 13 and 8 %.

    Args:
        facts: FACTS by name, each (M,); `between` is the mean of ((p_w - y_w) - (p_l - y_l))^2.
        pair_terms: Of the method: errors (2M,), and those of the reference -> losses (M,).

    Returns:
        (M,) norms times sqrt(N) / 2.
    """
    error = torch.cat([facts["error_preferred"], facts["error_rejected"]])
    reference = torch.cat([facts["reference_preferred"], facts["reference_rejected"]])
    with torch.inference_mode(False), torch.enable_grad():
        error, reference = error.clone().requires_grad_(), reference.clone()
        loss, _ = pair_terms(error, None if reference.isnan().any() else reference)
        preferred, rejected = torch.autograd.grad(loss.sum(), error)[0].chunk(2)
    # |a x + b y|^2 = (a + b)(a |x|^2 + b |y|^2) - a b |x - y|^2, which for b = -a loses no digits.
    square = (preferred + rejected) * (preferred * facts["error_preferred"] + rejected * facts["error_rejected"])
    return (square - preferred * rejected * facts["between"]).clamp(min=0).sqrt()


def panel_metrics(facts: dict[str, Tensor], shares: Tensor, pair_terms: PairTerms) -> dict[str, Tensor]:
    """What the panel shows.

    Args:
        facts: FACTS by name, each (P, K, D): of P pairs, in K timestep buckets, at D draws of noise and timestep. NaN
            where there is no reference.
        shares: (K,) share of each bucket in training.
        pair_terms: See `gradient_norms`; beside the losses it gives the arguments of the preference term's sigmoid.

    Returns:
        Name -> (K + 1,) value of each bucket, and of all of them together as training mixes them. Without a reference,
        only those that need none.
    """
    shape = facts["between"].shape
    changes = {side: facts[f"error_{side}"] - facts[f"reference_{side}"] for side in ("preferred", "rejected")}
    with_reference = not facts["reference_preferred"].isnan().any()
    if with_reference:
        margin = changes["rejected"] - changes["preferred"]
    else:
        margin = facts["error_rejected"] - facts["error_preferred"]
    per_pair = margin.mean(2)
    per_pair = torch.cat([per_pair, (per_pair * shares).sum(1, keepdim=True)], dim=1)  # (P, K + 1)

    def by_bucket(values: Tensor) -> Tensor:
        means = values.reshape(shape).mean((0, 2))
        return torch.cat([means, (means * shares).sum()[None]])

    flat = {name: values.flatten() for name, values in facts.items()}
    errors = torch.cat([flat["error_preferred"], flat["error_rejected"]])
    reference = torch.cat([flat["reference_preferred"], flat["reference_rejected"]]) if with_reference else None
    _, decision = pair_terms(errors, reference)
    pull = by_bucket(gradient_norms(flat, pair_terms))
    metrics = {
        "accuracy": (per_pair > 0).double().where(per_pair != 0, 0.5).where(~per_pair.isnan(), math.nan).mean(0),
        "margin": by_bucket(margin),
        "error_preferred": by_bucket(facts["error_preferred"]),
        "error_rejected": by_bucket(facts["error_rejected"]),
        "gradient_share": torch.cat([pull[:-1] * shares, pull[-1:]]) / pull[-1].clamp(min=1e-300),
    }
    if decision is not None:
        metrics["decision"] = by_bucket(decision)
        metrics["saturated"] = by_bucket((torch.sigmoid(-decision) < SATURATED).double())
    if with_reference:
        metrics |= {f"change_{side}": by_bucket(values) for side, values in changes.items()}
        metrics["drift"] = by_bucket(facts["drift"])
    return metrics


def weight_change(backbone: Backbone) -> Tensor | None:
    """What the adapters add, relative to the weights they are added to: |s B A| / |W| over all of them.

    None where there are no plain LoRA adapters on ordinary weights.
    """
    added = total = torch.zeros((), device=backbone.device)
    for layer in backbone.denoiser.modules():
        if not isinstance(layer, LoraLayer) or "default" not in layer.lora_A:
            continue
        base = layer.get_base_layer().weight
        if not base.is_floating_point() or layer.lora_variant.get("default") is not None:
            return None
        parts = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        down, up = (whole(part).detach().float() for part in parts)
        down, up = down.flatten(1), up.flatten(1)
        # |B A|^2 = tr(B'B AA'), without the product of full size.
        added = added + layer.scaling["default"] ** 2 * ((up.T @ up) * (down @ down.T)).sum()
        total = total + whole(base).detach().float().square().sum()
    return (added.clamp(min=0) / total).sqrt() if total > 0 else None


def whole(weight: Tensor) -> Tensor:
    """A weight that FSDP2 has spread over the ranks, put together; any other as it is."""
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def mean_square(x: Tensor) -> Tensor:
    """(n, ...) -> (n,)."""
    return x.square().flatten(1).mean(1)


def stack(pairs: list[Tensor]) -> Tensor:
    """n tensors of a pair, (2, ...), in the layout of pairs, (2n, ...)."""
    return torch.stack(pairs, dim=1).flatten(0, 1)


def gather(trainer: pl.Trainer, pl_module: AlignmentModule, values: Tensor) -> Tensor:
    """(...) of each rank -> (ranks, ...), on the CPU of every rank."""
    if trainer.world_size == 1:
        return values[None]
    parts = trainer.strategy.all_gather(values.to(pl_module.device))
    return parts.reshape(trainer.world_size, *values.shape).cpu()


class LearningPanel(pl.Callback):
    """Shows whether a run learns: measures held-out pairs at every validation, always at the same noise.

    A loss hardly tells, because the noise and the timestep of a batch move it more than learning does. Here the same
    pairs are noised in the same way every time, so that only the model changes. Writes val/panel/..., and one picture
    per validation, panel/step_000100.png in the run's folder. Training is the same with and without it.

    Args:
        num_pairs: Validation pairs to look at, the first ones; ties do not count.
        num_buckets: Parts of the timestep range, of equal width, for which everything is measured.
        draws: Timesteps and noises for each pair and part. A validation runs the network on num_pairs x num_buckets x
            draws pairs, the first one also the reference.
        seed: Of the noise and the timesteps.
        read_reference: Where a full fine-tuning keeps no copy of the starting weights (Diffusion-ORPO, SFT), read them
            once at the first validation, for which a second denoiser must fit into memory for a moment. Otherwise what
            compares with the start is left out there.
    """

    def __init__(
        self, num_pairs: int = 64, num_buckets: int = 5, draws: int = 1, seed: int = 0, read_reference: bool = False
    ) -> None:
        for name, value in (("num_pairs", num_pairs), ("num_buckets", num_buckets), ("draws", draws)):
            if value < 1:
                raise ValueError(f"LearningPanel: {name} is {value}; expected 1 or more.")
        self.num_pairs = num_pairs
        self.num_buckets = num_buckets
        self.draws = draws
        self.seed = seed
        self.read_reference = read_reference
        self.pairs: list[dict[str, Any]] = []
        self.references: list[Tensor] = []
        self.history: dict[str, list[float]] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.history = state_dict["history"]

    def setup(self, trainer: pl.Trainer, pl_module: AlignmentModule, stage: str) -> None:
        """Raise before the networks are loaded if there will be nothing to see."""
        if stage not in ("fit", "validate"):
            return
        if not hasattr(pl_module, "pair_terms"):
            raise ValueError(
                f"LearningPanel: {type(pl_module).__name__} does not learn from pairs; expected DiffusionDPO, "
                "DiffusionORPO or DiffusionSFT. Leave the callback out."
            )
        if trainer.limit_val_batches == 0 or getattr(trainer.datamodule, "validation_split", "") is None:
            raise ValueError(
                "LearningPanel: there are no validation pairs to look at. Set `data.init_args.validation_split` (and "
                "no `trainer.limit_val_batches: 0`), or leave the callback out."
            )

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        # Between the start and the end of the validation, where an EMA has put its average in place.
        if trainer.sanity_checking:
            return
        backbone = pl_module.backbone
        # Whatever is drawn here, training draws on from where it was.
        with torch.random.fork_rng(devices=[backbone.device] if backbone.device.type == "cuda" else []):
            if not self.pairs:
                self.begin(trainer, pl_module)
            facts = self.measure(trainer, pl_module)
        metrics = panel_metrics(facts, self.shares, pl_module.pair_terms)
        change = weight_change(backbone)  # on every rank: FSDP2 has spread the weights
        self.tell(trainer, metrics, change)
        if trainer.is_global_zero:
            self.draw(trainer, metrics, len(facts["drift"]))

    # ------------------------------------------------------------------------------------------------ what is looked at

    def begin(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        """Choose pairs and timesteps; encode the pairs, and have the reference predict, both once and for all."""
        backbone = pl_module.backbone
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "panel"
        rank, world = trainer.global_rank, trainer.world_size
        mine = len(range(rank, self.num_pairs, world))
        for place, pair in enumerate(self.held_out_pairs(trainer)):
            if len(self.pairs) == max(1, mine):
                break
            if pair["label"].item() <= 0.5:
                continue
            torch.manual_seed(batch_seed(self.seed, "panel pair", rank + place * world))
            pair = trainer.strategy.batch_to_device(pair, pl_module.device)
            latents = backbone.latents(pair).cpu()
            condition = backbone.condition(pair, pair["prompts"])
            condition = Conditioning({name: tensor.cpu() for name, tensor in condition.items()})
            self.pairs.append({"latents": latents, "condition": condition, "seed": rank + place * world})
        self.number = min(mine, len(self.pairs))
        most = gather(trainer, pl_module, torch.tensor([len(self.pairs)]))
        if most.min() == 0:
            raise ValueError(
                f"LearningPanel: {int((most == 0).sum())} of {world} devices got no validation pair that is not a "
                "tie. Validate on more pairs, or leave the callback out."
            )
        # Every rank measures as many, as sharded networks need; what is too much is not counted.
        self.pairs += [self.pairs[-1]] * (int(most.max()) - len(self.pairs))

        torch.manual_seed(batch_seed(self.seed, "panel timesteps", 0))
        drawn = backbone.sample_timesteps(TIMESTEP_DRAWS).sort().values
        bucket = (drawn * self.num_buckets / backbone.num_timesteps).long().clamp(max=self.num_buckets - 1)
        counts = torch.bincount(bucket, minlength=self.num_buckets).cpu()
        self.trained = counts.nonzero().flatten().tolist()  # Turbo trains on few timesteps, and some buckets on none
        self.shares = (counts[self.trained] / TIMESTEP_DRAWS).double()
        places = [pair["seed"] * self.draws + draw for pair in self.pairs for draw in range(self.draws)]
        self.timesteps = [
            drawn[bucket == k][spread(max(places) + 1, int(counts[k]))[places].to(drawn.device)].view(-1, self.draws)
            for k in self.trained
        ]
        width = backbone.num_timesteps / self.num_buckets
        self.names = [f"{math.ceil(k * width)}-{math.ceil((k + 1) * width) - 1}" for k in self.trained]

        kept = backbone.lora is not None or hasattr(backbone, "reference_denoiser")
        if not kept and not self.read_reference:
            rank_zero_info(
                "LearningPanel: no copy of the starting weights is kept, so that what compares with them is left out; "
                "`read_reference: true` reads them once."
            )
            return
        with backbone.reference():
            self.references = [prediction.cpu() for *_, prediction, _ in self.predictions(backbone)]

    def held_out_pairs(self, trainer: pl.Trainer) -> Iterator[PairBatch]:
        """This rank's validation pairs, one by one, in the order of evaluation."""
        pairs = getattr(trainer.datamodule, "pair_dataloader", None)
        loader = trainer.val_dataloaders if pairs is None else pairs()
        for batch in loader:
            if "label" not in batch:
                raise ValueError("LearningPanel: the validation data are single images; it looks at pairs.")
            B = len(batch["prompts"])
            for i in range(B):
                pair = {name: value[[i, B + i]] for name, value in batch.items() if name in PAIRED}
                pair |= {"label": batch["label"][i : i + 1], "prompts": batch["prompts"][i : i + 1]}
                yield pair | ({"embeddings": batch["embeddings"]} if "embeddings" in batch else {})

    def predictions(self, backbone: Backbone) -> Iterator[tuple[int, int, slice, Tensor, Tensor]]:
        """Of the acting network: bucket, draw, pairs, its predictions and their targets, each (2n, C, h, w)."""
        n = max(1, backbone.chunk_size // 2)
        for k in range(len(self.trained)):
            for draw in range(self.draws):
                for start in range(0, len(self.pairs), n):
                    chunk = slice(start, start + n)
                    latents = stack([pair["latents"] for pair in self.pairs[chunk]]).to(backbone.device)
                    condition = [pair["condition"] for pair in self.pairs[chunk]]
                    condition = {name: stack([part[name] for part in condition]) for name in condition[0]}
                    condition = {name: tensor.to(backbone.device) for name, tensor in condition.items()}
                    noise = torch.stack([self.noise(pair, k, draw) for pair in self.pairs[chunk]])
                    noise = torch.cat([noise, noise]).to(backbone.device)
                    t = self.timesteps[k][chunk, draw].repeat(2)
                    noised, target = backbone.add_noise(latents, noise, t)
                    prediction = backbone.predict(noised, t, Conditioning(condition))
                    yield k, draw, chunk, prediction.float(), target

    def noise(self, pair: dict[str, Any], bucket: int, draw: int) -> Tensor:
        """(C, h, w), a function of pair, bucket and draw alone; drawn on the CPU, so that it is the same everywhere."""
        number = (pair["seed"] * self.num_buckets + self.trained[bucket]) * self.draws + draw
        generator = torch.Generator().manual_seed(batch_seed(self.seed, "panel noise", number))
        return torch.randn(pair["latents"].shape[1:], generator=generator)

    # -------------------------------------------------------------------------------------------------------- measuring

    def measure(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> dict[str, Tensor]:
        """FACTS by name, each (P, K, D) float64 on the CPU, of the pairs of all ranks."""
        found = torch.full((len(self.pairs), len(self.trained), self.draws, len(FACTS)), math.nan, dtype=torch.float64)
        references = iter(self.references)
        for k, draw, chunk, prediction, target in self.predictions(pl_module.backbone):
            residual = prediction - target
            preferred, rejected = residual.chunk(2)
            facts = [*mean_square(residual).chunk(2), None, None, mean_square(preferred - rejected), None]
            if self.references:
                reference = next(references).to(target.device)
                facts[2:4] = mean_square(reference - target).chunk(2)
                facts[5] = sum(mean_square(prediction - reference).chunk(2)) / 2
            for number, values in enumerate(facts):
                if values is not None:
                    found[chunk, k, draw, number] = values.double().cpu()
        found = gather(trainer, pl_module, found).transpose(0, 1)  # (pairs of a rank, ranks, ...)
        numbers = gather(trainer, pl_module, torch.tensor([self.number])).flatten()
        counted = torch.arange(len(found))[:, None] < numbers
        return dict(zip(FACTS, found[counted].unbind(-1), strict=True))

    # ---------------------------------------------------------------------------------------------------------- telling

    def tell(self, trainer: pl.Trainer, metrics: dict[str, Tensor], change: Tensor | None) -> None:
        named = {}
        for name, values in metrics.items():
            *buckets, together = values
            named |= {f"{name}_bucket_{k + 1}": value for k, value in zip(self.trained, buckets, strict=True)}
            if name != "gradient_share":
                named[name] = together
        if change is not None:
            named["weight_change"] = change
        named = {f"val/panel/{name}": value.detach().float().cpu() for name, value in named.items()}
        # Straight to the loggers, so that log_every_n_steps does not decide which of these rare values are kept.
        for logger in trainer.loggers:
            logger.log_metrics({name: value.item() for name, value in named.items()}, step=trainer.global_step)
        trainer.callback_metrics.update(named)
        if trainer.state.fn != TrainerFn.FITTING:
            self.history = {}
        step = {"step": float(trainer.global_step)} | {name: values[-1].item() for name, values in metrics.items()}
        for name, value in step.items():
            self.history.setdefault(name, []).append(value)

    def draw(self, trainer: pl.Trainer, metrics: dict[str, Tensor], number: int) -> None:
        picture = draw_panel(self.names, metrics, self.history, self.shares, number)
        self.folder.mkdir(parents=True, exist_ok=True)
        picture.save(self.folder / f"step_{trainer.global_step:06d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("panel", np.asarray(picture), trainer.global_step, dataformats="HWC")
            elif isinstance(logger, WandbLogger):
                logger.log_image("panel", [picture], step=trainer.global_step)
