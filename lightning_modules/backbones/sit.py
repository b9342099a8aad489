"""SiT (arXiv:2401.08740): a flow on the latents of 256 x 256 images that is told a class, not a text."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules.backbones.base import (
    LOADING_ERRORS,
    SAMPLING_FILE,
    Backbone,
    Conditioning,
    check_model_path,
    first_line,
    load_component,
    run_in_float32,
)
from lightning_modules.backbones.sit_network import SiTConfig, SiTNetwork, preset
from lightning_modules.functional.few_step import FewStepSampler, flow_times
from lightning_modules.weight_files import check_file, check_shapes, read_weights

VAE_FACTOR = 8  # pixels along an edge for one latent
PROJECTORS = "projectors."  # heads by which REPA aligns features in training; no image needs them
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"


class SiTPipeline(SimpleNamespace):
    """The parts of a SiT by the names that a diffusers pipeline gives them: `transformer`, `vae`."""

    vae_scale_factor = VAE_FACTOR
    scheduler = SimpleNamespace(config={})  # Euler's even steps: there is nothing to set

    def set_progress_bar_config(self, **settings: Any) -> None:
        """Nothing: it shows no progress."""

    @property
    def components(self) -> dict[str, nn.Module]:
        return {name: part for name, part in vars(self).items() if isinstance(part, nn.Module)}


class SiT(Backbone):
    """SiT, class-conditional: x_t = (1 - t) x_0 + t eps with t from 0 to 1.

    A prompt is the number of a class, such as "207"; the empty prompt is "no class". All weights are trained: there is
    no `lora`. A score network gets SiT's own adapters on queries and values, of which `score_lora` sets rank and alpha.

    Args:
        pretrained: File of weights in the published layout (.pt, .pth, .safetensors), such as REPA's SiT-XL/2; its
            projection heads are left out.
        vae: Folder or hub id of the VAE in diffusers' format.
        size: S, B, L or XL, a slash, and the patch: 2, 4 or 8.
        num_classes: Classes that it knows, without "no class".
        image_size: Height and width of its images; a multiple of 8 times the patch.
        adapter_std: Of the score adapters' first factors at the start; published: 1. Null takes 1 / rank, as LoRA does.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more compute.
        num_inference_steps: Euler steps of images of the model that is not distilled.
        guidance_scale: Classifier-free guidance of these; 1 or less switches it off.
        chunk_size: Images decoded or generated at once, to bound memory; the results do not depend on it.
    """

    denoiser_name = "transformer"
    example_prompt = "0"
    pipeline_class_name = "SiTPipeline"
    text_encoder_names = ()
    in_diffusers = False
    lora_targets = ()
    prediction_type = "flow"
    num_timesteps = 1

    def __init__(
        self,
        pretrained: str,
        vae: str = "stabilityai/sd-vae-ft-ema",
        size: str = "XL/2",
        num_classes: int = 1000,
        image_size: int = 256,
        adapter_std: float | None = None,
        gradient_checkpointing: bool = False,
        num_inference_steps: int = 250,
        guidance_scale: float = 1.0,
        chunk_size: int = 16,
    ) -> None:
        for name, holds, expected in (
            ("num_classes", num_classes >= 1, "1 or more"),
            ("image_size", image_size >= VAE_FACTOR and image_size % VAE_FACTOR == 0, f"a multiple of {VAE_FACTOR}"),
            ("adapter_std", adapter_std is None or adapter_std > 0, "a positive number, or null for 1 / rank"),
        ):
            if not holds:
                raise ValueError(f"backbone.{name} is {locals()[name]!r}; expected {expected}.")
        super().__init__(
            pretrained,
            vae=vae,
            gradient_checkpointing=gradient_checkpointing,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            chunk_size=chunk_size,
        )
        self.config = preset(size, image_size // VAE_FACTOR, num_classes)
        if self.config.sample_size % self.config.patch_size:
            raise ValueError(
                f"backbone.image_size is {image_size}; SiT-{size} takes multiples of "
                f"{VAE_FACTOR * self.config.patch_size}."
            )
        self.num_classes = num_classes
        self.adapter_std = adapter_std

    def check_sources(self) -> None:
        check_file("backbone.pretrained", self.pretrained)
        check_model_path("backbone.vae", self.vae_path, "config.json", "vae")

    # ---------------------------------------------------------------------------------------------------- life cycle

    def load_pipeline(self) -> SiTPipeline:
        """Network and VAE in float32."""
        from diffusers import AutoencoderKL

        try:
            vae = load_component(AutoencoderKL, self.vae_path, "vae")
        except LOADING_ERRORS as error:
            raise ValueError(
                f"backbone.vae: cannot load {self.vae_path!r} as an AutoencoderKL: {first_line(error)} Expected a "
                "folder written by diffusers' `save_pretrained`, or a hub id that is reachable or cached."
            ) from error
        return SiTPipeline(transformer=load_network(self.pretrained, self.config), vae=vae)

    def _build_pipeline(self) -> SiTPipeline:
        """Network and VAE on the current default device, weights as they come."""
        from diffusers import AutoencoderKL

        folder = Path(self.vae_path)
        config = AutoencoderKL.load_config(folder if (folder / "config.json").is_file() else folder / "vae")
        return SiTPipeline(transformer=SiTNetwork(self.config), vae=AutoencoderKL.from_config(config))

    def _copy_of_denoiser(self, weights: bool = True) -> SiTNetwork:
        network = load_network(self.pretrained, self.config) if weights else SiTNetwork(self.config)
        return network.requires_grad_(False).eval()

    def load(self, compute_dtype: torch.dtype = torch.float32, *args: Any, **kwargs: Any) -> None:
        """As in `Backbone.load`; the VAE computes in float32 whatever autocast says, as published."""
        super().load(compute_dtype, *args, **kwargs)
        if compute_dtype != torch.float32:
            run_in_float32(self.vae.float(), "encode", "decode")

    def _add_adapters(self, network: SiTNetwork, option: str, lora: LoraConfig, name: str) -> None:
        """SiT's own adapters, by the rank and alpha of a LoRA's settings."""
        plain = LoraConfig(r=lora.r, lora_alpha=lora.lora_alpha)
        checked = ("target_modules", "lora_dropout", "use_dora", "use_rslora", "rank_pattern", "alpha_pattern")
        for setting in checked:
            value = getattr(lora, setting)
            if value and value != getattr(plain, setting):
                raise ValueError(
                    f"{option}.{setting} is {value!r}; SiT's adapters lie on the queries and values of every attention "
                    "and have a rank (r) and lora_alpha, nothing else. Leave the setting out."
                )
        network.add_adapter(lora.r, 1.0 / lora.r if self.adapter_std is None else self.adapter_std)
        self.adapter_strength = lora.lora_alpha / lora.r

    def score_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.score_network.named_parameters() if ".lora." in name]

    # ------------------------------------------------------------------------------------------------ text and images

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """`labels` (B,) int64; the empty prompt is `num_classes`, "no class".

        Raises:
            ValueError: naming the first prompt that is no class.
        """
        labels = []
        for prompt in prompts:
            text = prompt.strip()
            if text and not (re.fullmatch("[0-9]{1,9}", text) and int(text) < self.num_classes):
                raise ValueError(
                    f"SiT: {prompt[:40]!r} is no class; expected a number from 0 to {self.num_classes - 1}, or nothing "
                    "for no class."
                )
            labels.append(int(text) if text else self.num_classes)
        return Conditioning(labels=torch.tensor(labels, device=self.device))

    # ------------------------------------------------------------------------------------------------------ diffusion

    def sample_timesteps(self, n: int) -> Tensor:
        """(n,) float32, uniform in [0, 1)."""
        return torch.rand(n, device=self.device)

    def time_grid(self, num_steps: int) -> Tensor:
        """(N + 1,) float32, evenly from 1 to 0."""
        if num_steps < 1:
            raise ValueError(f"{num_steps} sampling steps: expected 1 or more.")
        return torch.linspace(1.0, 0.0, num_steps + 1, device=self.device)

    def timesteps_at(self, levels: Tensor) -> Tensor:
        """(n,) float32: the noise levels themselves."""
        return levels.float().to(self.device)

    def few_step_grid(self, sampler: FewStepSampler) -> Tensor:
        """(N,) float32: the shifted times."""
        return flow_times(sampler.num_steps, sampler.shift, sampler.end)[:-1].to(self.device)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - t.float(), t.float()

    def predict(self, x_t: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        network = self.pipeline.transformer
        strength = self.acting[1] * self.adapter_strength if network.has_adapter else 0.0
        with self.autocast():
            return network(x_t, t, condition["labels"], strength)

    def _draw_by_pipeline(
        self, prompts: list[str], seeds: list[int], num_inference_steps: int, guidance_scale: float
    ) -> Tensor:
        """Euler steps from noise to 0: there is no pipeline of diffusers."""
        noise = [torch.randn(1, *self.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        x = torch.cat(noise).to(self.device)
        condition, negative = self.encode_prompts(prompts), self.encode_prompts([""] * len(prompts))
        grid = self.time_grid(num_inference_steps)
        for now, then in zip(grid[:-1], grid[1:], strict=True):
            t = now.expand(len(x))
            if guidance_scale > 1:
                velocity = self.predict_guided(x, t, condition, negative, guidance_scale)
            else:
                velocity = self.predict(x, t, condition)
            x = x + (then - now) * velocity.float()
        return (self.decode_latents(x) / 2 + 0.5).clamp(0, 1)

    # ------------------------------------------------------------------------------------------------------ artefacts

    def export(
        self,
        folder: Path,
        formats: Sequence[str] = ("diffusers",),
        name: str = "lora",
        merged: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Write the network in the published layout: model.safetensors, with its shape in config.json.

        `backbone.pretrained` of this class reads the file; so does every program that reads the published weights.

        Args:
            folder: Where the files go; made if absent.
            formats: Not used: there is no LoRA.
            name: Not used.
            merged: Not used.
            dtype: Type of the exported weights.
        """
        weights = self.whole_weights()
        if rank_zero_only.rank != 0:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}, folder / WEIGHTS_FILE)
        (folder / CONFIG_FILE).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        if self.few_step is not None:
            timesteps = self.few_step_timesteps.tolist()
            call = {"timesteps": timesteps, "mode": self.few_step.mode, "end": self.few_step.end}
            (folder / SAMPLING_FILE).write_text(json.dumps(call, indent=2) + "\n", encoding="utf-8")

    def save_adapter(self, folder: Path, adapter: str) -> None:
        """Write the score network's adapters, which PEFT has no layout for, under their names in the published code.

        Beside `adapter_model.safetensors` go their rank, and the factors on their strength.

        Args:
            folder: Where the files go; made if absent.
            adapter: SCORE.
        """
        weights = self.whole_weights(self.score_network)
        if rank_zero_only.rank != 0:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in weights.items() if ".lora." in name}
        save_file(tensors, folder / "adapter_model.safetensors")
        rank = tensors["blocks.0.attn.lora.lora_QB"].shape[0]
        about = {"r": rank, "lora_alpha": self.adapter_strength * rank}
        (folder / "adapter_config.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
        (folder / "scale.json").write_text(json.dumps({"scale": self.score_scale}) + "\n", encoding="utf-8")

    def open_pipeline(self, folder: Path) -> SiTPipeline:
        config = SiTConfig(**json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8")))
        return SiTPipeline(transformer=load_network(str(Path(folder) / WEIGHTS_FILE), config), vae=self.vae)


def load_network(pretrained: str, config: SiTConfig) -> SiTNetwork:
    """A SiT with the weights of a file, float32.

    Args:
        pretrained: File in the published layout; a training checkpoint's average (`ema`) is taken, and REPA's
            projection heads are left out, and that is said.
        config: Its shape.

    Raises:
        ValueError: if the weights are not those of such a network.
    """
    option, path = "backbone.pretrained", Path(pretrained)
    weights = read_weights(option, path, below=("ema", "state_dict"))
    if heads := [name for name in weights if name.startswith(PROJECTORS)]:
        rank_zero_info(f"{option}: {len(heads)} tensors of projection heads in {pretrained!r} are left out.")
        weights = {name: tensor for name, tensor in weights.items() if name not in heads}
    with torch.device("meta"):
        network = SiTNetwork(config)
    check_shapes(option, path, weights, network.state_dict())
    network = network.to_empty(device="cpu")
    network.load_state_dict(weights)
    return network
