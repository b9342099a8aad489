"""Lists of prompts: text, JSON, JSONL and parquet files, hub ids."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from datamodules.batches import PromptBatch
from datamodules.sampling import evaluation_loader
from datamodules.sources import load_rows

COLUMNS = ("caption", "prompt", "Prompt", "text")


@dataclass(frozen=True)
class PromptList:
    """A list of prompts.

    Args:
        source: A text file (one prompt per line), a JSON file (a list of strings, or of objects), a JSONL or parquet
            file, or a hub id.
        column: Column or key that holds the prompt. Null takes the first of caption, prompt, Prompt, text that exists.
        split: Split of a hub data set or of a folder of parquet files.
        max_prompts: Take only the first so many.
        seed: Image i starts from the noise of seed + i.
        batch_size: Images that each device makes at once; the images do not depend on it.
    """

    source: str
    column: str | None = None
    split: str = "train"
    max_prompts: int | None = None
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"Prompts: batch_size is {self.batch_size}, expected 1 or more.")
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"Prompts: max_prompts is {self.max_prompts}, expected 1 or more, or null for all.")
        if self.seed < 0:
            raise ValueError(f"Prompts: seed is {self.seed}, expected 0 or more.")

    def read(self) -> list[str]:
        """The prompts, checked."""
        path = Path(self.source).expanduser()
        if path.suffix in (".txt", ".json"):
            places, prompts = self._read_text(path) if path.suffix == ".txt" else self._read_json(path)
        else:
            rows = load_rows(self.source, self.split, None, self._choose)
            prompts = rows.column(rows.dataset.column_names[0]).to_pylist()
            places = rows.where
        prompts = prompts[: self.max_prompts]
        for i, prompt in enumerate(prompts):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(
                    f"{places(i)}: the prompt is {prompt!r}, expected text. Remove the entry, or write a prompt."
                )
        repeated = len(prompts) - len(set(prompts))
        rank_zero_info(
            f"Prompts: {len(prompts)} from {self.source}"
            + (f", {repeated} of them repeats of others" if repeated else "")
        )
        return prompts

    def loader(self, trainer: Trainer) -> DataLoader:
        """Every prompt once, over all ranks."""
        samples = [(prompt, self.seed + i, i) for i, prompt in enumerate(self.read())]
        return evaluation_loader(trainer, samples, self.batch_size, 0, collate_prompts)

    def _choose(self, name: str, found: list[str]) -> list[str]:
        wanted = (self.column,) if self.column else COLUMNS
        column = next((column for column in wanted if column in found), None)
        if column is None:
            raise ValueError(
                f"{name}: no column {' or '.join(wanted)}; found: {', '.join(found)}. Say which one holds the prompts "
                "with `column`."
            )
        return [column]

    def _read_text(self, path: Path) -> tuple[Callable[[int], str], list[str]]:
        prompts = read_utf8(path).splitlines()
        if not prompts:
            raise ValueError(f"{path}: empty; expected one prompt per line.")
        return lambda i: f"{path}, line {i + 1}", prompts

    def _read_json(self, path: Path) -> tuple[Callable[[int], str], list]:
        try:
            entries = json.loads(read_utf8(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not valid JSON ({error}).") from error
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{path}: expected a list of prompts, or of objects with a prompt each, and at least one.")
        prompts = []
        for i, entry in enumerate(entries):
            if isinstance(entry, dict):
                entry = entry[self._choose(f"{path}, entry {i}", list(entry))[0]]
            prompts.append(entry)
        return lambda i: f"{path}, entry {i}", prompts


def read_utf8(path: Path) -> str:
    """Text of a file that a user named."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (looked in {Path.cwd()}).")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}). Save the file as UTF-8.") from error


def collate_prompts(samples: list[tuple[str, int, int]]) -> PromptBatch:
    prompts, seeds, index = zip(*samples, strict=True)
    return {"prompts": list(prompts), "seeds": list(seeds), "index": list(index)}


class PromptDataModule(LightningDataModule):
    """Prompts to make images from: `main.py predict` and `main.py test`.

    Args:
        prompts: The list, and the seeds that go with it.
    """

    def __init__(self, prompts: PromptList) -> None:
        super().__init__()
        self.prompts = prompts

    def test_dataloader(self) -> DataLoader[PromptBatch]:
        return self.prompts.loader(self.trainer)

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        return self.prompts.loader(self.trainer)
