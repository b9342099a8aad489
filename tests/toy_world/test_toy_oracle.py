"""The oracle as a reward."""

import random

import pytest
import torch

from datamodules.toy_world.oracle import judge
from datamodules.toy_world.render import render
from datamodules.toy_world.scenes import draw_scenes, parse
from lightning_modules.rewards.toy_oracle import ToyOracle

CAPTION = "a red circle and a blue square in a row"


@pytest.mark.parametrize("part", ["match", "strict", "vividness"])
def test_the_reward_is_the_part_that_it_is_named_after(part):
    images = render([parse(CAPTION)] * 5, torch.Generator().manual_seed(0))
    scores = ToyOracle(part)(images, [CAPTION] * 5)
    assert scores.shape == (5,)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, getattr(judge(images, [CAPTION] * 5), part))


def test_both_is_match_halved_for_a_pale_picture():
    vividness = torch.tensor([0.0, 1.0])
    images = render([parse(CAPTION)] * 2, torch.Generator().manual_seed(0), vividness=vividness)
    pale, vivid = ToyOracle("both")(images, [CAPTION] * 2)
    assert pale == pytest.approx(0.5, abs=0.06)
    assert vivid == pytest.approx(1.0, abs=0.1)


def test_a_single_picture_is_judged_too():
    scene = draw_scenes(1, random.Random(0))[0]
    image = render([scene], torch.Generator().manual_seed(0))
    assert ToyOracle()(image, [scene.caption]).shape == (1,)


def test_an_unknown_part_is_refused():
    with pytest.raises(ValueError, match="part is 'beauty'; expected match"):
        ToyOracle("beauty")


def test_a_foreign_caption_is_refused_with_examples():
    with pytest.raises(ValueError, match="cannot read the caption 'an astronaut'"):
        ToyOracle()(torch.zeros(1, 3, 32, 32), ["an astronaut"])
