"""LoRA files in the layout of kohya's sd-scripts, which ComfyUI, A1111 and diffusers read."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

# What Stability's own code (SGM) calls the layers that diffusers names differently.
SGM_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
SGM_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def sgm_names(unet: nn.Module) -> dict[str, str]:
    """Stability's name (SGM) of each layer of a diffusers UNet, read off the UNet's structure.

    SGM numbers the stations on the way down (`input_blocks`) and up (`output_blocks`) through all levels. A station is
    a resnet, followed by an attention where the level has them; going down, a change of size is a station of its own,
    going up it is the last part of a level's last station.

    Args:
        unet: A `UNet2DConditionModel`, with or without adapters.

    Returns:
        diffusers' module name -> SGM's.
    """
    parts = SGM_ENDS | {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    station = 1  # input_blocks.0 is conv_in
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            parts[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{station}.0"
            parts[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{station}.1"
            station += 1
        if block.downsamplers is not None:
            parts[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{station}.0.op"
            station += 1
    station = 0
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            parts[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{station}.0"
            parts[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{station}.1"
            station += 1
        if block.upsamplers is not None:
            place = 2 if hasattr(block, "attentions") else 1
            parts[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{station - 1}.{place}"

    names = {}
    for name, _ in unet.named_modules():
        words = name.split(".")
        for cut in range(len(words), 0, -1):
            part, layer = ".".join(words[:cut]), ".".join(words[cut:])
            if part in parts:
                layer = SGM_RESNET.get(layer, layer) if ".resnets." in part else layer
                names[name] = f"{parts[part]}.{layer}".rstrip(".")
                break
    return names


def save_kohya_lora(
    file: Path,
    adapters: dict[str, Tensor],
    modules: dict[str, tuple[str, float]],
    version: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write adapters as kohya's sd-scripts do: `lora_unet_<name>.lora_down.weight`, `.lora_up.weight` and `.alpha`.

    diffusers' own `convert_state_dict_to_kohya` does not serve: it knows no SGM names, and writes the rank as alpha.

    Args:
        file: The safetensors file.
        adapters: peft's "<module>.lora_A.weight", (r, in, ...), and "<module>.lora_B.weight", (out, r, ...), float32.
        modules: Module -> its name in kohya's files, and alpha: an adapter of rank r acts with factor alpha / r.
        version: What kohya calls the base model, for example "sdxl_base_v1-0".
        dtype: Type of the weights in the file; alpha stays float32.
    """
    tensors, ranks = {}, set()
    # One alpha for all: where they differ, diffusers' reader loses those of attention layers.
    _, alpha = next(iter(modules.values()))
    for module, (name, its_alpha) in modules.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        down, up = adapters[f"{module}.lora_A.weight"], adapters[f"{module}.lora_B.weight"] * (its_alpha / alpha)
        tensors[f"{key}.lora_down.weight"] = down.to(dtype).contiguous()
        tensors[f"{key}.lora_up.weight"] = up.to(dtype).contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
        ranks.add(len(down))
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",  # sd-scripts' word for several
        "ss_network_alpha": f"{alpha:g}",
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")),
        "ss_output_name": file.stem,
    }
    save_file(tensors, file, metadata)
