"""The order of the samples, as a function of the seed and of the position in one endless stream.

    position p lies in pass p // n over the data and is row permutation(seed, pass)[p % n]
    micro-batch k holds positions k * B ... (k + 1) * B - 1 and goes to rank k % world size

So neither the number of workers nor an interruption changes what is seen, and two ranks see together what one rank sees
with twice the accumulation.
"""

import os
from collections.abc import Callable, Iterator, Sized
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loops import _FitLoop
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler


def pass_order(seed: int, number: int, num_samples: int) -> np.ndarray:
    """Order of the rows in one pass over the data.

    Args:
        seed: Seed of the run.
        number: Number of the pass, from 0.
        num_samples: Rows of the data set.

    Returns:
        (num_samples,) permutation.
    """
    return np.random.default_rng([seed, 0, number]).permutation(num_samples)


def block_order(seed: int, number: int, shards: np.ndarray, shuffle_shards: int) -> np.ndarray:
    """Order of the rows in one pass over data that lie in shards: random, yet only a few shards are read at a time.

    The shards are permuted, taken in groups of `shuffle_shards`, and the rows permuted within each group.

    Args:
        seed: Seed of the run.
        number: Number of the pass, from 0.
        shards: (N,) number of the shard that each row lies in.
        shuffle_shards: Shards in a group.

    Returns:
        (N,) permutation.
    """
    generator = np.random.default_rng([seed, 0, number])
    present, shard_of_row = np.unique(shards, return_inverse=True)
    group_of_row = (generator.permutation(len(present)) // shuffle_shards)[shard_of_row]
    return np.lexsort((generator.permutation(len(shards)), group_of_row))


def sample_generator(seed: int, position: int) -> np.random.Generator:
    """Randomness of one visit to one sample: its crop, flip and choice of caption.

    Args:
        seed: Seed of the run.
        position: Position of the visit in the endless stream.
    """
    return np.random.default_rng([seed, 1, position])


class StreamSampler(DistributedSampler):
    """Yields (row, position) of one Lightning epoch for one rank, from wherever the stream stands.

    A Lightning epoch is a whole number of optimizer steps; the next one continues where it ended, so that no row is
    dropped and no optimizer step is cut short. It is a DistributedSampler so that Lightning does not replace it.

    Args:
        dataset: The training data.
        batch_size: Samples per rank and micro-batch.
        accumulate_grad_batches: Micro-batches per optimizer step.
        num_replicas: Number of ranks.
        rank: This rank.
        seed: Seed of the run.
        start: Says, at the begin of every iteration, how many samples all ranks have seen together.
        order: Order of the rows in pass number p, as a function of (seed, p); null means `pass_order`.
        prefetch: Told now and then which rows come next, to the end of the pass; null tells nobody.
    """

    PREFETCH_EVERY = 1024  # positions

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        accumulate_grad_batches: int,
        num_replicas: int,
        rank: int,
        seed: int,
        start: Callable[[], int],
        order: Callable[[int, int], np.ndarray] | None = None,
        prefetch: Callable[[np.ndarray], None] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, seed=seed, drop_last=True)
        self.batch_size = batch_size
        window = batch_size * num_replicas * accumulate_grad_batches
        self.num_batches = max(1, len(dataset) // window) * accumulate_grad_batches
        self.start = start
        self.order = order or partial(pass_order, num_samples=len(dataset))
        self.prefetch = prefetch

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Always a whole epoch from here: of a resumed epoch the Trainer takes only the rest.
        start, num_rows = self.start(), len(self.dataset)
        number, order, told = -1, None, -1
        for batch in range(self.rank, self.num_batches * self.num_replicas, self.num_replicas):
            for position in range(start + batch * self.batch_size, start + (batch + 1) * self.batch_size):
                if position // num_rows != number:
                    number = position // num_rows
                    order = self.order(self.seed, number)
                row = position % num_rows
                if self.prefetch is not None and position // self.PREFETCH_EVERY != told:
                    told = position // self.PREFETCH_EVERY
                    self.prefetch(order[row:])
                yield int(order[row]), position


class EvaluationSampler(DistributedSampler):
    """Deals every row to exactly one rank, in order and without padding.

    Args:
        dataset: The validation, test or prediction data.
        num_replicas: Number of ranks.
        rank: This rank.
    """

    def __init__(self, dataset: Sized, num_replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=False)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))


class StreamLoader(DataLoader):
    """A DataLoader that Lightning may resume in the middle of an epoch; the DataModule knows the position."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def repair_progress(loop: _FitLoop) -> None:
    """Bring restored counters into a form that Lightning (2.6.6) continues correctly, as often as it is interrupted.

    Three checkpoints need it. One written inside a step: the step is repeated, but counts as begun twice. One written
    by `on_train_batch_end` of an epoch's last batch: the next epoch would not be counted as begun, and the checkpoints
    written in it restart it. One written at the end of an epoch when `max_steps` is set and nothing validates: one more
    batch would be taken as part of the finished epoch, and stepped on although its accumulation window is incomplete.

    And no checkpoint of the step that is resumed from is written once more, at a batch inside the next window: several
    ranks could not continue it exactly.
    """
    if not loop.is_resuming:
        return
    for callback in loop.trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback._every_n_train_steps:
            callback._last_global_step_saved = loop.trainer.global_step
    batches, epochs = loop.epoch_loop.batch_progress, loop.epoch_progress
    if batches.total.ready > batches.total.processed:
        for count in (batches.total, batches.current):
            count.ready = count.started = count.processed
        batches.is_last_batch = False
    elif batches.is_last_batch and batches.total.completed < batches.total.processed:
        batches.increment_completed()
        epochs.increment_processed()
        loop.epoch_loop._batches_that_stepped += 1
    if epochs.current.ready == epochs.current.started == epochs.current.processed:
        loop._restarting = False
        loop.epoch_loop.restarting = False


class ResumableDataModule(LightningDataModule):
    """Keeps the position of training in the endless stream, and with it the checkpoint's promise to resume exactly."""

    def __init__(self) -> None:
        super().__init__()
        self._restored: dict[str, Any] | None = None
        self._batch_size = 0
        self._num_rows = 0
        self._identity = ""

    @property
    def run_seed(self) -> int:
        """Seed of the run: `seed_everything`, or after a resume the seed in the checkpoint."""
        return self._restored["seed"] if self._restored else int(os.environ.get("PL_GLOBAL_SEED", 0))

    @property
    def samples_seen(self) -> int:
        """Samples that all ranks together have trained on since the run began."""
        batches = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        if self._restored is None:
            return batches * self._batch_size * self.trainer.world_size
        # The batches since the checkpoint may be of another size than those before it.
        since = batches - self._restored["batches_seen"]
        return self._restored["samples_seen"] + since * self._batch_size * self.trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.run_seed,
            "rows": self._num_rows,
            "identity": self._identity,
            "samples_seen": self.samples_seen,
            "batches_seen": self.trainer.fit_loop.epoch_loop.batch_progress.total.processed,
            "batch_size": self._batch_size,
            "world_size": self.trainer.world_size,
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["seed"] != self.run_seed:
            rank_zero_warn(
                f"The checkpoint was trained with seed {state_dict['seed']}, this run has seed {self.run_seed}; the "
                f"data keep the order of the former. Set `seed_everything: {state_dict['seed']}` to agree with it."
            )
        self._restored = dict(state_dict)

    def stream_loader(
        self,
        dataset: Dataset,
        batch_size: int,
        num_workers: int,
        collate: Callable[[list], Any],
        order: Callable[[int, int], np.ndarray] | None = None,
        prefetch: Callable[[np.ndarray], None] | None = None,
        identity: str = "",
    ) -> StreamLoader:
        """The training loader: one Lightning epoch from the place where training stands.

        Args:
            dataset: Map-style data set whose items are asked for by (row, position).
            batch_size: Samples per device and micro-batch.
            num_workers: Processes that load data.
            collate: Makes a batch of a list of samples.
            order: Order of the rows in pass number p, as a function of (seed, p).
            prefetch: Told now and then which rows come next, to the end of the pass.
            identity: Names the rows and what else decides their order; a resumed run must have the same.
        """
        trainer, num_rows = self.trainer, len(dataset)
        if batch_size > num_rows:
            raise ValueError(
                f"batch_size is {batch_size}, but the training data have only {num_rows} rows. Lower batch_size, or "
                "loosen what drops rows (the log counts them)."
            )
        if self._restored is not None and self._restored["rows"] != num_rows:
            raise ValueError(
                f"The checkpoint was trained on {self._restored['rows']} rows, this data set has {num_rows}: the order "
                "of samples cannot be continued. Give the data set and filters of the first run, or start a new run "
                "from its exported weights."
            )
        if self._restored is not None and self._restored["identity"] != identity:
            raise ValueError(
                f"The checkpoint was trained on {num_rows} rows of other files, or in another order of shards: the "
                "order of samples cannot be continued. Give the data set and settings of the first run (its "
                "config.yaml), or start a new run from its exported weights."
            )
        self._batch_size, self._num_rows, self._identity = batch_size, num_rows, identity
        repair_progress(trainer.fit_loop)
        sampler = StreamSampler(
            dataset,
            batch_size,
            trainer.accumulate_grad_batches,
            trainer.world_size,
            trainer.global_rank,
            self.run_seed,
            start=lambda: self.samples_seen,
            order=order,
            prefetch=prefetch,
        )
        if self._restored is not None:
            now = {
                "batch_size": batch_size,
                "world_size": trainer.world_size,
                "accumulate_grad_batches": trainer.accumulate_grad_batches,
            }
            changed = [
                f"{name} {self._restored[name]} -> {now[name]}" for name in now if self._restored[name] != now[name]
            ]
            seen = self.samples_seen
            rank_zero_info(
                f"Data: resuming after {seen} samples (pass {seen // num_rows + 1}, {seen % num_rows} of "
                f"{num_rows} rows)"
                + (f"; changed since the checkpoint: {', '.join(changed)}; no sample is skipped" if changed else "")
            )
        return StreamLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=True,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
        )


def evaluation_loader(
    trainer: Trainer, dataset: Dataset, batch_size: int, num_workers: int, collate: Callable[[list], Any]
) -> DataLoader:
    """A loader that shows every row once, over all ranks, the last batch partial.

    Args:
        trainer: Knows the ranks.
        dataset: Map-style data set whose items are asked for by row.
        batch_size: Samples per device.
        num_workers: Processes that load data.
        collate: Makes a batch of a list of samples.
    """
    num_rows, world = len(dataset), trainer.world_size
    if num_rows < world:
        raise ValueError(f"There are {num_rows} rows to evaluate on {world} devices; give at least one for each.")
    # A sharded model is gathered in every forward pass: a device without a batch would keep the others waiting forever.
    counts = {-(-len(EvaluationSampler(dataset, world, rank)) // batch_size) for rank in range(world)}
    sharded = isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy)) or getattr(
        trainer.strategy, "zero_stage_3", False
    )
    if sharded and len(counts) > 1:
        raise ValueError(
            f"{num_rows} rows in batches of {batch_size} give the {world} devices of a sharded model "
            f"{min(counts)} or {max(counts)} batches; all need as many. Take a multiple of {world * batch_size} rows."
        )
    sampler = EvaluationSampler(dataset, world, trainer.global_rank)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, collate_fn=collate)
