"""Kills training runs without warning, resumes them, and compares what comes out with the uninterrupted run.

    python -m tests.datamodules.kill_matrix --points 10

One cell is a source of pairs x workers x ranks. A run is killed up to five times on its way, and resumed each time.
Every run is forked from this process, which has imported everything and started no thread of its own, so that a run
takes a second or two. What is compared with one that nobody disturbed, bit for bit: the samples that
every micro-batch of every rank saw (ids, captions, labels, pixels), every checkpoint that has got its name (weights,
optimizer, counters, position in the data), and every logged metric. Every killed run begins with empty caches; remote
shards come through `pipe:`, and the caches of shards are too small for all of them.
"""

import argparse
import contextlib
import csv
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import datasets
import diffusers
import lightning.pytorch as pl
import torch
import tqdm
import transformers
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig

from datamodules import pickapic, sampling
from datamodules.pickapic import PickAPicDataModule
from datamodules.pickapic_shards import PickAPicShardsDataModule
from datamodules.shard_packing import pack
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.cli import checkpoints
from lightning_modules.cli.run_folder import RUNS, RunLogger, SaveMetrics, last_checkpoint
from lightning_modules.diffusion_dpo import DiffusionDPO
from lightning_modules.diffusion_orpo import DiffusionORPO
from tests.datamodules.files import encoded, write_parquet
from tests.tiny import save_sd15

FORK = multiprocessing.get_context("fork")
SOURCES = ("parquet", "streaming", "shards")
NUM_BATCHES = 12  # micro-batches of a run, per rank
BATCH_SIZE = 2
KILLS_PER_RUN = 5  # at most
HOOKS = (
    "on_train_batch_start",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)
SAVING = ("half written", "not yet renamed", "just renamed", "older one removed", "link removed")
KINDS = ("hook", "moment", "saving", "loading")
WHOLE = "whole"  # folder of a cell's uninterrupted run
TIMEOUT = 180.0  # seconds for one run on a busy machine


@dataclass(frozen=True)
class Cell:
    """One source of pairs, data workers per rank, ranks."""

    source: str
    workers: int
    ranks: int

    @property
    def accumulate(self) -> int:
        return 2 if self.workers == 2 * (self.ranks - 1) else 1

    @property
    def validates(self) -> bool:
        return self.workers > 0

    @property
    def keeps(self) -> int:
        """Checkpoints that killed runs keep; -1 keeps all."""
        return 1 if self.ranks == 1 else -1

    def __str__(self) -> str:
        return f"{self.source}, {self.workers} workers, {self.ranks} ranks"


@dataclass(frozen=True)
class Strike:
    """When a run is killed.

    Attributes:
        kind: "hook": in a hook of a micro-batch. "saving": during a checkpoint. "loading": in the process that loads a
            sample, at that sample. "moment": by another process, so and so long after a micro-batch began.
        number: The micro-batch; the attempt's checkpoint (from 1); the position of the sample; the micro-batches that
            the attempt has begun.
        where: The hook, or the stage of the saving.
        rank: The rank that dies first.
        pause: Seconds from the begin of the micro-batch, and from the first rank's end to the others'.
        group: Kill the rank's whole process group; else the rank alone, whose workers must notice.
    """

    kind: Literal["hook", "saving", "loading", "moment"]
    number: int
    where: str
    rank: int
    pause: float
    group: bool


def draw_strike(rng: random.Random, kind: str, cell: Cell, part: range) -> Strike:
    """A strike somewhere in a part of the run's micro-batches, of an attempt that begins with the part."""
    pause, where = rng.uniform(0.0, 0.1), ""
    if kind == "hook":
        number, where = rng.choice(part), rng.choice(HOOKS)
    elif kind == "saving":
        stages = [stage for stage in SAVING if cell.keeps > 0 or stage != "older one removed"]
        left = min(part.stop, NUM_BATCHES - 1) - part.start  # none after the last one
        number, where = rng.randint(1, max(1, left // cell.accumulate)), rng.choice(stages)
    elif kind == "loading":
        number = rng.choice(part) * BATCH_SIZE * cell.ranks + rng.randrange(BATCH_SIZE * cell.ranks)
    else:
        number = rng.randrange(len(part))
        pause = rng.uniform(0.0, 1.5 if number == 0 else 0.1)  # before the first micro-batch lies the whole start
    return Strike(kind, number, where, 0 if kind == "saving" else rng.randrange(cell.ranks), pause, rng.random() < 0.6)


# ------------------------------------------------------------------------------------------------ in the forked ranks


class Record(pl.Callback):
    """Writes down what every micro-batch shows, before it is trained on."""

    def __init__(self, stem: Path) -> None:
        self.stem = stem

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, _: int) -> None:
        content = json.dumps([batch["prompts"], batch["label"].tolist()]).encode() + batch["images"].numpy().tobytes()
        line = [trainer.fit_loop.epoch_loop.total_batch_idx, batch["ids"], zlib.crc32(content)]
        with open(f"{self.stem}.{trainer.global_rank}", "a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


class StrikeInHook(pl.Callback):
    def __init__(self, hook: str, number: int, die: Callable[[], None]) -> None:
        def strike(trainer: pl.Trainer, *_: Any) -> None:
            if trainer.fit_loop.epoch_loop.total_batch_idx >= number:
                die()

        setattr(self, hook, strike)


class StrikeWhileSaving(checkpoints.AtomicCheckpointIO):
    """Dies at a stage of the checkpoint of that number, or as soon after it as that stage comes."""

    def __init__(self, stage: str, number: int, die: Callable[[], None]) -> None:
        super().__init__()
        self.stage, self.left, self.die = stage, number, die

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.left -= 1
        save = torch.save

        def save_half(content: Any, file: Any) -> None:
            save(content, file)
            file.truncate(file.tell() // 2)
            self.die()

        if self.left <= 0 and self.stage == "half written":
            torch.save = save_half
        if self.left <= 0 and self.stage == "not yet renamed":
            checkpoints.os.replace = lambda *_: self.die()
        if self.left <= 0 and self.stage == "link removed":
            os.symlink = lambda *_: self.die()
        super().save_checkpoint(checkpoint, path, storage_options)
        if self.left <= 0 and self.stage == "just renamed":
            self.die()

    def remove_checkpoint(self, path: Any) -> None:
        super().remove_checkpoint(path)
        if self.left <= 0 and self.stage == "older one removed":
            self.die()


def strike_while_loading(number: int, die: Callable[[], None]) -> None:
    def generator(seed: int, position: int) -> Any:
        if position >= number:
            die()
        return sampling.sample_generator(seed, position)

    pickapic.sample_generator = generator


def run_rank(
    cell: Cell, setup: "Setup", folder: Path, attempt: int, rank: int, port: int, strike: Strike | None
) -> None:
    """One rank of one run, from the last checkpoint if there is one."""
    os.setpgid(0, 0)
    os.chdir(folder)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        fit(cell, setup, folder, attempt, rank, port, strike)
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def fit(cell: Cell, setup: "Setup", folder: Path, attempt: int, rank: int, port: int, strike: Strike | None) -> None:
    process, striker = os.getpid(), strike is not None and strike.rank == rank

    def die() -> None:
        with contextlib.suppress(ProcessLookupError):  # the other worker was faster
            (os.killpg if strike.group else os.kill)(process, signal.SIGKILL)

    if cell.ranks > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    keep = -1 if folder.name == WHOLE else cell.keeps
    callbacks = [
        Record(folder / f"seen.{attempt}"),
        SaveMetrics(),
        ModelCheckpoint(filename="{step}", every_n_train_steps=1, save_top_k=keep, save_last="link"),
    ]
    checkpoint_io = checkpoints.AtomicCheckpointIO()
    if striker and strike.kind == "hook":
        callbacks.append(StrikeInHook(strike.where, strike.number, die))
    elif striker and strike.kind == "saving":
        checkpoint_io = StrikeWhileSaving(strike.where, strike.number, die)
    elif strike is not None and strike.kind == "loading":  # in whichever rank the sample falls to
        strike_while_loading(strike.number, die)

    pl.seed_everything(5, verbose=False)
    lora = LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian")
    method = DiffusionORPO if cell.workers else DiffusionDPO
    module = method(
        SD15(str(setup.pretrained), lora=lora),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        prompt_dropout=0.2,
        warmup_steps=3,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=cell.ranks,
        strategy="ddp" if cell.ranks > 1 else "auto",
        max_steps=NUM_BATCHES // cell.accumulate,
        accumulate_grad_batches=cell.accumulate,
        val_check_interval=1.0 if cell.ranks == 1 else 5,
        check_val_every_n_epoch=1 if cell.ranks == 1 else None,
        log_every_n_steps=1,
        logger=RunLogger("job"),
        callbacks=callbacks,
        plugins=[checkpoint_io],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        checkpoint = last_checkpoint(RUNS / "job")
    except FileNotFoundError:
        checkpoint = None
    trainer.fit(module, datamodule=setup.data(cell, folder), ckpt_path=checkpoint, weights_only=True)


# --------------------------------------------------------------------------------------------------------- the parent


@dataclass(frozen=True)
class Setup:
    """What all runs read.

    Attributes:
        folder: Holds it.
    """

    folder: Path

    @property
    def pretrained(self) -> Path:
        return self.folder / "sd15"

    def write(self) -> None:
        """A tiny pipeline, and pairs in every format; every third pair is a tie."""
        save_sd15(self.pretrained)
        for number, rows in enumerate((3, 1, 3, 2, 2)):
            write_parquet(
                self.folder / "pairs" / f"train-{number:05}.parquet",
                rows,
                caption=[f"caption {number}.{row}" for row in range(rows)],
                jpg_0=[encoded(100 * number + 2 * row, width=17 + row, height=21) for row in range(rows)],
                jpg_1=[encoded(100 * number + 2 * row + 1, width=20, height=16 + row) for row in range(rows)],
            )
        write_parquet(self.folder / "pairs" / "validation.parquet", 3)
        for split in ("train", "validation"):
            pack(str(self.folder / "pairs"), self.folder / "tars", split, samples_per_shard=3, num_workers=1)

    def data(self, cell: Cell, run: Path) -> pl.LightningDataModule:
        """The data module of a cell; what it keeps on the disk goes into the folder of its run."""
        settings = {
            "resolution": 16,
            "batch_size": BATCH_SIZE,
            "num_workers": cell.workers,
            "ties": "keep",
            "random_crop": True,
        }
        if cell.source in ("parquet", "streaming"):
            settings["validation_split"] = "validation" if cell.validates else None
        if cell.source == "parquet":
            return PickAPicDataModule(str(self.folder / "pairs"), **settings)
        settings |= {"cache_dir": str(run / "shards"), "shuffle_shards": 1}
        if cell.source == "streaming":
            size = max(file.stat().st_size for file in self.folder.glob("pairs/train-*"))
            return PickAPicDataModule(str(self.folder / "pairs"), streaming=True, cache_gb=1.7e-9 * size, **settings)
        size = max(file.stat().st_size for file in self.folder.glob("tars/*.tar"))
        address = f"pipe:sleep 0.02; cat {self.folder}/tars/" if cell.workers else f"{self.folder}/tars/"
        return PickAPicShardsDataModule(
            address + "train-{00000..00003}.tar",
            address + "validation-00000.tar" if cell.validates else None,
            allow_shell_pipes=True,
            cache_gb=2.5e-9 * size,
            **settings,
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(cell: Cell, setup: Setup, folder: Path, attempt: int, strike: Strike | None) -> list[BaseProcess]:
    port = free_port() if cell.ranks > 1 else 0
    processes = [
        FORK.Process(target=run_rank, args=(cell, setup, folder, attempt, rank, port, strike))
        for rank in range(cell.ranks)
    ]
    for process in processes:
        process.start()
    return processes


def kill(process: BaseProcess, group: bool) -> None:
    try:
        (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has ended, or is so young that it has no group yet
        process.kill()


def attend(processes: list[BaseProcess], seen: Path, strike: Strike | None) -> None:
    """Wait for the ranks; strike them from outside if that is asked for; once one has died, the others follow."""
    deadline = time.monotonic() + TIMEOUT
    try:
        while running := [process for process in processes if process.exitcode is None]:
            due = strike is not None and strike.kind == "moment" and count_lines(seen) >= strike.number
            if due:
                time.sleep(strike.pause)
                kill(processes[strike.rank], strike.group)
                processes[strike.rank].join()
            if due or any(process.exitcode for process in processes):
                time.sleep(strike.pause % 0.1 if strike is not None else 5.0)
                for process in running:
                    kill(process, strike is None or strike.group)
            if time.monotonic() > deadline:
                break
            wait([process.sentinel for process in running], timeout=0.002 if strike is not None else 1.0)
    finally:
        for process in processes:
            if process.exitcode is None:  # hangs, or this process was interrupted
                kill(process, group=True)
                process.join()


def count_lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def survivors(groups: list[int]) -> list[str]:
    """Command lines of the living processes of these groups."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(group) in groups and state != "Z":
                found.append(f"{stat.parent.name} {stat.with_name('cmdline').read_text()}")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


# -------------------------------------------------------------------------------------------------------- comparisons


def read_seen(folder: Path, attempt: int, rank: int) -> list[list]:
    file = folder / f"seen.{attempt}.{rank}"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def read_metrics(version: Path) -> list[tuple[tuple[str, str], ...]]:
    """Rows without empty fields, sorted by name; a line that the kill cut off does not count."""
    file = version / "metrics.csv"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [tuple(sorted((name, value) for name, value in row.items() if value)) for row in rows]


def differences(actual: Any, expected: Any, place: str) -> Iterator[str]:
    """Places where two checkpoints differ."""
    if isinstance(expected, dict) and isinstance(actual, dict):
        for key in sorted({*actual, *expected}, key=str):
            if (key in actual) != (key in expected):
                yield f"{place}.{key} is in {'one' if key in actual else 'the uninterrupted one'} only"
            else:
                yield from differences(actual[key], expected[key], f"{place}.{key}")
    elif isinstance(expected, (list, tuple)) and len(actual) == len(expected):
        for number, (one, other) in enumerate(zip(actual, expected, strict=True)):
            yield from differences(one, other, f"{place}[{number}]")
    elif not (torch.equal(actual, expected) if isinstance(expected, torch.Tensor) else actual == expected):
        yield f"{place} is {actual}, uninterrupted {expected}"


def read_checkpoint(file: Path) -> dict[str, Any]:
    content = checkpoints.read_checkpoint(file)
    del content["callbacks"]  # names of folders
    return content


def compare(cell: Cell, folder: Path, attempts: int, whole: Path) -> Iterator[str]:
    """What differs between a run killed and resumed, and the uninterrupted one."""
    for rank in range(cell.ranks):
        expected, end = read_seen(whole, 0, rank), 0
        for attempt in range(attempts):
            seen = read_seen(folder, attempt, rank)
            if not seen:  # killed before, or nothing left to do
                continue
            first = seen[0][0]
            # Of all steps before the one that the last attempt had begun with, there is a checkpoint.
            if not (end - 1) // cell.accumulate * cell.accumulate <= first <= end:
                yield f"rank {rank}, attempt {attempt}: begins at micro-batch {first}, the one before ended at {end}"
            for got, wanted in zip(seen, expected[first:], strict=False):
                if got != wanted:
                    yield f"rank {rank}, attempt {attempt}: saw {got}, uninterrupted {wanted}"
                    break
            end = first + len(seen)
        if end != NUM_BATCHES:
            yield f"rank {rank}: ended after {end} micro-batches"

    versions = sorted((folder / RUNS / "job").glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
    expected, got = read_metrics(whole / RUNS / "job" / "version_0"), set()
    for version in versions:
        rows = read_metrics(version)
        for row in rows:
            if row not in expected:
                yield f"{version.name}: metrics {row} are not the uninterrupted run's"
        if len(set(rows)) < len(rows):
            yield f"{version.name}: metrics written twice"
        got |= set(rows)
        for file in sorted(version.glob("checkpoints/step=*.ckpt")):
            wanted = whole / RUNS / "job" / "version_0" / "checkpoints" / file.name
            found = differences(read_checkpoint(file), read_checkpoint(wanted), f"{version.name} {file.name}")
            yield from itertools.islice(found, 3)
    for row in set(expected) - got:
        yield f"the metrics {row} of the uninterrupted run are lacking"
    last = last_checkpoint(folder / RUNS / "job")
    if checkpoints.read_checkpoint(last)["global_step"] != NUM_BATCHES // cell.accumulate:
        yield f"the last checkpoint is {last}"


@dataclass
class Outcome:
    """Of a run that was killed and resumed: what went wrong, how often it was killed, its processes' groups."""

    problems: list[str]
    kills: int
    groups: list[int]


def kill_and_resume(cell: Cell, setup: Setup, folder: Path, whole: Path, strikes: list[Strike]) -> Outcome:
    """A run, killed by each strike in turn and resumed to its end."""
    folder.mkdir(parents=True)
    outcome = Outcome([], 0, [])
    for attempt, strike in enumerate([*strikes, None]):
        processes = start(cell, setup, folder, attempt, strike)
        outcome.groups += [process.pid for process in processes]
        attend(processes, folder / f"seen.{attempt}.0", strike)
        codes = [process.exitcode for process in processes]
        if strike is not None and -signal.SIGKILL in codes:
            outcome.kills += 1
        elif any(codes):
            output = folder / "output.txt"
            written = output.read_text()[-3000:] if output.exists() else "no output"
            outcome.problems.append(f"attempt {attempt} ended with {codes}: {written}")
            return outcome
    outcome.problems += compare(cell, folder, len(strikes) + 1, whole)
    return outcome


def try_cell(cell: Cell, setup: Setup, folder: Path, points: int, seed: int = 0) -> list[str]:
    """Kill and resume the runs of a cell at so many points; returns what went wrong."""
    whole, begin = folder / WHOLE, time.monotonic()
    if problems := kill_and_resume(cell, setup, whole, whole, []).problems:
        return [f"{cell}, uninterrupted: {problem}" for problem in problems]
    rng, groups, kills, tries = random.Random(f"{cell} {seed}"), [], 0, 0
    kinds = itertools.cycle(rng.sample(KINDS, len(KINDS)))
    while kills < points and not problems:
        number = min(KILLS_PER_RUN, points - kills)
        bounds = [NUM_BATCHES * i // number for i in range(number + 1)]
        parts = [range(*between) for between in itertools.pairwise(bounds)]
        strikes = [draw_strike(rng, next(kinds), cell, part) for part in parts]
        outcome = kill_and_resume(cell, setup, folder / str(tries), whole, strikes)
        problems += [f"{cell}, run {tries}, {strikes}: {problem}" for problem in outcome.problems]
        groups, tries = groups + outcome.groups, tries + 1
        kills += outcome.kills  # a run may have ended before the moment came
    # Workers of a rank that was killed alone look every 5 s whether it is still there.
    deadline = time.monotonic() + 20
    while (left := survivors(groups)) and time.monotonic() < deadline:
        time.sleep(0.1)
    problems += [f"{cell}: still alive: {process}" for process in left]
    seconds = time.monotonic() - begin
    print(f"{cell}: {kills} kills in {tries} runs, {len(problems)} problems, {seconds:.0f} s", flush=True)
    return problems


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10, help="kills per cell")
    parser.add_argument("--cells", nargs="*", help="as parquet/2/1: source, workers, ranks (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the random points")
    parser.add_argument("--folder", type=Path, help="keeps the runs (default: a temporary folder)")
    options = parser.parse_args(arguments)
    cells = [f"{source}/{workers}/{ranks}" for source in SOURCES for workers in (0, 2) for ranks in (1, 2)]
    tqdm.tqdm.monitor_interval = 0  # no thread in what is forked
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        setup = Setup(folder / "inputs")
        writer = FORK.Process(target=setup.write)
        writer.start()
        writer.join()
        # Fills what the libraries work out at the first use, once for all runs.
        diffusers.StableDiffusionPipeline.from_pretrained(setup.pretrained, safety_checker=None)
        problems = []
        for name in options.cells or cells:
            source, workers, ranks = name.split("/")
            cell = Cell(source, int(workers), int(ranks))
            problems += try_cell(cell, setup, folder / name.replace("/", "_"), options.points, options.seed)
    print(*problems, sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
