"""What a user may do wrong with preference data, and the first words of the answer."""

import io
import json
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamodules.pickapic import PairColumns, PickAPicDataModule
from tests.datamodules.files import (
    encoded,
    picture,
    write_jsonl,
    write_jsonl_pairs,
    write_pair_folder,
    write_parquet,
)
from tests.datamodules.stream import Recorder, quiet_trainer


def open_pairs(source: Path | str, **settings) -> PickAPicDataModule:
    data = PickAPicDataModule(str(source), **{"resolution": 32, **settings})
    data.setup("fit")
    return data


def huge_png(width: int, height: int) -> bytes:
    """Valid header of any size, a few bytes long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def strip_of_pixels() -> bytes:
    """1 x 5000: small, but resizing its shorter edge to 512 would make 1.3 gigapixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (5000, 1)).save(buffer, "PNG")
    return buffer.getvalue()


def postscript() -> bytes:
    """A format that Pillow would hand to another program."""
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(%pipe%id) (w) file\n"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label_0": [1.0, 0.3, 0.0]}, r"row 1: 'label_0' is 0\.3, expected 1 .* 0 .* or 0\.5"),
        ({"label_0": [1.0, float("nan"), 0.0]}, r"row 1: 'label_0' is nan, expected 1"),
        ({"label_0": [1.0, None, 0.0]}, r"row 1: 'label_0' is nan, expected 1"),
        ({"label_0": [1.0, float("inf"), 0.0]}, r"row 1: 'label_0' is inf, expected 1"),
        ({"label_0": [None, None, None]}, r"row 0: 'label_0' is nan.* 3 of 3 rows are like this"),
        ({"label_0": ["1", "0", "1"]}, r"column 'label_0' has type string, expected numbers"),
        ({"label_0": [0.5, 0.5, 0.5]}, r"nothing is left of 3 rows: 3 ties"),
        ({"caption": ["a", "", "c"]}, r"row 1: 'caption' is '', expected text"),
        ({"caption": ["a", " \t", "c"]}, r"row 1: 'caption' is ' \\t', expected text"),
        ({"caption": ["a", None, "c"]}, r"row 1: 'caption' is None, expected text"),
        ({"caption": [1, 2, 3]}, r"column 'caption' has type int64, expected text"),
        ({"caption": [["a"], [], ["c"]]}, r"row 1: 'caption' is \[\], expected text"),
        ({"caption": [["a"], ["b", ""], ["c"]]}, r"row 1: 'caption' is \['b', ''\], expected text"),
        ({"jpg_0": [encoded(0), b"", encoded(1)]}, r"row 1: 'jpg_0' has no bytes"),
        ({"jpg_1": [encoded(0), None, encoded(1)]}, r"row 1: 'jpg_1' is null, expected an image"),
        ({"jpg_0": [1, 2, 3]}, r"column 'jpg_0' has type int64, expected encoded images"),
        ({"jpg_0": ["/etc/passwd"] * 3}, r"row 0: 'jpg_0' is '/etc/passwd', which leads out of the folder"),
    ],
)
def test_rows_are_checked_before_training(columns, message, tmp_path):
    file = write_parquet(tmp_path / "train.parquet", 3, **{"label_0": [1.0, 0.0, 1.0], **columns})
    with pytest.raises(ValueError, match=message) as info:
        open_pairs(file)
    assert str(tmp_path) in str(info.value)


@pytest.mark.parametrize("column", ["label_0", "caption", "jpg_0"])
def test_bad_rows_are_dropped_when_asked(column, tmp_path):
    bad = {"label_0": [1.0, 0.3], "caption": ["a", ""], "jpg_0": [encoded(0), b""]}[column]
    file = write_parquet(tmp_path / "train.parquet", 2, **{"label_0": [1.0, 1.0], column: bad})
    assert len(open_pairs(file, on_bad_row="drop").train_samples()) == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no image at all", "is not an image of a known format"),
        (encoded(0)[:300], "is a damaged image"),
        (encoded(0, "PNG")[:-30], "is a damaged image"),
        (huge_png(12_000, 12_000), "is too large or too long an image"),
        (huge_png(100_000, 100_000), "is too large an image"),
        (strip_of_pixels(), "is too large or too long an image"),
        (postscript(), "is not an image of a known format"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_images_that_do_not_decode_are_named_with_the_way_out(data, message, tmp_path):
    file = write_parquet(tmp_path / "train.parquet", 2, label_0=[1.0, 1.0], jpg_1=[encoded(0), data])
    samples = open_pairs(file, resolution=512).train_samples()
    with pytest.raises(ValueError, match=rf"train\.parquet, row 1 .*'jpg_1' {message}.*verify_images: true"):
        samples[1, 0]
    with pytest.raises(ValueError, match=rf"train\.parquet, row 1: 'jpg_1' {message}.*1 of 2 rows are like this"):
        open_pairs(file, resolution=512, verify_images=True)


def test_the_error_of_a_worker_names_the_row(tmp_path):
    file = write_parquet(tmp_path / "train.parquet", 2, label_0=[1.0, 1.0], jpg_1=[b"damaged", b"damaged"])
    data = PickAPicDataModule(str(file), 32, num_workers=1)
    with pytest.raises(ValueError, match=r"train\.parquet, row . \(prompt 'caption .'\): 'jpg_1' is not an image"):
        quiet_trainer(max_steps=1).fit(Recorder(), data)


def test_missing_columns_are_listed_beside_those_found(tmp_path):
    pq.write_table(pa.table({"prompt": ["a"], "jpg_0": [b"x"], "label_0": [1.0]}), tmp_path / "train.parquet")
    with pytest.raises(
        ValueError, match=r"no column 'caption', 'jpg_1'; found: prompt, jpg_0, label_0\..*columns: {caption: prompt}"
    ):
        open_pairs(tmp_path)
    with pytest.raises(ValueError, match=r"no column 'model_0', 'model_1'"):
        open_pairs(write_parquet(tmp_path / "b.parquet"), dreamlike_pairs_only=True)
    with pytest.raises(ValueError, match=r"no column 'has_label'"):
        open_pairs(write_parquet(tmp_path / "b.parquet"), require_label=True)
    with pytest.raises(ValueError, match=r"no column 'votes'"):
        open_pairs(write_parquet(tmp_path / "b.parquet"), columns=PairColumns(label_0="votes"))


def test_parquet_files_that_cannot_be_read(tmp_path):
    (tmp_path / "zero.parquet").touch()
    (tmp_path / "text.parquet").write_text("hello")
    whole = write_parquet(tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    for name in ("zero", "text", "cut"):
        with pytest.raises(ValueError, match=rf"{name}\.parquet: not a readable parquet file .* size is \d+ bytes"):
            open_pairs(tmp_path / f"{name}.parquet")
    damaged = bytearray(whole)
    damaged[100:2000] = bytes(1900)
    (tmp_path / "damaged.parquet").write_bytes(bytes(damaged))
    with pytest.raises(ValueError, match=r"damaged\.parquet, rows 0 to 5: the parquet data are damaged"):
        open_pairs(tmp_path / "damaged.parquet")


def test_an_empty_parquet_file(tmp_path):
    pq.write_table(
        pa.table({name: pa.array([], pa.string()) for name in ("caption", "jpg_0", "jpg_1", "label_0")}),
        tmp_path / "a.parquet",
    )
    with pytest.raises(ValueError, match=r"a\.parquet: no rows"):
        open_pairs(tmp_path / "a.parquet")


def test_files_of_one_data_set_must_agree(tmp_path):
    write_parquet(tmp_path / "a.parquet", 2)
    write_parquet(tmp_path / "b.parquet", 2, caption=[1, 2])
    with pytest.raises(ValueError, match=r"b\.parquet: column 'caption' has type int64, but string in .*a\.parquet"):
        open_pairs(tmp_path)


@pytest.mark.parametrize("source", ["./no/such/folder", "/no/such.parquet", "no_such.jsonl", "nothing"])
def test_a_source_that_does_not_exist(source):
    with pytest.raises(FileNotFoundError, match=r"does not exist .*Expected a parquet file, glob or folder"):
        open_pairs(source)


def test_an_empty_source():
    with pytest.raises(ValueError, match="source is empty; expected a file, a folder or a hub id"):
        open_pairs(" ")


def test_a_glob_that_matches_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No file matches"):
        open_pairs(tmp_path / "*.parquet")


def test_an_empty_folder(tmp_path):
    with pytest.raises(ValueError, match=r"no data\. Expected parquet files, a JSONL file, or images <name>_w\.png"):
        open_pairs(tmp_path)


def test_a_file_of_another_type(tmp_path):
    (tmp_path / "pairs.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"files of type '\.csv' are not read; expected \.parquet or \.jsonl"):
        open_pairs(tmp_path / "pairs.csv")


def test_an_unknown_split_lists_the_available_ones(tmp_path):
    folder = tmp_path / "folder"
    file = write_parquet(folder / "train-00000.parquet")
    write_parquet(folder / "validation.parquet")
    with pytest.raises(ValueError, match=r"unknown split 'test'; available: train, validation\."):
        open_pairs(folder, split="test")
    with pytest.raises(ValueError, match=r"unknown split 'test'; available: train\."):
        open_pairs(file, split="test")
    validation_only = tmp_path / "validation_only"
    write_parquet(validation_only / "validation.parquet")
    with pytest.raises(ValueError, match=r"unknown split 'train'; available: validation\."):
        open_pairs(validation_only)


def test_a_hub_id_without_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError, match=r"Hub data set 'nobody/nothing', split 'train': .*\n.*path of a downloaded copy"
    ):
        open_pairs("nobody/nothing")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"jpg_0": "../outside.png"}, r"line 2: 'jpg_0' is '\.\./outside\.png', which leads out of the folder"),
        ({"jpg_0": "/etc/passwd"}, r"line 2: 'jpg_0' is '/etc/passwd', which leads out of the folder"),
        ({"jpg_1": "images/../../outside.png"}, r"line 2: 'jpg_1' is .* which leads out of the folder"),
        ({"jpg_0": "link.png"}, r"line 2: 'jpg_0' is 'link\.png', which leads out of the folder"),
        ({"jpg_0": "linked/outside.png"}, r"line 2: 'jpg_0' is 'linked/outside\.png', which leads out of the folder"),
        ({"jpg_0": "images/9.png"}, r"line 2: 'jpg_0' is 'images/9\.png', which does not exist in"),
        ({"jpg_0": "images"}, r"line 2: 'jpg_0' is 'images', which does not exist in"),
        ({"jpg_0": "x" * 5000}, r"line 2: 'jpg_0' is 'x+', which does not exist in"),
        ({"jpg_0": "a\0b"}, r"line 2: 'jpg_0' is .*, which does not exist in"),
        ({"jpg_0": None}, r"line 2: 'jpg_0' is null"),
        ({"jpg_0": 5}, r"line 2: 'jpg_0' is 5, a number; the lines before have a string"),
        ({"caption": ""}, r"line 2: 'caption' is '', expected text"),
        ({"caption": "half of a pair: \ud800"}, r"pairs\.jsonl: a value of caption, .* cannot be stored"),
        ({"label_0": 10**30}, r"pairs\.jsonl: a value of caption, .* cannot be stored"),
        ({"label_0": 2}, r"line 2: 'label_0' is 2\.0, expected 1"),
        ({"label_0": "yes"}, r"line 2: 'label_0' is 'yes', a string; the lines before have a number"),
    ],
)
def test_rows_of_a_jsonl_file(change, message, tmp_path):
    folder = tmp_path / "pairs"
    file = write_jsonl_pairs(folder, **change)
    picture(0).save(tmp_path / "outside.png")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked").symlink_to(tmp_path)
    with pytest.raises(ValueError, match=message) as info:
        open_pairs(file)
    assert "pairs.jsonl" in str(info.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"caption": "a"', r"line 2: not valid JSON .*\"caption\": \"a\""),
        ('["a", "b"]', r"line 2: expected an object"),
        ("[" * 100_000, r"line 2: not valid JSON"),
        ('{"caption": "a"}', r"line 2: no 'jpg_0'; found 'caption'"),
    ],
)
def test_broken_lines_of_a_jsonl_file(line, message, tmp_path):
    file = write_jsonl_pairs(tmp_path / "pairs")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(ValueError, match=message):
        open_pairs(file)


def test_jsonl_files_that_hold_nothing_or_no_utf8_or_have_company(tmp_path):
    with pytest.raises(ValueError, match=r"a\.jsonl: no rows"):
        open_pairs(write_jsonl(tmp_path / "a.jsonl", []))
    (tmp_path / "b.jsonl").write_bytes(json.dumps({"caption": "ö"}, ensure_ascii=False).encode("latin-1"))
    with pytest.raises(ValueError, match=r"b\.jsonl: not UTF-8"):
        open_pairs(tmp_path / "b.jsonl")
    with pytest.raises(ValueError, match=r"2 JSONL files \(a\.jsonl, b\.jsonl, \.\.\.\); expected one"):
        open_pairs(tmp_path)


@pytest.mark.parametrize("lost", ["dog_w.png", "dog_l.png", "dog.txt"])
def test_an_incomplete_pair_in_a_folder(lost, tmp_path):
    folder = write_pair_folder(tmp_path / "pairs")
    (folder / lost).unlink()
    with pytest.raises(ValueError, match=rf"pairs: 'dog' has no {lost}; every pair needs"):
        open_pairs(folder)


def test_captions_of_a_folder(tmp_path):
    folder = write_pair_folder(tmp_path / "pairs")
    (folder / "dog.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"dog\.txt: not UTF-8"):
        open_pairs(folder)
    (folder / "dog.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"dog, row 0: 'caption' is '', expected text"):
        open_pairs(folder)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"resolution": 500}, "resolution is 500; expected a positive multiple of 8"),
        ({"resolution": 0}, "resolution is 0; expected a positive multiple of 8"),
        ({"batch_size": 0}, "batch_size is 0; expected 1 or more"),
        ({"batch_size": -4}, "batch_size is -4; expected 1 or more"),
        ({"num_workers": -1}, "num_workers is -1; expected 0 or more"),
        ({"max_train_samples": 0}, "max_train_samples is 0; expected 1 or more"),
        ({"max_val_samples": -1}, "max_val_samples is -1; expected 1 or more"),
        ({"label_noise": 1.5}, r"label_noise is 1\.5; expected a probability"),
        ({"label_noise": -0.1}, r"label_noise is -0\.1; expected a probability"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        PickAPicDataModule("owner/name", **setting)


def test_a_batch_larger_than_the_data_set(tmp_path):
    data = PickAPicDataModule(str(write_parquet(tmp_path / "train.parquet", 6)), 32, batch_size=5)
    with pytest.raises(ValueError, match="batch_size is 5, but the training data have only 4 rows"):
        quiet_trainer(max_steps=1).fit(Recorder(), data)


def test_validation_and_test_without_data(tmp_path):
    data = PickAPicDataModule(str(write_parquet(tmp_path / "train.parquet", 6)), 32)
    with pytest.raises(ValueError, match=r"set `data\.init_args\.validation_split`"):
        quiet_trainer(limit_val_batches=1.0).validate(Recorder(), data)
    with pytest.raises(ValueError, match=r"set `data\.init_args\.test_prompts\.source`"):
        quiet_trainer().test(Recorder(), data)
