"""The oracle as a reward."""

import random

import pytest
import torch

from datamodules.toy_world.oracle import MIN_CHROMA, judge
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


def some_pictures(count: int) -> tuple[torch.Tensor, list[str]]:
    scenes = draw_scenes(count, random.Random(1))
    return render(scenes, torch.Generator().manual_seed(1)), [scene.caption for scene in scenes]


@pytest.mark.parametrize("part", ["vividness", "both"])
def test_the_gradient_is_the_slope_of_the_score(part):
    """Central differences, away from where the score has a kink: equal channels, and the edge of what is coloured."""
    images, captions = some_pictures(8)
    images = images * 0.9 + torch.tensor([0.0, 0.03, 0.06]).view(3, 1, 1)
    chroma = images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    smooth = (chroma - MIN_CHROMA).abs() > 0.02
    images.requires_grad_()
    reward = ToyOracle(part)
    assert reward.differentiable
    reward(images, captions).sum().backward()
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        direction = (torch.rand(images.shape, generator=generator) * 2 - 1) * smooth
        with torch.no_grad():
            above, below = (reward(images + step * direction, captions) for step in (5e-3, -5e-3))
        slope = (images.grad * direction).sum(dim=(1, 2, 3))
        torch.testing.assert_close((above - below) / 1e-2, slope, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("part", ["match", "strict"])
def test_what_is_read_from_masks_only_is_said_to_have_no_gradient(part):
    images, captions = some_pictures(2)
    reward = ToyOracle(part)
    assert not reward.differentiable
    assert not reward(images.requires_grad_(), captions).requires_grad


def test_following_the_gradient_makes_every_picture_more_vivid_and_keeps_what_it_shows():
    images, captions = some_pictures(32)
    before = judge(images, captions)
    for _ in range(10):
        images = images.detach().requires_grad_()
        ToyOracle("vividness")(images, captions).sum().backward()
        images = (images + 0.01 * images.grad.sign()).clamp(0, 1)
    after = judge(images, captions)
    assert (after.vividness > torch.minimum(before.vividness + 0.1, torch.tensor(0.99))).all()
    torch.testing.assert_close(after.match, before.match, atol=0.15, rtol=0)
