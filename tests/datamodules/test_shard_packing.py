"""Packing, unpacking, verifying: nothing is lost, and what goes wrong is told."""

import datetime
import hashlib
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules import pickapic_shards, shard_packing
from datamodules.pickapic import PairColumns
from datamodules.pickapic_shards import PickAPicShardsDataModule
from datamodules.shard_packing import index, pack, unpack, verify
from tests.datamodules.files import encoded, write_jsonl_pairs, write_pair_folder, write_parquet
from tests.datamodules.tars import samples, write_tar

ROOT = Path(__file__).parents[2]


def packed(folder: Path, num_rows: int = 7, samples_per_shard: int = 3, **settings: Any) -> Path:
    source = write_parquet(folder / "source/train.parquet", num_rows)
    pack(str(source), folder / "tars", samples_per_shard=samples_per_shard, num_workers=2, **settings)
    return folder / "tars"


def content(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.tar*"))}


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as file:
        return {member.name: file.extractfile(member).read() for member in file}


def opened(source: Any, folder: Path, **settings: Any) -> PickAPicShardsDataModule:
    data = PickAPicShardsDataModule(
        str(source), resolution=16, ties="keep", cache_dir=str(folder / "cache"), **settings
    )
    data.setup("fit")
    return data


# --------------------------------------------------------------------------------------------------- there and back


def test_the_members_of_a_packed_sample(tmp_path):
    image = encoded(1, "WEBP")
    source = write_parquet(
        tmp_path / "validation.parquet", 2, jpg_1=[image, image], user_id=[5, None], has_label=[True, True]
    )
    pack(str(source), tmp_path, split="validation", num_workers=1)
    about = '"has_label": true, "packed_from": "validation.parquet'
    assert members(tmp_path / "validation-00000.tar") == {
        "validation-00000-0000000.jpg_0.jpg": encoded(0),
        "validation-00000-0000000.jpg_1.webp": image,
        "validation-00000-0000000.json": f'{{"unused": 0, "user_id": 5, {about}:0"}}'.encode(),
        "validation-00000-0000000.label_0.txt": b"0.0",
        "validation-00000-0000000.label_1.txt": b"1.0",
        "validation-00000-0000000.original_prompt.txt": b"caption 0",
        "validation-00000-0000001.jpg_0.jpg": encoded(2),
        "validation-00000-0000001.jpg_1.webp": image,
        "validation-00000-0000001.json": f'{{"unused": 1, "user_id": null, {about}:1"}}'.encode(),
        "validation-00000-0000001.label_0.txt": b"0.5",
        "validation-00000-0000001.label_1.txt": b"0.5",
        "validation-00000-0000001.original_prompt.txt": b"caption 1",
    }


def test_the_round_trip_is_bit_for_bit(tmp_path):
    table = {
        "caption": ["a", "zwei Füße", "c\n", "d", "e"],
        "jpg_0": [encoded(i) for i in range(5)],
        "jpg_1": [encoded(i, "PNG") for i in range(5)],
        "label_0": [0.0, 0.5, 1.0, 1.0, 0.0],
        "label_1": [1.0, 0.5, 0.0, 0.0, 1.0],
        "ranking_id": [1, 2**60, 3, None, 5],
        "model_0": ["x", None, "z", "x", "y"],
        "has_label": [True, False, True, True, True],
        "score": [0.1, 1e-300, 3.0, -2.5, 7.25],
    }
    (tmp_path / "source").mkdir()
    pq.write_table(pa.table(table).slice(0, 3), tmp_path / "source/train-00000-of-00002.parquet")
    pq.write_table(pa.table(table).slice(3), tmp_path / "source/train-00001-of-00002.parquet")
    pack(str(tmp_path / "source"), tmp_path / "tars", samples_per_shard=2, num_workers=2)
    verify(f"{tmp_path}/tars/*.tar", str(tmp_path / "source"), num_workers=2)
    unpack(f"{tmp_path}/tars/*.tar", tmp_path / "unpacked", num_workers=2)
    files = sorted((tmp_path / "unpacked").glob("*.parquet"))
    assert [file.name for file in files] == [f"train-0000{i}.parquet" for i in range(3)]
    assert pa.concat_tables(map(pq.read_table, files)).to_pydict() == table


@pytest.mark.parametrize("kind", ["folder", "jsonl"])
def test_folders_and_jsonl_are_packed(kind, tmp_path):
    source = write_pair_folder(tmp_path / "pairs") if kind == "folder" else write_jsonl_pairs(tmp_path / "pairs", 4)
    pack(str(source), tmp_path / "tars", samples_per_shard=1, num_workers=1)
    verify(f"{tmp_path}/tars/*.tar", str(source), num_workers=1)
    unpack(f"{tmp_path}/tars/*.tar", tmp_path / "unpacked", num_workers=1)
    first = pq.read_table(tmp_path / "unpacked/train-00001.parquet").to_pylist()[0]
    names = ("dog_w.png", "dog_l.png") if kind == "folder" else ("images/1_0.png", "images/1_1.png")
    assert [first["jpg_0"], first["jpg_1"]] == [(tmp_path / "pairs" / name).read_bytes() for name in names]
    assert first["caption"] == ("a dog" if kind == "folder" else "caption 1")
    assert first["label_0"] == 1.0


def test_times_are_kept_as_text_and_other_columns_left_out_when_asked(tmp_path):
    times = [datetime.datetime(2023, 3, 8, 12, i) for i in range(2)]
    source = write_parquet(tmp_path / "train.parquet", 2, created_at=times, thumbnail=[b"a", b"b"])
    pack(str(source), tmp_path, keep=["created_at"], num_workers=1)
    assert members(tmp_path / "train-00000.tar")["train-00000-0000001.json"] == (
        b'{"created_at": "2023-03-08T12:01:00", "packed_from": "train.parquet:1"}'
    )


def test_mapped_columns_get_the_names_that_shards_have(tmp_path):
    table = {"prompt": ["a"], "chosen": [encoded(0)], "rejected": [encoded(1)], "votes": [True], "maker": ["a dream"]}
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    columns = PairColumns("prompt", "chosen", "rejected", None, model_0="maker", has_label="votes")
    pack(str(tmp_path / "train.parquet"), tmp_path, columns=columns, num_workers=1)
    data = opened(tmp_path / "train-00000.tar", tmp_path, require_label=True)
    assert data.train_samples()[0, 0]["prompt"] == "a"
    verify(str(tmp_path / "train-00000.tar"), str(tmp_path / "train.parquet"), num_workers=1)


def test_bad_rows_stop_packing_or_are_counted(tmp_path, capsys):
    columns = {
        "label_0": [1.0, 7.0, 0.0, None],
        "caption": ["a", "b", " ", "d"],
        "has_label": [True, True, True, False],
    }
    source = str(write_parquet(tmp_path / "train.parquet", 4, **columns))
    with pytest.raises(ValueError, match=r"train\.parquet, row 1: 'label_0' is 7\.0"):
        pack(source, tmp_path / "tars", require_label=True, num_workers=1)
    pack(source, tmp_path / "tars", require_label=True, on_bad_row="drop", num_workers=1)
    expected = "1 of 4 rows; left out: 1 without a vote, 1 with an impossible label, 1 without a caption"
    assert expected in capsys.readouterr().out
    verify(f"{tmp_path}/tars/*.tar", source, num_workers=1)  # with the same settings, which are beside the tar


def test_images_of_unknown_kind_stop_packing_unless_they_are_looked_for(tmp_path):
    source = str(write_parquet(tmp_path / "train.parquet", 3, jpg_0=[encoded(0), b"what", encoded(2)]))
    with pytest.raises(ValueError, match=r"row 1: 'jpg_0' is not an image of a known format\. `--verify_images true`"):
        pack(source, tmp_path / "tars", num_workers=1)
    pack(source, tmp_path / "tars", verify_images=True, on_bad_row="drop", num_workers=1)
    assert len(opened(tmp_path / "tars/*.tar", tmp_path).train_samples()) == 2


# ------------------------------------------------------------------------------------------- again, and again elsewhere


def test_packing_is_deterministic_and_again_changes_nothing(tmp_path, capsys):
    first = content(packed(tmp_path / "a"))
    assert content(packed(tmp_path / "b")).keys() == first.keys()
    tars = {name: digest for name, digest in content(tmp_path / "b/tars").items() if name.endswith(".tar")}
    assert tars.items() <= first.items()
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "a/tars").glob("*.tar")}
    (tmp_path / "a/tars/train-00001.tar").unlink()
    times.pop(tmp_path / "a/tars/train-00001.tar")
    pack(str(tmp_path / "a/source/train.parquet"), tmp_path / "a/tars", samples_per_shard=3, num_workers=1)
    assert content(tmp_path / "a/tars") == first
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    assert "3 shards, 2 of them there already" in capsys.readouterr().out


COMMAND = [sys.executable, "-m", "datamodules.pickapic_shards"]


def test_a_killed_command_is_given_again(tmp_path):
    source, tars = write_parquet(tmp_path / "train.parquet", 100), tmp_path / "tars"
    command = [*COMMAND, "pack", str(source), str(tars), "--samples_per_shard", "1", "--num_workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while len(list(tars.glob("*.tar"))) < 5 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    deadline = time.time() + 60  # the killed command's processes end too
    while time.time() < deadline and _processes_of(tars):
        time.sleep(0.05)
    assert not _processes_of(tars)
    done = content(tars)
    assert 5 <= sum(name.endswith(".tar") for name in done) < 100
    pack(str(source), tars, samples_per_shard=1, num_workers=2)
    pack(str(source), tmp_path / "whole", samples_per_shard=1, num_workers=2)
    assert {name: digest for name, digest in content(tars).items() if name.endswith(".tar")} == {
        name: digest for name, digest in content(tmp_path / "whole").items() if name.endswith(".tar")
    }
    assert not list(tars.glob("*.part"))


def _processes_of(folder: Path) -> list[str]:
    commands = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            commands.append(file.read_text())
        except OSError:
            continue
    return [command for command in commands if str(folder) in command]


def test_two_splits_go_into_one_folder_but_not_into_one_name(tmp_path):
    for split in ("train", "validation"):
        write_parquet(
            tmp_path / f"source/{split}-00000-of-00001.parquet", 4, caption=[f"{split} {i}" for i in range(4)]
        )
        pack(str(tmp_path / "source"), tmp_path / "tars", split=split, samples_per_shard=2, num_workers=1)
    names = [file.name for file in sorted((tmp_path / "tars").glob("*.tar"))]
    assert names == [f"{split}-0000{i}.tar" for split in ("train", "validation") for i in (0, 1)]
    before = content(tmp_path / "tars")
    with pytest.raises(ValueError, match=r"train-00000\.tar: there is such a shard already, made from other data"):
        pack(str(tmp_path / "source"), tmp_path / "tars", split="validation", name="train", samples_per_shard=2)
    assert content(tmp_path / "tars") == before
    settings = {"samples_per_shard": 2, "num_workers": 1}
    pack(str(tmp_path / "source"), tmp_path / "tars", split="validation", name="train-held-out", **settings)
    pack(str(tmp_path / "source"), tmp_path / "tars", **settings)
    assert opened(tmp_path / "tars/train-held-out-*.tar", tmp_path).train_samples()[0, 0]["prompt"] == "validation 0"


@pytest.mark.parametrize("change", ["shard size", "fewer rows", "other labels", "columns", "source touched"])
def test_shards_of_other_data_or_settings_are_not_mixed(change, tmp_path):
    folder = packed(tmp_path)
    settings, columns, num_rows = {"samples_per_shard": 3}, {}, 7
    if change == "shard size":
        settings["samples_per_shard"] = 4
    elif change == "columns":
        settings["keep"] = []
    elif change == "fewer rows":
        num_rows = 3
    elif change == "other labels":
        columns["label_0"] = [1.0] * 7
    write_parquet(tmp_path / "source/train.parquet", num_rows, **columns)
    before = content(folder)
    with pytest.raises(ValueError, match=r"train-0000\d\.tar: there is such a shard already, made from other data or"):
        pack(str(tmp_path / "source/train.parquet"), folder, num_workers=1, **settings)
    assert content(folder) == before


def test_two_commands_do_not_pack_into_one_name_at_once(tmp_path, monkeypatch):
    source = write_parquet(tmp_path / "train.parquet", 2)
    monkeypatch.setattr(shard_packing, "PATIENCE", 0.1)
    with (
        shard_packing.FileLock(tmp_path / ".train.lock"),
        pytest.raises(ValueError, match="another command is packing"),
    ):
        pack(str(source), tmp_path, num_workers=1)


# ------------------------------------------------------------------------------------------------------------- verify


def flip(file: Path, byte: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1
    file.write_bytes(data)


def test_verify_finds_every_changed_byte(tmp_path, capsys):
    folder = packed(tmp_path)
    tar = folder / "train-00001.tar"
    whole = tar.read_bytes()
    for byte in (3, 700, len(whole) // 2, len(whole) - 1):
        flip(tar, byte)
        with pytest.raises(ValueError, match=r"1 problems in 3 tars"):
            verify(f"{folder}/*.tar", num_workers=1)
        assert "train-00001.tar" in capsys.readouterr().out
        tar.write_bytes(whole)
    verify(f"{folder}/*.tar", num_workers=1)
    tar.write_bytes(whole[:-10240])
    with pytest.raises(ValueError, match="1 problems in 3 tars"):
        verify(f"{folder}/*.tar", num_workers=1)
    assert f"was made for {len(whole)} bytes, the shard has" in capsys.readouterr().out


def test_verify_compares_with_the_source(tmp_path, capsys):
    folder = packed(tmp_path)
    other = write_parquet(tmp_path / "other/train.parquet", 7, jpg_1=[encoded(i + (i == 4)) for i in range(7)])
    same = write_parquet(tmp_path / "same/train.parquet", 7)
    verify(f"{folder}/*.tar", str(same), num_workers=1)
    with pytest.raises(ValueError, match="3 problems in 3 tars"):
        verify(f"{folder}/*.tar", str(other), num_workers=1)
    out = capsys.readouterr().out
    assert "train-00001.tar: differs from the source from byte" in out
    assert "in 'train-00000-0000003.jpg_1.jpg'" in out
    with pytest.raises(ValueError, match=r"gives train-00000\.tar to train-00002\.tar, these are train-00000\.tar to"):
        verify(f"{folder}/train-0000[01].tar", str(same), num_workers=1)


def test_verify_needs_an_index_and_index_makes_one(tmp_path, capsys):
    tar = write_tar(tmp_path / "a.tar", samples(3))
    with pytest.raises(ValueError, match="1 problems in 1 tars"):
        verify(str(tar), num_workers=1)
    assert "there is no index beside it to compare it with; `index` makes one" in capsys.readouterr().out
    index(str(tar), num_workers=1)
    assert "3 samples in 1 tars" in capsys.readouterr().out
    verify(str(tar), num_workers=1)
    with pytest.raises(ValueError, match=r"were not packed together; only what `pack` made at once is compared"):
        verify(str(tar), "anything", num_workers=1)


def test_index_counts_what_is_unusable_and_unpack_can_leave_it_out(tmp_path, capsys):
    bad = {name: b"2" if name == "1.label_0.txt" else content for name, content in samples(3).items()}
    tar = write_tar(tmp_path / "a.tar", bad)
    index(str(tar), num_workers=1)
    assert "2 samples in 1 tars; unusable: 1 with an impossible label" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"a\.tar, key '1': 'label_0\.txt' says '2'.* 1 of 3 samples are bad"):
        unpack(str(tar), tmp_path / "unpacked", num_workers=1)
    unpack(str(tar), tmp_path / "unpacked", on_bad_row="drop", num_workers=1)
    assert "left out: 1 with an impossible label" in capsys.readouterr().out
    assert pq.read_table(tmp_path / "unpacked/a.parquet").column("caption").to_pylist() == ["caption 0", "caption 2"]


# --------------------------------------------------------------------------------------------- what a user may do wrong


def test_settings_that_cannot_be(tmp_path):
    source = str(write_parquet(tmp_path / "train.parquet", 2, thumbnail=[b"a", b"b"], caption=[["a"], ["b"]]))
    for settings, message in (
        ({"name": "a.b"}, r"--name is 'a\.b'; expected up to 60 letters"),
        ({"name": "../a"}, r"--name is '\.\./a'; expected up to 60 letters"),
        ({"name": "a" * 61}, r"--name is 'a+'; expected up to 60 letters"),
        ({"samples_per_shard": 0}, r"--samples_per_shard is 0; expected 1 or more"),
        ({"keep": ["user"]}, r"no column 'user' to keep; found: caption, jpg_0"),
        ({"split": "test"}, r"unknown split 'test'"),
        ({}, r"train\.parquet, row 0: bytes cannot be kept as JSON\. .*`--keep '\[\]'` for none"),
        ({"keep": []}, r"train\.parquet, row 0: .*A tar holds one caption per sample"),
    ):
        with pytest.raises(ValueError, match=message):
            pack(source, tmp_path / "tars", num_workers=1, **settings)


def test_unpack_overwrites_nothing(tmp_path):
    folder = packed(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/train-00001.parquet").touch()
    with pytest.raises(ValueError, match=r"train-00001\.parquet: is there already"):
        unpack(f"{folder}/*.tar", tmp_path / "out")
    write_tar(tmp_path / "b/train-00000.tar", samples(1))
    with pytest.raises(ValueError, match="several tars have one name"):
        unpack(f"{folder}/train-00000.tar::{tmp_path}/b/*.tar", tmp_path / "new")
    with pytest.raises(ValueError, match="only shards on this machine are read; copy them first"):
        unpack("https://example.org/{00..02}.tar", tmp_path / "new")


def test_metadata_of_mixed_types_cannot_be_columns(tmp_path):
    for i, value in enumerate((b'{"a": 1}', b'{"a": "x"}')):
        write_tar(tmp_path / f"{i}.tar", {**samples(1), "0.json": value})
    with pytest.raises(ValueError, match="the JSON members do not agree on a type"):
        unpack(f"{tmp_path}/*.tar", tmp_path / "out", num_workers=1)
    write_tar(tmp_path / "one/a.tar", {**samples(2), "0.json": b'{"a": 1}', "1.json": b'{"a": "x"}'})
    with pytest.raises(ValueError, match=r"a\.tar: the JSON members cannot be made columns"):
        unpack(f"{tmp_path}/one/*.tar", tmp_path / "out", num_workers=1)


def test_the_command_line_answers_in_one_line(tmp_path, monkeypatch, capsys):
    source = write_parquet(tmp_path / "train.parquet", 3)

    def command(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["pickapic_shards", *arguments])
        pickapic_shards.main()

    command("pack", str(source), str(tmp_path / "tars"), "--num_workers", "1", "--keep", "[]")
    command("verify", f"{tmp_path}/tars/*.tar", "--source", str(source), "--num_workers", "1")
    assert f"1 tars are as they were, and all that {source} has." in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: .*no/such\.parquet' does not exist .*[^\n]*$") as info:
        command("pack", str(tmp_path / "no/such.parquet"), str(tmp_path / "tars"))
    assert "\n" not in str(info.value.code)
    with pytest.raises(SystemExit) as info:
        command("--help")
    assert info.value.code == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("pack", "unpack", "verify", "index"))
