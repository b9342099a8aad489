"""The time-conditioned CLIP: what the published programs gave, its start, its files, and the reward made of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from lightning_modules.rewards.step_preference import (
    StepPreference,
    TimeConditionedCLIP,
    conditioned_layer,
    export,
    fit_step_preference,
    is_time_weight,
    load_step_preference,
    official_weights,
    pixels_for_spm,
    sinusoid,
)
from lightning_modules.weight_files import build_empty
from tests.golden_cases import GOLDEN, load_case
from tests.rewards.tiny import TOY_CLIP, random_images, save_hf_clip

SPM = "step_preference_model"
FEATURES = {"atol": 5e-5, "rtol": 1e-4}
PROMPTS = ["a red circle", "a blue square", "a red circle"]


def case(name: str) -> dict[str, Tensor]:
    return load_case(SPM, name)[0]


def golden_config(name: str = "full_model") -> CLIPConfig:
    config = load_case(SPM, name)[1]["config"]
    text = config["text_config"] | {"eos_token_id": 2}  # as in the published configs: the largest token ends the text
    return CLIPConfig(text_config=text, vision_config=config["vision_config"], projection_dim=config["projection_dim"])


def golden_network() -> TimeConditionedCLIP:
    """The tiny network with the golden weights, which have the official names."""
    network = TimeConditionedCLIP(CLIPModel(golden_config())).eval()
    weights = {k.removeprefix("weights."): v for k, v in case("full_model").items() if k.startswith("weights.")}
    assert set(weights) <= set(official_weights(network))
    names = {k.removeprefix("model."): v for k, v in weights.items() if not k.endswith("position_ids")}
    network.load_state_dict(names)
    return network.requires_grad_(False)


# --------------------------------------------------------------------------------------------------- golden: network


def test_golden_sinusoid_and_embedding():
    golden = case("full_model")
    torch.testing.assert_close(sinusoid(golden["timesteps"]), golden["expected_sinusoid"], atol=1e-5, rtol=0)
    embedded = golden_network().t_embedder(golden["timesteps"])
    torch.testing.assert_close(embedded, golden["expected_time_embedding"], **FEATURES)


def test_golden_layer_and_tower():
    golden, network = case("full_model"), golden_network()
    layer = network.vision_model.encoder.layers[0]
    out = conditioned_layer(layer, golden["layer0_hidden_in"], golden["layer0_cond"])
    torch.testing.assert_close(out, golden["layer0_hidden_out"], **FEATURES)
    hidden, pooled = network.image_tower(golden["pixel_values"], golden["vision_timesteps"])
    torch.testing.assert_close(hidden, golden["vision_last_hidden_state"], **FEATURES)
    torch.testing.assert_close(pooled, golden["vision_pooled"], **FEATURES)


def test_golden_features_and_scores():
    golden, network = case("full_model"), golden_network()
    pixels, t = golden["pixel_values"], golden["timesteps"]
    image = torch.stack([network.encode_image(pixels, step.expand(2)) for step in t])
    torch.testing.assert_close(image, golden["expected_image_features"], **FEATURES)
    mixed = network.encode_image(pixels[torch.arange(len(t)) % 2], t)
    torch.testing.assert_close(mixed, golden["expected_image_features_mixed"], **FEATURES)
    for padding in ("eos", "zero"):
        text = network.encode_text(golden[f"input_ids_pad_{padding}"])
        torch.testing.assert_close(text, golden[f"expected_text_features_pad_{padding}"], **FEATURES)
    scores = network.score(image[:, :, None], text[None, None])
    torch.testing.assert_close(scores, golden["expected_scores"], atol=1e-3, rtol=1e-4)


def test_golden_published_file(tmp_path):
    golden = case("tiny_final_ckpt_expected")
    network = build_empty(lambda: TimeConditionedCLIP(CLIPModel(golden_config())))
    fit_step_preference("file", GOLDEN / SPM / "tiny_final_ckpt.bin", network)
    image = network.encode_image(golden["pixel_values"], golden["timesteps"])
    text = network.encode_text(golden["input_ids"])
    torch.testing.assert_close(image, golden["expected_image_features"], **FEATURES)
    torch.testing.assert_close(text, golden["expected_text_features"], **FEATURES)
    torch.testing.assert_close(network.score(image, text), golden["expected_scores"], atol=1e-3, rtol=1e-4)
    # And back: the same names and values, bit for bit.
    published = torch.load(GOLDEN / SPM / "tiny_final_ckpt.bin", weights_only=True)
    written = official_weights(network)
    assert set(written) == set(published)
    assert all(value.dtype == torch.float32 and torch.equal(value, published[k]) for k, value in written.items())


def test_golden_start():
    golden = case("init_is_identity")
    plain = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    clip = CLIPModel(golden_config("init_is_identity"))
    clip.load_state_dict({k: v for k, v in plain.items() if not k.endswith("position_ids")})
    network = TimeConditionedCLIP(clip.eval())
    weights = official_weights(network)
    for name, value in golden.items():
        if name.startswith("expected_init."):
            assert torch.equal(weights[name.removeprefix("expected_init.")], value), name
    assert weights["model.t_embedder.mlp.0.weight"].std() == pytest.approx(0.02, rel=0.05)
    for t in (golden["timesteps"], torch.tensor([0, 999, 501])):
        features = network.encode_image(golden["pixel_values"], t)
        torch.testing.assert_close(features, golden["expected_image_features"], atol=5e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------- golden: pixels


@pytest.mark.parametrize("i", [0, 1])
def test_golden_training_pixels(i):
    golden = case("train_pixels")
    for k in (0, 1):
        pixels = pixels_for_spm(golden[f"case{i}_decoded_{k}"], "training", 28)
        torch.testing.assert_close(pixels, golden[f"case{i}_expected_pixels_{k}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("i", range(4))
def test_golden_scoring_pixels_and_scores(i):
    golden, network = case("preference_score"), golden_network()
    pixels = pixels_for_spm(golden[f"case{i}_images"], "scoring", 28)
    torch.testing.assert_close(pixels, golden[f"case{i}_expected_pixels"], atol=1e-4, rtol=0)
    image = network.encode_image(pixels, golden[f"case{i}_timesteps"])
    scores = network.score(image, network.encode_text(golden[f"case{i}_input_ids"]))
    torch.testing.assert_close(scores, golden[f"case{i}_expected_scores"], atol=2e-3, rtol=1e-4)


def test_two_pixel_paths_agree_on_squares_within_range_only():
    images = 1.6 * random_images(2) - 0.8
    torch.testing.assert_close(pixels_for_spm(images, "training", 28), pixels_for_spm(images, "scoring", 28))
    overshooting = 3 * random_images(2) - 1.5
    paths = [pixels_for_spm(overshooting, mode, 28) for mode in ("training", "scoring")]
    assert (paths[0] - paths[1]).abs().max() > 0.01
    assert pixels_for_spm(random_images(1, 30, 90), "scoring", 28).shape == (1, 3, 28, 28)
    with pytest.raises(ValueError, match="known are training and scoring"):
        pixels_for_spm(images, "test")


def test_pixels_are_aliased_as_published_unless_asked():
    """A checkerboard of single pixels turns grey only when it is smoothed first."""
    board = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 2 - 1).float().expand(1, 3, 64, 64)
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert pixels_for_spm(board, "training", 28, **half).abs().max() > 0.3
    for mode in ("training", "scoring"):
        assert pixels_for_spm(board, mode, 28, **half, antialias=True).abs().max() < 0.05


def test_pixels_are_computed_in_float32_and_pass_gradients():
    images = (2 * random_images(2) - 1).to(torch.bfloat16).requires_grad_()
    pixels = pixels_for_spm(images, "scoring", 28)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, pixels_for_spm(images.float(), "scoring", 28))
    pixels.sum().backward()
    assert images.grad.abs().max() > 0


# ------------------------------------------------------------------------------------------------- what it must keep


@pytest.mark.parametrize("source", ["toy", "tiny"])
def test_at_the_start_it_is_the_clip_it_was_made_from(source, tmp_path):
    if source == "tiny":
        save_hf_clip(tmp_path)
    folder = TOY_CLIP if source == "toy" else tmp_path
    towers, preprocessing = load_step_preference("clip", None, str(folder), untrained=True)
    clip = CLIPModel.from_pretrained(folder).eval()
    size = preprocessing.size
    pixels, tokens = torch.randn(3, 3, size, size), towers.tokenize(PROMPTS)
    with torch.no_grad():
        expected = clip.get_image_features(pixel_values=pixels).pooler_output
        for t in (0, 1, 251, 999):
            assert torch.equal(towers.clip.encode_image(pixels, torch.full((3,), t)), expected)
        assert torch.equal(towers.clip.encode_image(pixels, torch.tensor([7, 501, 998])), expected)
        assert torch.equal(towers.encode_texts(PROMPTS), clip.get_text_features(input_ids=tokens).pooler_output)


def test_a_batch_of_timesteps_is_scored_as_one_by_one():
    golden, network = case("full_model"), golden_network()
    pixels = golden["pixel_values"].repeat(4, 1, 1, 1)[:7].double()
    network = network.double()
    together = network.encode_image(pixels, golden["timesteps"])
    alone = [network.encode_image(pixels[i : i + 1], golden["timesteps"][i : i + 1]) for i in range(7)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-12, rtol=1e-12)
    assert (together[0] - together[2]).abs().max() > 1e-3  # the same image at another time


def test_what_stands_behind_the_end_token_does_not_matter():
    network = golden_network()
    tokens = torch.tensor([[95, 5, 6, 98, 98, 98], [95, 5, 6, 98, 0, 17]])
    first, second = network.encode_text(tokens)
    assert torch.equal(first, second)


def test_half_precision_timesteps_are_refused():
    assert torch.equal(sinusoid(torch.tensor([501])), sinusoid(torch.tensor([501.0])))
    with pytest.raises(ValueError, match="rounds them"):
        sinusoid(torch.tensor([501.0], dtype=torch.bfloat16))


def test_head_is_float32_under_autocast():
    network = golden_network()
    image, text = torch.randn(64, 16), torch.randn(64, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = network.score(image, text)
    assert torch.equal(scores, network.score(image, text))


def test_recomputed_layers_give_the_same_gradient():
    golden = case("full_model")
    gradients = []
    for recompute in (False, True):
        network = golden_network().requires_grad_(True)
        network.gradient_checkpointing = recompute
        network.encode_image(golden["pixel_values"], golden["vision_timesteps"]).square().sum().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert all(torch.equal(value, gradients[1][name]) for name, value in gradients[0].items())


@pytest.fixture(scope="module")
def full_size() -> TimeConditionedCLIP:
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    both = {"hidden_act": "gelu", "projection_dim": 1024}
    config = CLIPConfig(text_config=text | both, vision_config=vision | both | {"patch_size": 14}, projection_dim=1024)
    return build_empty(lambda: TimeConditionedCLIP(CLIPModel(config)))


def test_full_size_has_the_published_names_and_shapes(full_size):
    layout = json.loads((GOLDEN / SPM / "official_key_layout_vit_h14.json").read_text())["keys"]
    ours = {f"model.{name}": list(value.shape) for name, value in full_size.state_dict().items()}
    assert len(layout) == 982
    assert set(layout) - set(ours) == {f"model.{tower}_model.embeddings.position_ids" for tower in ("text", "vision")}
    assert ours == {name: shape for name, shape in layout.items() if name in ours}
    parameters = dict(full_size.named_parameters())
    assert (len(parameters), sum(p.numel() for p in parameters.values())) == (980, 1_306_176_001)
    assert sum(p.numel() for name, p in parameters.items() if is_time_weight(name)) == 320_066_560


# ----------------------------------------------------------------------------------------------------------- the files


@pytest.fixture
def clip(tmp_path) -> Path:
    save_hf_clip(tmp_path / "clip")
    return tmp_path / "clip"


def trained(clip: Path, seed: int = 5) -> dict[str, Tensor]:
    """Official weights of a network whose time weights matter."""
    network = load_step_preference("clip", None, str(clip), untrained=True)[0].clip
    generator = torch.Generator().manual_seed(seed)
    for name, value in network.state_dict().items():
        if is_time_weight(name):
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return official_weights(network)


def write(weights: dict[str, Tensor], file: Path, kind: str) -> Path:
    """A file of the kinds that are read."""
    if kind == "bin":
        torch.save(weights, file.with_suffix(".bin"))
    elif kind == "safetensors":
        save_file(weights, file.with_suffix(".safetensors"))
    elif kind == "ckpt":
        own = {name: value for name, value in weights.items() if "position_ids" not in name}
        about = {"pretrained": "some/diffusion-model"}
        torch.save({"state_dict": own, "limelight": about, "epoch": 3}, file.with_suffix(".ckpt"))
    else:  # without the prefix, in half precision
        bare = {name.removeprefix("model."): value.half() for name, value in weights.items()}
        save_file(bare, file.with_suffix(".safetensors"))
    return next(path for path in file.parent.glob(f"{file.name}.*"))


@pytest.mark.parametrize("kind", ["bin", "safetensors", "ckpt", "bare"])
def test_every_kind_of_file_gives_the_same_scores(kind, clip, tmp_path):
    weights = trained(clip)
    file = write(weights, tmp_path / "spm", kind)
    scores = StepPreference(str(file), str(clip), str(clip))(random_images(3), PROMPTS, torch.tensor([1, 501, 951]))
    network = load_step_preference("clip", None, str(clip), untrained=True)[0]
    network.clip.load_state_dict({k.removeprefix("model."): v for k, v in weights.items() if "position" not in k[-12:]})
    pixels = pixels_for_spm(2 * random_images(3) - 1, "scoring", 28)
    image = network.clip.encode_image(pixels, torch.tensor([1, 501, 951]))
    expected = network.clip.score(image, network.encode_texts(PROMPTS))
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if kind == "bare" else {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(scores, expected, **tolerance)


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_export_writes_the_published_layout_and_reads_back(suffix, clip, tmp_path, capsys):
    weights = trained(clip)
    source, target = write(weights, tmp_path / "run", "ckpt"), tmp_path / "out" / f"final_ckpt{suffix}"
    export(str(source), str(target), str(clip))
    assert "final_ckpt" in capsys.readouterr().out
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    if suffix == ".bin":
        written = torch.load(target, weights_only=True)
    else:
        with safe_open(target, "pt") as opened:
            assert opened.metadata()["diffusion_model"] == "some/diffusion-model"
            written = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no dict)
    assert set(written) == set(weights)
    assert all(value.dtype == torch.float32 and torch.equal(value, weights[k]) for k, value in written.items())
    t = torch.tensor([1, 501, 951])
    scores = [StepPreference(str(f), str(clip), str(clip))(random_images(3), PROMPTS, t) for f in (source, target)]
    assert torch.equal(*scores)


def test_export_is_a_command_and_tells_what_is_wrong(clip, tmp_path):
    source = write(trained(clip), tmp_path / "run", "ckpt")
    command = [sys.executable, "-m", "lightning_modules.rewards.step_preference", "export"]
    for arguments, code, message in (
        ([source, tmp_path / "a.bin"], 0, "a.bin"),
        ([source, tmp_path / "a.pt"], 1, "ends in .bin or .safetensors"),
        ([tmp_path / "gone.ckpt", tmp_path / "b.bin"], 1, "there is no file"),
    ):
        done = subprocess.run(
            [*command, *map(str, arguments), f"--clip={clip}"],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
        assert message in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "b.bin").exists()


def damage_weights(weights: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    weights = dict(weights)
    if how == "missing":
        del weights["model.t_embedder.mlp.2.bias"]
    elif how == "unknown":
        weights["model.vision_model.gate"] = torch.zeros(1)
    elif how == "shape":
        weights["model.visual_projection.weight"] = torch.zeros(2, 2)
    elif how == "position_ids":
        weights["model.text_model.embeddings.position_ids"] = torch.arange(16.0)[None] + 1
    elif how == "plain":
        weights = {name: value for name, value in weights.items() if not is_time_weight(name)}
    elif how == "helpers":
        weights["backbone.unet.conv_in.weight"] = torch.zeros(3)
    return weights


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"1 missing \(t_embedder.mlp.2.bias\)"),
        ("unknown", r"1 unknown \(vision_model.gate\)"),
        ("shape", r"visual_projection.weight \(2, 2\) instead of \(24, 32\)"),
        ("position_ids", r"1 unknown \(text_model.embeddings.position_ids\)"),
        ("plain", "is a plain CLIP: it has no time weights"),
        ("helpers", "do not fit the network"),
    ],
)
def test_files_that_do_not_fit_are_refused(how, message, clip, tmp_path):
    file = write(damage_weights(trained(clip), how), tmp_path / "spm", "bin")
    with pytest.raises(ValueError, match=message):
        StepPreference(str(file), str(clip), str(clip)).load()
    with pytest.raises(ValueError, match=message):
        export(str(file), str(tmp_path / "out.bin"), str(clip))
    assert not (tmp_path / "out.bin").exists()


def test_a_folder_of_deepspeed_is_told_apart(clip, tmp_path):
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "zero_to_fp32.py").write_text("")
    folder = str(tmp_path / "last.ckpt")
    for use in (lambda: StepPreference(folder, str(clip), str(clip)), lambda: export(folder, "a.bin", str(clip))):
        with pytest.raises(ValueError, match=r"is a checkpoint of DeepSpeed.*convert_zero_checkpoint"):
            use()


def test_a_pickle_with_code_is_not_read(clip, tmp_path):
    torch.save(CLIPModel(golden_config()), tmp_path / "model.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        StepPreference(str(tmp_path / "model.bin"), str(clip), str(clip)).load()


# ---------------------------------------------------------------------------------------------------------- the reward


@pytest.fixture
def reward(clip, tmp_path) -> StepPreference:
    return StepPreference(str(write(trained(clip), tmp_path / "spm", "bin")), str(clip), str(clip), chunk_size=2)


def test_reward_without_timesteps_judges_finished_images_at_zero(reward):
    images = random_images(3)
    scores = reward(images, PROMPTS)
    assert scores.shape == (3,)
    assert torch.equal(scores, reward(images, PROMPTS, torch.zeros(3, dtype=torch.int64)))
    assert (scores - reward(images, PROMPTS, torch.tensor([951] * 3))).abs().max() > 1e-3


def test_reward_scores_a_decoders_overshoot_as_the_published_code(reward):
    decoded, t = 3 * random_images(3, 40, 52) - 1.5, torch.tensor([1, 501, 951])
    clip = reward.load() or reward.network.clip
    image = clip.encode_image(pixels_for_spm(decoded, "scoring", 28), t)
    expected = clip.score(image, reward.network.encode_texts(PROMPTS))
    torch.testing.assert_close(reward(decoded / 2 + 0.5, PROMPTS, t), expected, atol=1e-4, rtol=1e-4)


def test_reward_gives_the_gradient_of_finite_differences(reward):
    images, t = (0.1 + 0.8 * random_images(3, 33, 30)).requires_grad_(), torch.tensor([1, 501, 951])
    reward(images, PROMPTS, t).sum().backward()
    direction = torch.sign(images.grad)
    step = 1e-2 / direction.norm()
    with torch.no_grad():
        up, down = (reward(images + sign * step * direction, PROMPTS, t).double().sum() for sign in (1, -1))
    assert (up - down) / (2 * step) == pytest.approx((images.grad * direction).sum().item(), rel=0.02)
    assert reward.differentiable
    assert all(weight.grad is None for weight in reward.parameters())


def test_reward_encodes_each_prompt_once_and_draws_no_random_number(reward, monkeypatch):
    before = torch.get_rng_state()
    reward.load()
    asked = []
    encode = reward.network.encode_texts
    monkeypatch.setattr(reward.network, "encode_texts", lambda texts: asked.extend(texts) or encode(texts))
    first = reward(random_images(3), PROMPTS)
    assert torch.equal(reward(random_images(3), PROMPTS), first)
    assert asked == ["a red circle", "a blue square"]
    assert torch.equal(torch.get_rng_state(), before)


def test_reward_is_the_same_under_a_trainers_autocast(reward):
    plain = reward(random_images(3), PROMPTS, torch.tensor([1, 501, 951]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(reward(random_images(3), PROMPTS, torch.tensor([1, 501, 951])), plain)


def test_plain_clip_is_scored_only_when_asked_for(clip):
    with pytest.raises(ValueError, match="weights is null"):
        StepPreference(None, str(clip), str(clip))
    plain = StepPreference(None, str(clip), str(clip), allow_untrained=True)
    before = torch.get_rng_state()
    scores = plain(random_images(3), PROMPTS)
    assert torch.equal(scores, plain(random_images(3), PROMPTS, torch.tensor([951] * 3)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "gone.bin"}, "there is no file 'gone.bin'"),
        ({"clip": "./gone"}, "there is no folder './gone'"),
        ({"processor": "./gone"}, "there is no folder './gone'"),
        ({"precision": "int8"}, "expected float32, bfloat16 or float16"),
        ({"chunk_size": 0}, "expected 1 or more images"),
    ],
)
def test_wrong_settings_are_told_at_once(change, message, clip):
    settings = {"weights": None, "clip": str(clip), "processor": str(clip), "allow_untrained": True} | change
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        StepPreference(**settings)


@pytest.mark.parametrize(
    ("images", "prompts", "t", "message"),
    [
        (torch.zeros(2, 1, 8, 8), PROMPTS[:2], None, "expected a tensor of shape"),
        (random_images(2), PROMPTS, None, "2 images and 3 prompts"),
        (2 * random_images(2), PROMPTS[:2], None, r"expected \[0, 1\]"),
        (random_images(2) * float("nan"), PROMPTS[:2], torch.zeros(2), "has values from nan"),
        (random_images(2), PROMPTS[:2], torch.zeros(3), r"expected \(2,\), a timestep for each image"),
        (random_images(2), PROMPTS[:2], torch.zeros(2, dtype=torch.float16), "rounds them"),
    ],
)
def test_wrong_inputs_are_refused(images, prompts, t, message, reward):
    with pytest.raises(ValueError, match=message):
        reward(images, prompts, t)


def test_model_says_which_diffusion_model_it_was_trained_on(clip, tmp_path, caplog):
    file = write(trained(clip), tmp_path / "spm", "ckpt")
    with caplog.at_level("INFO"):
        StepPreference(str(file), str(clip), str(clip)).load()
    assert "was trained on what some/diffusion-model makes" in caplog.text
