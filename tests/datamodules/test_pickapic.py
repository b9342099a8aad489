import logging
from pathlib import Path

import datasets
import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pytest
import torch

from datamodules.pickapic import PairColumns, PickAPicDataModule, both_dreamlike, collate_pairs
from datamodules.prompts import PromptList
from datamodules.transforms import decode_image, view_image
from tests.datamodules.files import (
    encoded,
    picture,
    write_jsonl,
    write_jsonl_pairs,
    write_pair_folder,
    write_parquet,
)
from tests.datamodules.stream import Recorder, quiet_trainer
from tests.golden_cases import assert_golden, load_case


def opened(source: Path | str, **settings) -> PickAPicDataModule:
    data = PickAPicDataModule(str(source), **{"resolution": 32, "horizontal_flip": False, **settings})
    data.setup("fit")
    return data


def ids(data: PickAPicDataModule) -> list[str]:
    samples = data.train_samples()
    return [samples[i, i]["id"] for i in range(len(samples))]


def view(image) -> torch.Tensor:
    return view_image(image, 32, False, False, np.random.default_rng(0)).pixels


class Batches(Recorder):
    """Keeps the whole batches."""

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight**2


def first_batches(data: pl.LightningDataModule, **trainer) -> list:
    module = Batches()
    quiet_trainer(**{"max_steps": 2, **trainer}).fit(module, data)
    return module.seen


def test_a_batch_of_pairs_has_the_preferred_images_first(tmp_path):
    data = PickAPicDataModule(str(write_parquet(tmp_path / "train.parquet", 3)), resolution=32, batch_size=2)
    data.horizontal_flip = False
    batch = first_batches(data)[0]
    assert set(batch) == {"images", "prompts", "label", "weight", "original_sizes", "crops", "ids"}
    assert batch["images"].shape == (4, 3, 32, 32)
    assert batch["images"].dtype == torch.float32
    assert sorted(batch["ids"]) == ["train.parquet:0", "train.parquet:2"]  # row 1 is a tie
    # Of row 0 the second image is preferred, of row 2 the first.
    first = batch["ids"].index("train.parquet:0")
    assert batch["prompts"][first] == "caption 0"
    for place, seed in ((first, 1), (2 + first, 0), (1 - first, 4), (3 - first, 5)):
        assert torch.equal(batch["images"][place], view(decode_image(encoded(seed), 32)))
    assert batch["label"].tolist() == batch["weight"].tolist() == [1.0, 1.0]
    assert batch["label"].dtype == torch.float32
    assert batch["original_sizes"].tolist() == [[56, 40]] * 4
    assert batch["crops"].tolist() == [[6, 0]] * 4
    assert batch["crops"].dtype == batch["original_sizes"].dtype == torch.int64


def test_golden_label_filter(tmp_path):
    tensors, params = load_case("diffusion_dpo", "label_filter")
    number = len(tensors["label_0"])
    models = {"model_0": params["model_0"], "model_1": params["model_1"]}
    file = write_parquet(tmp_path / "train.parquet", number, label_0=tensors["label_0"].tolist(), **models)
    kept = opened(file)._tables["train"].index
    dreamlike = opened(file, dreamlike_pairs_only=True)._tables["train"].index
    assert_golden(
        "diffusion_dpo", "label_filter", kept_rows=torch.tensor(kept), kept_rows_dreamlike=torch.tensor(dreamlike)
    )


def test_dreamlike_is_in_lower_case_and_in_both_names():
    models = (
        pa.chunked_array([["dreamlike", "Dream", None, "dream"]]),
        pa.chunked_array([["a dream", "dream", "dream", ""]]),
    )
    assert both_dreamlike(*models).tolist() == [True, False, False, False]


def test_ties_are_dropped_or_won_by_the_first_or_kept(tmp_path):
    file = write_parquet(tmp_path / "train.parquet", 3)
    samples = {ties: opened(file, ties=ties).train_samples() for ties in ("drop", "first", "keep")}
    assert [len(samples[ties]) for ties in ("drop", "first", "keep")] == [2, 3, 3]
    for ties, label in (("first", 1.0), ("keep", 0.5)):
        batch = collate_pairs([samples[ties][1, 0]])
        assert batch["label"].tolist() == [label]
        assert torch.equal(batch["images"][0], view(decode_image(encoded(2), 32)))
        assert collate_pairs([samples[ties][0, 0]])["label"].tolist() == [1.0]


def test_a_coin_decides_ties_anew_at_every_visit(tmp_path):
    file = write_parquet(tmp_path / "train.parquet", 40, label_0=[0.5] * 20 + [1.0, 0.0] * 10)
    samples = opened(file, ties="coin").train_samples()

    def first(key) -> int:
        """Which image is shown as the preferred one."""
        row = key[0] if isinstance(key, tuple) else key
        sample = samples[key]
        assert sample["label"] == 1.0
        sides = [torch.equal(sample["views"][0].pixels, view(decode_image(encoded(2 * row + i), 32))) for i in (0, 1)]
        return sides.index(True)

    tosses = [first((3, position)) for position in range(40)]
    assert 10 <= sum(tosses) <= 30
    assert tosses == [first((3, position)) for position in range(40)]
    assert [first((row, 7)) for row in range(20, 40)] == [0, 1] * 10
    # In validation a tie is decided once, and not by the seed of the run.
    shown = [first(row) for row in range(20)]
    assert 3 <= sum(shown) <= 17
    samples.seed = 5
    assert shown == [first(row) for row in range(20)]


def test_label_noise_turns_the_same_labels_at_every_visit_and_none_in_validation(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"{split}.parquet", 200, label_0=[1.0, 0.0, 0.5, 1.0] * 50)
    options = {"ties": "keep", "validation_split": "validation", "preferred_only": True}
    clean, noisy = (opened(tmp_path, label_noise=noise, **options) for noise in (0.0, 0.3))
    before, after = clean.train_samples().table.label_0, noisy.train_samples().table.label_0
    turned = before != after
    assert 0.2 < turned.mean() / 0.75 < 0.4
    assert set(before[turned] + after[turned]) == {1.0}  # of ties nothing changes
    assert f"label_noise: {turned.sum()} of 200 labels are turned" in caplog.text
    assert noisy.val_samples().table.label_0.tolist() == clean.val_samples().table.label_0.tolist()
    # Which labels are turned depends on the row alone, not on what else takes part.
    fewer = opened(tmp_path, label_noise=0.3, max_train_samples=20, **options).train_samples().table
    assert fewer.label_0.tolist() == after[fewer.index].tolist()
    assert all(opened(tmp_path, label_noise=1.0, **options).train_samples().table.label_0 == 1.0 - before)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert (opened(tmp_path, label_noise=0.3, **options).train_samples().table.label_0 != after).any()


def test_what_is_left_out_is_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = write_parquet(
        tmp_path / "train.parquet",
        6,
        label_0=[1.0, 0.5, float("nan"), 0.0, 1.0, 1.0],
        caption=["a", "b", "c", " ", "e", "f"],
        has_label=[True, True, True, True, True, False],
    )
    assert ids(opened(file, on_bad_row="drop", require_label=True)) == ["train.parquet:0", "train.parquet:4"]
    assert (
        "2 of 6 rows; left out: 1 without a vote, 1 with an impossible label, 1 ties, 1 without a caption"
        in caplog.text
    )


def test_rows_without_a_vote_stay_unless_votes_are_required(tmp_path):
    file = write_parquet(tmp_path / "train.parquet", 3, label_0=[1.0, 0.0, None], has_label=[True, False, False])
    with pytest.raises(ValueError, match=r"row 2: 'label_0' is nan.*require_label: true"):
        opened(file)
    assert ids(opened(file, require_label=True)) == ["train.parquet:0"]
    assert ids(opened(file, on_bad_row="drop")) == ["train.parquet:0", "train.parquet:1"]


def test_preferred_only_gives_captioned_images(tmp_path):
    data = PickAPicDataModule(
        str(write_parquet(tmp_path / "train.parquet", 3)), 32, batch_size=2, preferred_only=True, horizontal_flip=False
    )
    batch = first_batches(data)[0]
    assert set(batch) == {"images", "prompts", "original_sizes", "crops", "ids"}
    first = batch["ids"].index("train.parquet:0")
    assert torch.equal(batch["images"][first], view(decode_image(encoded(1), 32)))
    assert torch.equal(batch["images"][1 - first], view(decode_image(encoded(4), 32)))


def test_preferred_only_decodes_no_other_image(tmp_path):
    file = write_parquet(tmp_path / "train.parquet", 1, jpg_0=[b"damaged"])
    assert opened(file, preferred_only=True).train_samples()[0, 0]["id"] == "train.parquet:0"


def test_plain_captioned_images(tmp_path):
    records = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(3)]
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    file = write_jsonl(tmp_path / "metadata.jsonl", records)
    columns = PairColumns(caption="text", image="file_name")
    sample = opened(file, preferred_only=True, columns=columns).train_samples()[2, 0]
    assert (sample["prompt"], sample["id"]) == ("caption 2", "metadata.jsonl:3")
    assert torch.equal(sample["views"][0].pixels, view(picture(2)))
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"caption {i}")
    file.unlink()
    assert opened(tmp_path, preferred_only=True).train_samples()[1, 0]["prompt"] == "caption 1"


def test_columns_are_mapped_and_a_missing_label_means_that_the_first_is_preferred(tmp_path):
    table = {"prompt": ["a", "b"], "chosen": [encoded(0), encoded(2)], "rejected": [encoded(1), encoded(3)]}
    datasets.Dataset.from_dict(table).to_parquet(tmp_path / "pairs.parquet")
    columns = PairColumns(caption="prompt", image_0="chosen", image_1="rejected", label_0=None)
    sample = opened(tmp_path, columns=columns).train_samples()[1, 0]
    assert sample["prompt"] == "b"
    assert torch.equal(sample["views"][0].pixels, view(decode_image(encoded(2), 32)))


def test_image_columns_of_the_hub_are_read(tmp_path):
    table = {"caption": ["a"], "jpg_0": [picture(0)], "jpg_1": [picture(1)], "label_0": [1]}
    features = datasets.Features(
        caption=datasets.Value("string"),
        jpg_0=datasets.Image(),
        jpg_1=datasets.Image(),
        label_0=datasets.Value("int32"),
    )
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    sample = opened(tmp_path).train_samples()[0, 0]
    assert torch.equal(sample["views"][1].pixels, view(picture(1)))


def test_one_of_several_captions_is_drawn_at_every_visit_and_the_first_in_validation(tmp_path):
    captions = [["x", "y", "z"], ["only"]]
    file = write_parquet(tmp_path / "train.parquet", 2, caption=captions, label_0=[1.0, 0.0])
    samples = opened(file).train_samples()
    assert {samples[0, position]["prompt"] for position in range(30)} == {"x", "y", "z"}
    assert samples[0, 7]["prompt"] == samples[0, 7]["prompt"]
    assert samples[0]["prompt"] == "x"


def test_a_visit_is_a_function_of_seed_and_position(tmp_path, monkeypatch):
    file = write_parquet(tmp_path / "train.parquet", 3)
    settings = {"random_crop": True, "horizontal_flip": True}
    samples = opened(file, **settings).train_samples()
    again = opened(file, **settings).train_samples()
    torch.manual_seed(99)
    np.random.seed(99)
    pixels = [collate_pairs([samples[0, position]])["images"] for position in range(6)]
    assert all(torch.equal(collate_pairs([again[0, position]])["images"], pixels[position]) for position in range(6))
    assert len({images.sum().item() for images in pixels}) > 3
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    other = opened(file, **settings).train_samples()
    assert any(not torch.equal(collate_pairs([other[0, p]])["images"], pixels[p]) for p in range(6))


def test_max_train_samples_is_a_seeded_draw_and_max_val_samples_a_fixed_one(tmp_path, monkeypatch):
    folder = tmp_path / "data"
    for split in ("train", "validation"):
        write_parquet(folder / f"{split}.parquet", 40, label_0=[1.0] * 40)
    settings = {"max_train_samples": 10, "validation_split": "validation", "max_val_samples": 5, "batch_size": 5}
    drawn = {}
    for seed in ("1", "2"):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        data = opened(folder, **settings)
        module = Batches()
        quiet_trainer(max_epochs=1, limit_val_batches=1.0).fit(module, data)
        drawn[seed] = ids(data), module.validated[0]["ids"]
        assert len(set(drawn[seed][0])) == 10
    assert drawn["1"][0] != drawn["2"][0]
    assert drawn["1"][1] == drawn["2"][1]


@pytest.mark.parametrize(
    "names", [("a.parquet", "b.parquet"), ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet")]
)
def test_a_folder_of_parquet_files_is_one_table(names, tmp_path):
    folder = tmp_path / "odd [name] *"
    write_parquet(folder / "data" / names[0], 3, label_0=[1.0] * 3)
    write_parquet(folder / "data" / names[1], 2, label_0=[1.0] * 2, caption=["x", "y"])
    data = opened(folder)
    assert ids(data) == [f"{names[0]}:{i}" for i in range(3)] + [f"{names[1]}:{i}" for i in range(2)]
    assert data.train_samples()[4, 0]["prompt"] == "y"


def test_a_glob_names_parquet_files(tmp_path):
    for name in ("a", "b", "c"):
        write_parquet(tmp_path / f"{name}.parquet", 1, label_0=[1.0])
    assert ids(opened(tmp_path / "[ac].parquet")) == ["a.parquet:0", "c.parquet:0"]


def test_splits_are_files_or_folders(tmp_path):
    files, folders = tmp_path / "files", tmp_path / "folders"
    write_parquet(files / "train-00000.parquet", 1, label_0=[1.0])
    write_parquet(files / "validation_unique-00000.parquet", 1, label_0=[1.0])
    write_jsonl_pairs(folders / "train")
    write_jsonl_pairs(folders / "test", num_rows=2)
    assert ids(opened(files)) == ["train-00000.parquet:0"]
    assert ids(opened(files, split="validation_unique")) == ["validation_unique-00000.parquet:0"]
    assert len(ids(opened(folders))) == 4
    assert len(ids(opened(folders, split="test"))) == 2


def test_jsonl_names_images_beside_it(tmp_path):
    file = write_jsonl_pairs(tmp_path)
    for source in (file, tmp_path):
        data = opened(source)
        assert ids(data) == [f"pairs.jsonl:{line}" for line in (1, 2, 3, 4)]
        assert torch.equal(data.train_samples()[1, 0]["views"][0].pixels, view(picture(2)))
        assert torch.equal(data.train_samples()[2, 0]["views"][0].pixels, view(picture(5)))


def test_a_folder_of_pairs(tmp_path):
    data = opened(write_pair_folder(tmp_path / "pairs"))
    sample = data.train_samples()[1, 0]
    assert sample["prompt"] == "a dog"
    assert torch.equal(sample["views"][0].pixels, view(picture(2)))
    assert torch.equal(sample["views"][1].pixels, view(picture(3)))
    assert ids(data) == ["cat:0", "dog:0"]


def test_verify_images_leaves_out_what_does_not_decode(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    images = [encoded(i) for i in range(4)]
    images[1], images[3] = images[1][:200], b"nothing"
    file = write_parquet(tmp_path / "train.parquet", 4, label_0=[1.0] * 4, jpg_0=images)
    with pytest.raises(
        ValueError, match=r"train.parquet, row 1: 'jpg_0' is a damaged image.*2 of 4 rows are like this"
    ):
        opened(file, verify_images=True)
    data = opened(file, verify_images=True, on_bad_row="drop")
    assert ids(data) == ["train.parquet:0", "train.parquet:2"]
    assert "2 of 4 rows; left out: 2 with a damaged image" in caplog.text


def test_validation_is_neither_cropped_nor_flipped_at_random(tmp_path):
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"{split}.parquet", 3)
    data = PickAPicDataModule(
        str(tmp_path), 32, batch_size=2, random_crop=True, horizontal_flip=True, validation_split="validation"
    )
    module = Batches()
    quiet_trainer(limit_val_batches=1.0).validate(module, data, verbose=False)
    assert torch.equal(module.validated[0]["images"][0], view(decode_image(encoded(1), 32)))
    assert module.validated[0]["ids"] == ["validation.parquet:0", "validation.parquet:2"]


def test_validation_reads_no_training_data(tmp_path):
    write_parquet(tmp_path / "train.parquet", 3, label_0=[7.0] * 3)
    write_parquet(tmp_path / "validation.parquet", 3)
    data = PickAPicDataModule(str(tmp_path), 32, validation_split="validation")
    quiet_trainer(limit_val_batches=1.0).validate(Batches(), data, verbose=False)


def test_prompts_for_test_and_predict(tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")
    data = PickAPicDataModule("no/where", test_prompts=PromptList(str(tmp_path / "prompts.txt"), seed=5, batch_size=2))
    for run in ("test", "predict"):
        module = Batches()
        getattr(quiet_trainer(), run)(module, data)
        assert module.validated == [
            {"prompts": ["a", "b"], "seeds": [5, 6], "index": [0, 1]},
            {"prompts": ["c"], "seeds": [7], "index": [2]},
        ]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_do_not_depend_on_workers(num_workers, tmp_path):
    file = write_parquet(tmp_path / "train.parquet", 6)
    settings = {"resolution": 32, "batch_size": 2, "random_crop": True}
    expected = first_batches(PickAPicDataModule(str(file), **settings), max_steps=5)
    actual = first_batches(PickAPicDataModule(str(file), num_workers=num_workers, **settings), max_steps=5)
    for one, other in zip(expected, actual, strict=True):
        assert one["ids"] == other["ids"]
        assert torch.equal(one["images"], other["images"])


def test_a_hub_id_is_loaded_through_datasets(tmp_path, monkeypatch):
    rows = datasets.Dataset.from_parquet(str(write_parquet(tmp_path / "rows.parquet", 3)))
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return rows

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = opened("some/mirror", split="validation", subset="big")
    assert asked == [(("some/mirror", "big"), {"split": "validation"})]
    assert ids(data) == ["mirror[validation]:0", "mirror[validation]:2"]
