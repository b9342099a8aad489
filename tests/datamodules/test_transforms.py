import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.pickapic import PickAPicDataModule, collate_images, collate_pairs
from datamodules.sampling import sample_generator
from datamodules.transforms import decode_image, view_image, view_pair_jointly
from tests.datamodules.files import encoded, picture, write_parquet
from tests.golden_cases import assert_golden, case_names, load_case


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def first_sample(tmp_path, jpg_0: torch.Tensor, jpg_1: torch.Tensor, label_0: float, position: int = 0, **settings):
    """The whole way from a parquet file to a batch of one, as training goes it."""
    file = write_parquet(
        tmp_path / f"{label_0}.parquet",
        num_rows=1,
        jpg_0=[jpg_0.numpy().tobytes()],
        jpg_1=[jpg_1.numpy().tobytes()],
        label_0=[label_0],
    )
    data = PickAPicDataModule(str(file), **settings)
    data.setup("fit")
    return data.train_samples()[0, position]


@pytest.mark.parametrize("case", case_names("diffusion_dpo", "pair_preprocess_lora_sdxl_"))
def test_golden_joint_preprocessing(case, tmp_path):
    tensors, params = load_case("diffusion_dpo", case)
    position = next(p for p in range(100) if (sample_generator(0, p).random() < 0.5) == params["flipped"])
    sample = first_sample(
        tmp_path,
        tensors["jpg_0"],
        tensors["jpg_1"],
        float(params["label_0"]),
        position=position,
        resolution=params["resolution"],
        augmentation="joint",
    )
    batch = collate_pairs([sample])
    assert_golden(
        "diffusion_dpo",
        case,
        pixels=torch.cat(list(batch["images"])),
        original_size=batch["original_sizes"][0],
        crop_top_left=batch["crops"][0],
    )
    assert torch.equal(batch["original_sizes"][0], batch["original_sizes"][1])
    assert torch.equal(batch["crops"][0], batch["crops"][1])


@pytest.mark.parametrize(
    "case",
    sorted(
        set(case_names("diffusion_dpo", "pair_preprocess_")) - set(case_names("diffusion_dpo", "pair_preprocess_lora"))
    ),
)
def test_golden_separate_preprocessing(case, tmp_path):
    tensors, params = load_case("diffusion_dpo", case)
    outputs = {}
    for label in (1, 0):
        common = {"resolution": params["resolution"], "horizontal_flip": False}
        args = (tmp_path, tensors["jpg_0"], tensors["jpg_1"], float(label))
        outputs[f"pixels_label{label}"] = torch.cat(list(collate_pairs([first_sample(*args, **common)])["images"]))
        preferred = collate_images([first_sample(*args, preferred_only=True, **common)])
        outputs[f"sft_pixels_label{label}"] = preferred["images"][0]
    assert_golden("diffusion_dpo", case, pixels_label0_ai_feedback=outputs["pixels_label1"], **outputs)


def test_view_equals_torchvision_transforms():
    from torchvision import transforms

    published = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    for size in ((40, 56), (57, 43), (32, 32), (20, 91), (33, 32)):
        image = picture(0, *size)
        pixels, original_size, _ = view_image(image, 32, False, False, generator())
        assert torch.equal(pixels, published(image))
        assert original_size == size[::-1]


@pytest.mark.parametrize("flip", [False, True])
def test_reported_crop_finds_the_view_in_the_resized_image(flip):
    image = picture(3, width=64, height=32)  # resizing to 32 leaves it as it is
    for seed in range(20):
        pixels, _, (top, left) = view_image(
            image, 32, random_crop=True, horizontal_flip=flip, generator=generator(seed)
        )
        assert top == 0
        shown = np.asarray(image)
        found = [
            mirrored
            for mirrored, whole in ((False, shown), (True, shown[:, ::-1]))
            if torch.equal(pixels, torch.from_numpy(whole[:, left : left + 32].copy()).permute(2, 0, 1) / 255 * 2 - 1)
        ]
        assert found
        assert flip or found == [False]


def test_random_crops_cover_all_offsets_and_half_the_views_are_flipped():
    image = Image.new("RGB", (40, 32))
    crops = [view_image(image, 32, True, False, generator(seed)).crop for seed in range(300)]
    assert {left for _, left in crops} == set(range(9))
    ramp = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8)[None, :, None], (32, 1, 3)))
    flips = [bool(view_image(ramp, 32, False, True, generator(seed)).pixels[0, 0, 0] > -1) for seed in range(1000)]
    assert 0.45 < np.mean(flips) < 0.55


def test_joint_views_share_crop_and_flip():
    image = picture(1, width=80, height=50)
    for seed in range(20):
        first, second = view_pair_jointly(image, image, 32, True, True, generator(seed))
        assert torch.equal(first.pixels, second.pixels)
        assert first[1:] == second[1:]


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_formats_are_decoded_to_rgb(format):
    image = decode_image(encoded(0, format), 32)
    assert (image.mode, image.size) == ("RGB", (40, 56))


def test_grey_and_transparent_images_become_rgb(tmp_path):
    for mode in ("L", "RGBA", "P", "1", "CMYK"):
        file = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        picture(0).convert(mode).save(file)
        assert decode_image(file, 32).mode == "RGB"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_bytes_raise_only_value_errors():
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "BMP"):
        whole = encoded(0, format)
        for _ in range(300):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), rng.integers(1, 20)):
                data[place] = rng.integers(256)
            with contextlib.suppress(ValueError):
                decode_image(bytes(data[: rng.integers(1, len(data) + 1)]), 32)
