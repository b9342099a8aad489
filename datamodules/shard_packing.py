"""Packs preference pairs into WebDataset tars, unpacks them, and proves that nothing was lost on the way."""

import datetime
import hashlib
import io
import json
import multiprocessing
import os
import re
import tarfile
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from datamodules.pickapic import PICKAPIC_COLUMNS, PairColumns, PairTable, PickAPicDataModule
from datamodules.shard_cache import expand_urls, local_path, shown
from datamodules.tar_index import BLOCK, PUBLISHED_MEMBERS, PairMembers, index_tar, read_members, replacing
from datamodules.tar_shards import read_sidecar, sidecar

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

T = TypeVar("T")
R = TypeVar("R")
MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp"}
PACKED_FROM = "packed_from"  # in the JSON: the file and row that a sample comes from
PAIR_COLUMNS = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
ROW_GROUP = 100  # samples that `unpack` holds in memory
SHOWN_PROBLEMS = 20
PATIENCE = 10.0  # seconds that a command waits for another one to end
TAKEN = (
    "there is such a shard already, made from other data or with other settings. Give another folder, or another "
    "--name, or delete it."
)


class _Source(PickAPicDataModule):
    """Any pairs that a run can be given, with the columns that are to be kept.

    Args:
        keep: Names of further columns; null keeps all.
    """

    def __init__(self, source: str, keep: list[str] | None, **kwargs: Any) -> None:
        super().__init__(source, ties="keep", **kwargs)
        self.keep = keep
        self.extra: dict[str, str] = {}  # key in the JSON -> column

    def _choose_columns(self, name: str, found: list[str]) -> list[str]:
        wanted = super()._choose_columns(name, found)
        keep = [column for column in found if column not in (*wanted, "label_1")] if self.keep is None else self.keep
        if missing := [column for column in keep if column not in found]:
            raise ValueError(f"{name}: no column {missing[0]!r} to keep; found: {', '.join(found)}.")
        standard = {getattr(self.columns, key): key for key in ("model_0", "model_1", "has_label")}
        pairs = (self.columns.caption, self.columns.image_0, self.columns.image_1, self.columns.label_0)
        columns = dict.fromkeys([*wanted, *keep])
        self.extra = {standard.get(column, column): column for column in columns if column not in pairs}
        return list(columns)


@dataclass(frozen=True)
class Packing:
    """Samples of one split as members of tars.

    Attributes:
        table: The rows.
        name: Begins the names of shards and keys.
        extra: Keys of the JSON member, and the columns that they come from.
        settings: As `pack` was given them, without defaults that follow from others.
    """

    table: PairTable
    name: str
    extra: dict[str, str]
    settings: dict[str, Any]

    @property
    def samples_per_shard(self) -> int:
        return self.settings["samples_per_shard"]

    def __len__(self) -> int:
        """Number of shards."""
        return -(-len(self.table.index) // self.samples_per_shard)

    def tar(self, shard: int) -> str:
        return f"{self.name}-{shard:05d}.tar"

    def samples(self, shard: int) -> range:
        start = shard * self.samples_per_shard
        return range(start, min(start + self.samples_per_shard, len(self.table.index)))

    def key(self, sample: int) -> str:
        rows, row = self.table.rows, int(self.table.index[sample])
        return f"{self.name}-{bisect_right(rows.starts, row) - 1:05d}-{rows.place(row)[1]:07d}"

    def texts(self, sample: int) -> dict[str, bytes]:
        """All members but the images, by suffix."""
        rows, columns, row = self.table.rows, self.table.columns, int(self.table.index[sample])
        values = self.text_rows[row]
        try:
            about = {key: values[column] for key, column in self.extra.items()}
            metadata = json.dumps(about | {PACKED_FROM: rows.id(row)}, default=_as_text)
            caption = values[columns.caption].encode()
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{rows.where(row)}: {error}. A tar holds one caption per sample, and other columns as JSON: say which "
                "to keep with --keep (`--keep '[]'` for none)."
            ) from error
        label_0 = float(self.table.label_0[sample])
        return {
            "json": metadata.encode(),
            "label_0.txt": str(label_0).encode(),
            "label_1.txt": str(1.0 - label_0).encode(),
            "original_prompt.txt": caption,
        }

    def images(self, sample: int) -> dict[str, bytes]:
        """The images as they are stored, by suffix."""
        rows, columns, row = self.table.rows, self.table.columns, int(self.table.index[sample])
        values, images = rows.dataset[row], {}
        for name, column in (("jpg_0", columns.image_0), ("jpg_1", columns.image_1)):
            stored = rows.stored_image(values[column])
            content = stored if isinstance(stored, bytes) else stored.read_bytes()
            suffix = next((suffix for magic, suffix in MAGIC.items() if content.startswith(magic)), None)
            if suffix is None:
                raise ValueError(
                    f"{rows.where(row)}: {column!r} is not an image of a known format. `--verify_images true` finds "
                    "all such rows, and with `--on_bad_row drop` leaves them out."
                )
            images[name + suffix] = content
        return images

    @cached_property
    def text_rows(self) -> "datasets.Dataset":
        names = dict.fromkeys([self.table.columns.caption, *self.extra.values()])
        return self.table.rows.dataset.select_columns(list(names))

    @cached_property
    def source_state(self) -> dict[str, Any]:
        """What tells that the source is still the same, without reading its images."""
        rows, columns = self.table.rows, self.table.columns
        status = {file: os.stat(file) for file in map(str, rows.files) if os.path.isfile(file)}
        return {
            "files": {file: (state.st_size, state.st_mtime_ns) for file, state in status.items()},
            "bytes": [rows.image_bytes(name) for name in (columns.image_0, columns.image_1)],
        }

    def origin(self, shard: int) -> str:
        """Hash of what goes into a shard; of images only their sizes, and time and size of the file they lie in."""
        rows, digest = self.table.rows, hashlib.blake2b(digest_size=16)
        for sample in self.samples(shard):
            row = int(self.table.index[sample])
            state = [self.source_state["files"].get(str(rows.place(row)[0]))]
            state += [None if sizes is None else int(sizes[row]) for sizes in self.source_state["bytes"]]
            digest.update(repr([self.key(sample), state, *self.texts(sample).items()]).encode())
        return digest.hexdigest()

    def write_tar(self, shard: int, target: BinaryIO) -> None:
        with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as file:
            for sample in self.samples(shard):
                for suffix, content in sorted({**self.texts(sample), **self.images(sample)}.items()):
                    header = tarfile.TarInfo(f"{self.key(sample)}.{suffix}")  # its time, user and group are 0
                    header.size = len(content)
                    file.addfile(header, io.BytesIO(content))

    def write(self, folder: Path, shard: int) -> None:
        """Write a shard and the index beside it, which gets its name first: a complete shard always has its index."""
        path = folder / self.tar(shard)
        with replacing(path) as part:
            with part.open("wb") as file:
                self.write_tar(shard, file)
            index = index_tar(part, PUBLISHED_MEMBERS, str(path), checksum=True)
            for problem, sample in zip(index.table["problem"].to_pylist(), self.samples(shard), strict=True):
                if problem is not None:
                    raise ValueError(f"{self.table.rows.where(int(self.table.index[sample]))}: {problem}.")
            packed = {"origin": self.origin(shard), "settings": self.settings}
            replace(index, packed=packed).save(Path(sidecar(str(path))))

    def compare(self, pair: tuple[int, Path]) -> list[str]:
        """What differs between a tar and the one that would be written now."""
        shard, path = pair
        made = io.BytesIO()
        self.write_tar(shard, made)
        expected, actual = (np.frombuffer(content, np.uint8) for content in (made.getbuffer(), path.read_bytes()))
        length = min(len(expected), len(actual))
        differing = np.flatnonzero(expected[:length] != actual[:length])
        if len(expected) == len(actual) and not len(differing):
            return []
        byte = int(differing[0]) if len(differing) else length
        with path.open("rb") as file:
            names = [member.name for member in read_members(file) if member.offset <= byte + BLOCK]
        return [f"{path}: differs from the source from byte {byte} on, in {names[-1][:80] if names else 'the end'!r}."]

    def is_written(self, folder: Path, shard: int) -> bool:
        """Whether a shard is there, of this very content.

        Raises:
            ValueError: if there is one of another content.
        """
        tar = folder / self.tar(shard)
        if not tar.exists():
            return False
        index = read_sidecar(str(tar))
        if index is None or index.packed is None or index.packed["origin"] != self.origin(shard):
            raise ValueError(f"{tar}: {TAKEN}")
        return True


def open_packing(source: str, settings: dict[str, Any]) -> Packing:
    """What `pack` makes of a source with these settings."""
    given = dict(settings)
    name, samples_per_shard = given.pop("name") or given["split"], given.pop("samples_per_shard")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name):
        raise ValueError(
            f"--name is {name!r}; expected up to 60 letters, digits, - and _ : the keys of samples begin with it."
        )
    if samples_per_shard < 1:
        raise ValueError(f"--samples_per_shard is {samples_per_shard}; expected 1 or more.")
    data = _Source(source, **given | {"columns": PairColumns(**given["columns"])})
    return Packing(data._open(given["split"]), name, data.extra, settings)


def pack(
    source: str,
    folder: Path,
    split: str = "train",
    name: str | None = None,
    samples_per_shard: int = 1000,
    num_workers: int | None = None,
    subset: str | None = None,
    columns: PairColumns = PICKAPIC_COLUMNS,
    keep: list[str] | None = None,
    require_label: bool = False,
    on_bad_row: Literal["error", "drop"] = "error",
    verify_images: bool = False,
) -> None:
    """Write the pairs of one split into tars, <folder>/<split>-00000.tar and so on, each with an index beside it.

    Images are copied byte by byte, ties are kept, and further columns go into a JSON member. A command that was stopped
    may be given again: it goes on behind the shards that are complete.

    Args:
        source: Parquet file, glob or folder, JSONL file, folder of images, or hub id, as for a run.
        folder: Where the tars go.
        split: Split of the source.
        name: Begins the names of tars and keys, instead of the split's name.
        samples_per_shard: Samples in a tar.
        num_workers: Processes; null takes as many as there are processors.
        subset: Configuration of a hub data set that has several.
        columns: Names of the columns.
        keep: Further columns to keep; null keeps all.
        require_label: Leave out rows whose has_label is false.
        on_bad_row: What becomes of rows with an impossible label, an empty caption or no image.
        verify_images: Decode every image first; one that does not decode makes a bad row.
    """
    settings = {
        "split": split,
        "name": name,
        "samples_per_shard": samples_per_shard,
        "subset": subset,
        "columns": asdict(columns),
        "keep": keep,
        "require_label": require_label,
        "on_bad_row": on_bad_row,
        "verify_images": verify_images,
    }
    packing = open_packing(source, settings)
    folder.mkdir(parents=True, exist_ok=True)
    tars = [packing.tar(shard) for shard in range(len(packing))]
    try:
        with FileLock(folder / f".{packing.name}.lock", timeout=PATIENCE):
            for left in folder.glob(f"{packing.name}-?????.tar*.part"):  # by a command that was killed
                left.unlink()
            for tar in sorted(os.listdir(folder)):
                if re.fullmatch(rf"{packing.name}-\d+\.tar", tar) and tar not in tars:
                    raise ValueError(f"{folder / tar}: {TAKEN}")
            written = in_parallel(partial(packing.is_written, folder), range(len(tars)), num_workers, "Looking")
            missing = [shard for shard, there in enumerate(written) if not there]
            in_parallel(partial(packing.write, folder), missing, num_workers, "Packing")
    except Timeout as error:
        raise ValueError(f"{folder}: another command is packing {packing.name}-*.tar here.") from error
    shards = f"{len(tars)} shards" + (f", {sum(written)} of them there already" if any(written) else "")
    print(f"{packing.table.summary}\n{shards}: {folder / packing.name}-{{00000..{len(tars) - 1:05d}}}.tar")


def unpack(
    shards: str,
    folder: Path,
    members: PairMembers = PUBLISHED_MEMBERS,
    on_bad_row: Literal["error", "drop"] = "error",
    num_workers: int | None = None,
) -> None:
    """Write parquet files with Pick-a-Pic's columns, one for each tar; images are copied byte by byte.

    The keys of the JSON members become columns.

    Args:
        shards: The tars: paths, globs, brace lists.
        folder: Where the parquet files go.
        members: What the members of a sample are called.
        on_bad_row: What becomes of samples that lack a member, have an impossible label, and so on.
        num_workers: Processes; null takes as many as there are processors.
    """
    import pyarrow as pa

    paths = local_shards(shards)
    targets = {folder / f"{path.stem}.parquet": path for path in paths}
    if len(targets) < len(paths):
        raise ValueError(f"{shards}: several tars have one name; unpack them into a folder each.")
    if there := next((target for target in targets if target.exists()), None):
        raise ValueError(f"{there}: is there already; give another folder, or delete it.")
    folder.mkdir(parents=True, exist_ok=True)
    unpacking = Unpacking(members, on_bad_row == "drop")
    schemas = in_parallel(unpacking.schema, paths, num_workers, "Reading JSON")
    try:
        schema = pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"{shards}: the JSON members do not agree on a type: {error}") from error
    write = partial(unpacking.write, schema)
    dropped = sum(in_parallel(write, list(targets.items()), num_workers, "Unpacking"), Counter())
    print(f"{len(targets)} files: {folder}/*.parquet" + (f"; left out: {counted(dropped)}" if dropped else ""))


@dataclass(frozen=True)
class Unpacking:
    """How tars become parquet.

    Attributes:
        members: What the members of a sample are called.
        drop: Leave bad samples out.
    """

    members: PairMembers
    drop: bool

    def samples(self, path: Path) -> tuple["pa.Table", Counter[str]]:
        """The samples of a tar that can be used, and why others can not."""
        table = index_tar(path, self.members, str(path)).table
        bad = table.filter(table["problem"].is_valid())
        if len(bad) and not self.drop:
            row = bad.slice(0, 1).to_pylist()[0]
            raise ValueError(
                f"{path}, key {row['key'][:80]!r}: {row['problem']}. {len(bad)} of {len(table)} samples are bad; "
                "`--on_bad_row drop` leaves them out."
            )
        return table.filter(table["problem"].is_null()), Counter(bad["reason"].to_pylist())

    def metadata(self, table: "pa.Table", file: BinaryIO) -> list[dict[str, Any]]:
        """What the JSON members say beyond the columns that every sample has."""
        texts = [read(file, place) if place else b"{}" for place in table["metadata"].to_pylist()]
        hidden = (PACKED_FROM, *PAIR_COLUMNS)
        return [{key: value for key, value in json.loads(text).items() if key not in hidden} for text in texts]

    def schema(self, path: Path) -> "pa.Schema":
        import pyarrow as pa

        table, _ = self.samples(path)
        try:
            with path.open("rb") as file:
                metadata = self.metadata(table, file)
            names = dict.fromkeys(key for row in metadata for key in row)
            return pa.schema({name: pa.array([row.get(name) for row in metadata]).type for name in names})
        except (pa.ArrowException, ValueError, OverflowError) as error:  # mixed types, half a surrogate pair
            raise ValueError(f"{path}: the JSON members cannot be made columns: {error}") from error

    def write(self, schema: "pa.Schema", pair: tuple[Path, Path]) -> Counter[str]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        target, path = pair
        table, dropped = self.samples(path)
        columns = PAIR_COLUMNS if self.members.label_0 is not None else PAIR_COLUMNS[:3]
        types = (pa.string(), pa.binary(), pa.binary(), pa.float64(), pa.float64())
        fields = [pa.field(name, kind) for name, kind in zip(columns, types, strict=False)]
        schema = pa.schema([*fields, *schema])
        with path.open("rb") as file, replacing(target) as part, pq.ParquetWriter(part, schema) as writer:
            for start in range(0, len(table), ROW_GROUP):
                group = table.slice(start, ROW_GROUP)
                rows = self.metadata(group, file)
                for row, sample in zip(rows, group.to_pylist(), strict=True):
                    row["caption"], row["label_0"] = sample["caption"], sample["label_0"]
                    row["jpg_0"], row["jpg_1"] = read(file, sample["image_0"]), read(file, sample["image_1"])
                    row["label_1"] = None if sample["label_0"] is None else 1.0 - sample["label_0"]
                writer.write_table(pa.Table.from_pylist(rows, schema))
        return dropped


def verify(shards: str, source: str | None = None, num_workers: int | None = None) -> None:
    """Read tars whole: is every sample complete, and is all as it was when the index beside each tar was made?

    Args:
        shards: The tars that `pack` has made of one split: paths, globs, brace lists.
        source: What they were packed from; given that, every tar is made again and compared byte by byte.
        num_workers: Processes; null takes as many as there are processors.
    """
    paths = local_shards(shards)
    problems = sum(in_parallel(check, paths, num_workers, "Verifying"), [])
    if source is not None and not problems:
        indices = [read_sidecar(str(path)) for path in paths]
        settings = [None if index is None or index.packed is None else index.packed["settings"] for index in indices]
        if settings[0] is None or settings != settings[:1] * len(paths):
            raise ValueError(f"{shards}: were not packed together; only what `pack` made at once is compared.")
        packing = open_packing(source, settings[0])
        names = [packing.tar(shard) for shard in range(len(packing))]
        if [path.name for path in paths] != names:
            raise ValueError(
                f"{source} gives {names[0]} to {names[-1]}, these are {paths[0].name} to {paths[-1].name}."
            )
        problems = sum(in_parallel(packing.compare, list(enumerate(paths)), num_workers, "Comparing"), [])
    for problem in problems[:SHOWN_PROBLEMS]:
        print(problem)
    if problems:
        raise ValueError(f"{shards}: {len(problems)} problems in {len(paths)} tars.")
    print(f"{len(paths)} tars are as they were" + ("" if source is None else f", and all that {source} has") + ".")


def check(path: Path) -> list[str]:
    """What is wrong with a tar, or does not fit the index beside it."""
    try:
        beside = read_sidecar(str(path))
    except ValueError as error:
        return [str(error)]
    if beside is None:
        return [f"{path}: there is no index beside it to compare it with; `index` makes one."]
    found = index_tar(path, beside.members, str(path), checksum=True)
    if not found.table.equals(beside.table):
        return [f"{path}: has other samples than the index beside it says."]
    if found.checksum != beside.checksum:
        return [f"{path}: its bytes have changed since the index beside it was made."]
    bad = found.table.filter(found.table["problem"].is_valid()).to_pylist()
    return [f"{path}, key {row['key'][:80]!r}: {row['problem']}." for row in bad]


def index(shards: str, members: PairMembers = PUBLISHED_MEMBERS, num_workers: int | None = None) -> None:
    """Write an index beside each tar that others have made: a run that reads the tars from afar needs it.

    Args:
        shards: The tars: paths, globs, brace lists.
        members: What the members of a sample are called.
        num_workers: Processes; null takes as many as there are processors.
    """
    paths = local_shards(shards)
    counts = sum(in_parallel(partial(_index, members), paths, num_workers, "Indexing"), Counter())
    usable = counts.pop(None, 0)
    print(f"{usable} samples in {len(paths)} tars" + (f"; unusable: {counted(counts)}" if counts else ""))


def _index(members: PairMembers, path: Path) -> Counter[str | None]:
    found = index_tar(path, members, str(path), checksum=True)
    found.save(Path(sidecar(str(path))))
    return Counter(found.table["reason"].to_pylist())


def local_shards(shards: str) -> list[Path]:
    """The paths that a list of shards means, in order."""
    paths = {url: local_path(url) for url in expand_urls(shards)}
    if remote := next((url for url, path in paths.items() if path is None), None):
        raise ValueError(f"{shown(remote)}: only shards on this machine are read; copy them first.")
    return list(paths.values())


def counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in reasons.items())


def read(file: BinaryIO, place: dict[str, int]) -> bytes:
    return os.pread(file.fileno(), place["size"], place["offset"])


def _as_text(value: Any) -> str:
    """What JSON has no type for."""
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} cannot be kept as JSON")


_task: Callable[[Any], Any]  # of a process of `in_parallel`


def in_parallel(task: Callable[[T], R], items: Sequence[T], num_workers: int | None, title: str) -> list[R]:
    """Results of a task, by several processes, with a progress bar."""
    from rich.progress import track

    if not items:
        return []
    workers = min(num_workers or os.cpu_count() or 1, len(items))
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(task,)) as pool:
        try:
            return list(track(pool.map(_run, items), title, total=len(items)))
        finally:
            pool.shutdown(cancel_futures=True)


def _start(task: Callable[[Any], Any]) -> None:
    global _task
    _task = task

    def end_with_parent() -> None:  # else a killed command would leave processes that wait for ever
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _run(item: Any) -> Any:
    return _task(item)
