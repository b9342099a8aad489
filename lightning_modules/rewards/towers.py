"""CLIP's two towers behind one face, from the layouts of transformers and of open_clip."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_modules.rewards.preprocessing import Preprocessing, from_hf_processor
from lightning_modules.weight_files import build_empty, find, fit, read_weights

HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json")


class Towers(nn.Module):
    """An image and a text tower that end in one space; features leave them un-normalised.

    Args:
        clip: `CLIPModel` of transformers, or a model of open_clip.
        tokenize: Texts -> (B, L) token numbers, cut to the length that the tower takes.
    """

    def __init__(self, clip: nn.Module, tokenize: Any) -> None:
        super().__init__()
        self.clip = clip
        self.tokenize = tokenize
        self.is_hf = hasattr(clip, "get_image_features")

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, D)."""
        if self.is_hf:
            return self.clip.get_image_features(pixel_values=pixels).pooler_output
        return self.clip.encode_image(pixels)

    def encode_texts(self, texts: list[str]) -> Tensor:
        """B texts -> (B, D)."""
        tokens = self.tokenize(texts).to(self.clip.logit_scale.device)
        if self.is_hf:
            return self.clip.get_text_features(input_ids=tokens).pooler_output
        return self.clip.encode_text(tokens)


def load_hf_clip(option: str, source: str, processor: str | None = None) -> tuple[Towers, Preprocessing]:
    """CLIP in the layout of transformers.

    Args:
        option: Name of the setting, for messages.
        source: Folder or hub id with config.json and the weights.
        processor: Folder or hub id with the tokenizer and preprocessor_config.json; `source` if not given.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the config is no CLIP's, or the weights do not fit it.
    """
    clip = empty_hf_clip(option, find(option, source, ("config.json",)))
    file = find(option, source, HF_WEIGHTS)
    fit(option, file, read_weights(option, file), clip)
    processor = processor or source
    tokenize = hf_tokenizer(option, processor, clip.config.text_config)
    return Towers(clip, tokenize), hf_image_processor(option, processor, clip)


def hf_image_processor(option: str, source: str, clip: nn.Module) -> Preprocessing:
    """What preprocessor_config.json says.

    Raises:
        ValueError: if it prepares images of another size than the image tower takes.
    """
    from transformers import CLIPImageProcessor

    file = find(option, source, ("preprocessor_config.json",))
    preprocessing = from_hf_processor(CLIPImageProcessor.from_pretrained(file.parent))
    if preprocessing.size != clip.config.vision_config.image_size:
        raise ValueError(
            f"{option}: {str(file)!r} prepares images of {preprocessing.size} pixels, but the image tower takes "
            f"{clip.config.vision_config.image_size}; expected the processor of the same model."
        )
    return preprocessing


def empty_hf_clip(option: str, config: Path) -> nn.Module:
    """`CLIPModel` of a config.json, still without weights.

    Raises:
        ValueError: if the config is no CLIP's.
    """
    from transformers import CLIPConfig, CLIPModel

    kind = read_json(option, config).get("model_type")
    if kind != "clip":
        raise ValueError(f"{option}: {str(config)!r} describes a {kind!r} model; expected model_type clip.")
    return build_empty(lambda: CLIPModel(CLIPConfig.from_pretrained(config)))


def hf_tokenizer(option: str, source: str, text_config: Any) -> Any:
    """Texts -> (B, L) token numbers, padded and cut to the L positions of the tower.

    Raises:
        ValueError: if the tokenizer counts more tokens than the tower knows.
    """
    from transformers import CLIPTokenizer

    find(option, source, TOKENIZER_FILES)
    tokenizer = CLIPTokenizer.from_pretrained(source)
    length = text_config.max_position_embeddings
    if len(tokenizer) > text_config.vocab_size:
        raise ValueError(
            f"{option}: the tokenizer in {source!r} has {len(tokenizer)} tokens, but the text tower knows "
            f"{text_config.vocab_size}; expected the tokenizer of the same model."
        )

    def tokenize(texts: list[str]) -> Tensor:
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return tokens.input_ids

    return tokenize


def load_open_clip(option: str, file: Path, config: dict[str, Any]) -> tuple[Towers, Preprocessing]:
    """CLIP in the layout of open_clip.

    Args:
        option: Name of the setting, for messages.
        file: Weights.
        config: As in open_clip_config.json: `model_cfg` and, where it differs from the usual one, `preprocess_cfg`.

    Raises:
        ValueError: if the weights do not fit the model.
    """
    clip = empty_open_clip(config["model_cfg"])
    fit(option, file, read_weights(option, file), clip)
    settings = config.get("preprocess_cfg", {})
    fits = {"shortest": "crop", "longest": "pad", "squash": "squash"}
    size = clip.visual.image_size
    preprocessing = Preprocessing(
        size[0] if isinstance(size, tuple | list) else size,
        fits[settings.get("resize_mode") or "shortest"],
        crop_rounding="even",
        mean=tuple(settings.get("mean", Preprocessing.mean)),
        std=tuple(settings.get("std", Preprocessing.std)),
    )
    return Towers(clip, open_clip_tokenizer(config["model_cfg"]["text_cfg"])), preprocessing


def open_clip_config(option: str, model: str | None) -> dict[str, Any]:
    """The config of a model that open_clip knows by name. Importing open_clip takes seconds, and is rarely needed.

    Raises:
        ValueError: naming some that are known.
    """
    folder = Path(find_spec("open_clip").submodule_search_locations[0]) / "model_configs"
    if model and (folder / f"{model}.json").is_file():
        return read_json(option, folder / f"{model}.json")

    import open_clip

    config = open_clip.get_model_config(model) if model else None  # one that was added in this process
    if config is None:
        close = [name for name in open_clip.list_models() if model and name.lower()[:5] == model.lower()[:5]]
        raise ValueError(
            f"{option}: open_clip knows no model {model!r}; expected a name such as "
            f"{', '.join(close[:6] or ['ViT-H-14', 'ViT-H-14-quickgelu', 'ViT-L-14'])} (`open_clip.list_models()`)."
        )
    return config


def empty_open_clip(config: dict[str, Any]) -> nn.Module:
    """A model of open_clip's config, still without weights; none of its parts is downloaded."""
    from open_clip.model import CLIP, CustomTextCLIP

    config = dict(config)
    custom_text = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    vision, text = dict(config.pop("vision_cfg")), dict(config.pop("text_cfg"))
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False
    return build_empty(lambda: (CustomTextCLIP if custom_text else CLIP)(vision_cfg=vision, text_cfg=text, **config))


def open_clip_tokenizer(text_config: dict[str, Any]) -> Any:
    """Texts -> (B, L) token numbers as open_clip makes them.

    The usual one mends broken characters, undoes HTML escapes, squeezes blanks and lowers case; it fills with zeros,
    and a text that is cut ends in the end token.
    """
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    length, options = text_config.get("context_length", 77), text_config.get("tokenizer_kwargs") or {}
    if name := text_config.get("hf_tokenizer_name"):
        return HFTokenizer(name, length, tokenizer_mode=text_config.get("tokenizer_mode"), **options)
    return SimpleTokenizer(context_length=length, **options)


def read_json(option: str, path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: if it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{option}: {str(path)!r} is not JSON ({error}); copy the model anew.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{option}: {str(path)!r} holds no settings by name; copy the model anew.")
    return content
