"""What the training of a step preference model asks of the pairs: weights, ties, CLIP's resizing, rounded labels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.pickapic import PairColumns, PickAPicDataModule, collate_pairs
from datamodules.scores import labels_of
from datamodules.transforms import decode_image, view_image
from tests.datamodules.files import encoded, write_parquet
from tests.golden_cases import load_case

COUNTED = PairColumns(pairs_per_prompt="num_example_per_prompt")


@pytest.fixture
def source(tmp_path) -> Path:
    """Six pairs in each split; rows 1 and 4 are ties, which nobody has voted on."""
    for split in ("train", "validation"):
        columns = {"has_label": [i % 3 != 1 for i in range(6)], "num_example_per_prompt": [1, 2, 4, 5, 8, 10]}
        write_parquet(tmp_path / f"{split}.parquet", 6, **columns)
    return tmp_path


def opened(source: Path, **settings) -> PickAPicDataModule:
    data = PickAPicDataModule(str(source), resolution=8, validation_split="validation", **settings)
    data.setup("fit")
    return data


def test_a_pair_weighs_one_over_the_pairs_of_its_prompt(source):
    samples = opened(source, ties="keep", columns=COUNTED).train_samples()
    batch = collate_pairs([samples[i, i] for i in range(6)])
    assert batch["weight"].tolist() == pytest.approx([1, 0.5, 0.25, 0.2, 0.125, 0.1])
    assert batch["weight"].dtype == torch.float32
    plain = opened(source, ties="keep").train_samples()
    assert collate_pairs([plain[i, i] for i in range(6)])["weight"].tolist() == [1.0] * 6


@pytest.mark.parametrize("count", [0, None, -3])
def test_an_impossible_count_is_told_with_its_row(count, tmp_path):
    file = write_parquet(tmp_path / "train.parquet", 3, num_example_per_prompt=[1, 2, count])
    with pytest.raises(ValueError, match=r"row 2: 'num_example_per_prompt' is .*, expected the number of pairs"):
        PickAPicDataModule(str(file), columns=COUNTED).setup("fit")
    data = PickAPicDataModule(str(file), columns=COUNTED, ties="keep", on_bad_row="drop")
    data.setup("fit")
    assert len(data.train_samples()) == 2
    write_parquet(tmp_path / "other.parquet", 3)
    with pytest.raises(ValueError, match="no column 'num_example_per_prompt'"):
        PickAPicDataModule(str(tmp_path / "other.parquet"), columns=COUNTED).setup("fit")


@pytest.mark.parametrize(("require", "numbers"), [(False, (6, 6)), (True, (4, 4)), ("validation", (6, 4))])
def test_votes_can_be_required_in_validation_only(require, numbers, source):
    data = opened(source, ties="keep", require_label=require)
    assert (len(data.train_samples()), len(data.val_samples())) == numbers


@pytest.mark.parametrize("i", range(3))
def test_golden_resizing_of_clip(i):
    golden = load_case("step_preference_model", "dataset_image")[0]
    image = Image.fromarray(golden[f"case{i}_image_uint8_hwc"].numpy())
    R = golden["resolution"].item()
    view = view_image(image, R, False, False, np.random.default_rng(0), bicubic=True)
    torch.testing.assert_close(view.pixels[None], golden[f"case{i}_expected_pixels"], atol=1e-5, rtol=0)


def test_bicubic_crop_begins_at_the_pixel_before_an_odd_middle():
    image = Image.fromarray(np.arange(8 * 11 * 3, dtype=np.uint8).reshape(8, 11, 3))
    views = [view_image(image, 8, False, False, np.random.default_rng(0), bicubic) for bicubic in (False, True)]
    assert [view.crop for view in views] == [(0, 2), (0, 1)]


def test_resize_reaches_the_samples(source):
    image = decode_image(encoded(1), 8)  # of row 0, whose second image is the preferred one
    for resize in ("bilinear", "bicubic"):
        view = opened(source, resize=resize).val_samples()[0]["views"][0]
        expected = view_image(image, 8, False, False, np.random.default_rng(0), bicubic=resize == "bicubic")
        assert torch.equal(view.pixels, expected.pixels)
    with pytest.raises(ValueError, match="expected bilinear, or bicubic with separate"):
        opened(source, resize="bicubic", augmentation="joint")
    with pytest.raises(ValueError, match="expected bilinear"):
        opened(source, resize="lanczos")


def test_rounded_labels_by_hand():
    scores = np.array([[20.3, 20.0], [20.0, 20.3], [20.2008, 20.0], [20.2006, 20.0], [20.0, 20.0]])
    assert labels_of(scores, threshold=0.1).tolist() == [1.0, 0.0, 1.0, 0.5, 0.5]
    assert labels_of(scores / 100, scale=100.0, threshold=0.1).tolist() == [1.0, 0.0, 1.0, 0.5, 0.5]
    golden = load_case("step_preference_model", "pickscore_relabel")[0]
    scores = np.stack([golden["scores_0"].numpy(), golden["scores_1"].numpy()], axis=1)
    labels = labels_of(scores, threshold=golden["threshold"].item())
    assert labels.tolist() == golden["expected_label_0"].tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_threshold": 0.1, "ties": "keep"}, "there are no scores"),
        ({"label_threshold": 0.1, "labels_from": "x"}, "since it makes ties"),
        ({"label_threshold": 1.0, "labels_from": "x", "ties": "keep"}, r"in \[0, 1\)"),
    ],
)
def test_thresholds_without_sense_are_refused(settings, message, source):
    with pytest.raises(ValueError, match=message):
        opened(source, **settings)
