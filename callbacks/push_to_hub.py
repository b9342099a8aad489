"""Share a model: the folder for the hub, with a page that says what it is; uploaded only if asked."""

import csv
import inspect
import json
import os
import re
import shlex
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from callbacks.evaluation import Evaluation
from callbacks.export_pipeline import LORA_FILE, ExportPipeline, can_export, replace_folder
from callbacks.model_card import MACHINE_SETTINGS, ModelFacts, hub_id, model_card, shown
from callbacks.sample_images import SampleImages
from lightning_modules.backbones.base import SAMPLING_FILE, Backbone, first_line, subfolder_of
from lightning_modules.base import AlignmentModule

PACKAGES = ("limelight", "torch", "lightning", "diffusers", "transformers", "peft")


class PushToHub(pl.Callback):
    """Write `hub/` into the run's folder after fit: the export, a model card and a grid of samples, nothing else.

    With `push: true` the folder is uploaded, after the evaluation if `evaluate: true`. Otherwise nothing leaves the
    machine. The card tells method, data, settings, measured numbers, and how to use the model; names of local folders
    are left out of it. Needs ExportPipeline among the callbacks; shows the grid of Evaluation, else of SampleImages.

    Args:
        repo_id: Where the model goes on the hub: owner/name.
        push: Upload the folder. Needs a token: `hf auth login`, or HF_TOKEN.
        private: Make a new repository private; an existing one stays as it is.
        license: Licence of the model, for example openrail++ or creativeml-openrail-m.
        base_model: Hub id of the base model, where `backbone.pretrained` is a folder.
    """

    def __init__(
        self,
        repo_id: str,
        push: bool = False,
        private: bool = True,
        license: str | None = None,
        base_model: str | None = None,
    ) -> None:
        for option, value in (("repo_id", repo_id), ("base_model", base_model)):
            if value is not None:
                check_repo_id(option, value)
        if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
            raise ValueError(
                f"PushToHub: license is {license!r}; expected one of the hub's identifiers "
                "(huggingface.co/docs/hub/repositories-licenses), such as openrail++, or null."
            )
        self.repo_id = repo_id
        self.push = push
        self.private = private
        self.license = license
        self.base_model = base_model
        self.folder: Path | None = None
        self.metrics: dict[str, float] = {}

    def setup(self, trainer: pl.Trainer, pl_module: AlignmentModule, stage: str) -> None:
        """Stop before anything is loaded when there would be nothing to share, or no way to."""
        if stage != "fit":
            return
        if not pl_module.backbone.in_diffusers:
            raise ValueError(
                f"PushToHub: its model card is for pipelines of diffusers, which has none for "
                f"{type(pl_module.backbone).__name__}. Leave it out; `export/` holds the weights as they are published."
            )
        if not any(isinstance(callback, ExportPipeline) for callback in trainer.callbacks):
            raise ValueError(
                "PushToHub shares what ExportPipeline exports; name `class_path: callbacks.export_pipeline."
                "ExportPipeline` among the callbacks, too."
            )
        if not can_export(trainer.strategy):
            raise ValueError(
                f"PushToHub: under {type(trainer.strategy).__name__} no rank holds whole weights, so there is no "
                "export to share. Use ddp, DeepSpeed stage 2 or FSDP2, or leave PushToHub out."
            )
        if self.push and trainer.is_global_zero:
            check_token(self.repo_id)

    def on_train_start(self, trainer: pl.Trainer, pl_module: AlignmentModule) -> None:
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)

    def teardown(self, trainer: pl.Trainer, pl_module: AlignmentModule, stage: str) -> None:
        """After fit, and again after a test of the same weights: then the card has its numbers."""
        if self.folder is None or not trainer.is_global_zero or stage not in ("fit", "test"):
            return
        if stage == "fit":
            self.metrics = {
                name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")
            }
        config = read_config(self.folder / "config.yaml")
        self.write(trainer, pl_module, config, evaluated=stage == "test")
        if stage == "fit" and config.get("evaluate"):
            return  # the numbers are still to come
        command = f"hf upload {self.repo_id} {shlex.quote(str(self.folder / 'hub'))} ."
        command += " --private" if self.private else ""
        if self.push:
            self.upload(command)
        else:
            rank_zero_info(f"{self.folder / 'hub'} is ready for the hub; nothing was uploaded. To upload it: {command}")

    def write(self, trainer: pl.Trainer, pl_module: AlignmentModule, config: dict[str, Any], evaluated: bool) -> None:
        """Make `hub/` from the export, whole or not at all."""
        export, partial = self.folder / "export", self.folder / ".hub.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(export, partial, copy_function=link_or_copy, ignore=shutil.ignore_patterns("merged"))
        facts = self.facts(trainer, pl_module, config)
        results = read_results(self.folder / "evaluation" / "results.json") if evaluated else None
        grid = None if results is None else evaluation_grid(self.folder / "evaluation", trainer, results)
        grid = grid or samples_grid(self.folder / "samples", trainer, pl_module.backbone)
        facts.results = results
        if grid is not None:
            file, facts.samples, facts.num_inference_steps, facts.guidance_scale = grid
            shutil.copy2(file, partial / "grid.png")
        (partial / "README.md").write_text(model_card(facts), encoding="utf-8")
        replace_folder(self.folder / "hub", partial)

    def facts(self, trainer: pl.Trainer, pl_module: AlignmentModule, config: dict[str, Any]) -> ModelFacts:
        backbone, data = pl_module.backbone, trainer.datamodule
        source = getattr(data, "source", None)
        files = sorted(path.name for path in (self.folder / "export").glob("*.safetensors"))
        base_model = hub_id(backbone.pretrained) or self.base_model
        call, scheduler = sampling_of(self.folder / "export")
        return ModelFacts(
            repo_id=self.repo_id,
            method=type(pl_module).__name__,
            summary=(inspect.getdoc(type(pl_module)) or "").split("\n")[0],
            pipeline=backbone.pipeline_class_name,
            base_model=base_model,
            revision=backbone.revision,
            dataset=hub_id(source),
            parts=replaced_parts(backbone),
            lora_files=sorted(files, key=lambda name: name != LORA_FILE),
            call=call,
            scheduler=scheduler,
            num_inference_steps=backbone.num_inference_steps,
            guidance_scale=backbone.guidance_scale,
            license=self.license,
            metrics=self.metrics,
            settings={
                "method": settings_of(pl_module, config.get("model"), skip=("backbone",)),
                "model": model_settings(backbone, base_model),
                "data": {"source": hub_id(source) or "not on the hub"}
                | settings_of(data, config.get("data"), skip=MACHINE_SETTINGS),
                "run": run_settings(trainer, pl_module),
            },
            versions={package: version for package in PACKAGES if (version := version_of(package)) is not None},
        )

    def upload(self, command: str) -> None:
        """Upload `hub/`; a failure costs nothing but the upload."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError

        folder = self.folder / "hub"
        files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        try:
            api = HfApi()
            api.create_repo(self.repo_id, private=self.private, exist_ok=True)
            url = api.upload_folder(
                repo_id=self.repo_id,
                folder_path=folder,
                allow_patterns=files,
                commit_message="Upload the model, its card and its samples",
            )
        except (OSError, HTTPError, RuntimeError) as error:
            rank_zero_warn(
                f"PushToHub: the upload to {self.repo_id} failed: {first_line(error)} The model is safe in {folder}; "
                f"to upload it by hand: {command}"
            )
        else:
            rank_zero_info(f"Uploaded {folder} to {url}")


def check_repo_id(option: str, repo_id: str) -> None:
    """Raise a ValueError unless this is an id of a repository on the hub, with its owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    reason = "" if "/" in repo_id else "The owner is missing."
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        reason = first_line(error)
    if reason:
        raise ValueError(f"PushToHub: {option} is {repo_id!r}; expected owner/name, such as me/my-lora. {reason}")


def check_token(repo_id: str) -> None:
    """Raise a ValueError unless an upload could be tried."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"PushToHub: push is true, but HF_HUB_OFFLINE=1 forbids the upload to {repo_id}. Unset it, or set push: "
            "false and upload the folder later."
        )
    if get_token() is None:
        raise ValueError(
            f"PushToHub: push is true, but there is no token for the upload to {repo_id}. Run `hf auth login` with a "
            "token that may write (huggingface.co/settings/tokens), or set HF_TOKEN; or set push: false and upload the "
            "folder later."
        )


def read_config(file: Path) -> dict[str, Any]:
    """The run's resolved config; empty for a run that was started without the command line."""
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}


def link_or_copy(source: str, target: str) -> None:
    """A second name for a file, which takes no room; a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sampling_of(export: Path) -> tuple[dict[str, Any], str | None]:
    """How an exported distilled model samples: arguments of the call, and class of the scheduler."""
    file = export / SAMPLING_FILE
    if not file.is_file():
        return {}, None
    config = json.loads((export / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    return json.loads(file.read_text(encoding="utf-8")), config["_class_name"]


def read_results(file: Path) -> dict[str, Any] | None:
    """What `Evaluation` found for the weights that were exported against their base, not for or against others."""
    results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    known = results is not None and results["checkpoint"] is None and results["baseline"]["kind"] in ("base", "none")
    return results if known else None


Grid = tuple[Path, list[tuple[str, int]], int, float]  # file, prompt and seed of each row, sampling steps, guidance


def evaluation_grid(folder: Path, trainer: pl.Trainer, results: dict[str, Any]) -> Grid | None:
    """The grid of `Evaluation`."""
    for callback in trainer.callbacks:
        if isinstance(callback, Evaluation):
            with (folder / "scores.csv").open(encoding="utf-8", newline="") as scores:
                rows = [(row["prompt"], int(row["seed"])) for row in csv.DictReader(scores)]
            shown_rows = rows[: callback.grid_rows]
            return folder / "grid.png", shown_rows, results["num_inference_steps"], results["guidance_scale"]
    return None


def samples_grid(folder: Path, trainer: pl.Trainer, backbone: Backbone) -> Grid | None:
    """The last grid of `SampleImages`."""
    files = sorted(folder.glob("step_*.png"))
    for callback in trainer.callbacks:
        if isinstance(callback, SampleImages) and files:
            rows = [(prompt, callback.seed + row) for row, prompt in enumerate(callback.prompts)]
            steps = callback.num_inference_steps or backbone.num_inference_steps
            guidance = backbone.guidance_scale if callback.guidance_scale is None else callback.guidance_scale
            return files[-1], rows, steps, guidance
    return None


def replaced_parts(backbone: Backbone) -> dict[str, tuple[str, str | None, str | None]]:
    """Parts of the pipeline that came from elsewhere: name -> diffusers class, subfolder, hub id."""
    parts = {}
    for name, part_class, path in (
        (backbone.denoiser_name, backbone.denoiser_class_name, backbone.denoiser_path),
        ("vae", "AutoencoderKL", backbone.vae_path),
    ):
        if path is not None:
            parts[name] = (part_class, subfolder_of(path, name), hub_id(path))
    return parts


def settings_of(instance: Any, config: dict[str, Any] | None, skip: tuple[str, ...]) -> dict[str, str]:
    """The arguments of a class that can be shown, from the run's config or, without one, from its attributes."""
    if config is not None:
        arguments = config.get("init_args") or {}
    else:
        names = inspect.signature(type(instance)).parameters
        arguments = {name: getattr(instance, name) for name in names if hasattr(instance, name)}
    texts = {name: shown(value) for name, value in arguments.items() if name not in skip}
    return {name: text for name, text in texts.items() if text is not None}


def model_settings(backbone: Backbone, base_model: str | None) -> dict[str, str]:
    """Base model, and what of it was trained."""
    settings = {"base model": base_model or "not on the hub"}
    for name, path in (
        ("revision", backbone.revision),
        ("vae", backbone.vae_path),
        ("denoiser", backbone.denoiser_path),
    ):
        if path is not None:
            settings[name] = shown(path) or "not on the hub"
    lora = backbone.lora
    if lora is None:
        return settings | {"trained": f"all weights of the {backbone.denoiser_name}"}
    targets = lora.target_modules
    variants = [name for name in ("use_rslora", "use_dora") if getattr(lora, name)]
    return settings | {
        "trained": f"LoRA on the {backbone.denoiser_name}" + "".join(f", {name}" for name in variants),
        "rank": f"{lora.r} {lora.rank_pattern or ''}".strip(),
        "alpha": f"{lora.lora_alpha} {lora.alpha_pattern or ''}".strip(),
        "targets": targets if isinstance(targets, str) else ", ".join(sorted(targets)),
    }


def run_settings(trainer: pl.Trainer, pl_module: AlignmentModule) -> dict[str, str]:
    """Length, batch, precision and seed."""
    group = trainer.optimizers[0].param_groups[0]
    return {
        "optimizer steps": str(trainer.global_step),
        "samples per step": str(
            pl_module.effective_batch() if hasattr(trainer.datamodule, "batch_size") else "unknown"
        ),
        "learning rate": f"{group.get('initial_lr', group['lr']):g}",
        "devices": str(trainer.world_size),
        "precision": str(trainer.precision),
        "gradient clipping": str(trainer.gradient_clip_val or "none"),
        "seed": str(pl_module.run_seed),
    }


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
