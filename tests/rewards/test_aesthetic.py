"""The aesthetic score against the layers that its head is published as, on a CLIP of transformers."""

import pytest
import torch
from torch import Tensor, nn

from lightning_modules.rewards.aesthetic import AestheticScore
from tests.rewards.test_clip_family import hf_pixels
from tests.rewards.tiny import pairs, random_images, random_weights, save_hf_clip

PROMPTS = ["whatever"] * 5


def head_weights(width: int) -> dict[str, Tensor]:
    layout = {}
    for k, (rows, columns) in zip((0, 2, 4, 6, 7), pairs([width, 1024, 128, 64, 16, 1]), strict=True):
        layout |= {f"layers.{k}.weight": (rows, columns), f"layers.{k}.bias": (rows,)}
    return random_weights(layout)


def published_head(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    ).eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip_l")
    return folder, save_hf_clip(folder, pickled=True)


@pytest.mark.parametrize("size", [(40, 40), (51, 30)])
def test_score_equals_the_published_layers_on_the_unit_feature(clip, tmp_path, size):
    folder, model = clip
    torch.save(head_weights(24), tmp_path / "head.pth")
    head = published_head(24)
    head.load_state_dict({name.removeprefix("layers."): value for name, value in head_weights(24).items()})
    images = random_images(5, *size)
    with torch.no_grad():
        features = model.get_image_features(hf_pixels(images)).pooler_output
        expected = head(features / features.norm(dim=-1, keepdim=True)).squeeze(1)

    reward = AestheticScore(str(tmp_path / "head.pth"), str(folder), chunk_size=2)
    score = reward(images, PROMPTS)
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-4)
    assert score.std() > 0.02
    assert torch.equal(reward(images, ["something else"] * 5), score)
    assert not [name for name, _ in reward.named_parameters() if "text_model" in name]


def test_first_predictor_is_one_layer(clip, tmp_path):
    folder, model = clip
    layer = nn.Linear(24, 1)
    torch.save(layer.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth")
    with torch.no_grad():
        features = model.get_image_features(hf_pixels(random_images())).pooler_output
        expected = layer(features / features.norm(dim=-1, keepdim=True)).squeeze(1)
    score = AestheticScore(str(tmp_path / "sa_0_4_vit_l_14_linear.pth"), str(folder))(random_images(), PROMPTS)
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-6)


def test_low_precision_leaves_the_head_alone(clip, tmp_path):
    torch.save(head_weights(24), tmp_path / "head.pth")
    exact, near = (
        AestheticScore(str(tmp_path / "head.pth"), str(clip[0]), precision=precision)
        for precision in ("float32", "bfloat16")
    )
    torch.testing.assert_close(near(random_images(), PROMPTS), exact(random_images(), PROMPTS), atol=0.01, rtol=0)
    assert near.network.head.direction.dtype == torch.float32


def test_published_name_demands_the_published_file(clip, tmp_path):
    path = tmp_path / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(head_weights(768), path)
    with pytest.raises(ValueError, match=r"SHA-256 [0-9a-f]{64}, but the published file .* 21dd590f3ccdc646"):
        AestheticScore(str(path), str(clip[0]))


def test_head_of_another_width_is_refused(clip, tmp_path):
    torch.save(head_weights(32), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="takes 32 features, but .* makes 24"):
        AestheticScore(str(tmp_path / "head.pth"), str(clip[0])).load()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if "layers.4" not in k}, "the head holds layers.0.bias"),
        (lambda w: w | {"layers.2.weight": torch.zeros(128, 1000)}, "do not lead to one number"),
        (lambda w: w | {"layers.7.bias": torch.zeros(2)}, "do not lead to one number"),
        (lambda w: {"model": w}, "holds no state dict"),
    ],
)
def test_other_layouts_are_refused(clip, tmp_path, change, message):
    torch.save(change(head_weights(24)), tmp_path / "head.pth")
    with pytest.raises(ValueError, match=message):
        AestheticScore(str(tmp_path / "head.pth"), str(clip[0])).load()
