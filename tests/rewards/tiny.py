"""Tiny networks saved in the layouts in which the real ones are published."""

import json
import shutil
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

TOY_CLIP = Path(__file__).parents[2] / "datamodules/toy_world/clip"
OPEN_CLIP_NAME = "limelight-tiny"
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
BERT_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "of", ",", "."]


def random_images(number: int = 5, height: int = 40, width: int = 40, seed: int = 0) -> Tensor:
    return torch.rand(number, 3, height, width, generator=torch.Generator().manual_seed(seed))


def save_processor(folder: Path, size: int = 28) -> None:
    """Tokenizer of the toy world's CLIP, and the image processor of the published CLIPs at a small size."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(TOY_CLIP / name, folder)
    CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)


def save_hf_clip(folder: Path, pickled: bool = False, eos: int = 561, seed: int = 1) -> CLIPModel:
    """A CLIP as PickScore's is published: erf GELU, and the `position_ids` that older libraries saved."""
    tower = {"hidden_act": "gelu", "num_attention_heads": 2, "num_hidden_layers": 2}
    text = {"hidden_size": 16, "intermediate_size": 64, "vocab_size": 562, "max_position_embeddings": 16}
    text |= {"bos_token_id": 560, "eos_token_id": eos, "pad_token_id": 561}
    vision = {"hidden_size": 32, "intermediate_size": 128, "image_size": 28, "patch_size": 14}
    torch.manual_seed(seed)
    config = CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=24)
    model = CLIPModel(config).eval()
    for weight in model.parameters():  # far from the initial values, under which all scores are alike
        torch.nn.init.normal_(weight, std=0.2)
    torch.nn.init.constant_(model.logit_scale, 3.0)
    save_processor(folder)
    config.save_pretrained(folder)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    weights["vision_model.embeddings.position_ids"] = torch.arange(5.0)[None]
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return model


def register_open_clip(folder: Path) -> None:
    """Make the tiny model known to open_clip by its name."""
    folder.mkdir(exist_ok=True)
    (folder / f"{OPEN_CLIP_NAME}.json").write_text(json.dumps(OPEN_CLIP))
    open_clip.add_model_config(folder)


def open_clip_weights(seed: int = 2) -> dict[str, Tensor]:
    """A random state dict of the tiny model in open_clip's layout."""
    torch.manual_seed(seed)
    weights = open_clip.create_model(OPEN_CLIP_NAME).state_dict()
    return {
        name: torch.tensor(3.0) if name == "logit_scale" else torch.randn_like(value) * 0.2
        for name, value in weights.items()
    }


def save_bert_tokenizer(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(BERT_VOCABULARY) + "\n")
    return folder


def image_reward_layout(
    vision_width: int = 1024,
    vision_layers: int = 24,
    patch: int = 16,
    patches: int = 196,
    text_width: int = 768,
    text_layers: int = 12,
    text_inner: int = 3072,
    vocabulary: int = 30524,
    positions: int = 512,
) -> dict[str, tuple[int, ...]]:
    """Name -> shape in ImageReward.pt, read off the modules of THUDM/ImageReward and BLIP."""
    V, T = vision_width, text_width
    layout: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        layout[f"{name}.weight"], layout[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str, width: int) -> None:
        layout[f"{name}.weight"], layout[f"{name}.bias"] = (width,), (width,)

    vision = "blip.visual_encoder"
    layout[f"{vision}.cls_token"], layout[f"{vision}.pos_embed"] = (1, 1, V), (1, patches + 1, V)
    layout[f"{vision}.patch_embed.proj.weight"], layout[f"{vision}.patch_embed.proj.bias"] = (V, 3, patch, patch), (V,)
    for i in range(vision_layers):
        block = f"{vision}.blocks.{i}"
        norm(f"{block}.norm1", V)
        linear(f"{block}.attn.qkv", 3 * V, V)
        linear(f"{block}.attn.proj", V, V)
        norm(f"{block}.norm2", V)
        linear(f"{block}.mlp.fc1", 4 * V, V)
        linear(f"{block}.mlp.fc2", V, 4 * V)
    norm(f"{vision}.norm", V)

    text = "blip.text_encoder"
    layout[f"{text}.embeddings.position_ids"] = (1, positions)
    layout[f"{text}.embeddings.word_embeddings.weight"] = (vocabulary, T)
    layout[f"{text}.embeddings.position_embeddings.weight"] = (positions, T)
    norm(f"{text}.embeddings.LayerNorm", T)
    for i in range(text_layers):
        layer = f"{text}.encoder.layer.{i}"
        for attention, source in (("attention", T), ("crossattention", V)):
            linear(f"{layer}.{attention}.self.query", T, T)
            linear(f"{layer}.{attention}.self.key", T, source)
            linear(f"{layer}.{attention}.self.value", T, source)
            linear(f"{layer}.{attention}.output.dense", T, T)
            norm(f"{layer}.{attention}.output.LayerNorm", T)
        linear(f"{layer}.intermediate.dense", text_inner, T)
        linear(f"{layer}.output.dense", T, text_inner)
        norm(f"{layer}.output.LayerNorm", T)
    linear("blip.vision_proj", 256, V)
    linear("blip.text_proj", 256, T)
    for k, (rows, columns) in zip((0, 2, 4, 6, 7), pairs([T, 1024, 128, 64, 16, 1]), strict=True):
        linear(f"mlp.layers.{k}", rows, columns)
    return layout


def pairs(widths: list[int]) -> list[tuple[int, int]]:
    """Widths along a stack of layers -> (rows, columns) of each."""
    return [(rows, columns) for columns, rows in zip(widths, widths[1:], strict=False)]


def mps_layout(
    clip: dict[str, tuple[int, ...]],
    layers: int = 4,
    width: int = 1024,
    inner: int = 1024,
    head: int = 64,
    ff: int = 4096,
) -> dict[str, tuple[int, ...]]:
    """Name -> shape in the state dict of Kwai-Kolors/MPS's module: CLIP's under `model.`, then the layers on top."""
    layout = {f"model.{name}": shape for name, shape in clip.items()}
    for i in range(layers):
        look, think = f"cross_model.layers.{i}.0.fn", f"cross_model.layers.{i}.1.fn"
        layout |= {f"{look}.norm.weight": (width,), f"{look}.norm.bias": (width,)}
        layout |= {f"{look}.to_q.weight": (inner, width), f"{look}.to_kv.weight": (2 * head, width)}
        layout |= {f"{look}.to_out.weight": (width, inner)}
        layout |= {f"{look}.ff.0.weight": (2 * ff, width), f"{look}.ff.2.weight": (width, ff)}
        layout |= {f"{think}.norm.weight": (width,), f"{think}.norm.bias": (width,)}
        layout |= {f"{think}.rotary_emb.inv_freq": (head // 2,)}
        layout |= {f"{think}.fused_attn_ff_proj.weight": (inner + 2 * head + 2 * ff, width)}
        layout |= {f"{think}.attn_out.weight": (width, inner), f"{think}.ff_out.1.weight": (width, ff)}
    return layout


def random_weights(layout: dict[str, tuple[int, ...]], seed: int = 3) -> dict[str, Tensor]:
    """Values under which signals keep their size: norms near 1, matrices by their fan-in; positions are counted."""
    generator = torch.Generator().manual_seed(seed)

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("position_ids"):
            return torch.arange(shape[1])[None]
        if name.endswith("inv_freq"):
            return 10_000.0 ** -(torch.arange(shape[0]) / shape[0])
        if len(shape) == 1:
            return 0.1 * noise + (1 if name.endswith("weight") else 0)
        return noise if "embed" in name and len(shape) < 4 else 1.5 * noise / (noise[0].numel() ** 0.5)

    return {name: value(name, shape) for name, shape in layout.items()}
