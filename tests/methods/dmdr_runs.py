"""Runs of DMDR on tiny pipelines, shared by its tests."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig

from datamodules.prompt_stream import PromptStream
from datamodules.prompts import PromptList
from lightning_modules.backbones.base import Backbone
from lightning_modules.backbones.sd3 import SD3
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.cli.run_folder import SaveMetrics
from lightning_modules.dmdr import DMDR
from lightning_modules.rewards.base import Reward

FAMILIES = {"sd15": SD15, "sd21": SD15, "sdxl": SDXL, "sd3": SD3}


class Brightness(Reward):
    """Mean pixel value, or, relatively, a multiple of it that says which words were drawn."""

    differentiable = True

    def __init__(self) -> None:
        super().__init__()
        self.words: list[tuple[str, str]] = []

    def score(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images.mean((1, 2, 3))

    def relative(self, images, prompts, positive, negative, k) -> torch.Tensor:
        self.words.append((positive, negative))
        return k * self.score(images, prompts)


def lora(rank: int = 2, alpha: int = 4) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights="gaussian")


def backbone_of(family: str, pretrained: Path, adapters: bool = True, **settings) -> Backbone:
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "chunk_size": 4} | settings
    if family == "sd3":
        settings["max_sequence_length"] = 16
    return FAMILIES[family](str(pretrained), lora=lora() if adapters else None, **settings)


def build(pretrained: Path, family: str = "sd15", adapters: bool = True, lr=1e-3, score_lr=1e-3, **settings) -> DMDR:
    """A small DMDR: 2 steps, an update of the student every third inner step, guidance 2."""
    pl.seed_everything(11, verbose=False)  # a module reads the run's seed when it is built
    options = {"num_steps": 2, "ratio": 3, "guidance_scale": 2.0, "dynamic_steps": 4} | settings
    backbone = backbone_of(family, pretrained, adapters, **options.pop("backbone", {}))
    return DMDR(
        backbone,
        lora(alpha=2),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=lr),
        score_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=score_lr, weight_decay=0.0),
        **options,
    )


def loaded(module: DMDR, dtype: torch.dtype = torch.float32, moved: bool = True) -> DMDR:
    """The module outside a Trainer, its trained weights moved away from where they start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        module.backbone.load(dtype)
        module.backbone.add_score(module.score_lora, module.fake_scale)
        if moved:
            for parameter in module.trained_parameters().values():
                parameter.data += 0.05 * torch.randn_like(parameter)
    return module


def fit(
    module: DMDR,
    folder: Path,
    max_steps: int = 3,
    ckpt_path: Path | None = None,
    callbacks=(),
    batch_size=2,
    every=1,
    prompts=7,
    **trainer,
) -> pl.Trainer:
    """Fit on numbered prompts with a checkpoint after every `every`-th update of the student."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "prompts.txt"
    file.write_text("\n".join(f"picture {i}" for i in range(prompts)) + "\n")
    runner = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        logger=CSVLogger(folder, name="", version="log", flush_logs_every_n_steps=1),
        callbacks=[
            ModelCheckpoint(folder / "checkpoints", every_n_train_steps=every, save_top_k=-1, filename="{step}"),
            SaveMetrics(),
            *callbacks,
        ],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, "precision": "32-true"} | trainer,
    )
    data = PromptStream(PromptList(str(file)), batch_size)
    runner.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return runner


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]
