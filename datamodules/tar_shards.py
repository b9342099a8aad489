"""Preference pairs in tars, near or far: the indices of many shards as one table; images are read by their place."""

import hashlib
import io
import json
import os
import re
import zlib
from dataclasses import asdict, astuple, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from datamodules.shard_cache import ShardCache, file_info, local_path, open_filesystem, persist, shown
from datamodules.sources import Rows
from datamodules.streaming import in_threads
from datamodules.tar_index import BLOCK, DAMAGED, VERSION, PairMembers, ShardIndex, index_tar, replacing

if TYPE_CHECKING:
    import pyarrow as pa

OPEN_SHARDS = 64  # per process
CHANGED = "The shard has been changed since it was indexed: start again, without the copies in `cache_dir`"


def shard_name(url: str) -> str:
    """The name of a shard without its folder, in commands and URLs too."""
    names = re.findall(r"[^/\s?]+\.tar\b", url)
    return names[-1] if names else os.path.basename(url)


def sidecar(shard: str) -> str:
    """Where the index of a shard lies that `pack` and `index` write."""
    return f"{shard}.index"


def fingerprint(url: str) -> str:
    """Changes when a shard does, as far as can be told without reading it: by size and time, of a command not at all.

    Raises:
        FileNotFoundError, OSError, ValueError: if there is no such shard.
    """
    local = local_path(url)
    if local is not None:
        if local.is_dir():
            raise ValueError(f"{local}: is a folder, expected tars: give {str(local / '*.tar')!r}.")
        status = local.stat()
        return f"{local.absolute()} {status.st_size} {status.st_mtime_ns}"
    if url.startswith("pipe:"):
        return url
    return f"{url} {sorted(persist(shown(url), partial(file_info, url)).items())}"


class TarCache(ShardCache):
    """Indices of tars, and local copies of remote ones, each compared with its index when it arrives.

    Args:
        folder: Keeps them.
        limit_gb: Gigabytes of copies to keep.
        allow_shell_pipes: Run the commands of `pipe:` addresses.
        members: What the members of a sample are called.
    """

    def __init__(self, folder: Path, limit_gb: float, allow_shell_pipes: bool, members: PairMembers) -> None:
        super().__init__(folder, limit_gb, allow_shell_pipes)
        self.members = members
        self.states: dict[str, str] = {}  # of every shard that is asked for: its `fingerprint`
        (self.folder / "index").mkdir(exist_ok=True)

    def index_file(self, *urls: str) -> Path:
        """Where the index of shards is kept as long as they do not change."""
        content = json.dumps([VERSION, asdict(self.members), [self.states[url] for url in urls]])
        return self.folder / "index" / hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def path(self, shard: str) -> Path:
        if local_path(shard) is not None:
            return super().path(shard)
        return self.copy(self.states[shard], shown(shard), partial(self._fetch, shard))

    def _fetch(self, url: str, path: Path) -> None:
        self._download(url, path)
        kept = self.index_file(url)
        if kept.exists() and not index_tar(path, self.members, shown(url)).tells_the_same(ShardIndex.load(kept)):
            kept.unlink()
            raise ValueError(
                f"{shown(url)}: has other samples than its index says; it, or the index beside it, has been changed. "
                "Make the index again, with `python -m datamodules.pickapic_shards index`, or delete it, and start "
                "again."
            )


def load_indices(urls: list[str], cache: TarCache) -> list[ShardIndex]:
    """The index of every shard: kept from the last time, or from beside a remote shard, or made by reading the shard.

    Args:
        urls: Addresses of the shards.
        cache: Keeps the indices, and the copies of shards that must be downloaded for it.

    Raises:
        FileNotFoundError, OSError, ValueError: if a shard cannot be read, or the index beside it does not fit.
    """
    from rich.progress import track

    unread = [url for url in urls if not cache.index_file(url).exists()]
    beside = dict(zip(unread, in_threads(partial(read_sidecar, members=cache.members), unread), strict=True))
    for url in unread:
        if beside[url] is not None and local_path(url) is None:
            beside[url].save(cache.index_file(url))
    unread = [url for url in unread if not cache.index_file(url).exists()]
    for number, url in enumerate(track(unread, "Indexing shards", disable=len(unread) < 2)):
        cache.prefetch([url for url in unread[number:] if local_path(url) is None])
        index = index_tar(cache.path(url), cache.members, shown(url))
        if beside[url] is not None and not beside[url].tells_the_same(index):
            raise ValueError(_unfit(url, "says that there are other samples"))
        index.save(cache.index_file(url))
    return [ShardIndex.load(cache.index_file(url)) for url in urls]


def read_sidecar(url: str, members: PairMembers | None = None) -> ShardIndex | None:
    """The index beside a shard, if there is one.

    Args:
        url: Address of the shard.
        members: What its members must be called; null takes any.

    Raises:
        ValueError: if the index is damaged, or of other members or a shard of another size.
    """
    local = local_path(url)
    if local is not None:
        file = Path(sidecar(str(local)))
        if not file.exists():
            return None
        size = local.stat().st_size
    elif url.startswith("pipe:") or "?" in url:  # there is no beside
        return None
    else:
        filesystem, path = open_filesystem(url)
        if not filesystem.exists(sidecar(path)):
            return None
        file = io.BytesIO(persist(shown(sidecar(url)), partial(filesystem.cat_file, sidecar(path))))
        size = persist(shown(url), partial(file_info, url))["size"]
    try:
        index = ShardIndex.load(file)
    except ValueError as error:
        raise ValueError(_unfit(url, f"is {error}")) from error
    if size is not None and index.size != size:
        raise ValueError(_unfit(url, f"was made for {index.size} bytes, the shard has {size}"))
    if members not in (None, index.members):
        raise ValueError(_unfit(url, f"was made for members called {', '.join(map(str, astuple(index.members)))}"))
    return index


def _unfit(url: str, what: str) -> str:
    return (
        f"{shown(url)}: the index beside it, {shown(sidecar(url))}, {what}. Make it again, with "
        "`python -m datamodules.pickapic_shards index`, or delete it."
    )


def open_tars(urls: list[str], cache: TarCache) -> "TarRows":
    """All samples of the shards as one table, memory-mapped.

    Args:
        urls: The shards.
        cache: Keeps what has been read of them.

    Raises:
        FileNotFoundError, OSError, ValueError: if a shard cannot be read. What is wrong inside are `TarRows.problems`.
    """
    import datasets
    import pyarrow as pa

    cache.states = dict(zip(urls, in_threads(fingerprint, urls), strict=True))
    merged = cache.index_file(*urls).with_suffix(".arrow")
    if not all(file.exists() for file in (merged, *map(cache.index_file, urls))):
        table, sizes = _merge(load_indices(urls, cache))
        schema = table.schema.with_metadata({"sizes": json.dumps(sizes)})
        with replacing(merged) as part, pa.OSFile(str(part), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            writer.write_table(table)
    with pa.memory_map(str(merged)) as file:
        sizes = json.loads(pa.ipc.open_stream(file).schema.metadata[b"sizes"])
    rows = TarRows(datasets.Dataset.from_file(str(merged)), urls, [], cache=cache, sizes=sizes)
    rows.shards = rows.numbers("shard", missing=-1).astype(np.int32)
    rows.starts = np.searchsorted(rows.shards, np.arange(len(urls))).tolist()
    return rows


def _merge(indices: list[ShardIndex]) -> tuple["pa.Table", list[int]]:
    """All indices in one table whose places know their shard, and the sizes of the tars."""
    import pyarrow as pa

    table = pa.concat_tables(index.table for index in indices).combine_chunks()
    shard = pa.array(np.repeat(np.arange(len(indices), dtype=np.int32), [len(index.table) for index in indices]))
    for name in ("image_0", "image_1"):
        place = pa.StructArray.from_arrays(
            [shard, *table[name].combine_chunks().flatten()], ["shard", "offset", "size", "check"]
        )
        table = table.set_column(table.schema.get_field_index(name), name, place)
    return table.append_column("shard", shard), [index.size for index in indices]


@dataclass
class TarRows(Rows):
    """Samples in tars. An image of a row is the place where its bytes lie.

    Attributes:
        cache: Gives local files for the shards.
        sizes: Bytes of each shard.
    """

    cache: TarCache | None = None
    sizes: list[int] = field(default_factory=list)
    _files: dict[int, BinaryIO] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    @property
    def identity(self) -> str:
        content = json.dumps([[shard_name(url) for url in self.files], self.starts, self.sizes, len(self)])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def prefetch(self, rows: np.ndarray) -> None:
        shards = dict.fromkeys(self.shards[rows].tolist())
        if remote := [self.files[shard] for shard in shards if local_path(self.files[shard]) is None]:
            self.cache.prefetch(remote)

    def key(self, row: int) -> str:
        return self.dataset.data.column("key")[row].as_py()

    def where(self, row: int) -> str:
        return f"{shown(self.place(row)[0])}, key {self.key(row)[:80]!r}"

    def id(self, row: int) -> str:
        return f"{shard_name(self.place(row)[0])}:{self.key(row)}"

    def problems(self) -> dict[str, dict[int, str]]:
        reasons, problems = self.column("reason"), self.column("problem")
        found: dict[str, dict[int, str]] = {DAMAGED: {}}  # told first: it explains what is missing
        for row in map(int, np.flatnonzero(problems.is_valid())):
            found.setdefault(reasons[row].as_py(), {})[row] = problems[row].as_py()
        return found

    def image_problems(self, name: str) -> dict[int, str]:
        return {}  # an absent image is one of `problems`

    def stored_image(self, value: dict[str, int]) -> bytes:
        file = self._file(value["shard"])
        stored = os.pread(file.fileno(), BLOCK + value["size"], value["offset"] - BLOCK)
        if len(stored) != BLOCK + value["size"] or zlib.crc32(stored[:BLOCK]) != value["check"]:
            raise ValueError(f"is not at byte {value['offset']}, where the index places it. {CHANGED}")
        return stored[BLOCK:]

    def _file(self, shard: int) -> BinaryIO:
        """The shard, opened; the files opened longest ago are closed."""
        file = self._files.pop(shard, None)
        if file is None:
            while len(self._files) >= OPEN_SHARDS:
                self._files.pop(next(iter(self._files))).close()
            path = self.cache.path(self.files[shard])
            try:
                file = path.open("rb", buffering=0)
            except FileNotFoundError:  # removed by another process just now
                file = self.cache.path(self.files[shard]).open("rb", buffering=0)
            if (size := os.fstat(file.fileno()).st_size) != self.sizes[shard]:
                raise ValueError(f"lies in {path}, which has {size} bytes instead of {self.sizes[shard]}. {CHANGED}")
        self._files[shard] = file
        return file
