"""What may be wrong with tars of pairs, and the first words of the answer."""

import bz2
import gzip
import io
import lzma
import shutil
import struct
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datamodules.pickapic_shards import PickAPicShardsDataModule
from datamodules.shard_packing import index, pack
from datamodules.tar_index import PairMembers, index_tar
from tests.datamodules.files import encoded, write_parquet
from tests.datamodules.tars import sample, samples, write_tar
from tests.datamodules.web import serving


def open_shards(source: Any, cache: Path, **settings: Any) -> PickAPicShardsDataModule:
    settings = {"resolution": 16, "ties": "keep", "cache_dir": str(cache / "cache"), **settings}
    data = PickAPicShardsDataModule(source if isinstance(source, list) else str(source), **settings)
    data.setup("fit")
    return data


def place_of(tar: Path, name: str) -> int:
    """Byte of a member's header."""
    with tarfile.open(tar) as file:
        return file.getmember(name).offset


# ------------------------------------------------------------------------------------------------- damage to the tar


def cut_in_an_image(tar: Path) -> None:
    with tar.open("r+b") as file:
        file.truncate(place_of(tar, "2.jpg_1.jpg") + 600)


def cut_in_a_header(tar: Path) -> None:
    with tar.open("r+b") as file:
        file.truncate(place_of(tar, "2.jpg_1.jpg") + 100)


def cut_between_samples(tar: Path) -> None:
    with tar.open("r+b") as file:
        file.truncate(place_of(tar, "2.jpg_0.jpg"))


def overwrite_a_header(tar: Path) -> None:
    place = place_of(tar, "2.jpg_0.jpg")
    with tar.open("r+b") as file:
        file.seek(place)
        file.write(b"\xff" * 100)


def append_another(tar: Path) -> None:
    tar.write_bytes(tar.read_bytes() * 2)


def header(name: str, kind: bytes = tarfile.REGTYPE, size: bytes = b"00000000012\0") -> bytes:
    """512 bytes that may say anything, with a valid checksum."""
    block = struct.pack(
        "100s8s8s8s12s12s8sc100s8s247s",
        name.encode(),
        *[b"0000000\0"] * 3,
        size,
        b"0" * 11,
        b" " * 8,
        kind,
        b"",
        b"ustar\0" + b"00",
        b"",
    )
    return block[:148] + f"{sum(block):06o}\0 ".encode() + block[156:]


def add(*blocks: bytes) -> Callable[[Path], None]:
    """Put blocks behind the two whole samples."""

    def change(tar: Path) -> None:
        place = place_of(tar, "2.jpg_0.jpg")
        tar.write_bytes(tar.read_bytes()[:place] + b"".join(blocks) + bytes(1024))

    return change


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


HUGE = b"\x80" + (1 << 62).to_bytes(11, "big")
NEGATIVE = b"\xff" + ((1 << 88) - 512).to_bytes(11, "big")
DAMAGE = {
    "cut in an image": (
        cut_in_an_image,
        r"key '2': 'jpg_1\.jpg' is cut off: \d+ bytes from byte \d+ on, but the tar ends at \d+",
    ),
    "cut in a header": (
        cut_in_a_header,
        r"key '\(byte \d+\)': the tar ends at byte \d+ without an end mark: it is cut off",
    ),
    "cut between samples": (cut_between_samples, r"key '\(byte \d+\)': the tar ends at byte \d+ without an end mark"),
    "a header overwritten": (
        overwrite_a_header,
        r"key '\(byte \d+\)': the tar has no valid header at byte \d+ \(bad checksum\)",
    ),
    "two tars in one": (
        append_another,
        r"key '\(byte \d+\)': the tar has further data at byte \d+, behind its end mark",
    ),
    "a symbolic link": (
        add(header("2.jpg_0.jpg", tarfile.SYMTYPE)),
        r"key '2': 'jpg_0\.jpg' is a symbolic link, expected a regular file",
    ),
    "a hard link": (add(header("2.jpg_0.jpg", tarfile.LNKTYPE)), r"key '2': 'jpg_0\.jpg' is a hard link"),
    "a device": (add(header("2.jpg_0.jpg", tarfile.CHRTYPE)), r"key '2': 'jpg_0\.jpg' is a device"),
    "a pipe": (add(header("2.jpg_0.jpg", tarfile.FIFOTYPE)), r"key '2': 'jpg_0\.jpg' is a named pipe"),
    "a sparse file": (
        add(header("2.jpg_0.jpg", tarfile.GNUTYPE_SPARSE), bytes(512)),
        r"key '2': 'jpg_0\.jpg' is of an unknown kind",
    ),
    "a link that is no member": (add(header("latest", tarfile.SYMTYPE)), r"key 'latest': this file is a symbolic link"),
    "a size beyond everything": (
        add(header("2.jpg_0.jpg", size=HUGE)),
        r"key '2': 'jpg_0\.jpg' is cut off: 4611686018427387904 bytes from",
    ),
    "a negative size": (
        add(header("2.jpg_0.jpg", size=NEGATIVE)),
        r"key '2': 'jpg_0\.jpg' is cut off: -512 bytes from byte",
    ),
    "a size that is no number": (
        add(header("2.jpg_0.jpg", size=b"12 potatoes\0")),
        r"key '\(byte \d+\)': the tar has no valid header at byte \d+ \(invalid header\)",
    ),
    "a long name that is too long": (
        add(header("x", tarfile.GNUTYPE_LONGNAME, b"00000777777\0"), bytes(262144)),
        r"key '\(byte \d+\)': the tar has an extended header of 262143 bytes at byte",
    ),
    "a pax header without end": (
        add(header("x", tarfile.XHDTYPE), padded(b"999999 path=a")),
        r"key '\(byte \d+\)': the tar has a damaged header at byte \d+ \(a record without length, name or value\)",
    ),
    "a pax header of no length": (
        add(header("x", tarfile.XHDTYPE), padded(b"0 path=a\n")),
        r"key '\(byte \d+\)': the tar has a damaged header",
    ),
    "a pax size that is no number": (
        add(header("x", tarfile.XHDTYPE), padded(b"10 size=a\n")),
        r"key '\(byte \d+\)': the tar has a damaged header",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_tars_are_named_or_dropped_and_counted(case, tmp_path, caplog):
    change, message = DAMAGE[case]
    tar = write_tar(tmp_path / "a.tar", samples(3))
    change(tar)
    with pytest.raises(
        ValueError, match=rf"a\.tar', {message}.*of \d rows are like this; `on_bad_row: drop` leaves them out"
    ):
        open_shards(tar, tmp_path)
    caplog.set_level("INFO")
    data = open_shards(tar, tmp_path, on_bad_row="drop")
    assert [data.train_samples()[i, 0]["id"] for i in range(2)] == ["a.tar:0", "a.tar:1"]
    assert "left out: 1" in caplog.text


@pytest.mark.parametrize("pack_with", [gzip.compress, bz2.compress, lzma.compress])
def test_compressed_tars(pack_with, tmp_path):
    tar = write_tar(tmp_path / "a.tar", samples(2))
    (tmp_path / "a.tar.gz").write_bytes(pack_with(tar.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.tar\.gz': is compressed \((gzip|bzip2|xz)\)\. .* needs a plain tar"):
        open_shards(tmp_path / "a.tar.gz", tmp_path, on_bad_row="drop")


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>Please log in</html>" * 50, bytes(range(256)) * 9])
def test_files_that_are_no_tars(content, tmp_path):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"a\.tar', key '\(byte 0\)': the tar (ends at byte 0|has no valid header at byte 0)"
    ):
        open_shards(tmp_path / "a.tar", tmp_path)
    with pytest.raises(ValueError, match=r"a\.tar, split 'train': nothing is left of 1 rows: 1 in a damaged tar"):
        open_shards(tmp_path / "a.tar", tmp_path, on_bad_row="drop")


def test_tars_without_samples(tmp_path):
    with pytest.raises(ValueError, match=r"a\.tar: there are no samples in these shards"):
        open_shards(write_tar(tmp_path / "a.tar", {"README": b"see b.tar"}), tmp_path)


def test_a_hostile_name_is_never_a_path(tmp_path):
    members = {}
    for key in ("/etc/passwd", "../../outside", "a\\\\b", "\n\x1b[2Jx"):
        members |= sample(key, 0)
    data = open_shards(write_tar(tmp_path / "a.tar", members), tmp_path)
    assert len(data.train_samples()) == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "cache"]
    with pytest.raises(ValueError, match=r"key '\\n\\x1b\[2Jx'"):
        open_shards(write_tar(tmp_path / "b.tar", sample("\n\x1b[2Jx", label_0__txt=b"3")), tmp_path)


# -------------------------------------------------------------------------------------------------- what samples lack

SAMPLES = {
    "no caption": (
        {"original_prompt__txt": None},
        "without a member",
        r"there is no 'original_prompt\.txt' but 'jpg_0\.jpg', .*`data\.init_args\.members` says",
    ),
    "no first image": ({"jpg_0__jpg": None}, "without a member", r"there is no 'jpg_0' but 'jpg_1\.jpg'"),
    "no second image": ({"jpg_1__jpg": None}, "without a member", r"there is no 'jpg_1' but"),
    "no label": ({"label_0__txt": None}, "without a member", r"there is no 'label_0\.txt' but"),
    "no second label": ({"label_1__txt": None}, "without a member", r"there is no 'label_1\.txt' but"),
    "one image in two formats": (
        {"jpg_0__png": encoded(0, "PNG")},
        "with a member twice",
        r"there are both 'jpg_0\.jpg' and 'jpg_0\.png'",
    ),
    "an empty image": ({"jpg_1__jpg": b""}, "with an empty image", r"'jpg_1' has no bytes"),
    "a caption in latin-1": (
        {"original_prompt__txt": "größer".encode("latin-1")},
        "with text that is not UTF-8",
        r"'original_prompt\.txt' is not UTF-8 \(",
    ),
    "a label in UTF-16": (
        {"label_0__txt": "1".encode("utf-16")},
        "with text that is not UTF-8",
        r"'label_0\.txt' is not UTF-8",
    ),
    "an empty caption": ({"original_prompt__txt": b" \n"}, "without a caption", r"'caption' is ' \\n', expected text"),
    "a caption of megabytes": (
        {"original_prompt__txt": b"x" * 2**21},
        "with a member of absurd size",
        r"'original_prompt\.txt' has 2097152 bytes, expected 1048576 at most",
    ),
    "a label that is a word": (
        {"label_0__txt": b"yes"},
        "with an impossible label",
        r"'label_0\.txt' says 'yes', expected 1 \(first image preferred\), 0 .* 0\.5 \(tie\)",
    ),
    "a label of 2": ({"label_0__txt": b"2"}, "with an impossible label", r"'label_0\.txt' says '2', expected 1"),
    "a label that is no number": (
        {"label_1__txt": b"nan"},
        "with an impossible label",
        r"'label_1\.txt' says 'nan', expected 1",
    ),
    "an empty label": ({"label_0__txt": b""}, "with an impossible label", r"'label_0\.txt' says '', expected 1"),
    "labels that both win": (
        {"label_0__txt": b"1.0", "label_1__txt": b"1"},
        "with an impossible label",
        r"'label_0\.txt' says 1\.0 and 'label_1\.txt' 1\.0; expected 1 together",
    ),
    "broken JSON": ({"json": b"{"}, "with unreadable metadata", r"'json' is not usable JSON: Expecting property name"),
    "JSON that is no object": (
        {"json": b"[1]"},
        "with unreadable metadata",
        r"'json' is not usable JSON: expected an object",
    ),
    "deep JSON": ({"json": b"[" * 100_000}, "with unreadable metadata", r"'json' is not usable JSON: "),
    "a model that is a number": (
        {"json": b'{"model_0": 5}'},
        "with unreadable metadata",
        r"'json' is not usable JSON: 'model_0' is '5'",
    ),
    "half a surrogate pair": (
        {"json": b'{"model_0": "\\ud800"}'},
        "with unreadable metadata",
        r"'json' is not usable JSON: .*surrogates not allowed",
    ),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_bad_samples_are_named_or_dropped_and_counted(case, tmp_path, caplog):
    changes, reason, message = SAMPLES[case]
    tar = write_tar(tmp_path / "a.tar", {**samples(2), **sample("2", 2, **changes)})
    with pytest.raises(
        ValueError, match=rf"a\.tar', key '2': {message}.* 1 of 3 rows are like this; `on_bad_row: drop`"
    ):
        open_shards(tar, tmp_path)
    caplog.set_level("INFO")
    assert len(open_shards(tar, tmp_path, on_bad_row="drop").train_samples()) == 2
    assert f"2 of 3 rows; left out: 1 {reason}" in caplog.text


def test_a_key_that_is_there_twice(tmp_path):
    with tarfile.open(write_tar(tmp_path / "a.tar", samples(1)), "a") as file:
        for name, content in samples(1).items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"a\.tar', key '0': 'jpg_0\.jpg' is there twice"):
        open_shards(tmp_path / "a.tar", tmp_path)


def test_images_that_do_not_decode_are_named(tmp_path):
    samples = open_shards(write_tar(tmp_path / "a.tar", sample("0", jpg_1__jpg=b"no image")), tmp_path).train_samples()
    with pytest.raises(
        ValueError, match=r"a\.tar', key '0' \(prompt 'caption 0'\): 'image_1' is not an image of a known format"
    ):
        samples[0, 0]


# ------------------------------------------------------------------------------------------------ sources and settings


def test_sources_that_are_not_there(tmp_path):
    write_tar(tmp_path / "a.tar", samples(1))
    for source, kind, message in (
        (tmp_path, ValueError, r"is a folder, expected tars: give '.*\*\.tar'"),
        (tmp_path / "b.tar", FileNotFoundError, r"b\.tar': nothing found"),
        (tmp_path / "*.tgz", FileNotFoundError, r"\*\.tgz': nothing found"),
        (f"{tmp_path}/{{a,b}}.tar", FileNotFoundError, r"b\.tar': nothing found"),
        ("", ValueError, "empty entry"),
        ([], ValueError, "The list of shards is empty"),
        ([f"{tmp_path}/a.tar", f"{tmp_path}/*.tar"], ValueError, "is named twice"),
        (
            f"pipe:cat {tmp_path}/a.tar",
            ValueError,
            r"commands are run only if `data\.init_args\.allow_shell_pipes` is true",
        ),
        ("nothing://bucket/a.tar", ValueError, r"'nothing://bucket/a\.tar': .*Protocol not known: nothing"),
    ):
        with pytest.raises(kind, match=message):
            open_shards(source, tmp_path)


def test_the_package_of_a_protocol_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"'s3://bucket/00000\.tar': Install s3fs"):
        open_shards("s3://bucket/{00000..00002}.tar", tmp_path)


def test_commands_that_fail(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.shard_cache.PAUSES", (0.0, 0.0))
    for command, message in (
        ("cat /no/such/file", r"exit code 1, 0 bytes: cat: /no/such/file"),
        ("true", r"exit code 0, 0 bytes"),
        ("echo 'no tar'", r"key '\(byte 0\)': the tar ends at byte 7 without an end mark"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            open_shards(f"pipe:{command}", tmp_path, allow_shell_pipes=True)


def test_servers_that_fail(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.shard_cache.PAUSES", (0.0, 0.0))
    (tmp_path / "served").mkdir()
    write_tar(tmp_path / "served/a.tar", samples(1))
    with serving(tmp_path / "served") as web:
        with pytest.raises(FileNotFoundError, match=r"/b\.tar': there is no such file"):
            open_shards(f"{web.url}/b.tar", tmp_path)
        web.faults["a.tar"] = ["500"]
        with pytest.raises(OSError, match=r"/a\.tar': 3 attempts failed, the last with: .*500"):
            open_shards(f"{web.url}/a.tar", tmp_path)
        web.faults["a.tar"] = ["page"]
        with pytest.raises(ValueError, match=r"/a\.tar', key '\(byte 0\)': the tar"):
            open_shards(f"{web.url}/a.tar", tmp_path)


def test_a_cache_that_cannot_hold_what_is_mixed(tmp_path):
    (tmp_path / "served").mkdir()
    for i in range(5):
        write_tar(tmp_path / f"served/{i}.tar", samples(1))
    with serving(tmp_path / "served") as web:
        source = f"{web.url}/{{0..4}}.tar"
        assert len(open_shards(source, tmp_path, shuffle_shards=2, cache_gb=45e-6).train_samples()) == 5
        with pytest.raises(
            ValueError, match=r"shuffle_shards is 3, for which up to 5\.12e-05 GB .* but cache_gb is 4\.5e-05"
        ):
            open_shards(source, tmp_path, shuffle_shards=3, cache_gb=45e-6)


def test_filters_without_the_metadata_they_need(tmp_path):
    tar = write_tar(tmp_path / "a.tar", sample("0", json=b'{"model_0": "a dream"}'))
    with pytest.raises(
        ValueError, match=r"a\.tar: no sample has 'has_label' in its 'json' member, which `require_label: true` needs"
    ):
        open_shards(tar, tmp_path, require_label=True)
    with pytest.raises(
        ValueError, match=r"no sample has 'model_1' in its 'json' member, which `dreamlike_pairs_only: true`"
    ):
        open_shards(tar, tmp_path, dreamlike_pairs_only=True)


@pytest.mark.parametrize("setting", [{"shuffle_shards": 0}, {"cache_gb": 0.0}, {"resolution": 20}])
def test_settings_out_of_range(setting, tmp_path):
    name, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=f"{name} is {value}; expected"):
        open_shards(write_tar(tmp_path / "a.tar", samples(1)), tmp_path, **setting)


# ----------------------------------------------------------------------------------------- an index that does not fit


def packed(folder: Path) -> Path:
    pack(str(write_parquet(folder / "train.parquet", 4)), folder / "tars", num_workers=1)
    return folder / "tars/train-00000.tar"


def other_labels(tar: Path) -> None:
    members = {}
    with tarfile.open(tar) as file:
        for member in file:
            content = file.extractfile(member).read()
            turned = {b"1.0": b"0.0", b"0.0": b"1.0"}
            members[member.name] = turned.get(content, content)
    write_tar(tar, members)


def longer(tar: Path) -> None:
    write_tar(tar, samples(40))


def garbage(tar: Path) -> None:
    Path(f"{tar}.index").write_bytes(b"garbage")


def of_another_tar(tar: Path) -> None:
    other = write_tar(tar.parent / "other.tar", {f"other{name}": content for name, content in samples(4).items()})
    other.write_bytes(other.read_bytes().ljust(tar.stat().st_size, b"\0")[: tar.stat().st_size])
    index(str(other), num_workers=1)
    shutil.move(f"{other}.index", f"{tar}.index")


def of_other_members(tar: Path) -> None:
    index(str(tar), PairMembers(label_1=None), num_workers=1)


def leading_out(tar: Path) -> None:
    found = index_tar(tar, PairMembers(), "x")
    found.__class__(found.table, 1000, found.members).save(Path(f"{tar}.index"))


@pytest.mark.parametrize("where", ["here", "far"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            longer,
            r"was made for \d+ bytes, the shard has \d+\. Make it again, with `python -m datamodules\.pickapic_shards",
        ),
        (garbage, r"is not a readable index \("),
        (of_other_members, r"was made for members called original_prompt\.txt, jpg_0, jpg_1, label_0\.txt, None, json"),
        (leading_out, r"is not a usable index: it places image_\d outside the 1000 bytes of the tar"),
        (other_labels, "says that there are other samples"),
        (of_another_tar, "says that there are other samples"),
    ],
)
def test_an_index_beside_the_shard_that_does_not_fit(change, message, where, tmp_path):
    tar = packed(tmp_path)
    change(tar)
    with serving(tar.parent) as web:
        source = tar if where == "here" else f"{web.url}/{tar.name}"
        if where == "far" and change in (other_labels, of_another_tar):  # it shows when the shard arrives
            samples = open_shards(source, tmp_path).train_samples()
            with pytest.raises(
                ValueError, match=r"train-00000\.tar': has other samples than its index says; it, or the"
            ):
                samples[0, 0]
            Path(f"{tar}.index").unlink()
            open_shards(source, tmp_path).train_samples()[0, 0]
            return
        with pytest.raises(ValueError, match=rf"train-00000\.tar': the index beside it, .*tar\.index', {message}"):
            open_shards(source, tmp_path)


def test_a_shard_that_changes_during_the_run(tmp_path):
    tar = write_tar(tmp_path / "a.tar", samples(2))
    data = open_shards(tar, tmp_path)
    write_tar(tar, samples(30))
    with pytest.raises(
        ValueError,
        match=r"'image_\d' lies in .*a\.tar, which has \d+ bytes instead of \d+\. The shard has been changed",
    ):
        data.train_samples()[0, 0]
