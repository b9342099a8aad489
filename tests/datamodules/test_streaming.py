"""Streaming promises what reading from the disk does; and what users may do wrong with files that lie elsewhere."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules import shard_cache, streaming
from datamodules.pickapic import PairColumns, PickAPicDataModule, collate_pairs
from datamodules.sampling import StreamSampler, block_order
from datamodules.streaming import ParquetFile, cut
from tests.datamodules.files import encoded, pair_columns, write_jsonl_pairs, write_parquet
from tests.datamodules.stream import Killed, Recorder, SaveAndDie, quiet_trainer
from tests.datamodules.web import HubHandler, Web, serving

ROOT = Path(__file__).parents[2]
ROWS = 4  # of a file


def write_files(folder: Path, number: int = 3, rows: int = ROWS, split: str = "train", **columns: Any) -> Path:
    """A folder in the layout of the hub, without ties."""
    for file in range(number):
        seeds = range(100 * file, 100 * file + rows)
        table = {
            "caption": [f"caption {seed}" for seed in seeds],
            "jpg_0": [encoded(2 * seed) for seed in seeds],
            "jpg_1": [encoded(2 * seed + 1) for seed in seeds],
            "label_0": [float(seed % 2) for seed in seeds],
        }
        write_parquet(folder / f"data/{split}-{file:05d}-of-{number:05d}.parquet", rows, **{**table, **columns})
    return folder


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """Three files of four rows on a server, and no patience."""
    monkeypatch.setattr(shard_cache, "PAUSES", (0.0, 0.0))
    with serving(write_files(tmp_path / "web")) as web:
        yield web


def urls(web: Web) -> str:
    names = sorted(str(file.relative_to(web.folder)) for file in web.folder.rglob("*.parquet"))
    return "::".join(f"{web.url}/{name}" for name in names)


def module(source: Path | str, cache: Path | None, **settings: Any) -> PickAPicDataModule:
    """Streams if there is a folder for the cache."""
    if cache is not None:
        settings = {"streaming": True, "cache_dir": str(cache), "shuffle_shards": 2, **settings}
    return PickAPicDataModule(str(source), **{"resolution": 32, "batch_size": 2, "random_crop": True, **settings})


def opened(source: Path | str, cache: Path | None, **settings: Any) -> PickAPicDataModule:
    data = module(source, cache, **settings)
    data.setup("fit")
    return data


def fingerprint(batch: dict[str, Any]) -> list:
    return [batch["ids"], batch["prompts"], zlib.crc32(batch["images"].numpy().tobytes())]


class Fingerprints(Recorder):
    """Remembers what it was shown."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append(fingerprint(batch))
        self.write(self.seen[-1])
        return self.weight * self.seen[-1][2] / 2**32 + self.weight**2


def fit(
    data: PickAPicDataModule, checkpoint: Path | None = None, killer: pl.Callback | None = None, **options: Any
) -> Fingerprints:
    """One run, until its end or until it is killed."""
    recorder = Fingerprints()
    with contextlib.suppress(Killed):
        quiet_trainer(callbacks=killer, **options).fit(recorder, data, ckpt_path=checkpoint)
    return recorder


# ------------------------------------------------------------------------------------------------- the same batches


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
def test_streamed_samples_equal_those_read_from_the_disk(kind, tmp_path):
    folder = write_files(tmp_path / "data")
    for file in folder.rglob("*.parquet") if kind != "binary" else []:
        table = pq.read_table(file)
        for name in ("jpg_0", "jpg_1"):
            column = table[name].cast(pa.large_binary())
            if kind == "struct":
                paths = pa.array([None] * len(table), pa.string())
                column = pa.StructArray.from_arrays([table[name].combine_chunks(), paths], ["bytes", "path"])
            table = table.set_column(table.column_names.index(name), name, column)
        pq.write_table(table, file)
    streamed, stored = (opened(folder, cache).train_samples() for cache in (tmp_path / "cache", None))
    assert len(streamed) == len(stored) == 3 * ROWS
    for row in range(len(stored)):
        one, other = (collate_pairs([samples[row, 5 * row]]) for samples in (streamed, stored))
        assert one["ids"] == other["ids"]
        assert fingerprint(one) == fingerprint(other)
        assert all(torch.equal(one[name], other[name]) for name in ("label", "original_sizes", "crops"))


def test_image_columns_written_by_datasets_are_streamed(tmp_path):
    features = datasets.Features(caption=datasets.Value("string"), image=datasets.Image())
    rows = {"caption": ["a", "b"], "image": [{"bytes": encoded(i), "path": f"{i}.jpg"} for i in (0, 1)]}
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data/train.parquet")
    streamed, stored = (
        opened(tmp_path / "data", cache, preferred_only=True).train_samples() for cache in (tmp_path / "cache", None)
    )
    for row in (0, 1):
        assert streamed[row, 3]["prompt"] == "ab"[row]
        assert torch.equal(streamed[row, 3]["views"][0].pixels, stored[row, 3]["views"][0].pixels)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_sees_the_block_shuffled_order_of_what_is_on_the_disk(num_workers, web, tmp_path):
    run = fit(module(urls(web), tmp_path / "cache", num_workers=num_workers), max_steps=12)
    stored = opened(web.folder, None).train_samples()
    order = partial(block_order, shards=np.repeat([0, 1, 2], ROWS), shuffle_shards=2)
    keys = [
        key
        for start in (0, 12)
        for key in StreamSampler(stored, 2, 1, 1, 0, seed=0, start=lambda start=start: start, order=order)
    ]
    expected = [fingerprint(collate_pairs([stored[keys[i]], stored[keys[i + 1]]])) for i in range(0, 24, 2)]
    assert run.seen == expected


def test_rows_are_filtered_as_others_are(tmp_path):
    settings = {
        "label_0": [1.0, 0.5, None, 0.0],
        "has_label": [True, True, False, True],
        "caption": ["a", "b", "c", " "],
        "model_0": ["dream"] * 4,
        "model_1": ["dream", "dream", "dream", "other"],
    }
    folder = write_files(tmp_path / "data", **settings)
    options = {"require_label": True, "on_bad_row": "drop", "dreamlike_pairs_only": True, "ties": "keep"}
    streamed, stored = (opened(folder, cache, **options) for cache in (tmp_path / "cache", None))
    assert streamed._tables["train"].index.tolist() == stored._tables["train"].index.tolist() == [0, 1, 4, 5, 8, 9]
    assert streamed._tables["train"].summary == stored._tables["train"].summary


def test_validation_is_streamed_in_order(web, tmp_path):
    write_files(web.folder, number=1, split="validation", label_0=[1.0] * 4)
    data = module(urls(web), tmp_path / "cache", validation_split="validation", max_val_samples=3)
    recorder = Recorder()
    quiet_trainer(max_steps=1, limit_val_batches=1.0).validate(recorder, data, verbose=False)
    names = [name for batch in recorder.validated for name in batch["ids"]]
    assert len(names) == 3
    assert names == sorted(names)
    assert {name.split(":")[0] for name in names} == {"validation-00000-of-00001.parquet"}


def test_few_samples_are_taken_from_few_shards(web, tmp_path):
    data = opened(urls(web), tmp_path / "cache", max_train_samples=ROWS + 1)
    index = data.train_samples().table.index
    assert len(index) == ROWS + 1
    assert np.unique(index // ROWS, return_counts=True)[1].tolist() in ([1, ROWS], [ROWS, 1])


def test_images_are_verified_when_asked(tmp_path):
    folder = write_files(tmp_path / "data", jpg_1=[encoded(0), b"damaged", encoded(1), encoded(2)])
    with pytest.raises(ValueError, match=r"00000-of-00003\.parquet, row 1: 'jpg_1' is not an image.*3 of 12 rows"):
        opened(folder, tmp_path / "cache", verify_images=True)
    data = opened(folder, tmp_path / "cache", verify_images=True, on_bad_row="drop")
    assert len(data.train_samples()) == 9


# --------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_after_any_batch_continues_the_uninterrupted_run(num_workers, web, tmp_path):
    options = {"max_steps": 8}  # a pass has six
    make = partial(module, urls(web), tmp_path / "cache", num_workers=num_workers)
    whole = fit(module(urls(web), tmp_path / "cache"), **options)
    for number in range(1, 8) if num_workers == 0 else (1, 3, 6, 7):
        checkpoint = tmp_path / f"{number}.ckpt"
        killed = fit(make(), killer=SaveAndDie("on_train_batch_end", number, checkpoint), **options)
        resumed = fit(make(), checkpoint, **options)
        assert killed.seen + resumed.seen == whole.seen
        assert torch.equal(resumed.weight, whole.weight)


def run_process(options: dict[str, Any]) -> None:
    """Body of a process that is killed, or that starts ranks."""
    multiprocessing.set_start_method("fork", force=True)
    killer = SaveAndDie(**options["kill"], hard=True) if "kill" in options else None
    trainer = quiet_trainer(callbacks=[killer] if killer else None, **options["trainer"])
    trainer.fit(Fingerprints(options["log"]), module(**options["data"]), ckpt_path=options.get("checkpoint"))


def train(folder: Path, **options: Any) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.datamodules.test_streaming"])
    process = context.Process(target=run_process, args=({"log": str(folder / "log"), **options},))
    process.start()
    process.join(timeout=300)
    return process.exitcode


def read_log(folder: Path, rank: int) -> list:
    return [json.loads(line) for line in (folder / f"log.{rank}").read_text().splitlines()]


@pytest.mark.parametrize(("ranks", "then"), [(1, 2), (2, 1)])
def test_a_killed_run_is_continued_exactly_by_another_number_of_ranks(ranks, then, web, tmp_path):
    write_files(web.folder, number=8)
    [file.unlink() for file in web.folder.rglob("*-of-00003.parquet")]
    whole = fit(module(urls(web), tmp_path / "cache"), max_steps=16)

    def strategy(ranks: int) -> dict[str, Any]:
        return {"max_steps": 4, "accumulate_grad_batches": 4 // ranks, "devices": ranks} | (
            {"strategy": "ddp_fork"} if ranks == 2 else {}
        )

    folders = tmp_path / "killed", tmp_path / "resumed"
    for folder in folders:
        folder.mkdir()
    data = {"source": urls(web), "cache": tmp_path / "other", "num_workers": 2}
    kill = {"hook": "on_train_batch_end", "number": 8 // ranks, "path": str(tmp_path / "c.ckpt")}
    code = train(folders[0], data=data, trainer=strategy(ranks), kill=kill)
    assert code == (-signal.SIGKILL if ranks == 1 else 1)
    assert train(folders[1], data=data, trainer=strategy(then), checkpoint=kill["path"]) == 0
    for rank in range(ranks):
        assert read_log(folders[0], rank) == whole.seen[:8][rank::ranks]
    for rank in range(then):
        assert read_log(folders[1], rank) == whole.seen[8:][rank::then]


@pytest.mark.parametrize("change", ["another file", "other rows", "another label", "other mixing"])
def test_other_data_are_refused_on_resume(change, web, tmp_path):
    checkpoint = tmp_path / "c.ckpt"
    fit(module(urls(web), tmp_path / "cache"), killer=SaveAndDie("on_train_batch_end", 2, checkpoint), max_steps=4)
    settings = {}
    file = web.folder / "data/train-00001-of-00003.parquet"
    if change == "another file":
        file.rename(file.with_name("train-00009.parquet"))
    elif change == "other rows":
        write_parquet(file, ROWS, label_0=[1.0] * ROWS)
    elif change == "another label":
        table = pq.read_table(file)
        pq.write_table(table.set_column(3, "label_0", [1.0 - np.array(table["label_0"])]), file)
    else:
        settings = {"shuffle_shards": 3}
    with pytest.raises(ValueError, match="trained on 12 rows of other files, or in another order of shards"):
        fit(module(urls(web), tmp_path / "cache", **settings), checkpoint, max_steps=4)


def test_the_same_files_elsewhere_are_accepted_on_resume(web, tmp_path):
    checkpoint = tmp_path / "c.ckpt"
    whole = fit(module(urls(web), tmp_path / "cache"), max_steps=4)
    fit(module(urls(web), tmp_path / "cache"), killer=SaveAndDie("on_train_batch_end", 2, checkpoint), max_steps=4)
    assert fit(module(web.folder, tmp_path / "other"), checkpoint, max_steps=4).seen == whole.seen[2:]


# ------------------------------------------------------------------------------------------- what is fetched and kept


def test_texts_and_labels_are_read_once_and_images_when_needed(web, tmp_path):
    data = opened(urls(web), tmp_path / "cache")
    fetched = sum(sent for _, _, sent in web.asked)
    samples = data.train_samples()
    web.asked.clear()
    samples[0, 0]
    assert {name for _, name, _ in web.asked} == {"data/train-00000-of-00003.parquet"}
    web.asked.clear()
    samples[1, 0]
    assert web.asked == []
    opened(urls(web), tmp_path / "cache")
    assert {method for method, _, _ in web.asked} == {"HEAD"}
    assert fetched > 0


def test_an_interrupted_start_is_taken_up_again(web, tmp_path):
    last = "data/train-00002-of-00003.parquet"
    web.faults[last] = ["500"]
    with pytest.raises(OSError, match=rf"{last}: 3 attempts failed, the last with: 500"):
        opened(urls(web), tmp_path / "cache")
    web.faults.clear()
    web.asked.clear()
    opened(urls(web), tmp_path / "cache")
    assert {name for method, name, _ in web.asked if method == "GET"} == {last}


def test_a_large_file_is_fetched_by_row_groups(web, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SHARD_BYTES", 20_000)
    images = [encoded(0, "BMP", 16, 16) for _ in range(200)]  # 822 bytes each
    table = pa.table(pair_columns(200, jpg_0=images, jpg_1=images, label_0=[1.0] * 200))
    for file in web.folder.rglob("*.parquet"):
        file.unlink()
    options = {"use_dictionary": False, "compression": "none", "write_statistics": False}
    pq.write_table(table, web.folder / "all.parquet", row_group_size=5, **options)
    data = opened(urls(web), tmp_path / "cache")
    rows = data._tables["train"].rows
    assert {shard.rows for shard in rows.parts} == {10}
    assert all(shard.size <= 20_000 for shard in rows.parts)
    web.asked.clear()
    assert data.train_samples()[57, 0]["id"] == "all.parquet:57"
    footer = 65_536  # that Arrow reads from the end of a file
    assert sum(sent for _, _, sent in web.asked) <= footer + 20_000


def test_row_groups_are_gathered_into_shards():
    file = ParquetFile("a.parquet", 0, "")
    groups = [[10, 30_000_000], [10, 30_000_000], [10, 30_000_000], [0, 0], [5, 90_000_000], [5, 1], [5, 1]]
    shards = cut(file, groups, ["jpg_0"])
    assert [(shard.groups, shard.start, shard.rows) for shard in shards] == [
        ((0, 2), 0, 20),
        ((2, 4), 20, 10),
        ((4, 5), 30, 5),
        ((5, 7), 35, 10),
    ]
    assert cut(file, [], ["jpg_0"]) == cut(file, [[0, 0]], ["jpg_0"]) == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_little_is_kept_however_long_training_goes_on(num_workers, web, tmp_path):
    write_files(web.folder, number=9)
    settings = {"shuffle_shards": 1, "num_workers": num_workers}
    size = max(shard.size for shard in opened(urls(web), tmp_path / "cache")._tables["train"].rows.parts)
    small = module(urls(web), tmp_path / "small", cache_gb=3 * size / 1e9, **settings)
    kept = []

    class Look(pl.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            with contextlib.suppress(FileNotFoundError):  # just removed
                kept.append(sum(file.stat().st_size for file in (tmp_path / "small/images").glob("*.shard")))

    run = fit(small, killer=Look(), max_steps=48)  # two passes
    assert 0 < max(kept) <= 3 * size
    assert len({name for batch in run.seen for name in batch[0]}) == 12 * ROWS
    assert fit(module(urls(web), tmp_path / "large", **settings), max_steps=48).seen == run.seen
    if num_workers == 0:
        assert len(small._tables["train"].rows._open) == 1


def test_the_shards_of_the_next_rows_are_fetched_in_their_order(web, tmp_path):
    data = opened(urls(web), tmp_path / "cache")
    web.asked.clear()
    data._tables["train"].rows.prefetch(np.array([9, 8, 10, 1]))
    while len(list((tmp_path / "cache/images").glob("*.shard"))) < 2:
        time.sleep(0.01)
    assert list(dict.fromkeys(Path(name).name[:11] for _, name, _ in web.asked)) == ["train-00002", "train-00000"]


# -------------------------------------------------------------------------------------------------------------- hub


def fake_builder(monkeypatch: pytest.MonkeyPatch, files: dict[str, list[str]]) -> list:
    asked = []

    def load_dataset_builder(*args: Any) -> SimpleNamespace:
        asked.append(args)
        return SimpleNamespace(config=SimpleNamespace(data_files=files))

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    return asked


def test_a_hub_data_set_is_found_by_datasets_and_read_from_the_hub(tmp_path):
    write_files(tmp_path / "web")
    write_files(tmp_path / "web", number=1, split="validation")
    code = (
        "from tests.datamodules.test_streaming import *\n"
        f"data = opened('some/mirror', Path({str(tmp_path / 'cache')!r}), validation_split='validation')\n"
        "print(data.train_samples()[5, 0]['id'], data.val_samples()[0]['id'], data._tables['train'].rows.files[0])"
    )
    with serving(tmp_path / "web", HubHandler) as web:
        environment = {
            **os.environ,
            "HF_ENDPOINT": web.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        command = [sys.executable, "-c", code]
        result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == (
        "train-00001-of-00003.parquet:1 validation-00000-of-00001.parquet:0 "
        f"hf://datasets/some/mirror@{HubHandler.COMMIT}/data/train-00000-of-00003.parquet"
    )


def test_a_hub_data_set_is_asked_for_by_split_and_subset(web, tmp_path, monkeypatch):
    names = urls(web).split("::")
    asked = fake_builder(monkeypatch, {"train": names[:2], "validation": names[2:]})
    data = opened("some/mirror", tmp_path / "cache", subset="big", split="validation")
    assert asked == [("some/mirror", "big")]
    assert data._tables["validation"].rows.files == names[2:]


# ------------------------------------------------------------------------------------- what users may do wrong


def rewrite(file: Path, **columns: Any) -> None:
    table = pq.read_table(file)
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, [values])
    pq.write_table(table, file)


def damage(file: Path, column: str) -> None:
    """Zeros in the middle of a column."""
    chunks = pq.read_metadata(file).row_group(0)
    chunk = next(chunks.column(i) for i in range(chunks.num_columns) if chunks.column(i).path_in_schema == column)
    data = bytearray(file.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    file.write_bytes(bytes(data))


MIDDLE = "data/train-00001-of-00003.parquet"


@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"caption": ["a", None, "b", "c"]}, r"row 1: 'caption' is None, expected text"),
        ({"caption": ["a", "b", "c", " "]}, r"row 3: 'caption' is ' ', expected text"),
        ({"label_0": [1.0, 0.3, 0.0, 1.0]}, r"row 1: 'label_0' is 0\.3, expected 1"),
        ({"jpg_1": [encoded(0), None, encoded(1), None]}, r"row 1: 'jpg_1' is null, .* 2 of 12 rows are like this"),
        ({"label_0": ["1", "0", "1", "0"]}, r"column 'label_0' has type string, but double in .*00000-of-00003"),
        ({"caption": [1, 2, 3, 4]}, r"column 'caption' has type int64, but string in .*00000-of-00003"),
        ({"jpg_0": ["a.jpg"] * 4}, r"column 'jpg_0' has type string, expected encoded images \(binary\)"),
        ({"jpg_0": [1, 2, 3, 4]}, r"column 'jpg_0' has type int64, expected encoded images \(binary\)"),
    ],
)
def test_rows_are_checked_before_training(columns, message, remote, web, tmp_path):
    rewrite(web.folder / MIDDLE, **columns)
    with pytest.raises(ValueError, match=message) as info:
        opened(urls(web) if remote else web.folder, tmp_path / "cache")
    assert "train-00001-of-00003.parquet" in str(info.value)


@pytest.mark.parametrize(("column", "value"), [("caption", None), ("jpg_0", None)])
def test_bad_rows_are_dropped_when_asked(column, value, web, tmp_path):
    values = pq.read_table(web.folder / MIDDLE)[column].to_pylist()
    rewrite(web.folder / MIDDLE, **{column: [*values[:3], value]})
    assert len(opened(urls(web), tmp_path / "cache", on_bad_row="drop").train_samples()) == 11


@pytest.mark.parametrize(("stored", "message"), [(b"", "has no bytes"), (b"x", "is not an image of a known format")])
def test_images_that_cannot_be_shown_are_named_with_the_way_out(stored, message, web, tmp_path):
    rewrite(web.folder / MIDDLE, jpg_0=[encoded(0), stored, encoded(1), encoded(2)])
    samples = opened(urls(web), tmp_path / "cache").train_samples()
    with pytest.raises(ValueError, match=rf"00001-of-00003\.parquet, row 1 .*: 'jpg_0' {message}.*verify_images: true"):
        samples[ROWS + 1, 0]


def test_image_structs_that_hold_only_a_path(tmp_path):
    images = pa.array([{"bytes": None, "path": "/etc/passwd"}, {"bytes": encoded(0), "path": None}])
    columns = {"caption": ["a", "b"], "jpg_0": images, "jpg_1": [encoded(1)] * 2, "label_0": [1.0, 1.0]}
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data/train.parquet")
    with pytest.raises(ValueError, match=r"train\.parquet, row 0: 'jpg_0' is null, expected an image in the file"):
        opened(tmp_path / "data", tmp_path / "cache")


def test_missing_columns_are_listed_beside_those_found(web, tmp_path):
    table = pq.read_table(web.folder / MIDDLE)
    pq.write_table(table.drop_columns(["jpg_1"]), web.folder / MIDDLE)
    with pytest.raises(ValueError, match=rf"{MIDDLE}: no column 'jpg_1'; found: caption, jpg_0, label_0"):
        opened(urls(web), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"no column 'text'; found"):
        opened(urls(web), tmp_path / "cache", columns=PairColumns(caption="text"))
    with pytest.raises(ValueError, match=r"no column 'has_label'"):
        opened(urls(web), tmp_path / "cache", require_label=True)


def test_files_without_rows(tmp_path):
    folder = write_files(tmp_path / "data", number=2)
    for file in folder.rglob("*.parquet"):
        pq.write_table(pq.read_table(file).slice(0, 0), file)
    with pytest.raises(ValueError, match=r"train-00000-of-00002\.parquet and further files: no rows"):
        opened(folder, tmp_path / "cache")
    write_files(folder, number=1)
    assert len(opened(folder, tmp_path / "cache").train_samples()) == ROWS


@pytest.mark.parametrize("remote", [True, False])
def test_files_that_are_not_parquet(remote, web, tmp_path):
    whole = (web.folder / MIDDLE).read_bytes()
    source = urls(web) if remote else web.folder
    for number, data in enumerate((b"", b"hello, this is text", whole[: len(whole) // 2], whole[:-20] + bytes(20))):
        (web.folder / MIDDLE).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{MIDDLE}: not a readable parquet file .* size is {len(data)} bytes"):
            opened(source, tmp_path / f"cache{number}")


@pytest.mark.parametrize("remote", [True, False])
def test_damaged_texts_and_labels(remote, web, tmp_path):
    damage(web.folder / MIDDLE, "caption")
    message = "3 attempts failed, the last with: " if remote else "the parquet data are damaged"
    with pytest.raises((ValueError, OSError), match=rf"{MIDDLE}: {message}"):
        opened(urls(web) if remote else web.folder, tmp_path / "cache")


@pytest.mark.parametrize("remote", [True, False])
def test_damaged_row_groups(remote, web, tmp_path):
    damage(web.folder / MIDDLE, "jpg_1")
    data = opened(urls(web) if remote else web.folder, tmp_path / "cache")
    data.train_samples()[0, 0]
    message = "3 attempts failed, the last with: " if remote else "the parquet data are damaged"
    with pytest.raises((ValueError, OSError), match=rf"{MIDDLE}, rows 0 to 3: {message}"):
        data.train_samples()[ROWS, 0]
    assert not list((tmp_path / "cache/images").glob("*.part"))


def test_addresses_where_nothing_is(web, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"/data/none\.parquet': there is no such file"):
        opened(f"{web.url}/data/none.parquet", tmp_path / "cache")
    with pytest.raises(OSError, match=r"3 attempts failed, the last with: Cannot connect to host"):
        opened("http://127.0.0.1:1/a.parquet", tmp_path / "cache")


def test_a_page_instead_of_a_file(web, tmp_path):
    web.faults[MIDDLE] = ["page"]
    with pytest.raises(ValueError, match=rf"{MIDDLE}: not a readable parquet file \(Parquet magic bytes not found"):
        opened(urls(web), tmp_path / "cache")


def test_a_server_that_gives_files_only_as_a_whole(web, tmp_path):
    web.ranges = False
    folder = web.folder / "large"
    folder.mkdir()
    write_parquet(folder / "a.parquet", 30, jpg_0=[encoded(i, "BMP") for i in range(30)])  # more than Arrow's footer
    with pytest.raises(ValueError, match=r"a\.parquet: not a readable parquet file .*must answer range requests"):
        opened(f"{web.url}/large/a.parquet", tmp_path / "cache")


def test_a_connection_that_fails_for_a_moment_is_not_noticed(web, tmp_path):
    web.faults[MIDDLE] = ["cut", "500", ""]
    data = opened(urls(web), tmp_path / "cache")
    web.faults[MIDDLE] = ["500", "cut", ""]
    assert data.train_samples()[ROWS, 0]["id"] == "train-00001-of-00003.parquet:0"


def test_a_file_that_changes_while_training_runs(tmp_path):
    folder = write_files(tmp_path / "data")
    samples = opened(folder, tmp_path / "cache").train_samples()
    write_files(folder, rows=ROWS - 1)
    with pytest.raises(ValueError, match="found 3 rows; the file has changed since the run began"):
        samples[0, 0]


def test_an_unknown_split_lists_the_available_ones(web, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match=r"unknown split 'test'; available: train\. A split is files named test\.parquet"
    ):
        opened(urls(web), tmp_path / "cache", split="test")
    fake_builder(monkeypatch, {"train": ["a.parquet"], "dev": ["b.parquet"]})
    with pytest.raises(ValueError, match=r"'some/mirror': no files of split 'test'; available: train, dev\."):
        opened("some/mirror", tmp_path / "cache", split="test")
    fake_builder(monkeypatch, None)  # what `datasets` finds in its own cache when the network is gone
    with pytest.raises(ValueError, match=r"no files of split 'train'; available: -\."):
        opened("some/mirror", tmp_path / "cache")


def test_an_unknown_subset(tmp_path, monkeypatch):
    real = datasets.load_dataset_builder
    folder = write_files(tmp_path / "data")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _, subset: real(str(folder), subset))
    assert len(opened("some/mirror", tmp_path / "cache").train_samples()) == 3 * ROWS
    with pytest.raises(ValueError, match=r"Hub data set 'some/mirror', split 'train': BuilderConfig 'big' not found"):
        opened("some/mirror", tmp_path / "cache", subset="big")


def test_a_hub_id_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError, match=r"Hub data set 'nobody/nothing', split 'train': .*\n.*path of a downloaded copy"
    ):
        opened("nobody/nothing", tmp_path / "cache")


@pytest.mark.parametrize("files", [["hf://a/0.tar", "hf://a/1.tar"], ["hf://a/0.jsonl", "hf://a/b"]])
def test_hub_data_of_another_format(files, tmp_path, monkeypatch):
    fake_builder(monkeypatch, {"train": files})
    with pytest.raises(
        ValueError, match=r"streaming reads parquet files, found .*(2 \.tar|1 \.jsonl, 1 \(no type\))"
    ) as info:
        opened("some/mirror", tmp_path / "cache")
    assert "hf://datasets/some/mirror@refs%2Fconvert%2Fparquet/" in str(info.value)
    assert "streaming: false" in str(info.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe:cat a.parquet -", "streaming reads parquet files, found"),
        ("s3://bucket/a.parquet", "Install s3fs to access S3"),
        ("http://a/{0..2.parquet", "expected braces as in"),
        ("http://a/0.parquet::http://a/0.parquet", "is named twice"),
    ],
)
def test_addresses_that_cannot_be_streamed(source, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        opened(source, tmp_path / "cache")


def test_local_data_that_are_not_parquet(tmp_path):
    write_jsonl_pairs(tmp_path / "pairs")
    with pytest.raises(ValueError, match=r"pairs: only parquet files are streamed\. Set `data\.init_args\.streaming"):
        opened(tmp_path / "pairs", tmp_path / "cache")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_gb": 1e-6}, r"cache_gb is 1e-06; mixing 2 shards of up to .* GB .* while the next are fetched takes"),
        ({"cache_gb": 0.0}, r"cache_gb is 0\.0; expected gigabytes"),
        ({"shuffle_shards": 0}, r"shuffle_shards is 0; expected 1 or more"),
    ],
)
def test_settings_out_of_range(settings, message, web, tmp_path):
    with pytest.raises(ValueError, match=message):
        opened(urls(web), tmp_path / "cache", **settings)


def test_a_cache_folder_that_cannot_be_written_to(web, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/images: shards cannot be kept here .*`data\.init_args\.cache_dir`"):
        opened(urls(web), tmp_path / "file")
