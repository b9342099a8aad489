"""The step-aware preference model of SPO (arXiv:2406.04314): a CLIP whose image tower is told the timestep.

The network, its files and the reward made of it; `lightning_modules/step_preference_model.py` trains it. Files for
other programs are written by

    python -m lightning_modules.rewards.step_preference export CHECKPOINT final_ckpt.bin
"""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import is_zipfile

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_modules.functional.noise import at_least_float32
from lightning_modules.functional.scores import cosine_score
from lightning_modules.rewards.base import check_inputs
from lightning_modules.rewards.network import EmbeddingReward, Precision
from lightning_modules.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from lightning_modules.rewards.towers import HF_WEIGHTS, Towers, empty_hf_clip, hf_image_processor, hf_tokenizer
from lightning_modules.weight_files import build_empty, check_file, check_source, find, fit, read_weights

PixelMode = Literal["training", "scoring"]

PREFIX = "model."  # of every key in the published files
SINUSOID_WIDTH = 256
PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


# --------------------------------------------------------------------------------------------------------- the network


def sinusoid(t: Tensor, width: int = SINUSOID_WIDTH) -> Tensor:
    """What the network is told of a timestep, before two learned layers.

        f_k = 10000^(-k / h),  [cos(t f_0), ..., cos(t f_h-1), sin(t f_0), ..., sin(t f_h-1)],  h = width / 2

    Args:
        t: (B,) timesteps, 0 to 999, not divided by anything: whole numbers, or float32 or better.
        width: Even.

    Returns:
        (B, width) float32.

    Raises:
        ValueError: for half-precision timesteps, which are other timesteps: bfloat16 makes 500 of 501.
    """
    if t.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(f"The timesteps are {t.dtype}, which rounds them (501 to 500); give whole numbers or float32.")
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def conditioned_layer(layer: nn.Module, h: Tensor, time: Tensor) -> Tensor:
    """A layer of the image tower, its norms shifted and scaled and its branches gated by the timestep.

    Args:
        layer: CLIP's encoder layer, with `adaLN_modulation`.
        h: (B, L, D) tokens.
        time: (B, D) embedded timesteps.

    Returns:
        (B, L, D) tokens.
    """
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = layer.adaLN_modulation(time)[:, None].chunk(6, dim=-1)
    h = h + gate_a * layer.self_attn(modulate(layer.layer_norm1(h), shift_a, scale_a))[0]
    return h + gate_m * layer.mlp(modulate(layer.layer_norm2(h), shift_m, scale_m))


class TimestepEmbedder(nn.Module):
    """Sinusoid of the timestep, two linear layers.

    Args:
        width: D, of the image tower.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(SINUSOID_WIDTH, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) timesteps -> (B, D)."""
        return self.mlp(sinusoid(t).to(self.mlp[0].weight.dtype))


class TimeConditionedCLIP(nn.Module):
    """CLIP with a timestep in its image tower; the names of its weights are those of the published files.

    Until it is trained it gives, at every timestep, exactly the features of the CLIP it was made from. Features leave
    it un-normalised.

    Args:
        clip: `CLIPModel` of transformers, whose parts become this network's.
        gradient_checkpointing: Recompute the layers of the image tower in the backward pass.
    """

    def __init__(self, clip: nn.Module, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = clip.config
        self.gradient_checkpointing = gradient_checkpointing
        self.logit_scale = clip.logit_scale
        self.text_model = clip.text_model
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection
        self.text_projection = clip.text_projection
        if self.text_model.eos_token_id >= self.config.text_config.vocab_size:
            self.text_model.eos_token_id = 2  # old configs' way to say: the largest token ends the text

        width = self.config.vision_config.hidden_size
        self.t_embedder = TimestepEmbedder(width)
        self.vision_model.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        for layer in self.vision_model.encoder.layers:
            layer.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        start_time_weights(dict(self.named_parameters()))

    def encode_image(self, pixels: Tensor, t: Tensor) -> Tensor:
        """(B, 3, S, S) prepared images and (B,) timesteps -> (B, P) features."""
        return self.visual_projection(self.image_tower(pixels, t)[1])

    def image_tower(self, pixels: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) tokens after the last layer, and (B, D) what of the first one is projected."""
        time = self.t_embedder(t)
        h = self.vision_model.pre_layrnorm(self.vision_model.embeddings(pixels))
        for layer in self.vision_model.encoder.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                h = checkpoint(conditioned_layer, layer, h, time, use_reentrant=False)
            else:
                h = conditioned_layer(layer, h, time)
        shift, scale = self.vision_model.adaLN_modulation(time).chunk(2, dim=-1)
        return h, modulate(self.vision_model.post_layernorm(h[:, 0]), shift, scale)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) token numbers -> (B, P) features; what stands behind the end token does not matter."""
        return self.text_projection(self.text_model(input_ids=tokens).pooler_output)

    def score(self, image: Tensor, text: Tensor) -> Tensor:
        """(B, P) image and text features -> (B,) exp(logit_scale) * cosine, float32 or better whatever autocast says.

        In bfloat16 scores near 20 would lie on a grid of 0.125, and many pairs would tie.
        """
        scale = at_least_float32(self.logit_scale).exp()
        return scale * cosine_score(at_least_float32(image), at_least_float32(text))


@torch.no_grad()
def start_time_weights(weights: Mapping[str, Tensor]) -> None:
    """Fill in the time weights with which the network is the CLIP it was made from.

    The gates are 1, other modulations 0; the embedder is random, and unheard until the modulations have moved.

    Args:
        weights: Official name -> tensor; others than time weights are left alone.
    """
    for name, weight in weights.items():
        if not is_time_weight(name):
            continue
        if "t_embedder" in name and name.endswith("weight"):
            nn.init.normal_(weight, std=0.02)
            continue
        weight.zero_()
        if ".layers." in name and name.endswith("bias"):
            for gate in (2, 5):  # of shift, scale and gate of the attention, then of the MLP
                weight.chunk(6)[gate].fill_(1.0)


def is_time_weight(name: str) -> bool:
    return "t_embedder." in name or "adaLN_modulation." in name


# ---------------------------------------------------------------------------------------------------------- the pixels


def pixels_for_spm(
    images: Tensor,
    mode: PixelMode,
    size: int = 224,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    antialias: bool = False,
) -> Tensor:
    """Decoded images to what the image tower takes; bicubic, and as published without antialiasing.

    "training": to [0, 1], clamp, squash to S x S, clamp again. "scoring", as the published SPO does it: resize in
    [-1, 1] until the shorter edge is S, cut the middle out, to [0, 1], clamp. They differ where a decoder overshoots,
    by up to 0.024 at clipped edges, and for images that are not square.

    Args:
        images: (B, 3, H, W), nominally in [-1, 1]; computed in float32 or better.
        mode: Which of the two.
        size: S.
        mean: Of each colour, for the image tower.
        std: Of each colour.
        antialias: Smooth before shrinking. The published weights were trained without.

    Returns:
        (B, 3, S, S), normalised; gradients flow through.

    Raises:
        ValueError: for another mode.
    """
    images = at_least_float32(images)
    if mode == "training":
        images = (images / 2 + 0.5).clamp(0, 1)
        images = F.interpolate(images, (size, size), mode="bicubic", antialias=antialias).clamp(0, 1)
    elif mode == "scoring":
        scale = size / min(images.shape[-2:])
        height, width = (int(edge * scale + 0.5) for edge in images.shape[-2:])
        images = F.interpolate(images, (height, width), mode="bicubic", antialias=antialias)
        top, left = round((height - size) / 2), round((width - size) / 2)
        images = (images[..., top : top + size, left : left + size] / 2 + 0.5).clamp(0, 1)
    else:
        raise ValueError(f"Unknown mode {mode!r} of pixels; known are training and scoring.")
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]


@dataclass(frozen=True)
class ScoringPixels:
    """The pixels of published SPO, from images in [0, 1]; see `pixels_for_spm`."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    antialias: bool

    def __call__(self, images: Tensor) -> Tensor:
        return pixels_for_spm(2 * images - 1, "scoring", self.size, self.mean, self.std, self.antialias)


# ----------------------------------------------------------------------------------------------------------- the files


def load_step_preference(
    option: str, weights: str | None, clip: str, processor: str | None = None, untrained: bool = False
) -> tuple[Towers, Preprocessing]:
    """A time-conditioned CLIP, float32 and frozen, with its tokenizer, and the size and colours of its images.

    Args:
        option: Name of the setting, for messages.
        weights: Published .bin, .safetensors, or Lightning checkpoint of our training. None takes those of `clip`.
        clip: Folder or hub id of a CLIP in transformers' layout, whose config.json says the sizes.
        processor: Folder or hub id of the tokenizer and preprocessor_config.json; `clip` if not given.
        untrained: Whether the weights may be those of a plain CLIP, which then get time weights that change nothing.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the weights do not fit, or have no time weights and `untrained` is not set.
    """
    network = empty_network(option, clip)
    file = find(option, clip, HF_WEIGHTS) if weights is None else Path(weights)
    fit_step_preference(option, file, network, untrained)
    tokenize = hf_tokenizer(option, processor or clip, network.config.text_config)
    return Towers(network, tokenize), hf_image_processor(option, processor or clip, network)


def check_step_preference_sources(owner: str, weights: str | None, clip: str, processor: str) -> None:
    """Stop early where `load_step_preference` would find nothing.

    Args:
        owner: Whose settings they are, for messages.
        weights: As there.
        clip: As there.
        processor: As there.

    Raises:
        FileNotFoundError: naming the setting, the path, and what was expected there.
        ValueError: if the weights are a folder that DeepSpeed wrote.
    """
    if weights is not None:
        check_weights(f"{owner}.weights", weights)
    check_source(f"{owner}.clip", clip, "config.json")
    check_source(f"{owner}.processor", processor, "preprocessor_config.json")


def check_weights(option: str, path: str) -> None:
    """Stop early when a weight file is not there, or is a folder that DeepSpeed wrote.

    Raises:
        FileNotFoundError: naming the option and the path.
        ValueError: telling how the folder becomes a file.
    """
    if (Path(path) / "zero_to_fp32.py").is_file():
        raise ValueError(
            f"{option}: {path!r} is a checkpoint of DeepSpeed, whose weights are spread over files. Gather them, where "
            "DeepSpeed is installed, by `from lightning.pytorch.utilities import deepspeed; "
            f"deepspeed.convert_zero_checkpoint_to_fp32_state_dict({path!r}, 'spm.ckpt')`, and take spm.ckpt."
        )
    check_file(option, path)


def empty_network(option: str, clip: str) -> TimeConditionedCLIP:
    """The network of a CLIP's config.json, still without weights."""
    plain = empty_hf_clip(option, find(option, clip, ("config.json",)))
    return build_empty(lambda: TimeConditionedCLIP(plain))


def fit_step_preference(option: str, file: Path, network: TimeConditionedCLIP, untrained: bool = False) -> None:
    """Put the weights of a file into a network that has none; see `load_step_preference`."""
    found = read_weights(option, file)
    if all(name.startswith(PREFIX) for name in found):
        found = {name.removeprefix(PREFIX): value for name, value in found.items()}
    if not any(map(is_time_weight, found)):
        if not untrained:
            raise ValueError(
                f"{option}: {str(file)!r} is a plain CLIP: it has no time weights (t_embedder, adaLN_modulation), and "
                "would score all timesteps alike. Expected a step-aware preference model, such as "
                "sd-v1-5_step-aware_preference_model.bin or a checkpoint of StepPreferenceModel; to use the plain CLIP "
                "at every timestep all the same, set allow_untrained: true."
            )
        with torch.random.fork_rng(devices=[]):
            fresh = {n: torch.empty(w.shape) for n, w in network.state_dict().items() if is_time_weight(n)}
            start_time_weights(fresh)
        found |= fresh
    fit(option, file, found, network)


def diffusion_model_of(file: Path) -> str | None:
    """The diffusion model whose images a file's model was trained on, where the file says so: ours do."""
    from safetensors import safe_open

    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            return (opened.metadata() or {}).get("diffusion_model")
    if not is_zipfile(file):
        return None
    about = torch.load(file, map_location="cpu", weights_only=True, mmap=True).get("limelight")
    return about["pretrained"] if isinstance(about, dict) else None


def official_weights(network: TimeConditionedCLIP) -> dict[str, Tensor]:
    """Name -> value as in the published files: all float32, all names with a prefix, `position_ids` among them."""
    weights = dict(network.state_dict())
    for tower in ("text_model", "vision_model"):
        weights[f"{tower}.embeddings.position_ids"] = getattr(network, tower).embeddings.position_ids
    return {PREFIX + name: value.detach().float().cpu().contiguous() for name, value in sorted(weights.items())}


def export(checkpoint: str, file: str, clip: str = PICKSCORE) -> None:
    """Write a model as the published files are, for the published SPO code and for `StepPreference`.

    Args:
        checkpoint: Lightning checkpoint of StepPreferenceModel, or a file in the published layout.
        file: Where to: .bin for the published code, or .safetensors.
        clip: Folder or hub id of the CLIP that the training started from; its config.json says the sizes.

    Raises:
        FileNotFoundError: if the checkpoint or the config is missing.
        ValueError: if the checkpoint does not fit or is DeepSpeed's, or the file has another suffix.
    """
    from safetensors.torch import save_file

    source, target = Path(checkpoint), Path(file)
    check_weights("checkpoint", checkpoint)
    check_source("clip", clip, "config.json")
    if target.suffix not in (".bin", ".safetensors"):
        raise ValueError(f"file is {file!r}; expected a name that ends in .bin or .safetensors.")
    network = empty_network("clip", clip)
    fit_step_preference("checkpoint", source, network)
    weights = official_weights(network)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        if target.suffix == ".bin":
            torch.save(weights, part)
        else:
            model = diffusion_model_of(source)
            save_file(weights, part, metadata={"format": "pt"} | ({"diffusion_model": model} if model else {}))
        fit_step_preference("file", part, empty_network("clip", clip))  # what cannot be read gets no name
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    sys.stdout.write(f"{target}: {len(weights)} tensors, {target.stat().st_size / 1e6:,.1f} MB\n")


# ---------------------------------------------------------------------------------------------------------- the reward


class StepPreference(EmbeddingReward):
    """How people who wrote the prompt would like the image, judged at a timestep: exp(logit_scale) times a cosine.

    SPO shows it what the denoiser takes the finished image to be, at that timestep; a finished image is judged at
    timestep 0. Gradients flow to the images.

    Args:
        weights: File with the weights: sd-v1-5_ or sdxl_step-aware_preference_model.bin, .safetensors, or a checkpoint
            of a StepPreferenceModel run. Null, with allow_untrained, takes the weights of `clip`.
        clip: Folder or hub id of the CLIP that the training started from; its config.json says the sizes.
        processor: Folder or hub id of the tokenizer and image processor.
        antialias: Smooth images before they are shrunk, for weights that were trained so; the published ones were not.
        allow_untrained: Accept a CLIP without time weights, which scores all timesteps alike.
        precision: Of the matrices; the scores are float32.
        chunk_size: Images scored at once.
    """

    takes_timestep = True

    def __init__(
        self,
        weights: str | None = None,
        clip: str = PICKSCORE,
        processor: str = PICKSCORE_PROCESSOR,
        antialias: bool = False,
        allow_untrained: bool = False,
        precision: Precision = "float32",
        chunk_size: int = 16,
    ) -> None:
        super().__init__("differentiable", precision, chunk_size)
        check_step_preference_sources("StepPreference", weights, clip, processor)
        if weights is None and not allow_untrained:
            raise ValueError(
                "StepPreference.weights is null; expected the file of a step-aware preference model, such as "
                "sd-v1-5_step-aware_preference_model.bin. To use a plain CLIP at every timestep, set allow_untrained: "
                "true."
            )
        self.weights = weights
        self.clip = clip
        self.processor = processor
        self.antialias = antialias
        self.allow_untrained = allow_untrained

    def build(self) -> tuple[nn.Module, Preprocessing]:
        option = "StepPreference.clip" if self.weights is None else "StepPreference.weights"
        built = load_step_preference(option, self.weights, self.clip, self.processor, self.allow_untrained)
        if self.weights is not None and (model := diffusion_model_of(Path(self.weights))):
            rank_zero_info(f"{self.weights} was trained on what {model} makes; use it with that model.")
        return built

    def differentiable_preprocessing(self, published: Preprocessing) -> "ScoringPixels":
        return ScoringPixels(published.size, published.mean, published.std, self.antialias)

    def forward(self, images: Tensor, prompts: list[str], t: Tensor | None = None) -> Tensor:
        """Score every image at its timestep.

        Args:
            images: (B, 3, H, W) in [0, 1]. With `t` a decoder's overshoot is allowed, and is cut after the resize.
            prompts: B prompts, one per image.
            t: (B,) timesteps, 0 to 999, at which the images were estimated; None means finished images, timestep 0.

        Returns:
            (B,) float32 scores on the device of the images.

        Raises:
            ValueError: if the images are of another shape or range or hold NaN, or not every one has its prompt and
                timestep.
        """
        check_inputs(type(self).__name__, images if t is None else images.clamp(0, 1), prompts)
        t = torch.zeros(len(images)) if t is None else t
        if t.shape != (len(images),):
            raise ValueError(
                f"StepPreference: t is of shape {tuple(t.shape)}; expected ({len(images)},), a timestep for each image."
            )
        self.load(images.device)
        return self.in_chunks(images.float(), list(zip(prompts, t, strict=True)), self.score_at).to(images.device)

    def score_at(self, pixels: Tensor, asked: list[tuple[str, Tensor]]) -> Tensor:
        """(B,) scores of prepared images for B prompts and timesteps."""
        prompts, t = zip(*asked, strict=True)
        clip = self.network.clip
        image = clip.encode_image(pixels, torch.stack(t).to(pixels.device))
        return clip.score(image, self.text_features(list(prompts)))

    def score_pixels(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        return self.score_at(pixels, [(prompt, torch.zeros(())) for prompt in prompts])


def main() -> None:
    """The command line; what is wrong is told in one line."""
    from jsonargparse import auto_cli

    try:
        auto_cli(
            {"export": export},
            prog="python -m lightning_modules.rewards.step_preference",
            description="Files of step-aware preference models.",
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
