"""What crosses the border between data and methods: plain dictionaries of tensors and strings, never tokens.

Letters: `B` pairs (or prompts, or images), `2B` the images of B pairs with the preferred ones first.
"""

from typing import NotRequired, TypedDict

from torch import Tensor


class Cached(TypedDict, total=False):
    """What a cache gives instead of pixels and of prompts that have to be encoded (see `datamodules/cache.py`)."""

    moments: Tensor  # (2B, 2C, h, w): mean and log-variance of each image's latents, C = channels of the VAE
    embeddings: dict[str, dict[str, Tensor]]  # each distinct prompt of the batch, and "" -> its encodings, (1, ...)


class PairBatch(Cached):
    """B preference pairs. Image `i` was preferred over image `B + i`; both were made for prompt `i`.

    With `originals` the pairs are in stored order instead, and `label` says which image people preferred.
    """

    images: NotRequired[Tensor]  # (2B, 3, H, W) float32 in [-1, 1], the B preferred images first; absent with `moments`
    prompts: list[str]  # B
    originals: NotRequired[list[Tensor]]  # 2B images as stored, in the order of `images`, each (3, H, W) uint8
    label: Tensor  # (B,) float32: probability that the first image is the better one; 1.0, or 0.5 for a tie
    weight: Tensor  # (B,) float32: weight of the pair in the loss, 1.0 unless the data says otherwise
    original_sizes: Tensor  # (2B, 2) int64: height and width of each image as stored
    crops: Tensor  # (2B, 2) int64: top and left of the crop, counted after the resize
    ids: list[str]  # B: where each pair comes from, e.g. "train-00000.parquet:17"


class ImageBatch(Cached):
    """B captioned images, for supervised fine-tuning."""

    images: NotRequired[Tensor]  # (B, 3, H, W) float32 in [-1, 1]; absent with `moments`
    prompts: list[str]  # B
    original_sizes: NotRequired[Tensor]  # (B, 2)
    crops: NotRequired[Tensor]  # (B, 2)
    ids: NotRequired[list[str]]  # B


class PromptBatch(TypedDict):
    """B prompts, each with the seed of its starting noise, so that an image depends on neither batch size nor rank."""

    prompts: list[str]  # B
    seeds: list[int]  # B
    index: list[int]  # B: number of the image: position in the prompt list, times the images per prompt
    groups: NotRequired[list[dict[str, str]]]  # B: what sorts the prompts -> the group, e.g. {"Category": "Animals"}


class TrainingPrompts(TypedDict):
    """B prompts of which a method makes its own training images. A batch comes several times in a row."""

    prompts: list[str]  # B
    visit: int  # how often the batch has come before; 0 when it is new
