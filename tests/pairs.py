"""Random preference pairs for runs on a tiny pipeline: an endless stream that continues where a checkpoint stopped."""

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import ImageBatch, PairBatch

PROMPTS = ("a red circle", "a blue square", "two green rings", "")


class RandomPairs(pl.LightningDataModule):
    """Batch k of the run is a function of k alone; k counts over ranks, and from where a checkpoint stopped."""

    def __init__(
        self, batch_size: int = 2, image_size: int = 16, images_only: bool = False, length: int = 1000
    ) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.image_size = image_size
        self.images_only = images_only
        self.length = length

    def make_batch(self, k: int) -> PairBatch | ImageBatch:
        generator = torch.Generator().manual_seed(k)
        n = self.batch_size if self.images_only else 2 * self.batch_size
        images = torch.rand(n, 3, self.image_size, self.image_size, generator=generator) * 2 - 1
        prompts = [PROMPTS[(k + i) % len(PROMPTS)] for i in range(self.batch_size)]
        if self.images_only:
            return ImageBatch(images=images, prompts=prompts)
        return PairBatch(
            images=images,
            prompts=prompts,
            label=torch.ones(self.batch_size),
            weight=torch.ones(self.batch_size),
            original_sizes=torch.full((n, 2), self.image_size),
            crops=torch.zeros(n, 2, dtype=torch.int64),
            ids=[f"{k}:{i}" for i in range(self.batch_size)],
        )

    def loader(self, start: int) -> DataLoader:
        trainer, module = self.trainer, self

        class Batches(Dataset):
            def __len__(self) -> int:
                return module.length

            def __getitem__(self, k: int) -> PairBatch | ImageBatch:
                return module.make_batch((start + k) * trainer.world_size + trainer.global_rank)

        return DataLoader(Batches(), batch_size=None)

    def train_dataloader(self) -> DataLoader:
        # The loaders are made after a checkpoint has been restored, so the progress is the checkpoint's.
        return self.loader(self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)

    def val_dataloader(self) -> DataLoader:
        return self.loader(10**6)


class WeightedPairs(RandomPairs):
    """Row r of the run is a function of r alone, whatever batch size and ranks; every third one is a tie."""

    def make_batch(self, k: int) -> PairBatch:
        rows = range(k * self.batch_size, (k + 1) * self.batch_size)
        sides = [[], []]
        for row in rows:
            generator = torch.Generator().manual_seed(row)
            for side in sides:
                side.append(torch.rand(3, self.image_size, self.image_size, generator=generator) * 2 - 1)
        return super().make_batch(k) | {
            "images": torch.stack(sides[0] + sides[1]),
            "prompts": [PROMPTS[row % len(PROMPTS)] for row in rows],
            "label": torch.tensor([0.5 if row % 3 == 2 else 1.0 for row in rows]),
            "weight": torch.tensor([1.0 / (1 + row % 4) for row in rows]),
            "ids": [f"row {row}" for row in rows],
        }
