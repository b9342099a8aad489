"""Class labels as training data, for generators that are told a class instead of a text."""

import re
from pathlib import Path

from torch.utils.data import Dataset

from datamodules.prompt_sets import hash_of
from datamodules.prompt_stream import Captions, PromptStream, RepeatedLoader
from datamodules.prompts import PromptList
from datamodules.sampling import sample_generator

LABELS_PER_EPOCH = 100_000


class UniformLabels(Dataset):
    """Labels drawn uniformly, each a function of (seed, position in the stream); asked for by (row, position).

    Args:
        num_classes: Classes.
        seed: Seed of the run.
    """

    def __init__(self, num_classes: int, seed: int) -> None:
        self.num_classes = num_classes
        self.seed = seed

    def __len__(self) -> int:
        return LABELS_PER_EPOCH

    def __getitem__(self, visit: tuple[int, int]) -> str:
        return str(sample_generator(self.seed, visit[1]).integers(self.num_classes))


def read_labels(source: str, num_classes: int) -> list[str]:
    """The labels of a text file.

    Args:
        source: File with one class number per line; a class that stands there more often is drawn more often.
        num_classes: Classes of the generator.

    Returns:
        The numbers, as text without leading zeros or signs.

    Raises:
        ValueError: naming file, line and what stands there, if it is not one of the classes, or the file has none.
        FileNotFoundError: if there is no such file.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"Labels: there is no file {source!r} (looked in {Path.cwd()}); expected a text file with one class number "
            "per line. Without `source`, labels are drawn uniformly."
        )
    labels = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.strip()
        if not (re.fullmatch("[0-9]{1,9}", text) and int(text) < num_classes):
            raise ValueError(
                f"Labels: line {number} of {source!r} is {text[:40]!r}; expected a class number from 0 to "
                f"{num_classes - 1}, one per line."
            )
        labels.append(str(int(text)))
    if not labels:
        raise ValueError(f"Labels: {source!r} is empty; expected one class number per line.")
    return labels


class LabelsDataModule(PromptStream):
    """Class labels to train on; a method makes the images itself.

    A label travels as text ("207") where other families have a prompt, so that everything that handles prompts handles
    labels. An epoch is 100,000 uniform labels, or one pass over the file.

    Args:
        num_classes: Classes of the generator; labels are 0 to num_classes - 1.
        batch_size: Labels per device and batch.
        source: Text file with one label per line, taken in random order. Null draws labels uniformly.
        test_prompts: Labels for `main.py test` and `main.py predict`, one per line of a text file.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        batch_size: int = 64,
        source: str | None = None,
        test_prompts: PromptList | None = None,
    ) -> None:
        if num_classes < 1:
            raise ValueError(f"Labels: num_classes is {num_classes}; expected 1 or more.")
        super().__init__(PromptList(source=source or "uniform labels"), batch_size, test_prompts)
        self.num_classes = num_classes
        self.source = source

    def setup(self, stage: str) -> None:
        """Read the labels, and compare their classes with the generator's.

        Raises:
            ValueError: if the generator is told texts, or has another number of classes.
        """
        backbone = getattr(self.trainer.lightning_module, "backbone", None)
        classes = getattr(backbone, "num_classes", None)
        if classes != self.num_classes:
            has = "is told texts" if classes is None else f"has {classes} classes"
            raise ValueError(
                f"data: LabelsDataModule gives labels of {self.num_classes} classes, but {type(backbone).__name__} "
                f"{has}. Set data.num_classes and backbone.num_classes alike, or use PromptStream for a model of texts."
            )
        if stage == "fit":
            self.check_method()
            labels = None if self.source is None else read_labels(self.source, self.num_classes)
            self.captions = UniformLabels(self.num_classes, self.run_seed) if labels is None else Captions(labels)
            self.identity = f"uniform over {self.num_classes}" if labels is None else hash_of(labels)

    def train_dataloader(self) -> RepeatedLoader:
        if isinstance(self.captions, UniformLabels):
            self.captions.seed = self.run_seed  # of the checkpoint, if the run was resumed
        return super().train_dataloader()
