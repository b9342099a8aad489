"""Images that are made once: files named by everything that an image depends on, so that a killed test goes on."""

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from peft.tuners.lora import LoraLayer
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from callbacks.grids import to_pil
from lightning_modules.backbones.base import SCORE, Backbone
from lightning_modules.base import describe_encoders

# --------------------------------------------------------------------------------------- what an image depends on


def hash_of(value: Any) -> str:
    """Hash of anything that JSON can hold."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors: equal for equal names, shapes, types and values.

    Of weights that FSDP2 has spread over ranks every rank must call it; of those that DeepSpeed has, it hashes the
    rank's own part.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors):
        tensor = getattr(tensor, "ds_tensor", tensor).detach()
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def hash_weights(backbone: Backbone) -> dict[str, Any]:
    """Hash of each part of a loaded backbone: denoiser, adapters, reference (a full fine-tuning's), VAE, text encoders.

    The denoiser with adapters has the same hash as without. The score network of a distillation draws no images, but
    its frozen weights are the reference of a fully trained student.
    """

    def tensors_of(module: nn.Module) -> dict[str, Tensor]:
        return dict(module.named_parameters()) | dict(module.named_buffers())

    def adapters_of(tensors: dict[str, Tensor]) -> set[str]:
        return {name for name in tensors if any(part.startswith("lora_") for part in name.split("."))}

    def hash_frozen(tensors: dict[str, Tensor]) -> str:
        names = tensors.keys() - adapters_of(tensors)
        return hash_tensors((name.replace(".base_layer", ""), tensors[name]) for name in names)

    denoiser = tensors_of(backbone.denoiser)
    adapters = {name for name in adapters_of(denoiser) if f".{SCORE}." not in name}
    hashes: dict[str, Any] = {"denoiser": hash_frozen(denoiser)}
    if adapters:
        strengths = {
            name: {adapter: scale for adapter, scale in layer.scaling.items() if adapter != SCORE}
            for name, layer in backbone.denoiser.named_modules()
            if isinstance(layer, LoraLayer) and layer.scaling.keys() != {SCORE}
        }
        hashes["adapters"] = [hash_tensors((name, denoiser[name]) for name in adapters), hash_of(strengths)]
    if backbone.score_network is not backbone.denoiser:
        hashes["reference_denoiser"] = hash_frozen(tensors_of(backbone.score_network))
    for name in ("reference_denoiser", "vae", *backbone.text_encoder_names):
        if (module := getattr(backbone, name, None)) is not None:
            hashes[name] = hash_tensors(tensors_of(module).items())
    return hashes


def describe_policy(backbone: Backbone, hashes: dict[str, Any], reference: bool = False) -> dict[str, Any]:
    """Everything that an image depends on besides its prompt and seed, as plain values.

    Args:
        backbone: Loaded.
        hashes: Its `hash_weights`.
        reference: Describe the starting policy instead of the acting one.
    """
    import diffusers

    weights = {name: value for name, value in hashes.items() if name != "reference_denoiser"}
    if reference:
        weights.pop("adapters", None)
        weights["denoiser"] = hashes.get("reference_denoiser", hashes["denoiser"])
    encoders = describe_encoders(backbone)
    few_step = None if reference else backbone.few_step
    return {
        "family": encoders["family"],
        "compute_dtype": encoders["compute_dtype"],
        "weights": weights,
        "tokenizers": {name: value for name, value in encoders["encoders"].items() if name.startswith("tokenizer")},
        "configs": [plain_config(backbone.denoiser.config), plain_config(backbone.vae.config)],
        "sampler": [type(backbone.pipeline.scheduler).__name__, plain_config(backbone.pipeline.scheduler.config)],
        "num_inference_steps": backbone.num_inference_steps,
        "guidance_scale": backbone.guidance_scale,
        **({} if few_step is None else {"few_step": asdict(few_step)}),
        **({} if backbone.image_size is None else {"image_size": backbone.image_size}),
        **backbone.pipeline_options,
        "diffusers": diffusers.__version__,
    }


def plain_config(config: Any) -> dict[str, Any]:
    """A config without what says where it was read from, and by which version."""
    items = asdict(config) if is_dataclass(config) else dict(config)
    return {name: value for name, value in items.items() if not name.startswith("_")}


def image_size(backbone: Backbone) -> tuple[int, int]:
    """Height and width of the images that a loaded backbone makes."""
    _, height, width = backbone.latent_shape
    return height * backbone.pipeline.vae_scale_factor, width * backbone.pipeline.vae_scale_factor


# --------------------------------------------------------------------------------------------------------- files


def read_image(path: Path) -> Tensor:
    """An image file -> (3, H, W) uint8.

    Raises:
        OSError, SyntaxError, ValueError: if it is absent or damaged.
    """
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def write_image(path: Path, image: Tensor) -> None:
    """Write (3, H, W) in [0, 1] as PNG: the file has its name once it is whole, or not at all.

    Raises:
        OSError: if it cannot be written, with what to do.
    """
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:
            to_pil(image).save(file, format="PNG", compress_level=1)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OSError(
            f"could not write the image {path}: {error.strerror or error}. Those made so far are kept: make room, and "
            "run the same command again."
        ) from error


class Painter:
    """Makes the images of one policy, none of them twice, whatever ended an earlier run.

    Args:
        backbone: Makes them.
        policy: Its `describe_policy`.
        folder: Where they are kept.
        acting: A context in which the policy acts.
    """

    def __init__(
        self,
        backbone: Backbone,
        policy: dict[str, Any],
        folder: Path,
        acting: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.backbone = backbone
        self.policy = hash_of(policy)
        self.folder = folder
        self.acting = acting
        self.made = 0

    def path(self, prompt: str, seed: int) -> Path:
        """The file of an image."""
        name = hash_of([self.policy, prompt, seed])
        return self.folder / name[:2] / f"{name}.png"

    def __call__(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """Images of B prompts at B seeds.

        Returns:
            (B, 3, H, W) float32 in [0, 1], in steps of 1/255, on the CPU: what the files hold, also of those that were
            made just now.

        Raises:
            ValueError: if the policy makes an image that is no image, because it has diverged.
            OSError: if one cannot be written.
        """
        paths = [self.path(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        images = [self.read(path) for path in paths]
        missing = [i for i, image in enumerate(images) if image is None]
        number = self.number_to_make(len(missing))
        if number:
            rows = (missing + [0] * number)[:number]
            with self.acting():
                made = self.backbone.generate([prompts[i] for i in rows], [seeds[i] for i in rows])
            for i, image in zip(missing, made[: len(missing)], strict=True):
                if not image.isfinite().all():
                    raise ValueError(
                        f"The image of prompt {prompts[i]!r} at seed {seeds[i]} holds NaN: the model has diverged, or "
                        "overflows in half precision. Try bf16-mixed or 32-true, or an earlier checkpoint."
                    )
                write_image(paths[i], image)
                images[i] = (image.clamp(0, 1) * 255).round().byte()
            self.made += len(missing)
        return torch.stack(images).float() / 255

    def read(self, path: Path) -> Tensor | None:
        """(3, H, W) uint8, or None if the image has to be made."""
        try:
            return read_image(path)
        except FileNotFoundError:
            return None
        except (OSError, SyntaxError, ValueError) as error:
            rank_zero_warn(f"The image {path} is damaged ({error}) and is made again.")
            return None

    def number_to_make(self, missing: int) -> int:
        """How many images this rank makes: networks that are spread over ranks are called by all of them, or none."""
        spread = any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in self.backbone.denoiser.parameters())
        if not spread:
            return missing
        number = torch.tensor(missing, device=self.backbone.device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number)
