"""Prompts as training data, for methods that make their own images: an endless stream with exact resume."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import Dataset

from datamodules.batches import TrainingPrompts
from datamodules.prompt_sets import hash_of
from datamodules.prompts import PromptList, PromptLoaders
from datamodules.sampling import ResumableDataModule, StreamLoader


class Captions(Dataset):
    """Prompts by (row, position)."""

    def __init__(self, prompts: list[str]) -> None:
        self.prompts = prompts

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, visit: tuple[int, int]) -> str:
        return self.prompts[visit[0]]


class RepeatedLoader:
    """Gives every batch several times in a row, with the number of the repetition; Lightning may resume it anywhere.

    Args:
        loader: Gives lists of prompts, from the batch in use on.
        visits: How often each is given.
        data: Knows how often the first one has been given already.
    """

    def __init__(self, loader: StreamLoader, visits: int, data: "PromptStream") -> None:
        self.loader = loader
        self.visits = visits
        self.data = data

    def __len__(self) -> int:
        return len(self.loader) * self.visits

    def __iter__(self) -> Iterator[TrainingPrompts]:
        begun = self.data.visits_begun
        for prompts in self.loader:
            for visit in range(begun, self.visits):
                yield TrainingPrompts(prompts=prompts, visit=visit)
            begun = 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class PromptStream(PromptLoaders, ResumableDataModule):
    """Prompts to train on; a method makes the images itself.

    A batch of prompts is handed over as often in a row as the method can learn from what it makes of them: SPO trains
    on one micro-batch of its pairs each time. An epoch is one pass over the prompts.

    Args:
        prompts: The training prompts: lines of text, the published `4k_training_prompts.json`, or any other list.
        batch_size: Prompts per device and batch.
        test_prompts: Prompts for `main.py test` and `main.py predict`.
    """

    def __init__(self, prompts: PromptList, batch_size: int = 10, test_prompts: PromptList | None = None) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; expected 1 or more prompts.")
        self.prompts = prompts
        self.batch_size = batch_size
        self.test_prompts = test_prompts

    def setup(self, stage: str) -> None:
        """Read the training prompts: what is wrong with them is said before any network is loaded."""
        if stage == "fit":
            self.check_method()
            self.captions = Captions(self.prompts.read())
            self.identity = hash_of(self.captions.prompts)

    def check_method(self) -> None:
        """Refuse a method that trains on images."""
        method = self.trainer.lightning_module
        if not hasattr(method, "visits_per_batch"):
            raise ValueError(
                f"data.class_path is {type(self).__name__}, which gives prompts and no images; {type(method).__name__} "
                "trains on images. Use PickAPicDataModule, or a method that makes its own images, such as SPO."
            )

    def train_dataloader(self) -> RepeatedLoader:
        loader = self.stream_loader(self.captions, self.batch_size, 0, collate=list, identity=self.identity)
        return RepeatedLoader(loader, self.visits, self)

    # ------------------------------------------------------------------------------------- position in the stream

    @property
    def visits(self) -> int:
        """How often each batch is handed over: the method says."""
        return self.trainer.lightning_module.visits_per_batch(self.batch_size)

    @property
    def samples_seen(self) -> int:
        """Prompts of all ranks whose batches have been handed over for the last time."""
        before = self._restored["samples_seen"] if self._restored else 0
        return before + self._visits_counted // self.visits * self.batch_size * self.trainer.world_size

    @property
    def visits_begun(self) -> int:
        """How often the present batch has been handed over."""
        return self._visits_counted % self.visits

    @property
    def _visits_counted(self) -> int:
        """Since the run began or was resumed, counted from the first one of the batch that was then in use."""
        count = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if self._restored is None:
            return count
        return count - self._restored["batches_seen"] + self._restored["visits_begun"]

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"visits_begun": self.visits_begun}
