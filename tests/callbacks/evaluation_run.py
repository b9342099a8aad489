"""One evaluation of a tuned LoRA, to be killed or run under torchrun: `python -m tests.callbacks.evaluation_run`."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.distributed
from lightning.pytorch.strategies import ModelParallelStrategy

from callbacks.evaluation import Evaluation
from datamodules.prompts import PromptDataModule, PromptList
from lightning_modules.backbones.base import Backbone
from lightning_modules.diffusion_dpo import DiffusionDPO
from tests.callbacks.runs import Redness, make_module, make_trainer


def tuned_module(pipeline: Path, seed: int = 1, strength: float = 0.3, **settings) -> DiffusionDPO:
    """A method whose loaded backbone has been changed by more than rounding, as a function of the seed."""
    module = make_module(pipeline, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module.backbone.load()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.trained_parameters().values():
            parameter.add_(strength * parameter.std().nan_to_num(0) * torch.randn(parameter.shape, generator=generator))
            if not parameter.any():
                parameter.add_(strength * torch.randn(parameter.shape, generator=generator))
    return module


def record_noise(backbone: Backbone, noise: dict[int, torch.Tensor]) -> None:
    """Have the pipeline write down the starting noise of every seed."""
    prepare = backbone.pipeline.prepare_latents

    def recording(*args, **kwargs):
        generators = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, list))
        seeds = [generator.initial_seed() for generator in generators]
        latents = prepare(*args, **kwargs)
        noise.update(zip(seeds, latents.clone(), strict=True))
        return latents

    backbone.pipeline.prepare_latents = recording


def evaluate(pipeline: Path, folder: Path, prompts: Path, batch_size: int, strategy: str = "auto") -> pl.Trainer:
    pl.seed_everything(5, verbose=False)
    noise: dict[int, torch.Tensor] = {}
    if strategy == "fsdp2":  # which has to load and split the model itself
        module = make_module(pipeline)
    else:
        module = tuned_module(pipeline)
        record_noise(module.backbone, noise)
    trainer = make_trainer(
        folder,
        [Evaluation({"red": Redness()}, image_folder=str(folder / "images"))],
        devices=1 if strategy == "auto" else 2,
        strategy=ModelParallelStrategy(2, 1) if strategy == "fsdp2" else strategy,
    )
    trainer.test(module, PromptDataModule(PromptList(str(prompts), batch_size=batch_size)), verbose=False)
    torch.save(noise, folder / f"noise_{trainer.global_rank}.pt")
    return trainer


def main() -> None:
    pipeline, folder, prompts, batch_size, strategy = sys.argv[1:]
    evaluate(Path(pipeline), Path(folder), Path(prompts), int(batch_size), strategy)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    main()
