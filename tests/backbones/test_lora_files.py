"""Kohya's layout of LoRA files: Stability's names for every layer of SDXL, alphas, and what the readers look for."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft import LoraConfig
from safetensors import safe_open
from torch import nn

from lightning_modules.backbones.lora_files import save_kohya_lora, sgm_names
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.backbones.sdxl import SDXL
from tests.real_size import save_sdxl_configs

# Read off sd-scripts' own SDXL network (library/sdxl_original_unet.py).
KNOWN = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.1.conv1": "input_blocks.2.0.in_layers.2",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0.conv_shortcut": "input_blocks.4.0.skip_connection",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.2.attentions.1.proj_out": "input_blocks.8.1.proj_out",
    "mid_block.resnets.0.time_emb_proj": "middle_block.0.emb_layers.1",
    "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj": "middle_block.1.transformer_blocks.9.ff.net.0.proj",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_out.0": (
        "output_blocks.2.1.transformer_blocks.9.attn2.to_out.0"
    ),
    "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    "up_blocks.1.attentions.0.proj_in": "output_blocks.3.1.proj_in",
    "up_blocks.2.resnets.2.conv2": "output_blocks.8.0.out_layers.3",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "conv_out": "out.2",
}


def layers_of(unet: nn.Module) -> list[str]:
    """Names of all modules that hold weights."""
    return [name for name, module in unet.named_modules() if any(True for _ in module.parameters(recurse=False))]


def read_by_diffusers(names: dict[str, str], unet: nn.Module) -> set[str]:
    """The modules that diffusers finds in a file with these names (module -> kohya's name)."""
    state = {}
    for name in names.values():
        key = f"lora_unet_{name.replace('.', '_')}"
        state |= {f"{key}.lora_{part}.weight": torch.empty(1, 1, device="meta") for part in ("down", "up")}
        state[f"{key}.alpha"] = torch.tensor(1.0)
    read, _ = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=unet.config)
    peft = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in read.items()})
    return {key.removesuffix(".lora_A.weight") for key in peft if key.endswith(".lora_A.weight")}


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> SDXL:
    """SDXL in its real size with LoRA, without weights."""
    backbone = SDXL(str(save_sdxl_configs(tmp_path_factory.mktemp("real_sdxl"))), lora=LoraConfig(r=8, lora_alpha=4))
    with torch.device("meta"):
        backbone.load(weights=False)
    return backbone


def test_names_of_the_real_sdxl_are_stabilitys(real):
    names = sgm_names(real.unet)
    assert {module: names[module] for module in KNOWN} == KNOWN


def test_every_layer_of_the_real_sdxl_has_a_name_of_its_own(real):
    names = real.kohya_names()
    layers = [name.replace(".base_layer", "") for name in layers_of(real.unet) if ".lora_" not in name]
    assert len(layers) == 1050  # as many as in sd-scripts' network
    assert len({names[layer].replace(".", "_") for layer in layers}) == 1050


def test_all_560_attention_projections_survive_diffusers_reader(real):
    modules = {module: name for module, (name, alpha) in real.kohya_modules().items()}
    assert len(modules) == len(set(modules.values())) == 560
    assert {alpha for _, alpha in real.kohya_modules().values()} == {4}
    assert read_by_diffusers(modules, real.unet) == set(modules)


def test_every_matrix_and_convolution_survives_diffusers_reader(real, sdxl):
    small = SDXL(str(sdxl))
    small.load()
    for unet in (real.unet, small.unet):
        modules = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        modules = {name.replace(".base_layer", "") for name in modules if ".lora_" not in name}
        names = sgm_names(unet)
        assert read_by_diffusers({module: names[module] for module in modules}, unet) == modules


def test_levels_of_any_kind_are_counted():
    """Attention on the outer level only, three resnets per level on the way up."""
    unet = UNet2DConditionModel(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 8),
        layers_per_block=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    names = sgm_names(unet)
    assert names["down_blocks.0.attentions.1"] == "input_blocks.2.1"
    assert names["down_blocks.1.resnets.0.conv1"] == "input_blocks.4.0.in_layers.2"
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.1.conv"
    assert names["up_blocks.1.attentions.0.proj_in"] == "output_blocks.3.1.proj_in"
    layers = layers_of(unet)
    assert len({names[layer] for layer in layers}) == len(layers)


def test_names_do_not_depend_on_adapters(sdxl):
    plain, adapted = SDXL(str(sdxl)), SDXL(str(sdxl), lora=LoraConfig(r=2))
    plain.load()
    adapted.load()
    names = sgm_names(adapted.unet)
    assert {name: names[name] for name in sgm_names(plain.unet)} == sgm_names(plain.unet)


# ------------------------------------------------------------------------------------------------------------- files


def write(tmp_path, modules, ranks=(2, 2), **settings):
    adapters = {}
    for module, rank in zip(modules, ranks, strict=True):
        adapters[f"{module}.lora_A.weight"] = torch.ones(rank, 3)
        adapters[f"{module}.lora_B.weight"] = torch.ones(4, rank)
    file = tmp_path / "name.safetensors"
    save_kohya_lora(file, adapters, modules, **({"version": "sd_v1"} | settings))
    with safe_open(file, "pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()  # noqa: SIM118


def test_a_file_holds_both_factors_alpha_and_the_metadata_that_readers_use(tmp_path):
    tensors, metadata = write(tmp_path, {"a.to_q": ("x.1.to_q", 6.0), "a.to_out.0": ("x.1.to_out.0", 6.0)})
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "lora_unet_x_1_to_q.lora_down.weight": (2, 3),
        "lora_unet_x_1_to_q.lora_up.weight": (4, 2),
        "lora_unet_x_1_to_q.alpha": (),
        "lora_unet_x_1_to_out_0.lora_down.weight": (2, 3),
        "lora_unet_x_1_to_out_0.lora_up.weight": (4, 2),
        "lora_unet_x_1_to_out_0.alpha": (),
    }
    assert tensors["lora_unet_x_1_to_q.alpha"] == 6.0
    assert metadata == {
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "6",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "ss_output_name": "name",
    }


def test_alphas_that_differ_are_brought_to_one_without_changing_the_product(tmp_path):
    tensors, metadata = write(tmp_path, {"a": ("a", 6.0), "b": ("b", 3.0)}, ranks=(2, 4))
    assert tensors["lora_unet_a.alpha"] == tensors["lora_unet_b.alpha"] == 6.0
    assert torch.equal(tensors["lora_unet_a.lora_up.weight"], torch.ones(4, 2))
    assert torch.equal(tensors["lora_unet_b.lora_up.weight"], torch.full((4, 4), 0.5))
    assert metadata["ss_network_dim"] == "Dynamic"


def test_half_precision_leaves_alpha_exact(tmp_path):
    tensors, _ = write(tmp_path, {"a": ("a", 4097.0), "b": ("b", 4097.0)}, dtype=torch.float16)
    assert tensors["lora_unet_a.alpha"].item() == 4097.0  # float16 has no such number
    assert tensors["lora_unet_a.lora_up.weight"].dtype == torch.float16


@pytest.mark.parametrize(("fixture", "width", "version"), [("sd15", 8, "sd_v1"), ("sd21", 1024, "sd_v2_v")])
def test_the_base_model_is_named_as_kohya_names_it(fixture, width, version, request):
    backbone = SD15(str(request.getfixturevalue(fixture)))
    backbone.load()
    backbone.text_encoder.config.hidden_size = width
    assert backbone.kohya_version == version
    assert SDXL.kohya_version == "sdxl_base_v1-0"
