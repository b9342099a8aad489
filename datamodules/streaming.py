"""Parquet files that stay where they are: texts and labels are read at once, images as training comes to them.

The images of a file, or of some of its row groups where it is large, make a shard, which is fetched whole and kept as
an Arrow file that all workers map into memory: any row of it can then be read at no cost, as the order asks for it.
"""

import hashlib
import json
import os
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import track

from datamodules.shard_cache import ShardCache, expand_urls, file_info, local_path, open_filesystem, persist, shown
from datamodules.sources import SPLIT_NAMES, Choose, Rows, file_stem, hub_problem, load_rows

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

SHARD_BYTES = 64_000_000  # of images in a shard, unless its only row group has more
THREADS = 16  # files that are looked at together


@dataclass(frozen=True)
class ParquetFile:
    """A parquet file anywhere.

    Attributes:
        url: Where it is.
        size: Bytes.
        version: What its storage says of its content: a time, a hash.
    """

    url: str
    size: int
    version: str

    @property
    def name(self) -> str:
        """For messages: the address without a query, which may hold a signature."""
        return self.url.split("?")[0] if "://" in self.url else self.url

    @contextmanager
    def open(self, pre_buffer: bool) -> "Iterator[pq.ParquetFile]":
        """The file, of which only what is asked for will be read.

        Args:
            pre_buffer: Fetch small pieces together, in few requests. Otherwise large ones pass through a small buffer.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        filesystem, path = open_filesystem(self.url)
        size = {"size": self.size} if self.url.startswith("http") else {}  # spares a request
        with filesystem.open(path, "rb", cache_type="none", **size) as source:
            try:
                parquet = pq.ParquetFile(source, buffer_size=8 << 20, pre_buffer=pre_buffer)
            except (pa.ArrowException, ValueError) as error:
                raise ValueError(
                    f"{self.name}: not a readable parquet file ({error}). Its size is {self.size} bytes. Parts of "
                    "files are read; over http the server must answer range requests."
                ) from error
            with parquet:
                yield parquet

    def read(self, what: str, action: Callable[[], Any]) -> Any:
        """Do what reads this file, again if the connection fails.

        Args:
            what: Is read, for error messages.
            action: Reads.
        """
        import pyarrow as pa

        local = local_path(self.url) is not None
        try:
            return action() if local else persist(what, action)
        except (pa.ArrowException, OSError) as error:
            # Arrow's own errors about the content bear no number of the operating system.
            if isinstance(error, OSError) and (error.errno is not None or not local):
                raise
            raise ValueError(
                f"{what}: the parquet data are damaged ({error}). Copy or download the file again."
            ) from error


@dataclass(frozen=True)
class Shard:
    """The images in consecutive row groups of a file.

    Attributes:
        file: The parquet file.
        groups: The first row group, and the one after the last.
        columns: Names of the image columns.
        start: First row, counted in the file.
        rows: Number of rows.
        size: Bytes of the images.
    """

    file: ParquetFile
    groups: tuple[int, int]
    columns: tuple[str, ...]
    start: int
    rows: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.file.name}, rows {self.start} to {self.start + self.rows - 1}"

    def write(self, path: Path) -> None:
        """Fetch the images and write them to an Arrow file."""
        self.file.read(self.name, partial(self._write, path))

    def _write(self, path: Path) -> None:
        import pyarrow as pa

        rows = 0
        with self.file.open(pre_buffer=False) as parquet:
            columns = {name: parquet.schema_arrow.field(name).type for name in self.columns}
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.schema(columns)) as writer:
                for batch in parquet.iter_batches(64, list(range(*self.groups)), list(columns)):
                    writer.write_batch(pa.RecordBatch.from_arrays(batch.select(list(columns)).columns, list(columns)))
                    rows += len(batch)
        if rows != self.rows:
            raise ValueError(f"{self.name}: found {rows} rows; the file has changed since the run began.")


class ImageCache(ShardCache):
    """Keeps shards of images as Arrow files."""

    def path(self, shard: Shard) -> Path:
        return self.copy(repr(shard), shard.name, shard.write)


@dataclass(kw_only=True)
class StreamedRows(Rows):
    """Rows whose images are fetched when they are needed.

    The data set holds in place of each image its number: row times number of image columns, plus number of the column;
    null where the file has no image.

    Attributes:
        images: Names of the image columns.
        parts: The shards; `shards` has the number of each row's.
        cache: Keeps them.
        max_open: Shards that a process maps into memory at a time.
        fingerprint: Hash of all that decides the samples, but for the images' bytes.
    """

    images: list[str]
    parts: list[Shard]
    cache: ImageCache
    max_open: int
    fingerprint: str
    _open: OrderedDict = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self) -> None:
        self._first_rows = np.cumsum([0, *(part.rows for part in self.parts)])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def identity(self) -> str:
        return self.fingerprint

    def prefetch(self, rows: np.ndarray) -> None:
        numbers = self.shards[rows]
        self.cache.prefetch([self.parts[number] for number in dict.fromkeys(numbers.tolist())])

    def image_problems(self, name: str) -> dict[int, str]:
        import pyarrow.compute as pc

        missing = pc.is_null(self.column(name)).to_numpy()
        return {int(row): "is null, expected an image in the file" for row in np.flatnonzero(missing)}

    def stored_image(self, value: int | None) -> bytes | Path:
        if value is None:
            return super().stored_image(None)
        row, column = divmod(value, len(self.images))
        number = int(self.shards[row])
        stored = self._images(number).column(column)[row - int(self._first_rows[number])].as_py()
        if stored == b"":
            raise ValueError("has no bytes")
        return super().stored_image(stored)

    def _images(self, number: int) -> "pa.Table":
        """The images of a shard, mapped into memory; the map holds even when the cache removes the file."""
        import pyarrow as pa

        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        while len(self._open) >= self.max_open:
            self._open.popitem(last=False)
        try:
            source = pa.memory_map(str(self.cache.path(self.parts[number])))
        except FileNotFoundError:  # removed by another process just now
            source = pa.memory_map(str(self.cache.path(self.parts[number])))
        self._open[number] = pa.ipc.open_file(source).read_all()
        return self._open[number]


@dataclass(frozen=True)
class ParquetStream:
    """Opens parquet files without downloading them.

    Attributes:
        images: Names that image columns may have.
        choice: Names everything that decides which columns are read.
        folder: Keeps the texts and labels of all files, and the images in use.
        limit_gb: Gigabytes of images to keep.
        shuffle_shards: Shards that are mixed at a time.
    """

    images: tuple[str, ...]
    choice: str
    folder: Path
    limit_gb: float
    shuffle_shards: int

    def load(self, source: str, split: str, subset: str | None, choose: Choose) -> StreamedRows:
        """Open a data set: all that `load_rows` takes if it is parquet, and URLs of parquet files."""
        if not Path(source).expanduser().exists() and any(mark in source for mark in ("://", "::", "{", "pipe:")):
            return self.load_urls(urls_of_split(source, split), choose)
        rows = load_rows(source, split, subset, choose, self.load_files, self.load_hub)
        if not isinstance(rows, StreamedRows):
            raise ValueError(f"{source}: only parquet files are streamed. Set `data.init_args.streaming: false`.")
        return rows

    def load_files(self, files: list[Path], choose: Choose) -> StreamedRows:
        return self.load_urls([str(file.absolute()) for file in files], choose)

    def load_hub(self, source: str, split: str, subset: str | None, choose: Choose) -> StreamedRows:
        import datasets

        try:
            files = datasets.load_dataset_builder(source, subset).config.data_files or {}
        # Not found, no network, gated, unknown subset, a loading script.
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(hub_problem(source, split, error)) from error
        if split not in files:
            raise ValueError(
                f"Hub data set {source!r}: no files of split {split!r}; available: {', '.join(map(str, files)) or '-'}."
            )
        check_parquet(f"Hub data set {source!r}, split {split!r}", files[split], source)
        return self.load_urls(list(files[split]), choose)

    def load_urls(self, urls: list[str], choose: Choose) -> StreamedRows:
        """Open parquet files, all with the same columns."""
        import datasets

        cache = ImageCache(self.folder / "images", self.limit_gb)
        index = self.folder / "index"
        index.mkdir(exist_ok=True)
        files = in_threads(look_up, urls)
        paths = [index / f"{_hash([astuple(file), self.choice])}.arrow" for file in files]
        missing = [(file, path) for file, path in zip(files, paths, strict=True) if not path.exists()]
        in_threads(lambda item: self.write_index(*item, choose), missing, "Reading texts and labels of files")
        tables, facts = zip(*map(_read, paths), strict=True)

        first = facts[0]["types"]
        for file, fact in zip(files, facts, strict=True):
            for name, kind in fact["types"].items():
                if kind != first.get(name):
                    raise ValueError(
                        f"{file.name}: column {name!r} has type {kind}, but {first.get(name)} in {files[0].name}. All "
                        "files of one data set must agree."
                    )
        starts = np.cumsum([0, *map(len, tables)]).tolist()
        if starts[-1] == 0:
            raise ValueError(f"{files[0].name}{' and further files' if len(files) > 1 else ''}: no rows.")
        images = [name for name in first if name in self.images]
        shards = [shard for file, fact in zip(files, facts, strict=True) for shard in cut(file, fact["groups"], images)]
        self.check_limit(shards)
        path = index / f"{_hash([path.name for path in paths])}.arrow"
        if not path.exists():
            _write(path, (_number_images(*pair, images) for pair in zip(tables, starts[:-1], strict=True)), {})
        digests = [[os.path.basename(file.name), fact["digest"]] for file, fact in zip(files, facts, strict=True)]
        return StreamedRows(
            datasets.Dataset.from_file(str(path)),
            [file.name for file in files],
            starts[:-1],
            shards=np.repeat(np.arange(len(shards)), [shard.rows for shard in shards]),
            images=images,
            parts=shards,
            cache=cache,
            max_open=self.shuffle_shards,
            fingerprint=_hash(digests),
        )

    def write_index(self, file: ParquetFile, path: Path, choose: Choose) -> None:
        """Read what is small in a file, and what its row groups hold."""
        _write(path, *file.read(file.name, lambda: self.read_index(file, choose)))

    def read_index(self, file: ParquetFile, choose: Choose) -> "tuple[list[pa.Table], dict[str, Any]]":
        """Texts and labels, and in place of each image whether it is there; with what is to know of the file."""
        import pyarrow as pa

        with file.open(pre_buffer=True) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
            names = choose(file.name, schema.names)
            images = [name for name in names if name in self.images]
            for name in images:
                if not _holds_images(schema.field(name).type):
                    raise ValueError(
                        f"{file.name}: column {name!r} has type {schema.field(name).type}, expected encoded images "
                        "(binary). Images beside the parquet file are read with `data.init_args.streaming: false`."
                    )
            table = parquet.read([name for name in names if name not in images])
            columns = {name: _present(parquet, name) if name in images else table.column(name) for name in names}
            chunks = [
                [metadata.row_group(group).column(column) for column in range(metadata.num_columns)]
                for group in range(metadata.num_row_groups)
            ]
            inside = tuple(f"{name}." for name in images)
            sizes = [
                sum(chunk.total_uncompressed_size for chunk in group if f"{chunk.path_in_schema}.".startswith(inside))
                for group in chunks
            ]
            layout = [
                [chunk.path_in_schema, chunk.num_values, chunk.data_page_offset, chunk.total_compressed_size]
                for group in chunks
                for chunk in group
            ]
            facts = {
                "types": {name: str(schema.field(name).type) for name in names},
                "groups": [[metadata.row_group(group).num_rows, size] for group, size in enumerate(sizes)],
                "digest": _hash([layout, table.to_pydict()]),
            }
        return [pa.table(columns)], facts

    def check_limit(self, shards: list[Shard]) -> None:
        """The shards that are mixed, and as many that are fetched meanwhile, must fit into the cache."""
        largest = max(shards, key=lambda shard: shard.size)
        need = min(2 * self.shuffle_shards * largest.size, sum(shard.size for shard in shards))
        if need > self.limit_gb * 1e9:
            raise ValueError(
                f"cache_gb is {self.limit_gb:g}; mixing {self.shuffle_shards} shards of up to {largest.size / 1e9:.2g} "
                f"GB ({largest.name}) while the next are fetched takes {need / 1e9:.2g}. Raise "
                "`data.init_args.cache_gb` or lower `data.init_args.shuffle_shards`."
            )


def look_up(url: str) -> ParquetFile:
    """Size and version of a file."""
    info = persist(shown(url), partial(file_info, url))
    if info["size"] is None:
        raise ValueError(f"{shown(url)}: the server does not tell the size, so that parts of the file cannot be read.")
    marks = ("ETag", "etag", "blob_id", "md5Hash", "mtime", "LastModified", "Last-Modified")
    return ParquetFile(url, info["size"], _hash([info.get(mark) for mark in marks]))


def cut(file: ParquetFile, groups: list[list[int]], columns: list[str]) -> list[Shard]:
    """Shards of a file.

    Args:
        file: The file.
        groups: Rows, and bytes of images, of each of its row groups.
        columns: Names of the image columns.
    """
    shards, first, start, rows, size = [], 0, 0, 0, 0
    for number, (more_rows, more_bytes) in enumerate([*groups, [0, SHARD_BYTES]]):
        if rows and size + more_bytes > SHARD_BYTES:
            shards.append(Shard(file, (first, number), tuple(columns), start, rows, size))
            first, start, rows, size = number, start + rows, 0, 0
        rows, size = rows + more_rows, size + more_bytes
    return shards


def urls_of_split(source: str, split: str) -> list[str]:
    """Those of the files that an address names that belong to a split, by their names or their folder's."""
    urls = expand_urls(source)
    check_parquet(source, urls)
    paths = [PurePosixPath(url.split("?")[0]) for url in urls]
    named = [url for url, path in zip(urls, paths, strict=True) if split in (file_stem(path), path.parent.name)]
    available = {name for path in paths for name in (file_stem(path), path.parent.name)} & set(SPLIT_NAMES)
    if not named and (split != "train" or available):
        raise ValueError(
            f"{source}: unknown split {split!r}; available: {', '.join(sorted(available or {'train'}))}. A split is "
            f"files named {split}.parquet or {split}-00000.parquet, or a folder {split}/."
        )
    return named or urls


def check_parquet(where: str, urls: list[str], repository: str = "owner/name") -> None:
    """Refuse other files, and say where parquet may be found."""
    kinds = Counter(PurePosixPath(url.split("?")[0]).suffix or "(no type)" for url in urls)
    if set(kinds) != {".parquet"}:
        found = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common(5))
        raise ValueError(
            f"{where}: streaming reads parquet files, found {found}. Many hub data sets have a parquet copy: "
            f"source: hf://datasets/{repository}@refs%2Fconvert%2Fparquet/<subset>/<split>/*.parquet. Or download and "
            "convert everything with `streaming: false`; tar shards have a data module of their own, "
            "`datamodules.pickapic_shards`."
        )


def in_threads(function: Callable[[Any], Any], items: Iterable[Any], title: str | None = None) -> list[Any]:
    """A function of each item, in order; with a progress bar if it has a title. The first error stops all."""
    pool, items = ThreadPoolExecutor(THREADS), list(items)
    try:
        return list(track(pool.map(function, items), title or "", len(items), disable=title is None or not items))
    finally:
        pool.shutdown(cancel_futures=True)


def _holds_images(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _present(parquet: "pq.ParquetFile", name: str) -> np.ndarray:
    """(N,) whether an image is there; reads images only of row groups that are known to lack some."""
    import pyarrow as pa
    import pyarrow.compute as pc

    present = [np.ones(0, dtype=bool)]
    for group in range(parquet.num_row_groups):
        metadata = parquet.metadata.row_group(group)
        chunks = [metadata.column(column) for column in range(metadata.num_columns)]
        chunk = next(chunk for chunk in chunks if chunk.path_in_schema in (name, f"{name}.bytes"))
        if chunk.statistics is None or not chunk.statistics.null_count:
            present.append(np.ones(metadata.num_rows, dtype=bool))
            continue
        column = parquet.read_row_group(group, [name]).column(name)
        data = pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column
        present.append(pc.is_valid(data).to_numpy())
    return np.concatenate(present)


def _number_images(table: "pa.Table", start: int, images: list[str]) -> "pa.Table":
    """The table with each image's number in place of its presence; see StreamedRows."""
    import pyarrow as pa

    rows = np.arange(start, start + len(table))
    for number, name in enumerate(images):
        numbers = pa.array(rows * len(images) + number, mask=~table.column(name).to_numpy())
        table = table.set_column(table.column_names.index(name), name, numbers)
    return table


def _write(path: Path, tables: "Iterable[pa.Table]", facts: dict[str, Any]) -> None:
    """One Arrow file of tables with the same columns; it appears when it is whole."""
    import pyarrow as pa

    part, writer = path.with_suffix(f".{uuid.uuid4().hex}.part"), None
    try:
        with pa.OSFile(str(part), "wb") as file:
            for table in tables:
                schema = table.schema.with_metadata({"facts": json.dumps(facts)})
                writer = writer or pa.ipc.new_stream(file, schema)
                writer.write_table(table.cast(schema))
            writer.close()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> "tuple[pa.Table, dict[str, Any]]":
    import pyarrow as pa

    table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    return table, json.loads(table.schema.metadata[b"facts"])


def _hash(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, default=str).encode(), digest_size=16).hexdigest()
