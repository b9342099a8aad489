"""Captions, their parser, and the split into training and held-out captions."""

import random

import pytest

from datamodules.toy_world.scenes import (
    Item,
    Scene,
    all_scenes,
    change_one_thing,
    draw_scenes,
    heldout_scenes,
    parse,
    train_scenes,
)


def test_captions_read_as_a_newcomer_would_write_them():
    assert Scene((Item("red", "circle"),)).caption == "a red circle"
    two = Scene((Item("pink", "ring"), Item("green", "cross")), "in a column")
    assert two.caption == "a pink ring and a green cross in a column"


def test_every_caption_parses_back_to_its_scene():
    assert len(all_scenes()) == 1530
    assert all(parse(scene.caption) == scene for scene in all_scenes())


def test_parse_forgives_capitals_and_spaces():
    assert parse("  A red   Circle ") == Scene((Item("red", "circle"),))


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a red",
        "a purple circle",
        "a red hexagon",
        "a red circle and a blue square",
        "a red circle and a red square in a row",
        "a red circle in a row",
        "a red circle and a blue square in a row, please",
    ],
)
def test_a_caption_of_another_world_is_refused_with_examples(caption):
    with pytest.raises(ValueError, match="a red circle and a blue square in a row") as error:
        parse(caption)
    assert repr(caption) in str(error.value)


def test_two_hundred_captions_are_held_out_and_never_drawn_for_training():
    heldout = {scene.caption for scene in heldout_scenes()}
    assert len(heldout) == 200
    assert heldout.isdisjoint(scene.caption for scene in train_scenes())
    assert heldout.isdisjoint(scene.caption for scene in draw_scenes(5000, random.Random(3)))
    assert all(len(scene.items) == 2 for scene in heldout_scenes())


def test_a_held_out_picture_is_held_out_under_both_its_names():
    trained = {scene.picture for scene in train_scenes()}
    assert all(scene.picture not in trained for scene in heldout_scenes())


def test_the_split_and_the_draw_are_fixed():
    assert [s.caption for s in heldout_scenes()[:2]] == [
        "a yellow circle and a green square in a column",
        "a blue square and a cyan cross in a column",
    ]
    assert draw_scenes(50, random.Random(7)) == draw_scenes(50, random.Random(7))


def test_a_share_of_the_drawn_scenes_has_one_item():
    drawn = draw_scenes(4000, random.Random(0), single_share=0.15)
    assert sum(len(s.items) == 1 for s in drawn) / 4000 == pytest.approx(0.15, abs=0.02)


def test_a_changed_scene_is_another_picture_from_the_training_captions():
    rng = random.Random(0)
    trained = set(train_scenes())
    for scene in random.Random(1).sample(all_scenes(), 200):
        changed = change_one_thing(scene, rng)
        assert changed.picture != scene.picture
        assert changed in trained
        assert len(changed.items) == len(scene.items)
