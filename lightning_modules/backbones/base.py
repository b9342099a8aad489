"""The contract between methods and model families: a method may use nothing else (design, section 3)."""

import copy
import hashlib
import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from datamodules.batches import ImageBatch, PairBatch
from lightning_modules.backbones.few_step_schedulers import few_step_scheduler
from lightning_modules.backbones.lora_files import save_kohya_lora
from lightning_modules.backbones.start_weights import load_start_weights
from lightning_modules.functional.few_step import FewStepSampler, few_step_trajectory
from lightning_modules.functional.latents import sample_posterior
from lightning_modules.functional.noise import PredictionType, add_noise, draw_noise, guide, regression_target, to_x0

# What diffusers, transformers and the hub raise on folders and ids that they cannot read.
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)


SAMPLING_FILE = "sampling.json"  # beside an exported distilled model: arguments of the pipeline's call
# Names of adapters, peft's own for the first: the trained policy's, and that of the score network of a distillation.
GENERATOR, SCORE = "default", "score"
Role = tuple[str | None, float]  # the adapter that acts, or none, and the factor on its strength


class Conditioning(dict[str, Tensor]):
    """What the network is conditioned on: named tensors, every one with B in front."""

    def __getitem__(self, key: Any) -> Any:
        """A tensor by name, or, for an index or slice, the conditioning of these samples."""
        if isinstance(key, str):
            return super().__getitem__(key)
        return Conditioning({name: tensor[key] for name, tensor in self.items()})

    @staticmethod
    def cat(parts: list["Conditioning"]) -> "Conditioning":
        """Concatenate along B."""
        return Conditioning({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


class Backbone(nn.Module):
    """A text-to-image diffusion model, its adapters, and the frozen policy that it started from.

    Construction is cheap and only remembers the settings; `load` reads the weights.

    Args:
        pretrained: Folder of a diffusers pipeline, or its id on the hub.
        denoiser: Folder or hub id with another denoiser's weights (its config at the top or in the usual subfolder),
            for example a published aligned one; training starts from it and it is the reference.
        vae: Folder or hub id of another VAE.
        lora: peft LoRA settings. Null trains every weight of the denoiser. `target_modules: null` means the family's
            attention projections.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more compute.
        num_inference_steps: Sampling steps of generated images.
        guidance_scale: Classifier-free guidance of generated images; 1 switches it off.
        chunk_size: Images encoded, decoded or generated at once, to bound memory; the results do not depend on it.
        revision: Revision of `pretrained` on the hub.
        variant: Weight-file variant of `pretrained`, for example `fp16`.
        scheduler: Class in diffusers that samples generated images instead of the checkpoint's own, for example
            DDIMScheduler; it gets the settings of the checkpoint's. Training does not depend on it.
        image_size: Height and width of generated images, in pixels. Null takes what the checkpoint was made for.
    """

    pipeline_class_name: ClassVar[str]  # in diffusers
    denoiser_name: ClassVar[str]  # "unet" or "transformer"
    denoiser_class_name: ClassVar[str]  # in diffusers
    text_encoder_names: ClassVar[tuple[str, ...]]
    lora_targets: ClassVar[tuple[str, ...]]
    lora_formats: ClassVar[tuple[str, ...]] = ("diffusers", "kohya")  # layouts of LoRA files that the family has
    in_diffusers: ClassVar[bool] = True  # whether diffusers has a pipeline of this family
    left_out: tuple[str, ...] = ()  # parts of the pipeline that are not loaded
    kohya_version: str  # what kohya's LoRA files call the base model, for example "sd_v1"
    example_prompt: ClassVar[str] = "a red circle above a blue square"  # for looking at what an export draws

    def __init__(
        self,
        pretrained: str,
        denoiser: str | None = None,
        vae: str | None = None,
        lora: LoraConfig | None = None,
        gradient_checkpointing: bool = False,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        chunk_size: int = 8,
        revision: str | None = None,
        variant: str | None = None,
        scheduler: str | None = None,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        if chunk_size < 1 or num_inference_steps < 1:
            raise ValueError(
                f"backbone: chunk_size is {chunk_size} and num_inference_steps is {num_inference_steps}; both must be "
                "1 or more."
            )
        if image_size is not None and (image_size < 8 or image_size % 8):
            raise ValueError(f"backbone.image_size is {image_size}; expected a multiple of 8 pixels, or null.")
        self.pretrained = pretrained
        self.denoiser_path = denoiser
        self.vae_path = vae
        if lora is not None:
            check_lora(lora)
        self.check_sources()
        self.lora = lora
        self.image_size = image_size
        self.gradient_checkpointing = gradient_checkpointing
        self.num_inference_steps = num_inference_steps
        self.guidance_scale = guidance_scale
        self.chunk_size = chunk_size
        self.revision = revision
        self.variant = variant
        self.scheduler = scheduler
        self.pipeline: Any = None
        self.compute_dtype = torch.float32
        self.fingerprints: dict[str, str] = {}
        self.few_step: FewStepSampler | None = None  # how the policy makes images, if it was distilled
        self.acting: Role = (GENERATOR, 1.0)

    def check_sources(self) -> None:
        """Stop early at paths that can only be local and hold no model of this family.

        Raises:
            ValueError: naming the option, the path, and what was expected there.
        """
        check_model_path("backbone.pretrained", self.pretrained, "model_index.json")
        if Path(self.pretrained).is_dir():
            self.check_parts(read_index(Path(self.pretrained)))
        for name, path, part in (("denoiser", self.denoiser_path, self.denoiser_name), ("vae", self.vae_path, "vae")):
            if path is not None:
                check_model_path(f"backbone.{name}", path, "config.json", part)

    # ------------------------------------------------------------------------------------------------ life cycle

    def load(
        self,
        compute_dtype: torch.dtype = torch.float32,
        keep_reference: bool = False,
        weights: bool = True,
        fingerprint: bool = False,
        frozen: bool = False,
    ) -> None:
        """Build the networks, freeze what is not trained, add the adapters.

        Trained weights are float32. Matrices of frozen networks are held in `compute_dtype`, their norms in float32:
        under autocast that computes exactly what float32 weights would, in half the memory.

        Args:
            compute_dtype: What autocast computes in; float32 switches autocast off.
            keep_reference: Keep a frozen copy of a fully fine-tuned denoiser for `reference`. Adapters need none.
            weights: Read the weights. False builds the networks from the configs in a local folder alone, for counting
                on the meta device.
            fingerprint: Fill `fingerprints` with a hash of the VAE's and of each text encoder's weights, by which a
                cache of what they computed is recognised.
            frozen: Train nothing of it: for methods whose trained network is another one.

        Raises:
            ValueError: if the pipeline cannot be read or is of another family.
        """
        self.compute_dtype = compute_dtype
        self._adapter_layers: dict[int, list[LoraLayer]] = {}  # of each network with adapters, for `role`
        scheduler = None if self.scheduler is None else scheduler_class(self.scheduler)
        self.pipeline = self.load_pipeline() if weights else self._build_pipeline()
        self.pipeline.set_progress_bar_config(disable=True)
        self.requires_grad_(False)
        for name in (self.denoiser_name, "vae", *self.text_encoder_names):
            module = getattr(self.pipeline, name)
            if module is not None:
                self.add_module(name, module.requires_grad_(False).eval())

        encoders = ["vae", *self.text_encoder_names]
        if fingerprint:
            self.fingerprints = {name: fingerprint_of(getattr(self, name)) for name in encoders if hasattr(self, name)}
        low = encoders if self.lora is None and not frozen else [*encoders, self.denoiser_name]
        if compute_dtype == torch.float16 and self.vae_overflows_float16:
            low.remove("vae")
            run_in_float32(self.vae, "encode", "decode")
        for name in low:
            to_low_precision(getattr(self, name, None), compute_dtype)

        if not frozen:
            self._open_for_training(keep_reference, weights)
        if self.gradient_checkpointing:
            self.denoiser.enable_gradient_checkpointing(self._checkpoint)
        self._after_load()
        if scheduler is not None:
            self.pipeline.scheduler = scheduler.from_config(self.pipeline.scheduler.config)

    def _open_for_training(self, keep_reference: bool, weights: bool) -> None:
        """Add the adapters, or let the whole denoiser train and keep its copy if asked."""
        if self.lora is not None:
            if self.lora.target_modules is None:
                self.lora.target_modules = list(self.lora_targets)
            self._add_adapters(self.denoiser, "backbone.lora", self.lora, GENERATOR)
        else:
            self.denoiser.requires_grad_(True)
            if keep_reference:
                self.keep_reference(weights)

    def _add_adapters(self, network: nn.Module, option: str, lora: LoraConfig, name: str) -> None:
        """Put trained adapters on a network; others that it carries stay trained."""
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        try:
            network.add_adapter(lora, name)
        except ValueError as error:
            raise ValueError(
                f"{option}: peft cannot place the adapters in {type(network).__name__}: {error} "
                f"The attention projections of this family are target_modules: {list(self.lora_targets)}."
            ) from error
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # bfloat16 adapters would swallow updates of 1e-5
        for parameter in trained:
            parameter.requires_grad_(True)
        self._adapter_layers[id(network)] = [layer for layer in network.modules() if isinstance(layer, LoraLayer)]

    def keep_reference(self, weights: bool = True) -> None:
        """Keep a frozen copy of the starting denoiser at hand, for `reference`; adapters need none.

        Args:
            weights: Read its weights; False builds it from the config alone.
        """
        if self.lora is None and not hasattr(self, "reference_denoiser") and not hasattr(self, "score_denoiser"):
            reference = self._copy_of_denoiser(weights).to(self.device)
            to_low_precision(reference, self.compute_dtype)
            self.add_module("reference_denoiser", reference)

    def shard(self, mesh: Any) -> None:
        """Split the denoiser, and a score network of its own, over the devices of `mesh` with FSDP2, block by block.

        Args:
            mesh: Lightning's device mesh with a "data_parallel" dimension.
        """
        from torch.distributed.fsdp import fully_shard

        for network in dict.fromkeys((self.denoiser, self.score_network)):
            blocks = [m for m in network.modules() if type(m).__name__ in (network._no_split_modules or ())]
            for module in [*reversed(blocks), network]:  # inner blocks first
                fully_shard(module, mesh=mesh["data_parallel"])

    def _after_load(self) -> None:
        """What a family still has to prepare once its networks exist."""

    @property
    def loaded(self) -> bool:
        return self.pipeline is not None

    @property
    def denoiser(self) -> nn.Module:
        """The trained network, with its adapters."""
        return getattr(self, self.denoiser_name)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the frozen starting policy acts: adapters off, or the frozen copy of a full fine-tuning.

        Without a kept copy the starting weights are read again from disk and dropped afterwards.
        """
        if self.lora is not None:
            with self.role(None):
                yield
            return
        if hasattr(self, "score_denoiser"):
            with self.role(SCORE, 0.0):
                yield
            return
        reference = getattr(self, "reference_denoiser", None)
        if reference is None:
            reference = self._copy_of_denoiser().to(self.device)
        acting, self.acting = self.acting, (None, 0.0)
        setattr(self.pipeline, self.denoiser_name, reference)
        try:
            yield
        finally:
            self.acting = acting
            setattr(self.pipeline, self.denoiser_name, self.denoiser)

    # -------------------------------------------------------------------------------------------------- roles

    def add_score(self, lora: LoraConfig, scale: float, weights: bool = True) -> None:
        """Add the score network of a distillation: the starting denoiser with trained adapters of its own.

        Where the policy is trained by adapters, both share the one frozen denoiser; where all its weights are, or it
        starts from other ones, the score network is a second, frozen one. `role` says which of them acts.

        Args:
            lora: Settings of its adapters. `target_modules: null` means the family's attention projections.
            scale: Factor on their strength with which they are the score network; kept beside them in files.
            weights: As in `load`.
        """
        if lora.target_modules is None:
            lora.target_modules = list(self.lora_targets)
        network = self.denoiser
        if self.lora is None:
            network = self._copy_of_denoiser(weights).to(self.device)
            to_low_precision(network, self.compute_dtype)
            if self.gradient_checkpointing:
                network.enable_gradient_checkpointing(self._checkpoint)
            self.add_module("score_denoiser", network)
        self._add_adapters(network, "model.score_lora", lora, SCORE)
        self.score_scale = scale
        self._act(*self.acting)

    def load_start_weights(self, file: str) -> None:
        """Start the policy, all of whose weights are trained, from those of a file; a score network stays the base.

        Args:
            file: A bare state dict of the denoiser, as DMD2 publishes its one-step SDXL.

        Raises:
            ValueError: naming the weights that are missing, not known, or of another shape.
        """
        load_start_weights("model.start_weights", file, self.denoiser)

    @property
    def score_network(self) -> nn.Module:
        """The network that carries the score adapters: the denoiser itself, or a second one."""
        return getattr(self, "score_denoiser", self.denoiser)

    def score_parameters(self) -> list[nn.Parameter]:
        """What is trained of the score network."""
        named = self.score_network.named_parameters()
        return [parameter for name, parameter in named if parameter.requires_grad and f".{SCORE}." in name]

    @contextmanager
    def role(self, adapter: str | None, scale: float = 1.0) -> Iterator[None]:
        """Inside, another network acts, or the same one with other adapters or another strength of them.

        `requires_grad` of no weight changes, and a backward pass may come after the context: under gradient
        checkpointing the activations are computed again in the role in which they were computed first.

        Args:
            adapter: GENERATOR, the trained policy; SCORE, the score network of `add_score`; None, the denoiser without
                adapters.
            scale: Factor on the adapters' strength. 0 switches them off, so that their branch is not computed.
        """
        before = self.acting
        if (adapter, scale) == before:
            yield
            return
        self._act(adapter, scale)
        try:
            yield
        finally:
            self._act(*before)

    def _act(self, adapter: str | None, scale: float) -> None:
        self.acting = (adapter, scale)
        network = self.score_network if adapter == SCORE else self.denoiser
        setattr(self.pipeline, self.denoiser_name, network)
        for layer in self._adapter_layers.get(id(network), []):
            # Not peft's own switches, which freeze the adapters that do not act.
            layer._disable_adapters = adapter is None or scale == 0
            layer._active_adapter = [adapter or GENERATOR]
            layer.set_scale(adapter, scale)

    def _checkpoint(self, module: nn.Module, *inputs: Any) -> Any:
        """Compute a block and forget its activations; the backward pass computes them again, in the same role."""
        role = self.acting
        return checkpoint(module, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), self.role(*role)))

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def autocast(self) -> Any:
        """Autocast to `compute_dtype`; a null context for float32."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    # ------------------------------------------------------------------------------------------- text and images

    def latents(self, batch: PairBatch | ImageBatch) -> Tensor:
        """Latents of a batch's images, from its pixels or from its cached moments.

        Returns:
            (N, C, h, w) float32, one draw from the VAE's posterior for each of the N images (2B for pairs).
        """
        if "moments" in batch:
            return self.sample_latents(batch["moments"])
        return self.encode_images(batch["images"])

    def condition(self, batch: PairBatch | ImageBatch, prompts: list[str]) -> Conditioning:
        """What the network is conditioned on for each of the N images of a batch.

        Args:
            batch: B pairs (N = 2B images) or B images.
            prompts: B prompts: the batch's, or "" where one was dropped.

        Returns:
            Conditioning of N images, without gradient: the two images of a pair share their prompt.
        """
        if "embeddings" in batch:
            condition = Conditioning.cat([Conditioning(batch["embeddings"][prompt]) for prompt in prompts])
        else:
            condition = self.encode_prompts(prompts)
        images = batch["moments"] if "moments" in batch else batch["images"]
        condition = Conditioning.cat([condition] * (len(images) // len(prompts)))
        return self.add_sizes(condition, batch)

    def as_negative(self, empty: Conditioning) -> Conditioning:
        """What guidance leads away from, given the conditioning of the empty prompt: that, unless a family differs."""
        return empty

    def add_sizes(self, condition: Conditioning, batch: PairBatch | ImageBatch) -> Conditioning:
        """Add what a family is told about the sizes of the images; most are told nothing."""
        return condition

    @abstractmethod
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Conditioning of B prompts, without gradient."""

    @torch.no_grad()
    def encode_moments(self, images: Tensor) -> Tensor:
        """Mean and log-variance of the VAE's posterior: (N, 3, H, W) images in [-1, 1] -> (N, 2C, h, w)."""
        with self.autocast():
            return torch.cat([self.vae.encode(chunk).latent_dist.parameters for chunk in images.split(self.chunk_size)])

    def encode_images(self, images: Tensor) -> Tensor:
        """Draw the latents of images from the VAE's posterior, one draw per image.

        Args:
            images: (N, 3, H, W) in [-1, 1].

        Returns:
            (N, C, h, w) float32 latents, shifted and scaled for the denoiser.
        """
        return self.sample_latents(self.encode_moments(images))

    def sample_latents(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Draw latents from the VAE's posterior.

        Args:
            moments: (N, 2C, h, w) mean and log-variance of each image, as the VAE's encoder gives them.
            noise: (N, C, h, w) standard normal; drawn here if not given.

        Returns:
            (N, C, h, w) float32, shifted and scaled for the denoiser.
        """
        mean, logvar = moments.float().chunk(2, dim=1)
        noise = draw_noise(mean) if noise is None else noise
        return sample_posterior(mean, logvar, noise, self.vae.config.scaling_factor, self.shift_factor)

    @property
    def shift_factor(self) -> float:
        """The VAE's shift of latents; families before SD3 have none."""
        return getattr(self.vae.config, "shift_factor", None) or 0.0

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of generated images."""
        size = self.denoiser.config.sample_size
        if self.image_size is not None:
            size = self.image_size // self.pipeline.vae_scale_factor
        height, width = (size, size) if isinstance(size, int) else size
        return self.denoiser.config.in_channels, height, width

    @property
    def vae_overflows_float16(self) -> bool:
        """Whether the VAE's config says so; diffusers' default for configs that say nothing does not count."""
        config = self.vae.config
        return config.get("force_upcast", False) and "force_upcast" not in config.get("_use_default_values", ())

    def decode_latents(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) latents -> (B, 3, H, W) float32 images, nominally in [-1, 1]; gradients flow through."""
        z = latents / self.vae.config.scaling_factor + self.shift_factor
        with self.autocast():
            return torch.cat([self.vae.decode(chunk).sample for chunk in z.split(self.chunk_size)]).float()

    def load_tiny_vae(self, path: str) -> None:
        """Read a small decoder for `decode_for_rewards`: about a tenth of the compute and memory of the full one.

        Args:
            path: Folder or hub id of an AutoencoderTiny, for example madebyollin/taesdxl.

        Raises:
            ValueError: if it cannot be read.
        """
        from diffusers import AutoencoderTiny

        try:
            found = AutoencoderTiny.load_config(path, subfolder=subfolder_of(path, "vae")).get("_class_name")
            if found != "AutoencoderTiny":  # diffusers would fill the gaps with random weights
                raise ValueError(f"it is of class {found}.")
            vae = load_component(AutoencoderTiny, path, "vae")
        except LOADING_ERRORS as error:
            raise ValueError(
                f"model.reward_vae: cannot load {path!r} as an AutoencoderTiny: {first_line(error)} Expected a folder "
                "or hub id such as madebyollin/taesdxl."
            ) from error
        self.add_module("tiny_vae", vae.requires_grad_(False).eval().to(self.device))
        to_low_precision(vae, self.compute_dtype)

    def decode_for_rewards(self, latents: Tensor) -> Tensor:
        """`decode_latents`, by the small decoder if one was loaded."""
        if not hasattr(self, "tiny_vae"):
            return self.decode_latents(latents)
        # These decoders take the denoiser's latents as they are, or say what else.
        z = latents / self.tiny_vae.config.scaling_factor + self.tiny_vae.config.shift_factor
        with self.autocast():
            return torch.cat([self.tiny_vae.decode(chunk).sample for chunk in z.split(self.chunk_size)]).float()

    # ------------------------------------------------------------------------------------------------- diffusion

    prediction_type: PredictionType = "epsilon"
    num_timesteps: int  # of the training schedule; timesteps lie in [0, num_timesteps)

    @abstractmethod
    def sample_timesteps(self, n: int) -> Tensor:
        """(n,) training timesteps on the backbone's device."""

    @abstractmethod
    def time_grid(self, num_steps: int) -> Tensor:
        """(N + 1,) decreasing timesteps of N sampling steps: step i goes from the i-th to the next.

        Raises:
            ValueError: if the family cannot sample in so many steps.
        """

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of x_t = alpha_t x_0 + sigma_t eps, each (B,) float32."""

    @abstractmethod
    def timesteps_at(self, levels: Tensor) -> Tensor:
        """(n,) noise levels in [0, 1], 1 being pure noise -> (n,) timesteps, on the backbone's device."""

    @abstractmethod
    def few_step_grid(self, sampler: FewStepSampler) -> Tensor:
        """(N,) decreasing timesteps at which a model is asked that was distilled to N steps."""

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, condition: Conditioning) -> Tensor:
        """The acting network's prediction, (B, C, h, w)."""

    def predict_guided(
        self, x_t: Tensor, t: Tensor, condition: Conditioning, negative: Conditioning, scale: float
    ) -> Tensor:
        """The acting network's prediction under classifier-free guidance, (B, C, h, w) float32; one call of 2B rows.

        Args:
            x_t: (B, C, h, w) noised latents.
            t: (B,) timesteps.
            condition: Of B prompts.
            negative: Of B negative prompts, from `as_negative`.
            scale: Of the guidance; 5 in SPO.
        """
        both = Conditioning.cat([negative, condition])
        return guide(*self.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2), scale)

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Noised latents x_t and the network's target, both (B, C, h, w) float32."""
        alpha, sigma = self.coefficients(t)
        return add_noise(x0, noise, alpha, sigma), regression_target(self.prediction_type, x0, noise, alpha, sigma)

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latents that a prediction implies, (B, C, h, w) float32."""
        alpha, sigma = self.coefficients(t)
        return to_x0(self.prediction_type, prediction, x_t, alpha, sigma)

    # ------------------------------------------------------------------------------------------ images, artefacts

    @property
    def pipeline_options(self) -> dict[str, Any]:
        """What else the pipeline is told when it makes images."""
        return {}

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> Tensor:
        """Images of the acting policy by the diffusers pipeline and the checkpoint's own scheduler.

        Image i depends on prompt i and seed i only: not on the other images, the rank, or the run's random state. A
        distilled policy (`few_step`) makes its images as it was trained to, in its few steps and without guidance.

        Args:
            prompts: B prompts.
            seeds: B seeds of the starting noise.
            num_inference_steps: Null takes the backbone's setting.
            guidance_scale: Null takes the backbone's setting.

        Returns:
            (B, 3, H, W) float32 in [0, 1], on the CPU.
        """
        network = getattr(self.pipeline, self.denoiser_name)
        was_training = network.training
        network.eval()
        images = []
        try:
            for start in range(0, len(prompts), self.chunk_size):
                chunk = slice(start, start + self.chunk_size)
                if self.few_step is not None and self.acting[0] == GENERATOR:
                    drawn = self._draw_in_few_steps(prompts[chunk], seeds[chunk])
                else:
                    drawn = self._draw_by_pipeline(
                        prompts[chunk],
                        seeds[chunk],
                        num_inference_steps=num_inference_steps or self.num_inference_steps,
                        guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
                    )
                images.append(drawn.float().cpu())
        finally:
            network.train(was_training)
        return torch.cat(images) if images else torch.empty(0, 3, 0, 0)

    def _draw_by_pipeline(self, prompts: list[str], seeds: list[int], **arguments: Any) -> Tensor:
        """`generate` by diffusers; `arguments` go to the pipeline."""
        size = {} if self.image_size is None else {"height": self.image_size, "width": self.image_size}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = self.pipeline_options | size | arguments
        with self.autocast():
            return self.pipeline(prompt=prompts, generator=generators, output_type="pt", **options).images

    def _draw_in_few_steps(self, prompts: list[str], seeds: list[int]) -> Tensor:
        """`generate` for a distilled policy; the starting noise of a seed is the same as the pipeline's."""
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def draw() -> Tensor:
            noise = [torch.randn(1, *self.latent_shape, generator=generator) for generator in generators]
            return torch.cat(noise).to(self.device)

        clean = self.sample_in_few_steps(draw(), self.encode_prompts(prompts), draw)[1]
        return (self.decode_latents(clean[-1]) / 2 + 0.5).clamp(0, 1)

    def sample_in_few_steps(
        self, x: Tensor, condition: Conditioning, draw: Callable[[], Tensor], steps: int | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The trajectory of `few_step` through the acting network: see `few_step_trajectory`.

        Args:
            x: (B, C, h, w) unit noise.
            condition: Of B prompts.
            draw: Gives (B, C, h, w) unit noise.
            steps: Stop after so many steps; all if not given.
        """
        return few_step_trajectory(
            x,
            self.few_step_timesteps,
            lambda x_t, t: self.predict(x_t, t, condition),
            self.coefficients,
            draw,
            self.prediction_type,
            self.few_step.mode,
            self.few_step.end,
            steps,
        )

    @property
    def few_step_timesteps(self) -> Tensor:
        """(N,) timesteps of `few_step` on the backbone's device."""
        if self.few_step.timesteps is None:
            return self.few_step_grid(self.few_step)
        return torch.tensor(self.few_step.timesteps, device=self.device, dtype=self.timesteps_at(torch.ones(1)).dtype)

    def export(
        self,
        folder: Path,
        formats: Sequence[str] = ("diffusers",),
        name: str = "lora",
        merged: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Write what diffusers and others load: the LoRA, or the whole pipeline if all weights were trained.

        A whole pipeline takes its frozen parts from their source again, so that they stay what they were. Under FSDP2
        every rank must call this; the first one writes.

        Args:
            folder: Where the files go; made if absent.
            formats: Layouts of a LoRA: "diffusers" (`pytorch_lora_weights.safetensors`, with the adapters' settings),
                "kohya" (`<name>.safetensors`, as sd-scripts, ComfyUI and A1111 name the layers).
            name: Name of kohya's file.
            merged: Write into `merged` the whole pipeline with the LoRA added to its weights, too.
            dtype: Type of the exported weights.
        """
        weights = self.whole_weights()
        if rank_zero_only.rank != 0:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        sampling = None if self.few_step is None else self.save_sampling(folder)
        if self.lora is None:
            pipeline = self.load_pipeline()
            getattr(pipeline, self.denoiser_name).load_state_dict(weights)
            pipeline.scheduler = sampling or pipeline.scheduler
            save_pipeline(pipeline, folder, dtype)
            return
        adapters = get_peft_model_state_dict(self.denoiser, state_dict=weights)
        if "diffusers" in formats:
            self.save_diffusers_lora(folder, {key: tensor.to(dtype) for key, tensor in adapters.items()})
        if "kohya" in formats:
            save_kohya_lora(folder / f"{name}.safetensors", adapters, self.kohya_modules(), self.kohya_version, dtype)
        if merged:
            pipeline = self.load_pipeline()
            network = getattr(pipeline, self.denoiser_name)
            network.add_adapter(copy.deepcopy(self.lora))
            set_peft_model_state_dict(network, adapters)
            network.fuse_lora()
            network.unload_lora()
            pipeline.scheduler = sampling or pipeline.scheduler
            save_pipeline(pipeline, folder / "merged", dtype)

    def save_sampling(self, folder: Path) -> Any:
        """Write how a distilled model samples: `scheduler/`, and the arguments of a pipeline's call in sampling.json.

        A LoRA is loaded into the base's pipeline, which then needs this scheduler.

        Returns:
            The scheduler.
        """
        timesteps = self.few_step_timesteps.tolist()
        scheduler, told = few_step_scheduler(
            timesteps, self.few_step.mode, self.prediction_type, self.pipeline.scheduler.config
        )
        if told:
            rank_zero_warn(
                f"The student was trained at the timesteps {timesteps}, which no scheduler of diffusers takes by "
                f"itself: whoever samples must pass {told}, as sampling.json and the model card say."
            )
        scheduler.save_pretrained(folder / "scheduler")
        call = {"num_inference_steps": len(timesteps), "guidance_scale": 1.0, **told, **self.pipeline_options}
        (folder / SAMPLING_FILE).write_text(json.dumps(call, indent=2) + "\n", encoding="utf-8")
        return scheduler

    def open_pipeline(self, folder: Path) -> Any:
        """The pipeline that was exported to a folder."""
        absent = dict.fromkeys(absent_parts(read_index(folder)))
        return type(self.pipeline).from_pretrained(folder, dtype=torch.float32, **absent)

    def save_adapter(self, folder: Path, adapter: str) -> None:
        """Write an adapter in PEFT's layout, for `PeftModel.from_pretrained(network, folder)`.

        Beside it goes `scale.json`: the factor on its strength with which it was trained, which PEFT's settings cannot
        hold. Under FSDP2 every rank must call this; the first one writes.

        Args:
            folder: Where the files go; made if absent.
            adapter: GENERATOR or SCORE.
        """
        network = self.score_network if adapter == SCORE else self.denoiser
        weights = self.whole_weights(network)
        if rank_zero_only.rank != 0:
            return
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = get_peft_model_state_dict(network, state_dict=weights, adapter_name=adapter)
        named = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})
        network.peft_config[adapter].save_pretrained(folder)
        scale = self.score_scale if adapter == SCORE else 1.0
        (folder / "scale.json").write_text(json.dumps({"scale": scale}) + "\n", encoding="utf-8")

    def whole_weights(self, network: nn.Module | None = None) -> dict[str, Tensor]:
        """What was trained of a network, and its buffers, whole and on the CPU.

        Under FSDP2 every rank must call this to gather them, and the first one gets them.

        Args:
            network: The denoiser if not given.
        """
        network = self.denoiser if network is None else network
        frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
        weights = {}
        for name, tensor in network.state_dict().items():
            if name in frozen:
                continue
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if rank_zero_only.rank == 0:
                weights[name] = whole.cpu()
        return weights

    def save_diffusers_lora(self, folder: Path, adapters: dict[str, Tensor]) -> None:
        """Write peft's adapters as `pytorch_lora_weights.safetensors`."""
        from diffusers.utils import convert_state_dict_to_diffusers

        layers = convert_state_dict_to_diffusers(adapters)
        if any(".lora_A." in key for key in layers):
            # It renames attention projections only, and the reader judges the whole file by its first key.
            layers = adapters
        self.pipeline.save_lora_weights(
            folder,
            **{
                f"{self.denoiser_name}_lora_layers": {key: tensor.contiguous() for key, tensor in layers.items()},
                f"{self.denoiser_name}_lora_adapter_metadata": self.denoiser.peft_config["default"].to_dict(),
            },
        )

    def kohya_modules(self) -> dict[str, tuple[str, float]]:
        """Name in kohya's files, and alpha, of each module with an adapter.

        Raises:
            ValueError: if kohya's files cannot hold these adapters.
        """
        names = self.kohya_names()
        modules = {}
        for module, layer in self.denoiser.named_modules():
            if not isinstance(layer, LoraLayer) or GENERATOR not in layer.scaling:
                continue
            variant = layer.lora_variant.get("default")
            if variant is not None or module not in names:
                reason = f"has no name there ({module})" if variant is None else f"is a {type(variant).__name__}"
                raise ValueError(
                    f"The LoRA cannot be exported in kohya's layout: an adapter {reason}. Train plain LoRA on "
                    "attention, feed-forward or convolution layers, or leave that layout out, as "
                    "`formats: [diffusers]` of ExportPipeline."
                )
            modules[module] = (names[module], layer.scaling["default"] * layer.r["default"])
        return modules

    def kohya_names(self) -> dict[str, str]:
        """Name in kohya's files of each module of the denoiser: diffusers' own, unless a family differs."""
        return {name: name for name, _ in self.denoiser.named_modules()}

    # --------------------------------------------------------------------------------------------------- loading

    def check_parts(self, index: dict[str, Any]) -> None:
        """Stop before any weights are read when a pipeline is of another family.

        Args:
            index: The pipeline's `model_index.json`.

        Raises:
            ValueError: if its denoiser and text encoders are not this family's.
        """
        found = {
            name
            for name, entry in index.items()
            if name.startswith(("unet", "transformer", "text_encoder")) and is_component(entry)
        }
        expected = {self.denoiser_name, *self.text_encoder_names}
        if found != expected:
            raise ValueError(
                f"backbone.pretrained: {self.pretrained!r} is a {index.get('_class_name', 'pipeline')} with "
                f"{', '.join(sorted(found)) or 'neither denoiser nor text encoder'}; {type(self).__name__} expects "
                f"{', '.join(sorted(expected))} (a {self.pipeline_class_name}). Each family has its own class in "
                "lightning_modules/backbones: choose the other one, or another model."
            )

    def _pipeline_class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.pipeline_class_name)

    def load_pipeline(self) -> Any:
        """The diffusers pipeline in float32, safetensors only, with other components where the user named them."""
        import diffusers
        import transformers
        from huggingface_hub import hf_hub_download

        # Bars for files that load in a moment; downloads keep theirs.
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        pipeline_class = self._pipeline_class()
        options = {"revision": self.revision, "variant": self.variant, "use_safetensors": True, "dtype": torch.float32}
        folder = Path(self.pretrained)
        try:
            if not folder.is_dir():
                folder = Path(hf_hub_download(self.pretrained, "model_index.json", revision=self.revision)).parent
        except LOADING_ERRORS as error:
            raise self._cannot_load(error) from error
        index = read_index(folder)
        self.check_parts(index)
        replaced: dict[str, Any] = dict.fromkeys([*self.left_out, *absent_parts(index)])
        try:
            if self.denoiser_path is not None:
                replaced[self.denoiser_name] = load_component(
                    self.denoiser_class(), self.denoiser_path, self.denoiser_name
                )
            if self.vae_path is not None:
                from diffusers import AutoencoderKL

                replaced["vae"] = load_component(AutoencoderKL, self.vae_path, "vae")
            if has_safety_checker(pipeline_class):
                replaced |= {"safety_checker": None, "requires_safety_checker": False}
            return pipeline_class.from_pretrained(self.pretrained, **options, **replaced)
        except LOADING_ERRORS as error:
            raise self._cannot_load(error) from error

    def _cannot_load(self, error: Exception) -> ValueError:
        return ValueError(
            f"backbone.pretrained: cannot load {self.pretrained!r} as a {self.pipeline_class_name}: "
            f"{first_line(error)} Expected a folder written by diffusers' `save_pretrained` with safetensors "
            "weights, or a hub id that is reachable or cached."
        )

    def _build_pipeline(self) -> Any:
        """The pipeline's networks from their configs, weights uninitialised or on the current default device."""
        import diffusers
        import transformers

        folder = Path(self.pretrained)
        index = read_index(folder)
        parts: dict[str, Any] = dict.fromkeys([*self.left_out, *absent_parts(index)])
        for name, entry in index.items():
            if name.startswith("_") or name in parts or not is_component(entry):
                continue
            part_class = getattr({"diffusers": diffusers, "transformers": transformers}[entry[0]], entry[1])
            if issubclass(part_class, transformers.PreTrainedModel):
                parts[name] = part_class(part_class.config_class.from_pretrained(folder / name))
            elif issubclass(part_class, diffusers.SchedulerMixin):
                with torch.device("cpu"):  # it computes with its numbers, also beside networks on the meta device
                    parts[name] = part_class.from_config(part_class.load_config(folder / name))
            elif issubclass(part_class, diffusers.ModelMixin) or hasattr(part_class, "load_config"):
                parts[name] = part_class.from_config(part_class.load_config(folder / name))
            else:
                parts[name] = part_class.from_pretrained(folder / name)
        if has_safety_checker(self._pipeline_class()):
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return self._pipeline_class()(**parts)

    def denoiser_class(self) -> Any:
        """The diffusers class of the denoiser."""
        import diffusers

        return getattr(diffusers, self.denoiser_class_name)

    def _copy_of_denoiser(self, weights: bool = True) -> nn.Module:
        """The starting denoiser, frozen."""
        if not weights:
            module = self.denoiser_class().from_config(self.denoiser.config)
        elif self.denoiser_path is not None:
            module = load_component(self.denoiser_class(), self.denoiser_path, self.denoiser_name)
        else:
            module = self.denoiser_class().from_pretrained(
                self.pretrained,
                subfolder=self.denoiser_name,
                revision=self.revision,
                variant=self.variant,
                use_safetensors=True,
                dtype=torch.float32,
            )
        return module.requires_grad_(False).eval()


def read_index(folder: Path) -> dict[str, Any]:
    """The `model_index.json` of a pipeline's folder.

    Raises:
        ValueError: if it is not what `save_pretrained` writes.
    """
    file = folder / "model_index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"backbone.pretrained: {file} is not JSON ({error}); copy the pipeline anew.") from error
    if not isinstance(index, dict):
        raise ValueError(f"backbone.pretrained: {file} holds no list of parts; copy the pipeline anew.")
    return index


def is_component(entry: Any) -> bool:
    """Whether an entry of `model_index.json` names a part that is there: ["diffusers", "AutoencoderKL"]."""
    return isinstance(entry, list | tuple) and len(entry) == 2 and entry[0] is not None


def absent_parts(index: dict[str, Any]) -> list[str]:
    """The parts that a pipeline was saved without: diffusers reads some pipelines only if told of them."""
    return [name for name, entry in index.items() if entry == [None, None]]


def has_safety_checker(pipeline_class: Any) -> bool:
    """Whether a pipeline can hold the image filter, which is never used here."""
    return "safety_checker" in inspect.signature(pipeline_class.__init__).parameters


def scheduler_class(name: str) -> Any:
    """The scheduler of that name in diffusers.

    Raises:
        ValueError: if there is none.
    """
    import diffusers

    found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin):
        return found
    raise ValueError(
        f"backbone.scheduler: diffusers has no scheduler {name!r}; expected the name of a class, such as DDIMScheduler "
        "or DPMSolverMultistepScheduler."
    )


def first_line(error: BaseException) -> str:
    """The first line of a library's message, as a sentence."""
    line = str(error).strip().split("\n")[0]
    return line if line.endswith(".") else line + "."


def load_component(component_class: Any, path: str, subfolder: str) -> nn.Module:
    """A network from a folder or hub id that holds it, or from the usual subfolder of a pipeline."""
    return component_class.from_pretrained(
        path, subfolder=subfolder_of(path, subfolder), use_safetensors=True, dtype=torch.float32
    )


def subfolder_of(path: str, usual: str) -> str | None:
    """Where below a folder or hub id a network lies: None if its config is at the top, else in the usual subfolder."""
    from huggingface_hub import hf_hub_download

    if Path(path).is_dir():
        return None if Path(path, "config.json").is_file() else usual
    try:
        hf_hub_download(path, "config.json")
    except OSError:  # not there, or not reachable: then reading the network says so
        return usual
    return None


def check_model_path(option: str, path: str, needed: str, subfolder: str = "") -> None:
    """Stop early when a path that can only be local does not hold a model.

    Raises:
        ValueError: naming the option, the path, and what was expected there.
    """
    folder = Path(path)
    if path and folder.is_dir():
        if any((folder / part / needed).is_file() for part in ("", subfolder)):
            return
        raise ValueError(
            f"{option}: the folder {path!r} has no {needed}; expected a folder written by diffusers' "
            f"`save_pretrained`. It holds: {', '.join(sorted(p.name for p in folder.iterdir())[:8]) or 'nothing'}."
        )
    if folder.is_file():
        raise ValueError(
            f"{option}: {path!r} is a file; expected a folder written by diffusers' `save_pretrained`, or a hub id. "
            "A single-file checkpoint can be converted with diffusers' `from_single_file(...).save_pretrained(...)`."
        )
    # A hub id is "name" or "owner/name"; everything else can only be a path.
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/") or "\\" in path or not path:
        raise ValueError(
            f"{option}: there is no folder {path!r} (looked in {Path.cwd()}); expected a folder written by diffusers' "
            "`save_pretrained`, or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5."
        )


def check_lora(lora: LoraConfig, option: str = "backbone.lora") -> None:
    """Stop early at settings by which more than the adapters changes.

    Raises:
        ValueError: naming the setting.
    """
    adapters_only = {
        "bias": ("none",),
        "lora_bias": (False,),
        "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # the others start from changed frozen weights
        "modules_to_save": (None, []),
        "target_parameters": (None, []),
        "trainable_token_indices": (None, []),
        "layer_replication": (None, []),
    }
    for setting, possible in adapters_only.items():
        if (value := getattr(lora, setting)) not in possible:
            raise ValueError(
                f"{option}.{setting} is {value!r}; expected {' or '.join(str(p) for p in possible if p != [])}. "
                "A LoRA file holds the factors of the adapters and nothing else, and the reference is the model with "
                "its adapters off: what else was trained would be lost."
            )


def save_pipeline(pipeline: Any, folder: Path, dtype: torch.dtype) -> None:
    """Save a pipeline that is not needed any more, without the paths that its parts were read from."""
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, dtype)  # diffusers' own `to` warns where there is nothing to warn of
    pipeline.save_pretrained(folder, safe_serialization=True)
    for file in [folder / "model_index.json", *folder.glob("*/config.json")]:
        config = json.loads(file.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def to_low_precision(module: nn.Module | None, dtype: torch.dtype) -> None:
    """Hold the matrices and convolutions of a frozen network in `dtype`; norms and embeddings stay float32.

    Autocast would cast the same weights at every call, so the outputs are the same bit for bit. Layers that overflow
    float16, as the network's own library knows (T5's output projections), stay and compute in float32 there.
    """
    if module is None or dtype == torch.float32:
        return
    overflowing = (getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            if name.rpartition(".")[2] in overflowing:
                run_in_float32(layer, "forward")
            else:
                layer.to(dtype)


def run_in_float32(module: nn.Module, *methods: str) -> None:
    """Have these methods of a network compute in float32 whatever autocast says."""

    def widened(method: Any) -> Any:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            with torch.autocast(x.device.type, enabled=False):
                return method(x.float(), *args, **kwargs)

        return call

    for name in methods:
        setattr(module, name, widened(getattr(module, name)))


def fingerprint_of(module: nn.Module) -> str:
    """Hash of a network's weights: equal for equal names, shapes, types and values."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
