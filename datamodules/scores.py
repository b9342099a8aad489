"""Scores of the stored images by a reward, computed once, and the labels that follow from them.

    scores.json                       which reward, of which rows: compared before more of them are computed
    <split>-<first>-<last>.parquet    of these rows: name, caption, bytes of both images, score of both images

`python main.py cache --rewards.<name> <class>` writes them, below <folder>/scores/<name>.
"""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.cache import changes, digest, parse_json, row_keys, shards_of
from datamodules.cache_filling import Batches, prepare_as_for_training, write_file

if TYPE_CHECKING:
    import pyarrow as pa

    from datamodules.pickapic import PairTable, PickAPicDataModule, Samples

FORMAT = 1
HEADER = "scores.json"
COLUMNS = ("row", "caption", "bytes_0", "bytes_1", "score_0", "score_1")
ROWS_AT_ONCE = 8
SCORE_THEM = "Have them scored: `python main.py cache` with this config and `--rewards.<name> <class>`"


def labels_of(scores: np.ndarray, scale: float | None = None, threshold: float | None = None) -> np.ndarray:
    """Labels of pairs by the scores of their images.

    Args:
        scores: (N, 2) of the first and the second stored image.
        scale: None prefers the image with the higher score, and at equal scores the first one, as the published code
            does; a number s gives the probability sigmoid(s (score_0 - score_1)).
        threshold: Rounds these probabilities (s = 1 if None): 0.5 where those of the two images differ by no more.

    Returns:
        (N,) probability that the first image is the better one.
    """
    first, second = scores.astype(np.float64).T
    if threshold is not None:
        advantage = np.tanh(0.5 * (scale or 1.0) * (first - second))
        return np.where(np.abs(advantage) > threshold, advantage > 0, 0.5)
    if scale is None:
        return np.where(second > first, 0.0, 1.0)
    return 0.5 * (1.0 + np.tanh(0.5 * scale * (first - second)))  # the sigmoid, without overflow


def read_header(folder: Path) -> tuple[dict[str, Any], str]:
    """The header of scores, and the identity by which their files know it.

    Raises:
        FileNotFoundError: if there are no scores in the folder.
        ValueError: if the header is damaged or of another format.
    """
    file = folder / HEADER
    if not file.is_file():
        there = sorted(path.parent.name for path in folder.glob(f"scores/*/{HEADER}"))
        hint = f"It holds scores/{', scores/'.join(there)}: give one of these" if there else SCORE_THEM
        raise FileNotFoundError(f"There are no scores in {folder} (no {HEADER}). {hint}.")
    content = file.read_bytes()
    header = parse_json(file, content)
    if not isinstance(header, dict) or header.get("format") != FORMAT or not {"reward", "splits"} <= header.keys():
        raise ValueError(f"{file} is no header of scores that this version reads. {SCORE_THEM}, into another folder.")
    return header, digest(content)


class Scores:
    """Scores that `python main.py cache` has computed.

    Args:
        folder: Where they lie.

    Raises:
        FileNotFoundError: if there are none, or files of them are missing.
        ValueError: if a file is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.header, self.identity = read_header(self.folder)

    def _read(self, split: str) -> "pa.Table":
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = list(shards_of(split, self.header["splits"][split]["rows"], self.header["rows_per_file"], ".parquet"))
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(names)} files of scores of the split {split!r} are missing in "
                f"{self.folder}, first {missing[0]}: the command that made the others goes on where it stopped."
            )
        tables = []
        for name in names:
            try:
                table = pq.read_table(self.folder / name, page_checksum_verification=True)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(
                    f"{self.folder / name} is damaged ({error}). Delete this file and give the command again that made "
                    "it: it makes what is missing."
                ) from error
            if (table.schema.metadata or {}).get(b"scores") != self.identity.encode():
                raise ValueError(
                    f"{self.folder / name} belongs to other scores than {HEADER} beside it: delete this file and give "
                    "the command again that made the others."
                )
            tables.append(table)
        return pa.concat_tables(tables)

    def of(self, split: str, table: "PairTable") -> np.ndarray:
        """Scores of the rows of a table.

        Args:
            split: Name of the split.
            table: N pairs.

        Returns:
            (N, 2) float32, of the first and the second stored image.

        Raises:
            ValueError: if rows have not been scored, or have other captions or images than when they were.
        """
        if split not in self.header["splits"]:
            raise ValueError(
                f"The scores in {self.folder} are of the split {', '.join(self.header['splits'])}, not of {split!r}. "
                f"{SCORE_THEM}, into another folder."
            )
        scored, rows = self._read(split), table.rows
        place_of = {key: place for place, key in enumerate(scored.column("row").to_pylist())}
        keys = row_keys(rows)
        places = np.array([place_of.get(keys[row], -1) for row in table.index], dtype=np.int64)

        def refuse(wrong: np.ndarray, what: str) -> None:
            if wrong.any():
                raise ValueError(
                    f"The scores in {self.folder} do not fit: {wrong.sum()} of {len(wrong)} rows of split {split!r} "
                    f"{what}, first {rows.where(int(table.index[wrong][0]))}. {SCORE_THEM}, into another folder."
                )

        refuse(places < 0, "have not been scored")
        captions = rows.column(table.columns.caption).take(table.index).to_pylist()
        before = scored.column("caption").take(places).to_pylist()
        refuse(np.array([a != b for a, b in zip(captions, before, strict=True)]), "have another caption now")
        sizes = image_sizes(rows, table)
        if sizes is None or scored.column("bytes_0").null_count:
            identity = self.header["splits"][split]["identity"]
            refuse(np.full(len(places), identity != rows.identity), "come from other files")
        else:
            before = np.stack([scored.column(name).to_numpy()[places] for name in ("bytes_0", "bytes_1")], axis=1)
            refuse((before != sizes[table.index]).any(axis=1), "have other images now")
        return np.stack([scored.column(name).to_numpy()[places] for name in ("score_0", "score_1")], axis=1)


def image_sizes(rows: Any, table: "PairTable") -> np.ndarray | None:
    """(len(rows), 2) bytes of the stored images; None where only reading them would tell."""
    sizes = [rows.image_bytes(name) for name in (table.columns.image_0, table.columns.image_1)]
    return None if sizes[0] is None or sizes[1] is None else np.stack(sizes, axis=1)


# ------------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class Job:
    """Rows that are scored together.

    Attributes:
        file: Name of the file that they go into.
        split: Their split.
        numbers: Their numbers in its table.
        rewards: Names of the rewards that lack this file.
        last: Whether they are the last ones in the file.
    """

    file: str
    split: str
    numbers: range
    rewards: tuple[str, ...]
    last: bool


@dataclass
class Jobs(Dataset):
    """What the rewards are shown for each job.

    Args:
        jobs: The jobs.
        splits: The rows to score.
    """

    jobs: list[Job]
    splits: dict[str, "Samples"]

    def __getitem__(self, number: int) -> dict[str, Any]:
        """`images`, two for each row, each (3, H, W) uint8 as stored; `prompts`, one for each image."""
        job = self.jobs[number]
        samples = self.splits[job.split]
        images, prompts = [], []
        for place in job.numbers:
            values = samples.table.rows.dataset[int(samples.table.index[place])]
            images += [samples.stored(place, values, which) for which in (0, 1)]
            prompts += [values[samples.table.columns.caption]] * 2
        return {"job": number, "rewards": job.rewards, "images": images, "prompts": prompts}


class ScoreFilling(LightningDataModule):
    """Every stored image that training and validation would show, as the batches of a prediction; keeps the scores.

    The LightningModule that predicts gives its answers to `keep`.

    Args:
        data: Knows the rows.
        folder: Scores go to scores/<name> below it.
        rows_per_file: Rows in a file.
        rewards: Name -> description of each reward: whatever its scores depend on.

    Raises:
        ValueError: if a folder holds scores of something else.
    """

    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(
        self, data: "PickAPicDataModule", folder: Path, rows_per_file: int, rewards: dict[str, dict[str, Any]]
    ) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank for which no file is left
        if rows_per_file < 1:
            raise ValueError(f"rows_per_shard is {rows_per_file}; expected 1 or more.")
        for name in rewards:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"rewards: the name {name!r} is to be one of a folder: use letters, digits, - and _.")
        self.data = data
        self.folders = {name: folder / "scores" / name for name in rewards}
        self.rows_per_file = rows_per_file
        self.rewards = rewards
        self.answers: dict[str, list[Tensor]] = {name: [] for name in rewards}

    def prepare_data(self) -> None:
        prepare_as_for_training(self.data, self.trainer)

    def setup(self, stage: str) -> None:
        """Look at the rows, and compare with what is in the folders."""
        self.data.trainer = self.trainer
        self.splits, _ = self.data.to_encode()
        about = {}
        self.rows = {}
        for split, samples in self.splits.items():
            table = samples.table
            if table.label_0 is None:
                raise ValueError(f"{table.summary}: there is one image in a row; scores are for pairs.")
            captions = table.rows.column(table.columns.caption).take(table.index)
            if isinstance(captions[0].as_py(), list):
                raise ValueError(
                    f"{table.rows.where(int(table.index[0]))}: {table.columns.caption!r} is a list of texts, of which "
                    "one is drawn at every visit: an image has no single score. Give a column of single texts."
                )
            keys, sizes = row_keys(table.rows), image_sizes(table.rows, table)
            sizes = [None] * len(table.index) if sizes is None else sizes[table.index].tolist()
            self.rows[split] = [
                (keys[row], caption, *(size or (None, None)))
                for row, caption, size in zip(table.index, captions.to_pylist(), sizes, strict=True)
            ]
            content = json.dumps(self.rows[split]).encode()
            about[split] = {
                "rows": len(table.index),
                "names, captions and sizes of images": digest(content),
                "identity": table.rows.identity,
            }
        self.headers = {
            name: {"format": FORMAT, "reward": reward, "rows_per_file": self.rows_per_file, "splits": about}
            for name, reward in self.rewards.items()
        }
        for name, folder in self.folders.items():
            if (folder / HEADER).is_file() and (changed := changes(read_header(folder)[0], self.headers[name])):
                raise ValueError(
                    f"The folder {folder} holds scores of something else: {'; '.join(changed)}. Delete it, give the "
                    "reward another name, or give another folder. (Training may use a part of the scores.)"
                )

    def predict_dataloader(self) -> Batches:
        """What this rank scores: its share of the files that are not there yet."""
        missing: list[tuple[str, str, range, tuple[str, ...]]] = []
        if self.trainer.is_global_zero:
            missing = self._begin()
        missing = self.trainer.strategy.broadcast(missing)
        self.identities = {name: read_header(folder)[1] for name, folder in self.folders.items()}
        mine = missing[self.trainer.global_rank :: self.trainer.world_size]
        self.jobs = [job for file in mine for job in self._jobs(*file)]
        return Batches(len(self.jobs), self._batches)

    def _begin(self) -> list[tuple[str, str, range, tuple[str, ...]]]:
        """Write the headers; for each file that some reward lacks, its name, split, rows, and these rewards."""
        files = {
            file: (split, part)
            for split, rows in self.rows.items()
            for file, part in shards_of(split, len(rows), self.rows_per_file, ".parquet").items()
        }
        missing = []
        try:
            for name, folder in self.folders.items():
                folder.mkdir(parents=True, exist_ok=True)
                for unfinished in folder.glob(".*.part"):
                    unfinished.unlink(missing_ok=True)
                if not (folder / HEADER).is_file():
                    write_file(folder / HEADER, (json.dumps(self.headers[name], indent=2) + "\n").encode())
        except OSError as error:
            raise OSError(
                f"The scores {folder} cannot be written: {error.strerror or error}. Give another folder with "
                "`--folder`."
            ) from error
        for file, (split, part) in files.items():
            lacking = tuple(name for name, folder in self.folders.items() if not (folder / file).is_file())
            if lacking:
                missing.append((file, split, part, lacking))
        rows = ", ".join(f"{len(rows)} rows of {split!r}" for split, rows in self.rows.items())
        rank_zero_info(
            f"Scores by {', '.join(self.rewards)} of both images of {rows}: {len(files)} files each, of which "
            f"{len(files) - len(missing)} are there."
        )
        return missing

    def _jobs(self, file: str, split: str, part: range, rewards: tuple[str, ...]) -> list[Job]:
        parts = [part[start : start + ROWS_AT_ONCE] for start in range(0, len(part), ROWS_AT_ONCE)]
        return [Job(file, split, numbers, rewards, last=numbers is parts[-1]) for numbers in parts]

    def _batches(self) -> Iterator[dict[str, Any]]:
        def announced() -> Iterator[int]:
            file = None
            for number, job in enumerate(self.jobs):
                if job.file != file:
                    table = self.splits[job.split].table
                    table.rows.prefetch(table.index[job.numbers.start :])
                file = job.file
                yield number

        loader = DataLoader(
            Jobs(self.jobs, self.splits),
            batch_size=None,
            sampler=announced(),
            num_workers=self.data.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)

    def keep(self, batch: dict[str, Any], answer: dict[str, Tensor]) -> None:
        """Take the scores of a batch; writes a file of each reward with those of its last batch.

        Args:
            batch: As `Jobs` gave it.
            answer: Name of a reward -> (number of images,) scores.
        """
        job = self.jobs[batch["job"]]
        for name, scores in answer.items():
            scores = scores.float().cpu()
            if len(bad := (~torch.isfinite(scores)).nonzero()):
                number = int(bad[0])
                table = self.splits[job.split].table
                raise ValueError(
                    f"{table.rows.where(int(table.index[job.numbers[number // 2]]))} (prompt "
                    f"{batch['prompts'][number][:40]!r}): {name} gives its {('first', 'second')[number % 2]} image the "
                    f"score {scores[number].item()}. Give the reward `precision: float32`, or leave the row out of the "
                    "data. Finished files are kept."
                )
            self.answers[name].append(scores)
            if job.last:
                self._write(name, job.file, self.rows[job.split][: job.numbers.stop])

    def _write(self, name: str, file: str, rows: list[tuple]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        scores = torch.cat(self.answers[name]).view(-1, 2).numpy()
        self.answers[name] = []
        facts = zip(*rows[-len(scores) :], strict=True)
        types = (pa.string(), pa.string(), pa.int64(), pa.int64(), pa.float32(), pa.float32())
        columns = [pa.array(values, kind) for values, kind in zip((*facts, *scores.T), types, strict=True)]
        table = pa.table(columns, COLUMNS).replace_schema_metadata({"scores": self.identities[name]})
        content = io.BytesIO()
        pq.write_table(table, content, write_page_checksum=True)
        try:
            write_file(self.folders[name] / file, content.getvalue())
        except OSError as error:
            raise OSError(
                f"{self.folders[name] / file} could not be written: {error.strerror or error}. Finished files are "
                "kept: make room and give the same command again."
            ) from error
