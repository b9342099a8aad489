"""Preference pairs: labels, noise, ties, the cache, and the way through the ordinary pair data."""

import io
import math
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from datamodules.toy_world import pairs
from datamodules.toy_world.data import HELDOUT_PROMPTS, PIPELINE, ToyPairs
from datamodules.toy_world.oracle import judge
from datamodules.toy_world.pairs import flip_labels, label_pairs, write_pairs
from datamodules.toy_world.scenes import heldout_scenes, train_scenes


def world(tmp_path, **options):
    settings = {"source": "world", "num_pairs": 64, "num_val_pairs": 8, "folder": str(tmp_path)} | options
    return ToyPairs(**settings)


def read(data, split="train"):
    """Columns of the made pairs, and the oracle's scores of their pictures."""
    folder = write_pairs(data.settings, data.folder)
    table = pq.read_table(folder / f"{split}.parquet").to_pydict()
    scores = [judge(torch.stack([decode(png) for png in table[c]]), table["caption"]) for c in ("jpg_0", "jpg_1")]
    return table, scores


def decode(png):
    with Image.open(io.BytesIO(png)) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def test_labels_follow_the_scores():
    scores = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5], [0.50, 0.52]])
    assert label_pairs(scores, tie_margin=0.0).tolist() == [1.0, 0.0, 0.5, 0.0]
    assert label_pairs(scores, tie_margin=0.1).tolist() == [1.0, 0.0, 0.5, 0.5]


def test_label_noise_flips_the_share_that_it_says_and_leaves_ties():
    label_0 = torch.tensor([1.0, 0.0, 0.5])
    assert flip_labels(label_0, 0.0, seed=0).tolist() == [1.0, 0.0, 0.5]
    assert flip_labels(label_0, 1.0, seed=0).tolist() == [0.0, 1.0, 0.5]
    flipped = (flip_labels(torch.ones(4000), 0.3, seed=0) == 0).float().mean().item()
    assert flipped == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / 4000))


@pytest.mark.parametrize("preference", ["vividness", "match", "both"])
def test_the_label_names_the_picture_that_the_oracle_prefers(preference, tmp_path):
    table, (first, second) = read(world(tmp_path, preference=preference))
    advantage = getattr(first, preference) - getattr(second, preference)
    labels = torch.tensor(table["label_0"])
    decided = labels != 0.5
    assert decided.float().mean() > 0.8
    assert torch.equal(advantage[decided] > 0, labels[decided] == 1)
    assert torch.equal(1 - labels, torch.tensor(table["label_1"]))
    assert 0.25 < labels[decided].mean() < 0.75  # neither side is favoured


def test_flipped_labels_prefer_the_other_picture(tmp_path):
    labels = torch.tensor(read(world(tmp_path))[0]["label_0"])
    flipped = torch.tensor(read(world(tmp_path, label_noise=1.0))[0]["label_0"])
    assert torch.equal(flipped, 1 - labels)


def test_validation_labels_have_no_noise(tmp_path):
    data = world(tmp_path, label_noise=1.0)
    table, (first, second) = read(data, "validation")
    assert torch.equal(first.vividness > second.vividness, torch.tensor(table["label_0"]) == 1)


def test_training_pairs_show_training_captions_and_validation_pairs_held_out_ones(tmp_path):
    data = world(tmp_path)
    assert set(read(data)[0]["caption"]) <= {scene.caption for scene in train_scenes()}
    assert set(read(data, "validation")[0]["caption"]) <= {scene.caption for scene in heldout_scenes()}


def test_the_columns_are_those_of_pick_a_pic(tmp_path):
    table, _ = read(world(tmp_path))
    assert {"caption", "jpg_0", "jpg_1", "label_0", "label_1", "are_different", "has_label"} <= set(table)
    assert {"image_0_uid", "image_1_uid", "model_0", "model_1"} <= set(table)


def test_the_same_settings_give_the_same_bytes_and_other_settings_another_folder(tmp_path):
    one, again = read(world(tmp_path / "a"))[0], read(world(tmp_path / "b"))[0]
    assert one == again
    assert read(world(tmp_path, seed=1))[0]["jpg_0"] != one["jpg_0"]
    folders = {world(tmp_path, **o).source for o in ({}, {"seed": 1}, {"label_noise": 0.5}, {"preference": "match"})}
    assert len(folders) == 4


def test_made_pairs_are_not_made_again(tmp_path, monkeypatch):
    data = world(tmp_path)
    write_pairs(data.settings, data.folder)
    monkeypatch.setattr(pairs, "_pictures", None)  # would fail if it were called
    write_pairs(data.settings, data.folder)


def test_an_interrupted_making_is_made_again(tmp_path, monkeypatch):
    data = world(tmp_path)

    def interrupt(file, *_):
        if file.stem == "validation":
            raise KeyboardInterrupt
        write(file, *_)

    write = pairs._write_parquet
    monkeypatch.setattr(pairs, "_write_parquet", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_pairs(data.settings, data.folder)
    monkeypatch.undo()
    assert len(read(data, "validation")[0]["caption"]) == 8


class Look(LightningModule):
    """Keeps the batches that it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = {"train": [], "validate": [], "test": []}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.batches["train"].append(batch)
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.batches["validate"].append(batch)

    def test_step(self, batch, batch_idx):
        self.batches["test"].append(batch)


def test_pairs_arrive_preferred_first_and_ties_are_left_out(tmp_path):
    data = world(tmp_path, preference="match", batch_size=1, num_test_prompts=3)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=tmp_path, max_epochs=1, num_sanity_val_steps=0, **options)
    trainer.fit(module := Look(), data)
    decided = sum(label != 0.5 for label in read(data)[0]["label_0"])
    assert len(module.batches["train"]) == decided
    for batch in module.batches["train"]:
        assert batch["images"].shape == (2, 3, 32, 32)
        preferred, other = judge(batch["images"] / 2 + 0.5, batch["prompts"] * 2).match
        assert preferred > other
    assert len(module.batches["validate"]) > 0
    trainer.test(module, data, verbose=False)
    (batch,) = module.batches["test"]
    assert batch["prompts"] == [scene.caption for scene in heldout_scenes()[:3]]
    assert batch["seeds"] == [0, 1, 2]


def test_the_prompt_files_are_the_captions_of_the_split():
    for name, scenes in (("heldout", heldout_scenes()), ("train", train_scenes())):
        lines = HELDOUT_PROMPTS.with_name(f"{name}.txt").read_text().splitlines()
        assert lines == [scene.caption for scene in scenes]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_noise": 1.5}, "label_noise is 1.5"),
        ({"label_noise": -0.1}, "label_noise is -0.1"),
        ({"tie_margin": 1.0}, "tie_margin is 1.0"),
        ({"num_pairs": 0}, "num_pairs is 0"),
        ({"num_val_pairs": 0}, "num_val_pairs is 0"),
        ({"source": "base", "pipeline": "no/such/folder"}, "no pipeline in 'no/such/folder'"),
    ],
)
def test_impossible_settings_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        world(tmp_path, **options)


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Twelve pairs sampled from the shipped base, in a cache of their own."""
    folder = tmp_path_factory.mktemp("pairs")
    return {"source": "base", "num_pairs": 12, "num_val_pairs": 4, "num_inference_steps": 4, "folder": str(folder)}


def test_pairs_sampled_from_the_base_are_made_and_labelled(sampled):
    table, (first, second) = read(ToyPairs(**sampled))
    labels = torch.tensor(table["label_0"])
    decided = labels != 0.5
    assert torch.equal((first.vividness > second.vividness)[decided], (labels == 1)[decided])
    assert first.vividness.ne(second.vividness).any()  # every picture has noise of its own


def test_preferences_share_the_sampled_pictures(sampled, monkeypatch):
    vividness = read(ToyPairs(**sampled))[0]
    monkeypatch.setattr(pairs, "sample_pictures", None)  # would fail if it were called
    match = read(ToyPairs(**sampled, preference="match", label_noise=0.5, tie_margin=0.1))[0]
    assert match["jpg_0"] == vividness["jpg_0"]
    assert match["label_0"] != vividness["label_0"]


def test_other_weights_mean_other_pairs(sampled, tmp_path):
    shutil.copytree(PIPELINE, tmp_path / "pipeline")
    config = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    same = ToyPairs(**sampled, pipeline=str(tmp_path / "pipeline")).source
    config.write_text(config.read_text().replace("0.012", "0.013"))
    assert ToyPairs(**sampled, pipeline=str(tmp_path / "pipeline")).source != same
