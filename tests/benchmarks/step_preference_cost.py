"""Cost of one pair of a step-aware preference model at real size, by part, counted: for the method's page.

python -m tests.benchmarks.step_preference_cost
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from torch.utils.flop_counter import FlopCounterMode

from lightning_modules.step_preference_model import StepPreferenceModel
from tests.methods.test_step_preference_cost import FAMILIES, build, count_step


def tflop(run: Callable[[], object]) -> tuple[float, object]:
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops() / 1e12, result


def main() -> None:
    StepPreferenceModel.trainer = property(lambda self: self._trainer)
    for name, (family, save, size) in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            module = build(save(Path(folder) / name), family)
            images, t = torch.empty(2, 3, size, size, device="meta"), torch.zeros(1, device="meta", dtype=torch.long)
            backbone = module.backbone
            encoder, moments = tflop(lambda: backbone.encode_moments(images))  # noqa: B023 (called at once)
            latents = moments.chunk(2, dim=1)[0]
            text, embeddings = tflop(lambda: {p: dict(backbone.encode_prompts([p])) for p in ("a", "")})  # noqa: B023
            batch = {"prompts": ["a"], "moments": moments, "embeddings": embeddings}
            decoder, _ = tflop(lambda: backbone.decode_latents(latents))  # noqa: B023
            estimates, pixels = tflop(lambda: module.noised_pixels(batch, latents, latents[:1], t))  # noqa: B023
            with torch.device("meta"):
                tiny = AutoencoderTiny()
            fast, _ = tflop(lambda: tiny.decode(latents))  # noqa: B023
            forward, features = tflop(lambda: module.features(pixels, ["a"], t))  # noqa: B023
            backward, _ = tflop(lambda: sum(f.sum() for f in features).backward())  # noqa: B023
            print(
                f"{name}: VAE encoder {encoder:.3f}, two prompts {text:.3f}, denoiser {estimates - decoder:.3f}, VAE "
                f"decoder {decoder:.3f} (tiny decoder {fast:.3f}), CLIP forward {forward:.3f}, backward {backward:.3f}"
            )
            for cached in (False, True):
                source = "a cache" if cached else "pixels"
                print(f"{name}, from {source}: {count_step(module, size, cached):.2f} TFLOP per pair")


if __name__ == "__main__":
    main()
