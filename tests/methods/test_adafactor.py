"""The optimizer of the SDXL recipe against the published script's, step by step."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import Adafactor

from tests.golden_cases import assert_golden, load_case

RECIPE = Path(__file__).parents[2] / "cli_configs/dpo/sdxl.yaml"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_golden_adafactor_steps(number):
    tensors, params = load_case("diffusion_dpo", "adafactor_three_steps")
    optimizer = yaml.safe_load(RECIPE.read_text())["model"]["init_args"]["optimizer"]
    assert optimizer["class_path"] == "transformers.Adafactor"
    parameter = torch.nn.Parameter(tensors[f"param{number}_step0"].clone())
    adafactor = Adafactor([parameter], **optimizer["init_args"] | {"lr": params["lr"]})
    for step in (1, 2, 3):
        parameter.grad = tensors[f"grad{number}_step{step}"].clone()
        adafactor.step()
        name = f"param{number}_step{step}"
        assert_golden("diffusion_dpo", "adafactor_three_steps", **{name: parameter.detach()})
