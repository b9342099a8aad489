"""What a step preference model gains on the embedded world, over three seeds.

    pytest -m slow tests/methods/test_step_preference_effects.py

Runs of cli_configs/toy/spm.yaml, four CPU minutes each.
"""

import functools
import json
import shutil
from pathlib import Path

import pytest

from lightning_modules.cli.app import run

ROOT = Path(__file__).parents[2]
# Of accuracy, by timestep and in the mean; at 951 an estimate says hardly more of its image than the caption does.
GAINS = {"_t0": 0.15, "_t251": 0.15, "_t501": 0.10, "_t701": 0.05, "_t951": 0.0, "": 0.12}


def accuracies(command: str, name: str, *options: str) -> dict[str, float]:
    """Held-out pair accuracy of the tiny CLIP at each timestep, trained or not."""
    shutil.rmtree(Path("runs") / name, ignore_errors=True)
    done = run([command, "--config", "cli_configs/toy/spm.yaml", f"--name={name}", *options])
    metrics = done.trainer.callback_metrics
    result = {key: value.item() for key, value in metrics.items() if key.startswith("val/accuracy")}
    print(command, name, *options, json.dumps(result))
    return result


@functools.cache
def accuracies_before_training() -> dict[str, float]:
    return accuracies("validate", "effect-spm-before")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_step_preference_model_sees_more_than_the_clip_it_started_from(seed, monkeypatch):
    """At every timestep: on the clean images, and on what the base takes noised ones to be."""
    monkeypatch.chdir(ROOT)
    before, after = accuracies_before_training(), accuracies("fit", f"effect-spm-{seed}", f"--seed_everything={seed}")
    gain = {name: after[name] - before[name] for name in after}
    for timestep, margin in GAINS.items():
        assert gain[f"val/accuracy{timestep}"] >= margin, gain
