"""Human Preference Score v2 and v2.1, arXiv:2306.09341, and SRPO's relative score on it."""

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from lightning_modules.functional.scores import cosine_score, relative_score
from lightning_modules.rewards.base import check_inputs
from lightning_modules.rewards.network import EmbeddingReward, Precision, PreprocessingMode
from lightning_modules.rewards.preprocessing import Preprocessing
from lightning_modules.rewards.towers import load_open_clip, open_clip_config
from lightning_modules.weight_files import check_file


class HPSv2(EmbeddingReward):
    """How people prefer the image for the prompt: a cosine, about 0.24 to 0.30; papers print it times 100.

    v2.0 and v2.1 are the same network with other weights, and their numbers are not comparable.

    "published" resizes the longer edge and fills the square with black, on float tensors, as the authors do;
    antialiased, which their code is with torchvision 0.17 or newer and was not before. "differentiable" resizes both
    edges, as DMDR does; for square images the two differ by the rounding to 8 bits alone.

    Args:
        weights: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt, a state dict in open_clip's layout under the key
            `state_dict`.
        model: The network's name in open_clip.
        magic_prompt: Put before every prompt, with a blank between; DMDR uses "Realistic photo".
        preprocessing: "published", or "differentiable" for gradients.
        precision: Of the matrices; the scores are float32.
        chunk_size: Images scored at once.
    """

    def __init__(
        self,
        weights: str,
        model: str = "ViT-H-14",
        magic_prompt: str = "",
        preprocessing: PreprocessingMode = "published",
        precision: Precision = "float32",
        chunk_size: int = 16,
    ) -> None:
        super().__init__(preprocessing, precision, chunk_size)
        check_file("HPSv2.weights", weights)
        open_clip_config("HPSv2.model", model)
        self.weights = weights
        self.model = model
        self.magic_prompt = magic_prompt

    def build(self) -> tuple[nn.Module, Preprocessing]:
        config = {"model_cfg": open_clip_config("HPSv2.model", self.model)}
        towers, preprocessing = load_open_clip("HPSv2.weights", Path(self.weights), config)
        return towers, replace(preprocessing, fit="pad", pil=False)

    def differentiable_preprocessing(self, published: Preprocessing) -> Preprocessing:
        return replace(published.differentiable(), fit="squash")

    def score_pixels(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        texts = [f"{self.magic_prompt} {prompt}" if self.magic_prompt else prompt for prompt in prompts]
        return cosine_score(self.network.encode_images(pixels).float(), self.text_features(texts))

    def relative(self, images: Tensor, prompts: list[str], positive: str, negative: str, k: float = 0.1) -> Tensor:
        """How much more the images look like "positive. prompt" than like "negative. prompt"; see `relative_score`.

        Args:
            images: (B, 3, H, W) in [0, 1].
            prompts: B prompts. The magic prompt is not used.
            positive: A wanted word, such as Realistic.
            negative: An unwanted one, such as Painting.
            k: What is left of the plain score.

        Returns:
            (B,) float32 scores on the device of the images.
        """
        check_inputs("HPSv2", images, prompts)
        self.load(images.device)
        features = self.in_chunks(images, prompts, lambda pixels, _: self.network.encode_images(pixels))
        wanted, unwanted = ([f"{word}. {prompt}" for prompt in prompts] for word in (positive, negative))
        score = relative_score(features, self.text_features(wanted), self.text_features(unwanted), k)
        return score.to(images.device)
