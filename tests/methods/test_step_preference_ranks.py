"""A step preference model on two gloo ranks: the update and accuracy of one rank, and an exact resume after a kill."""

import csv
import json
import signal
from pathlib import Path

import pytest
import torch

from tests.methods.run_ranks import main
from tests.methods.test_two_ranks import assert_ranks_share_the_draws, run, weights
from tests.rewards.tiny import save_hf_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    save_hf_clip(folder)
    return str(folder)


def spm(folder: Path, pretrained: Path, clip: str, expected_exit: int = 0, **settings) -> Path:
    """A run on two ranks, or in this process on one."""
    settings = {"options": {}, "accumulate": 1, "steps": 2, "method": "spm", "clip": clip} | settings
    if settings["devices"] > 1:
        return run(folder, pretrained, expected_exit, **settings)
    folder.mkdir()
    main(json.loads(json.dumps(settings)) | {"folder": str(folder), "pretrained": str(pretrained), "strategy": "auto"})
    return folder


@pytest.mark.slow
def test_two_ranks_make_the_update_of_one_rank_with_twice_the_accumulation(sd15, clip, tmp_path):
    one = spm(tmp_path / "one", sd15, clip, devices=1, accumulate=2)
    two = spm(tmp_path / "two", sd15, clip, devices=2, accumulate=1)
    expected, actual = weights(one, 2), weights(two, 2)
    assert expected.keys() == actual.keys()
    assert all(name.startswith("model.") for name in expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6)
    start = weights(one, 1)
    assert any(not torch.allclose(start[name], tensor, atol=1e-5) for name, tensor in expected.items())
    assert_ranks_share_the_draws(two, one)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log" / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("in_batch", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_make_the_update_and_measure_the_accuracy_of_one_with_twice_the_batch(in_batch, sd15, clip, tmp_path):
    """On clean images, which need no random numbers; in-batch contrast looks at the pairs of both ranks."""
    options = {"in_batch": in_batch, "input_kind": "clean"}
    shared = {"val_check_interval": 2, "val_batches": 6, "options": options}
    one = spm(tmp_path / "one", sd15, clip, devices=1, batch_size=4, **shared)
    two = spm(tmp_path / "two", sd15, clip, devices=2, batch_size=2, **shared)
    for name, tensor in weights(one, 2).items():
        torch.testing.assert_close(weights(two, 2)[name], tensor, rtol=1e-5, atol=1e-6)
    found = [
        {k: float(v) for row in rows(folder) for k, v in row.items() if k.startswith("val/") and v}
        for folder in (one, two)
    ]
    assert found[0]["val/pairs"] == 24.0
    assert found[0] == pytest.approx(found[1])


@pytest.mark.slow
def test_two_killed_ranks_resume_exactly(sd15, clip, tmp_path):
    options = {"devices": 2, "accumulate": 2, "steps": 3}
    whole = spm(tmp_path / "whole", sd15, clip, **options)
    killed = spm(tmp_path / "killed", sd15, clip, -signal.SIGKILL, kill_after=3, **options)
    last = max((killed / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    assert last.name == "step=1.ckpt"  # killed within the second step's window
    resumed = spm(tmp_path / "resumed", sd15, clip, ckpt_path=str(last), **options)
    expected, actual = weights(whole, 3), weights(resumed, 3)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    assert rows(resumed) == rows(whole)[1:]
