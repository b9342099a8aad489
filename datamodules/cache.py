"""What training would encode at every step, encoded once and kept: moments of the VAE, embeddings of the prompts.

    cache.json                                      what was encoded, with what: compared before the cache is used
    rows-<split>.json, prompts.json                 which rows and prompts, in the order of the shards
    images-<split>-<first>-<last>.safetensors       moments of these rows, every version of every image
    prompts-<first>-<last>.safetensors              embeddings of these prompts

`python main.py cache` fills the folder (`cache_filling.py`). Everything that is read is compared with its checksum.
"""

import hashlib
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from datamodules.batches import ImageBatch, PairBatch
from datamodules.sources import Rows
from datamodules.transforms import View

if TYPE_CHECKING:
    from collections.abc import Callable

    from datamodules.pickapic import PairTable

FORMAT = 1
HEADER = "cache.json"
Dtype = Literal["float16", "bfloat16", "float32"]
AGAIN = "Fill another one with this config (`python main.py cache`, into another folder)"


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def checksum(*tensors: Tensor) -> int:
    """CRC-32 of the values of tensors, one after the other."""
    result = 0
    for tensor in tensors:
        result = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy(), result)
    return result


def shards_of(kind: str, number: int, rows_per_shard: int, suffix: str = ".safetensors") -> dict[str, range]:
    """Names of the shards of so many rows or prompts, and which ones each holds.

    Args:
        kind: "prompts", or "images-" and the split.
        number: Rows or prompts.
        rows_per_shard: In all shards but the last.
        suffix: Of the files.
    """
    parts = [range(start, min(start + rows_per_shard, number)) for start in range(0, number, rows_per_shard)]
    return {f"{quote(kind, safe='')}-{part[0]:08d}-{part[-1]:08d}{suffix}": part for part in parts}


def rows_file(split: str) -> str:
    return f"rows-{quote(split, safe='')}.json"


def row_keys(rows: Rows) -> list[str]:
    """A name for every row of a data set: its id, with a number where files of one name lie in several folders."""
    seen: Counter[str] = Counter()
    keys = []
    for name in rows.ids():
        seen[name] += 1
        keys.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return keys


def changes(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What differs between two headers: "resolution 512 -> 1024"."""
    found = []
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name, "(none)"), now.get(name, "(none)")
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{prefix}{name} ")
        elif old != new:
            found.append(f"{prefix}{name} {old} -> {new}")
    return found


def write_header(about: dict[str, Any]) -> tuple[bytes, str]:
    """Content of the header, and the checksum in it, by which the shards know it."""
    checksum = digest(json.dumps(about).encode())
    return (json.dumps({"format": FORMAT, "checksum": checksum, **about}, indent=2) + "\n").encode(), checksum


def read_header(folder: Path) -> tuple[dict[str, Any], str]:
    """What the header of a cache says, and its checksum.

    Raises:
        FileNotFoundError: if there is no cache in the folder.
        ValueError: if the header is damaged or of another format.
    """
    file = folder / HEADER
    if not file.is_file():
        raise FileNotFoundError(
            f"There is no cache in {folder} (no {HEADER}). `python main.py cache` with the same config fills it; "
            "without `data.init_args.cache`, images and prompts are encoded at every step."
        )
    header = parse_json(file, file.read_bytes())
    if not isinstance(header, dict) or not isinstance(header.get("format"), int):
        raise ValueError(f"{file} is no header of a cache. Give the folder that `python main.py cache` has filled.")
    if header["format"] != FORMAT:
        raise ValueError(
            f"{file} has format {header['format']}, this version reads format {FORMAT}. {AGAIN}, or use the version of "
            "Limelight that filled it."
        )
    about = {name: value for name, value in header.items() if name not in ("format", "checksum")}
    if digest(json.dumps(about).encode()) != header.get("checksum"):
        raise ValueError(f"{file} is damaged, or was edited: its checksum does not agree. {AGAIN}.")
    return about, header["checksum"]


def parse_json(file: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). {AGAIN}.") from error


class Cache:
    """A filled cache, for reading; goes to the workers of a DataLoader.

    Args:
        folder: As `python main.py cache` has filled it.

    Raises:
        FileNotFoundError: if there is no cache, or shards of it are missing.
        ValueError: if a file of it is damaged or belongs to another cache.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.header, self.identity = read_header(self.folder)
        self.splits = {
            split: self._read_index(rows_file(split), about["index"]) for split, about in self.header["splits"].items()
        }
        prompts = self._read_index("prompts.json", self.header["prompts"]["index"])
        self.prompts = {prompt: number for number, prompt in enumerate(prompts)}
        numbers = {f"images-{split}": about["rows"] for split, about in self.header["splits"].items()}
        parts = {
            kind: shards_of(kind, number, self.header["rows_per_shard"])
            for kind, number in [*numbers.items(), ("prompts", len(prompts))]
        }
        self.shards = {kind: list(shards) for kind, shards in parts.items()}
        self._handles: dict[str, Any] = {}
        names = [name for shards in parts.values() for name in shards]
        if missing := [name for name in names if not (self.folder / name).is_file()]:
            raise FileNotFoundError(
                f"{len(missing)} of the {len(names)} shards of the cache {self.folder} are missing, first "
                f"{missing[0]}: `python main.py cache` with the same config makes those that are."
            )
        for kind, shards in parts.items():
            for name, part in shards.items():
                self._check_shapes(name, self._shapes(kind, len(part)))

    def _shapes(self, kind: str, rows: int) -> dict[str, list[int]]:
        """Name -> shape of the tensors of a shard."""
        if kind == "prompts":
            return {name: [rows, *shape] for name, shape in self.header["embeddings"].items()} | {"checksums": [rows]}
        images = 2 if self.header["views"]["images"] == "pairs" else 1
        every = [rows, images, 2 if self.header["splits"][kind.removeprefix("images-")]["flips"] else 1]
        return {"moments": [*every, *self.header["moments"]], "about": [*every, 5]}

    def _check_shapes(self, name: str, expected: dict[str, list[int]]) -> None:
        shard = self._shard(name)
        found = {key: shard.get_slice(key).get_shape() for key in shard.keys()}  # noqa: SIM118
        if found != expected:
            raise self._damaged(name, f"it holds {found}, expected {expected}")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handles": {}}

    def _read_index(self, name: str, expected: str) -> Any:
        file = self.folder / name
        content = file.read_bytes() if file.is_file() else b""
        if digest(content) != expected:
            raise ValueError(f"{file} is {'damaged' if content else 'missing'}. {AGAIN}.")
        return parse_json(file, content)

    def _damaged(self, name: str, reason: str) -> ValueError:
        return ValueError(
            f"{self.folder / name} is damaged ({reason}). Delete this file and run `python main.py cache` with the "
            "same config: it makes what is missing."
        )

    def _shard(self, name: str) -> Any:
        """The open shard, mapped into memory."""
        if name not in self._handles:
            try:
                handle = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise self._damaged(name, str(error)) from error
            if (handle.metadata() or {}).get("cache") != self.identity:
                raise ValueError(
                    f"{self.folder / name} belongs to another cache than {HEADER} beside it. Do not mix the files of "
                    "several caches: delete this file and run `python main.py cache` with the same config."
                )
            self._handles[name] = handle
        return self._handles[name]

    def _find(self, kind: str, place: int) -> tuple[str, int]:
        """Name of the shard that holds a row or prompt, and its number there."""
        number, row = divmod(place, self.header["rows_per_shard"])
        return self.shards[kind][number], row

    # ------------------------------------------------------------------------------------------------- comparing

    def check_views(self, views: dict[str, Any]) -> None:
        """Raise if the images were shown to the encoder in another way than training now asks for.

        Args:
            views: As `cache_filling.py` writes them. A cache of pairs also serves training on the preferred images.
        """
        cached = self.header["views"]
        if cached["images"] == "pairs" and views["images"] == "preferred":
            views = views | {"images": "pairs"}
        self._refuse(changes(cached, views), "of images in another form")

    def check_encoders(self, encoders: dict[str, Any]) -> None:
        """Raise if other networks, or another precision, would encode now.

        Args:
            encoders: `family`, `compute_dtype`, and `encoders`: name -> hash.
        """
        self._refuse(changes({name: self.header[name] for name in encoders}, encoders), "by other encoders")

    def _refuse(self, changed: list[str], what: str) -> None:
        if changed:
            raise ValueError(
                f"The cache {self.folder} is stale, it was made {what}: {'; '.join(changed)}. {AGAIN}, go back to what "
                "it was made with, or leave out `data.init_args.cache`."
            )

    def places(self, split: str, rows: Rows, images: list[str]) -> np.ndarray:
        """Where the rows of a data set are in the cache.

        Args:
            split: Name of the split.
            rows: All its rows.
            images: Names of the columns of images, in stored order.

        Returns:
            (len(rows),) places; -1 for rows that are not in the cache.

        Raises:
            ValueError: if the split is not there, or an image is another one than it was.
        """
        if split not in self.splits:
            raise ValueError(
                f"The cache {self.folder} holds nothing of the split {split!r}, only {', '.join(self.splits)}. {AGAIN}."
            )
        index, about = self.splits[split], self.header["splits"][split]
        place_of = {key: place for place, key in enumerate(index["keys"])}
        places = np.array([place_of.get(key, -1) for key in row_keys(rows)], dtype=np.int64)
        known = np.flatnonzero(places >= 0)
        bytes_now = [rows.image_bytes(name) for name in images]
        if (index["bytes"] is None or bytes_now[0] is None) and about["identity"] != rows.identity:
            self._refuse([f"files of split {split!r} {about['identity']} -> {rows.identity}"], "of other data")
        elif index["bytes"] is not None and bytes_now[0] is not None:
            before, now = np.array(index["bytes"])[places[known]], np.stack(bytes_now, axis=1)[known]
            if len(different := np.argwhere(before != now)):
                first, which = different[0]
                self._refuse(
                    [
                        f"{len(different)} images of split {split!r}, first {images[which]!r} of "
                        f"{rows.where(int(known[first]))}: {before[first, which]} -> {now[first, which]} bytes"
                    ],
                    "of other images",
                )
        return places

    def rows_of(self, split: str, table: "PairTable", places: np.ndarray, flips: bool) -> "CachedRows":
        """The rows of a table, for `Samples`.

        Args:
            split: Name of the split.
            table: N rows that are trained or validated on.
            places: Of all rows of the split, as `places` gives them.
            flips: Whether mirrored images are asked for.

        Raises:
            ValueError: if a row, an image or a caption of the table is not in the cache.
        """
        if flips and not self.header["splits"][split]["flips"]:
            self._refuse([f"horizontal_flip of split {split!r} False -> True"], "without mirrored images")
        here = places[table.index]
        absent = here < 0
        if self.header["views"]["images"] == "preferred":
            absent |= np.array(self.splits[split]["preferred"])[here] != (table.label_0 == 0)
        if absent.any():
            raise ValueError(
                f"{absent.sum()} of {len(here)} rows of split {split!r} are not in the cache {self.folder}, which "
                f"holds {len(self.splits[split]['keys'])}; first {table.rows.where(int(table.index[absent][0]))}. "
                "Which rows take part depends on the data and on ties, labels, filters, max_train_samples and the "
                f"seed. {AGAIN}, or go back to the settings that it was filled with."
            )
        captions = distinct_captions(table)
        if unknown := [caption for caption in captions if caption not in self.prompts]:
            raise ValueError(
                f"{len(unknown)} of {len(captions)} captions of split {split!r} are not in the cache {self.folder}, "
                f"first {unknown[0][:80]!r}: they have been changed since it was filled. {AGAIN}."
            )
        return CachedRows(self, split, here)

    # --------------------------------------------------------------------------------------------------- reading

    def view(self, split: str, place: int, which: int, version: int) -> View:
        """Moments (2C, h, w) of an image in the cache's dtype, and its sizes.

        Args:
            split: Name of the split.
            place: Of the row.
            which: Number of the stored image.
            version: 1 for the mirrored one.
        """
        name, row = self._find(f"images-{split}", place)
        which = 0 if self.header["views"]["images"] == "preferred" else which
        try:
            moments = self._shard(name).get_slice("moments")[row, which, version]
            about = self._shard(name).get_slice("about")[row, which, version]
        except SafetensorError as error:
            raise self._damaged(name, str(error)) from error
        if about[4].item() != checksum(moments, about[:4]):
            raise self._damaged(name, f"the checksum of {self.splits[split]['keys'][place]} does not agree")
        height, width, top, left = about[:4].tolist()
        return View(moments, (height, width), (top, left))

    def embedding(self, prompt: str) -> dict[str, Tensor]:
        """The encodings of a prompt, each (1, ...) float32."""
        name, row = self._find("prompts", self.prompts[prompt])
        try:
            found = {key: self._shard(name).get_slice(key)[row] for key in self.header["embeddings"]}
            expected = self._shard(name).get_slice("checksums")[row]
        except SafetensorError as error:
            raise self._damaged(name, str(error)) from error
        if expected.item() != checksum(*found.values()):
            raise self._damaged(name, f"the checksum of the prompt {prompt[:40]!r} does not agree")
        return {key: tensor[None].to(torch.float32, copy=True) for key, tensor in found.items()}


@dataclass
class CachedRows:
    """The rows of a table in a cache.

    Args:
        cache: The cache.
        split: Name of the split.
        places: (N,) places of the rows in the cache.
    """

    cache: Cache
    split: str
    places: np.ndarray

    def views(
        self, number: int, order: range, joint: bool, horizontal_flip: bool, generator: np.random.Generator
    ) -> list[View]:
        """What `view_image` and `view_pair_jointly` would have shown to the encoder, at the same draws.

        Args:
            number: The row's place in the table.
            order: Numbers of the stored images to give, the preferred one first.
            joint: Flip both images of a pair or none.
            horizontal_flip: Mirror half of the images.
            generator: Decides which.
        """
        draws = [horizontal_flip and generator.random() < 0.5 for _ in order[: 1 if joint else None]]
        flips = draws * len(order) if joint else draws
        place = int(self.places[number])
        return [self.cache.view(self.split, place, *wanted) for wanted in zip(order, map(int, flips), strict=True)]


def distinct_captions(table: "PairTable") -> list[str]:
    """Every caption of a table once, in the order of the rows; of a list of texts, all of them."""
    captions = table.rows.column(table.columns.caption).take(np.sort(table.index)).to_pylist()
    texts = [text for caption in captions for text in ([caption] if isinstance(caption, str) else caption)]
    return list(dict.fromkeys(texts))


def collate_cached(
    samples: list[dict[str, Any]], collate: "Callable[[list], PairBatch | ImageBatch]", empty: dict[str, Tensor]
) -> PairBatch | ImageBatch:
    """A batch of cached samples.

    Args:
        samples: Their views hold moments; `embedding` is that of the prompt.
        collate: Makes the batch of samples whose views hold pixels.
        empty: Embedding of the empty prompt.
    """
    batch = collate(samples)
    batch["moments"] = batch.pop("images")
    batch["embeddings"] = {"": empty} | {sample["prompt"]: sample["embedding"] for sample in samples}
    return batch
