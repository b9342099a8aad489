"""DMDR on two ranks, for real (gloo): both networks' updates are those of one rank, and a resume is exact."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from tests.methods.dmdr_ranks import one_run
from tests.methods.dmdr_runs import Brightness, build, weights

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
    common["DS_ACCELERATOR"] = "cpu"
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


# ----------------------------------------------------------------------------------------------------------- DeepSpeed


def engine_weights(folder: Path) -> dict[str, torch.Tensor]:
    file = folder / "checkpoints/step=2.ckpt/checkpoint/mp_rank_00_model_states.pt"
    return torch.load(file, weights_only=False)["module"]  # DeepSpeed's own objects beside our weights


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_two_ranks_of_zero2_train_both_networks_as_one_rank_does(sd15, tmp_path):
    one_run(tmp_path / "one", str(sd15), micro_batch_size=1)
    one_run(tmp_path / "one_bf16", str(sd15), precision="bf16-mixed")
    zero2 = {"pretrained": str(sd15), "strategy": "zero2", "micro_batch_size": 1}
    two = {
        "zero2": zero2 | {"save_at": 4},
        "zero2_resumed": zero2 | {"ckpt_path": str(tmp_path / "two/zero2/between.ckpt")},
        "zero2_bf16": zero2 | {"micro_batch_size": None, "precision": "bf16-mixed"},
    }
    run_ranks(tmp_path / "two", two)
    whole, resumed, half = (engine_weights(tmp_path / "two" / name) for name in two)
    expected = last(tmp_path / "one")
    assert whole.keys() == expected.keys()  # what is trained, and nothing frozen
    for name, tensor in expected.items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-4, atol=1e-5)
        assert torch.equal(resumed[name], whole[name])
    for name, tensor in last(tmp_path / "one_bf16").items():
        score = ".score." in name
        assert half[name].dtype == (torch.float32 if score else torch.bfloat16)
        torch.testing.assert_close(half[name].float(), tensor, rtol=2**-8, atol=1e-5 if score else 1e-3)
    assert json.loads((tmp_path / "two/zero2_resumed/rank_1.json").read_text())["global_step"] == 2


def deepspeed_of(**config) -> DeepSpeedStrategy:
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # its constructor asks for the package
    strategy.config = config
    return strategy


@pytest.mark.parametrize(
    ("strategy", "settings", "precision", "message"),
    [
        (FSDPStrategy, {}, "32-true", "FSDP's first version, which clips .* use FSDP2"),
        (ModelParallelStrategy, {"shared_step": False}, "32-true", "shared_step is false, .* set model.shared_step"),
        (lambda: deepspeed_of(zero_optimization={"stage": 3}), {}, "bf16-mixed", "ZeRO stage 3, .* use stage 2"),
        (deepspeed_of, {"keep_optimizers": True, "start_from": "a.ckpt"}, "bf16-mixed", "model.keep_optimizers: Deep"),
        (lambda: deepspeed_of(gradient_clipping=2.0), {}, "bf16-mixed", "gradient_clipping is 2.0 .* leave the first"),
    ],
)
def test_strategies_that_cannot_train_it_are_refused(strategy, settings, precision, message, sd15):
    module = build(sd15, **settings)
    module._trainer = SimpleNamespace(strategy=strategy(), precision=precision)
    with pytest.raises(ValueError, match=message):
        module.check_strategy()


@pytest.mark.parametrize(
    ("strategy", "settings"),
    [
        (ModelParallelStrategy, {}),
        (ModelParallelStrategy, {"sampler": "ode"}),
        (lambda: deepspeed_of(zero_optimization={"stage": 2}), {"gradient_clip_val": 0.5}),
    ],
)
def test_strategies_that_can_are_not(strategy, settings, sd15):
    module = build(sd15, **settings)
    module._trainer = SimpleNamespace(strategy=strategy(), precision="bf16-mixed")
    module.check_strategy()
    if isinstance(module.trainer.strategy, DeepSpeedStrategy):
        assert module.trainer.strategy.config["gradient_clipping"] == 0.5


def test_the_engine_gets_the_student_alone_and_casts_nothing_else(sd15):
    module = build(sd15, rewards={"b": Brightness()}, reward_weights={"b": 1.0})
    module.backbone.load()
    module.backbone.add_score(module.score_lora, module.fake_scale)
    strategy = deepspeed_of()
    strategy._accelerator, strategy.parallel_devices = None, [torch.device("cpu")]
    strategy.cluster_environment = SimpleNamespace(local_rank=lambda: 0)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    student, fake = module.network_parameters()
    module._trainer = SimpleNamespace(strategy=strategy)
    (optimizer,) = module.configure_optimizers()
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in student]
    assert [id(p) for p in module.fake_optimizer.param_groups[0]["params"]] == [id(p) for p in fake]
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()  # as the engine does
    module.on_fit_start()
    engaged = {id(p) for p in student}
    for name, parameter in module.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if id(parameter) in engaged else torch.float32)
        assert id(parameter) in engaged or torch.equal(parameter, before[name])
