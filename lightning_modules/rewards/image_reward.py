"""ImageReward, arXiv:2304.05977: BLIP (ViT-L/16, and BERT that looks at the image in every layer) and a small head."""

from pathlib import Path

from torch import Tensor, nn

from lightning_modules.rewards.network import NetworkReward, Precision, PreprocessingMode
from lightning_modules.rewards.preprocessing import Preprocessing
from lightning_modules.weight_files import build_empty, check_file, check_source, find, fit, read_weights

# By which the published code normalises what the head says; the mean and spread over its data.
MEAN, STD = 0.16717362830052426, 1.0333394966054072
MAX_TOKENS = 35
HEAD_WIDTH = 64  # of every attention head, in both transformers

# Names in ImageReward.pt -> names in transformers' BLIP. Not used, and dropped: the projections of BLIP's contrast.
VISION_NAMES = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "blocks.": "encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.qkv.": ".self_attn.qkv.",
    ".attn.proj.": ".self_attn.projection.",
    "norm.": "post_layernorm.",
}
UNUSED = ("blip.vision_proj.", "blip.text_proj.")


class ImageRewardNetwork(nn.Module):
    """What ImageReward.pt holds the weights of, at the published size unless told otherwise.

    Args:
        image_size: Side of the images.
        patch_size: Side of a patch.
        vision_width: Of the image transformer.
        vision_layers: Its layers.
        text_width: Of BERT.
        text_layers: Its layers.
        text_inner: Width inside BERT's layers.
        vocabulary: Its tokens: those of bert-base-uncased and two of BLIP's.
        positions: Its positions.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        vision_width: int = 1024,
        vision_layers: int = 24,
        text_width: int = 768,
        text_layers: int = 12,
        text_inner: int = 3072,
        vocabulary: int = 30524,
        positions: int = 512,
    ) -> None:
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=vision_width,
                intermediate_size=4 * vision_width,
                num_hidden_layers=vision_layers,
                num_attention_heads=vision_width // HEAD_WIDTH,
                image_size=image_size,
                patch_size=patch_size,
                hidden_act="gelu",
                layer_norm_eps=1e-6,
            )
        )
        self.text = BlipTextModel(
            BlipTextConfig(
                vocab_size=vocabulary,
                hidden_size=text_width,
                encoder_hidden_size=vision_width,
                intermediate_size=text_inner,
                num_hidden_layers=text_layers,
                num_attention_heads=text_width // HEAD_WIDTH,
                max_position_embeddings=positions,
                hidden_act="gelu",
                layer_norm_eps=1e-12,
                is_decoder=True,  # builds the cross-attention; the attention among the tokens stays two-sided
            ),
            add_pooling_layer=False,
        )
        self.head = nn.Sequential(
            nn.Linear(text_width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Pixels (B, 3, S, S), tokens and mask (B, L) -> (B,) what the head says, before the normalisation."""
        patches = self.vision(pixel_values=pixels).last_hidden_state
        text = self.text(input_ids=tokens, attention_mask=mask, encoder_hidden_states=patches, is_decoder=False)
        return self.head(text.last_hidden_state[:, 0].float()).squeeze(-1)


def from_published(name: str) -> str:
    """The network's name of a weight in ImageReward.pt."""
    if name.startswith("blip.visual_encoder."):
        name = name.removeprefix("blip.visual_encoder.")
        for theirs, ours in VISION_NAMES.items():
            if name.startswith(theirs) or (theirs.startswith(".") and theirs in name):
                name = name.replace(theirs, ours, 1)
        return f"vision.{name}"
    return name.replace("blip.text_encoder.", "text.", 1).replace("mlp.layers.", "head.", 1)


def sizes_of(weights: dict[str, Tensor]) -> dict[str, int]:
    """Sizes of the network that a state dict in the published layout belongs to.

    Raises:
        KeyError: if one of the weights that tell is missing.
    """
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    vision_width, _, patch_size, _ = weights[f"{vision}patch_embed.proj.weight"].shape
    patches = weights[f"{vision}pos_embed"].shape[1] - 1
    vocabulary, text_width = weights[f"{text}embeddings.word_embeddings.weight"].shape
    return {
        "image_size": round(patches**0.5) * patch_size,
        "patch_size": patch_size,
        "vision_width": vision_width,
        "vision_layers": sum(name.startswith(vision) and name.endswith(".norm1.weight") for name in weights),
        "text_width": text_width,
        "text_layers": sum(name.startswith(text) and name.endswith(".intermediate.dense.bias") for name in weights),
        "text_inner": weights[f"{text}encoder.layer.0.intermediate.dense.bias"].shape[0],
        "vocabulary": vocabulary,
        "positions": weights[f"{text}embeddings.position_embeddings.weight"].shape[0],
    }


class ImageReward(NetworkReward):
    """How people who wrote the prompt would rate the image: about 0 on average, 1 a spread better.

    The prompt is cut to 35 tokens. Its features depend on the image, so that none can be kept. "differentiable"
    preprocessing cuts the same square as the published one, as the authors' ReFL does.

    Args:
        weights: ImageReward.pt of THUDM/ImageReward.
        tokenizer: Folder or hub id of BERT's tokenizer (vocab.txt or tokenizer.json).
        preprocessing: "published", or "differentiable" for gradients.
        precision: Of the matrices; the scores are float32.
        chunk_size: Images scored at once.
    """

    def __init__(
        self,
        weights: str,
        tokenizer: str = "google-bert/bert-base-uncased",
        preprocessing: PreprocessingMode = "published",
        precision: Precision = "float32",
        chunk_size: int = 16,
    ) -> None:
        super().__init__(preprocessing, precision, chunk_size)
        check_file("ImageReward.weights", weights)
        check_source("ImageReward.tokenizer", tokenizer, ("vocab.txt", "tokenizer.json"))
        self.weights = weights
        self.tokenizer_source = tokenizer

    def build(self) -> tuple[nn.Module, Preprocessing]:
        from transformers import BertTokenizer

        option, file = "ImageReward.weights", Path(self.weights)
        weights = read_weights(option, file)
        try:
            sizes = sizes_of(weights)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{option}: {self.weights!r} is no ImageReward.pt ({error} is missing or of another shape); it has "
                f"{', '.join(sorted(weights)[:3])}, ..."
            ) from error
        network = build_empty(lambda: ImageRewardNetwork(**sizes))
        named = {from_published(name): value for name, value in weights.items() if not name.startswith(UNUSED)}
        fit(option, file, named, network)
        find("ImageReward.tokenizer", self.tokenizer_source, ("vocab.txt", "tokenizer.json"))
        self.tokenizer = BertTokenizer.from_pretrained(self.tokenizer_source)
        if len(self.tokenizer) > sizes["vocabulary"]:
            raise ValueError(
                f"ImageReward.tokenizer: {self.tokenizer_source!r} has {len(self.tokenizer)} tokens, but the network "
                f"knows {sizes['vocabulary']}; expected the tokenizer of bert-base-uncased."
            )
        return network, Preprocessing(sizes["image_size"], crop_rounding="even")

    def score_pixels(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        text = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(pixels.device)
        return (self.network(pixels, text.input_ids, text.attention_mask).float() - MEAN) / STD
