"""At their real sizes, built without memory, the networks have the names and shapes of the published files."""

from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig

from lightning_modules.rewards import image_reward, mps
from lightning_modules.rewards.mps import MPSNetwork
from lightning_modules.rewards.towers import empty_hf_clip, empty_open_clip, open_clip_config
from lightning_modules.weight_files import build_empty
from tests.rewards.tiny import image_reward_layout, mps_layout

Layout = dict[str, tuple[int, ...]]


def layout_of(network: torch.nn.Module) -> Layout:
    assert {weight.device.type for weight in network.parameters()} == {"meta"}
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def linear(name: str, rows: int, columns: int) -> Layout:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> Layout:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def hf_clip_layout(vision: tuple[int, int, int, int], text: tuple[int, int], projection: int) -> Layout:
    """CLIPModel of transformers: (layers, width, patches, patch) and (layers, width)."""
    (vision_layers, V, patches, patch), (text_layers, T) = vision, text
    layout: Layout = {"logit_scale": ()}
    layout |= {"visual_projection.weight": (projection, V), "text_projection.weight": (projection, T)}
    layout |= {"vision_model.embeddings.class_embedding": (V,)}
    layout |= {"vision_model.embeddings.patch_embedding.weight": (V, 3, patch, patch)}
    layout |= {"vision_model.embeddings.position_embedding.weight": (patches + 1, V)}
    layout |= norm("vision_model.pre_layrnorm", V) | norm("vision_model.post_layernorm", V)
    layout |= {"text_model.embeddings.token_embedding.weight": (49408, T)}
    layout |= {"text_model.embeddings.position_embedding.weight": (77, T)} | norm("text_model.final_layer_norm", T)
    for tower, layers, width in (("vision", vision_layers, V), ("text", text_layers, T)):
        for i in range(layers):
            layer = f"{tower}_model.encoder.layers.{i}"
            for part in "qkv":
                layout |= linear(f"{layer}.self_attn.{part}_proj", width, width)
            layout |= linear(f"{layer}.self_attn.out_proj", width, width)
            layout |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
            layout |= linear(f"{layer}.mlp.fc1", 4 * width, width) | linear(f"{layer}.mlp.fc2", width, 4 * width)
    return layout


def open_clip_vit_h_14() -> Layout:
    """HPS_v2_compressed.pt, HPS_v2.1_compressed.pt and DFN5B's open_clip_pytorch_model.bin."""
    layout: Layout = {"logit_scale": (), "positional_embedding": (77, 1024), "text_projection": (1024, 1024)}
    layout |= {"token_embedding.weight": (49408, 1024)} | norm("ln_final", 1024)
    layout |= {"visual.class_embedding": (1280,), "visual.positional_embedding": (257, 1280)}
    layout |= {"visual.proj": (1280, 1024), "visual.conv1.weight": (1280, 3, 14, 14)}
    layout |= norm("visual.ln_pre", 1280) | norm("visual.ln_post", 1280)
    for tower, layers, width in (("visual.", 32, 1280), ("", 24, 1024)):
        for i in range(layers):
            block = f"{tower}transformer.resblocks.{i}"
            layout |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
            layout |= linear(f"{block}.attn.out_proj", width, width)
            layout |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
            layout |= linear(f"{block}.mlp.c_fc", 4 * width, width) | linear(f"{block}.mlp.c_proj", width, 4 * width)
    return layout


VIT_H = hf_clip_layout((32, 1280, 256, 14), (24, 1024), 1024)
VIT_L = hf_clip_layout((24, 1024, 256, 14), (12, 768), 768)


def vit_h_config() -> CLIPConfig:
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    activation = {"hidden_act": "gelu"}
    return CLIPConfig(
        text_config=text | activation, vision_config=vision | activation | {"patch_size": 14}, projection_dim=1024
    )


def vit_l_config() -> CLIPConfig:
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return CLIPConfig(text_config=text, vision_config=vision | {"patch_size": 14}, projection_dim=768)


def empty_clip(config: CLIPConfig, folder: Path) -> torch.nn.Module:
    config.save_pretrained(folder)
    return empty_hf_clip("test", folder / "config.json")


@pytest.mark.parametrize(
    ("config", "layout", "tensors", "values"),
    [(vit_h_config, VIT_H, 910, 986_109_441), (vit_l_config, VIT_L, 590, 427_616_513)],
    ids=["PickScore_v1", "clip-vit-large-patch14"],
)
def test_transformers_clip(tmp_path, config, layout, tensors, values):
    network = empty_clip(config(), tmp_path)
    assert layout_of(network) == layout
    assert len(layout) == tensors
    assert sum(weight.numel() for weight in network.parameters()) == values


@pytest.mark.parametrize("name", ["ViT-H-14", "ViT-H-14-quickgelu"])
def test_open_clip_vit_h_14(name):
    network = empty_open_clip(open_clip_config("test", name))
    assert layout_of(network) == open_clip_vit_h_14()
    assert len(open_clip_vit_h_14()) == 686
    assert sum(weight.numel() for weight in network.parameters()) == 986_109_441
    activation = type(network.visual.transformer.resblocks[0].mlp.gelu).__name__
    assert activation == ("QuickGELU" if name.endswith("quickgelu") else "GELU")
    assert network.visual.transformer.resblocks[0].attn.num_heads == 16  # head width 80


def test_image_reward():
    published = image_reward_layout()
    assert len(published) == 625
    ours = {
        image_reward.from_published(name): shape
        for name, shape in published.items()
        if not name.startswith(image_reward.UNUSED) and not name.endswith("position_ids")
    }
    network = build_empty(image_reward.ImageRewardNetwork)
    assert layout_of(network) == ours
    assert sum(weight.numel() for weight in network.parameters()) == 446_206_689

    on_meta = {name: torch.empty(shape, device="meta") for name, shape in published.items()}
    sizes = image_reward.sizes_of(on_meta)
    assert layout_of(build_empty(lambda: image_reward.ImageRewardNetwork(**sizes))) == ours
    assert network.vision.config.num_attention_heads == 16
    assert network.text.config.num_attention_heads == 12


def test_mps(tmp_path):
    published = mps_layout(VIT_H)
    assert len(published) == 910 + 4 * 13
    network = build_empty(lambda: MPSNetwork(empty_clip(vit_h_config(), tmp_path), None))
    assert layout_of(network) == {mps.from_published(name): shape for name, shape in published.items()}
    on_meta = {name: torch.empty(shape, device="meta") for name, shape in published.items()}
    assert mps.sizes_of(on_meta) == {"layers": 4, "width": 1024, "inner": 1024, "head": 64, "ff": 4096}
