"""DMDR on two ranks, for real (gloo): both networks' updates are those of one rank, and a resume is exact."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.methods.dmdr_ranks import one_run
from tests.methods.dmdr_runs import weights

ROOT = Path(__file__).parents[2]


def run_ranks(folder: Path, runs: dict[str, dict], ranks: int = 2) -> Path:
    """Run them one after the other in the same `ranks` processes, each with its own folder below `folder`."""
    folder.mkdir(parents=True)
    path = folder / "runs.json"
    path.write_text(json.dumps({name: {"ranks": ranks} | settings for name, settings in runs.items()}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.methods.dmdr_ranks", str(path)],
            cwd=ROOT,
            env=common | {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(error[-3000:] for error in errors)
    return folder


@pytest.fixture(scope="module")
def runs(sd15, tmp_path_factory):
    """LoRA: one rank in this process; two ranks, under DDP and FSDP2, in two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    one_run(folder / "one", str(sd15))
    ddp = {"pretrained": str(sd15), "micro_batch_size": None, "strategy": "ddp"}
    two = {
        "ddp": ddp | {"save_at": 4},
        "ddp_resumed": ddp | {"ckpt_path": str(folder / "two/ddp/between.ckpt")},
        "ddp_broken": ddp | {"broken": True},
        "fsdp2": ddp | {"strategy": "fsdp2", "save_at": 4},
    }
    run_ranks(folder / "two", two)
    return folder


@pytest.fixture(scope="module")
def more_runs(runs, sd15):
    """Student with all its weights, so that there are two networks, and DMD2's simulation; and FSDP2 resumed."""
    full = {"pretrained": str(sd15), "adapters": False, "simulation": "dmd2"}
    one_run(runs / "one_full", **full)
    two = {
        "ddp_full": full | {"micro_batch_size": None, "strategy": "ddp"},
        "fsdp2_full": full | {"micro_batch_size": None, "strategy": "fsdp2"},
        "fsdp2_resumed": {
            "pretrained": str(sd15),
            "micro_batch_size": None,
            "strategy": "fsdp2",
            "ckpt_path": str(runs / "two/fsdp2/between.ckpt"),
        },
    }
    run_ranks(runs / "more", two)
    return runs


def last(folder: Path) -> dict[str, torch.Tensor]:
    return weights(folder / "checkpoints" / "step=2.ckpt")


def losses(folder: Path, network: str) -> list[dict]:
    lines = (folder / f"log/loss_logs/loss_{network}_log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_training(one: Path, two: Path) -> None:
    expected, actual = last(one), last(two)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    start = weights(one / "checkpoints" / "step=1.ckpt")
    for score in (True, False):  # both networks do move
        assert any((".score." in n) == score and not torch.allclose(start[n], t, atol=5e-4) for n, t in actual.items())
    for network in ("gen", "gui"):
        for row, expected_row in zip(losses(two, network), losses(one, network), strict=True):
            assert row == pytest.approx(expected_row, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_both_adapters_as_one_rank_does_in_two_micro_batches(strategy, runs):
    assert_same_training(runs / "one", runs / "two" / strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_train_two_networks_as_one_rank_does(strategy, more_runs):
    assert_same_training(more_runs / "one_full", more_runs / f"more/{strategy}_full")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_each_optimizer_finds_gradients_of_its_own_network_only(strategy, runs):
    for rank in (0, 1):
        steps = json.loads((runs / f"two/{strategy}/rank_{rank}.json").read_text())["steps"]
        fake, student = [False, True], [True, False]
        assert steps == [fake, fake, fake, student, fake, fake, student]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_the_ranks_draw_different_noise_and_together_that_of_one(strategy, runs):
    seen = [json.loads((runs / f"two/{strategy}/rank_{rank}.json").read_text())["seen"] for rank in (0, 1)]
    one = json.loads((runs / "one/rank_0.json").read_text())["seen"]
    assert not set(seen[0]) & set(seen[1])
    assert sorted(seen[0] + seen[1]) == pytest.approx(sorted(one), rel=1e-3, abs=1e-2)


def assert_exact_resume(whole: Path, resumed: Path) -> None:
    about = torch.load(whole / "between.ckpt", weights_only=True)["limelight"]
    assert (about["inner_step"], about["generator_step"]) == (4, 1)
    expected, actual = last(whole), last(resumed)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


def test_two_ranks_resumed_between_updates_repeat_the_whole_run(runs):
    assert_exact_resume(runs / "two/ddp", runs / "two/ddp_resumed")


@pytest.mark.slow
def test_two_ranks_of_fsdp2_resumed_between_updates_repeat_the_whole_run(more_runs):
    assert_exact_resume(more_runs / "two/fsdp2", more_runs / "more/fsdp2_resumed")


def test_steps_are_those_of_the_student_on_every_rank(runs):
    for name in ("ddp", "fsdp2", "ddp_resumed"):
        assert json.loads((runs / f"two/{name}/rank_1.json").read_text())["global_step"] == 2


def test_a_teacher_that_fails_on_one_rank_is_ignored_and_counted(runs):
    replaced = [row["replaced"] for row in losses(runs / "two/ddp_broken", "gen")]
    assert replaced == [0.0, 4 * 8 * 8 / 2]  # a mean over the ranks: one sample of one of them
    broken, whole = last(runs / "two/ddp_broken"), last(runs / "two/ddp")
    assert all(tensor.isfinite().all() for tensor in broken.values())
    assert any(not torch.equal(broken[name], tensor) for name, tensor in whole.items())
