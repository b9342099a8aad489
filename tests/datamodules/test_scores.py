"""Scores computed once, and training on the labels that follow from them."""

import json
import logging
import shutil
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from datamodules.pickapic import PairColumns
from datamodules.pickapic_shards import PickAPicShardsDataModule
from datamodules.scores import Scores, labels_of
from datamodules.toy_world.data import ToyPairs
from datamodules.transforms import decode_image
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.cli.caching import CachingTrainer
from lightning_modules.diffusion_sft import DiffusionSFT
from lightning_modules.rewards.clip import CLIPScore
from lightning_modules.rewards.combine import WeightedSum
from lightning_modules.rewards.toy_oracle import ToyOracle
from tests.datamodules.caches import QUIET, dpo, fill, pairs, train
from tests.datamodules.files import encoded, write_jsonl_pairs, write_pair_folder, write_parquet
from tests.datamodules.scoring import Constant, Learned, Redness, score
from tests.datamodules.tars import samples as tar_samples
from tests.datamodules.tars import write_tar
from tests.rewards.tiny import TOY_CLIP


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(3, verbose=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Nine pairs of images of several sizes, three of them ties, and four (one a tie) to validate on."""
    folder = tmp_path_factory.mktemp("pairs")
    sizes = [(40, 56), (56, 40), (40, 56), (64, 48), (48, 48), (40, 56), (56, 40), (40, 40), (40, 56)]
    images = {f"jpg_{k}": [encoded(2 * i + k, "PNG", *sizes[(i + k) % 9]) for i in range(9)] for k in (0, 1)}
    write_parquet(folder / "train.parquet", 9, **images)
    write_parquet(folder / "validation.parquet", 4)
    return folder


@pytest.fixture(scope="module")
def scored(sd15, source, tmp_path_factory) -> Path:
    """Redness of all images of all rows."""
    pl.seed_everything(3, verbose=False)
    return score(tmp_path_factory.mktemp("scores"), sd15, pairs(source, ties="keep", validation_split="validation"))


def redness_of_rows(source: Path) -> np.ndarray:
    """(9, 2), computed without our code."""
    rows = pairs(source)._load_rows("train").dataset
    stored = [[np.array(decode_image(row[f"jpg_{k}"], 16)) for k in (0, 1)] for row in rows]
    return np.array([[image[..., 0].mean() / 255 for image in pair] for pair in stored])


# ------------------------------------------------------------------------------------------------------------ scoring


def test_every_stored_image_is_scored_once(sd15, source, tmp_path):
    reward = Redness()
    data = pairs(source, validation_split="validation", random_crop=True)
    folder = score(tmp_path, sd15, data, {"red": reward})
    assert sorted(file.name for file in folder.iterdir()) == [
        "scores.json",
        *(f"train-0000000{i}-0000000{i + 1}.parquet" for i in (0, 2, 4)),
        "validation-00000000-00000001.parquet",
        "validation-00000002-00000002.parquet",
    ]
    table = pq.read_table(sorted(folder.glob("train-*")))
    assert table.column("row").to_pylist() == [f"train.parquet:{i}" for i in (0, 2, 3, 5, 6, 8)]  # no ties
    expected = redness_of_rows(source)[[0, 2, 3, 5, 6, 8]]
    assert np.stack([table.column(f"score_{k}") for k in (0, 1)], axis=1) == pytest.approx(expected, abs=1e-6)
    assert len(reward._seen) == 2 * (6 + 3)
    assert {size for size, _ in reward._seen} > {(3, 56, 40), (3, 40, 56), (3, 48, 64)}


def test_stopped_scoring_goes_on_where_it_stopped(sd15, source, scored, tmp_path, monkeypatch):
    def data():
        return pairs(source, ties="keep", validation_split="validation")

    plain, calls = Redness.score, []

    def breaks(self, images, prompts):
        calls.append(images)
        return 1 / 0 if len(calls) > 6 else plain(self, images, prompts)

    monkeypatch.setattr(Redness, "score", breaks)
    with pytest.raises(ZeroDivisionError):
        score(tmp_path, sd15, data())
    monkeypatch.undo()
    made = {file.name: file.read_bytes() for file in (tmp_path / "scores/red").iterdir()}
    whole = {file.name: file.read_bytes() for file in scored.iterdir()}
    assert made.items() < whole.items()
    assert len(made) > 1
    reward = Redness()
    score(tmp_path, sd15, data(), {"red": reward})
    assert {file.name: file.read_bytes() for file in (tmp_path / "scores/red").iterdir()} == whole
    assert 0 < len(reward._seen) < 26


def test_scoring_goes_on_with_what_is_missing(sd15, source, scored, tmp_path):
    folder = score(tmp_path, sd15, pairs(source, ties="keep", validation_split="validation"))
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert files == {file.name: file.read_bytes() for file in scored.iterdir()}
    for name in ("train-00000004-00000005.parquet", "validation-00000002-00000003.parquet"):
        (folder / name).unlink()
    reward = Redness()
    score(tmp_path, sd15, pairs(source, ties="keep", validation_split="validation"), {"red": reward})
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == files
    assert len(reward._seen) == 8
    again = Redness()
    score(tmp_path, sd15, pairs(source, ties="keep", validation_split="validation"), {"red": again})
    assert again._seen == []


def test_another_reward_joins_those_that_are_there(sd15, source, tmp_path):
    one, other = Redness(), Redness(-1.0)
    score(tmp_path, sd15, pairs(source), {"red": one})
    one._seen.clear()
    score(tmp_path, sd15, pairs(source), {"red": one, "pale": other})
    assert one._seen == []
    assert len(other._seen) == 12
    red, pale = (
        Scores(tmp_path / "scores" / name).of("train", pairs(source)._open("train")) for name in ("red", "pale")
    )
    assert np.array_equal(red, -pale)


@pytest.mark.parametrize("kind", ["folder", "jsonl", "tars", "toy", "streamed", "workers"])
def test_every_kind_of_data_is_scored_and_relabelled(kind, sd15, source, tmp_path):
    def data(**more):
        if kind == "folder":
            path = tmp_path / "pairs"
            return pairs(path if path.exists() else write_pair_folder(path, ("cat", "dog", "eel")), **more)
        if kind == "jsonl":
            path = tmp_path / "pairs/pairs.jsonl"
            return pairs(path if path.exists() else write_jsonl_pairs(tmp_path / "pairs"), **more)
        if kind == "tars":
            tars = [str(write_tar(tmp_path / f"{i}.tar", tar_samples(5, 5 * i))) for i in (0, 1)]
            return PickAPicShardsDataModule(tars, cache_dir=str(tmp_path / "tars"), resolution=16, batch_size=2, **more)
        if kind == "toy":
            size = {"num_pairs": 8, "num_val_pairs": 2, "batch_size": 2}
            return ToyPairs(source="world", folder=str(tmp_path), **size, **more)
        if kind == "streamed":
            return pairs(source, streaming=True, shuffle_shards=1, cache_dir=str(tmp_path / "streamed"), **more)
        return pairs(source, num_workers=2, **more)

    folder = score(tmp_path / "made", sd15, data(), {"red": Redness(-1.0)})
    run = train(dpo(sd15), data(labels_from=str(folder)))
    assert len(run.losses) == 4
    for batch in run.batches:
        first, second = batch["images"].chunk(2)
        # Views of all the image's content, if mirrored: their redness is near that of the stored images.
        less_red = first[:, 0].mean(dim=(1, 2)) - second[:, 0].mean(dim=(1, 2))
        assert (less_red < 0.2).all()


def test_rewards_of_the_zoo_are_described(tmp_path):
    def about(reward):
        reward.load()
        return json.loads(json.dumps(reward.describe()))

    plain = about(CLIPScore(str(TOY_CLIP)))
    assert plain == about(CLIPScore(str(TOY_CLIP), chunk_size=1))
    assert plain["class"] == "lightning_modules.rewards.clip.CLIPScore"
    assert about(CLIPScore(str(TOY_CLIP), precision="bfloat16")) != plain
    assert about(CLIPScore(str(TOY_CLIP), preprocessing="differentiable"))["weights"] == plain["weights"]
    assert about(Learned(0))["weights"] != about(Learned(1))["weights"]
    both = about(WeightedSum({"a": ToyOracle("match"), "b": Learned()}, {"a": 1.0, "b": 2.0}))
    assert both["parts"]["rewards.a"]["settings"] == {"part": "match"}
    assert both["settings"]["weights"] == "{'a': 1.0, 'b': 2.0}"
    assert both["weights"]


# ------------------------------------------------------------------------------------------------- training on labels


def test_labels_made_before_train_as_labels_made_meanwhile(sd15, source, scored):
    """Nothing is mirrored here: the two ways draw the same numbers for other images."""
    settings = {"horizontal_flip": False, "batch_size": 3}
    online = dpo(sd15)
    online.feedback = Redness()
    online = train(online, pairs(source, originals=True, **settings))
    before = train(dpo(sd15), pairs(source, labels_from=str(scored), **settings))
    assert before.losses == online.losses
    people = train(dpo(sd15), pairs(source, **settings))
    assert [batch["ids"] for batch in people.batches] == [batch["ids"] for batch in before.batches]
    assert people.losses != before.losses


def test_the_redder_image_comes_first(sd15, source, scored):
    scores = redness_of_rows(source)
    samples = opened(pairs(source, ties="keep", labels_from=str(scored), horizontal_flip=False)).train_samples()
    plain = opened(pairs(source, ties="keep", columns=PairColumns(label_0=None), horizontal_flip=False)).train_samples()
    for row in range(9):
        first, second = (view.pixels for view in samples[row]["views"])
        stored = [view.pixels for view in plain[row]["views"]]
        assert torch.equal(first, stored[int(scores[row, 1] > scores[row, 0])])
        assert torch.equal(second, stored[int(scores[row, 1] <= scores[row, 0])])
        assert samples[row]["label"] == 1.0


def opened(data):
    """With its tables, as in a run."""
    data._tables = {split: data._open(split) for split in (data.split, data.validation_split) if split}
    if data.labels_from:
        data.scores = Scores(data.labels_from)
    return data


def test_soft_labels_are_probabilities(source, scored):
    scores, scale = redness_of_rows(source), 20.0
    samples = opened(pairs(source, ties="keep", labels_from=str(scored), label_scale=scale)).train_samples()
    hard = opened(pairs(source, ties="keep", labels_from=str(scored))).train_samples()
    for row in range(9):
        difference = abs(scores[row, 0] - scores[row, 1])
        assert samples[row]["label"] == pytest.approx(1 / (1 + np.exp(-scale * difference)), abs=1e-5)
        assert torch.equal(samples[row]["views"][0].pixels, hard[row]["views"][0].pixels)


def test_pairs_of_equal_scores_prefer_the_first_image(sd15, source, tmp_path):
    folder = score(tmp_path, sd15, pairs(source), {"same": Constant(2.5)})
    samples = opened(pairs(source, labels_from=str(folder), horizontal_flip=False)).train_samples()
    stored = opened(pairs(source, columns=PairColumns(label_0=None), horizontal_flip=False, ties="keep"))
    stored = stored.train_samples()
    for number, row in enumerate((0, 2, 3, 5, 6, 8)):
        assert torch.equal(samples[number]["views"][0].pixels, stored[row]["views"][0].pixels)
    soft = opened(pairs(source, labels_from=str(folder), label_scale=1.0)).train_samples()
    assert {soft[number]["label"] for number in range(6)} == {0.5}


def test_data_without_labels_need_none(sd15, source, scored):
    columns = PairColumns(label_0=None)
    run = train(dpo(sd15), pairs(source, columns=columns, labels_from=str(scored)))
    assert run.losses == train(dpo(sd15), pairs(source, ties="first", labels_from=str(scored))).losses


def test_cached_moments_are_relabelled_too(sd15, source, scored, tmp_path):
    cache = str(fill(tmp_path / "cache", dpo(sd15), pairs(source)))
    cached = train(dpo(sd15), pairs(source, cache=cache, labels_from=str(scored)))
    assert "moments" in cached.batches[0]
    assert cached.losses == pytest.approx(train(dpo(sd15), pairs(source, labels_from=str(scored))).losses, abs=1e-5)


def test_scores_lie_beside_moments(sd15, source, tmp_path):
    folder = score(tmp_path / "cache", sd15, pairs(source), encode=True, dtype="float32")
    cache = str(tmp_path / "cache")
    assert folder == tmp_path / "cache/scores/red"
    assert train(dpo(sd15), pairs(source, cache=cache, labels_from=str(folder))).losses
    later = score(tmp_path / "cache", sd15, pairs(source), {"pale": Redness(-1.0)})
    assert train(dpo(sd15), pairs(source, cache=cache, labels_from=str(later))).losses


def test_moments_come_beside_scores(sd15, source, tmp_path):
    folder = score(tmp_path / "cache", sd15, pairs(source))
    cache = fill(tmp_path / "cache", dpo(sd15), pairs(source))
    assert train(dpo(sd15), pairs(source, cache=str(cache), labels_from=str(folder))).losses


def test_fine_tuning_sees_the_image_that_the_reward_prefers(sd15, source, scored):
    def module():
        return DiffusionSFT(SD15(str(sd15)))

    run = train(module(), pairs(source, preferred_only=True, labels_from=str(scored)))
    people = train(module(), pairs(source, preferred_only=True))
    assert [batch["ids"] for batch in run.batches] == [batch["ids"] for batch in people.batches]
    assert run.losses != people.losses


@pytest.mark.parametrize("asked", [False, True])
def test_validation_follows_people_unless_asked(asked, source, scored):
    settings = {"validation_split": "validation", "relabel_validation": asked}
    data = opened(pairs(source, labels_from=str(scored), **settings))
    people = opened(pairs(source, validation_split="validation")).val_samples()
    labels = labels_of(data.scores.of("validation", data._tables["validation"]))
    assert np.array_equal(data.val_samples().table.label_0, labels if asked else people.table.label_0)
    assert not np.array_equal(labels, people.table.label_0)


def test_fewer_rows_may_train_than_were_scored(source, scored):
    data = opened(pairs(source, labels_from=str(scored), max_train_samples=3))
    whole = opened(pairs(source, labels_from=str(scored))).train_samples().table
    table = data.train_samples().table
    assert len(table.index) == 3
    by_row = dict(zip(whole.index, whole.label_0, strict=True))
    assert [by_row[row] for row in table.index] == table.label_0.tolist()


def test_run_says_what_became_of_the_labels(sd15, source, scored, caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch.utilities.rank_zero"):
        train(dpo(sd15), pairs(source, labels_from=str(scored)))
    told = [record.message for record in caplog.records if "labels_from" in record.message]
    scores = redness_of_rows(source)[[0, 2, 3, 5, 6, 8]]
    agree = np.mean((scores[:, 0] >= scores[:, 1]) == np.array([False, True] * 3))
    assert len(told) == 1
    assert (
        f"6 pairs of split 'train', 0 of them with equal scores; the labels agree with {100 * agree:.1f} %" in told[0]
    )


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def copy(scored, tmp_path) -> Path:
    return Path(shutil.copytree(scored, tmp_path / "scores/red"))


def change(file: Path, **values) -> None:
    header = json.loads(file.read_text()) | values
    file.write_text(json.dumps(header))


DAMAGE = {
    "no header": (lambda folder: (folder / "scores.json").unlink(), "There are no scores in .* Have them scored"),
    "half a header": (lambda folder: (folder / "scores.json").write_text('{"format": 1'), "scores.json is damaged"),
    "another format": (lambda folder: change(folder / "scores.json", format=2), "no header of scores"),
    "another header": (
        lambda folder: change(folder / "scores.json", reward={}),
        "00000001.parquet belongs to other scores than scores.json",
    ),
    "a file is missing": (
        lambda folder: (folder / "train-00000002-00000003.parquet").unlink(),
        r"1 of the 5 files of scores of the split 'train' are missing .* train-00000002",
    ),
    "half a file": (
        lambda folder: (folder / "train-00000002-00000003.parquet").write_bytes(b"PAR1 and then nothing"),
        r"train-00000002-00000003.parquet is damaged .* Delete this file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_stops_a_run_before_the_networks_are_loaded(damage, sd15, source, copy, monkeypatch):
    break_it, expected = DAMAGE[damage]
    break_it(copy)
    monkeypatch.setattr(SD15, "load", lambda *_, **__: pytest.fail("loaded the networks"))
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        train(dpo(sd15), pairs(source, labels_from=str(copy)))


def test_changed_bits_are_noticed(source, copy):
    file = copy / "train-00000000-00000001.parquet"
    content = bytearray(file.read_bytes())
    place = content.index(b"caption 0")
    content[place + 8 : place + 9] = b"7"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="train-00000000-00000001.parquet is damaged"):
        Scores(copy).of("train", pairs(source, ties="keep")._open("train"))


def test_folder_above_the_scores_is_no_folder_of_scores(sd15, source, copy):
    with pytest.raises(FileNotFoundError, match=r"no scores in .*It holds scores/red: give one of these"):
        train(dpo(sd15), pairs(source, labels_from=str(copy.parents[1])))


OTHER_DATA = {
    "more rows": ({"num_rows": 10}, r"1 of 10 rows of split 'train' have not been scored, first .*row 9"),
    "other captions": (
        {"caption": [f"caption {max(i, 1)}" for i in range(9)]},
        "1 of 9 rows .* have another caption now",
    ),
    "other images": (
        {"jpg_1": [encoded(99)] + [encoded(2 * i + 1, "PNG") for i in range(1, 9)]},
        r"rows .* have other images now, first .*row 0",
    ),
}


@pytest.mark.parametrize("case", OTHER_DATA)
def test_scores_of_other_rows_are_refused(case, sd15, tmp_path):
    changed, expected = OTHER_DATA[case]
    images = {"jpg_1": [encoded(2 * i + 1, "PNG") for i in range(9)]}
    first = write_parquet(tmp_path / "one/train.parquet", 9, **images)
    folder = score(tmp_path / "made", sd15, pairs(first, ties="keep"))
    number = changed.pop("num_rows", 9)
    other = write_parquet(tmp_path / "other/train.parquet", number, **(images if number == 9 else {}) | changed)
    with pytest.raises(ValueError, match=expected):
        train(dpo(sd15), pairs(other, ties="keep", labels_from=str(folder)))


def test_scores_of_other_remote_files_are_refused(sd15, source, tmp_path):
    def streamed(path, **more):
        return pairs(path, streaming=True, shuffle_shards=1, cache_dir=str(tmp_path / "streamed"), **more)

    folder = score(tmp_path / "made", sd15, streamed(source))
    other = write_parquet(tmp_path / "other/train.parquet", 9)
    with pytest.raises(ValueError, match="6 of 6 rows of split 'train' come from other files"):
        train(dpo(sd15), streamed(other.parent, labels_from=str(folder)))


def test_ties_that_were_not_scored_are_told_of(sd15, source, tmp_path):
    folder = score(tmp_path, sd15, pairs(source))
    with pytest.raises(ValueError, match="3 of 9 rows of split 'train' have not been scored"):
        train(dpo(sd15), pairs(source, ties="keep", labels_from=str(folder)))


def test_split_without_scores_is_told_of(sd15, source, tmp_path):
    folder = score(tmp_path, sd15, pairs(source))
    settings = {"validation_split": "validation", "labels_from": str(folder)}
    assert train(dpo(sd15), pairs(source, **settings)).losses
    with pytest.raises(ValueError, match="are of the split train, not of 'validation'"):
        train(dpo(sd15), pairs(source, relabel_validation=True, **settings))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"label_scale": 1.0}, "label_scale is 1.0 .* set `labels_from`"),
        ({"relabel_validation": True}, "set `labels_from`"),
        ({"labels_from": "x", "label_scale": 0.0}, "label_scale is 0.0 .* expected a positive number"),
        ({"labels_from": "x", "label_scale": -5.0}, "label_scale is -5.0"),
        ({"labels_from": "x", "label_scale": float("nan")}, "label_scale is nan"),
        ({"labels_from": "x", "label_scale": 1.0, "preferred_only": True}, "of single images there are no labels"),
        ({"originals": True, "labels_from": "x"}, r"does not go with labels_from \(x\)"),
        ({"originals": True, "cache": "x"}, r"does not go with cache \(x\)"),
        ({"originals": True, "label_noise": 0.1}, "does not go with label_noise"),
        ({"originals": True, "preferred_only": True}, "does not go with preferred_only"),
    ],
)
def test_settings_that_contradict_each_other(settings, expected):
    with pytest.raises(ValueError, match=expected):
        pairs("nowhere", **settings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_score_that_is_no_number_stops_the_scoring(value, sd15, source, tmp_path):
    with pytest.raises(
        ValueError, match=r"train.parquet, row 0 \(prompt 'caption 0'\): odd gives its first image the sc"
    ):
        score(tmp_path, sd15, pairs(source), {"odd": Constant(value)})
    assert list(tmp_path.glob("scores/odd/*.parquet")) == []


def test_reward_that_answers_too_little(sd15, source, tmp_path):
    class One(Constant):
        def score(self, images, prompts):
            return super().score(images, prompts).mean()

    with pytest.raises(ValueError, match=r"One: the scores of \d images have shape \(\); expected one number for each"):
        score(tmp_path, sd15, pairs(source), {"one": One(1.0)})


CHANGES = {
    "a setting": ({"rewards": {"red": Redness(2.0)}}, "reward settings weight 1.0 -> 2.0"),
    "another class": ({"rewards": {"red": Constant(2.0)}}, r"reward class .*Redness -> .*Constant"),
    "the rows": ({"ties": "drop"}, "splits train rows 9 -> 6"),
    "rows in a file": ({"rows_per_shard": 3}, "rows_per_file 2 -> 3"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_scores_of_something_else_are_not_continued(case, sd15, source, copy, tmp_path):
    changed, expected = CHANGES[case]
    options = dict(changed)
    ties = options.pop("ties", "keep")
    with pytest.raises(ValueError, match=rf"holds scores of something else: {expected}"):
        score(tmp_path, sd15, pairs(source, ties=ties, validation_split="validation"), **options)


def test_other_weights_of_a_reward_are_noticed(sd15, source, tmp_path):
    score(tmp_path, sd15, pairs(source), {"learned": Learned()})
    retrained = Learned()
    retrained.load()
    retrained.linear.weight.data.add_(1.0)
    with pytest.raises(ValueError, match=r"holds scores of something else: reward weights \w+ -> \w+. Delete it"):
        score(tmp_path, sd15, pairs(source), {"learned": retrained})


def test_what_cannot_be_scored(sd15, source, tmp_path):
    with pytest.raises(ValueError, match="There is nothing to do: encode is false"):
        CachingTrainer(**QUIET).cache(dpo(sd15), pairs(source), str(tmp_path), encode=False)
    with pytest.raises(ValueError, match=r"the name 'a/b' is to be one of a folder"):
        score(tmp_path, sd15, pairs(source), {"a/b": Redness()})
    with pytest.raises(ValueError, match="There is no folder to fill"):
        CachingTrainer(**QUIET).cache(dpo(sd15), pairs(source), encode=False, rewards={"red": Redness()})
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="scores.* cannot be written: Not a directory"):
        score(tmp_path / "file", sd15, pairs(source))
    with pytest.raises(ValueError, match="rows_per_shard is 0"):
        score(tmp_path, sd15, pairs(source), rows_per_shard=0)
    lists = write_parquet(tmp_path / "train.parquet", 2, caption=[["one", "two"], ["three"]])
    with pytest.raises(ValueError, match="row 0: 'caption' is a list of texts"):
        score(tmp_path, sd15, pairs(lists))


def test_single_images_have_no_labels(sd15, scored, tmp_path):
    columns = {"caption": ["a", "b"], "image": [encoded(0), encoded(1)]}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    data = {"preferred_only": True, "batch_size": 1}
    with pytest.raises(ValueError, match="there is one image in a row; scores are for pairs"):
        score(tmp_path, sd15, pairs(tmp_path / "train.parquet", **data))
    with pytest.raises(ValueError, match="labels_from is for pairs, but there is one image in a row"):
        train(DiffusionSFT(SD15(str(sd15))), pairs(tmp_path / "train.parquet", labels_from=str(scored), **data))
