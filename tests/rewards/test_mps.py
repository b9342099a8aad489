"""MPS: weights in the layout of the published module against its formulas written out."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from lightning_modules.rewards.mps import MPS, OVERALL
from tests.rewards.test_clip_family import hf_pixels
from tests.rewards.tiny import TOY_CLIP, mps_layout, random_images, random_weights, save_hf_clip

PROMPTS = ["a red circle", "a blue square", "a red circle", "two green rings", "a yellow ring"]
SIZES = {"layers": 2, "width": 24, "inner": 32, "head": 8, "ff": 40}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mps")
    save_hf_clip(folder)
    clip = load_file(folder / "model.safetensors")
    for name in ("token_embedding.weight", "position_embedding.weight"):
        clip[f"text_model.embeddings.{name}"] *= 10  # so that some tokens matter and others do not
    clip["text_model.final_layer_norm.weight"] = torch.ones(16)
    clip["text_model.final_layer_norm.bias"] = torch.zeros(16)
    save_file(clip, folder / "model.safetensors")
    weights = random_weights(mps_layout({}, **SIZES)) | {f"model.{name}": value for name, value in clip.items()}
    torch.save(weights, folder / "mps.pt")
    return folder, weights


def attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None) -> Tensor:
    """Heads of 8 features one by one, all over the same keys and values; `allowed` (B, M)."""
    heads = []
    for part in q.split(8, dim=-1):
        scores = part @ k.transpose(1, 2) / math.sqrt(8)
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], float("-inf"))
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, -1)


def turn(x: Tensor) -> Tensor:
    """Feature pairs (i, i + 4) of one head, turned by position times 10000^(-i/4)."""
    out = x.clone()
    for n in range(x.shape[1]):
        for i in range(4):
            angle = n * 10_000 ** (-i / 4)
            a, b = x[:, n, i], x[:, n, i + 4]
            out[:, n, i] = a * math.cos(angle) - b * math.sin(angle)
            out[:, n, i + 4] = b * math.cos(angle) + a * math.sin(angle)
    return out


def score_by_hand(folder, weights: dict[str, Tensor], pixels: Tensor, prompts: list[str], condition: str) -> Tensor:
    clip = CLIPModel.from_pretrained(folder).double().eval()
    tokenizer = CLIPTokenizer.from_pretrained(TOY_CLIP)
    w = {name: value.double() for name, value in weights.items() if name.startswith("cross_model.")}

    def texts(words: list[str]):
        ids = tokenizer(words, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
        out = clip.text_model(input_ids=ids)
        return clip.text_projection(out.last_hidden_state), clip.text_projection(out.pooler_output)

    with torch.no_grad():
        text, whole = texts(prompts)
        words, _ = texts([condition])
        relevance = torch.stack([torch.stack([(t @ words[0].T).max() for t in one]) for one in text])
        allowed = torch.stack([one / one.max() > 0.3 for one in relevance])
        assert 0 < allowed.sum() < allowed.numel()  # or the mask would not be tested
        x = clip.visual_projection(clip.vision_model(pixel_values=pixels.double()).last_hidden_state)
        for i in range(SIZES["layers"]):
            look, think = f"cross_model.layers.{i}.0.fn.", f"cross_model.layers.{i}.1.fn."
            y = F.layer_norm(x, (24,), w[f"{look}norm.weight"], w[f"{look}norm.bias"])
            k, v = (text @ w[f"{look}to_kv.weight"].T).split(8, -1)
            seen = attention(y @ w[f"{look}to_q.weight"].T, k, v, allowed) @ w[f"{look}to_out.weight"].T
            value, gate = (y @ w[f"{look}ff.0.weight"].T).split(40, -1)
            x = x + seen + (F.silu(gate) * value) @ w[f"{look}ff.2.weight"].T

            y = F.layer_norm(x, (24,), w[f"{think}norm.weight"], w[f"{think}norm.bias"])
            q, k, v, value, gate = (y @ w[f"{think}fused_attn_ff_proj.weight"].T).split((32, 8, 8, 40, 40), -1)
            q = torch.cat([turn(part) for part in q.split(8, -1)], -1)
            seen = attention(q, turn(k), v) @ w[f"{think}attn_out.weight"].T
            x = x + seen + (F.silu(gate) * value) @ w[f"{think}ff_out.1.weight"].T
        return math.exp(3) * torch.cosine_similarity(x[:, 0], whole)


@pytest.mark.parametrize("condition", [OVERALL, "red circle"])
def test_score_equals_the_formulas_written_out(saved, condition):
    folder, weights = saved
    images = random_images(5, 40, 51)
    expected = score_by_hand(folder, weights, hf_pixels(images), PROMPTS, condition)
    reward = MPS(str(folder / "mps.pt"), str(folder), condition=condition, chunk_size=2)
    score = reward(images, PROMPTS)
    torch.testing.assert_close(score.double(), expected, rtol=1e-4, atol=1e-4)
    assert score.std() > 0.1


def test_low_precision_comes_near(saved):
    folder, _ = saved
    exact, near = (
        MPS(str(folder / "mps.pt"), str(folder), precision=precision)(random_images(), PROMPTS)
        for precision in ("float32", "bfloat16")
    )
    assert (exact - near).abs().max() < 0.3 * exact.std()


def test_the_published_pickle_is_not_read_but_its_state_dict_is_asked_for(saved, tmp_path):
    folder, _ = saved
    torch.save(torch.nn.Linear(2, 2), tmp_path / "MPS_overall_checkpoint.pth")
    with pytest.raises(ValueError, match=r"holds more than tensors.*state_dict\(\), new_path"):
        MPS(str(tmp_path / "MPS_overall_checkpoint.pth"), str(folder)).load()


def test_another_state_dict_is_refused(saved):
    folder, weights = saved
    torch.save({name: v for name, v in weights.items() if name.startswith("model.")}, folder / "clip_only.pt")
    with pytest.raises(ValueError, match="no state dict of MPS"):
        MPS(str(folder / "clip_only.pt"), str(folder)).load()
