"""Class labels as training data: uniform or from a file, the same after a resume, mistakes named."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules.labels import LabelsDataModule, UniformLabels, read_labels
from datamodules.prompts import PromptList


class Learner(pl.LightningModule):
    """A method that makes its own images, of 10 classes; remembers the labels that it was given."""

    def __init__(self, num_classes: int | None = 10) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.backbone = torch.nn.Module()
        self.backbone.num_classes = num_classes
        self.seen: list[list[str]] = []

    def visits_per_batch(self, batch_size: int) -> int:
        return 1

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["prompts"])
        assert batch["visit"] == 0
        return self.weight**2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: LabelsDataModule, folder: Path, max_steps: int, ckpt_path: Path | None = None) -> Learner:
    pl.seed_everything(5, verbose=False)
    learner = Learner()
    callback = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=False,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(learner, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return learner


@pytest.fixture
def labels(tmp_path) -> str:
    (tmp_path / "labels.txt").write_text("3\n007\n 0 \n3\n9\n")
    return str(tmp_path / "labels.txt")


def test_uniform_labels_are_uniform_and_depend_on_seed_and_position_only():
    draws = [UniformLabels(10, 5)[0, position] for position in range(5000)]
    assert draws == [UniformLabels(10, 5)[77, position] for position in range(5000)]
    assert draws != [UniformLabels(10, 6)[0, position] for position in range(5000)]
    counts = Counter(draws)
    assert set(counts) == {str(label) for label in range(10)}
    assert sum((count - 500) ** 2 / 500 for count in counts.values()) < 27.9  # chi-square, 9 degrees: p = 0.001


@pytest.mark.parametrize("from_file", [False, True])
def test_a_resumed_run_sees_the_labels_of_the_whole_one(from_file, labels, tmp_path):
    source = labels if from_file else None
    whole = fit(LabelsDataModule(10, 2, source), tmp_path / "whole", 6)
    resumed = fit(LabelsDataModule(10, 2, source), tmp_path / "again", 6, tmp_path / "whole" / "step=3.ckpt")
    assert len(whole.seen) == 6
    assert resumed.seen == whole.seen[3:]


def test_a_file_is_taken_once_in_each_pass(labels, tmp_path):
    seen = fit(LabelsDataModule(10, 1, labels), tmp_path / "run", 10).seen
    for number in (0, 1):
        assert sorted(label for batch in seen[5 * number : 5 * number + 5] for label in batch) == sorted("37039")


def test_labels_of_a_file_are_numbers_without_ornaments(labels):
    assert read_labels(labels, 10) == ["3", "7", "0", "3", "9"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n10\n", "line 2 of .*labels.txt.* is '10'; expected a class number from 0 to 9"),
        ("1\n\n2\n", "line 2 of .* is ''"),
        ("cat\n", "line 1 of .* is 'cat'"),
        ("-1\n", "line 1 of .* is '-1'"),
        ("1.0\n", "line 1 of .* is '1.0'"),
        ("²\n", "line 1"),
        ("9" * 5000, "line 1 of .* is '9999"),
        ("", "is empty"),
    ],
)
def test_what_is_no_label_is_named(text, message, tmp_path):
    (tmp_path / "labels.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_labels(str(tmp_path / "labels.txt"), 10)


def attached(data: LabelsDataModule, learner: pl.LightningModule) -> LabelsDataModule:
    data.trainer = SimpleNamespace(lightning_module=learner, world_size=1, global_rank=0)
    return data


def test_mistakes_are_named_before_any_network_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="num_classes is 0"):
        LabelsDataModule(0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        LabelsDataModule(batch_size=0)
    with pytest.raises(FileNotFoundError, match="there is no file .*gone.txt"):
        attached(LabelsDataModule(10, source=str(tmp_path / "gone.txt")), Learner()).setup("fit")
    with pytest.raises(ValueError, match="labels of 1000 classes, but Module has 10 classes"):
        attached(LabelsDataModule(), Learner()).setup("fit")
    with pytest.raises(ValueError, match="is told texts.*PromptStream"):
        attached(LabelsDataModule(10), Learner(None)).setup("fit")
    images = pl.LightningModule()  # a method that trains on images
    images.backbone = Learner().backbone
    with pytest.raises(ValueError, match="LabelsDataModule, which gives prompts and no images"):
        attached(LabelsDataModule(10), images).setup("fit")


def test_another_file_cannot_be_resumed_with(labels, tmp_path):
    fit(LabelsDataModule(10, 2, labels), tmp_path / "whole", 2)
    other = tmp_path / "other.txt"
    other.write_text("1\n2\n3\n4\n5\n")
    with pytest.raises(ValueError, match="of other files"):
        fit(LabelsDataModule(10, 2, str(other)), tmp_path / "again", 3, tmp_path / "whole" / "step=2.ckpt")


def test_labels_to_draw_come_from_a_prompt_file(labels):
    data = attached(LabelsDataModule(10, test_prompts=PromptList(labels)), Learner())
    data.setup("test")
    data.trainer.strategy = None
    batch = next(iter(data.test_dataloader()))
    assert [prompt.strip() for prompt in batch["prompts"]] == ["3", "007", "0", "3", "9"]
    assert batch["seeds"] == [0, 1, 2, 3, 4]
