"""Addresses of shards written out, and local copies of those that lie elsewhere."""

import errno
import glob
import hashlib
import os
import queue
import re
import subprocess
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    import fsspec

T = TypeVar("T")
PAUSES = (1.0, 5.0)  # seconds before the second and before the third attempt
PATIENCE = 60  # seconds for a server to answer, and to go on


def persist(name: str, action: Callable[[], T]) -> T:
    """Do what may fail for a moment, in up to three attempts.

    Args:
        name: What it is about, for error messages.
        action: Does it.

    Raises:
        FileNotFoundError: if what is asked for is not there.
        ValueError: as the action raises it; it would not succeed the next time.
        OSError: of the last attempt, or at once where permission or space on the disk are missing.
    """
    for pause in (*PAUSES, None):
        try:
            return action()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: there is no such file.") from error
        except (PermissionError, ImportError, ValueError):
            raise
        except Exception as error:  # the file systems of fsspec raise each its own library's
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            if pause is None:
                problem = _without_queries(str(error)) or type(error).__name__
                raise OSError(f"{name}: {len(PAUSES) + 1} attempts failed, the last with: {problem}") from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


class ShardCache:
    """Local copies of remote shards: bounded in size, shared by all processes of a machine.

    Goes to the workers of a DataLoader by pickling or forking.

    Args:
        folder: Keeps the copies; made if it does not exist.
        limit_gb: Gigabytes (10^9 bytes) of copies to keep; those used longest ago make room. What is being downloaded
            comes on top.
        allow_shell_pipes: Run the commands of `pipe:` addresses, through bash.
    """

    def __init__(self, folder: Path, limit_gb: float, allow_shell_pipes: bool = False) -> None:
        if not 0 < limit_gb < float("inf"):
            raise ValueError(f"cache_gb is {limit_gb}; expected gigabytes for several shards, more than 0.")
        self.folder = Path(folder).expanduser().absolute()
        self.limit = int(limit_gb * 1e9)
        self.allow_shell_pipes = allow_shell_pipes
        self._thread: threading.Thread | None = None
        self._lists: queue.SimpleQueue | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(
                f"{self.folder}: shards cannot be kept here ({error.strerror}). Give a folder that can be written to "
                "with `data.init_args.cache_dir`."
            ) from error
        for part in self.folder.glob("*.part"):  # left by a download that was killed, unless somebody holds its lock
            with suppress(Timeout), FileLock(part.with_suffix(".lock"), timeout=0):
                part.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_thread": None, "_lists": None}

    def path(self, shard: str) -> Path:
        """A local file with the content of a shard; where it must be downloaded first, returns when that is done.

        Args:
            shard: Path of a file, URL of any protocol of fsspec, or `pipe:` and a command that writes the shard.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the address cannot be used, or the cache is too small for the shard.
            OSError: if three attempts failed, or the disk is full.
        """
        local = local_path(shard)
        if local is None:
            return self.copy(shard, shown(shard), partial(self._download, shard))
        if not local.is_file():
            raise FileNotFoundError(f"{local}: no such file (looked in {os.getcwd()}).")
        return local

    def copy(self, key: str, name: str, write: Callable[[Path], None]) -> Path:
        """The file of a key, written at the first call.

        Args:
            key: Stands for the content of the file.
            name: What it is a copy of, for error messages.
            write: Writes the file under the name that it is given.

        Raises:
            ValueError, OSError: as `path` does.
        """
        copy = self.folder / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.shard"
        if _mark_used(copy):
            return copy
        with FileLock(copy.with_suffix(".lock")):
            if _mark_used(copy):  # another process was faster
                return copy
            # With the lock held, an unfinished file can only be a dead process's; its command may still write to it.
            part = copy.with_suffix(".part")
            part.unlink(missing_ok=True)
            try:
                write(part)
                self._make_room(name, part.stat().st_size)
                os.replace(part, copy)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise OSError(
                        f"{self.folder}: the disk is full while {name} is copied to it. Make room, lower "
                        f"`data.init_args.cache_gb` (now {self.limit / 1e9:g}), or give another "
                        "`data.init_args.cache_dir`."
                    ) from error
                raise
            finally:
                part.unlink(missing_ok=True)
            _mark_used(copy)
        return copy

    def prefetch(self, shards: list) -> None:
        """Have a thread of this process download shards until they fill half of the cache; replaces earlier lists.

        Args:
            shards: As `path` takes them, in the order in which they will be needed.
        """
        if self._thread is None or not self._thread.is_alive():  # never begun, or left behind by a fork
            self._lists = queue.SimpleQueue()
            self._thread = threading.Thread(target=self._prefetch, args=(self._lists,), daemon=True)
            self._thread.start()
        self._lists.put(shards)

    def _prefetch(self, lists: queue.SimpleQueue) -> None:
        while True:
            size = 0
            for shard in lists.get():
                with suppress(OSError, ValueError):  # whoever needs the shard tries again, and tells
                    size += self.path(shard).stat().st_size
                if size > self.limit / 2 or not lists.empty():
                    break

    def _download(self, url: str, part: Path) -> None:
        persist(shown(url), partial(self._run if url.startswith("pipe:") else self._get, url, part))

    def _get(self, url: str, part: Path) -> None:
        filesystem, path = open_filesystem(url)
        size = file_info(url)["size"]
        if size is not None:
            self._make_room(shown(url), size)
        filesystem.get_file(path, str(part))
        if size is not None and part.stat().st_size != size:
            raise OSError(f"the download ended after {part.stat().st_size} of {size} bytes")

    def _run(self, url: str, part: Path) -> None:
        if not self.allow_shell_pipes:
            raise ValueError(
                f"{shown(url)}: commands are run only if `data.init_args.allow_shell_pipes` is true; whoever writes "
                "the address can then do on this machine whatever you can."
            )
        # Of a pipeline whose first command fails, the last would otherwise report success.
        command = ["bash", "-o", "pipefail", "-c", url.removeprefix("pipe:")]
        with part.open("wb") as file:
            result = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.PIPE)
        if result.returncode != 0 or part.stat().st_size == 0:
            lines = result.stderr.decode(errors="replace").strip().splitlines() or ["(it wrote no message)"]
            raise OSError(f"exit code {result.returncode}, {part.stat().st_size} bytes: {lines[-1][:500]}")

    def _make_room(self, name: str, size: int) -> None:
        """Remove the copies used longest ago until `size` further bytes fit under the limit."""
        if size > self.limit:
            raise ValueError(
                f"{name} has {size / 1e9:.3g} GB, but the cache may hold only {self.limit / 1e9:g} GB: raise "
                "`data.init_args.cache_gb` to the size of several shards."
            )
        copies = []
        for file in self.folder.glob("*.shard"):
            with suppress(FileNotFoundError):  # removed by another process
                copies.append((file.stat().st_mtime_ns, file.stat().st_size, file))
        for _, num_bytes, file in sorted(copies, reverse=True):
            size += num_bytes
            if size > self.limit:
                file.unlink(missing_ok=True)


def _mark_used(copy: Path) -> bool:
    """Note the time of use in the file; whether it is there."""
    try:
        os.utime(copy, ns=(time.time_ns(),) * 2)  # finer than the system's own clock for files
    except FileNotFoundError:
        return False
    return True


def local_path(url: str) -> Path | None:
    """The path that an address means, None where it is remote or a command."""
    if url.startswith("pipe:"):
        return None
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    return None if "://" in url else Path(url).expanduser()


def shown(url: str) -> str:
    """An address as errors show it: shortened, and without what may be a signature."""
    url = _without_queries(url)
    return repr(url if len(url) <= 200 else url[:200] + "...")


def _without_queries(text: str) -> str:
    return re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1?...", text)


def open_filesystem(url: str) -> "tuple[fsspec.AbstractFileSystem, str]":
    """The file system of a URL, and the path in it.

    Raises:
        ValueError: if the protocol is unknown, or the package that serves it is not installed.
    """
    import aiohttp
    import fsspec

    options = {}
    if url.startswith(("http://", "https://")):
        # Large files take long; what counts is that something arrives.
        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
        }
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{shown(url)}: {error}. URLs are read with fsspec and its packages.") from error


def file_info(url: str) -> dict[str, Any]:
    """What the file system of a URL says of the file, at least its "size", which may be None."""
    filesystem, path = open_filesystem(url)
    try:
        return filesystem.info(path)
    except FileNotFoundError as error:
        # So says http of whatever went wrong.
        if error.__cause__ is not None and getattr(error.__cause__, "status", None) != 404:
            raise error.__cause__ from None
        raise


def expand_urls(source: str | list[str]) -> list[str]:
    """Addresses of shards, written out.

    Args:
        source: Paths, globs, URLs or `pipe:` commands; with {00..12} and {a,b} for several at once, and `::` between
            them; or a list of all that. Globs answer in alphabetical order.

    Raises:
        FileNotFoundError: if a path or glob finds nothing.
        ValueError: if there is no address, a brace that is no list, or one address twice.
    """
    items = [source] if isinstance(source, str) else source
    urls = [url for item in items for part in item.split("::") for url in _expand(part.strip())]
    if not urls:
        raise ValueError("The list of shards is empty.")
    twice, count = Counter(urls).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{shown(twice)} is named twice in the list of shards: its samples would be seen twice.")
    return urls


def _expand(text: str) -> list[str]:
    if not text:
        raise ValueError("The list of shards has an empty entry; expected paths, globs, URLs or `pipe:` commands.")
    if local_path(text) is not None and local_path(text).exists():
        return [text]
    urls = _expand_braces(text)
    if text.startswith("pipe:"):
        return urls
    if brace := next((url for url in urls if "{" in url or "}" in url), None):
        raise ValueError(f"{shown(brace)}: expected braces as in {{00000..00644}} or {{cats,dogs}}, each closed.")
    return [found for url in urls for found in _find(url)]


def _find(url: str) -> list[str]:
    path = local_path(url)
    if path is None:
        if "*" not in url:
            return [url]
        filesystem, pattern = open_filesystem(url)
        found = sorted(filesystem.unstrip_protocol(name) for name in filesystem.glob(pattern))
    else:
        found = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))
    if not found:
        raise FileNotFoundError(
            f"{shown(url)}: nothing found" + (f" (looked in {os.getcwd()})." if path is not None else ".")
        )
    return found


def _expand_braces(text: str) -> list[str]:
    """Every {00..12} and {a,b} written out, the first one slowest; other braces, as in ${HOME}, stay."""
    for match in re.finditer(r"(?<!\$)\{([^{}]*)\}", text):
        if choices := _choices(match[1]):
            before, after = text[: match.start()], text[match.end() :]
            return [full for choice in choices for full in _expand_braces(before + choice + after)]
    return [text]


def _choices(inside: str) -> list[str]:
    """What a pair of braces stands for; nothing if it is no list."""
    if bounds := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = int(bounds[1]), int(bounds[2])
        if not first <= last < first + 1_000_000:
            raise ValueError(f"{{{inside}}}: expected a range that rises, of at most a million numbers.")
        padded = any(len(bound) > 1 and bound[0] == "0" for bound in bounds.groups())
        width = max(map(len, bounds.groups())) if padded else 0
        return [f"{number:0{width}}" for number in range(first, last + 1)]
    return inside.split(",") if "," in inside else []
