"""What lies where in a tar of preference pairs: an index, made by reading its headers and texts once.

A tar is data from strangers: nothing is unpacked, no name in it is ever used as a path, and whatever its headers say is
checked against the file.
"""

import hashlib
import io
import json
import os
import re
import secrets
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from datamodules.sources import IMAGE_SUFFIXES

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = tarfile.BLOCKSIZE
LONGEST_NAME = 1 << 16  # bytes of an extended header
LONGEST_TEXT = 1 << 20
LARGEST_IMAGE = 1 << 29
DAMAGED = "in a damaged tar"
METADATA = {"model_0": str, "model_1": str, "has_label": bool}  # what the options of the data module ask for
VERSION = 1  # of the index; another one is made anew
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"(\xb5/\xfd": "zstandard", b"PK\3\4": "zip"}
KINDS = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
}  # and what follows their headers is the next header, whatever their size says
REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.XGLTYPE,
)


@dataclass(frozen=True)
class PairMembers:
    """What the members of a sample are called, behind its key and a dot; the defaults are the published shards'.

    Args:
        caption: The prompt, in UTF-8.
        image_0: First image; without a suffix, any of .jpg, .jpeg, .png, .webp, .bmp.
        image_1: Second image.
        label_0: 1 if the first image was preferred, 0 if the second, 0.5 for a tie; as text such as "1" or "1.0". Null
            where the first always is.
        label_1: 1 minus the first label. Null where there is none.
        metadata: JSON object with model_0, model_1 and has_label, for the options that need them; may be absent.
    """

    caption: str = "original_prompt.txt"
    image_0: str = "jpg_0"
    image_1: str = "jpg_1"
    label_0: str | None = "label_0.txt"
    label_1: str | None = "label_1.txt"
    metadata: str = "json"


PUBLISHED_MEMBERS = PairMembers()


class Member(NamedTuple):
    """One file in a tar, by its header."""

    name: str
    offset: int  # of its content
    size: int
    check: int  # CRC-32 of the 512 bytes before the content
    problem: str | None = None


def read_members(file: BinaryIO) -> Iterator[Member]:
    """Every file of a plain tar in order; only headers are read.

    Of a damaged tar, the last one given has no name, or that of the file that is cut off, and says what is wrong.
    """
    end, offset = os.fstat(file.fileno()).st_size, 0
    long_name, long_size = None, None
    while True:
        block = os.pread(file.fileno(), BLOCK, offset)
        if len(block) < BLOCK:
            yield Member("", offset, 0, 0, f"the tar ends at byte {end} without an end mark: it is cut off")
            return
        if not any(block):
            if rest := _nonzero(file, offset):
                yield Member("", rest, 0, 0, f"the tar has further data at byte {rest}, behind its end mark")
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            yield Member("", offset, 0, 0, f"the tar has no valid header at byte {offset} ({error})")
            return
        name, size = long_name or header.name, header.size if long_size is None else long_size
        if header.type in KINDS or header.isdir():
            size = 0
        content, offset = offset + BLOCK, offset + BLOCK + -(-size // BLOCK) * BLOCK
        if size < 0 or offset > end:
            yield Member(
                name, content, 0, 0, f"is cut off: {size} bytes from byte {content} on, but the tar ends at {end}"
            )
            return
        if header.type in EXTENDED:
            if size > LONGEST_NAME:
                yield Member("", content, 0, 0, f"the tar has an extended header of {size} bytes at byte {content}")
                return
            extended = os.pread(file.fileno(), size, content)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = extended.rstrip(b"\0").decode("utf-8", "backslashreplace")
            elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                try:
                    long_name, long_size = _pax(extended, long_name, long_size)
                except ValueError as error:
                    yield Member("", content, 0, 0, f"the tar has a damaged header at byte {content} ({error})")
                    return
            continue
        long_name, long_size = None, None
        if not header.isdir():
            kind = None if header.type in REGULAR else KINDS.get(header.type, "of an unknown kind")
            problem = f"is {kind}, expected a regular file" if kind else None
            yield Member(name, content, size, zlib.crc32(block), problem)


def _pax(records: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """What the records of an extended header say instead of the name and size given."""
    start = 0
    while start < len(records):
        match = re.compile(rb"(\d{1,9}) ([^=]+)=").match(records, start)
        end = start + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(records):
            raise ValueError("a record without length, name or value")
        value = records[match.end() : end - 1].decode("utf-8", "backslashreplace")
        if match[2] == b"path":
            name = value
        elif match[2] == b"size":
            size = int(value)
        start = end
    return name, size


def _nonzero(file: BinaryIO, offset: int) -> int | None:
    """Place of the first byte from `offset` on that is not zero."""
    while chunk := os.pread(file.fileno(), 1 << 20, offset):
        if rest := len(chunk.lstrip(b"\0")):
            return offset + len(chunk) - rest
        offset += len(chunk)
    return None


class BadSampleError(ValueError):
    """Why one sample cannot be used: in a few words, to count by, and in full."""

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write to; the file gets its own name when it is complete."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@dataclass(frozen=True)
class ShardIndex:
    """What lies where in one tar.

    Attributes:
        table: A row for each sample, and one more where the tar is damaged; the columns of `index_schema`.
        size: Bytes of the tar.
        members: What its members are called.
        checksum: BLAKE2b of the whole tar, where it has been computed.
        packed: Of a tar made by `pack`: a hash of what it was made from, and the settings.
    """

    table: "pa.Table"
    size: int
    members: PairMembers
    checksum: str | None = None
    packed: dict[str, Any] | None = None

    def tells_the_same(self, other: "ShardIndex") -> bool:
        return self.size == other.size and self.table.equals(other.table)

    def save(self, path: Path) -> None:
        """Write a parquet file, under another name first."""
        import pyarrow.parquet as pq

        about = {name: getattr(self, name) for name in ("size", "checksum", "packed")}
        about |= {"version": VERSION, "members": asdict(self.members)}
        with replacing(path) as part:
            pq.write_table(self.table.replace_schema_metadata({"limelight": json.dumps(about)}), part)

    @classmethod
    def load(cls, file: Path | io.BytesIO) -> "ShardIndex":
        """Read what `save` wrote.

        Raises:
            ValueError: if the file is something else, damaged, or names places outside the tar.
        """
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(file)
            about = json.loads((table.schema.metadata or {}).get(b"limelight", b"{}"))
            if about.get("version") != VERSION or table.schema != index_schema():
                raise ValueError("it is no index, or one of another version")
            index = cls(
                table.replace_schema_metadata(None),
                int(about["size"]),
                PairMembers(**about["members"]),
                about["checksum"],
                about["packed"],
            )
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"not a readable index ({error})") from error
        for name in ("image_0", "image_1", "metadata"):
            offset, size = (pc.struct_field(table[name], part) for part in ("offset", "size"))
            low, high = pc.min(offset).as_py(), pc.max(pc.add(offset, size)).as_py()
            if low is not None and (low < BLOCK or pc.min(size).as_py() < 0 or high > index.size):
                raise ValueError(f"not a usable index: it places {name} outside the {index.size} bytes of the tar")
        return index


@cache
def index_schema() -> "pa.Schema":
    import pyarrow as pa

    place = pa.struct({"offset": pa.int64(), "size": pa.int64(), "check": pa.int64()})
    text = {name: pa.string() for name in ("key", "caption", "model_0", "model_1", "reason", "problem")}
    places = {name: place for name in ("image_0", "image_1", "metadata")}
    return pa.schema({**text, **places, "label_0": pa.float64(), "has_label": pa.bool_()})


def index_tar(path: Path, members: PairMembers, name: str, checksum: bool = False) -> ShardIndex:
    """Read the headers and texts of a tar.

    Args:
        path: The tar.
        members: What its members are called.
        name: What errors call the tar.
        checksum: Also read all the rest, for the checksum.

    Raises:
        ValueError: if it is compressed. What is damaged or missing inside becomes a row with a problem.
    """
    import pyarrow as pa

    with path.open("rb") as file:
        start = file.read(8)
        if kind := next((kind for magic, kind in COMPRESSED.items() if start.startswith(magic)), None):
            raise ValueError(
                f"{name}: is compressed ({kind}). Samples are read from the middle of a shard, which needs a plain "
                "tar: unpack the outer layer (images are compressed already, it saves nothing)."
            )
        rows = _read_samples(file, members)
        file.seek(0)
        digest = hashlib.file_digest(file, hashlib.blake2b).hexdigest() if checksum else None
        size = os.fstat(file.fileno()).st_size
    return ShardIndex(pa.Table.from_pylist(rows, index_schema()), size, members, digest)


def _read_samples(file: BinaryIO, members: PairMembers) -> list[dict[str, Any]]:
    samples: dict[str, dict[str, Member]] = {}
    problems: dict[str, BadSampleError] = {}
    for member in read_members(file):
        # As webdataset does: the key ends at the first dot behind the folders; files without either are no samples.
        match = re.fullmatch(r"((?:.*/)?[^./]+)\.([^/]*)", member.name, re.DOTALL)
        key = match[1] if match else member.name or f"(byte {member.offset})"
        suffix = match[2].lower() if match else ""
        if not member.name:
            problems[key] = BadSampleError(DAMAGED, member.problem)
        elif member.problem:
            what = repr(suffix[:80]) if match else "this file"
            problems.setdefault(key, BadSampleError("with a member that is no whole file", f"{what} {member.problem}"))
        elif match and suffix in samples.setdefault(key, {}):
            problems.setdefault(key, BadSampleError("with a member twice", f"{suffix[:80]!r} is there twice"))
        elif match:
            samples[key][suffix] = member

    rows = []
    for key in dict.fromkeys([*samples, *problems]):
        row = {**dict.fromkeys(index_schema().names), "key": key}
        try:
            if key in problems:
                raise problems[key]
            _fill(row, Sample(file, samples[key]), members)
        except BadSampleError as error:
            row |= {"reason": error.reason, "problem": str(error)}
        rows.append(row)
    return rows


def _fill(row: dict[str, Any], sample: "Sample", members: PairMembers) -> None:
    """Complete a row of the index. The metadata come first: without a vote, the rest may be missing."""
    if members.metadata in sample.members:
        metadata = sample.metadata(members.metadata)
        row |= {name: metadata.get(name) for name in METADATA}
        row["metadata"] = sample.place(members.metadata)
    row["caption"] = sample.text(members.caption)
    row["image_0"] = sample.image(members.image_0)
    row["image_1"] = sample.image(members.image_1)
    if members.label_0 is not None:
        row["label_0"] = sample.label(members.label_0)
    if members.label_0 is not None and members.label_1 is not None:
        label_1 = sample.label(members.label_1)
        if row["label_0"] + label_1 != 1.0:
            raise BadSampleError(
                "with an impossible label",
                f"{members.label_0!r} says {row['label_0']} and {members.label_1!r} {label_1}; expected 1 together",
            )


@dataclass(frozen=True)
class Sample:
    """The members of one sample, by suffix."""

    file: BinaryIO
    members: dict[str, Member]

    def place(self, name: str, suffixes: tuple[str, ...] = ("",)) -> dict[str, int]:
        found = [name.lower() + suffix for suffix in suffixes if name.lower() + suffix in self.members]
        if not found:
            there = ", ".join(repr(suffix[:80]) for suffix in list(self.members)[:10])
            raise BadSampleError(
                "without a member",
                f"there is no {name!r} but {there}; `data.init_args.members` says what members are called",
            )
        if len(found) > 1:
            raise BadSampleError("with a member twice", f"there are both {found[0]!r} and {found[1]!r}")
        member = self.members[found[0]]
        return {"offset": member.offset, "size": member.size, "check": member.check}

    def text(self, name: str) -> str:
        place = self.place(name)
        _refuse_absurd(name, place, LONGEST_TEXT)
        try:
            return os.pread(self.file.fileno(), place["size"], place["offset"]).decode()
        except UnicodeDecodeError as error:
            raise BadSampleError("with text that is not UTF-8", f"{name!r} is not UTF-8 ({error})") from error

    def label(self, name: str) -> float:
        text = self.text(name)
        with suppress(ValueError):
            if (value := float(text)) in (0.0, 0.5, 1.0):
                return value
        raise BadSampleError(
            "with an impossible label",
            f"{name!r} says {text[:40]!r}, expected 1 (first image preferred), 0 (second) or 0.5 (tie). Where samples "
            "without a vote have has_label false in their JSON, `require_label: true` leaves those out",
        )

    def image(self, name: str) -> dict[str, int]:
        place = self.place(name, ("", *IMAGE_SUFFIXES))
        _refuse_absurd(name, place, LARGEST_IMAGE)
        if place["size"] == 0:
            raise BadSampleError("with an empty image", f"{name!r} has no bytes")
        return place

    def metadata(self, name: str) -> dict[str, Any]:
        text = self.text(name)
        try:
            metadata = json.loads(text)
            if not isinstance(metadata, dict):
                raise ValueError("expected an object")
            for key, kind in METADATA.items():
                if not isinstance(value := metadata.get(key), kind | None):
                    raise ValueError(f"{key!r} is {str(value)[:40]!r}")
                str(value).encode()  # half a surrogate pair
        except (ValueError, RecursionError) as error:
            raise BadSampleError("with unreadable metadata", f"{name!r} is not usable JSON: {error}") from error
        return metadata


def _refuse_absurd(name: str, place: dict[str, int], limit: int) -> None:
    if place["size"] > limit:
        raise BadSampleError(
            "with a member of absurd size", f"{name!r} has {place['size']} bytes, expected {limit} at most"
        )
