"""Rows from wherever users keep them: hub, parquet, JSONL, folders of images; every row knows its file and number."""

import glob
import hashlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
Choose = Callable[[str, list[str]], list[str]]
SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "test", "validation_unique", "test_unique")


@dataclass
class Rows:
    """A table and the place of each of its rows.

    Attributes:
        dataset: The columns that were asked for, memory-mapped where they come from parquet or the hub.
        files: Names of the files (or the hub id and split) in the order of their rows.
        starts: First row of each file.
        lines: Line number of each row, for JSONL.
        root: Folder that image paths are relative to.
        shards: (N,) number of the shard that each row is read from, where only a few should be read at a time.
    """

    dataset: "datasets.Dataset"
    files: list[str]
    starts: list[int]
    lines: list[int] | None = None
    root: Path | None = None
    shards: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def identity(self) -> str:
        """Hash of the files' names and numbers of rows: another order of samples has another one."""
        content = json.dumps([[os.path.basename(file) for file in self.files], self.starts, len(self)])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def prefetch(self, rows: np.ndarray) -> None:
        """Told, ahead of time, which rows are going to be asked for."""

    def place(self, row: int) -> tuple[str, int]:
        """File of a row and its number there: lines count from 1, rows from 0."""
        if self.lines is not None:
            return self.files[0], self.lines[row]
        file = bisect_right(self.starts, row) - 1
        return self.files[file], row - self.starts[file]

    def where(self, row: int) -> str:
        """For error messages."""
        file, number = self.place(row)
        return f"{file}, {'row' if self.lines is None else 'line'} {number}"

    def id(self, row: int) -> str:
        """For batches: the file's name and the row in it."""
        file, number = self.place(row)
        return f"{os.path.basename(file)}:{number}"

    def ids(self) -> list[str]:
        """The id of every row."""
        return [self.id(row) for row in range(len(self))]

    def column(self, name: str) -> "pa.ChunkedArray":
        """One whole column, without reading any other; bytes stay on the disk until they are looked at."""
        return self.dataset.select_columns([name]).with_format("arrow")[:].column(name)

    def numbers(self, name: str, missing: float) -> np.ndarray:
        """A column of numbers or booleans as float64.

        Args:
            name: The column.
            missing: Stands for null.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.column(name)
        kind = column.type
        if not any(
            test(kind) for test in (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null)
        ):
            raise ValueError(f"{self.files[0]}: column {name!r} has type {kind}, expected numbers.")
        return pc.fill_null(pc.cast(column, pa.float64()), missing).to_numpy()

    def missing_texts(self, name: str) -> np.ndarray:
        """(N,) whether a text is null or blank; of a list of texts, whether any is, or the list is empty."""
        import pyarrow as pa
        import pyarrow.compute as pc

        def is_text(kind: pa.DataType) -> bool:
            return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)

        def is_blank(texts: pa.ChunkedArray) -> pa.ChunkedArray:
            return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(pc.cast(texts, pa.large_string())), ""), True)

        column = self.column(name)
        if is_text(column.type):
            return is_blank(column).to_numpy()
        if not (pa.types.is_list(column.type) and is_text(column.type.value_type)):
            raise ValueError(
                f"{self.files[0]}: column {name!r} has type {column.type}, expected text, or lists of texts of which "
                "one is drawn at every visit."
            )
        missing = pc.fill_null(pc.equal(pc.list_value_length(column), 0), True).to_numpy().copy()
        missing[pc.list_parent_indices(column).to_numpy()[is_blank(pc.list_flatten(column)).to_numpy()]] = True
        return missing

    def problems(self) -> dict[str, dict[int, str]]:
        """What is wrong with rows as the files hold them, beyond their values: reason -> row -> problem."""
        return {}

    def image_problems(self, name: str) -> dict[int, str]:
        """Row -> problem, where an image is absent or out of reach; decodes nothing and reads no image bytes."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.column(name)
        kind = column.type
        if pa.types.is_struct(kind) and {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}:
            data, paths = pc.struct_field(column, "bytes"), pc.struct_field(column, "path")
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            data, paths = column, None
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
            data, paths = None, column
        else:
            raise ValueError(
                f"{self.files[0]}: column {name!r} has type {kind}, expected encoded images (binary) or paths (string)."
            )
        lengths = np.full(len(self), -1) if data is None else pc.fill_null(pc.binary_length(data), -1).to_numpy()
        problems = {int(row): "has no bytes" for row in np.flatnonzero(lengths == 0)}
        for row in map(int, np.flatnonzero(lengths < 0)):
            path = None if paths is None else paths[row].as_py()
            try:
                self.stored_image(path)
            except ValueError as error:
                problems[row] = str(error)
        return problems

    def image_bytes(self, name: str) -> np.ndarray | None:
        """(N,) bytes of each encoded image, 0 where there is none; None where only reading the images would tell."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = self.column(name)
        kind, fields = column.type, []
        if pa.types.is_struct(kind):
            fields = [kind.field(i).name for i in range(kind.num_fields)]
        if "size" in fields:
            return pc.fill_null(pc.struct_field(column, "size"), 0).to_numpy()
        data, paths = column, column
        if {"bytes", "path"} <= set(fields):
            data, paths = pc.struct_field(column, "bytes"), pc.struct_field(column, "path")
        lengths = np.zeros(len(self), dtype=np.int64)
        if pa.types.is_binary(data.type) or pa.types.is_large_binary(data.type):
            lengths = pc.fill_null(pc.binary_length(data), 0).to_numpy().astype(np.int64)
        if pa.types.is_string(paths.type) or pa.types.is_large_string(paths.type):
            for row in map(int, np.flatnonzero(lengths == 0)):
                with suppress(ValueError):  # such a row is rejected or left out
                    lengths[row] = os.path.getsize(self.stored_image(paths[row].as_py()))
        return lengths if lengths.any() else None

    def stored_image(self, value: Any) -> bytes | Path:
        """Encoded bytes, or file, of an image as a row holds it: bytes, a path, or the hub's {"bytes", "path"}.

        Rows are data from strangers: a path must not reach out of the folder of the file that names it.
        """
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value["path"]
        if isinstance(value, bytes):
            return value
        if value is None:
            raise ValueError("is null, expected an image")
        if self.root is None:
            raise ValueError(
                f"is the path {value!r}; of the hub only bytes are read. Download the data, give the folder"
            )
        file = self.root / value
        target = file.resolve() if os.path.islink(file) else _resolve(file.parent) / file.name
        if PurePosixPath(value).is_absolute() or not target.is_relative_to(_resolve(self.root)):
            raise ValueError(f"is {value[:80]!r}, which leads out of the folder {self.root}; move the images there")
        if not os.path.isfile(file):
            raise ValueError(f"is {value[:80]!r}, which does not exist in {self.root}")
        return file


@lru_cache(maxsize=10_000)
def _resolve(folder: Path) -> Path:
    return folder.resolve()


def load_rows(
    source: str,
    split: str,
    subset: str | None,
    choose: Choose,
    load_parquet: Callable[[list[Path], Choose], Rows] | None = None,
    load_hub: Callable[[str, str, str | None, Choose], Rows] | None = None,
) -> Rows:
    """Open a data set.

    Args:
        source: Hub id; parquet file, glob or folder; JSONL file; folder of images (see `PickAPicDataModule`).
        split: Name of the split.
        subset: Name of the hub data set's configuration.
        choose: Given the source's name and its columns, says which to read, or raises.
        load_parquet: Opens parquet files. Null has them converted and mapped into memory.
        load_hub: Opens a hub data set, given its id, split and subset. Null downloads and converts it.
    """
    load_parquet, load_hub = load_parquet or _load_parquet, load_hub or _load_hub
    path = Path(source).expanduser()
    if not source.strip():
        raise ValueError("source is empty; expected a file, a folder or a hub id.")
    if path.is_dir():
        return _load_folder(path, split, choose, load_parquet)
    if path.is_file():
        _only_train(source, split, {file_stem(path), "train"})
        return _load_file(path, choose, load_parquet)
    if glob.has_magic(source):
        files = sorted(Path(name) for name in glob.glob(os.path.expanduser(source), recursive=True))
        if not files:
            raise FileNotFoundError(f"No file matches {source!r}. The pattern is relative to {os.getcwd()}.")
        _only_train(source, split, {"train"})
        return load_parquet(files, choose)
    if source.count("/") == 1 and source[0] not in "./~" and not source.endswith((".parquet", ".jsonl")):
        return load_hub(source, split, subset, choose)
    raise FileNotFoundError(
        f"{source!r} does not exist (looked in {os.getcwd()}). Expected a parquet file, glob or folder, a JSONL file, "
        "a folder of images, or a hub id such as 'owner/name'."
    )


def _only_train(source: str, split: str, available: set[str]) -> None:
    if split not in available:
        raise ValueError(
            f"{source}: unknown split {split!r}; available: {', '.join(sorted(available))}. One file is one split: put "
            "the files of several splits into one folder, named train.parquet, validation.parquet and so on, and give "
            "the folder as source."
        )


def file_stem(path: Path) -> str:
    """Name of a file without its number: `train` for train.parquet and for train-00000-of-00012.parquet."""
    return re.sub(r"[-_.]\d+([-_]of[-_]\d+)?$", "", path.stem)


def _load_folder(folder: Path, split: str, choose: Choose, load_parquet: Callable[[list[Path], Choose], Rows]) -> Rows:
    inside = folder / split if (folder / split).is_dir() else folder
    files = sorted(inside.rglob("*.parquet")) or sorted(inside.glob("*.jsonl"))
    if inside == folder:
        named = [file for file in files if file_stem(file) == split]
        available = {file_stem(file) for file in files} | {child.name for child in folder.iterdir() if child.is_dir()}
        available &= set(SPLIT_NAMES)
        if not named and (split != "train" or available):
            raise ValueError(
                f"{folder}: unknown split {split!r}; available: {', '.join(sorted(available or {'train'}))}. A split "
                f"is a sub-folder {split}/ or files named {split}.parquet, {split}-00000.parquet or {split}.jsonl."
            )
        files = named or files
    if not files:
        return _load_images(inside, choose)
    if files[0].suffix == ".parquet":
        return load_parquet(files, choose)
    if len(files) > 1:
        raise ValueError(f"{inside}: {len(files)} JSONL files ({files[0].name}, {files[1].name}, ...); expected one.")
    return _load_jsonl(files[0], choose)


def _load_file(path: Path, choose: Choose, load_parquet: Callable[[list[Path], Choose], Rows]) -> Rows:
    if path.suffix == ".parquet":
        return load_parquet([path], choose)
    if path.suffix == ".jsonl":
        return _load_jsonl(path, choose)
    raise ValueError(f"{path}: files of type {path.suffix or '(none)'!r} are not read; expected .parquet or .jsonl.")


def _load_hub(source: str, split: str, subset: str | None, choose: Choose) -> Rows:
    import datasets

    try:
        dataset = datasets.load_dataset(source, subset, split=split)
    # Not found, no network, gated, unknown split or configuration; damaged files.
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(hub_problem(source, split, error)) from error
    name = f"{source}[{split}]"
    return Rows(_keep_encoded(dataset.select_columns(choose(name, dataset.column_names))), [name], [0])


def hub_problem(source: str, split: str, error: Exception) -> str:
    """For error messages: why a hub data set could not be opened, and what to do."""
    return (
        f"Hub data set {source!r}, split {split!r}: {error}\nIf this machine has no network, give the path of a "
        "downloaded copy (a folder of parquet files) as source. Pick-a-Pic has left its first address: any mirror "
        "with the same columns will do, and `columns` maps other names."
    )


def _load_parquet(files: list[Path], choose: Choose) -> Rows:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    starts, total, columns, first = [], 0, [], None
    for file in files:
        try:
            with pq.ParquetFile(file) as parquet:
                schema, num_rows = parquet.schema_arrow, parquet.metadata.num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file}: not a readable parquet file ({error}). Copy or download it again; its size is "
                f"{file.stat().st_size} bytes."
            ) from error
        columns = choose(str(file), schema.names)
        types = {name: schema.field(name).type for name in columns}
        first = first or types
        if types != first:
            name = next(name for name in columns if types[name] != first[name])
            raise ValueError(
                f"{file}: column {name!r} has type {types[name]}, but {first[name]} in {files[0]}. All files of one "
                "data set must agree."
            )
        starts.append(total)
        total += num_rows
    if total == 0:
        raise ValueError(f"{files[0]}{' and further files' if len(files) > 1 else ''}: no rows.")
    try:
        dataset = datasets.load_dataset(
            "parquet", data_files=[glob.escape(str(file.absolute())) for file in files], columns=columns, split="train"
        )
    except datasets.exceptions.DatasetGenerationError as error:
        place = next(_damage(files, columns), str(files[0].parent))
        raise ValueError(
            f"{place}: the parquet data are damaged ({error.__cause__ or error}). Copy or download the file again."
        ) from error
    return Rows(_keep_encoded(dataset), [str(file) for file in files], starts, root=files[0].parent)


def _damage(files: list[Path], columns: list[str]) -> Iterator[str]:
    """Places that cannot be read, by row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for file in files:
        with pq.ParquetFile(file) as parquet:
            start = 0
            for group in range(parquet.num_row_groups):
                end = start + parquet.metadata.row_group(group).num_rows
                try:
                    parquet.read_row_group(group, columns)
                except (pa.ArrowException, OSError):
                    yield f"{file}, rows {start} to {end - 1}"
                start = end


def _keep_encoded(dataset: "datasets.Dataset") -> "datasets.Dataset":
    """Have image columns answer with bytes, so that each image is decoded when it is needed and by `transforms.py`."""
    import datasets

    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _load_jsonl(path: Path, choose: Choose) -> Rows:
    import datasets
    import pyarrow as pa

    records, lines = [], []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise ValueError(
                        f"{path}, line {number}: not valid JSON ({error}): {line[:80].rstrip()!r}"
                    ) from error
                if not isinstance(record, dict):
                    raise ValueError(
                        f'{path}, line {number}: expected an object such as {{"caption": ...}}, '
                        f"got {line[:80].rstrip()!r}"
                    )
                records.append(record)
                lines.append(number)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error}). Save the file as UTF-8.") from error
    if not records:
        raise ValueError(f"{path}: no rows.")

    columns = choose(str(path), list(records[0]))
    for name in columns:
        expected = next((_kind(record[name]) for record in records if record.get(name) is not None), None)
        for record, number in zip(records, lines, strict=True):
            if name not in record:
                raise ValueError(f"{path}, line {number}: no {name!r}; found {', '.join(map(repr, record))}.")
            if record[name] is not None and _kind(record[name]) != expected:
                raise ValueError(
                    f"{path}, line {number}: {name!r} is {record[name]!r}, a {_kind(record[name])}; the lines before "
                    f"have a {expected}."
                )
    try:
        dataset = datasets.Dataset.from_dict({name: [record[name] for record in records] for name in columns})
    except (pa.ArrowException, ValueError, OverflowError) as error:  # half a surrogate pair, a number of 30 digits
        raise ValueError(f"{path}: a value of {', '.join(columns)} cannot be stored: {error}") from error
    return Rows(dataset, [str(path)], [0], lines, root=path.parent)


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, (int, float)):
        return "number"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "list of strings"
    return {"str": "string"}.get(type(value).__name__, type(value).__name__)


def _load_images(folder: Path, choose: Choose) -> Rows:
    """A folder of `<name>_w.png`, `<name>_l.png`, `<name>.txt`; or of `<name>.png`, `<name>.txt`."""
    import datasets

    images = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES}
    captions = {file.stem: file for file in sorted(folder.glob("*.txt"))}
    if not images:
        raise ValueError(
            f"{folder}: no data. Expected parquet files, a JSONL file, or images <name>_w.png (preferred), "
            "<name>_l.png (the other one) and their caption <name>.txt."
        )
    pairs = any(stem.endswith(("_w", "_l")) for stem in images)
    names = sorted({stem[:-2] if pairs else stem for stem in images} | set(captions))
    columns: dict[str, list[Any]] = {"caption": [], "image": []}
    if pairs:
        columns = {"caption": [], "jpg_0": [], "jpg_1": [], "label_0": [1.0] * len(names)}
    for name in names:
        parts = {"caption": captions.get(name)}
        parts |= (
            {"jpg_0": images.get(f"{name}_w"), "jpg_1": images.get(f"{name}_l")}
            if pairs
            else {"image": images.get(name)}
        )
        for part, file in parts.items():
            if file is None:
                stem = {"caption": f"{name}.txt", "jpg_0": f"{name}_w.png", "jpg_1": f"{name}_l.png"}.get(
                    part, f"{name}.png"
                )
                raise ValueError(
                    f"{folder}: {name!r} has no {stem}; every pair needs <name>_w, <name>_l and <name>.txt."
                )
            try:
                columns[part].append(file.read_text(encoding="utf-8").strip() if part == "caption" else file.name)
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: not UTF-8 ({error}). Save the caption as UTF-8.") from error
    chosen = choose(str(folder), list(columns))
    dataset = datasets.Dataset.from_dict({name: columns[name] for name in chosen})
    return Rows(dataset, [str(folder / name) for name in names], list(range(len(names))), root=folder)
