"""Pictures, and what the oracle reads from them."""

import random

import pytest
import torch

from datamodules.toy_world.oracle import judge
from datamodules.toy_world.render import render
from datamodules.toy_world.scenes import all_scenes, parse

TWO = "a red circle and a blue square in a row"


def draw(captions, seed=0, **options):
    return render([parse(caption) for caption in captions], torch.Generator().manual_seed(seed), **options)


def test_a_clean_picture_matches_its_caption():
    captions = [scene.caption for scene in random.Random(0).sample(all_scenes(), 300)]
    scores = judge(draw(captions), captions)
    assert scores.match.mean() > 0.99
    assert scores.match.min() > 0.8
    assert scores.strict.mean() > 0.99


@pytest.mark.parametrize("size", [24, 32, 33, 48, 64])
def test_a_clean_picture_matches_at_other_sizes_too(size):
    captions = [scene.caption for scene in random.Random(1).sample(all_scenes(), 60)]
    images = draw(captions, size=size)
    assert images.shape == (60, 3, size, size)
    assert judge(images, captions).match.mean() > 0.97


@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ("a red triangle and a blue square in a row", "shape"),
        ("a green circle and a blue square in a row", "color"),
        ("a red circle and a blue square in a column", "layout"),
        ("a blue circle and a red square in a row", "shape"),
        ("a red circle", "purity"),
    ],
)
def test_one_wrong_thing_lowers_its_part_and_the_match(wrong, part):
    images = draw([TWO] * 40)
    right_scores, wrong_scores = judge(images, [TWO] * 40), judge(images, [wrong] * 40)
    assert (getattr(wrong_scores, part) < getattr(right_scores, part) - 0.2).all()
    assert (wrong_scores.match < right_scores.match - 0.05).all()
    assert (wrong_scores.strict == 0).all()


def test_naming_the_items_in_the_other_order_changes_nothing():
    images = draw([TWO] * 20)
    other = judge(images, ["a blue square and a red circle in a row"] * 20)
    torch.testing.assert_close(judge(images, [TWO] * 20).match, other.match)


def test_vividness_is_read_back_in_the_true_order():
    true = torch.linspace(0, 1, 11)
    images = torch.cat([draw([TWO], seed=5, vividness=v[None]) for v in true])
    read = judge(images, [TWO] * 11).vividness
    assert (read.diff() > 0).all()
    assert read[0] < 0.15
    assert read[-1] > 0.85


def test_vividness_has_no_say_in_the_match():
    pale, vivid = (judge(draw([TWO], seed=2, vividness=torch.tensor([v])), [TWO]).match for v in (0.05, 1.0))
    torch.testing.assert_close(pale, vivid, atol=0.01, rtol=0)


def test_grey_and_noise_score_low():
    grey = torch.full((1, 3, 32, 32), 0.5)
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = judge(torch.cat([grey, noise]), [TWO] * 2)
    assert scores.match[0] == 0
    assert scores.vividness[0] == 0
    assert scores.match[1] < 0.35


def test_scores_lie_in_the_unit_interval_on_any_input():
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2
    for values in vars(judge(images, [TWO] * 64)).values():
        assert values.shape == (64,)
        assert values.min() >= 0
        assert values.max() <= 1


def test_a_picture_is_a_function_of_the_seed():
    torch.testing.assert_close(draw([TWO] * 3, seed=4), draw([TWO] * 3, seed=4), atol=0, rtol=0)
    assert not torch.equal(draw([TWO] * 3, seed=4), draw([TWO] * 3, seed=5))


def test_a_verdict_does_not_depend_on_the_batch():
    captions = [scene.caption for scene in all_scenes()[20:60]]
    images = draw(captions)
    together = judge(images, captions)
    alone = [judge(images[i : i + 1], captions[i : i + 1]) for i in range(40)]
    for name, values in vars(together).items():
        torch.testing.assert_close(values, torch.cat([getattr(a, name) for a in alone]))


def test_pictures_and_captions_must_fit_together():
    with pytest.raises(ValueError, match="2 pictures but 1 captions"):
        judge(torch.zeros(2, 3, 32, 32), [TWO])
    with pytest.raises(ValueError, match=r"square pictures .* got \(1, 3, 32, 16\)"):
        judge(torch.zeros(1, 3, 32, 16), [TWO])
