"""A line under Lightning's progress bar while images are drawn between two training steps."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


@contextmanager
def sampling_bar(trainer: pl.Trainer, number: int) -> Iterator[Callable[[int], None]]:
    """Inside, the progress bar of the run has a line for the drawing of images.

    Args:
        trainer: Has the bar, or none.
        number: Images that are going to be drawn.

    Yields:
        A function to be called with the number of images that have just been drawn.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar) and bar.is_enabled:
        if bar.progress is None:  # its turn comes later
            bar.on_train_start(trainer, trainer.lightning_module)
        progress = bar.progress
        task = progress.add_task("Sampling", total=number)
        try:
            yield lambda drawn: progress.update(task, advance=drawn, refresh=True)
        finally:
            progress.update(task, visible=False, refresh=True)  # as Lightning does: it finds its tasks by position
    elif isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        line = Tqdm(
            desc="Sampling",
            total=number,
            position=2 * bar.process_position + 1,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            bar_format=bar.BAR_FORMAT,
        )
        try:
            yield lambda drawn: line.update(drawn)
        finally:
            line.close()
    else:
        yield lambda drawn: None
