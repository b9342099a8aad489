"""Random pipelines in the genuine formats, small enough to build in a second and saved as users have them on disk."""

import json
from pathlib import Path
from typing import Any, Literal

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


def save_sdxl(
    folder: Path | str,
    turbo: bool = False,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    image_size: int = 16,
    seed: int = 0,
) -> Path:
    """Save a random Stable Diffusion XL pipeline with `save_pretrained`.

    As in the real one, the second tokenizer pads with "!", the first level of the UNet has no attention, the last has
    two transformer layers per block, and the VAE asks to be run in float32. Latents are half the image's size.

    Args:
        folder: Where the pipeline goes; made if absent.
        turbo: With SDXL-Turbo's scheduler instead of SDXL's.
        prediction_type: What the UNet is told to predict.
        image_size: Height and width of the images; a multiple of 8.
        seed: Seed of the weights; the global random state is left alone.

    Returns:
        The folder, ready for `from_pretrained`.
    """
    from diffusers import (
        AutoencoderKL,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    folder = Path(folder)
    tokenizers = {}
    for name, pad_token in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        tokenizers[name] = CLIPTokenizer.from_pretrained(save_clip_tokenizer(folder / name, pad_token=pad_token))
    schedule = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    if turbo:
        scheduler = EulerAncestralDiscreteScheduler(**schedule, timestep_spacing="trailing")
    else:
        scheduler = EulerDiscreteScheduler(**schedule, timestep_spacing="leading")

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = {
            "num_attention_heads": 2,
            "bos_token_id": tokenizers["tokenizer"].bos_token_id,
            "eos_token_id": tokenizers["tokenizer"].eos_token_id,
            "initializer_factor": 4.0,  # with 1 all prompts look nearly the same; 20 amplifies rounding
            "vocab_size": len(tokenizers["tokenizer"]),
        }
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                projection_dim=WIDTH,
                pad_token_id=tokenizers["tokenizer"].pad_token_id,
                **text,
            )
        )
        text_encoder_2 = CLIPTextModelWithProjection(
            CLIPTextConfig(
                hidden_size=2 * WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=3,
                projection_dim=2 * WIDTH,
                hidden_act="gelu",
                pad_token_id=tokenizers["tokenizer_2"].pad_token_id,
                **text,
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
            scaling_factor=0.13025,
            force_upcast=True,
        )
        unet = UNet2DConditionModel(
            sample_size=image_size // 2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(WIDTH, WIDTH, 2 * WIDTH),
            transformer_layers_per_block=(1, 1, 2),
            layers_per_block=1,
            cross_attention_dim=3 * WIDTH,
            attention_head_dim=(1, 2, 4),
            norm_num_groups=2,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=WIDTH,
            projection_class_embeddings_input_dim=6 * WIDTH + 2 * WIDTH,
        )
    StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        **tokenizers,
        unet=unet,
        scheduler=scheduler,
    ).save_pretrained(folder)
    return folder


def save_sd3(folder: Path | str, large: bool = False, image_size: int = 16, seed: int = 0) -> Path:
    """Save a random Stable Diffusion 3.5 pipeline with `save_pretrained`.

    As in the real one, the VAE has 16 channels, a shift and no convolutions around its latents, the medium
    transformer's first block has a second attention, and the last block lets the text go. Latents are half the image's
    size.

    Args:
        folder: Where the pipeline goes; made if absent.
        large: With the large model's transformer, which has no second attention.
        image_size: Height and width of the images; a multiple of 4.
        seed: Seed of the weights; the global random state is left alone.

    Returns:
        The folder, ready for `from_pretrained`.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel

    folder = Path(folder)
    tokenizers = {"tokenizer_3": t5_tokenizer()}
    for name, pad_token in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        tokenizers[name] = CLIPTokenizer.from_pretrained(save_clip_tokenizer(folder / name, pad_token=pad_token))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoders = {
            name: CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=len(tokenizers[tokenizer]),
                    hidden_size=width,
                    intermediate_size=2 * width,
                    num_hidden_layers=layers,
                    num_attention_heads=2,
                    projection_dim=width,
                    hidden_act=activation,
                    bos_token_id=tokenizers[tokenizer].bos_token_id,
                    eos_token_id=tokenizers[tokenizer].eos_token_id,
                    pad_token_id=tokenizers[tokenizer].pad_token_id,
                    initializer_factor=4.0,  # with 1 all prompts look nearly the same
                )
            ).eval()
            for name, tokenizer, width, layers, activation in (
                ("text_encoder", "tokenizer", WIDTH, 2, "quick_gelu"),
                ("text_encoder_2", "tokenizer_2", 2 * WIDTH, 3, "gelu"),
            )
        }
        text_encoders["text_encoder_3"] = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizers["tokenizer_3"]),
                d_model=4 * WIDTH,
                d_kv=WIDTH,
                d_ff=4 * WIDTH,
                num_layers=2,
                num_heads=2,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
            )
        ).eval()
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(WIDTH, WIDTH),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=2,
            sample_size=image_size,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=True,
        )
        transformer = SD3Transformer2DModel(
            sample_size=image_size // 2,
            num_layers=2,
            attention_head_dim=WIDTH,
            num_attention_heads=2,
            joint_attention_dim=4 * WIDTH,
            caption_projection_dim=2 * WIDTH,
            pooled_projection_dim=3 * WIDTH,
            pos_embed_max_size=image_size // 2,
            dual_attention_layers=() if large else (0,),
            qk_norm="rms_norm",
        )
    StableDiffusion3Pipeline(
        vae=vae,
        **text_encoders,
        **tokenizers,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    ).save_pretrained(folder)
    return folder


def t5_tokenizer() -> Any:
    """A T5 tokenizer whose tokens are the printable ASCII characters."""
    from transformers import T5Tokenizer

    letters = [("\u2581", -2.0), *((chr(code), -2.0) for code in range(33, 127))]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=512)


def save_clip_tokenizer(folder: Path | str, max_length: int = 77, pad_token: str = "<|endoftext|>") -> Path:
    """Save a CLIP tokenizer without merges, so that every byte is a token and no text is unknown."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    letters = sorted(ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "pad_token": pad_token}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def save_sit(folder: Path | str, image_size: int = 16, num_classes: int = 10, seed: int = 0) -> Path:
    """Save a random SiT as REPA's are published, `sit.pt` with projection heads, and a VAE of diffusers in `vae/`.

    It has the size T/2, which this adds to the known ones. Latents are an eighth of the image's size, as SiT's are.

    Args:
        folder: Where the files go; made if absent.
        image_size: Height and width of the images; a multiple of 16.
        num_classes: Classes, without "no class".
        seed: Seed of the weights; the global random state is left alone.

    Returns:
        The folder.
    """
    from diffusers import AutoencoderKL

    from lightning_modules.backbones.sit_network import SIZES, SiTNetwork, preset

    SIZES["T"] = (2, 4 * WIDTH, 4)
    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SiTNetwork(preset("T/2", image_size // 8, num_classes))
        for parameter in network.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(WIDTH,) * 4,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
            sample_size=image_size,
        )
        heads = {f"projectors.0.{i}.{part}": torch.randn(3, 3) for i in (0, 2, 4) for part in ("weight", "bias")}
    vae.save_pretrained(folder / "vae")
    torch.save(network.state_dict() | heads, folder / "sit.pt")
    return folder
