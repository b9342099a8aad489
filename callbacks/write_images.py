"""Write the images that `predict` makes, with the prompt and seed of each."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from callbacks.evaluation import gather_rows
from callbacks.grids import to_pil
from lightning_modules.base import AlignmentModule


class WriteImages(pl.Callback):
    """Save every predicted image as 00000.png, 00001.png, ... and list them in metadata.jsonl.

    The number is the position in the prompt list, never a part of the prompt. The folder opens with `datasets` as an
    `imagefolder`.

    Args:
        folder: Where the images go; must be empty or absent. Null means `images/` in the run's folder.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: AlignmentModule, stage: str) -> None:
        if stage != "predict":
            return
        self.target = Path(self.folder or Path(trainer.log_dir or trainer.default_root_dir) / "images")
        if self.target.is_dir() and any(self.target.iterdir()) or self.target.is_file():
            raise ValueError(
                f"WriteImages: {str(self.target)!r} is not an empty folder, and nothing is overwritten. Name another "
                "`folder`, leave it out to write into the run's own, or move the old images away."
            )
        trainer.strategy.barrier("every rank has looked before one writes")
        self.target.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: AlignmentModule,
        outputs: dict[str, Any],
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for index, prompt, seed, image in zip(
            outputs["index"], outputs["prompts"], outputs["seeds"], outputs["images"], strict=True
        ):
            name = f"{index:05d}.png"
            to_pil(image).save(self.target / name)
            self.rows.append({"index": index, "file_name": name, "prompt": prompt, "seed": seed})

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        rows = gather_rows(self.rows, trainer.world_size)
        if trainer.is_global_zero:
            lines = [json.dumps({key: row[key] for key in row if key != "index"}, ensure_ascii=False) for row in rows]
            (self.target / "metadata.jsonl").write_text("\n".join([*lines, ""]), encoding="utf-8")
            print(f"{len(rows)} images in {self.target}")
