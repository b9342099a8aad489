"""One training run in processes of its own, on one or two CPU ranks: `python -m tests.methods.run_ranks FILE.json`."""

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from peft import LoraConfig

from lightning_modules.backbones.sd15 import SD15
from lightning_modules.cli.checkpoints import AtomicCheckpointIO
from lightning_modules.diffusion_dpo import DiffusionDPO
from lightning_modules.diffusion_orpo import DiffusionORPO
from lightning_modules.step_preference_model import StepPreferenceModel
from tests.pairs import RandomPairs, WeightedPairs


class Spy(pl.Callback):
    """Writes the noised latents that every rank saw, and kills the rank when asked to."""

    def __init__(self, folder: Path, kill_after: int | None) -> None:
        self.folder = folder
        self.kill_after = kill_after
        self.seen: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        predict = pl_module.backbone.predict

        def recording(x_t, t, condition):
            self.seen.append(x_t.double().sum().item())
            return predict(x_t, t, condition)

        pl_module.backbone.predict = recording

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        (self.folder / f"seen_{trainer.global_rank}.json").write_text(json.dumps(self.seen))
        if self.kill_after is not None and trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.kill_after:
            os.kill(os.getpid(), signal.SIGKILL)


def main(settings: dict) -> None:
    folder = Path(settings["folder"])
    pl.seed_everything(settings.get("seed", 3), verbose=False)
    lora = LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian") if settings.get("lora", True) else None
    data = RandomPairs()
    if settings.get("method") == "spm":
        options = settings["options"] | {"clip": settings["clip"], "processor": settings["clip"]}
        # SGD, since Adam would hide a gradient of another size.
        module = StepPreferenceModel(
            SD15(settings["pretrained"]), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **options
        )
        data = WeightedPairs(settings.get("batch_size", 2))
    else:
        method = {"dpo": partial(DiffusionDPO, beta=2000.0), "orpo": DiffusionORPO}[settings.get("method", "dpo")]
        module = method(SD15(settings["pretrained"], lora=lora), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3))
    strategy = {
        "auto": "auto",
        "ddp": "ddp",
        "fsdp2": ModelParallelStrategy(settings["devices"], 1, save_distributed_checkpoint=False),
    }[settings["strategy"]]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=settings["devices"],
        strategy=strategy,
        max_steps=settings["steps"],
        accumulate_grad_batches=settings["accumulate"],
        use_distributed_sampler=False,  # RandomPairs deals the batches to the ranks itself
        limit_val_batches=settings.get("val_batches", 0),
        num_sanity_val_steps=0,
        val_check_interval=settings.get("val_check_interval", 1.0),
        log_every_n_steps=1,
        logger=CSVLogger(folder, name="", version="log", flush_logs_every_n_steps=1),
        callbacks=[
            ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}"),
            Spy(folder, settings.get("kill_after")),
        ],
        plugins=[] if settings["strategy"] == "fsdp2" else [AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=settings.get("ckpt_path"), weights_only=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
