"""Training of the tiny CLIP, whose text tower is the toy pipeline's text encoder."""

import random
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from datamodules.batches import ImageBatch
from datamodules.toy_world.networks import (
    IMAGE_SIZE,
    add_untrained_rest,
    build_clip,
    build_tokenizer,
    save_half,
    text_tower,
)
from datamodules.toy_world.scenes import change_one_thing, parse, train_scenes

MAX_LOG_SCALE = 4.0  # of the logits; without a bound it grows and the gradients of the easy cases vanish


def contrastive_loss(similarity: Tensor, positive: Tensor) -> Tensor:
    """Symmetric cross-entropy between images and captions where an image may have several right captions.

    A caption that describes no image of the batch, a distractor, takes part in the images' choice only.

    Args:
        similarity: (B, C) scaled similarities of B images and C >= B captions, the first B made for the images.
        positive: (B, C) whether the caption describes the image.

    Returns:
        (B,) loss.
    """
    B = len(similarity)
    caption_of_image = positive / positive.sum(1, keepdim=True)
    image_of_caption = positive[:, :B] / positive[:, :B].sum(0, keepdim=True)
    image_loss = -(caption_of_image * similarity.log_softmax(1)).sum(1)
    caption_loss = -(image_of_caption * similarity[:, :B].log_softmax(0)).sum(0)
    return (image_loss + caption_loss) / 2


class ToyCLIP(LightningModule):
    """The tiny CLIP, trained from nothing; saved, with its tokenizer and text tower, when the training ends.

    Args:
        output: Folder for the CLIP with its tokenizer and image processor.
        pipeline: Pipeline folder. Its `text_encoder` and `tokenizer` are replaced, and its `unet` by an untrained one,
            since the old one was trained for the old text encoder.
        learning_rate: Highest rate; it rises from and falls back to nothing along cosines.
        distractors: Captions that differ from an image's in one thing, added to the batch for each image. Without them
            the model learns which words go with a picture, not which colour goes with which shape.
    """

    def __init__(self, output: str, pipeline: str, learning_rate: float = 1e-3, distractors: int = 3) -> None:
        super().__init__()
        self.output = Path(output)
        self.pipeline = Path(pipeline)
        self.learning_rate = learning_rate
        self.distractors = distractors
        self.clip = None
        self._held_out: list[ImageBatch] = []

    def configure_model(self) -> None:
        if self.clip is None:
            self.tokenizer = build_tokenizer([scene.caption for scene in train_scenes()], self.output)
            self.clip = build_clip(self.tokenizer)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        total_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps, pct_start=0.03, cycle_momentum=False
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, D) unit vectors of images in [-1, 1]."""
        embeddings = self.clip.get_image_features(pixel_values=images).pooler_output
        return embeddings / embeddings.norm(dim=-1, keepdim=True)

    def embed_captions(self, captions: list[str]) -> Tensor:
        """(B, D) unit vectors of captions."""
        tokens = self.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids.to(self.device)
        embeddings = self.clip.get_text_features(input_ids=tokens).pooler_output
        return embeddings / embeddings.norm(dim=-1, keepdim=True)

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        scenes = [parse(prompt) for prompt in batch["prompts"]]
        rng = random.Random(self.global_step)
        described = scenes + [change_one_thing(s, rng) for s in scenes for _ in range(self.distractors)]
        positive = torch.tensor([[c.picture == s.picture for c in described] for s in scenes], device=self.device)

        cosine = self.embed_images(batch["images"]) @ self.embed_captions([s.caption for s in described]).T
        scale = self.clip.logit_scale.clamp(max=MAX_LOG_SCALE).exp()
        loss = contrastive_loss(scale * cosine, positive.float()).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        self._held_out.append(batch)

    def on_validation_epoch_end(self) -> None:
        scenes = [parse(prompt) for batch in self._held_out for prompt in batch["prompts"]]
        embeddings = torch.cat([self.embed_images(batch["images"]) for batch in self._held_out])
        self._held_out.clear()

        captions = list(dict.fromkeys(scenes))
        chosen = (embeddings @ self.embed_captions([s.caption for s in captions]).T).argmax(1).tolist()
        right = [captions[i].picture == s.picture for i, s in zip(chosen, scenes, strict=True)]
        self.log("val/top1", sum(right) / len(right), prog_bar=True)

        rng = random.Random(0)
        true = self.embed_captions([s.caption for s in scenes])
        false = self.embed_captions([change_one_thing(s, rng).caption for s in scenes])
        preferred = (embeddings * (true - false)).sum(1) > 0
        self.log("val/prefers_true_caption", preferred.float().mean(), prog_bar=True)

    def on_train_end(self) -> None:
        if self.trainer.is_global_zero:
            from transformers import CLIPImageProcessor

            save_half(self.clip, self.output)
            side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
            CLIPImageProcessor(size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
                self.output
            )
            save_half(text_tower(self.clip), self.pipeline / "text_encoder")
            build_tokenizer([scene.caption for scene in train_scenes()], self.pipeline / "tokenizer")
            add_untrained_rest(self.pipeline)
