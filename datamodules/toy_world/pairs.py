"""Preference pairs of the toy world: pictures two by two, labelled by the oracle, kept as Pick-a-Pic parquet files."""

import hashlib
import io
import json
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.toy_world.oracle import judge
from datamodules.toy_world.render import render
from datamodules.toy_world.scenes import Scene, change_one_thing, draw_scenes, heldout_scenes

Preference = Literal["vividness", "match", "both"]

SAMPLING_BATCH = 256
# What the pictures and labels are a function of, beside the settings.
SOURCES = ("scenes.py", "render.py", "oracle.py", "pairs.py")


@dataclass(frozen=True)
class PairSettings:
    """What a set of pairs is a function of; see `ToyPairs`."""

    source: Literal["base", "world"]
    preference: Preference
    num_pairs: int
    num_val_pairs: int
    label_noise: float
    tie_margin: float
    seed: int
    pipeline: Path
    num_inference_steps: int
    guidance_scale: float

    def fingerprint(self, labels: bool) -> str:
        """Changes whenever the pictures could, or with `labels` the labels: settings, weights and the code here.

        Args:
            labels: Whether the labels count too, or the pictures alone.
        """
        settings: dict[str, Any] = asdict(self) | {"pipeline": None}
        files = [Path(__file__).with_name(name) for name in SOURCES]
        if self.source == "base":
            files += sorted(file for file in self.pipeline.rglob("*") if file.suffix in (".safetensors", ".json"))
            if not labels:
                settings |= {"preference": None}
        if not labels:
            settings |= {"label_noise": None, "tie_margin": None}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for file in files:
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]


def write_pairs(settings: PairSettings, cache: Path) -> Path:
    """Make the pairs unless they are there, and return the folder with `train.parquet` and `validation.parquet`.

    Pictures are kept apart from the labels: sampling takes a minute or two, and every preference can use the same ones.
    Files are written under another name first, so that an interrupted run leaves nothing that looks finished.

    Args:
        settings: What to make.
        cache: Where made pairs are kept.
    """
    folder = pairs_folder(settings, cache)
    if (folder / "validation.parquet").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    scenes = _scenes(settings)
    images = _pictures(settings, scenes, cache)
    captions = [scene.caption for scene in scenes]
    scores = getattr(judge(images.flatten(0, 1) / 255, [c for c in captions for _ in range(2)]), settings.preference)
    label_0 = label_pairs(scores.view(-1, 2), settings.tie_margin)
    label_0[: settings.num_pairs] = flip_labels(label_0[: settings.num_pairs], settings.label_noise, settings.seed)
    for split, rows in {
        "train": slice(0, settings.num_pairs),
        "validation": slice(settings.num_pairs, None),  # last: its presence says that the folder is complete
    }.items():
        _write_parquet(
            folder / f"{split}.parquet", captions[rows], images[rows], label_0[rows], f"toy-{settings.source}"
        )
    return folder


def pairs_folder(settings: PairSettings, cache: Path) -> Path:
    return cache / f"toy_pairs-{settings.fingerprint(labels=True)}"


def label_pairs(scores: Tensor, tie_margin: float) -> Tensor:
    """Label of the first picture of each pair: 1 preferred, 0 not, 0.5 a tie.

    Args:
        scores: (N, 2) oracle scores.
        tie_margin: Scores that differ by no more than this tie.

    Returns:
        (N,) labels.
    """
    advantage = scores[:, 0] - scores[:, 1]
    label_0 = (advantage > 0).float()
    label_0[advantage.abs() <= tie_margin] = 0.5
    return label_0


def flip_labels(label_0: Tensor, label_noise: float, seed: int) -> Tensor:
    """Turn each label round with probability `label_noise`; a tie stays one.

    Args:
        label_0: (N,) labels.
        label_noise: In [0, 1]; 1 turns all.
        seed: Seed of the draw.
    """
    flip = torch.rand(len(label_0), generator=torch.Generator().manual_seed(seed)) < label_noise
    return torch.where(flip, 1 - label_0, label_0)


def _scenes(settings: PairSettings) -> list[Scene]:
    """Training scenes, then held-out ones for the validation pairs."""
    heldout = heldout_scenes()
    return draw_scenes(settings.num_pairs, random.Random(settings.seed)) + [
        heldout[i % len(heldout)] for i in range(settings.num_val_pairs)
    ]


def _pictures(settings: PairSettings, scenes: list[Scene], cache: Path) -> Tensor:
    """(N, 2, 3, 32, 32) uint8."""
    if settings.source == "world":
        return _draw(scenes, settings)
    file = cache / f"toy_pictures-{settings.fingerprint(labels=False)}.pt"
    if not file.is_file():
        images = sample_pictures(settings, [scene.caption for scene in scenes for _ in range(2)])
        partial = file.with_suffix(f".{os.getpid()}.partial")
        torch.save(images.view(-1, 2, *images.shape[1:]), partial)
        partial.replace(file)
    return torch.load(file, weights_only=True)


def _draw(scenes: list[Scene], settings: PairSettings) -> Tensor:
    """Two drawings of every scene; where the preference is about the match, one shows something else than asked for."""
    rng = random.Random(settings.seed)
    shown = [scene for scene in scenes for _ in range(2)]
    if settings.preference != "vividness":
        for pair in range(len(scenes)):
            shown[2 * pair + rng.randrange(2)] = change_one_thing(scenes[pair], rng)
    images = to_bytes(render(shown, torch.Generator().manual_seed(settings.seed)))
    return images.view(-1, 2, *images.shape[1:])


def sample_pictures(settings: PairSettings, captions: list[str]) -> Tensor:
    """(N, 3, 32, 32) uint8 pictures that the pipeline makes of captions, with a progress bar."""
    from diffusers import StableDiffusionPipeline
    from tqdm import tqdm

    pipeline = StableDiffusionPipeline.from_pretrained(settings.pipeline, safety_checker=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    starts = range(0, len(captions), SAMPLING_BATCH)
    parts = []
    with tqdm(total=len(starts) * settings.num_inference_steps, desc="Sampling pairs from the base") as bar:

        def advance(pipeline: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            bar.update()
            return tensors

        for start in starts:
            output = pipeline(
                captions[start : start + SAMPLING_BATCH],
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + start),
                output_type="pt",
                callback_on_step_end=advance,
            )
            parts.append(to_bytes(output.images))
    return torch.cat(parts)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as the uint8 that a PNG keeps."""
    return (images * 255).round().to(torch.uint8)


def _write_parquet(file: Path, captions: list[str], images: Tensor, label_0: Tensor, model: str) -> None:
    """The columns of Pick-a-Pic, row by row.

    Args:
        file: Where to.
        captions: N captions.
        images: (N, 2, 3, 32, 32) uint8.
        label_0: (N,) label of the first picture.
        model: What made the pictures.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    N = len(captions)
    columns = {
        "caption": captions,
        "jpg_0": [_png(image) for image in images[:, 0]],
        "jpg_1": [_png(image) for image in images[:, 1]],
        "label_0": label_0.tolist(),
        "label_1": (1 - label_0).tolist(),
        "are_different": [True] * N,
        "has_label": [True] * N,
        "image_0_uid": [f"{file.stem}-{i}-0" for i in range(N)],
        "image_1_uid": [f"{file.stem}-{i}-1" for i in range(N)],
        "model_0": [model] * N,
        "model_1": [model] * N,
    }
    partial = file.with_suffix(f".{os.getpid()}.partial")
    pq.write_table(pa.table(columns), partial)
    partial.replace(file)


def _png(image: Tensor) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, format="PNG")
    return buffer.getvalue()
