"""Reads the golden numbers in tests/golden and compares within each number's stated tolerance."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


@cache
def manifest(method: str) -> dict[str, dict[str, Any]]:
    cases = json.loads((GOLDEN / method / "manifest.json").read_text())["cases"]
    cases = cases.values() if isinstance(cases, dict) else cases
    return {Path(case["file"]).stem: case for case in cases}


def case_names(method: str, prefix: str) -> list[str]:
    """Names of the committed cases that start with `prefix`; at least one, or a test would pass by finding nothing."""
    names = sorted(path.stem for path in (GOLDEN / method).glob(f"{prefix}*.safetensors"))
    assert names, f"no golden case {prefix}* of {method}"
    return names


def load_case(method: str, case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a case by name, and its parameters: `params`, or in a manifest without them all that it says."""
    about = manifest(method)[case]
    return load_file(GOLDEN / method / about["file"]), about.get("params", about)


def assert_golden(method: str, case: str, **actual: Tensor | float) -> None:
    """Compare outputs with the golden ones, each within the tolerance that the manifest states for it."""
    about = manifest(method)[case]
    expected = load_file(GOLDEN / method / about["file"])
    for name, value in actual.items():
        tolerance = about["outputs"][name]["tolerance"]
        value = torch.as_tensor(value, dtype=expected[name].dtype).reshape(expected[name].shape)
        if tolerance == "exact":
            assert torch.equal(value, expected[name]), f"{case}: {name} is {value}, expected {expected[name]}"
        else:
            torch.testing.assert_close(
                value,
                expected[name],
                rtol=tolerance.get("rtol", 0.0),
                atol=tolerance.get("atol", 0.0),
                msg=lambda text, name=name: f"{case}: {name}: {text}",
            )
            if "mean_abs" in tolerance:
                assert (value - expected[name]).abs().mean() <= tolerance["mean_abs"], f"{case}: {name}"


def assert_within(tolerance: dict[str, float] | str, actual: Tensor, expected: Tensor) -> None:
    """Compare with a manifest's tolerance: "exact", or an `rtol` and an `atol`."""
    if tolerance == "exact":
        assert torch.equal(actual.to(expected.dtype), expected), f"{actual} is not {expected}"
    else:
        torch.testing.assert_close(actual, expected.to(actual.dtype), **tolerance)
