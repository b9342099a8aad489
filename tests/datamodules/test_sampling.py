import json
import logging
import multiprocessing
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.sampling import EvaluationSampler, StreamSampler
from tests.datamodules import stream
from tests.datamodules.stream import Echo, EchoData, Recorder, SaveAndDie, fit, quiet_trainer

RUNS = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_steps": 5},
    "limited epochs": {"max_epochs": 3, "limit_train_batches": 4},
    "validation": {"max_epochs": 3, "limit_val_batches": 2},
    "validation inside epochs": {"max_steps": 6, "limit_val_batches": 2, "val_check_interval": 2},
    "validation by steps": {
        "max_steps": 6,
        "limit_val_batches": 2,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
    },
}


def samples(
    num_rows: int, batch_size: int, accumulate: int = 1, world: int = 1, rank: int = 0, start: int = 0, seed: int = 0
):
    return list(StreamSampler(Echo(num_rows), batch_size, accumulate, world, rank, seed, start=lambda: start))


def test_a_pass_shows_every_row_once_and_passes_differ():
    first, second = samples(8, 2), samples(8, 2, start=8)
    assert [position for _, position in first + second] == list(range(16))
    assert sorted(row for row, _ in first) == sorted(row for row, _ in second) == list(range(8))
    assert [row for row, _ in first] != [row for row, _ in second]


def test_order_depends_on_the_seed():
    assert samples(50, 2, seed=1) != samples(50, 2, seed=2)


def test_an_epoch_is_a_whole_number_of_windows_and_the_next_continues():
    first = samples(10, batch_size=2, accumulate=3)
    second = samples(10, batch_size=2, accumulate=3, start=6)
    assert [position for _, position in first + second] == list(range(12))
    assert sorted(row for row, position in first + second if position < 10) == list(range(10))


def test_an_epoch_of_few_rows_is_one_window_over_several_passes():
    window = samples(4, batch_size=2, accumulate=5)
    assert [position for _, position in window] == list(range(10))
    assert sorted(row for row, _ in window[:4]) == sorted(row for row, _ in window[4:8]) == [0, 1, 2, 3]


def test_ranks_take_turns_and_together_equal_one_rank_with_twice_the_accumulation():
    one = samples(20, batch_size=2, accumulate=4, start=8)
    ranks = [samples(20, batch_size=2, accumulate=2, world=2, rank=rank, start=8) for rank in (0, 1)]
    turns = [ranks[k % 2][k // 2 * 2 : k // 2 * 2 + 2] for k in range(len(one) // 2)]
    assert [sample for batch in turns for sample in batch] == one
    assert not set(ranks[0]) & set(ranks[1])


def test_the_rows_to_come_are_told_now_and_then():
    told = []
    rows = [row for row, _ in StreamSampler(Echo(3000), 2, 1, 1, 0, seed=0, start=lambda: 0, prefetch=told.append)]
    assert [len(ahead) for ahead in told] == [3000, 1976, 952]
    assert all(ahead.tolist() == rows[-len(ahead) :] for ahead in told)


def test_evaluation_deals_every_row_to_one_rank():
    parts = [list(EvaluationSampler(Echo(7), num_replicas=3, rank=rank)) for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]
    assert [len(EvaluationSampler(Echo(7), 3, rank)) for rank in range(3)] == [3, 2, 2]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_validation_end"])
def test_resume_after_any_batch_continues_the_uninterrupted_run(hook, run, accumulate, tmp_path):
    options = {"accumulate_grad_batches": accumulate, **RUNS[run]}
    whole = fit(EchoData(), **options)
    for number in range(1, 100):
        checkpoint = tmp_path / f"{number}.ckpt"
        killed = fit(EchoData(), killer=SaveAndDie(hook, number, checkpoint), **options)
        if not checkpoint.exists():
            break
        resumed = fit(EchoData(), checkpoint, **options)
        assert killed.seen + resumed.seen == whole.seen
        # Gradients inside a window are the LightningModule's to save.
        if len(killed.seen) % accumulate == 0:
            assert torch.equal(resumed.weight, whole.weight)
    assert number > 1 or (hook == "on_validation_end" and "validation" not in run)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_before_optimizer_step"])
@pytest.mark.parametrize("run", ["epochs", "steps", "validation"])
def test_a_resumed_run_can_be_resumed(run, hook, tmp_path):
    options = {"accumulate_grad_batches": 3, **RUNS[run]}
    whole = fit(EchoData(), **options)
    first, second = tmp_path / "first.ckpt", tmp_path / "second.ckpt"
    for number in (1, 2, 3):
        killed = fit(EchoData(), killer=SaveAndDie(hook, number, first), **options)
        trained = len(killed.seen) - (hook == "on_before_optimizer_step")  # that step is repeated
        for again in (1, 2, 3, 4):
            second.unlink(missing_ok=True)
            resumed = fit(EchoData(), first, SaveAndDie("on_train_batch_end", again, second), **options)
            if second.exists():
                rest = fit(EchoData(), second, **options)
                assert killed.seen[:trained] + resumed.seen + rest.seen == whole.seen


def test_a_resumed_run_writes_no_checkpoint_inside_a_window(tmp_path):
    options = {"accumulate_grad_batches": 3, "max_steps": 3, "enable_checkpointing": True}

    def saved(folder: str, checkpoint: Path | None = None) -> list[str]:
        every_step = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        fit(EchoData(), checkpoint, callbacks=[every_step], **options)
        return sorted(path.name for path in (tmp_path / folder).iterdir())

    assert saved("whole") == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
    assert saved("resumed", tmp_path / "whole" / "step=1.ckpt") == ["step=2.ckpt", "step=3.ckpt"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_workers_do_not_change_the_order_nor_where_it_continues(accumulate, tmp_path):
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 3}
    whole = fit(EchoData(), **options)
    assert fit(EchoData(num_workers=2), **options).seen == whole.seen
    for number in (2, 3, 5, 6, 7):
        checkpoint = tmp_path / f"{number}.ckpt"
        killed = fit(EchoData(num_workers=2), killer=SaveAndDie("on_train_batch_end", number, checkpoint), **options)
        resumed = fit(EchoData(num_workers=2), checkpoint, **options)
        assert killed.seen + resumed.seen == whole.seen


def test_resume_in_mid_epoch_brings_no_warning_about_the_loader(tmp_path):
    checkpoint = tmp_path / "c.ckpt"
    fit(EchoData(), killer=SaveAndDie("on_train_batch_end", 2, checkpoint), max_epochs=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(EchoData(), checkpoint, max_epochs=2)
    assert not [warning for warning in caught if "not resumable" in str(warning.message)]


def test_another_batch_size_continues_at_the_same_sample_and_says_so(tmp_path, caplog):
    checkpoint = tmp_path / "c.ckpt"
    fit(EchoData(batch_size=2), killer=SaveAndDie("on_train_epoch_end", 1, checkpoint), max_epochs=3)
    caplog.set_level(logging.INFO)
    resumed = fit(EchoData(batch_size=5), checkpoint, max_epochs=2)
    assert [position for batch in resumed.seen for _, position in batch] == list(range(10, 20))
    assert "resuming after 10 samples (pass 2, 0 of 10 rows)" in caplog.text
    assert "batch_size 2 -> 5" in caplog.text
    # and once more, with the position of a stream of mixed batches in the checkpoint
    second = tmp_path / "d.ckpt"
    fit(EchoData(batch_size=5), checkpoint, SaveAndDie("on_train_epoch_end", 1, second), max_epochs=3)
    last = fit(EchoData(batch_size=2), second, max_epochs=3)
    assert last.seen[0][0][1] == 20


def test_a_data_set_of_another_size_is_refused(tmp_path):
    checkpoint = tmp_path / "c.ckpt"
    fit(EchoData(num_rows=10), killer=SaveAndDie("on_train_batch_end", 2, checkpoint), max_epochs=2)
    with pytest.raises(ValueError, match="trained on 10 rows, this data set has 11"):
        fit(EchoData(num_rows=11), checkpoint, max_epochs=2)


def test_the_seed_of_the_checkpoint_wins_and_the_other_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    checkpoint = tmp_path / "c.ckpt"
    whole = fit(EchoData(), max_epochs=2)
    killed = fit(EchoData(), killer=SaveAndDie("on_train_batch_end", 3, checkpoint), max_epochs=2)
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    with pytest.warns(UserWarning, match="trained with seed 7, this run has seed 8"):
        resumed = fit(EchoData(), checkpoint, max_epochs=2)
    assert killed.seen + resumed.seen == whole.seen


def test_a_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(ValueError, match="batch_size is 11, but the training data have only 10 rows"):
        fit(EchoData(batch_size=11), max_epochs=1)


@pytest.mark.parametrize("run", ["validate", "test", "predict"])
def test_evaluation_keeps_the_last_partial_batch(run):
    module = Recorder()
    getattr(quiet_trainer(limit_val_batches=1.0), run)(module, EchoData(num_val=3))
    assert module.validated == [[0, 1], [2]]


def run_process(folder: Path, expect: int = 0, **options: Any) -> None:
    context = multiprocessing.get_context("forkserver")  # imports torch and Lightning once for all processes
    context.set_forkserver_preload(["tests.datamodules.stream"])
    process = context.Process(target=stream.run_process, args=({"log": str(folder / "log"), **options},))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == expect


def read_log(folder: Path, rank: int = 0) -> list[list]:
    lines = (folder / f"log.{rank}").read_text().splitlines()
    return [[tuple(item) if isinstance(item, list) else item for item in json.loads(line)] for line in lines]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_process_is_continued_exactly(num_workers, tmp_path):
    options = {"data": {"num_workers": num_workers}, "trainer": {"max_steps": 5, "accumulate_grad_batches": 3}}
    whole = fit(EchoData(), **options["trainer"])
    kill = {"hook": "on_train_batch_end", "number": 6, "path": str(tmp_path / "c.ckpt")}
    run_process(tmp_path, expect=-signal.SIGKILL, kill=kill, **options)
    assert read_log(tmp_path) == whole.seen[:6]
    run_process(tmp_path, checkpoint=kill["path"], **options)
    assert read_log(tmp_path) == whole.seen
    assert (tmp_path / "log.weight").read_text() == repr(whole.weight.item())


def test_two_processes_equal_one_with_twice_the_accumulation(tmp_path):
    trainer = {"strategy": "ddp_fork", "devices": 2, "max_steps": 4, "accumulate_grad_batches": 2}
    run_process(tmp_path, data={"num_rows": 20}, trainer=trainer)
    whole = fit(EchoData(num_rows=20), max_steps=4, accumulate_grad_batches=4)
    assert read_log(tmp_path, 0) == whole.seen[0::2]
    assert read_log(tmp_path, 1) == whole.seen[1::2]
    assert float((tmp_path / "log.weight").read_text()) == pytest.approx(whole.weight.item(), rel=1e-6)


def test_two_processes_validate_every_row_once(tmp_path):
    trainer = {"strategy": "ddp_fork", "devices": 2, "max_steps": 1, "limit_train_batches": 1, "limit_val_batches": 1.0}
    run_process(tmp_path, data={"num_val": 7}, trainer=trainer)
    assert read_log(tmp_path, 0)[1:] == [[0, 2], [4, 6]]
    assert read_log(tmp_path, 1)[1:] == [[1, 3], [5]]
