"""What every scorer keeps: loading once, gradients where it says so, no random numbers, words for what is wrong."""

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_modules.rewards.aesthetic import AestheticScore
from lightning_modules.rewards.base import Reward
from lightning_modules.rewards.clip import CLIPScore
from lightning_modules.rewards.combine import WeightedSum
from lightning_modules.rewards.hps import HPSv2
from lightning_modules.rewards.image_reward import ImageReward
from lightning_modules.rewards.mps import MPS
from lightning_modules.rewards.pickscore import PickScore
from lightning_modules.rewards.remote import RemoteReward
from lightning_modules.rewards.toy_oracle import ToyOracle
from tests.rewards.test_aesthetic import head_weights
from tests.rewards.test_image_reward import SIZES as BLIP_SIZES
from tests.rewards.test_mps import SIZES as MPS_SIZES
from tests.rewards.tiny import (
    OPEN_CLIP_NAME,
    TOY_CLIP,
    image_reward_layout,
    mps_layout,
    open_clip_weights,
    random_images,
    random_weights,
    register_open_clip,
    save_bert_tokenizer,
    save_hf_clip,
)

PROMPTS = ["a red circle", "a blue square", "a red circle"]
SCORERS = ["hf_clip", "open_clip", "pickscore", "hps", "aesthetic", "image_reward", "mps"]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    register_open_clip(folder / "configs")
    torch.save({"state_dict": open_clip_weights()}, folder / "open_clip.pt")
    clip = save_hf_clip(folder / "clip").state_dict()
    torch.save(head_weights(24), folder / "head.pth")
    torch.save(random_weights(image_reward_layout(**BLIP_SIZES)), folder / "ImageReward.pt")
    save_bert_tokenizer(folder / "bert")
    torch.save(
        random_weights(mps_layout({}, **MPS_SIZES)) | {f"model.{name}": v for name, v in clip.items()},
        folder / "mps.pt",
    )
    return folder


def build(zoo: Path, name: str, **options) -> Reward:
    clip = str(zoo / "clip")
    if name == "hf_clip":
        return CLIPScore(clip, **options)
    if name == "open_clip":
        return CLIPScore(str(zoo / "open_clip.pt"), OPEN_CLIP_NAME, **options)
    if name == "pickscore":
        return PickScore(clip, clip, **options)
    if name == "hps":
        return HPSv2(str(zoo / "open_clip.pt"), OPEN_CLIP_NAME, **options)
    if name == "aesthetic":
        return AestheticScore(str(zoo / "head.pth"), clip, **options)
    if name == "image_reward":
        return ImageReward(str(zoo / "ImageReward.pt"), str(zoo / "bert"), **options)
    return MPS(str(zoo / "mps.pt"), clip, **options)


# ------------------------------------------------------------------------------------------------ what all keep


@pytest.mark.parametrize("name", SCORERS)
def test_gradient_is_what_finite_differences_say(zoo, name):
    reward = build(zoo, name, preprocessing="differentiable", chunk_size=2)
    assert reward.differentiable
    images = (0.1 + 0.8 * random_images(3, 33, 30)).requires_grad_()
    reward(images, PROMPTS).sum().backward()
    direction = torch.sign(images.grad)
    step = 1e-2 / direction.norm()
    with torch.no_grad():
        up, down = (reward(images + sign * step * direction, PROMPTS).double().sum() for sign in (1, -1))
    assert (up - down) / (2 * step) == pytest.approx((images.grad * direction).sum().item(), rel=0.02)
    assert all(weight.grad is None for weight in reward.parameters())


@pytest.mark.parametrize("name", SCORERS)
def test_published_path_says_that_it_stops_gradients(zoo, name):
    reward = build(zoo, name)
    assert not reward.differentiable
    assert not reward(random_images(3).requires_grad_(), PROMPTS).requires_grad


@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_float32_one_per_image_for_any_batch(zoo, name):
    reward = build(zoo, name, chunk_size=2)
    all_scores = reward(random_images(3), PROMPTS)
    assert all_scores.shape == (3,)
    assert all_scores.dtype == torch.float32
    one_by_one = torch.cat([reward(random_images(3)[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(one_by_one, all_scores, rtol=1e-4, atol=1e-4)
    half = reward(random_images(3).to(torch.bfloat16), PROMPTS)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("name", SCORERS)
def test_loading_is_late_happens_once_and_draws_no_random_number(zoo, name):
    reward = build(zoo, name)
    assert not list(reward.parameters())
    torch.manual_seed(0)
    before = torch.get_rng_state()
    reward.load()
    network = reward.network
    reward.load()
    reward(random_images(3), PROMPTS)
    assert reward.network is network
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", SCORERS)
def test_scorer_first_used_in_inference_mode_gives_gradients_later(zoo, name):
    """Lightning tests and validates in inference mode, whose tensors can never take part in a gradient."""
    reward = build(zoo, name, preprocessing="differentiable")
    with torch.inference_mode():
        reward(random_images(3), PROMPTS)
    images = random_images(3).requires_grad_()
    reward(images, PROMPTS).sum().backward()
    assert images.grad.abs().max() > 0


@pytest.mark.parametrize("name", SCORERS)
def test_scorer_never_trains(zoo, name):
    reward = build(zoo, name)
    holder = torch.nn.ModuleDict({"reward": reward}).train()
    first = reward(random_images(3), PROMPTS)
    holder.train()
    assert torch.equal(reward(random_images(3), PROMPTS), first)
    assert not any(module.training for module in reward.modules())
    assert not any(weight.requires_grad for weight in reward.parameters())


@pytest.mark.parametrize("name", ["hf_clip", "open_clip", "pickscore", "hps", "mps"])
def test_each_prompt_is_encoded_once_and_few_are_kept(zoo, name, monkeypatch):
    reward = build(zoo, name)
    reward.load()
    encoded = []
    encode = reward.network.encode_texts
    monkeypatch.setattr(reward.network, "encode_texts", lambda texts: encoded.extend(texts) or encode(texts))
    for _ in range(3):
        scores = reward(random_images(3), PROMPTS)
    conditions = [reward.condition] if name == "mps" else []
    assert encoded == ["a red circle", "a blue square", *conditions]

    monkeypatch.setattr(type(reward), "kept_texts", 2)
    many = [f"{word} circle" for word in ("red", "blue", "green", "pink", "cyan")]
    reward(random_images(5), many)
    assert len(reward._texts) == 2
    torch.testing.assert_close(reward(random_images(3), PROMPTS), scores)


def test_kept_texts_leave_with_the_device(zoo):
    reward = build(zoo, "pickscore")
    reward(random_images(3), PROMPTS)
    assert reward._texts
    reward.to("cpu")
    assert not reward._texts


def test_construction_imports_nothing_heavy(zoo):
    code = (
        "import sys, time; from lightning_modules.rewards.hps import HPSv2; "
        "from lightning_modules.rewards.clip import CLIPScore; "
        f"HPSv2({str(zoo / 'open_clip.pt')!r}); CLIPScore({str(TOY_CLIP)!r}); "
        f"CLIPScore({str(zoo / 'open_clip.pt')!r}, 'ViT-H-14-quickgelu'); "
        "print(sorted({'open_clip', 'transformers', 'diffusers', 'torchvision'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_weighted_sum_adds_and_is_differentiable_if_all_are(zoo):
    parts = {name: build(zoo, name, preprocessing="differentiable") for name in ("pickscore", "hps")}
    both = WeightedSum(parts, {"pickscore": 2.0, "hps": -0.5})
    images = random_images(3).requires_grad_()
    score = both(images, PROMPTS)
    expected = 2 * parts["pickscore"](images, PROMPTS) - 0.5 * parts["hps"](images, PROMPTS)
    torch.testing.assert_close(score, expected)
    score.sum().backward()
    assert images.grad.abs().max() > 0
    assert both.differentiable
    assert not WeightedSum(parts | {"oracle": ToyOracle()}, dict.fromkeys([*parts, "oracle"], 1.0)).differentiable


def test_weighted_sum_loads_its_parts(zoo):
    part = build(zoo, "hps")
    WeightedSum({"hps": part}, {"hps": 1.0}).load()
    assert part.network is not None


# ------------------------------------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.rand(3, 8, 8), ["a"] * 3, r"of shape \(3, 8, 8\); expected a tensor of shape \(B, 3, H, W\)"),
        (torch.rand(1, 1, 8, 8), ["a"], r"of shape \(1, 1, 8, 8\)"),
        (torch.rand(1, 3, 0, 8), ["a"], r"of shape \(1, 3, 0, 8\)"),
        ([torch.rand(3, 8, 8)], ["a"], "are of list"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"], "torch.uint8; expected floating point"),
        (
            torch.rand(2, 3, 8, 8) * 2 - 1,
            ["a", "b"],
            r"image 0 \(prompt 'a'\) has values from -.*`\(images \+ 1\) / 2`",
        ),
        (torch.rand(1, 3, 8, 8) * 255, ["a"], r"expected \[0, 1\]"),
        (torch.cat([torch.rand(1, 3, 8, 8), torch.full((1, 3, 8, 8), float("nan"))]), ["a", "b"], "image 1 .*'b'.*nan"),
        (torch.full((1, 3, 8, 8), float("inf")), ["a"], "from inf to inf"),
        (torch.rand(3, 3, 8, 8), ["a", "b"], "3 images and 2 prompts"),
        (torch.rand(3, 3, 8, 8), [], "3 images and 0 prompts"),
        (torch.rand(0, 3, 8, 8), [], "0 images and 0 prompts; .* at least one"),
        (torch.rand(3, 3, 8, 8), "abc", "prompts is 'abc'; expected a list of strings"),
        (torch.rand(2, 3, 8, 8), ["a", None], "expected a list of strings"),
    ],
)
def test_wrong_inputs_are_named(zoo, images: Tensor, prompts: list[str], message: str):
    for reward in (build(zoo, "hps"), ToyOracle(), RemoteReward("http://127.0.0.1:9")):
        with pytest.raises(ValueError, match=message):
            reward(images, prompts)


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preprocessing": "fast"}, "preprocessing is 'fast'; expected published or differentiable"),
        ({"precision": "int8"}, "precision is 'int8'; expected float32, bfloat16 or float16"),
        ({"chunk_size": 0}, "chunk_size is 0; expected 1 or more"),
    ],
)
def test_wrong_options_are_named(zoo, name, options, message):
    with pytest.raises(ValueError, match=message):
        build(zoo, name, **options)


MISSING = [
    lambda: CLIPScore("/no/such/clip"),
    lambda: CLIPScore("weights/clip.bin"),
    lambda: CLIPScore(""),
    lambda: PickScore("./no_such_folder"),
    lambda: HPSv2("HPS_v2_compressed.pt"),
    lambda: AestheticScore("no/head.pth"),
    lambda: ImageReward("ImageReward.pt"),
    lambda: MPS("mps.pt"),
]


@pytest.mark.parametrize("make", MISSING, ids=range(len(MISSING)))
def test_missing_files_are_named_at_once(make):
    with pytest.raises(FileNotFoundError, match=r"\w+\.\w+: there is no f(ile|older) '.*' \(looked in /.*\); expected"):
        make()


def test_folder_without_a_model_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"has no open_clip_config.json or config.json. It holds: notes.txt"):
        CLIPScore(str(tmp_path))


def test_hub_id_without_network_names_the_way_out():
    with pytest.raises(FileNotFoundError, match=r"cannot get config.json of 'nobody/no-clip' from the hub.*a copy"):
        PickScore("nobody/no-clip", "nobody/no-processor").load()
    with pytest.raises(FileNotFoundError, match="of 'nobody/no-clip' from the hub"):
        CLIPScore("nobody/no-clip").load()


def test_unknown_open_clip_name_shows_known_ones(zoo):
    with pytest.raises(ValueError, match=r"open_clip knows no model 'ViT-H-41'.*ViT-H-14"):
        HPSv2(str(zoo / "open_clip.pt"), model="ViT-H-41")
    with pytest.raises(ValueError, match=r"CLIPScore.model: open_clip knows no model None"):
        CLIPScore(str(zoo / "open_clip.pt"))
    with pytest.raises(ValueError, match="is not a weight file: a folder or a hub id says itself"):
        CLIPScore(str(zoo / "clip"), model="ViT-H-14")


class Exploit:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (Path(self.target),)


def damaged_files(zoo: Path, folder: Path) -> dict[str, tuple[Path, str]]:
    whole = (zoo / "open_clip.pt").read_bytes()
    contents = {
        "truncated.pt": (whole[: len(whole) // 2], "not a readable weight file"),
        "empty.pt": (b"", r"not a readable weight file \(EOFError\); it has 0 bytes"),
        "page.pt": (b"<!DOCTYPE html><html>Not found</html>", "web page instead of the file"),
        "truncated.safetensors": ((zoo / "clip/model.safetensors").read_bytes()[:5000], "not a readable weight file"),
    }
    for name, (content, _) in contents.items():
        (folder / name).write_bytes(content)
    (folder / "code.pt").write_bytes(pickle.dumps({"state_dict": Exploit(str(folder / "touched"))}))
    torch.save({"state_dict": {"weight": Exploit(str(folder / "touched"))}}, folder / "code_zip.pt")
    torch.save([torch.zeros(2)], folder / "list.pt")
    torch.save({"epoch": 3, "name": "x"}, folder / "no_tensors.pt")
    torch.save({"state_dict": torch.load(zoo / "ImageReward.pt")}, folder / "other.pt")
    wrong = open_clip_weights() | {"visual.proj": torch.zeros(32, 25)}
    del wrong["ln_final.bias"]
    torch.save({"state_dict": wrong}, folder / "wrong.pt")
    return {name: (folder / name, message) for name, (_, message) in contents.items()} | {
        "code.pt": (folder / "code.pt", "not a readable weight file"),
        "code_zip.pt": (folder / "code_zip.pt", "holds more than tensors"),
        "list.pt": (folder / "list.pt", "holds no state dict but list"),
        "no_tensors.pt": (folder / "no_tensors.pt", r"holds no state dict but \['epoch', 'name'\]"),
        "other.pt": (folder / "other.pt", r"do not fit the network: \d+ missing .* unknown \(blip"),
        "wrong.pt": (
            folder / "wrong.pt",
            r"1 missing \(ln_final.bias\); 1 of another shape \(visual.proj \(32, 25\) instead of \(32, 24\)\)",
        ),
    }


FILES = ["truncated.pt", "empty.pt", "page.pt", "truncated.safetensors", "code.pt", "code_zip.pt", "list.pt"]
FILES += ["no_tensors.pt", "other.pt", "wrong.pt"]


@pytest.mark.parametrize("name", FILES)
def test_damaged_and_wrong_weight_files_are_named_and_run_nothing(zoo, tmp_path, name):
    path, message = damaged_files(zoo, tmp_path)[name]
    with pytest.raises(ValueError, match=message) as caught:
        HPSv2(str(path), model=OPEN_CLIP_NAME).load()
    assert str(path) in str(caught.value)
    assert str(caught.value).startswith("HPSv2.weights")
    assert not (tmp_path / "touched").exists()


def copy_clip(zoo: Path, folder: Path) -> Path:
    shutil.copytree(zoo / "clip", folder / "clip")
    return folder / "clip"


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def spoil_config(clip: Path) -> None:
    (clip / "config.json").write_text('{"model_type": ')


def other_family(clip: Path) -> None:
    change_json(clip / "config.json", model_type="siglip")


def other_size(clip: Path) -> None:
    change_json(clip / "preprocessor_config.json", size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42})


def other_crop(clip: Path) -> None:
    change_json(clip / "preprocessor_config.json", size={"shortest_edge": 32})


def other_resample(clip: Path) -> None:
    change_json(clip / "preprocessor_config.json", resample=2)


def other_tokenizer(clip: Path) -> None:
    vocabulary = json.loads((clip / "vocab.json").read_text())
    (clip / "vocab.json").write_text(json.dumps(vocabulary | {f"more{i}</w>": len(vocabulary) + i for i in range(9)}))


def no_weights(clip: Path) -> None:
    (clip / "model.safetensors").unlink()


def no_tokenizer(clip: Path) -> None:
    (clip / "vocab.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_config, "is not JSON"),
        (other_family, "describes a 'siglip' model; expected model_type clip"),
        (other_size, "prepares images of 42 pixels, but the image tower takes 28"),
        (other_crop, "expected a bicubic"),
        (other_resample, "resample 2; expected a bicubic"),
        (other_tokenizer, "tokens, but the text tower knows 562"),
        (no_weights, "has no model.safetensors or pytorch_model.bin"),
        (no_tokenizer, "has no tokenizer.json or vocab.json"),
    ],
)
def test_spoilt_clip_folders_are_named(zoo, tmp_path, spoil, message):
    clip = copy_clip(zoo, tmp_path)
    spoil(clip)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        CLIPScore(str(clip)).load()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"other": 1.0}, "rewards are oracle and weights other"),
        ({}, "rewards are oracle and weights none"),
        ({"oracle": float("nan")}, "are not finite"),
    ],
)
def test_weighted_sum_wants_a_weight_for_each(weights, message):
    with pytest.raises(ValueError, match=message):
        WeightedSum({"oracle": ToyOracle()}, weights)
