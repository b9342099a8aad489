"""Pick-a-Pic and look-alikes: preference pairs by column mapping, from the hub, parquet, JSONL or a folder."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from datamodules.batches import ImageBatch, PairBatch
from datamodules.cache import Cache, CachedRows, Dtype, collate_cached
from datamodules.cache_filling import CacheFilling
from datamodules.prompts import PromptList, PromptLoaders
from datamodules.sampling import ResumableDataModule, block_order, evaluation_loader, sample_generator
from datamodules.scores import ScoreFilling, Scores, labels_of
from datamodules.sources import Rows, load_rows
from datamodules.streaming import ParquetStream
from datamodules.transforms import View, decode_image, view_image, view_pair_jointly

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class PairColumns:
    """Names of the columns in the data set; the defaults are Pick-a-Pic's.

    Args:
        caption: The prompt: text, or a list of texts of which one is drawn at every visit.
        image_0: First image: encoded bytes, or a path below the folder of the file that names it.
        image_1: Second image.
        label_0: 1 if the first image was preferred, 0 if the second, 0.5 for a tie. Null where the first always is.
        image: The image of a plain captioned data set, used by `preferred_only` where there are no pairs.
        model_0: Model that made the first image, for `dreamlike_pairs_only`.
        model_1: Model that made the second image.
        has_label: Whether somebody voted, for `require_label`.
        pairs_per_prompt: Number of pairs with the same prompt (Pick-a-Pic: num_example_per_prompt); a pair then weighs
            one over it. Null gives all pairs the weight 1.
    """

    caption: str = "caption"
    image_0: str = "jpg_0"
    image_1: str = "jpg_1"
    label_0: str | None = "label_0"
    image: str = "image"
    model_0: str = "model_0"
    model_1: str = "model_1"
    has_label: str = "has_label"
    pairs_per_prompt: str | None = None


PICKAPIC_COLUMNS = PairColumns()


def both_dreamlike(model_0: "pa.ChunkedArray", model_1: "pa.ChunkedArray") -> np.ndarray:
    """(N,) whether both models have "dream" in their name, in lower case, as the published option asks."""
    import pyarrow.compute as pc

    both = pc.and_(pc.match_substring(model_0, "dream"), pc.match_substring(model_1, "dream"))
    return pc.fill_null(both, False).to_numpy()


@dataclass
class PairTable:
    """The rows of one split that take part.

    Attributes:
        rows: All rows of the split.
        columns: Names of their columns.
        index: (N,) rows that take part.
        label_0: (N,) 1, 0 or 0.5; None where the data set has single images.
        summary: What was left out, and why.
    """

    rows: Rows
    columns: PairColumns
    index: np.ndarray
    label_0: np.ndarray | None
    summary: str

    def sample(self, number: int | None, seed: int) -> "PairTable":
        """At most so many of the rows, drawn with the seed; where they lie in shards, from as few as will do."""
        if number is None or number >= len(self.index):
            return self
        if self.rows.shards is None:
            drawn = np.random.default_rng(seed).permutation(len(self.index))[:number]
        else:
            drawn = np.sort(block_order(seed, 0, self.rows.shards[self.index], shuffle_shards=1)[:number])
        return replace(self, index=self.index[drawn], label_0=None if self.label_0 is None else self.label_0[drawn])

    def relabel(self, split: str, scores: Scores, scale: float | None, threshold: float | None) -> "PairTable":
        """Labels by the scores of the images instead of those that people gave.

        Args:
            split: Name of the split.
            scores: Of its rows.
            scale: None for 1 and 0; see `labels_of`.
            threshold: None for no ties; see `labels_of`.
        """
        if self.label_0 is None:
            raise ValueError(f"{self.summary}: labels_from is for pairs, but there is one image in a row.")
        found = scores.of(split, self)
        label_0 = labels_of(found, scale, threshold)
        voted = (self.label_0 != 0.5) & (label_0 != 0.5)
        agree = ((self.label_0 > 0.5) == (label_0 > 0.5))[voted].mean() if voted.any() else np.nan
        equal = (found[:, 0] == found[:, 1]).sum()
        summary = (
            f"labels_from {scores.folder}: {len(label_0)} pairs of split {split!r}, {equal} of them with equal scores; "
            f"the labels agree with {100 * agree:.1f} % of those in the data"
        )
        return replace(self, label_0=label_0, summary=summary)

    def turn_labels(self, probability: float, seed: int) -> "PairTable":
        """Prefer the other image in some rows, which depend on the seed and on nothing else that takes part."""
        if self.label_0 is None:
            return self
        drawn = np.random.default_rng([seed, 2]).random(len(self.rows))[self.index]
        turned = (drawn < probability) & (self.label_0 != 0.5)
        rank_zero_info(f"label_noise: {turned.sum()} of {len(turned)} labels are turned")
        return replace(self, label_0=np.where(turned, 1.0 - self.label_0, self.label_0))


@dataclass
class Samples(Dataset):
    """Decoded and transformed rows of a table.

    Args:
        table: The rows.
        seed: Seed of the run; with the position of a visit it decides crop, flip and choice of caption.
        resolution: Edge of the images.
        random_crop: Crop anywhere instead of in the centre.
        horizontal_flip: Mirror half of the images.
        joint: Treat both images of a pair alike.
        preferred_only: Give only the preferred image.
        cached: Where encoded images are, to give their moments instead of pixels.
        coin: Decide ties at every visit.
        originals: Give both images in stored order, and beside their views as they are stored.
        bicubic: Resize as CLIP's image processor does; see `view_image`.
    """

    table: PairTable
    seed: int
    resolution: int
    random_crop: bool
    horizontal_flip: bool
    joint: bool
    preferred_only: bool
    cached: CachedRows | None = None
    coin: bool = False
    originals: bool = False
    bicubic: bool = False

    def __len__(self) -> int:
        return len(self.table.index)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        """One sample, asked for by (row, position) in training, by row alone in evaluation."""
        number, position = key if isinstance(key, tuple) else (key, None)
        columns, rows = self.table.columns, self.table.rows
        row = int(self.table.index[number])
        values = rows.dataset[row]
        generator = sample_generator(0, row) if position is None else sample_generator(self.seed, position)
        caption = values[columns.caption]
        if isinstance(caption, list):
            caption = caption[0 if position is None else int(generator.integers(len(caption)))]
        views = self.views(number, values, generator)
        label_0 = 1.0 if self.table.label_0 is None else float(self.table.label_0[number])
        label = 1.0 if label_0 == 0.5 and self.coin else max(label_0, 1.0 - label_0)
        count = columns.pairs_per_prompt
        sample = {"views": views, "prompt": caption, "label": label, "id": rows.id(row)}
        sample["weight"] = 1.0 if count is None or self.table.label_0 is None else 1.0 / values[count]
        if self.originals:
            sample |= {"label": label_0, "originals": [self.stored(number, values, which) for which in (0, 1)]}
        return sample if self.cached is None else sample | {"embedding": self.cached.cache.embedding(caption)}

    def views(self, number: int, values: dict[str, Any], generator: np.random.Generator) -> list[View]:
        """What is shown of the images of a row, the preferred one first.

        Args:
            number: The row's place in the table.
            values: The row's values.
            generator: Decides ties, crops and flips.
        """
        label_0 = None if self.table.label_0 is None else self.table.label_0[number]
        if label_0 == 0.5 and self.coin:
            label_0 = generator.integers(2)
        second_first = label_0 is not None and label_0 < 0.5 and not self.originals
        order = range(1 if label_0 is None else 2)[:: -1 if second_first else 1][: 1 if self.preferred_only else 2]
        if self.cached is not None:
            return self.cached.views(number, order, self.joint and len(order) == 2, self.horizontal_flip, generator)
        images = {which: self.image(number, values, which) for which in order}
        augmentation = (self.resolution, self.random_crop, self.horizontal_flip, generator)
        if self.joint and len(order) == 2:
            views = view_pair_jointly(images[0], images[1], *augmentation)
            return [views[which] for which in order]
        return [view_image(image, *augmentation, bicubic=self.bicubic) for image in images.values()]

    def image(self, number: int, values: dict[str, Any], which: int) -> Image.Image:
        """A stored image of a row, decoded; it takes the place of its bytes in `values`.

        Args:
            number: The row's place in the table.
            values: The row's values.
            which: 0 or 1; 0 where there are single images.

        Raises:
            ValueError: if it does not decode.
        """
        columns, rows = self.table.columns, self.table.rows
        name = columns.image if self.table.label_0 is None else (columns.image_0, columns.image_1)[which]
        if not isinstance(values[name], Image.Image):
            try:
                values[name] = decode_image(rows.stored_image(values[name]), self.resolution)
            except ValueError as error:
                raise ValueError(
                    f"{rows.where(int(self.table.index[number]))} (prompt {str(values[columns.caption])[:40]!r}): "
                    f"{name!r} {error}. `verify_images: true` finds all such rows before training starts, and with "
                    "`on_bad_row: drop` leaves them out."
                ) from error
        return values[name]

    def stored(self, number: int, values: dict[str, Any], which: int) -> torch.Tensor:
        """The same image as (3, H, W) uint8, of the size that it is stored in."""
        return torch.from_numpy(np.array(self.image(number, values, which))).permute(2, 0, 1)


def collate_images(samples: list[dict[str, Any]]) -> ImageBatch:
    """The first image of every sample, then the second of every sample if they are pairs."""
    views: list[View] = [view for views in zip(*(sample["views"] for sample in samples), strict=True) for view in views]
    return {
        "images": default_collate([view.pixels for view in views]),  # in a worker, right into shared memory
        "prompts": [sample["prompt"] for sample in samples],
        "original_sizes": torch.tensor([view.original_size for view in views]),
        "crops": torch.tensor([view.crop for view in views]),
        "ids": [sample["id"] for sample in samples],
    }


def collate_pairs(samples: list[dict[str, Any]]) -> PairBatch:
    """Preferred images first."""
    label = torch.tensor([sample["label"] for sample in samples])
    weight = torch.tensor([sample["weight"] for sample in samples])
    batch: PairBatch = {**collate_images(samples), "label": label, "weight": weight}
    if "originals" in samples[0]:
        batch["originals"] = [sample["originals"][which] for which in (0, 1) for sample in samples]
    return batch


class PickAPicDataModule(PromptLoaders, ResumableDataModule):
    """Preference pairs in the style of Pick-a-Pic, or captioned images for supervised fine-tuning.

    Args:
        source: Hub id or mirror ('owner/name'); a parquet file, glob, or folder of parquet files; a JSONL file whose
            rows name images by paths relative to it, or a folder with one; a folder of images <name>_w.png (preferred),
            <name>_l.png (the other one) and <name>.txt (the caption). Splits of a folder are sub-folders (train/) or
            files (train.parquet, validation-00000.parquet, train.jsonl). With `streaming` also URLs of parquet files.
        resolution: Edge of the square training images, in pixels.
        batch_size: Pairs per device and micro-step.
        num_workers: Processes per device that decode images.
        split: Split to train on.
        validation_split: Split to validate on. Null validates on nothing.
        subset: Configuration of a hub data set that has several.
        columns: Names of the columns.
        ties: What becomes of pairs labelled 0.5. "drop" leaves them out, as the published script does for Pick-a-Pic;
            "first" takes the first image as preferred, as the published LoRA examples do; "keep" keeps them, label 0.5;
            "coin" prefers either image by chance, anew at every visit, as the published ORPO script does (in validation
            always the same one).
        label_noise: Probability with which a training label is turned, to study robustness. Which labels are depends on
            the seed of the run; they stay turned.
        labels_from: Folder of scores, <folder>/scores/<name> of `main.py cache --rewards.<name>`. Of each training pair
            the image with the higher score is then preferred, whatever people said; at equal scores the first one.
            Pairs that people found equal are left out by `ties: drop` all the same; every other value keeps them.
        label_scale: With labels_from, labels are probabilities instead: sigmoid(label_scale x difference of scores).
        label_threshold: With labels_from, the probabilities of label_scale (1 if not given) are rounded: a pair whose
            images differ in them by no more than this is a tie, as published for SDXL's step preference model (0.1).
        relabel_validation: Validate on the labels of labels_from too. Otherwise on what people said.
        originals: Give training pairs in stored order, and with them the images as they are stored: what
            `DiffusionDPO.feedback` judges.
        require_label: Leave out rows whose has_label is false; "validation" leaves them out there only.
        dreamlike_pairs_only: Keep only pairs of which both images come from a model with "dream" in its name.
        max_train_samples: Train on so many pairs, drawn once with the seed of the run.
        max_val_samples: Validate on so many pairs, always the same ones.
        preferred_only: Give only the preferred image of each pair (or the image of a plain captioned data set), for
            supervised fine-tuning.
        random_crop: Crop training images anywhere instead of in the centre.
        horizontal_flip: Mirror half of the training images.
        resize: "bilinear", as the scripts for diffusion models do; or "bicubic", as CLIP's image processor and with it
            the training of the published step preference models do.
        augmentation: "separate" crops and flips the two images of a pair independently, as the published script does;
            "joint" resizes the second to the size of the first and treats both alike, as the LoRA SDXL example does.
        on_bad_row: "error" stops before training at a row with an impossible label, an empty caption or a missing
            image; "drop" leaves such rows out and logs how many.
        verify_images: Decode every image once before training, with num_workers processes; the result is cached.
            Without it a damaged image stops the run when it is met, whatever on_bad_row says, because leaving it out
            then would change the order of all later samples.
        test_prompts: Prompts for `main.py test` and `main.py predict`.
        cache: Folder that `main.py cache` fills with the encoded images and prompts. Training then decodes no image
            and runs neither the VAE's encoder nor the text encoders; null encodes at every step.
        streaming: Leave parquet files where they are, on the hub, behind URLs or on slow disks: texts and labels are
            read at the first start, images only as training comes to them. The order is as exactly repeated and resumed
            as without, but mixes only `shuffle_shards` shards at a time.
        shuffle_shards: Shards whose rows are mixed at a time when streaming. A shard is a file, or so many row groups
            of it that they hold 64 MB of images.
        cache_dir: Keeps, when streaming, texts, labels and the images in use.
        cache_gb: Gigabytes of images to keep when streaming; those used longest ago make room.
    """

    def __init__(
        self,
        source: str,
        resolution: int = 512,
        batch_size: int = 1,
        num_workers: int = 0,
        split: str = "train",
        validation_split: str | None = None,
        subset: str | None = None,
        columns: PairColumns = PICKAPIC_COLUMNS,
        ties: Literal["drop", "first", "keep", "coin"] = "drop",
        label_noise: float = 0.0,
        labels_from: str | None = None,
        label_scale: float | None = None,
        label_threshold: float | None = None,
        relabel_validation: bool = False,
        originals: bool = False,
        require_label: bool | Literal["validation"] = False,
        dreamlike_pairs_only: bool = False,
        max_train_samples: int | None = None,
        max_val_samples: int | None = None,
        preferred_only: bool = False,
        random_crop: bool = False,
        horizontal_flip: bool = True,
        resize: Literal["bilinear", "bicubic"] = "bilinear",
        augmentation: Literal["separate", "joint"] = "separate",
        on_bad_row: Literal["error", "drop"] = "error",
        verify_images: bool = False,
        test_prompts: PromptList | None = None,
        cache: str | None = None,
        streaming: bool = False,
        shuffle_shards: int = 16,
        cache_dir: str = "~/.cache/limelight/streaming",
        cache_gb: float = 100.0,
    ) -> None:
        super().__init__()
        if resolution < 8 or resolution % 8:
            raise ValueError(f"resolution is {resolution}; expected a positive multiple of 8, the factor of the VAEs.")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("max_train_samples", max_train_samples, 1),
            ("max_val_samples", max_val_samples, 1),
            ("shuffle_shards", shuffle_shards, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more.")
        if not 0 <= label_noise <= 1:
            raise ValueError(f"label_noise is {label_noise}; expected a probability, 0 to 1.")
        if cache is not None:
            self._refuse_random_crop(random_crop)
        if originals:
            for name, value in (
                ("cache", cache),
                ("labels_from", labels_from),
                ("label_noise", label_noise),
                ("preferred_only", preferred_only),
            ):
                if value:
                    raise ValueError(
                        f"originals: true has model.feedback decide which of the stored images is preferred, which "
                        f"does not go with {name} ({value}). Leave out one of the two; with `labels_from`, images that "
                        "have been scored before decide it."
                    )
        if labels_from is None and (label_scale is not None or label_threshold is not None or relabel_validation):
            raise ValueError(
                f"label_scale is {label_scale} (label_threshold {label_threshold}, relabel_validation "
                f"{relabel_validation}), but there are no scores that labels could come from: set `labels_from`."
            )
        if label_threshold is not None and not (0 <= label_threshold < 1 and ties == "keep"):
            raise ValueError(
                f"label_threshold is {label_threshold} and ties {ties!r}; expected a difference of probabilities, in "
                "[0, 1), and `ties: keep`, since it makes ties."
            )
        if resize not in ("bilinear", "bicubic") or (resize == "bicubic" and augmentation == "joint"):
            raise ValueError(
                f"resize is {resize!r} and augmentation {augmentation!r}; expected bilinear, or bicubic with separate."
            )
        if label_scale is not None and (not label_scale > 0 or preferred_only):
            raise ValueError(
                f"label_scale is {label_scale} and preferred_only {preferred_only}; expected a positive number, and "
                "pairs: of single images there are no labels."
            )
        self.source = source
        self.resolution = resolution
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.split = split
        self.validation_split = validation_split
        self.subset = subset
        self.columns = columns
        self.ties = ties
        self.label_noise = label_noise
        self.labels_from = labels_from
        self.label_scale = label_scale
        self.label_threshold = label_threshold
        self.relabel_validation = relabel_validation
        self.originals = originals
        self.require_label = require_label
        self.dreamlike_pairs_only = dreamlike_pairs_only
        self.max_train_samples = max_train_samples
        self.max_val_samples = max_val_samples
        self.preferred_only = preferred_only
        self.random_crop = random_crop
        self.horizontal_flip = horizontal_flip
        self.resize = resize
        self.augmentation = augmentation
        self.on_bad_row = on_bad_row
        self.verify_images = verify_images
        self.test_prompts = test_prompts
        self.streaming = streaming
        self.shuffle_shards = shuffle_shards
        self.cache_dir = cache_dir
        self.cache_gb = cache_gb
        self.cache_folder = cache
        self.cached: Cache | None = None
        self.scores: Scores | None = None
        self.collate = collate_images if preferred_only else collate_pairs

    def prepare_data(self) -> None:
        """Download, convert and check in one process; the others find the converted data in the cache."""
        for split in self._splits(self.trainer.state.fn):
            self._open(split)

    def setup(self, stage: str) -> None:
        if self.originals and stage == TrainerFn.FITTING:
            model = self.trainer.lightning_module
            if getattr(model, "feedback", None) is None:
                raise ValueError(
                    "originals: true gives pairs in stored order, for model.feedback to say which image is preferred; "
                    f"this {type(model).__name__} has none. Set `model.init_args.feedback` (of DiffusionDPO), or leave "
                    "originals out."
                )
        self._tables = {split: self._open(split) for split in self._splits(stage)}
        for table in self._tables.values():
            rank_zero_info(table.summary)
        if self.cache_folder is not None and self._tables:
            self._open_cache()
        if self.labels_from is not None and self._tables:
            self.scores = Scores(self.labels_from)
        if self.cached is not None or self.scores is not None:
            self._try_samples()

    def _splits(self, stage: str) -> list[str]:
        """Splits that a stage reads."""
        splits = {TrainerFn.FITTING: [self.split, self.validation_split], TrainerFn.VALIDATING: [self.validation_split]}
        return [split for split in splits.get(stage, []) if split is not None]

    def train_dataloader(self) -> DataLoader[PairBatch | ImageBatch]:
        samples = self.train_samples()
        rows, index = samples.table.rows, samples.table.index
        order, ahead = None, len(index)
        if rows.shards is not None:
            shards = rows.shards[index]
            order = partial(block_order, shards=shards, shuffle_shards=self.shuffle_shards)
            # The shards that are mixed now and those that are mixed after them.
            ahead = 2 * self.shuffle_shards * len(shards) // len(np.unique(shards))
        return self.stream_loader(
            samples,
            self.batch_size,
            self.num_workers,
            self._collate(),
            order,
            prefetch=lambda numbers: rows.prefetch(index[numbers[:ahead]]) if self.cached is None else None,
            identity=rows.identity if order is None else f"{rows.identity}/{self.shuffle_shards}",
        )

    def train_samples(self) -> Samples:
        """The training data, as the loader asks for them."""
        table = self._tables[self.split].sample(self.max_train_samples, self.run_seed)
        if self.scores is not None:
            table = table.relabel(self.split, self.scores, self.label_scale, self.label_threshold)
        if self.label_noise:
            table = table.turn_labels(self.label_noise, self.run_seed)
        return self._samples(self.split, table, self.random_crop, self.horizontal_flip, self.originals)

    def val_samples(self) -> Samples:
        """The validation data, in the order of evaluation."""
        table = self._tables[self.validation_split].sample(self.max_val_samples, seed=0)
        if self.scores is not None and self.relabel_validation:
            table = table.relabel(self.validation_split, self.scores, self.label_scale, self.label_threshold)
        return self._samples(self.validation_split, table, random_crop=False, horizontal_flip=False)

    def val_dataloader(self) -> DataLoader[PairBatch | ImageBatch] | list:
        if self.validation_split is None:
            if self.trainer.state.fn == TrainerFn.VALIDATING:
                raise ValueError("There is nothing to validate on: set `data.init_args.validation_split`.")
            return []
        return evaluation_loader(self.trainer, self.val_samples(), self.batch_size, self.num_workers, self._collate())

    def pair_dataloader(self) -> DataLoader[PairBatch]:
        """The validation pairs, both images of them also where training is on the preferred ones alone.

        Raises:
            ValueError: if there are none.
        """
        samples = replace(self.val_samples(), preferred_only=False)
        if samples.table.label_0 is None:
            raise ValueError(f"{samples.table.summary}: there is one image in a row, and no pair to look at.")
        collate = collate_pairs
        if self.cached is not None:
            if self.cached.header["views"]["images"] == "preferred":
                raise ValueError(
                    f"The cache {self.cached.folder} holds the preferred images only, and no pair to look at. Fill one "
                    "with preferred_only: false; it serves both."
                )
            collate = partial(collate_cached, collate=collate_pairs, empty=self.cached.embedding(""))
        return evaluation_loader(self.trainer, samples, self.batch_size, 0, collate)

    def _try_samples(self) -> None:
        """Raise before the networks are loaded if caches or scores lack anything that will be asked for."""
        for split, samples in ((self.split, self.train_samples), (self.validation_split, self.val_samples)):
            if split in self._tables and (told := samples().table.summary) != self._tables[split].summary:
                rank_zero_info(told)

    def _samples(
        self, split: str, table: PairTable, random_crop: bool, horizontal_flip: bool, originals: bool = False
    ) -> Samples:
        cached = None
        if self.cached is not None:
            cached = self.cached.rows_of(split, table, self._places[split], horizontal_flip)
            # What a row says is still read from the data set; its images are not.
            texts = table.rows.dataset.remove_columns(self._images(table))
            table = replace(table, rows=replace(table.rows, dataset=texts))
        return Samples(
            table,
            self.run_seed,
            self.resolution,
            random_crop,
            horizontal_flip,
            self.augmentation == "joint",
            self.preferred_only,
            cached,
            self.ties == "coin",
            originals,
            self.resize == "bicubic",
        )

    def _images(self, table: PairTable) -> list[str]:
        """Names of the columns of images, in stored order."""
        columns = self.columns
        return [columns.image] if table.label_0 is None else [columns.image_0, columns.image_1]

    def _collate(self) -> Callable[[list], PairBatch | ImageBatch]:
        if self.cached is None:
            return self.collate
        return partial(collate_cached, collate=self.collate, empty=self.cached.embedding(""))

    # ----------------------------------------------------------------------------------------------------- the cache

    def cache_filling(self, folder: str | None, dtype: Dtype, rows_per_shard: int) -> CacheFilling:
        """What `main.py cache` encodes.

        Args:
            folder: Where to; null means the folder in `cache`.
            dtype: Type of the stored numbers.
            rows_per_shard: Rows in a file.
        """
        self._refuse_random_crop(self.random_crop)
        return CacheFilling(self, self._folder_to_fill(folder), dtype, rows_per_shard)

    def _folder_to_fill(self, folder: str | None) -> Path:
        folder = folder or self.cache_folder
        if not folder:
            raise ValueError("There is no folder to fill: give `--folder`, or set `data.init_args.cache`.")
        return Path(folder).expanduser()

    def score_filling(self, folder: str | None, rows_per_file: int, rewards: dict[str, dict[str, Any]]) -> ScoreFilling:
        """What `main.py cache` scores.

        Args:
            folder: Scores go to scores/<name> below it; null means the folder in `cache`.
            rows_per_file: Rows in a file.
            rewards: Name -> description of each reward.
        """
        return ScoreFilling(self, self._folder_to_fill(folder), rows_per_file, rewards)

    def to_encode(self) -> tuple[dict[str, Samples], dict[str, Any]]:
        """The rows that training and validation show, in the order of the data set, and how their images are shown."""
        splits: dict[str, Samples] = {}
        views = {}
        for split, number, seed, flips in (
            (self.split, self.max_train_samples, self.run_seed, self.horizontal_flip),
            (self.validation_split, self.max_val_samples, 0, False),
        ):
            if split is None:
                continue
            table = self._open(split)
            rank_zero_info(table.summary)
            views = views or self._views(table)
            index = table.sample(number, seed).index
            if split in splits:  # trains and validates on one split
                index, flips = np.union1d(index, splits[split].table.index), splits[split].horizontal_flip
            chosen = np.isin(table.index, index)
            preferred_only = views["images"] == "preferred"
            label_0 = table.label_0
            if label_0 is not None:  # both images in stored order, so that another policy for ties finds them
                label_0 = label_0[chosen] if preferred_only else np.ones(chosen.sum())
            table = replace(table, index=table.index[chosen], label_0=label_0)
            joint = views["augmentation"] == "joint"
            bicubic = self.resize == "bicubic"
            splits[split] = Samples(table, 0, self.resolution, False, flips, joint, preferred_only, bicubic=bicubic)
        return splits, views

    def _views(self, table: PairTable) -> dict[str, Any]:
        """Which images are shown to the encoder, and in which form."""
        known = self.preferred_only and self.ties != "coin" and not self.label_noise and self.labels_from is None
        images = "single" if table.label_0 is None else "preferred" if known else "pairs"
        augmentation = "separate" if self.preferred_only else self.augmentation
        views = {"resolution": self.resolution, "crop": "centre", "augmentation": augmentation, "images": images}
        return views | ({"resize": "bicubic"} if self.resize == "bicubic" else {})

    def _open_cache(self) -> None:
        """Raise before the networks are loaded if the cache lacks anything that will be asked for."""
        self.cached = cache = Cache(self.cache_folder)
        self._places = {}
        for split, table in self._tables.items():
            cache.check_views(self._views(table))
            self._places[split] = cache.places(split, table.rows, self._images(table))

    @staticmethod
    def _refuse_random_crop(random_crop: bool) -> None:
        if random_crop:
            raise ValueError(
                "random_crop: true shows another part of an image at every visit, which cannot be cached. Set "
                "random_crop: false (the centre is cropped; flips are cached), or leave out `cache`."
            )

    # ------------------------------------------------------------------------------------------------- opening a split

    def _choose_columns(self, name: str, found: list[str]) -> list[str]:
        columns = self.columns
        if self.preferred_only and columns.image in found and columns.image_0 not in found:
            wanted = [columns.caption, columns.image]
        else:
            wanted = [columns.caption, columns.image_0, columns.image_1]
            wanted += [columns.label_0] if columns.label_0 is not None else []
            wanted += [columns.model_0, columns.model_1] if self.dreamlike_pairs_only else []
            wanted += [columns.has_label] if self.require_label else []
            wanted += [columns.pairs_per_prompt] if columns.pairs_per_prompt is not None else []
        if missing := [column for column in wanted if column not in found]:
            raise ValueError(
                f"{name}: no column {', '.join(map(repr, missing))}; found: {', '.join(found)}. Say what the columns "
                "are called with `data.init_args.columns`, for example `columns: {caption: prompt}`."
            )
        return wanted

    def _source_of(self, split: str) -> str:
        """What messages call the source of a split."""
        return self.source

    def _load_rows(self, split: str) -> Rows:
        if self.streaming:
            columns = self.columns
            stream = ParquetStream(
                (columns.image_0, columns.image_1, columns.image),
                repr((columns, self.preferred_only, self.dreamlike_pairs_only, self.require_label)),
                Path(self.cache_dir).expanduser(),
                self.cache_gb,
                self.shuffle_shards,
            )
            return stream.load(self.source, split, self.subset, self._choose_columns)
        return load_rows(self.source, split, self.subset, self._choose_columns)

    def _open(self, split: str) -> PairTable:
        """Rows of a split, checked and filtered by whole columns; no image is decoded unless `verify_images` asks."""
        rows = self._load_rows(split)
        columns, found = self.columns, rows.dataset.column_names
        single = columns.image_0 not in found
        keep = np.ones(len(rows), dtype=bool)
        left_out: dict[str, int] = {}

        def leave_out(rejected: np.ndarray, reason: str) -> None:
            if number := int((keep & rejected).sum()):
                left_out[reason] = number
                keep[rejected] = False

        def reject(bad: np.ndarray, reason: str, problem: Callable[[int], str]) -> None:
            bad = keep & bad
            if bad.any() and self.on_bad_row == "error":
                row = int(np.flatnonzero(bad)[0])
                raise ValueError(
                    f"{rows.where(row)}: {problem(row)}. {bad.sum()} of {len(rows)} rows are like this; "
                    "`on_bad_row: drop` leaves them out."
                )
            leave_out(bad, reason)

        label_0 = np.ones(len(rows))
        votes_only = self.require_label and (self.require_label != "validation" or split == self.validation_split)
        if not single and votes_only:
            leave_out(rows.numbers(columns.has_label, missing=0.0) == 0.0, "without a vote")
        for reason, problems in rows.problems().items():
            reject(_mask(problems, rows), reason, problems.__getitem__)
        if not single and columns.label_0 is not None:
            label_0 = rows.numbers(columns.label_0, missing=np.nan)
            reject(
                ~np.isin(label_0, (0.0, 0.5, 1.0)),
                "with an impossible label",
                lambda row: (
                    f"{columns.label_0!r} is {label_0[row]}, expected 1 (first image preferred), 0 (second) or 0.5 "
                    "(tie). Where rows without a vote have has_label false, `require_label: true` leaves those out"
                ),
            )
            if self.ties == "drop":
                leave_out(label_0 == 0.5, "ties")
            elif self.ties == "first":
                label_0 = np.where(label_0 == 0.5, 1.0, label_0)
        if not single and (count := columns.pairs_per_prompt) is not None:
            counts = rows.numbers(count, missing=np.nan)
            reject(
                ~(counts >= 1),
                "with an impossible number of pairs",
                lambda row: f"{count!r} is {counts[row]}, expected the number of pairs with this prompt, 1 or more",
            )
        if not single and self.dreamlike_pairs_only:
            leave_out(~both_dreamlike(rows.column(columns.model_0), rows.column(columns.model_1)), "not dreamlike")

        reject(
            rows.missing_texts(columns.caption),
            "without a caption",
            lambda row: f"{columns.caption!r} is {rows.dataset[row][columns.caption]!r}, expected text",
        )
        images = [columns.image] if single else [columns.image_0, columns.image_1]
        for column in images:
            problems = {row: f"{column!r} {problem}" for row, problem in rows.image_problems(column).items()}
            reject(_mask(problems, rows), f"without {column}", problems.__getitem__)
        if self.verify_images:
            problems = self._verify(rows, np.flatnonzero(keep), images)
            reject(_mask(problems, rows), "with a damaged image", problems.__getitem__)

        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
        index, name = np.flatnonzero(keep), f"{self._source_of(split)}, split {split!r}"
        if len(index) == 0:
            raise ValueError(f"{name}: nothing is left of {len(rows)} rows: {reasons}.")
        summary = f"{name}: {len(index)} of {len(rows)} rows" + (f"; left out: {reasons}" if reasons else "")
        return PairTable(rows, columns, index, None if single else label_0[index], summary)

    def _verify(self, rows: Rows, index: np.ndarray, images: list[str]) -> dict[int, str]:
        """Row -> problem, where an image does not decode; `datasets` caches the answer for parquet and hub data."""
        problems = rows.dataset.select(index).map(
            partial(
                _image_problem, rows=replace(rows, dataset=None, lines=None), images=images, resolution=self.resolution
            ),
            remove_columns=rows.dataset.column_names,
            num_proc=self.num_workers or None,
            desc="Decoding all images once",
        )["problem"]
        return {int(row): problem for row, problem in zip(index, problems, strict=True) if problem}


def _mask(problems: dict[int, str], rows: Rows) -> np.ndarray:
    mask = np.zeros(len(rows), dtype=bool)
    mask[list(problems)] = True
    return mask


def _image_problem(values: dict[str, Any], rows: Rows, images: list[str], resolution: int) -> dict[str, str]:
    for column in images:
        try:
            decode_image(rows.stored_image(values[column]), resolution)
        except ValueError as error:
            return {"problem": f"{column!r} {error}"}
    return {"problem": ""}
