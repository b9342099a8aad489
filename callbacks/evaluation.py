"""Base against tuned model on the same prompts and seeds: scores, paired statistics, and a grid to look at."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor

from callbacks.grids import draw_grid, to_pil
from lightning_modules.base import AlignmentModule
from lightning_modules.rewards.base import Reward

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


def compare(tuned: Tensor, base: Tensor, prompts: list[str]) -> dict[str, Any]:
    """Paired statistics of one reward.

    The prompt is the unit: images of the same prompt at several seeds are averaged first, because they are not
    independent. With one image per prompt these are the plain means over images.

    Args:
        tuned: (n,) scores of the tuned model's images.
        base: (n,) scores of the base model's images at the same prompts and seeds.
        prompts: n prompts.

    Returns:
        `base` and `tuned` (means), `difference` and `win_rate`, and the 95 % intervals of the last two
        (`difference_interval`, `win_rate_interval`; None for a single prompt).
    """
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    groups = torch.tensor([numbers[prompt] for prompt in prompts])
    difference = means_by_group(tuned.double() - base.double(), groups)
    win = means_by_group(wins(tuned, base), groups)
    return {
        "base": means_by_group(base, groups).mean().item(),
        "tuned": means_by_group(tuned, groups).mean().item(),
        "difference": difference.mean().item(),
        "difference_interval": bootstrap_interval(difference),
        "win_rate": win.mean().item(),
        "win_rate_interval": bootstrap_interval(win),
    }


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


def markdown(text: str) -> str:
    """Text for a cell of a Markdown table: one line, nothing in it taken for markup."""
    line = " ".join(text.split())
    return "".join(f"\\{letter}" if letter in "\\`|*_[]<>#~$!&" else letter for letter in line)


class Evaluation(pl.Callback):
    """Score what `test` generates: base and tuned model on the same prompts and seeds.

    Writes into `evaluation/` of the run's folder: results.json and results.md (mean of base and tuned, paired
    difference and win rate, the last two with 95 % bootstrap intervals over prompts), scores.csv (every image) and
    grid.png (base beside tuned). Prints the table, and the path of the grid last.

    Args:
        rewards: Name -> reward, for example `{match: {class_path: lightning_modules.rewards.toy_oracle.ToyOracle}}`.
        grid_rows: Number of prompts in the grid: the first ones of the list.
        save_images: Save every image too, as evaluation/images/00000_base.png and 00000_tuned.png.
    """

    def __init__(self, rewards: dict[str, Reward], grid_rows: int = 8, save_images: bool = False) -> None:
        if not rewards:
            raise ValueError(
                "rewards: there is none; expected a name and a reward, such as {match: {class_path: ...}}."
            )
        if grid_rows < 1:
            raise ValueError(f"grid_rows is {grid_rows}; expected 1 or more prompts.")
        self.rewards = {name: reward.eval().requires_grad_(False) for name, reward in rewards.items()}
        self.grid_rows = grid_rows
        self.save_images = save_images
        self.report: tuple[dict[str, Any], Path] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: AlignmentModule, stage: str) -> None:
        if stage == "test":
            for reward in self.rewards.values():
                reward.load()  # a wrong weight file is told of before the first image is made

    def on_test_start(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "evaluation"
        (self.folder / "images" if self.save_images else self.folder).mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        for reward in self.rewards.values():
            reward.to(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: AlignmentModule,
        outputs: dict[str, Any],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        chunk_size, device = pl_module.backbone.chunk_size, pl_module.device
        images = {"base": outputs["base_images"], "tuned": outputs["images"]}
        scores = {
            role: score_images(self.rewards, images[role], outputs["prompts"], chunk_size, device) for role in images
        }
        for i, index in enumerate(outputs["index"]):
            row = {"index": index, "prompt": outputs["prompts"][i], "seed": outputs["seeds"][i]}
            row |= {f"{name}_{role}": scores[role][name][i].item() for name in self.rewards for role in images}
            if index < self.grid_rows:
                row["images"] = {role: images[role][i].cpu() for role in images}
            self.rows.append(row)
            if self.save_images:
                for role in images:
                    to_pil(images[role][i]).save(self.folder / "images" / f"{index:05d}_{role}.png")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        rows = gather_rows(self.rows, trainer.world_size)
        if not trainer.is_global_zero:
            return
        prompts, seeds = [row["prompt"] for row in rows], {row["seed"] for row in rows}
        results: dict[str, Any] = {
            "pretrained": pl_module.backbone.pretrained,
            "checkpoint": trainer.ckpt_path,
            "num_prompts": len(set(prompts)),
            "num_images": len(rows),
            "seeds": {"number": len(seeds), "first": min(seeds), "last": max(seeds)},
            "sampler": type(pl_module.backbone.pipeline.scheduler).__name__,
            "num_inference_steps": pl_module.backbone.num_inference_steps,
            "guidance_scale": pl_module.backbone.guidance_scale,
            "interval": f"95 % percentile bootstrap over prompts, {RESAMPLES} resamples, seed {BOOTSTRAP_SEED}",
            "rewards": {},
        }
        for name in self.rewards:
            tuned, base = (torch.tensor([row[f"{name}_{role}"] for row in rows]) for role in ("tuned", "base"))
            check_finite(name, base, prompts)
            check_finite(name, tuned, prompts)
            results["rewards"][name] = compare(tuned, base, prompts)

        shown = [row for row in rows if "images" in row]
        columns = {role: torch.stack([row["images"][role] for row in shown]) for role in ("base", "tuned")}
        draw_grid(columns, [row["prompt"] for row in shown]).save(self.folder / "grid.png")
        write_scores(self.folder / "scores.csv", rows)
        (self.folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        (self.folder / "results.md").write_text(results_page(results, shown), encoding="utf-8")

        metrics = {
            f"test/{name}{suffix}": statistics[key]
            for name, statistics in results["rewards"].items()
            for suffix, key in (("", "tuned"), ("_base", "base"), ("_win_rate", "win_rate"))
        }
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self.report = results, self.folder / "grid.png"

    def teardown(self, trainer: pl.Trainer, pl_module: AlignmentModule, stage: str) -> None:
        """Print the report when no progress bar draws over it any more."""
        if self.report is None:
            return
        if isinstance(bar := trainer.progress_bar_callback, RichProgressBar):
            bar.teardown(trainer, pl_module, stage)
            bar.progress = None  # its own teardown, which comes later, would print an empty line after the path
        print_report(*self.report)
        self.report = None


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


HEADER = ["reward", "base", "tuned", "difference", "win rate"]


def table_cells(results: dict[str, Any]) -> list[list[str]]:
    """One row of text per reward, under `HEADER`."""
    cells = []
    for name, statistics in results["rewards"].items():
        difference, win = f"{statistics['difference']:+.4f}", f"{100 * statistics['win_rate']:.1f} %"
        if statistics["difference_interval"] is not None:
            difference += " [{:+.4f}, {:+.4f}]".format(*statistics["difference_interval"])
            win += " [{:.1f}, {:.1f}]".format(*(100 * end for end in statistics["win_rate_interval"]))
        cells.append([name, f"{statistics['base']:.4f}", f"{statistics['tuned']:.4f}", difference, win])
    return cells


def settings_line(results: dict[str, Any]) -> str:
    """What was sampled, in one sentence."""
    seeds = results["seeds"]
    seeds = f"seed {seeds['first']}" if seeds["number"] == 1 else "{number} seeds ({first} to {last})".format(**seeds)
    return (
        f"{results['num_prompts']} prompts, {results['num_images']} images, {seeds}, "
        f"{results['num_inference_steps']} steps of {results['sampler']}, guidance {results['guidance_scale']:g}; "
        f"in brackets the {results['interval']}."
    )


def results_page(results: dict[str, Any], shown: list[dict[str, Any]]) -> str:
    """The Markdown page: the table of rewards, the grid, and the scores of the prompts in the grid."""
    tuned = "the weights in memory" if results["checkpoint"] is None else markdown(str(results["checkpoint"]))
    page = ["# Evaluation", "", f"Base model: {markdown(results['pretrained'])}. Tuned model: {tuned}.", ""]
    page += [settings_line(results), "", *markdown_table(HEADER, table_cells(results)), ""]
    page += ["![Base beside tuned](grid.png)", ""]
    header = ["prompt", "seed", *(f"{name}, base → tuned" for name in results["rewards"])]
    rows = [
        [row["prompt"], str(row["seed"])]
        + [f"{row[f'{name}_base']:.4f} → {row[f'{name}_tuned']:.4f}" for name in results["rewards"]]
        for row in shown
    ]
    return "\n".join([*page, *markdown_table(header, rows), ""])


def markdown_table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; the headings and the first column, which hold users' words, are escaped."""
    lines = [[markdown(cell) for cell in header], ["---"] * len(header)]
    lines += [[markdown(row[0]), *row[1:]] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def print_report(results: dict[str, Any], grid: Path) -> None:
    """The table, and the path of the grid as the last line."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Base against tuned model", caption=Text(settings_line(results)), box=box.SIMPLE_HEAD)
    for heading in HEADER:
        table.add_column(heading, justify="left" if heading == "reward" else "right")
    for row in table_cells(results):
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(table)
    print(grid, flush=True)
