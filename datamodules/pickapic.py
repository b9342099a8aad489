"""Pick-a-Pic and look-alikes: preference pairs by column mapping, from the hub, parquet, JSONL or a folder."""

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from datamodules.batches import ImageBatch, PairBatch, PromptBatch
from datamodules.prompts import PromptList
from datamodules.sampling import ResumableDataModule, evaluation_loader, sample_generator
from datamodules.sources import Rows, load_rows
from datamodules.transforms import View, view_image, view_pair_jointly

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
Ties = Literal["drop", "first", "keep"]


@dataclass(frozen=True)
class PairColumns:
    """Names of the columns in the data set; the defaults are Pick-a-Pic's.

    Args:
        caption: The prompt: text, or a list of texts of which one is drawn at every visit.
        image_0: First image: encoded bytes, or a path below the folder of the file that names it.
        image_1: Second image.
        label_0: 1 if the first image was preferred, 0 if the second, 0.5 for a tie.
        image: The image of a plain captioned data set, used by `preferred_only` where there are no pairs.
        model_0: Model that made the first image, for `dreamlike_pairs_only`.
        model_1: Model that made the second image.
        has_label: Whether somebody voted, for `require_label`.
    """

    caption: str = "caption"
    image_0: str = "jpg_0"
    image_1: str = "jpg_1"
    label_0: str = "label_0"
    image: str = "image"
    model_0: str = "model_0"
    model_1: str = "model_1"
    has_label: str = "has_label"


PICKAPIC_COLUMNS = PairColumns()


def resolve_image(root: Path | None, name: str, where: str) -> Path:
    """File of an image that a row names; rows are data from strangers and must not reach out of their folder."""
    if root is None:
        raise ValueError(
            f"{where}: the image is a path ({name!r}), not bytes, which the hub cannot serve. Download the data set "
            "and give its folder as source."
        )
    if PurePosixPath(name).is_absolute() or not (root / name).resolve().is_relative_to(root.resolve()):
        raise ValueError(
            f"{where}: image path {name!r} leads out of {root}. Paths are relative to the folder of the file that "
            "names them and stay inside it; move or copy the images there."
        )
    if not (root / name).is_file():
        raise FileNotFoundError(f"{where}: image {root / name} does not exist. Paths are relative to {root}.")
    return root / name


def read_image(value: bytes | str | dict[str, Any], root: Path | None, where: str, resolution: int) -> Image.Image:
    """Decode one stored image to RGB.

    Args:
        value: Encoded bytes, or a path relative to root, or the hub's {"bytes": ..., "path": ...}.
        root: Folder of the file that names the path.
        where: Row, for the error.
        resolution: Edge that the image will be resized to; bounds its memory.
    """
    if isinstance(value, dict):
        value = value["bytes"] if value["bytes"] is not None else value["path"]
    file = resolve_image(root, value, where) if isinstance(value, str) else io.BytesIO(value)
    way_out = (
        "Repair or remove the row; `verify_images: true` finds all such rows before training starts, and with "
        "`on_bad_row: drop` leaves them out."
    )
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            # Resizing the shorter edge of a very long image up would take any amount of memory.
            if width * height * max(1.0, resolution / min(width, height)) ** 2 > Image.MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"{where}: the image is {width} x {height}, and too large or too long to be resized to "
                    f"{resolution} (limit: {Image.MAX_IMAGE_PIXELS} pixels). {way_out}"
                )
            return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{where}: the image is too large ({error}). {way_out}") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{where}: not an image that is read here ({', '.join(IMAGE_FORMATS)}). {way_out}") from error
    except (OSError, SyntaxError, EOFError) as error:  # what Pillow raises on damaged data
        raise ValueError(f"{where}: damaged image ({error}). {way_out}") from error


def image_problem(row: dict[str, Any], columns: list[str], root: Path | None, resolution: int) -> dict[str, str]:
    for column in columns:
        try:
            read_image(row[column], root, repr(column), resolution)
        except ValueError as error:
            return {"problem": str(error)}
    return {"problem": ""}


@dataclass
class PairTable:
    """The rows of one split that take part.

    Attributes:
        rows: All rows of the split.
        columns: Their names.
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
        """At most so many of the rows, drawn with the seed."""
        if number is None or number >= len(self.index):
            return self
        drawn = np.random.default_rng(seed).permutation(len(self.index))[:number]
        return replace(self, index=self.index[drawn], label_0=None if self.label_0 is None else self.label_0[drawn])


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
    """

    table: PairTable
    seed: int
    resolution: int
    random_crop: bool
    horizontal_flip: bool
    joint: bool
    preferred_only: bool

    def __len__(self) -> int:
        return len(self.table.index)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        """One sample, asked for by (row, position) in training, by row alone in evaluation."""
        number, position = key if isinstance(key, tuple) else (key, None)
        columns, rows = self.table.columns, self.table.rows
        row = int(self.table.index[number])
        values, where = rows.dataset[row], rows.where(row)
        generator = sample_generator(self.seed, 0 if position is None else position)

        caption = values[columns.caption]
        if isinstance(caption, list):
            caption = caption[0 if position is None else int(generator.integers(len(caption)))]
        sample = {"prompt": caption, "id": rows.id(row), "label": 1.0}

        def image(column: str) -> Image.Image:
            return read_image(values[column], rows.root, f"{where}, {column!r}", self.resolution)

        augmentation = (self.resolution, self.random_crop, self.horizontal_flip, generator)
        if self.table.label_0 is None:
            return sample | {"views": [view_image(image(columns.image), *augmentation)]}

        label_0 = float(self.table.label_0[number])
        preferred, other = (columns.image_1, columns.image_0) if label_0 == 0 else (columns.image_0, columns.image_1)
        if self.preferred_only:
            return sample | {"views": [view_image(image(preferred), *augmentation)]}
        if self.joint:
            views = list(view_pair_jointly(image(columns.image_0), image(columns.image_1), *augmentation))
            views = views[::-1] if label_0 == 0 else views
        else:
            views = [view_image(image(preferred), *augmentation), view_image(image(other), *augmentation)]
        return sample | {"views": views, "label": 0.5 if label_0 == 0.5 else 1.0}


def collate_pairs(samples: list[dict[str, Any]]) -> PairBatch:
    """The preferred images of all pairs, then the others."""
    views: list[View] = [sample["views"][which] for which in (0, 1) for sample in samples]
    return {
        "images": torch.stack([view.pixels for view in views]),
        "prompts": [sample["prompt"] for sample in samples],
        "label": torch.tensor([sample["label"] for sample in samples]),
        "weight": torch.ones(len(samples)),
        "original_sizes": torch.tensor([view.original_size for view in views]),
        "crops": torch.tensor([view.crop for view in views]),
        "ids": [sample["id"] for sample in samples],
    }


def collate_images(samples: list[dict[str, Any]]) -> ImageBatch:
    views: list[View] = [sample["views"][0] for sample in samples]
    return {
        "images": torch.stack([view.pixels for view in views]),
        "prompts": [sample["prompt"] for sample in samples],
        "original_sizes": torch.tensor([view.original_size for view in views]),
        "crops": torch.tensor([view.crop for view in views]),
        "ids": [sample["id"] for sample in samples],
    }


class PickAPicDataModule(ResumableDataModule):
    """Preference pairs in the style of Pick-a-Pic, or captioned images for supervised fine-tuning.

    Args:
        source: Hub id or mirror ('owner/name'); a parquet file, glob, or folder of parquet files; a JSONL file whose
            rows name images by paths relative to it, or a folder with one; a folder of images <name>_w.png (preferred),
            <name>_l.png (the other one) and <name>.txt (the caption). Splits of a folder are sub-folders (train/) or
            files (train.parquet, validation-00000.parquet, train.jsonl).
        resolution: Edge of the square training images, in pixels.
        batch_size: Pairs per device and micro-step.
        num_workers: Processes per device that decode images.
        split: Split to train on.
        validation_split: Split to validate on. Null validates on nothing.
        subset: Configuration of a hub data set that has several.
        columns: Names of the columns.
        ties: What becomes of pairs labelled 0.5. "drop" leaves them out, as the published script does for Pick-a-Pic;
            "first" takes the first image as preferred, as the published LoRA examples do; "keep" keeps them, label 0.5.
        require_label: Leave out rows whose has_label is false.
        dreamlike_pairs_only: Keep only pairs of which both images come from a model with "dream" in its name.
        max_train_samples: Train on so many pairs, drawn once with the seed of the run.
        max_val_samples: Validate on so many pairs, always the same ones.
        preferred_only: Give only the preferred image of each pair (or the image of a plain captioned data set), for
            supervised fine-tuning.
        random_crop: Crop training images anywhere instead of in the centre.
        horizontal_flip: Mirror half of the training images.
        augmentation: "separate" crops and flips the two images of a pair independently, as the published script does;
            "joint" resizes the second to the size of the first and treats both alike, as the LoRA SDXL example does.
        on_bad_row: "error" stops before training at a row with an impossible label, an empty caption or a missing
            image; "drop" leaves such rows out and logs how many.
        verify_images: Decode every image once before training, with num_workers processes; the result is cached.
            Without it a damaged image stops the run when it is met, whatever on_bad_row says, because leaving it out
            then would change the order of all later samples.
        test_prompts: Prompts for `main.py test` and `main.py predict`.
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
        ties: Ties = "drop",
        require_label: bool = False,
        dreamlike_pairs_only: bool = False,
        max_train_samples: int | None = None,
        max_val_samples: int | None = None,
        preferred_only: bool = False,
        random_crop: bool = False,
        horizontal_flip: bool = True,
        augmentation: Literal["separate", "joint"] = "separate",
        on_bad_row: Literal["error", "drop"] = "error",
        verify_images: bool = False,
        test_prompts: PromptList | None = None,
    ) -> None:
        super().__init__()
        if resolution < 8 or resolution % 8:
            raise ValueError(f"resolution is {resolution}; expected a positive multiple of 8, the factor of the VAEs.")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("num_workers", num_workers, 0),
            ("max_train_samples", max_train_samples, 1),
            ("max_val_samples", max_val_samples, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; expected {least} or more.")
        self.source = source
        self.resolution = resolution
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.split = split
        self.validation_split = validation_split
        self.subset = subset
        self.columns = columns
        self.ties = ties
        self.require_label = require_label
        self.dreamlike_pairs_only = dreamlike_pairs_only
        self.max_train_samples = max_train_samples
        self.max_val_samples = max_val_samples
        self.preferred_only = preferred_only
        self.random_crop = random_crop
        self.horizontal_flip = horizontal_flip
        self.augmentation = augmentation
        self.on_bad_row = on_bad_row
        self.verify_images = verify_images
        self.test_prompts = test_prompts

    def prepare_data(self) -> None:
        """Download, convert and check in one process; the others find the converted data in the cache."""
        if self.trainer.state.fn in (TrainerFn.FITTING, TrainerFn.VALIDATING):
            for split in (self.split, self.validation_split):
                if split is not None:
                    self._open(split)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._train = self._open(self.split)
            rank_zero_info(self._train.summary)
        if stage in ("fit", "validate") and self.validation_split is not None:
            self._val = self._open(self.validation_split)
            rank_zero_info(self._val.summary)

    def train_dataloader(self) -> DataLoader[PairBatch | ImageBatch]:
        table = self._train.sample(self.max_train_samples, self.run_seed)
        dataset = self._samples(table, self.random_crop, self.horizontal_flip)
        return self.stream_loader(dataset, self.batch_size, self.num_workers, self._collate(table))

    def val_dataloader(self) -> DataLoader[PairBatch | ImageBatch] | list:
        if self.validation_split is None:
            if self.trainer.state.fn == TrainerFn.VALIDATING:
                raise ValueError("There is nothing to validate on: set `data.init_args.validation_split`.")
            return []
        table = self._val.sample(self.max_val_samples, seed=0)
        dataset = self._samples(table, random_crop=False, horizontal_flip=False)
        return evaluation_loader(self.trainer, dataset, self.batch_size, self.num_workers, self._collate(table))

    def test_dataloader(self) -> DataLoader[PromptBatch]:
        return self._prompt_loader()

    def predict_dataloader(self) -> DataLoader[PromptBatch]:
        return self._prompt_loader()

    def _prompt_loader(self) -> DataLoader[PromptBatch]:
        if self.test_prompts is None:
            raise ValueError(
                "There are no prompts to make images from: set `data.init_args.test_prompts.source` to a prompt file."
            )
        return self.test_prompts.loader(self.trainer)

    def _samples(self, table: PairTable, random_crop: bool, horizontal_flip: bool) -> Samples:
        joint = self.augmentation == "joint"
        return Samples(table, self.run_seed, self.resolution, random_crop, horizontal_flip, joint, self.preferred_only)

    def _collate(self, table: PairTable) -> Callable[[list[dict[str, Any]]], PairBatch | ImageBatch]:
        return collate_images if self.preferred_only or table.label_0 is None else collate_pairs

    def _choose_columns(self, name: str, found: list[str]) -> list[str]:
        columns = self.columns
        if self.preferred_only and columns.image in found and columns.image_0 not in found:
            wanted = [columns.caption, columns.image]
        else:
            wanted = [columns.caption, columns.image_0, columns.image_1, columns.label_0]
            wanted += [columns.model_0, columns.model_1] if self.dreamlike_pairs_only else []
            wanted += [columns.has_label] if self.require_label or columns.has_label in found else []
        if missing := [column for column in wanted if column not in found]:
            raise ValueError(
                f"{name}: no column {', '.join(map(repr, missing))}; found: {', '.join(found)}. Say what the columns "
                "are called with `data.init_args.columns`, for example `columns: {caption: prompt}`."
            )
        return wanted

    def _open(self, split: str) -> PairTable:
        """Rows of a split, checked and filtered by whole columns; no image is decoded unless `verify_images` asks."""
        rows = load_rows(self.source, split, self.subset, self._choose_columns)
        if len(rows) == 0:
            raise ValueError(f"{rows.files[0]}: no rows.")
        columns, found = self.columns, rows.dataset.column_names
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
                    f"{rows.where(row)}: {problem(row)} {bad.sum()} of {len(rows)} rows are like this; "
                    "`on_bad_row: drop` leaves them out."
                )
            leave_out(bad, reason)

        if columns.label_0 in found:
            if self.require_label:
                leave_out(~column_values(rows, columns.has_label, 0.0).astype(bool), "without a vote")
            label_0 = column_values(rows, columns.label_0, np.nan)
            reject(
                ~np.isin(label_0, (0.0, 0.5, 1.0)),
                "with an impossible label",
                lambda row: (
                    f"{columns.label_0!r} is {label_0[row]}, expected 1 (first image preferred), 0 (second) or 0.5 "
                    "(tie). Rows without a vote have has_label false; `require_label: true` leaves those out."
                ),
            )
            if self.ties == "drop":
                leave_out(label_0 == 0.5, "ties")
            if self.ties == "first":
                label_0 = np.where(label_0 == 0.5, 1.0, label_0)
            if self.dreamlike_pairs_only:
                leave_out(~both_dreamlike(rows.column(columns.model_0), rows.column(columns.model_1)), "not dreamlike")
        else:
            label_0 = None

        captions = rows.column(columns.caption)
        reject(
            missing_captions(captions, f"{rows.files[0]}: {columns.caption!r}"),
            "without a caption",
            lambda row: f"{columns.caption!r} is {captions[row].as_py()!r}, expected text.",
        )
        images = [column for column in (columns.image_0, columns.image_1, columns.image) if column in found]
        for column in images:
            problems = image_problems(rows, column)
            bad = np.zeros(len(rows), dtype=bool)
            bad[list(problems)] = True
            reject(
                bad, f"without {column}", lambda row, column=column, problems=problems: f"{column!r} {problems[row]}"
            )
        if self.verify_images:
            problems = self._verify(rows, np.flatnonzero(keep), images)
            bad = np.zeros(len(rows), dtype=bool)
            bad[list(problems)] = True
            reject(bad, "with a damaged image", lambda row: problems[row])

        reasons = ", ".join(f"{number} {reason}" for reason, number in left_out.items())
        index = np.flatnonzero(keep)
        if len(index) == 0:
            raise ValueError(f"{self.source}, split {split!r}: all {len(rows)} rows are left out: {reasons}.")
        summary = f"{self.source}, split {split!r}: {len(index)} of {len(rows)} rows" + (
            f"; left out: {reasons}" if reasons else ""
        )
        return PairTable(rows, columns, index, None if label_0 is None else label_0[index], summary)

    def _verify(self, rows: Rows, index: np.ndarray, images: list[str]) -> dict[int, str]:
        """Problem of each row whose images do not decode; `datasets` caches the answer for parquet and hub data."""
        problems = rows.dataset.select(index).map(
            partial(image_problem, columns=images, root=rows.root, resolution=self.resolution),
            remove_columns=rows.dataset.column_names,
            num_proc=self.num_workers or None,
            desc="Decoding all images once",
        )["problem"]
        return {int(row): problem for row, problem in zip(index, problems, strict=True) if problem}


def column_values(rows: Rows, name: str, missing: float) -> np.ndarray:
    """A column of numbers or booleans as float64.

    Args:
        rows: The table.
        name: Its column.
        missing: Stands for null.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    column = rows.column(name)
    kind = column.type
    if not (
        pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    ):
        raise ValueError(f"{rows.files[0]}: column {name!r} has type {kind}, expected numbers.")
    return pc.fill_null(pc.cast(column, pa.float64()), missing).to_numpy()


def both_dreamlike(model_0: "pa.ChunkedArray", model_1: "pa.ChunkedArray") -> np.ndarray:
    """(N,) whether both models have "dream" in their name, in lower case, as the published option asks."""
    import pyarrow.compute as pc

    both = pc.and_(pc.match_substring(model_0, "dream"), pc.match_substring(model_1, "dream"))
    return pc.fill_null(both, False).to_numpy()


def missing_captions(captions: "pa.ChunkedArray", name: str) -> np.ndarray:
    """(N,) whether a caption is null or blank; of a list of captions, whether any is, or the list is empty."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def is_text(kind: pa.DataType) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)

    def is_blank(texts: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.fill_null(pc.equal(pc.utf8_trim_whitespace(pc.cast(texts, pa.large_string())), ""), True)

    if is_text(captions.type):
        return is_blank(captions).to_numpy()
    if not (pa.types.is_list(captions.type) and is_text(captions.type.value_type)):
        raise ValueError(f"{name} has type {captions.type}, expected text or lists of texts.")
    missing = pc.fill_null(pc.equal(pc.list_value_length(captions), 0), True).to_numpy().copy()
    parents, blank = pc.list_parent_indices(captions).to_numpy(), is_blank(pc.list_flatten(captions)).to_numpy()
    missing[parents[blank]] = True
    return missing


def image_problems(rows: Rows, name: str) -> dict[int, str]:
    """Problem of each row whose image is absent, as far as it can be seen without decoding; reads no image bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = rows.column(name)
    if pa.types.is_struct(column.type):  # the hub's {"bytes": ..., "path": ...}
        data, paths = pc.struct_field(column, "bytes"), pc.struct_field(column, "path")
    elif pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type):
        data, paths = column, None
    elif pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        data, paths = None, column
    else:
        raise ValueError(
            f"{rows.files[0]}: column {name!r} has type {column.type}, expected encoded images (binary) or paths "
            "(string)."
        )
    problems = {}
    lengths = pc.fill_null(pc.binary_length(data), -1).to_numpy() if data is not None else np.full(len(rows), -1)
    for row in np.flatnonzero(lengths <= 0):
        path = None if paths is None or lengths[row] == 0 else paths[row].as_py()
        if path is None:
            problems[int(row)] = "has no bytes." if lengths[row] == 0 else "is null, expected an image."
            continue
        try:
            resolve_image(rows.root, path, "")
        except (ValueError, FileNotFoundError) as error:
            problems[int(row)] = str(error)
    return problems
