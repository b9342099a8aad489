"""Two ranks with DDP on gloo, for real: the update of one rank with twice the accumulation, and an exact resume."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(folder: Path, pretrained: Path, expected_exit: int | None = 0, **settings) -> Path:
    folder.mkdir()
    path = folder / "settings.json"
    strategy = "ddp" if settings["devices"] > 1 else "auto"
    defaults = {"folder": str(folder), "pretrained": str(pretrained), "strategy": strategy}
    path.write_text(json.dumps(defaults | settings))
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.methods.run_ranks", str(path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if expected_exit is not None:
        assert process.returncode == expected_exit, process.stderr[-3000:]
    return folder


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / f"step={step}.ckpt", weights_only=True)["state_dict"]


def assert_ranks_share_the_draws(two: Path, one: Path) -> None:
    """The ranks drew different noise: together, what the single rank drew in turn."""
    seen = [json.loads((two / f"seen_{rank}.json").read_text()) for rank in (0, 1)]
    assert not set(seen[0]) & set(seen[1])
    assert sorted(seen[0] + seen[1]) == pytest.approx(sorted(json.loads((one / "seen_0.json").read_text())))


@pytest.fixture(scope="module")
def one_rank(sd15, tmp_path_factory):
    return run(tmp_path_factory.mktemp("ranks") / "one", sd15, devices=1, accumulate=2, steps=3, lora=False)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_make_the_update_of_one_rank_with_twice_the_accumulation(one_rank, strategy, sd15, tmp_path):
    two = run(tmp_path / "two", sd15, devices=2, accumulate=1, steps=3, lora=False, strategy=strategy)
    expected, actual = weights(one_rank, 3), weights(two, 3)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5)
    start = weights(one_rank, 1)
    assert any(not torch.allclose(start[name], tensor, atol=1e-3) for name, tensor in expected.items())

    assert_ranks_share_the_draws(two, one_rank)


@pytest.mark.slow
def test_two_ranks_of_orpo_make_the_update_of_one(sd15, tmp_path):
    one = run(tmp_path / "one", sd15, method="orpo", devices=1, accumulate=2, steps=2)
    two = run(tmp_path / "two", sd15, method="orpo", devices=2, accumulate=1, steps=2)
    for name, tensor in weights(one, 2).items():
        torch.testing.assert_close(weights(two, 2)[name], tensor, rtol=1e-4, atol=1e-5)
    assert_ranks_share_the_draws(two, one)


@pytest.mark.slow
def test_fsdp2_shards_the_adapters_and_resumes(sd15, tmp_path):
    options = {"devices": 2, "accumulate": 1, "strategy": "fsdp2"}
    whole = run(tmp_path / "whole", sd15, steps=3, **options)
    first = whole / "checkpoints" / "step=1.ckpt"
    resumed = run(tmp_path / "resumed", sd15, steps=3, ckpt_path=str(first), **options)
    expected, actual = weights(whole, 3), weights(resumed, 3)
    assert all("lora_" in name for name in expected)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_two_killed_ranks_resume_exactly(sd15, tmp_path):
    whole = run(tmp_path / "whole", sd15, devices=2, accumulate=2, steps=4)
    killed = run(tmp_path / "killed", sd15, -signal.SIGKILL, devices=2, accumulate=2, steps=4, kill_after=5)
    last = max((killed / "checkpoints").iterdir(), key=lambda path: path.stat().st_mtime)
    assert last.name == "step=2.ckpt"  # killed within the third step's window
    resumed = run(tmp_path / "resumed", sd15, devices=2, accumulate=2, steps=4, ckpt_path=str(last))
    expected, actual = weights(whole, 4), weights(resumed, 4)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    rows = (whole / "log" / "metrics.csv").read_text().splitlines()
    assert (resumed / "log" / "metrics.csv").read_text().splitlines() == [rows[0], *rows[3:]]
