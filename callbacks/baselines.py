"""What a model is compared with: the base, another checkpoint, a LoRA, a pipeline, or images made by anyone."""

import copy
import json
import pickle
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from PIL import Image
from torch import Tensor

from callbacks.image_store import read_image
from lightning_modules.backbones.base import LOADING_ERRORS, Backbone, first_line, to_low_precision
from lightning_modules.base import AlignmentModule

Kind = Literal["base", "none", "checkpoint", "lora", "pipeline", "images"]
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
LORA_FILE = "pytorch_lora_weights.safetensors"
MOST_NAMED = 5


def kind_of(baseline: str | None) -> Kind:
    """What a `baseline` setting names.

    Raises:
        ValueError: if it names nothing of these.
        FileNotFoundError: if there is no such file or folder, and it cannot be a hub id.
    """
    if baseline is None:
        return "none"
    path = Path(baseline).expanduser()
    if path.is_file():
        if path.suffix in (".ckpt", ".safetensors"):
            return "checkpoint" if path.suffix == ".ckpt" else "lora"
        raise ValueError(f"baseline: {path} is a file of another kind; expected .ckpt, or .safetensors of a LoRA.")
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return "pipeline"
        if (path / LORA_FILE).is_file():
            return "lora"
        if any(child.suffix.lower() in IMAGE_SUFFIXES for child in path.iterdir()):
            return "images"
        raise ValueError(
            f"baseline: the folder {path} holds neither a pipeline (model_index.json), nor a LoRA ({LORA_FILE}), nor "
            f"images (00000.png, ...). It holds: {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}."
        )
    if baseline == "base":
        return "base"
    if baseline.count("/") == 1 and baseline[0] not in "./~" and path.suffix not in (".ckpt", ".safetensors"):
        return "pipeline"  # a hub id
    raise FileNotFoundError(
        f"baseline: {baseline!r} does not exist (looked in {Path.cwd()}); expected `base`, null, a .ckpt file of a "
        "run, the folder of an exported LoRA or pipeline, a folder of images 00000.png, 00001.png, ..., or a "
        "pipeline's hub id."
    )


def load_baseline(kind: Kind, baseline: str, module: AlignmentModule) -> Backbone:
    """A second backbone, with the weights of the baseline and the sampling settings of the first.

    Raises:
        ValueError: if the weights cannot be read, or are of another model.
    """
    ours, path = module.backbone, Path(baseline).expanduser()
    weights = read_checkpoint(path, module) if kind == "checkpoint" else {}
    backbone = without_weights(ours)
    backbone.lora = copy.deepcopy(ours.lora) if kind == "checkpoint" else None
    if kind == "pipeline":
        backbone.pretrained = str(path) if path.is_dir() else baseline
        backbone.denoiser_path = backbone.vae_path = backbone.revision = backbone.variant = None
        backbone.few_step = None  # its own scheduler says how it samples
    try:
        backbone.load(ours.compute_dtype)
    except ValueError as error:
        raise ValueError(f"baseline {baseline!r}: {error}") from error
    if kind == "checkpoint":
        backbone.load_state_dict({name.removeprefix("backbone."): weights[name] for name in weights}, strict=False)
    elif kind == "lora":
        load_lora(backbone, path)
    backbone.requires_grad_(False)
    to_low_precision(backbone.denoiser, backbone.compute_dtype)
    return backbone.to(ours.device)


def without_weights(backbone: Backbone) -> Backbone:
    """A backbone with the same settings, not loaded."""
    other = copy.copy(backbone)
    other._modules, other._parameters, other._buffers = {}, {}, {}
    other._non_persistent_buffers_set = set()
    other.pipeline = None
    return other


def read_checkpoint(path: Path, module: AlignmentModule) -> dict[str, Tensor]:
    """The trained weights of a checkpoint of ours, or their average where the run kept one.

    Raises:
        ValueError: if the file is damaged, could run code, or holds the weights of another model.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"baseline: {path} is damaged, or holds more than tensors and plain values, which is never read "
            f"({first_line(error)[:160]})"
        ) from error
    about = checkpoint.get("limelight") if isinstance(checkpoint, dict) else None
    if about is None:
        raise ValueError(f"baseline: {path} is no checkpoint of this project; export the model, and give its folder.")
    trained = {name: tuple(parameter.shape) for name, parameter in module.trained_parameters().items()}
    if about["trained"] != trained:
        other = sorted(set(about["trained"].items()) ^ set(trained.items()))[0]
        raise ValueError(
            f"baseline: {path} belongs to another model: it was written by {about['method']} on {about['pretrained']} "
            f"with {len(about['trained'])} trained tensors, this run has {len(trained)}; the first difference is "
            f"{other[0]} of shape {other[1]}. Give the folder that the other run exported instead."
        )
    if about["pretrained"] != module.backbone.pretrained:
        rank_zero_warn(
            f"baseline: {path} was trained from {about['pretrained']}; its weights are compared on this run's "
            f"{module.backbone.pretrained}."
        )
    average = checkpoint.get("callbacks", {}).get("EMA", {}).get("average", {})
    return checkpoint["state_dict"] | average


def load_lora(backbone: Backbone, path: Path) -> None:
    """Put an exported LoRA on a backbone.

    Raises:
        ValueError: if the file is of another kind, or of another model.
    """
    folder, name = (path, LORA_FILE) if path.is_dir() else (path.parent, path.name)
    try:
        backbone.pipeline.load_lora_weights(folder, weight_name=name)
    except LOADING_ERRORS as error:
        raise ValueError(
            f"baseline: {folder / name} does not fit {backbone.pretrained}: {first_line(error)[:300]} Expected a LoRA "
            "of this model, as diffusers or kohya write it."
        ) from error
    if not getattr(backbone.denoiser, "peft_config", None):
        raise ValueError(
            f"baseline: {folder / name} changes nothing in the {backbone.denoiser_name} of {backbone.pretrained}; "
            "expected a LoRA of this model."
        )


class ImageFolder:
    """Images made by anyone: 00000.png is the first prompt's, 00001.png the next one's, as `predict` writes them.

    Args:
        folder: Holds them as PNG, JPEG or WebP.
        prompts: The prompt of each image that is needed, in order; None where it is not known.
        size: Height and width that every image must have, in pixels.

    Raises:
        ValueError: if images are missing or damaged, of another size or kind, or, where the folder says what they
            show (`predict` writes metadata.jsonl), made for other prompts.
    """

    def __init__(self, folder: Path, prompts: list[str] | list[None], size: tuple[int, int]) -> None:
        found = {file.stem: file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES}
        names = [f"{index:05d}" for index in range(len(prompts))]
        self.folder = folder
        self.refuse([f"{name}.png" for name in names if name not in found], "are missing", len(names))
        self.files = [found[name] for name in names]
        self.refuse([problem for file in self.files if (problem := problem_of(file, size))], "do not fit", len(names))
        self.refuse(self.other_prompts(prompts), "were made for other prompts", len(names))

    def refuse(self, problems: list[str], what: str, needed: int) -> None:
        if problems:
            more = f" and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
            raise ValueError(
                f"baseline: of the {needed} images in {self.folder} {len(problems)} {what}: "
                f"{', '.join(problems[:MOST_NAMED])}{more}. Expected one image for each prompt and seed of this test, "
                "in their order; `main.py predict` makes such a folder."
            )

    def other_prompts(self, prompts: list[str] | list[None]) -> list[str]:
        metadata = self.folder / "metadata.jsonl"
        if not metadata.is_file():
            return []
        try:
            rows = [json.loads(line) for line in metadata.read_text(encoding="utf-8").split("\n") if line]
            made_for = {row["file_name"]: row["prompt"] for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"baseline: {metadata} is not what `predict` writes, file_name and prompt of each image ({error!r}); "
                "mend it, or delete it if the images are those of this test's prompts in their order."
            ) from error
        return [
            f"{file.name} (for {made_for.get(file.name)!r:.60} instead of {prompt!r:.60})"
            for file, prompt in zip(self.files, prompts, strict=True)
            if prompt is not None and made_for.get(file.name) != prompt
        ]

    def __call__(self, index: list[int]) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1] of the images with these numbers."""
        return torch.stack([read_image(self.files[i]) for i in index]).float() / 255


def problem_of(file: Path, size: tuple[int, int]) -> str | None:
    """What is wrong with an image file, by its header and without decoding it."""
    try:
        with Image.open(file) as image:
            found, mode = (image.height, image.width), image.mode
    except (OSError, SyntaxError, ValueError):
        return f"{file.name} (no image)"
    if found != size:
        return f"{file.name} ({found[1]} x {found[0]} pixels, this model makes {size[1]} x {size[0]})"
    return None if mode == "RGB" else f"{file.name} (mode {mode}, expected RGB)"
