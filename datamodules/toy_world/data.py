"""Data modules of the toy world: captioned pictures, preference pairs, held-out captions."""

import random
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import ImageBatch, PromptBatch
from datamodules.pickapic import PickAPicDataModule
from datamodules.prompts import PromptList
from datamodules.sampling import ResumableDataModule, evaluation_loader
from datamodules.toy_world.networks import IMAGE_SIZE
from datamodules.toy_world.pairs import PairSettings, Preference, pairs_folder, to_bytes, write_pairs
from datamodules.toy_world.render import render
from datamodules.toy_world.scenes import Scene, draw_scenes, heldout_scenes

HELDOUT_SEED = 1_000_003  # of the held-out pictures; far from any seed that a run would choose


HERE = Path(__file__).parent
PIPELINE = HERE / "pipeline"
HELDOUT_PROMPTS = HERE / "prompts" / "heldout.txt"


def heldout_prompts(number: int) -> PromptList:
    """The first so many held-out captions, each with its seed."""
    return PromptList(str(HELDOUT_PROMPTS), max_prompts=number, batch_size=64)


class _Pictures(Dataset):
    def __init__(self, scenes: list[Scene], seed: int) -> None:
        self.captions = [scene.caption for scene in scenes]
        generator = torch.Generator().manual_seed(seed)
        parts = [to_bytes(render(scenes[i : i + 500], generator)) for i in range(0, len(scenes), 500)]
        self.images = torch.cat(parts)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitems__(self, rows: list[int] | list[tuple[int, int]]) -> ImageBatch:
        """A whole batch at once, which at 32 x 32 pixels is many times faster than one picture after the other."""
        rows = [row[0] if isinstance(row, tuple) else row for row in rows]
        return {"images": self.images[rows].float() / 127.5 - 1, "prompts": [self.captions[row] for row in rows]}


class ToyImages(ResumableDataModule):
    """Pictures of the toy world with their captions, drawn when a run starts; held-out captions validate and test.

    Args:
        num_images: Number of training pictures.
        batch_size: Pictures per step and device.
        seed: Seed of the drawing.
        num_test_prompts: Held-out captions for which `test` makes images, at most 200.
    """

    def __init__(
        self, num_images: int = 12_000, batch_size: int = 32, seed: int = 0, num_test_prompts: int = 200
    ) -> None:
        super().__init__()
        self.num_images = num_images
        self.batch_size = batch_size
        self.seed = seed
        self.num_test_prompts = num_test_prompts

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._train = _Pictures(draw_scenes(self.num_images, random.Random(self.seed)), self.seed)
        if stage in ("fit", "validate"):
            self._heldout = _Pictures(list(heldout_scenes()), HELDOUT_SEED)

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        return self.stream_loader(self._train, self.batch_size, num_workers=0, collate=_as_is)

    def val_dataloader(self) -> DataLoader[ImageBatch]:
        return evaluation_loader(self.trainer, self._heldout, 100, num_workers=0, collate=_as_is)

    def test_dataloader(self) -> DataLoader[PromptBatch]:
        return heldout_prompts(self.num_test_prompts).loader(self.trainer)


def _as_is(batch: ImageBatch) -> ImageBatch:
    return batch


class ToyPairs(PickAPicDataModule):
    """Preference pairs of the toy world, labelled by the oracle; held-out captions validate and test.

    The pairs are made once, before the first run that needs them, and kept as parquet files in the format of
    Pick-a-Pic; from there on they are ordinary data. Sampling pictures from the base takes a minute or two; runs that
    differ in the labels only share the pictures.

    Args:
        source: "base" samples both pictures of a pair from the base pipeline, as preference data are made in practice;
            "world" draws them.
        preference: What the labels reward: "vividness", saturation and brightness, which captions never mention;
            "match", showing what the caption says; "both". Drawn pictures show their captions always, so for the latter
            two one picture of each drawn pair shows a caption that differs in one thing.
        num_pairs: Number of training pairs, ties included.
        num_val_pairs: Number of validation pairs, on held-out captions and without label noise.
        label_noise: Probability that the label of a training pair is turned round; 1 turns all.
        tie_margin: Oracle scores (in [0, 1]) that differ by no more than this are a tie, and ties are left out.
        seed: Seed of the pictures and of the label noise.
        batch_size: Pairs per device and micro-step.
        num_workers: Processes per device that decode images.
        preferred_only: Give only the preferred picture of each pair, for supervised fine-tuning.
        num_test_prompts: Held-out captions for which `test` and `predict` make images, at most 200.
        pipeline: Folder of the base pipeline.
        num_inference_steps: Sampling steps of the pictures.
        guidance_scale: Classifier-free guidance of the pictures.
        folder: Folder for the pairs; they are made again when it is lost.
        cache: Folder that `main.py cache` fills with the encoded pictures and prompts, to train from; null encodes at
            every step.
        labels_from: Folder of scores, by which training pairs are labelled anew (see `PickAPicDataModule`).
        originals: Give training pairs in stored order, with the pictures as they are stored, for
            `DiffusionDPO.feedback`.
    """

    def __init__(
        self,
        source: Literal["base", "world"] = "base",
        preference: Preference = "vividness",
        num_pairs: int = 1024,
        num_val_pairs: int = 64,
        label_noise: float = 0.0,
        tie_margin: float = 0.001,
        seed: int = 0,
        batch_size: int = 32,
        num_workers: int = 0,
        preferred_only: bool = False,
        num_test_prompts: int = 128,
        pipeline: str = str(PIPELINE),
        num_inference_steps: int = 20,
        guidance_scale: float = 2.0,
        folder: str = "runs/cache",
        cache: str | None = None,
        labels_from: str | None = None,
        originals: bool = False,
    ) -> None:
        if not 0.0 <= label_noise <= 1.0:
            raise ValueError(f"ToyPairs: label_noise is {label_noise}; expected a probability, in [0, 1].")
        if not 0.0 <= tie_margin < 1.0:
            raise ValueError(f"ToyPairs: tie_margin is {tie_margin}; expected a difference of scores, in [0, 1).")
        if num_pairs < 1 or num_val_pairs < 1:
            raise ValueError(
                f"ToyPairs: num_pairs is {num_pairs} and num_val_pairs is {num_val_pairs}; expected 1 or more of each."
            )
        if source == "base" and not (Path(pipeline) / "model_index.json").is_file():
            raise ValueError(
                f"ToyPairs: there is no pipeline in {pipeline!r} (no model_index.json). The toy base is shipped in "
                f"{str(PIPELINE)!r}; `source: world` needs none."
            )
        self.settings = PairSettings(
            source=source,
            preference=preference,
            num_pairs=num_pairs,
            num_val_pairs=num_val_pairs,
            label_noise=label_noise,
            tie_margin=tie_margin,
            seed=seed,
            pipeline=Path(pipeline),
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )
        self.folder = Path(folder)
        super().__init__(
            source=str(pairs_folder(self.settings, self.folder)),
            resolution=IMAGE_SIZE,
            batch_size=batch_size,
            num_workers=num_workers,
            validation_split="validation",
            preferred_only=preferred_only,
            horizontal_flip=False,
            test_prompts=heldout_prompts(num_test_prompts),
            cache=cache,
            labels_from=labels_from,
            originals=originals,
        )

    def prepare_data(self) -> None:
        """Make the pairs, in one process, unless they are there."""
        if self.trainer.state.fn in (TrainerFn.FITTING, TrainerFn.VALIDATING):
            write_pairs(self.settings, self.folder)
        super().prepare_data()
