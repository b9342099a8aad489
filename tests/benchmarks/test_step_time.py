"""What the house adds to the bare mathematics of a step, as a ratio measured side by side in one run."""

import statistics
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig

from lightning_modules.backbones.sd15 import SD15
from lightning_modules.diffusion_dpo import DiffusionDPO
from tests.pairs import RandomPairs

PIPELINE = Path(__file__).parents[2] / "datamodules" / "toy_world" / "pipeline"
STEPS = 16
ADAPTERS = {"r": 8, "lora_alpha": 8, "init_lora_weights": "gaussian"}


class BareStep:
    """Diffusion-DPO in plain torch and diffusers: the same forward passes, loss, clipping and optimizer."""

    def __init__(self) -> None:
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(PIPELINE, safety_checker=None, requires_safety_checker=False)
        self.vae, self.unet = pipeline.vae.requires_grad_(False), pipeline.unet.requires_grad_(False)
        self.text_encoder, self.tokenizer = pipeline.text_encoder.requires_grad_(False), pipeline.tokenizer
        self.abar = pipeline.scheduler.alphas_cumprod
        self.unet.add_adapter(LoraConfig(**ADAPTERS, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        self.unet.train()
        self.trained = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5)

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> None:
        with torch.no_grad():
            z = self.vae.encode(images).latent_dist.sample() * self.vae.config.scaling_factor
            ids = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
            context = self.text_encoder(ids)[0].repeat(2, 1, 1)
        noise = torch.randn(len(z) // 2, *z.shape[1:]).repeat(2, 1, 1, 1)
        t = torch.randint(0, 1000, (len(z) // 2,)).repeat(2)
        abar = self.abar[t].view(-1, 1, 1, 1)
        x = abar.sqrt() * z + (1 - abar).sqrt() * noise
        error = (self.unet(x, t, context).sample - noise).square().mean((1, 2, 3))
        self.unet.disable_adapters()
        with torch.no_grad():
            reference = (self.unet(x, t, context).sample - noise).square().mean((1, 2, 3))
        self.unet.enable_adapters()
        preferred, rejected = (reference - error).chunk(2)
        loss = -F.logsigmoid(2500.0 * (preferred - rejected)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()


class SideBySide(pl.Callback):
    """After every step of the house, one bare step on the same batch; records the processor time of both."""

    def __init__(self) -> None:
        self.bare_step = BareStep()
        self.house: list[float] = []
        self.bare: list[float] = []
        self.mark = 0.0

    def on_train_start(self, trainer, pl_module) -> None:
        self.mark = time.process_time()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        begin = time.process_time()
        self.house.append(begin - self.mark)  # everything between two bare steps: loader, hooks, logging, step
        self.bare_step(batch["images"], batch["prompts"])
        self.bare.append(time.process_time() - begin)
        self.mark = time.process_time()


class Remembered(RandomPairs):
    """Batches made beforehand: both sides train on tensors that are there."""

    def setup(self, stage: str) -> None:
        self.batches = [super(Remembered, self).make_batch(k) for k in range(STEPS)]

    def make_batch(self, k: int):
        return self.batches[k]


@pytest.mark.slow
def test_a_dpo_step_costs_at_most_a_tenth_more_than_its_bare_mathematics(tmp_path):
    torch.set_num_threads(1)
    module = DiffusionDPO(
        SD15(str(PIPELINE), lora=LoraConfig(**ADAPTERS), chunk_size=64),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5),
        prompt_dropout=0.0,
    )
    watch = SideBySide()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        logger=pl.loggers.CSVLogger(tmp_path, flush_logs_every_n_steps=1),
        callbacks=[watch],
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=Remembered(batch_size=32, image_size=32, length=STEPS))
    house, bare = statistics.median(watch.house[3:]), statistics.median(watch.bare[3:])
    print(f"step of the house {house * 1e3:.1f} ms, bare step {bare * 1e3:.1f} ms, ratio {house / bare:.3f}")
    assert house / bare <= 1.1
