"""The parts of the toy pipeline, in the genuine formats of diffusers and transformers, before any training.

The pipeline has the format of Stable Diffusion 1.5 and opens with `StableDiffusionPipeline.from_pretrained`:
AutoencoderKL (4 latent channels, a quarter of the side), a CLIP text encoder with its own byte BPE tokenizer, a UNet
that predicts the noise, and a DDIM scheduler.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, ModelMixin, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, PreTrainedModel

IMAGE_SIZE = 32
TEXT_LENGTH = 16  # tokens, start and end included
TEXT_WIDTH = 64
UNET_SEED = 0


def build_autoencoder() -> AutoencoderKL:
    """0.24 M parameters; 32 x 32 pixels become 4 x 8 x 8."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """0.30 M parameters."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": TEXT_WIDTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "projection_dim": TEXT_WIDTH,
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=TEXT_WIDTH))


def text_tower(clip: CLIPModel) -> CLIPTextModel:
    """The CLIP's text tower as a model of its own, the form in which a pipeline wants its text encoder."""
    from transformers import CLIPTextModel

    tower = CLIPTextModel(clip.config.text_config)
    tower.load_state_dict(clip.text_model.state_dict())
    return tower


def build_unet() -> UNet2DConditionModel:
    """1.08 M parameters, cross-attention to the caption at every resolution."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """The noise schedule of Stable Diffusion 1.5."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_tokenizer(captions: list[str], folder: Path) -> CLIPTokenizer:
    """Learn a byte BPE from captions and save it as the files of a CLIPTokenizer.

    Args:
        captions: What the merges are learnt from; any other text still has tokens, since every byte is one.
        folder: Where the files go.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    start, end = "<|startoftext|>", "<|endoftext|>"
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token=end))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    every_byte = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        end_of_word_suffix="</w>",
        initial_alphabet=every_byte,
        # Named in advance, since those that the trainer finds by itself are numbered differently at every call.
        special_tokens=[byte + "</w>" for byte in every_byte],
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    learnt = json.loads(bpe.to_str())["model"]
    vocabulary = learnt["vocab"]
    for token in (start, end):
        vocabulary[token] = len(vocabulary)

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in learnt["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": TEXT_LENGTH,
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def save_half(model: ModelMixin | PreTrainedModel, folder: Path) -> None:
    """Save a network in half precision, so that `from_pretrained` gives it back in full precision by default."""
    copy.deepcopy(model).half().save_pretrained(folder)
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    settings.pop("_name_or_path", None)  # where the network was on this machine
    if "dtype" in settings:  # transformers loads in the precision that is named here; diffusers always in full
        settings["dtype"] = "float32"
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def add_untrained_rest(pipeline: Path) -> None:
    """Write what the VAE and the text encoder leave out of a pipeline folder: scheduler, index and a random UNet.

    A UNet that was there before is replaced: it was trained for another VAE or text encoder.

    Args:
        pipeline: The pipeline folder; what is not yet in it (`vae`, or `text_encoder` and `tokenizer`) comes later.
    """
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(UNET_SEED)
        save_half(build_unet(), pipeline / "unet")
    build_scheduler().save_pretrained(pipeline / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (pipeline / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
