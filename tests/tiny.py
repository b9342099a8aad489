"""Random pipelines in the genuine formats, small enough to build in a second and saved as users have them on disk."""

import json
from pathlib import Path
from typing import Literal

import torch

WIDTH = 8  # of the text encoder, and channels of every network


def save_sd15(
    folder: Path | str,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    image_size: int = 16,
    seed: int = 0,
) -> Path:
    """Save a random Stable Diffusion pipeline with `save_pretrained`: 1.5, or 2.1's scheduler for "v_prediction".

    The weights are a function of `seed` only; the global random state is left alone. Latents are half the image's size.

    Args:
        folder: Where the pipeline goes; made if absent.
        prediction_type: What the UNet is told to predict (it is random, so nothing but the scheduler's config changes).
        image_size: Height and width of the images; a multiple of 4.
        seed: Seed of the weights.

    Returns:
        The folder, ready for `from_pretrained`.
    """
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = Path(folder)
    save_clip_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    schedule = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    if prediction_type == "epsilon":
        scheduler = PNDMScheduler(**schedule, skip_prk_steps=True)
    else:
        scheduler = DDIMScheduler(**schedule, clip_sample=False)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                projection_dim=WIDTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                initializer_factor=20.0,  # otherwise every prompt has nearly the same embedding
            )
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(WIDTH, WIDTH),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=image_size,
        )
        unet = UNet2DConditionModel(
            sample_size=image_size // 2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(WIDTH, WIDTH),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=2,
            norm_num_groups=2,
        )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def save_clip_tokenizer(folder: Path | str, max_length: int = 77) -> Path:
    """Save a CLIP tokenizer without merges, so that every byte is a token and no text is unknown."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
