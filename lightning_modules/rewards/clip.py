"""CLIP score: the cosine between an image and its prompt, by any CLIP of transformers or open_clip."""

import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_modules.functional.scores import cosine_score
from lightning_modules.rewards.network import EmbeddingReward, Precision, PreprocessingMode
from lightning_modules.rewards.preprocessing import Preprocessing
from lightning_modules.rewards.towers import (
    OPEN_CLIP_CONFIG,
    OPEN_CLIP_WEIGHTS,
    load_hf_clip,
    load_open_clip,
    open_clip_config,
    read_json,
)
from lightning_modules.weight_files import check_source, find

logger = logging.getLogger(__name__)


class CLIPScore(EmbeddingReward):
    """Cosine between image and prompt, about 0.2 to 0.4; a prompt beyond the tower's length (77 tokens) is cut.

    "published" prepares images as the model's own files say, by Pillow; "differentiable" keeps their geometry.

    Args:
        pretrained: Folder or hub id of a CLIP, in the layout of open_clip (open_clip_config.json) or of transformers
            (config.json), or a weight file of open_clip, for example DFN5B's open_clip_pytorch_model.bin.
        model: What a weight file is, by its name in open_clip, for example ViT-H-14-quickgelu. Not needed where
            open_clip_config.json lies beside the file.
        quick_gelu: The activation of a weight file's network. Null: as its config or its name says; a file or folder
            that is named after one of open_clip's checkpoints, such as DFN5B, is run as that one was trained. DMDR
            was published with a DFN5B that was run with GELU: false repeats that.
        logit_scale: Multiply by the model's own scale, about 100.
        preprocessing: "published", or "differentiable" for gradients.
        precision: Of the matrices; the scores are float32.
        chunk_size: Images scored at once.
    """

    def __init__(
        self,
        pretrained: str,
        model: str | None = None,
        quick_gelu: bool | None = None,
        logit_scale: bool = False,
        preprocessing: PreprocessingMode = "published",
        precision: Precision = "float32",
        chunk_size: int = 16,
    ) -> None:
        super().__init__(preprocessing, precision, chunk_size)
        file = Path(pretrained)
        if file.is_file():
            if model is not None or not (file.parent / OPEN_CLIP_CONFIG).is_file():
                open_clip_config("CLIPScore.model", model)
        else:
            check_source("CLIPScore.pretrained", pretrained, (OPEN_CLIP_CONFIG, "config.json"))
            if model is not None or quick_gelu is not None:
                raise ValueError(
                    f"CLIPScore: model is {model!r} and quick_gelu is {quick_gelu}, but {pretrained!r} is not a weight "
                    "file: a folder or a hub id says itself what it is."
                )
        self.pretrained = pretrained
        self.model = model
        self.quick_gelu = quick_gelu
        self.logit_scale = logit_scale

    def build(self) -> tuple[nn.Module, Preprocessing]:
        option, file = "CLIPScore.pretrained", Path(self.pretrained)
        if file.is_file():
            return load_open_clip(option, file, weight_file_config(file, self.model, self.quick_gelu))
        config = find(option, self.pretrained, (OPEN_CLIP_CONFIG, "config.json"))
        if config.name == OPEN_CLIP_CONFIG:
            file = find(option, self.pretrained, OPEN_CLIP_WEIGHTS)
            return load_open_clip(option, file, read_open_clip_config(option, config))
        return load_hf_clip(option, self.pretrained)

    def score_pixels(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        cosine = cosine_score(self.network.encode_images(pixels).float(), self.text_features(prompts))
        return cosine * self.network.clip.logit_scale.exp() if self.logit_scale else cosine


def weight_file_config(file: Path, model: str | None, quick_gelu: bool | None) -> dict[str, Any]:
    """What a weight file of open_clip is: the config beside it, or the model's by name with what its own name tells.

    Raises:
        ValueError: if neither says what it is.
    """
    beside = file.parent / OPEN_CLIP_CONFIG
    if model is None and beside.is_file():
        config = read_open_clip_config("CLIPScore.pretrained", beside)
    else:
        config = {"model_cfg": open_clip_config("CLIPScore.model", model)}
        if published := published_checkpoint(file, str(model)):
            tag, settings = published
            config["preprocess_cfg"] = settings
            config["model_cfg"]["quick_gelu"] = settings.get("quick_gelu", False)
            logger.info(
                "CLIPScore: %s is run as open_clip's %s: %s, resize %s",
                file,
                tag,
                "QuickGELU" if settings.get("quick_gelu") else "GELU",
                settings["resize_mode"],
            )
    if quick_gelu is not None:
        config["model_cfg"]["quick_gelu"] = quick_gelu
    return config


def published_checkpoint(file: Path, model: str) -> tuple[str, dict[str, Any]] | None:
    """The checkpoint of open_clip's own table after which a file or its folder is named, and its settings there."""
    from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model

    name = letters(file.parent.name + file.name).replace("appleclip", "dfn5b")  # DMDR's file: Apple_CLIP-H-14-224.bin
    for tag in sorted(list_pretrained_tags_by_model(model), key=len, reverse=True):
        settings = get_pretrained_cfg(model, tag)
        url = letters(Path(settings.get("url", "")).stem)
        if letters(tag) in name or (url and url in name):
            return tag, settings
    return None


def letters(name: str) -> str:
    """A name without what its spellings differ in."""
    return re.sub("[^a-z0-9]", "", name.lower())


def read_open_clip_config(option: str, file: Path) -> dict[str, Any]:
    """An open_clip_config.json.

    Raises:
        ValueError: if it describes no model.
    """
    config = read_json(option, file)
    if not {"vision_cfg", "text_cfg"} <= set(config.get("model_cfg", {})):
        raise ValueError(f"{option}: {str(file)!r} has no model_cfg with vision_cfg and text_cfg; copy it anew.")
    return config
