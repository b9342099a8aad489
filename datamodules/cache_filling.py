"""Fills a cache: what there is to encode, dealt to the ranks in shards, and written so that a kill loses little."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.cache import (
    HEADER,
    Dtype,
    changes,
    checksum,
    digest,
    distinct_captions,
    read_header,
    row_keys,
    rows_file,
    shards_of,
    write_header,
)
from datamodules.transforms import View

if TYPE_CHECKING:
    from datamodules.pickapic import PickAPicDataModule, Samples

IMAGES_AT_ONCE = 8
PROMPTS_AT_ONCE = 64


def versions(samples: "Samples", number: int) -> list[list[View]]:
    """Every version of the images of a row, in stored order: as they are and, where they are flipped, mirrored."""
    values = samples.table.rows.dataset[int(samples.table.index[number])]
    draws = (1.0, 0.0) if samples.horizontal_flip else (1.0,)  # in place of a random number: below 0.5 mirrors
    shown = [samples.views(number, values, SimpleNamespace(random=lambda draw=draw: draw)) for draw in draws]
    return [list(views) for views in zip(*shown, strict=True)]


class Job(NamedTuple):
    """Rows of a split, or prompts, that are encoded together and go into one shard."""

    shard: str
    split: str | None  # None: prompts
    numbers: range
    last: bool  # of the shard


class Jobs(Dataset):
    """What the encoders are shown for each job.

    Args:
        jobs: The jobs.
        splits: The rows to encode.
        prompts: The prompts to encode.
    """

    def __init__(self, jobs: list[Job], splits: dict[str, "Samples"], prompts: list[str]) -> None:
        self.jobs = jobs
        self.splits = splits
        self.prompts = prompts

    def __getitem__(self, number: int) -> dict[str, Any]:
        """`prompts`; or `images` (N * I * V, 3, R, R), and `about` (N, I, V, 4) height, width, top and left."""
        job = self.jobs[number]
        if job.split is None:
            return {"job": number, "prompts": [self.prompts[prompt] for prompt in job.numbers]}
        rows = [versions(self.splits[job.split], row) for row in job.numbers]
        return {
            "job": number,
            "images": torch.stack([view.pixels for row in rows for image in row for view in image]),
            "about": torch.tensor([[[(*v.original_size, *v.crop) for v in image] for image in row] for row in rows]),
        }


class Batches:
    """The jobs of one rank. Not a DataLoader, which Lightning would deal to the ranks once more.

    Args:
        jobs: Numbers of jobs.
        make: Makes an iterator over what they show.
    """

    def __init__(self, jobs: int, make: Callable[[], Iterator[dict[str, Any]]]) -> None:
        self.jobs = jobs
        self.make = make

    def __len__(self) -> int:
        return self.jobs

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.make()


class CacheFilling(LightningDataModule):
    """Everything that training would show to the encoders, as the batches of a prediction; keeps what they answer.

    The LightningModule that predicts has `describe(resolution)`, and gives its answers to `keep`.

    Args:
        data: Knows the rows and how they are shown.
        folder: Where the cache goes.
        dtype: Type of the stored moments and embeddings.
        rows_per_shard: Rows, or prompts, in a file.

    Raises:
        ValueError: if the data cannot be cached, or the folder holds something else.
    """

    allow_zero_length_dataloader_with_multiple_devices = True

    def __init__(self, data: "PickAPicDataModule", folder: Path, dtype: Dtype, rows_per_shard: int) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # a rank for which no shard is left
        if rows_per_shard < 1:
            raise ValueError(f"rows_per_shard is {rows_per_shard}; expected 1 or more.")
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"The cache {folder} is a file; expected a folder, which need not exist yet.")
        if folder.is_dir() and not (folder / HEADER).is_file():
            # Scores, and what a command that is killed before it has written the header leaves behind.
            known = ("scores", ".*.part", "rows-*.json", "prompts.json")
            foreign = [file.name for file in folder.iterdir() if not any(map(file.match, known))]
            if foreign:
                raise ValueError(
                    f"The folder {folder} holds other things ({', '.join(sorted(foreign)[:5])}) and no cache. Give an "
                    "empty folder or a new one."
                )
        self.data = data
        self.folder = folder
        self.dtype = dtype
        self.rows_per_shard = rows_per_shard
        self.answers: list[dict[str, Tensor]] = []

    def prepare_data(self) -> None:
        prepare_as_for_training(self.data, self.trainer)

    def setup(self, stage: str) -> None:
        """Look at the rows; compare with what is in the folder as far as that is possible without the networks."""
        self.data.trainer = self.trainer
        self.splits, views = self.data.to_encode()
        self.prompts = list(dict.fromkeys(["", *(c for s in self.splits.values() for c in distinct_captions(s.table))]))
        self.files = {rows_file(split): index_of(samples) for split, samples in self.splits.items()}
        self.files["prompts.json"] = self.prompts
        self.files = {name: (json.dumps(content) + "\n").encode() for name, content in self.files.items()}
        self.header = {
            "views": views,
            "dtype": self.dtype,
            "rows_per_shard": self.rows_per_shard,
            "splits": {
                split: {
                    "rows": len(samples),
                    "flips": samples.horizontal_flip,
                    "index": digest(self.files[rows_file(split)]),
                    "identity": samples.table.rows.identity,
                }
                for split, samples in self.splits.items()
            },
            "prompts": {"number": len(self.prompts), "index": digest(self.files["prompts.json"])},
        }
        self._compare(self.header)

    def _compare(self, header: dict[str, Any]) -> None:
        """Raise if the folder holds a cache of something else."""
        if not (self.folder / HEADER).is_file():
            return
        there, _ = read_header(self.folder)
        if changed := changes({name: there[name] for name in header}, header):
            raise ValueError(
                f"The folder {self.folder} holds a cache of something else: {'; '.join(changed)}. Delete it, or give "
                "another folder. (Training may use a part of the rows of a cache; that needs no new one.)"
            )

    def predict_dataloader(self) -> Batches:
        """What this rank encodes: its share of the shards that are not there yet."""
        described = self.trainer.lightning_module.describe(self.data.resolution)
        header = self.header | described
        self._compare(header)
        content, self.identity = write_header(header)
        kinds = {f"images-{split}": (split, len(samples)) for split, samples in self.splits.items()}
        kinds["prompts"] = (None, len(self.prompts))
        shards = {
            name: (split, part)
            for kind, (split, number) in kinds.items()
            for name, part in shards_of(kind, number, self.rows_per_shard).items()
        }
        missing: list[str] = []
        if self.trainer.is_global_zero:
            missing = self._begin(content, shards, described)
        missing = self.trainer.strategy.broadcast(missing)
        mine = missing[self.trainer.global_rank :: self.trainer.world_size]
        self.jobs = [job for name in mine for job in self._jobs(name, *shards[name])]
        return Batches(len(self.jobs), self._batches)

    def _begin(self, content: bytes, shards: dict[str, tuple[str | None, range]], described: dict) -> list[str]:
        """Say how large the cache becomes, check that it fits, and write the header; names of the missing shards."""
        width = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        sizes = {split: width * int(np.prod(described["moments"])) for split in self.splits}
        for split, samples in self.splits.items():
            sizes[split] *= len(encoded_images(samples)) * (2 if samples.horizontal_flip else 1)
        prompt = width * sum(int(np.prod(shape)) for shape in described["embeddings"].values())
        size_of = {name: len(part) * sizes.get(split, prompt) for name, (split, part) in shards.items()}
        missing = [name for name in shards if not (self.folder / name).is_file()]
        needed = sum(size_of[name] for name in missing)
        rows = ", ".join(f"{len(samples)} rows of {split!r}" for split, samples in self.splits.items())
        rank_zero_info(
            f"Cache {self.folder}: {rows}, {len(self.prompts)} prompts; {sum(size_of.values()) / 2**20:.1f} MiB in "
            f"{len(shards)} shards, of which {len(shards) - len(missing)} are there and {needed / 2**20:.1f} MiB are "
            "to be made."
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for unfinished in self.folder.glob(".*.part"):
                unfinished.unlink(missing_ok=True)
            free = shutil.disk_usage(self.folder).free
            if free < needed:
                raise ValueError(
                    f"The disk of {self.folder} has {free / 2**20:.1f} MiB free, but the cache needs another "
                    f"{needed / 2**20:.1f} MiB. Make room, give another folder, or store less: --dtype float16, "
                    "horizontal_flip: false, max_train_samples."
                )
            for name, text in {**self.files, HEADER: content}.items():  # the header last: it vouches for the others
                if not (self.folder / name).is_file() or (self.folder / name).read_bytes() != text:
                    write_file(self.folder / name, text)
        except OSError as error:
            raise OSError(
                f"The cache {self.folder} cannot be written: {error.strerror or error}. Give another folder with "
                "`--folder`."
            ) from error
        return missing

    def _jobs(self, shard: str, split: str | None, part: range) -> list[Job]:
        if split is None:
            step = PROMPTS_AT_ONCE
        else:
            samples = self.splits[split]
            step = max(1, IMAGES_AT_ONCE // len(encoded_images(samples)) // (2 if samples.horizontal_flip else 1))
        parts = [part[start : start + step] for start in range(0, len(part), step)]
        return [Job(shard, split, numbers, last=numbers is parts[-1]) for numbers in parts]

    def _batches(self) -> Iterator[dict[str, Any]]:
        def announced() -> Iterator[int]:
            shard = None
            for number, job in enumerate(self.jobs):
                if job.split is not None and job.shard != shard:
                    table = self.splits[job.split].table
                    table.rows.prefetch(table.index[job.numbers.start :])
                shard = job.shard
                yield number

        loader = DataLoader(
            Jobs(self.jobs, self.splits, self.prompts),
            batch_size=None,
            sampler=announced(),
            num_workers=self.data.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
        return iter(loader)

    def keep(self, batch: dict[str, Any], answer: dict[str, Tensor]) -> None:
        """Take what the encoders made of a batch; writes a shard with the answer to its last batch.

        Args:
            batch: As `Jobs` gave it.
            answer: `moments` (N * I * V, 2C, h, w), or the embeddings, each (N, ...).
        """
        job = self.jobs[batch["job"]]
        stored = {name: t.to("cpu", getattr(torch, self.dtype)).contiguous() for name, t in answer.items()}
        for name, tensor in stored.items():
            bad = np.flatnonzero(~torch.isfinite(tensor).flatten(1).all(1).numpy())
            if len(bad):
                number = job.numbers[int(bad[0]) * len(job.numbers) // len(tensor)]
                if job.split is None:
                    where = f"prompt {self.prompts[number][:60]!r}"
                else:
                    table = self.splits[job.split].table
                    where = table.rows.where(int(table.index[number]))
                raise ValueError(
                    f"{where}: the {name} are not finite in {self.dtype}. Store them with `--dtype bfloat16`; if the "
                    "encoder itself overflows, use trainer.precision bf16-mixed or a VAE made for float16."
                )
        if job.split is None:
            rows = zip(*stored.values(), strict=True)
            stored["checksums"] = torch.tensor([checksum(*row) for row in rows])
        else:
            about, moments = batch["about"].cpu(), stored["moments"]
            stored["moments"] = moments.view(*about.shape[:3], *moments.shape[1:])
            sums = [checksum(*both) for both in zip(moments, about.flatten(0, 2), strict=True)]
            stored["about"] = torch.cat([about, torch.tensor(sums).view(*about.shape[:3], 1)], dim=-1)
        self.answers.append(stored)
        if job.last:
            tensors = {name: torch.cat([answer[name] for answer in self.answers]) for name in stored}
            self.answers = []
            try:
                write_file(self.folder / job.shard, save(tensors, {"cache": self.identity}))
            except OSError as error:
                raise OSError(
                    f"{self.folder / job.shard} could not be written: {error.strerror or error}. Finished shards are "
                    "kept: make room and give the same command again."
                ) from error


def prepare_as_for_training(data: "PickAPicDataModule", trainer: Trainer) -> None:
    """Have a data module prepare what training would read, while the trainer predicts."""
    data.trainer = trainer
    trainer.state.fn = TrainerFn.FITTING
    try:
        data.prepare_data()
    finally:
        trainer.state.fn = TrainerFn.PREDICTING


def encoded_images(samples: "Samples") -> list[str]:
    """Names of the image columns of which each row gives an image."""
    columns = samples.table.columns
    if samples.table.label_0 is None:
        return [columns.image]
    return [columns.image_0] if samples.preferred_only else [columns.image_0, columns.image_1]


def index_of(samples: "Samples") -> dict[str, Any]:
    """What `rows-<split>.json` says: names of the rows, bytes of their images, and which image is the preferred one."""
    table = samples.table
    keys = row_keys(table.rows)
    names = [table.columns.image] if table.label_0 is None else [table.columns.image_0, table.columns.image_1]
    sizes = [table.rows.image_bytes(name) for name in names]
    index: dict[str, Any] = {"keys": [keys[row] for row in table.index], "bytes": None, "preferred": None}
    if sizes[0] is not None:
        index["bytes"] = np.stack(sizes, axis=1)[table.index].tolist()
    if samples.preferred_only and table.label_0 is not None:
        index["preferred"] = (table.label_0 == 0).astype(int).tolist()
    return index


def write_file(file: Path, content: bytes) -> None:
    """Write a file under another name, and give it its own once it is on the disk."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        part.replace(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise
