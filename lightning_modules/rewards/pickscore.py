"""PickScore: a CLIP ViT-H/14 tuned on the choices of Pick-a-Pic, arXiv:2305.01569."""

from torch import Tensor, nn

from lightning_modules.functional.scores import cosine_score
from lightning_modules.rewards.network import EmbeddingReward, Precision, PreprocessingMode
from lightning_modules.rewards.preprocessing import Preprocessing
from lightning_modules.rewards.towers import load_hf_clip
from lightning_modules.weight_files import check_source


class PickScore(EmbeddingReward):
    """How people who wrote the prompt would like the image; a prompt beyond 77 tokens is cut.

    The plain cosine is about 0.19 to 0.24, and is what Diffusion-DPO's code prints; papers print it times
    exp(logit_scale), about 20 to 23. "differentiable" preprocessing cuts the same square as the published one.

    Args:
        pretrained: Folder or hub id of the weights, in transformers' layout.
        processor: Folder or hub id of the tokenizer and image processor; the authors use that of the CLIP they tuned.
        logit_scale: Multiply by the model's own scale, for numbers like the papers'.
        preprocessing: "published", or "differentiable" for gradients.
        precision: Of the matrices; the scores are float32.
        chunk_size: Images scored at once.
    """

    def __init__(
        self,
        pretrained: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        logit_scale: bool = False,
        preprocessing: PreprocessingMode = "published",
        precision: Precision = "float32",
        chunk_size: int = 16,
    ) -> None:
        super().__init__(preprocessing, precision, chunk_size)
        check_source("PickScore.pretrained", pretrained, "config.json")
        check_source("PickScore.processor", processor, "preprocessor_config.json")
        self.pretrained = pretrained
        self.processor = processor
        self.logit_scale = logit_scale

    def build(self) -> tuple[nn.Module, Preprocessing]:
        return load_hf_clip("PickScore.pretrained", self.pretrained, self.processor)

    def score_pixels(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        cosine = cosine_score(self.network.encode_images(pixels).float(), self.text_features(prompts))
        return cosine * self.network.clip.logit_scale.exp() if self.logit_scale else cosine
