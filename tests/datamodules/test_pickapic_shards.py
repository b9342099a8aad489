import io
import itertools
import json
import logging
import multiprocessing
import pickle
import signal
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from datamodules import tar_index, tar_shards
from datamodules.pickapic import PickAPicDataModule
from datamodules.pickapic_shards import PickAPicShardsDataModule
from datamodules.shard_packing import pack
from datamodules.sources import IMAGE_SUFFIXES
from datamodules.tar_index import PairMembers
from datamodules.transforms import decode_image
from tests.datamodules import test_pickapic_shards
from tests.datamodules.files import encoded, write_parquet
from tests.datamodules.stream import Killed, Recorder, SaveAndDie, quiet_trainer
from tests.datamodules.tars import sample, samples, write_tar
from tests.datamodules.web import Web, serving
from tests.golden_cases import GOLDEN

SHARD = GOLDEN / "diffusion_orpo" / "shard_00000.tar"


def settings_of(source: Any, cache: Path, **settings: Any) -> dict[str, Any]:
    source = source if isinstance(source, list) else str(source)
    small = {"resolution": 16, "horizontal_flip": False, "ties": "keep", "cache_dir": str(cache / "cache")}
    return {"source": source, **small, **settings}


def shards(source: Any, cache: Path, **settings: Any) -> PickAPicShardsDataModule:
    return PickAPicShardsDataModule(**settings_of(source, cache, **settings))


def opened(source: Any, cache: Path, **settings: Any) -> PickAPicShardsDataModule:
    data = shards(source, cache, **settings)
    data.setup("fit")
    return data


def ids(data: PickAPicDataModule) -> list[str]:
    samples = data.train_samples()
    return [samples[i, i]["id"] for i in range(len(samples))]


def pixels(sample: dict[str, Any]) -> torch.Tensor:
    return torch.stack([view.pixels for view in sample["views"]])


class Batches(Recorder):
    """Remembers ids and pixels; its weight is a fingerprint of both."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append(batch["ids"])
        self.write(batch["ids"])
        return self.weight * batch["images"].double().sum() + self.weight**2

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.validated.append(batch["ids"])
        self.write(batch["ids"])


def fit(
    data: PickAPicShardsDataModule,
    checkpoint: Path | None = None,
    killer: SaveAndDie | None = None,
    log: str | None = None,
    **trainer: Any,
) -> Batches:
    module = Batches(log)
    trainer = quiet_trainer(callbacks=[killer] if killer else None, **trainer)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    except Killed:
        assert killer is not None
    return module


# --------------------------------------------------------------------------------------------------------- golden shard


def test_golden_labels_are_honoured_and_both_images_treated_alike(tmp_path):
    golden = load_file(GOLDEN / "diffusion_orpo" / "shard_00000_batch.safetensors")
    data = opened(SHARD, tmp_path, resolution=32, augmentation="joint", ties="drop")
    assert ids(data) == [f"shard_00000.tar:{key}" for key in "0123"]
    batch = data.collate([data.train_samples()[i, 0] for i in range(4)])
    preferred_and_other = torch.cat(batch["images"].chunk(2), dim=1)
    torch.testing.assert_close(preferred_and_other, golden["pixel_values"], rtol=0, atol=0.02)
    assert (preferred_and_other - golden["pixel_values"]).abs().mean() < 1e-3
    assert torch.equal(batch["original_sizes"], golden["original_sizes_hw"].repeat(2, 1))
    assert torch.equal(batch["crops"], golden["crop_top_lefts_yx"].repeat(2, 1))
    assert batch["prompts"][2] == "un café à Paris, été"


def test_golden_ties(tmp_path):
    golden = load_file(GOLDEN / "diffusion_orpo" / "shard_00000_batch.safetensors")
    settings = {"resolution": 32, "augmentation": "joint"}
    first = pixels(opened(SHARD, tmp_path, ties="first", **settings).train_samples()[4, 0])
    torch.testing.assert_close(first.flatten(0, 1), golden["tie_first_image_wins"], rtol=0, atol=0.02)
    torch.testing.assert_close(first.flip(0).flatten(0, 1), golden["tie_second_image_wins"], rtol=0, atol=0.02)
    assert opened(SHARD, tmp_path, ties="keep", **settings).train_samples()[4, 0]["label"] == 0.5


def test_golden_flip(tmp_path):
    golden = load_file(GOLDEN / "diffusion_orpo" / "shard_00000_flipped.safetensors")["pixel_values_flipped"]
    data = opened(SHARD, tmp_path, resolution=32, augmentation="joint", ties="drop", horizontal_flip=True)
    still = opened(SHARD, tmp_path, resolution=32, augmentation="joint", ties="drop").train_samples()
    for i in range(4):
        visits = [pixels(data.train_samples()[i, position]) for position in range(20)]
        flipped = next(visit for visit in visits if not torch.equal(visit, pixels(still[i, 0])))
        torch.testing.assert_close(flipped.flatten(0, 1), golden[i], rtol=0, atol=0.02)


def test_golden_images_decode(tmp_path):
    rows = opened(SHARD, tmp_path)._tables["train"].rows
    golden = load_file(GOLDEN / "diffusion_orpo" / "shard_00000_decoded.safetensors")
    for row, which in itertools.product(range(5), (0, 1)):
        image = np.asarray(decode_image(rows.stored_image(rows.dataset[row][f"image_{which}"]), 8)).astype(int)
        assert np.abs(image - golden[f"{row}.jpg_{which}"].numpy()).max() <= 2


# -------------------------------------------------------------------------------------- the same as other data, exactly


@pytest.mark.parametrize("augmentation", ["separate", "joint"])
def test_parquet_and_tar_give_identical_tensors(augmentation, tmp_path):
    source = write_parquet(
        tmp_path / "train.parquet", 7, jpg_1=[encoded(i, "PNG", 50 + i, 40) for i in range(7)], has_label=[True] * 7
    )
    pack(str(source), tmp_path / "tars", samples_per_shard=3, num_workers=1)
    settings = {"resolution": 24, "augmentation": augmentation, "random_crop": True, "horizontal_flip": True}
    parquet = PickAPicDataModule(str(source), ties="keep", **settings)
    parquet.setup("fit")
    expected = parquet.train_samples()
    actual = opened(tmp_path / "tars/*.tar", tmp_path, require_label=True, **settings).train_samples()
    assert len(actual) == len(expected) == 7
    for i, position in itertools.product(range(7), (0, 5, 9)):
        one, other = expected[i, position], actual[i, position]
        assert torch.equal(pixels(one), pixels(other))
        assert (one["prompt"], one["label"]) == (other["prompt"], other["label"])
        assert [view[1:] for view in one["views"]] == [view[1:] for view in other["views"]]


def test_filters_ask_the_metadata(tmp_path):
    about = [b'{"has_label": true, "model_0": "dreamlike", "model_1": "a dream"}', b'{"has_label": false}', None]
    members = {k: v for i, json in enumerate(about) for k, v in sample(str(i), 0, json=json).items()}
    tar = write_tar(tmp_path / "a.tar", members)
    assert ids(opened(tar, tmp_path)) == ["a.tar:0", "a.tar:1", "a.tar:2"]
    assert ids(opened(tar, tmp_path, require_label=True)) == ["a.tar:0"]
    assert ids(opened(tar, tmp_path, dreamlike_pairs_only=True)) == ["a.tar:0"]


def test_without_a_vote_nothing_else_is_asked_of_a_sample(tmp_path):
    members = sample("0") | sample("1", json=b'{"has_label": false}', label_0__txt=b"nan", jpg_1__jpg=None)
    tar = write_tar(tmp_path / "a.tar", members | sample("2", json=b'{"has_label": true}'))
    with pytest.raises(ValueError, match="key '1'"):
        opened(tar, tmp_path)
    assert ids(opened(tar, tmp_path, require_label=True)) == ["a.tar:2"]


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_images_of_every_format(suffix, tmp_path):
    members = sample("0", 2, jpg_0__jpg=None) | {f"0.jpg_0{suffix}": encoded(3, Image.registered_extensions()[suffix])}
    view = opened(write_tar(tmp_path / "a.tar", members), tmp_path).train_samples()[0, 0]["views"][0]
    assert view.original_size == (56, 40)


def test_members_of_other_names(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"x.txt": b"a cat", "x.win.png": encoded(0, "PNG"), "x.lose.jpg": encoded(1)})
    members = PairMembers(caption="txt", image_0="win", image_1="lose.jpg", label_0=None, label_1=None)
    sample = opened(tar, tmp_path, members=members).train_samples()[0, 0]
    assert (sample["prompt"], sample["label"], sample["id"]) == ("a cat", 1.0, "a.tar:x")


@pytest.mark.parametrize("format", ["pax", "gnu"])
def test_tars_of_other_programs(format, tmp_path):
    """Long and foreign names, times with fractions, folders, files that are no samples, members not in a row."""
    key = "some/folder/" + "ö" * 120
    members = {
        **samples(2),
        **sample(f"{key}_2", 2),
        **sample("./3", 3),
        "README": b"no dot",
        "._4.jpg_0.jpg": b"a Mac's",
    }
    names = sorted(members, key=lambda name: name.rsplit(".", 2)[1:])  # all captions, all first images, ...
    code = tarfile.PAX_FORMAT if format == "pax" else tarfile.GNU_FORMAT
    with tarfile.open(tmp_path / "a.tar", "w", format=code) as file:
        folder = tarfile.TarInfo("some/folder")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
        for name in names:
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(members[name]), 1700000000.25
            file.addfile(header, io.BytesIO(members[name]))
    data = opened(tmp_path / "a.tar", tmp_path)
    assert sorted(ids(data)) == sorted(["a.tar:0", "a.tar:1", f"a.tar:{key}_2", "a.tar:./3"])
    captions = {sample["id"]: sample["prompt"] for sample in map(data.train_samples().__getitem__, range(4))}
    assert captions[f"a.tar:{key}_2"] == "caption 2"


def test_webdataset_reads_what_we_pack(tmp_path):
    wds = pytest.importorskip("webdataset", reason="only this test needs the package")
    columns = {"jpg_1": [encoded(i, "PNG") for i in range(4)], "ranking_id": [10, 11, 12, 13]}
    source = write_parquet(tmp_path / "train.parquet", 4, **columns)
    pack(str(source), tmp_path / "tars", samples_per_shard=3, num_workers=1)
    tars = sorted(map(str, (tmp_path / "tars").glob("*.tar")))
    found = list(wds.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert [sample["original_prompt.txt"] for sample in found] == [f"caption {i}" for i in range(4)]
    assert [float(sample["label_0.txt"]) for sample in found] == [0.0, 0.5, 1.0, 0.0]
    assert [sample["json"]["ranking_id"] for sample in found] == [10, 11, 12, 13]
    raw = list(wds.WebDataset(tars, shardshuffle=False))
    assert [sample["jpg_0.jpg"] for sample in raw] == [encoded(2 * i) for i in range(4)]
    assert [sample["jpg_1.png"] for sample in raw] == columns["jpg_1"]


def test_we_read_what_webdataset_writes(tmp_path):
    wds = pytest.importorskip("webdataset", reason="only this test needs the package")
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(3):
            content = {name.split(".", 1)[1]: content for name, content in sample(str(i), i).items()}
            writer.write({"__key__": f"{i:06d}", **content})
    assert ids(opened(tmp_path / "a.tar", tmp_path)) == [f"a.tar:{i:06d}" for i in range(3)]


# --------------------------------------------------------------------------------------------------- order and resuming


def unequal(folder: Path, *numbers: int) -> str:
    for shard, number in enumerate(numbers):
        members = {f"{shard}-{name}": content for name, content in samples(number).items()}
        write_tar(folder / f"{shard:05d}.tar", members)
    return str(folder / f"{{00000..{len(numbers) - 1:05d}}}.tar")


def test_a_pass_shows_every_sample_once_and_mixes_few_shards_at_a_time(tmp_path):
    source = unequal(tmp_path / "tars", 4, 1, 6, 0, 3, 5, 2)
    seen = [id for batch in fit(shards(source, tmp_path, shuffle_shards=2), max_epochs=2).seen for id in batch]
    first, second = seen[:21], seen[21:]
    assert sorted(first) == sorted(second) == sorted(ids(opened(source, tmp_path)))
    assert first != second
    for order in (first, second):
        visited = [id.split(".")[0] for id in order]
        groups = []
        while visited:
            group = []
            while visited and len({*group, visited[0]}) <= 2:
                group.append(visited.pop(0))
            assert not {*group} & {*visited}  # nothing of these shards comes later
            groups.append(sorted(set(group)))
        assert len(groups) == 3
    assert fit(shards(source, tmp_path, shuffle_shards=2), max_epochs=2).seen == [[id] for id in seen]


def test_only_few_shards_are_open(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.tar_shards.OPEN_SHARDS", 2)
    data = opened(unequal(tmp_path / "tars", 2, 2, 2), tmp_path)
    rows, samples = data._tables["train"].rows, data.train_samples()
    for number in (0, 2, 4, 0, 5):
        samples[number, 0]
        assert len(rows._files) <= 2


def test_rows_go_to_other_processes_by_pickling(tmp_path):
    samples_ = opened(unequal(tmp_path / "tars", 2, 1), tmp_path).train_samples()
    expected = pixels(samples_[2, 0])
    assert torch.equal(pixels(pickle.loads(pickle.dumps(samples_))[2, 0]), expected)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_after_any_batch_continues_the_uninterrupted_run(num_workers, tmp_path):
    source = unequal(tmp_path / "tars", 3, 1, 5, 2)
    settings = {"batch_size": 2, "num_workers": num_workers, "shuffle_shards": 2, "horizontal_flip": True}
    options = {"max_epochs": 3, "accumulate_grad_batches": 1}
    whole = fit(shards(source, tmp_path, **settings), **options)
    assert len(whole.seen) == 15
    for number in range(1, 15) if num_workers == 0 else (3, 5, 8):
        checkpoint = tmp_path / f"{number}.ckpt"
        killed = fit(
            shards(source, tmp_path, **settings), None, SaveAndDie("on_train_batch_end", number, checkpoint), **options
        )
        resumed = fit(shards(source, tmp_path, **settings), checkpoint, **options)
        assert killed.seen + resumed.seen == whole.seen
        assert torch.equal(resumed.weight, whole.weight)


def test_other_shards_or_another_mixture_cannot_be_continued(tmp_path):
    source, other = unequal(tmp_path / "a", 3, 4), unequal(tmp_path / "b", 4, 3)
    checkpoint = tmp_path / "c.ckpt"
    fit(shards(source, tmp_path), None, SaveAndDie("on_train_batch_end", 2, checkpoint), max_epochs=1)
    for data in (shards(other, tmp_path), shards(source, tmp_path, shuffle_shards=1)):
        with pytest.raises(ValueError, match="other files, or in another order of shards"):
            fit(data, checkpoint, max_epochs=1)
    (tmp_path / "a").rename(tmp_path / "moved")  # the same shards elsewhere
    moved = str(tmp_path / "moved/*.tar")
    assert len(fit(shards(moved, tmp_path), checkpoint, max_epochs=1).seen) == 5


class SaveAt(pl.Callback):
    """Writes a checkpoint after so many batches and goes on."""

    def __init__(self, number: int, path: str) -> None:
        self.number, self.path = number, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.processed == self.number:
            trainer.save_checkpoint(self.path)


def run_process(options: dict[str, Any]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # loader workers die with this process, as in a user's run
    callback = SaveAndDie(**options["kill"], hard=True) if "kill" in options else None
    callback = SaveAt(**options["save"]) if "save" in options else callback
    data = PickAPicShardsDataModule(**options["data"])
    module = fit(data, options.get("checkpoint"), callback, options["log"], **options["trainer"])
    Path(options["log"] + ".weight").write_text(repr(module.weight.item()))


def run(folder: Path, expect: int = 0, **options: Any) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.datamodules.test_pickapic_shards"])
    process = context.Process(target=test_pickapic_shards.run_process, args=({"log": str(folder / "log"), **options},))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == expect


def read_log(folder: Path, rank: int = 0) -> list[list[str]]:
    return [json.loads(line) for line in (folder / f"log.{rank}").read_text().splitlines()]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_process_is_continued_exactly(num_workers, tmp_path):
    settings = settings_of(unequal(tmp_path / "tars", 3, 1, 5), tmp_path, batch_size=2, num_workers=num_workers)
    trainer = {"max_steps": 9}
    whole = fit(PickAPicShardsDataModule(**settings), **trainer)
    kill = {"hook": "on_train_batch_end", "number": 6, "path": str(tmp_path / "c.ckpt")}
    run(tmp_path, expect=-signal.SIGKILL, kill=kill, data=settings, trainer=trainer)
    assert read_log(tmp_path) == whole.seen[:6]
    run(tmp_path, checkpoint=kill["path"], data=settings, trainer=trainer)
    assert read_log(tmp_path) == whole.seen
    assert (tmp_path / "log.weight").read_text() == repr(whole.weight.item())


@pytest.mark.parametrize("numbers", [(1, 7, 2), (10,)], ids=["unequal shards", "fewer shards than ranks and workers"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_two_ranks_equal_one_with_twice_the_accumulation_and_resume(num_workers, numbers, tmp_path):
    settings = settings_of(unequal(tmp_path / "tars", *numbers), tmp_path, batch_size=2, num_workers=num_workers)
    ranks = {"strategy": "ddp_fork", "devices": 2, "max_steps": 5}
    save = {"number": 3, "path": str(tmp_path / "c.ckpt")}
    whole = fit(PickAPicShardsDataModule(**settings), max_steps=5, accumulate_grad_batches=2)
    for folder, more in ((tmp_path / "first", {"save": save}), (tmp_path / "resumed", {"checkpoint": save["path"]})):
        folder.mkdir()
        run(folder, data=settings, trainer=ranks, **more)
        for rank in (0, 1):
            assert read_log(folder, rank) == whole.seen[rank::2][0 if "save" in more else 3 :]
    assert (tmp_path / "first/log.weight").read_text() == (tmp_path / "resumed/log.weight").read_text()


def test_validation_keeps_the_last_partial_batch(tmp_path):
    train, held_out = unequal(tmp_path / "a", 3), unequal(tmp_path / "b", 2, 3)
    data = shards(train, tmp_path, validation_source=[held_out], batch_size=2)
    module = Batches()
    quiet_trainer(limit_val_batches=1.0).validate(module, data, verbose=False)
    names = [f"00000.tar:0-{i}" for i in range(2)] + [f"00001.tar:1-{i}" for i in range(3)]
    assert module.validated == [names[:2], names[2:4], names[4:]]
    assert "b/{00000..00001}.tar'], split 'validation': 5 of 5 rows" in data._tables["validation"].summary


# ------------------------------------------------------------------------------------------------------ shards far away


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as web:
        yield web


def test_shards_behind_urls_are_the_same_as_here(web, tmp_path):
    local = unequal(web.folder, 3, 1, 2)
    expected = fit(shards(local, tmp_path / "here"), max_epochs=2)
    actual = fit(shards(f"{web.url}/{{00000..00002}}.tar", tmp_path / "far", num_workers=1), max_epochs=2)
    assert actual.seen == expected.seen
    assert torch.equal(actual.weight, expected.weight)
    assert [web.count(f"0000{i}.tar") for i in range(3)] == [1, 1, 1]  # indexing included
    fit(shards(f"{web.url}/{{00000..00002}}.tar", tmp_path / "far"), max_epochs=1)
    assert [web.count(f"0000{i}.tar") for i in range(3)] == [1, 1, 1]


def test_with_an_index_beside_it_a_shard_is_not_read_before_training(web, tmp_path):
    source = write_parquet(tmp_path / "train.parquet", 5)
    pack(str(source), web.folder, samples_per_shard=2, num_workers=1)
    data = opened(f"{web.url}/train-{{00000..00002}}.tar", tmp_path)
    assert [web.count(f"train-0000{i}.tar") for i in range(3)] == [0, 0, 0]
    assert data.train_samples()[4, 0]["id"] == "train-00002.tar:train-00000-0000004"
    assert [web.count(f"train-0000{i}.tar") for i in range(3)] == [0, 0, 1]


def test_a_download_that_fails_for_a_moment_changes_nothing(web, tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.shard_cache.PAUSES", (0.0, 0.0))
    local = unequal(web.folder, 3, 2)
    web.faults |= {"00000.tar": ["500", "cut", ""], "00001.tar": ["cut", ""]}
    far = fit(shards(f"{web.url}/{{00000..00001}}.tar", tmp_path / "far"), max_epochs=1)
    assert far.seen == fit(shards(local, tmp_path / "here"), max_epochs=1).seen


def test_a_cache_smaller_than_the_shards(web, tmp_path):
    local = unequal(web.folder, *[2] * 6)
    size = (web.folder / "00000.tar").stat().st_size
    settings = {"shuffle_shards": 1, "horizontal_flip": True}
    expected = fit(shards(local, tmp_path / "here", **settings), max_epochs=2)
    data = shards(f"{web.url}/{{00000..00005}}.tar", tmp_path / "far", cache_gb=2.5 * size / 1e9, **settings)
    assert fit(data, max_epochs=2).seen == expected.seen
    assert sum(file.stat().st_size for file in (tmp_path / "far/cache").glob("*.shard")) <= 2.5 * size


def test_a_command_and_other_protocols_bring_shards(tmp_path):
    local = unequal(tmp_path / "tars", 2, 3)
    expected = fit(shards(local, tmp_path), max_epochs=1).seen
    memory = fsspec.filesystem("memory")
    for file in (tmp_path / "tars").iterdir():
        memory.pipe(f"/{tmp_path.name}/{file.name}", file.read_bytes())
    for source in (
        f"pipe:cat {local}",
        f"pipe:cat {tmp_path}/tars/00000.tar::pipe:cat {tmp_path}/tars/00001.tar | head -c 1000000",
        f"memory://{tmp_path.name}/{{00000..00001}}.tar",
        f"memory://{tmp_path.name}/*.tar",
        f"file://{local}",
        [f"file://{tmp_path}/tars/00000.tar", f"{tmp_path}/tars/00001.tar"],
    ):
        assert fit(shards(source, tmp_path, allow_shell_pipes=True), max_epochs=1).seen == expected


def test_indices_are_read_once_and_made_anew_when_a_shard_changes(tmp_path, monkeypatch):
    tar = write_tar(tmp_path / "a.tar", samples(2))
    read = []
    monkeypatch.setattr(tar_shards, "index_tar", lambda *args: read.append(args) or tar_index.index_tar(*args))
    for _ in range(2):
        assert len(opened(tar, tmp_path).train_samples()) == 2
    assert len(read) == 1
    write_tar(tar, samples(3))
    assert len(opened(tar, tmp_path).train_samples()) == 3


def test_images_verified_once_are_not_decoded_again(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    tar = write_tar(tmp_path / "a.tar", samples(3) | sample("3", jpg_1__jpg=b"\xff\xd8\xffno image"))
    with pytest.raises(ValueError, match=r"a\.tar', key '3': 'image_1' is not an image of a known format"):
        opened(tar, tmp_path, verify_images=True)
    assert ids(opened(tar, tmp_path, verify_images=True, on_bad_row="drop")) == [f"a.tar:{i}" for i in range(3)]
    assert "3 of 4 rows; left out: 1 with a damaged image" in caplog.text
    assert len(list((tmp_path / "cache/index").glob("cache-*.arrow"))) == 1
