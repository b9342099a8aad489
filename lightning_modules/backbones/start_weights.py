"""Weights that a fully trained student starts from: a bare state dict of a diffusers network, as DMD2 publishes it."""

from pathlib import Path

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_modules.weight_files import check_shapes, read_weights

PREFIXES = ("module.", "unet.", "feedforward_model.")  # of wrappers that programs save their networks in


def strip_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes of wrappers, each of which all names have in common."""
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


@torch.no_grad()
def load_start_weights(option: str, file: str, network: nn.Module) -> None:
    """Put the weights of a file into a network, name by name; the network keeps its precision.

    Args:
        option: Name of the setting, for messages.
        file: .bin, .pt, .pth (read without running their code) or .safetensors; SDXL's UNet has 1680 tensors.
        network: Without adapters.

    Raises:
        ValueError: naming the weights that are missing, not known, or of another shape.
    """
    weights = strip_wrappers(read_weights(option, Path(file)))
    expected = network.state_dict()
    check_shapes(option, Path(file), weights, expected)
    for name, tensor in expected.items():
        tensor.copy_(weights[name])
    rank_zero_info(f"{option}: {len(weights)} tensors of {file!r} are where the student starts.")
