"""What `test` adds to the bare diffusers pipeline that makes the same images, measured side by side in one run."""

import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from peft import LoraConfig

from callbacks.evaluation import Evaluation
from datamodules.prompts import PromptDataModule, PromptList
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.diffusion_dpo import DiffusionDPO
from lightning_modules.rewards.toy_oracle import ToyOracle

WORLD = Path(__file__).parents[2] / "datamodules" / "toy_world"
ADAPTERS = {"r": 8, "lora_alpha": 8, "init_lora_weights": "gaussian"}
STEPS = 10
GUIDANCE = 2.0


class SideBySide(pl.Callback):
    """After every batch of `test`, the same images by the bare pipeline; adds up the processor time of both."""

    def __init__(self) -> None:
        from diffusers import StableDiffusionPipeline

        self.pipeline = StableDiffusionPipeline.from_pretrained(
            WORLD / "pipeline", safety_checker=None, requires_safety_checker=False
        )
        self.pipeline.unet.add_adapter(LoraConfig(**ADAPTERS, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        self.pipeline.set_progress_bar_config(disable=True)
        self.house = self.bare = self.mark = 0.0
        self.images = 0

    def on_test_start(self, trainer, pl_module) -> None:
        self.mark = time.process_time()

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        begin = time.process_time()
        self.house += begin - self.mark  # loader, hooks, hashes, both policies' images, files, scores
        for adapted in (True, False):
            if not adapted:
                self.pipeline.unet.disable_adapters()
            images = self.pipeline(
                prompt=batch["prompts"],
                generator=[torch.Generator().manual_seed(seed) for seed in batch["seeds"]],
                num_inference_steps=STEPS,
                guidance_scale=GUIDANCE,
                output_type="pt",
            ).images
            self.images += len(images)
        self.pipeline.unet.enable_adapters()
        self.mark = time.process_time()
        self.bare += self.mark - begin

    def teardown(self, trainer, pl_module, stage) -> None:
        self.house += time.process_time() - self.mark  # statistics, report, grid


@pytest.mark.slow
@pytest.mark.parametrize("number", [64, 500])
def test_an_evaluation_costs_little_more_than_its_images(number, tmp_path):
    torch.set_num_threads(1)
    captions = "".join((WORLD / "prompts" / name).read_text() for name in ("heldout.txt", "train.txt"))
    (tmp_path / "prompts.txt").write_text("\n".join(captions.split("\n")[:number]))
    backbone = SD15(
        str(WORLD / "pipeline"),
        lora=LoraConfig(**ADAPTERS),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
    )
    watch = SideBySide()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=pl.loggers.CSVLogger(tmp_path, "run"),
        callbacks=[Evaluation({"vividness": ToyOracle("vividness")}), watch],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    prompts = PromptList(str(tmp_path / "prompts.txt"), batch_size=8)
    trainer.test(DiffusionDPO(backbone), PromptDataModule(prompts), verbose=False)
    assert watch.images == 2 * number
    print(
        f"{number} prompts: `test` {watch.house:.1f} s, bare pipeline {watch.bare:.1f} s, "
        f"ratio {watch.house / watch.bare:.3f}"
    )
    assert watch.house / watch.bare <= 1.15
