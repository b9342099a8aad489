"""A model against a baseline on the same prompts and seeds: scores, paired statistics, and a grid to look at."""

import csv
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

from callbacks.baselines import ImageFolder, kind_of, load_baseline
from callbacks.evaluation_report import print_report, results_page
from callbacks.grids import draw_grid
from callbacks.image_store import Painter, describe_policy, hash_weights, image_size, write_image
from callbacks.statistics import BOOTSTRAP_SEED, RESAMPLES, compare
from datamodules.batches import PromptBatch
from lightning_modules.base import AlignmentModule
from lightning_modules.rewards.base import Reward


def score_images(
    rewards: dict[str, Reward], images: Tensor, prompts: list[str], chunk_size: int, device: torch.device
) -> dict[str, Tensor]:
    """Score images with every reward, `chunk_size` at a time on `device`.

    Args:
        rewards: Name -> reward.
        images: (B, 3, H, W) in [0, 1].
        prompts: B prompts.
        chunk_size: Images scored at once.
        device: Where the rewards are.

    Returns:
        Name -> (B,) float32 scores on the CPU.

    Raises:
        ValueError: if a reward does not return one score per image.
    """
    scores = {}
    for name, reward in rewards.items():
        with torch.no_grad():
            parts = [
                reward(images[start : start + chunk_size].to(device), prompts[start : start + chunk_size]).float().cpu()
                for start in range(0, len(prompts), chunk_size)
            ]
        scores[name] = torch.cat(parts)
        if scores[name].shape != (len(prompts),):
            raise ValueError(
                f"reward {name!r} returned scores of shape {tuple(scores[name].shape)} for {len(prompts)} images; "
                f"expected one number per image, shape ({len(prompts)},)."
            )
    return scores


def check_finite(name: str, scores: Tensor, prompts: list[str]) -> None:
    """Refuse to compare models by scores that are not numbers.

    Raises:
        ValueError: naming the first prompt whose score is NaN or infinite.
    """
    for prompt, score in zip(prompts, scores.tolist(), strict=True):
        if not math.isfinite(score):
            raise ValueError(
                f"reward {name!r} scored an image of prompt {prompt!r} as {score}; expected a finite number. Look at "
                "the image: a model that has diverged makes images of NaN."
            )


class Evaluation(pl.Callback):
    """Make the images of `test`, score them, and compare the model with a baseline at the same prompts and seeds.

    Writes into `evaluation/` of the run's folder: results.json and results.md (means, paired difference and win rate,
    the last two with 95 % bootstrap intervals over prompts; the same for each group of prompts, where the list sorts
    them), scores.csv (every image) and grid.png (baseline beside model). Prints the table, and the path of the grid
    last. Images are kept, and never made twice: not by a test that goes on after a kill, nor the baseline's by the
    next one.

    Args:
        rewards: Name -> reward, for example `{match: {class_path: lightning_modules.rewards.toy_oracle.ToyOracle}}`.
        grid_rows: Number of images in the grid: the first ones.
        save_images: Save every image under its number too, as evaluation/images/00000_base.png and 00000_tuned.png.
        baseline: What the model is compared with. `base` is the model that it was trained from; null is nothing. Or
            the path of a checkpoint (.ckpt) of a run with the same settings, of an exported LoRA or pipeline, or of a
            folder with one image for each of ours, 00000.png, 00001.png, ..., as `predict` writes it; or a pipeline's
            hub id.
        image_folder: Where images are kept, under names by which a later test finds them. Null means `images/` beside
            the folders of this run's versions.
    """

    def __init__(
        self,
        rewards: dict[str, Reward],
        grid_rows: int = 8,
        save_images: bool = False,
        baseline: str | None = "base",
        image_folder: str | None = None,
    ) -> None:
        if not rewards:
            raise ValueError(
                "rewards: there is none; expected a name and a reward, such as {match: {class_path: ...}}."
            )
        if grid_rows < 1:
            raise ValueError(f"grid_rows is {grid_rows}; expected 1 or more images.")
        self.rewards = {name: reward.eval().requires_grad_(False) for name, reward in rewards.items()}
        self.grid_rows = grid_rows
        self.save_images = save_images
        self.baseline = baseline
        self.image_folder = image_folder
        self.report: tuple[dict[str, Any], str, Path] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: AlignmentModule, stage: str) -> None:
        """Everything that can be wrong and is known before the model is loaded."""
        if stage != "test":
            return
        self.kind = kind_of(self.baseline)
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "evaluation"
        runs = Path(trainer.log_dir).parent if trainer.loggers else Path(trainer.default_root_dir)
        self.kept = Path(self.image_folder).expanduser() if self.image_folder else runs / "images"
        for folder in (self.folder / "images" if self.save_images else self.folder, self.kept):
            check_writable(folder)
        if trainer.datamodule is not None:
            trainer.datamodule.test_dataloader()  # reads the prompts
        for reward in self.rewards.values():
            reward.load()

    def on_test_start(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        self.rows: list[dict[str, Any]] = []
        self.painters: dict[str, Painter] = {}
        self.draw: dict[str, Callable[[PromptBatch], Tensor]] = {}
        data = trainer.test_dataloaders.dataset
        self.about = getattr(data, "about", None)
        if self.kind == "images":
            prompts = getattr(data, "prompts", None) or [None] * len(data)
            images = ImageFolder(Path(self.baseline).expanduser(), prompts, image_size(pl_module.backbone))
            self.draw["base"] = lambda batch: images(batch["index"])
        elif self.kind == "base":
            pl_module.backbone.keep_reference()  # otherwise every batch would read the starting weights again
        elif self.kind != "none":
            other = load_baseline(self.kind, self.baseline, pl_module)
            self.paint("base", Painter(other, describe_policy(other, hash_weights(other)), self.kept))
        for reward in self.rewards.values():
            reward.to(pl_module.device)

    def paint(self, role: str, painter: Painter) -> None:
        self.painters[role] = painter
        self.draw[role] = lambda batch: painter(batch["prompts"], batch["seeds"])

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: AlignmentModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx > 0:
            return
        # Not earlier: another callback may put an average in the place of the weights when the test starts.
        backbone = pl_module.backbone
        hashes = hash_weights(backbone)
        if self.kind == "base":
            policy = describe_policy(backbone, hashes, reference=True)
            self.paint("base", Painter(backbone, policy, self.kept, backbone.reference))
        self.policy = describe_policy(backbone, hashes)
        self.paint("tuned", Painter(backbone, self.policy, self.kept))

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: AlignmentModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        chunk_size, device, prompts = pl_module.backbone.chunk_size, pl_module.device, batch["prompts"]
        images = {role: draw(batch) for role, draw in self.draw.items()}
        scores = {role: score_images(self.rewards, images[role], prompts, chunk_size, device) for role in images}
        for role in scores:
            for name in self.rewards:
                check_finite(name, scores[role][name], prompts)
        for i, index in enumerate(batch["index"]):
            row = {"index": index, "prompt": prompts[i], "seed": batch["seeds"][i]}
            row |= {f"group_{name}": group for name, group in batch.get("groups", [{}] * len(prompts))[i].items()}
            row |= {f"{name}_{role}": scores[role][name][i].item() for name in self.rewards for role in images}
            if index < self.grid_rows:
                row["images"] = {role: images[role][i] for role in images}
            self.rows.append(row)
            if self.save_images:
                for role in images:
                    write_image(self.folder / "images" / f"{index:05d}_{role}.png", images[role][i])

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        made = sum(painter.made for painter in self.painters.values())
        made = int(trainer.strategy.reduce(torch.tensor(made, device=pl_module.device), reduce_op="sum"))
        rows = gather_rows(self.rows, trainer.world_size)
        if not trainer.is_global_zero:
            return
        results = self.summarize(trainer, pl_module, rows)
        shown = [row for row in rows if "images" in row]
        columns = {role: torch.stack([row["images"][role] for row in shown]) for role in self.draw}
        draw_grid(columns, [row["prompt"] for row in shown]).save(self.folder / "grid.png")
        write_scores(self.folder / "scores.csv", rows)
        (self.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (self.folder / "results.md").write_text(results_page(results, shown), encoding="utf-8")

        metrics = {
            f"test/{name}{suffix}": statistics[key]
            for name, statistics in results["rewards"].items()
            for suffix, key in (("", "tuned"), ("_base", "base"), ("_win_rate", "win_rate"))
            if key in statistics
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        there = len(rows) * len(self.painters) - made
        self.report = results, f"{made} images made, {there} were there; {self.kept}", self.folder / "grid.png"

    def on_test_end(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        self.painters, self.draw = {}, {}  # a baseline's weights need not stay in memory

    def summarize(self, trainer: pl.Trainer, pl_module: AlignmentModule, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """What results.json holds."""
        seeds = {row["seed"] for row in rows}
        baseline: dict[str, Any] = {"kind": self.kind}
        if self.kind not in ("none", "base"):
            baseline["path"] = self.baseline
        if "base" in self.painters:
            baseline["policy"] = self.painters["base"].policy
        results: dict[str, Any] = {
            "pretrained": pl_module.backbone.pretrained,
            "checkpoint": trainer.ckpt_path,
            "policy": self.painters["tuned"].policy,
            "baseline": baseline,
            "prompts": self.about,
            "num_prompts": len({row["prompt"] for row in rows}),
            "num_images": len(rows),
            "seeds": {"number": len(seeds), "first": min(seeds), "last": max(seeds)},
            "sampler": self.policy["sampler"][0],
            "num_inference_steps": pl_module.backbone.num_inference_steps,
            "guidance_scale": pl_module.backbone.guidance_scale,
            "few_step": self.policy.get("few_step"),
            "interval": f"95 % percentile bootstrap over prompts, {RESAMPLES} resamples, seed {BOOTSTRAP_SEED}",
            "rewards": compare_rewards(list(self.rewards), rows),
        }
        for name in (key.removeprefix("group_") for key in rows[0] if key.startswith("group_")):
            groups: dict[str, list[dict[str, Any]]] = {}
            for row in rows:
                groups.setdefault(row[f"group_{name}"], []).append(row)
            results.setdefault("groups", {})[name] = {
                group: {
                    "num_prompts": len({row["prompt"] for row in members}),
                    "rewards": compare_rewards(list(self.rewards), members),
                }
                for group, members in groups.items()
            }
        return results

    def teardown(self, trainer: pl.Trainer, pl_module: AlignmentModule, stage: str) -> None:
        """Print the report when no progress bar draws over it any more."""
        if self.report is None:
            return
        if isinstance(bar := trainer.progress_bar_callback, RichProgressBar):
            bar.teardown(trainer, pl_module, stage)
            bar.progress = None  # its own teardown, which comes later, would print an empty line after the path
        print_report(*self.report)
        self.report = None


def check_writable(folder: Path) -> None:
    """Make a folder, and raise before anything is built if it cannot be written.

    Raises:
        OSError: naming the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
    except OSError as error:
        raise OSError(
            f"Evaluation: cannot write into {folder.absolute()}: {error.strerror}. It needs a folder that you may "
            "write to and that has room."
        ) from None


def compare_rewards(names: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Name of each reward -> its statistics over these rows."""

    def scores(name: str, role: str) -> Tensor | None:
        key = f"{name}_{role}"
        return torch.tensor([row[key] for row in rows]) if key in rows[0] else None

    prompts = [row["prompt"] for row in rows]
    return {name: compare(scores(name, "tuned"), scores(name, "base"), prompts) for name in names}


def gather_rows(rows: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """The rows of all ranks in the order of the prompts, without those that a sampler repeated to fill a batch."""
    if world_size > 1:
        parts: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(parts, rows)
        rows = [row for part in parts for row in part]
    by_index = {row["index"]: row for row in rows}
    return [by_index[index] for index in sorted(by_index)]


def write_scores(path: Path, rows: list[dict[str, Any]]) -> None:
    """One line per prompt and seed: index, prompt, seed and every score."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [key for key in rows[0] if key != "images"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
