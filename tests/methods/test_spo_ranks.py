"""SPO in processes of its own: two gloo ranks that pool their pairs, and runs that die anywhere and are resumed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_modules.base import batch_seed
from lightning_modules.spo import SPO, spo_loss
from tests.methods.spo_runs import build, rows, weights

ROOT = Path(__file__).parents[2]
SGD = {"sgd": 1.0, "gradient_clip_val": None, "threshold": 0.0}
KILLS = {
    "inside_a_rollout": {"judge_options": {"kill_at": 6}},  # the third of four judgements of the second round
    "between_updates": {"kill": {"batch": 2}},
    "at_an_epochs_end": {"kill": {"epoch": 1}},
}


def start(folder: Path, pretrained: Path, runs: dict[str, dict]) -> dict[str, int]:
    """Make runs one after the other, and return their exit codes."""
    file = folder / "runs.json"
    listed = [{"folder": str(folder / name), "pretrained": str(pretrained), **run} for name, run in runs.items()]
    file.write_text(json.dumps(listed))
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.methods.spo_runs", str(file)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1500,  # a machine may be busy
    )
    assert process.returncode == 0, process.stderr[-3000:]
    print(process.stderr[-5000:])
    return dict(zip(runs, json.loads(process.stdout.splitlines()[-1]), strict=True))


def last_checkpoint(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step=*.ckpt"), key=lambda path: int(path.stem[5:]))


def resumed(folder: Path, run: dict) -> dict:
    """The run of a folder without its death, from its last checkpoint, or from the start if it had none."""
    alive = {name: value for name, value in run.items() if name not in ("kill", "judge_options")}
    checkpoints = [*(folder / "checkpoints").glob("step=*.ckpt")] if (folder / "checkpoints").is_dir() else []
    return alive | ({"ckpt_path": str(last_checkpoint(folder))} if checkpoints else {})


def assert_same_end(whole: Path, killed: Path, again: Path) -> None:
    end = last_checkpoint(whole)
    expected, actual = weights(end), weights(again / "checkpoints" / end.name)
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    expected_rows, actual_rows = rows(whole), rows(again)
    assert actual_rows == expected_rows[-len(actual_rows) :]
    before = rows(killed) if (killed / "log" / "metrics.csv").exists() else []
    assert before == expected_rows[: len(before)]
    assert len(before) + len(actual_rows) >= len(expected_rows)  # nothing between death and checkpoint is missing


# ------------------------------------------------------------------------------------------------------------- killed


def kill_and_resume(folder: Path, pretrained: Path, devices: int) -> tuple[Path, dict[str, int]]:
    """A whole run, runs that die, and these runs resumed."""
    common = {"devices": devices, "max_epochs": 2, "prompts": 2 * 2 * devices}
    runs = {"whole": common} | {name: common | how for name, how in KILLS.items()}
    exits = start(folder, pretrained, runs)
    again = {f"{name}_again": resumed(folder / name, runs[name]) for name in KILLS}
    return folder, exits | start(folder, pretrained, again)


@pytest.fixture(scope="module")
def dead_and_resumed(sd15, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    return kill_and_resume(tmp_path_factory.mktemp("killed"), sd15, devices=1)


@pytest.fixture(scope="module")
def two_dead_and_resumed(sd15, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    return kill_and_resume(tmp_path_factory.mktemp("killed"), sd15, devices=2)


@pytest.mark.parametrize("where", KILLS)
@pytest.mark.parametrize("runs", ["dead_and_resumed", pytest.param("two_dead_and_resumed", marks=pytest.mark.slow)])
def test_a_killed_run_is_resumed_bit_for_bit(runs, where, request):
    folder, exits = request.getfixturevalue(runs)
    assert exits["whole"] == exits[f"{where}_again"] == 0
    assert exits[where] != 0
    if where != "inside_a_rollout":
        assert last_checkpoint(folder / where).stem != last_checkpoint(folder / "whole").stem
    assert_same_end(folder / "whole", folder / where, folder / f"{where}_again")


def test_some_checkpoints_hold_pairs_that_are_left(dead_and_resumed):
    folder, _ = dead_and_resumed
    checkpoints = (folder / "whole" / "checkpoints").iterdir()
    assert any("pairs" in torch.load(path, weights_only=True)["limelight"] for path in checkpoints)


# ------------------------------------------------------------------------------------------------------------ two ranks


@pytest.fixture(scope="module")
def two_ranks(sd15, tmp_path_factory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("ranks")
    common = {"devices": 2, "options": SGD, "max_epochs": 1, "prompts": 4}
    runs = {
        "both": common,
        "uneven": common | {"judge": "rank_zero"},
        "empty": common | {"judge": "rank_zero", "judge_options": {"nowhere": True}},
        "scarce": common | {"judge": "rank_zero", "options": SGD | {"first_step": 5}, "batch_size": 1, "prompts": 2},
    }
    return folder, start(folder, sd15, runs)


def fresh(pretrained: Path) -> SPO:
    """The module as the runs begin with it."""
    module = build(pretrained, **{name: value for name, value in SGD.items() if name != "sgd"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(batch_seed(11, "initial weights", 0))
        module.backbone.load(keep_reference=True)
    module.backbone.denoiser.train()
    module.prepare_steps()
    return module


@pytest.mark.parametrize("name", ["both", "uneven"])
def test_two_ranks_make_the_update_of_one_that_has_the_whole_pool(name, two_ranks, sd15):
    folder, exits = two_ranks
    assert exits[name] == 0
    dealt = [torch.load(folder / name / f"pairs_0_{rank}.pt", weights_only=True) for rank in (0, 1)]
    number = len(dealt[0]["pairs"]["t"])
    assert number == len(dealt[1]["pairs"]["t"]) >= 3
    assert dealt[0]["prompts"] == dealt[1]["prompts"] == dealt[0]["mine"] + dealt[1]["mine"]
    if name == "uneven":  # all pairs are of the first rank's prompts, and each rank trains on half of them
        assert all(part["pairs"]["prompt"].max() < len(part["mine"]) for part in dealt)

    module = fresh(sd15)
    module.prompts = dealt[0]["prompts"]
    first = {
        key: torch.cat([part["pairs"][key][: module.train_batch_size] for part in dealt]) for key in dealt[0]["pairs"]
    }
    spo_loss(module.log_ratio(first), module.beta)[0].mean().backward()
    after = weights(folder / name / "checkpoints" / "step=1.ckpt")
    for key, parameter in module.trained_parameters().items():
        torch.testing.assert_close(after[key], parameter - parameter.grad, rtol=1e-4, atol=1e-6)
    assert max(p.grad.abs().max() for p in module.trained_parameters().values()) > 1e-3


def test_ranks_draw_different_candidates(two_ranks):
    folder, _ = two_ranks
    dealt = [torch.load(folder / "both" / f"pairs_0_{rank}.pt", weights_only=True)["pairs"] for rank in (0, 1)]
    x_s = torch.cat([part["x_s"].flatten(2) for part in dealt]).flatten(0, 1)
    assert len({row.sum().item() for row in x_s}) == len(x_s)


def test_rounds_without_pairs_on_any_rank_do_not_hang(two_ranks):
    folder, exits = two_ranks
    assert exits["empty"] == 0
    assert not list((folder / "empty").glob("checkpoints/*"))
    assert {float(row["rollout/valid_share"]) for row in rows(folder / "empty")} == {0.0}


def test_fewer_pairs_than_ranks_train_nobody(two_ranks):
    """One prompt on each rank, one step that makes pairs, and only the first rank's is valid."""
    folder, exits = two_ranks
    assert exits["scarce"] == 0
    assert not list((folder / "scarce").glob("checkpoints/*"))
    assert {float(row["rollout/valid_share"]) for row in rows(folder / "scarce")} == {0.5}
