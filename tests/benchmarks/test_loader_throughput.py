"""Pairs per second of our loaders beside plain `webdataset` and plain `datasets` on the same files, in one run.

    pytest -m slow tests/benchmarks/test_loader_throughput.py -s

All decode the same JPEGs of 512 px with Pillow in two processes and show them alike. The loaders take turns, so that a
busy machine slows all of them; what is compared is the median over the rounds, of processor time and of time.
"""

import gc
import io
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import functional as F

from datamodules.pickapic import PickAPicDataModule
from datamodules.pickapic_shards import PickAPicShardsDataModule
from datamodules.shard_packing import pack
from tests.datamodules.files import write_parquet
from tests.datamodules.stream import quiet_trainer

PAIRS, SHARDS, BATCH, SIZE, WORKERS, ROUNDS = 128, 4, 4, 512, 2, 7
COMPARED = (("shards", "plain webdataset"), ("parquet", "plain datasets"), ("streamed parquet", "plain datasets"))


def photo(seed: int) -> bytes:
    """As large a JPEG as a generated image of this size is: some structure, some grain."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 255, (24, 24, 3), dtype=np.uint8)).resize((SIZE, SIZE))
    grain = generator.normal(0, 6, (SIZE, SIZE, 1))
    buffer = io.BytesIO()
    Image.fromarray((np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def show(image: Image.Image) -> torch.Tensor:
    """Resize, crop, maybe flip, and scale, as `view_image` does."""
    image = F.center_crop(F.resize(image.convert("RGB"), SIZE, F.InterpolationMode.BILINEAR), [SIZE, SIZE])
    image = F.hflip(image) if torch.rand(()) < 0.5 else image
    return F.to_tensor(image).sub_(0.5).div_(0.5)


def plain_webdataset(tars: list[str]) -> Iterable[Any]:
    import webdataset as wds

    def pair(sample: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, str]:
        images = [show(sample["jpg_0.jpg"]), show(sample["jpg_1.jpg"])]
        return *images[:: -1 if float(sample["label_0.txt"]) == 0 else 1], sample["original_prompt.txt"]

    dataset = wds.WebDataset(tars, shardshuffle=False).decode("pil").map(pair)
    return wds.WebLoader(dataset, batch_size=BATCH, num_workers=WORKERS)


def plain_datasets(files: list[str]) -> Iterable[Any]:
    import datasets

    rows = datasets.load_dataset("parquet", data_files=files, split="train")
    rows = rows.cast_column("jpg_0", datasets.Image()).cast_column("jpg_1", datasets.Image())

    def pairs(batch: dict[str, list]) -> dict[str, list]:
        shown = zip(map(show, batch["jpg_0"]), map(show, batch["jpg_1"]), batch["label_0"], strict=True)
        ordered = [(second, first) if label == 0 else (first, second) for first, second, label in shown]
        return {
            "preferred": [first for first, _ in ordered],
            "other": [second for _, second in ordered],
            "caption": batch["caption"],
        }

    return DataLoader(rows.with_transform(pairs), batch_size=BATCH, shuffle=True, num_workers=WORKERS)


def ours(data: PickAPicDataModule) -> Iterable[Any]:
    data.setup("fit")
    data.trainer = quiet_trainer()
    return data.train_dataloader()


def spent() -> float:
    """Processor seconds of this process and of all that it has started and that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(loader: Callable[[], Iterable[Any]]) -> tuple[float, float]:
    """Processor seconds and seconds of one epoch, its processes' start and end included."""
    batches = loader()
    gc.collect()
    processor, wall = spent(), time.perf_counter()
    count = sum(1 for _ in batches)
    wall = time.perf_counter() - wall
    del batches
    gc.collect()  # ends the processes of the loader
    assert count == PAIRS // BATCH
    return spent() - processor, wall


@pytest.mark.slow
def test_our_loaders_are_as_fast_as_plain_ones(tmp_path):
    images = {name: [photo(2 * i + which) for i in range(PAIRS)] for which, name in enumerate(("jpg_0", "jpg_1"))}
    part = PAIRS // SHARDS
    for shard in range(SHARDS):
        rows = slice(shard * part, (shard + 1) * part)
        columns = {name: column[rows] for name, column in images.items()} | {
            "label_0": [float(i % 2) for i in range(part)]
        }
        write_parquet(tmp_path / f"parquet/train-{shard:05d}-of-{SHARDS:05d}.parquet", part, **columns)
    pack(str(tmp_path / "parquet"), tmp_path / "tars", samples_per_shard=part, num_workers=1)
    settings = {"resolution": SIZE, "batch_size": BATCH, "num_workers": WORKERS}
    tars, files = (sorted(map(str, Path(tmp_path).glob(pattern))) for pattern in ("tars/*.tar", "parquet/*.parquet"))
    folder, cache = str(tmp_path / "parquet"), str(tmp_path / "cache")
    loaders = {
        "plain webdataset": lambda: plain_webdataset(tars),
        "shards": lambda: ours(PickAPicShardsDataModule(tars, cache_dir=cache, shuffle_shards=2, **settings)),
        "plain datasets": lambda: plain_datasets(files),
        "parquet": lambda: ours(PickAPicDataModule(folder, **settings)),
        "streamed parquet": lambda: ours(
            PickAPicDataModule(folder, streaming=True, shuffle_shards=2, cache_dir=f"{cache}/streaming", **settings)
        ),
    }
    for loader in loaders.values():
        measure(loader)  # fills caches
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for _ in range(ROUNDS):
        for name, loader in loaders.items():
            times[name].append(measure(loader))
    for name, rows in times.items():
        processor, wall = (PAIRS / statistics.median(column) for column in zip(*rows, strict=True))
        print(f"{name:17} {processor:6.1f} pairs per processor second, {wall:6.1f} pairs per second")
    for name, plain in COMPARED:
        processor, wall = (
            statistics.median(theirs[which] / our[which] for theirs, our in zip(times[plain], times[name], strict=True))
            for which in (0, 1)
        )
        print(f"{name} / {plain}: {processor:.2f} by processor time, {wall:.2f} by time")
        assert min(processor, wall) >= 0.9, name
