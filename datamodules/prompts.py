"""Lists of prompts: text, JSON, JSONL, CSV and parquet files, hub ids, and published sets by name."""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from datamodules.batches import PromptBatch
from datamodules.prompt_sets import SETS, PromptSet, PromptSetName, hash_of
from datamodules.sampling import evaluation_loader
from datamodules.sources import load_rows

COLUMNS = ("caption", "prompt", "Prompt", "text")
SEED_STRIDE = 1_000_000  # between two images of one prompt
Choose = Callable[[str, list[str]], list[str]]


@dataclass(frozen=True)
class Prompts:
    """Prompts as they were read.

    Attributes:
        texts: N prompts.
        groups: What sorts them (a category, a style) -> the group of each of the N.
        about: Where they come from, how many there are, and the hash of their text, for the results.
    """

    texts: list[str]
    groups: dict[str, list[str]]
    about: dict[str, Any]


class PromptSamples(list[tuple[str, int, int, dict[str, str]]]):
    """Prompt, seed, number and groups of every image to make, in order; `about` says where the prompts come from."""

    def __init__(self, prompts: Prompts, images_per_prompt: int, seed: int) -> None:
        groups = [dict(zip(prompts.groups, row, strict=True)) for row in zip(*prompts.groups.values(), strict=True)]
        super().__init__(
            (prompt, seed + i + SEED_STRIDE * k, i * images_per_prompt + k, groups[i] if groups else {})
            for i, prompt in enumerate(prompts.texts)
            for k in range(images_per_prompt)
        )
        self.about = prompts.about

    @property
    def prompts(self) -> list[str]:
        """The prompt of every image."""
        return [prompt for prompt, *_ in self]


@dataclass(frozen=True)
class PromptList:
    """A list of prompts.

    Args:
        source: A text file (one prompt per line), a JSON file (a list of strings, or of objects), a JSONL, CSV, TSV or
            parquet file, a folder of them, or a hub id. Or the name of a published prompt set, which is then read
            from the hub.
        column: Column or key that holds the prompt. Null takes the first of caption, prompt, Prompt, text that exists.
        split: Split of a hub data set or of a folder of parquet files. Null means `train`, or the prompt set's.
        max_prompts: Take only the first so many.
        seed: Image i starts from the noise of seed + i; further images of a prompt from that plus 1,000,000 each.
        batch_size: Images that each device makes at once; the images do not depend on it.
        images_per_prompt: Images made of each prompt, at different seeds.
        prompt_set: Published set that the source is a copy of: its layout is known, and its number of prompts and their
            text are checked.
        allow_other_count: Accept a copy of a prompt set with another number of prompts.
        groups: Columns or keys that sort the prompts; each group gets scores of its own. Null means the prompt set's
            (PartiPrompts' Category and Challenge, DrawBench's Category, HPDv2's style).
    """

    source: str
    column: str | None = None
    split: str | None = None
    max_prompts: int | None = None
    seed: int = 0
    batch_size: int = 8
    images_per_prompt: int = 1
    prompt_set: PromptSetName | None = None
    allow_other_count: bool = False
    groups: list[str] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "images_per_prompt"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"Prompts: {name} is {value}, expected 1 or more.")
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ValueError(f"Prompts: max_prompts is {self.max_prompts}, expected 1 or more, or null for all.")
        if self.seed < 0:
            raise ValueError(f"Prompts: seed is {self.seed}, expected 0 or more.")
        if self.prompt_set is not None and self.prompt_set not in SETS:
            raise ValueError(f"Prompts: prompt_set is {self.prompt_set!r}, expected {', '.join(SETS)}, or null.")

    @property
    def set_name(self) -> str | None:
        """Name of the prompt set, if it is one."""
        return self.source if self.prompt_set is None and self._from_hub else self.prompt_set

    @property
    def _from_hub(self) -> bool:
        return self.source in SETS and not Path(self.source).exists()

    def read(self) -> list[str]:
        """The prompts, checked."""
        return self.loaded.texts

    @cached_property
    def loaded(self) -> Prompts:
        """The prompts with their groups, read when they are first asked for, and checked.

        Raises:
            ValueError: if the source cannot be read, holds something else than prompts, or is another list than the
                prompt set that it is said to be.
            FileNotFoundError: if there is no such file.
        """
        known = SETS.get(self.set_name or "")
        columns, where = self._read(known)
        texts, *groups = columns.values()
        check_texts(texts, where)
        about = {"source": self.source, "set": self.set_name, "count": len(texts), "sha256": hash_of(texts)}
        if known is not None:
            about["as_published"] = None if known.sha256 is None else about["sha256"] == known.sha256
            self._compare(known, about)
        repeated = len(texts[: self.max_prompts]) - len(set(texts[: self.max_prompts]))
        about["used"] = len(texts[: self.max_prompts])
        rank_zero_info(
            f"Prompts: {about['used']} from {self.source}"
            + (f", {repeated} of them repeats of others" if repeated else "")
        )
        sorted_by = {
            name: [str(group).strip() for group in values[: self.max_prompts]]
            for name, values in zip(list(columns)[1:], groups, strict=True)
        }
        return Prompts(texts[: self.max_prompts], sorted_by, about)

    def loader(self, trainer: Trainer) -> DataLoader:
        """Every image once, over all ranks."""
        samples = PromptSamples(self.loaded, self.images_per_prompt, self.seed)
        return evaluation_loader(trainer, samples, self.batch_size, 0, collate_prompts)

    def _compare(self, known: PromptSet, about: dict[str, Any]) -> None:
        """Refuse, or announce, what is not the published set."""
        name = f"Prompts: {self.source} holds {about['count']} prompts, but {self.set_name} has {known.count}"
        if about["count"] != known.count and not self.allow_other_count:
            raise ValueError(
                f"{name}: numbers from it could not be compared with others'. The published list is {known.where}; "
                "`allow_other_count: true` takes this one as it is, and the results will say so."
            )
        if about["count"] != known.count:
            rank_zero_warn(f"{name}; it is taken as it is.")
        elif about["as_published"] is False:
            rank_zero_warn(
                f"Prompts: {self.source} has as many prompts as {self.set_name}, but their text is not the published "
                f"one (SHA-256 {about['sha256']}, published {known.sha256}); the results will say so. Copies often "
                f"differ in quotation marks. The published list is {known.where}."
            )

    # -------------------------------------------------------------------------------------------------- the sources

    def _read(self, known: PromptSet | None) -> tuple[dict[str, list], Callable[[int], str]]:
        """Column of the prompts and those of the groups, and the place of each row."""
        path = Path(self.source).expanduser()
        if known is not None:
            if files := self._files(known, path):
                return self._read_files(known, files)
            if self._from_hub:
                try:
                    return self._read_rows(known.hub, self.split or known.split)
                except ValueError as error:
                    raise self._unreachable(known, error) from error
        if path.suffix in (".txt", ".json", ".csv", ".tsv"):
            return self._read_file(path)
        if not path.exists() and "/" not in self.source and not path.suffix:
            raise ValueError(
                f"Prompts: there is no file {self.source!r} (looked in {Path.cwd()}), and no prompt set of that name; "
                f"the known ones are {', '.join(SETS)}."
            )
        split = self.split or (known.split if known is not None and not path.is_file() else "train")
        return self._read_rows(self.source, split)

    def _files(self, known: PromptSet, path: Path) -> list[Path]:
        """The files of a prompt set: in a folder, or from the hub; none if the source is something else."""
        if path.is_dir():
            for folder in (path, path / "benchmark"):
                files = [folder / Path(file).name for file in known.files]
                if any(file.is_file() for file in files):
                    return files
            return []
        if not known.files or not (self._from_hub or self.source == known.hub):
            return []
        from huggingface_hub import hf_hub_download

        try:
            return [Path(hf_hub_download(known.hub, file, repo_type="dataset")) for file in known.files]
        except (OSError, ValueError) as error:
            raise self._unreachable(known, error) from error

    def _unreachable(self, known: PromptSet, error: Exception) -> ValueError:
        return ValueError(
            f"Prompts: {self.set_name} is not in the cache of the hub, and the hub's {known.hub} cannot be reached: "
            f"{str(error).strip().splitlines()[0]} Get it ({known.where}) where there is a network, and give "
            f"`source: <file or folder>` with `prompt_set: {self.set_name}`."
        )

    def _read_files(self, known: PromptSet, files: list[Path]) -> tuple[dict[str, list], Callable[[int], str]]:
        if known.group_of_file is None:
            return self._read_file(files[0])
        columns: dict[str, list] = {"prompt": [], known.group_of_file: []}
        places: list[str] = []
        for file in files:
            parts, where = self._read_file(file)
            texts = next(iter(parts.values()))
            columns["prompt"] += texts
            columns[known.group_of_file] += [file.stem] * len(texts)
            places += map(where, range(len(texts)))
        return columns, places.__getitem__

    def _read_rows(self, source: str, split: str) -> tuple[dict[str, list], Callable[[int], str]]:
        rows = load_rows(source, split, None, self._choose)
        return {name: rows.column(name).to_pylist() for name in rows.dataset.column_names}, rows.where

    def _read_file(self, path: Path) -> tuple[dict[str, list], Callable[[int], str]]:
        if path.suffix == ".txt":
            return self._read_text(path)
        return self._read_json(path) if path.suffix == ".json" else self._read_table(path)

    def _choose(self, name: str, found: list[str]) -> list[str]:
        known = SETS.get(self.set_name or "")
        wanted = (self.column,) if self.column else (*COLUMNS, *(known.columns if known else ()))
        column = next((column for column in wanted if column in found), None)
        if column is None:
            raise ValueError(
                f"{name}: no column {' or '.join(wanted)}; found: {', '.join(found)}. Say which one holds the prompts "
                "with `column`."
            )
        if missing := [group for group in self.groups or () if group not in found]:
            raise ValueError(f"{name}: no column {missing[0]} to sort the prompts by; found: {', '.join(found)}.")
        groups = self.groups or [group for group in (known.groups if known else ()) if group in found]
        return [column, *(group for group in groups if group != column)]

    def _read_text(self, path: Path) -> tuple[dict[str, list], Callable[[int], str]]:
        # Not `splitlines`: form feeds and Unicode's separators may stand in a prompt.
        lines = read_utf8(path).removesuffix("\n").split("\n")
        if lines == [""]:
            raise ValueError(f"{path}: empty; expected one prompt per line.")
        if self.groups:
            raise ValueError(f"{path}: a text file has no columns to sort by; groups is {self.groups}, expected null.")
        return {"prompt": lines}, lambda i: f"{path}, line {i + 1}"

    def _read_json(self, path: Path) -> tuple[dict[str, list], Callable[[int], str]]:
        try:
            entries = json.loads(read_utf8(path))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}: not valid JSON ({error}).") from error
        if not isinstance(entries, list) or not entries:
            raise ValueError(f"{path}: expected a list of prompts, or of objects with a prompt each, and at least one.")
        columns: dict[str, list] = {}
        for i, entry in enumerate(entries):
            row = {"prompt": entry}
            if isinstance(entry, dict):
                row = {name: entry[name] for name in self._choose(f"{path}, entry {i}", list(entry))}
            if columns and row.keys() != columns.keys():
                raise ValueError(f"{path}, entry {i}: has {', '.join(row)}, the entries before {', '.join(columns)}.")
            for name, value in row.items():
                columns.setdefault(name, []).append(value)
        return columns, lambda i: f"{path}, entry {i}"

    def _read_table(self, path: Path) -> tuple[dict[str, list], Callable[[int], str]]:
        """CSV with quotation marks, or TSV, in which they are letters like others."""
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {"strict": True}
        reader = csv.reader(io.StringIO(read_utf8(path)), **style)
        rows, lines = [], []
        try:
            for row in reader:
                rows.append(row)
                lines.append(reader.line_num)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not a table ({error}).") from error
        if len(rows) < 2:
            raise ValueError(f"{path}: expected a line of column names, and at least one prompt.")
        for row, line in zip(rows, lines, strict=True):
            if len(row) != len(rows[0]):
                raise ValueError(f"{path}, line {line}: {len(row)} cells, but {len(rows[0])} column names.")
        chosen = self._choose(str(path), rows[0])
        cells = [[row[rows[0].index(name)] for row in rows[1:]] for name in chosen]
        return dict(zip(chosen, cells, strict=True)), lambda i: f"{path}, line {lines[i + 1]}"


def problem_of(text: Any) -> str | None:
    """What keeps a value from being a prompt."""
    if not isinstance(text, str) or not text.strip():
        return f"is {text!r:.80}, expected text. Remove the entry, or write a prompt"
    if "\0" in text:
        return f"{text[:40]!r} holds NUL characters: the file is probably UTF-16. Save it as UTF-8"
    try:
        text.encode()
    except UnicodeEncodeError:
        return f"{text[:40]!r} holds half of a surrogate pair, which no file can hold. Write the character itself"
    return None


def check_texts(texts: list, where: Callable[[int], str]) -> None:
    """Refuse what is not a prompt.

    Raises:
        ValueError: naming the place of the first one, and how many there are.
    """
    bad = [i for i, text in enumerate(texts) if problem_of(text)]
    if bad:
        more = f" ({len(bad)} entries of {len(texts)} are no prompts.)" if len(bad) > 1 else ""
        raise ValueError(f"{where(bad[0])}: the prompt {problem_of(texts[bad[0]])}.{more}")


def read_utf8(path: Path) -> str:
    """Text of a file that a user named."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a file.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist (looked in {Path.cwd()}).")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        with path.open("rb") as file:
            marked = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
        encoding = "UTF-16" if marked else "LATIN1"
        raise ValueError(
            f"{path}: not UTF-8 ({error}){', it begins as UTF-16 does' if marked else ''}. Save the file as UTF-8, for "
            f"example by `iconv -f {encoding} -t UTF-8 {path.name} > utf8{path.suffix}`."
        ) from error


def collate_prompts(samples: list[tuple[str, int, int, dict[str, str]]]) -> PromptBatch:
    prompts, seeds, index, groups = zip(*samples, strict=True)
    batch = PromptBatch(prompts=list(prompts), seeds=list(seeds), index=list(index))
    if any(groups):
        batch["groups"] = list(groups)
    return batch


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


class PromptLoaders:
    """What a data module for training gives `main.py test` and `main.py predict`: the images of `test_prompts`."""

    test_prompts: PromptList | None
    trainer: Trainer

    def test_dataloader(self) -> DataLoader[PromptBatch]:
        return self._prompt_loader()

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        return self._prompt_loader()

    def _prompt_loader(self) -> DataLoader[PromptBatch]:
        if self.test_prompts is None:
            raise ValueError(
                "There are no prompts to make images from: set `data.init_args.test_prompts.source` to a prompt file."
            )
        return self.test_prompts.loader(self.trainer)
