"""What scorers with a frozen network share: loading once, chunks, precision, and text features that are kept."""

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_modules.rewards.base import Reward
from lightning_modules.rewards.preprocessing import Preprocessing

PreprocessingMode = Literal["published", "differentiable"]
Precision = Literal["float32", "bfloat16", "float16"]


class NetworkReward(Reward):
    """A scorer with frozen weights. It never trains, whatever module holds it.

    Args:
        preprocessing: "published" prepares images as the authors do, through 8 bits; "differentiable" by antialiased
            bicubic interpolation of the tensor, which gradients pass.
        precision: Of the matrices and of what is computed; norms and scores are float32 in any case.
        chunk_size: Images scored at once, to bound memory; the scores do not depend on it.
    """

    def __init__(self, preprocessing: PreprocessingMode, precision: Precision, chunk_size: int) -> None:
        super().__init__()
        name = type(self).__name__
        if preprocessing not in ("published", "differentiable"):
            raise ValueError(f"{name}: preprocessing is {preprocessing!r}; expected published or differentiable.")
        if precision not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"{name}: precision is {precision!r}; expected float32, bfloat16 or float16.")
        if chunk_size < 1:
            raise ValueError(f"{name}: chunk_size is {chunk_size}; expected 1 or more images.")
        self.preprocessing = preprocessing
        self.differentiable = preprocessing == "differentiable"
        self.dtype = getattr(torch, precision)
        self.chunk_size = chunk_size
        self.network: Any = None
        self.prepare: Preprocessing | None = None

    @abstractmethod
    def build(self) -> tuple[nn.Module, Preprocessing]:
        """The network with its weights, and the authors' preprocessing."""

    @abstractmethod
    def score_pixels(self, pixels: Tensor, prompts: list[str]) -> Tensor:
        """(B,) scores of (B, 3, S, S) prepared images, under autocast in `precision`."""

    def differentiable_preprocessing(self, published: Preprocessing) -> Preprocessing:
        """What "differentiable" means for this scorer."""
        return published.differentiable()

    def load(self, device: torch.device | None = None) -> None:
        if self.network is not None:
            return
        with torch.inference_mode(False):  # what is made in inference mode could never take part in a gradient
            network, published = self.build()
            self.prepare = self.differentiable_preprocessing(published) if self.differentiable else published
            self.network = to_low_precision(network.requires_grad_(False).eval(), self.dtype).to(device or "cpu")

    def score(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.in_chunks(images, prompts, self.score_pixels)

    def in_chunks(self, images: Tensor, prompts: list[str], compute: Callable[[Tensor, list[str]], Tensor]) -> Tensor:
        """(B, ...) float32 of what `compute` makes of each chunk of prepared images and their prompts."""
        device = next(self.network.parameters()).device
        chunks = [slice(start, start + self.chunk_size) for start in range(0, len(images), self.chunk_size)]
        low = self.dtype != torch.float32
        # Set here either way, so that a trainer's precision never changes a score.
        with torch.autocast(device.type, dtype=self.dtype if low else None, enabled=low):
            return torch.cat([compute(self.prepare(images[c].to(device)), prompts[c]).float() for c in chunks])

    def train(self, mode: bool = True) -> "NetworkReward":
        return super().train(False)


class EmbeddingReward(NetworkReward):
    """A scorer that compares features of the image with features of the text; the latter are kept, prompt by prompt.

    Args:
        preprocessing: See `NetworkReward`.
        precision: See `NetworkReward`.
        chunk_size: See `NetworkReward`; as many prompts are encoded at once.
    """

    kept_texts: ClassVar[int] = 4096  # the least recently used go first

    def __init__(self, preprocessing: PreprocessingMode, precision: Precision, chunk_size: int) -> None:
        super().__init__(preprocessing, precision, chunk_size)
        self._texts: OrderedDict[str, Tensor] = OrderedDict()

    def text_features(self, texts: list[str]) -> Tensor:
        """(B, ...) float32 features of texts, without gradient; each text is encoded once."""
        features = {text: self._texts[text] for text in texts if text in self._texts}
        new = [text for text in dict.fromkeys(texts) if text not in features]
        with torch.inference_mode(False), torch.no_grad():  # kept for later calls, which may need gradients
            for start in range(0, len(new), self.chunk_size):
                some = new[start : start + self.chunk_size]
                features |= zip(some, self.network.encode_texts(some).float(), strict=True)
        for text in dict.fromkeys(texts):
            self._texts[text] = features[text]
            self._texts.move_to_end(text)
        while len(self._texts) > self.kept_texts:
            self._texts.popitem(last=False)
        return torch.stack([features[text] for text in texts])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EmbeddingReward":
        self._texts.clear()  # they lie on the device that the network leaves
        return super()._apply(fn, recurse)


def to_low_precision(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Hold the matrices and convolutions in `dtype`; norms, embeddings and scalars stay float32.

    Autocast would cast the same weights at every call.
    """
    if dtype != torch.float32:
        for layer in network.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.MultiheadAttention):
                layer.to(dtype)
    return network
