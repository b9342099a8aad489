"""The cache of moments and embeddings: it trains as pixels do, and says what is wrong with it."""

import contextlib
import json
import logging
import shutil
from collections import namedtuple
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from peft import LoraConfig
from torch.utils.flop_counter import FlopCounterMode

from datamodules import cache_filling
from datamodules.cache import Cache, changes, read_header
from datamodules.pickapic_shards import PickAPicShardsDataModule
from datamodules.toy_world.data import ToyPairs
from lightning_modules.backbones.sd3 import SD3
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.cli.caching import CachingTrainer
from lightning_modules.diffusion_orpo import DiffusionORPO
from lightning_modules.diffusion_sft import DiffusionSFT
from tests.datamodules.caches import QUIET, dpo, fill, pairs, train
from tests.datamodules.files import encoded, pair_columns, write_jsonl_pairs, write_pair_folder, write_parquet
from tests.datamodules.tars import samples as tar_samples
from tests.datamodules.tars import write_tar
from tests.methods.test_diffusion_dpo_cost import build
from tests.pairs import RandomPairs
from tests.real_size import save_sd15_configs


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(3, verbose=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Nine training pairs, three of them ties, and three to validate on."""
    folder = tmp_path_factory.mktemp("pairs")
    write_parquet(folder / "train.parquet", 9)
    write_parquet(folder / "validation.parquet", 4, caption=["caption 1", "caption 4", "held out", "held out"])
    return folder


@pytest.fixture(scope="module")
def filled(sd15, source, tmp_path_factory) -> Path:
    """A float32 cache of all rows of `source`, ties included, with flips."""
    data = pairs(source, ties="keep", validation_split="validation")
    return fill(tmp_path_factory.mktemp("cache") / "filled", dpo(sd15), data)


@pytest.fixture
def copy(filled, tmp_path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "copy"))


# Rounding: the encoders saw other batches. Pixels encoded with another chunk_size differ as much (SDXL: weights 2e-5).
LOSSES, WEIGHTS = 4e-5, 1e-4  # of losses near 0.7 (SD3 rounds most: its errors are near 4), of weights moved by 0.1


def assert_same_run(cached, pixels):
    assert [batch["ids"] for batch in cached.batches] == [batch["ids"] for batch in pixels.batches]
    assert len(pixels.losses) == 4
    assert cached.losses == pytest.approx(pixels.losses, abs=LOSSES)
    assert cached.validation.keys() == pixels.validation.keys()
    assert cached.validation["val/loss"] == pytest.approx(pixels.validation["val/loss"], abs=LOSSES)
    for name, tensor in pixels.weights.items():
        torch.testing.assert_close(cached.weights[name], tensor, rtol=0, atol=WEIGHTS)


# -------------------------------------------------------------------------------------------- the same as from pixels

FAMILIES = {
    "sd15": (SD15, {}),
    "sdxl": (SDXL, {"size_conditions": "constant"}),
    "sdxl real sizes, empty prompt zero": (SDXL, {"size_conditions": "real", "zero_empty_prompt": True}),
    "sd3": (SD3, {"max_sequence_length": 32}),
}


@pytest.mark.parametrize("augmentation", ["separate", "joint"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_from_the_cache_is_training_from_pixels(family, augmentation, source, request, tmp_path):
    pretrained = request.getfixturevalue(family.split()[0])
    backbone, options = FAMILIES[family]
    settings = {"augmentation": augmentation, "validation_split": "validation"}
    folder = fill(tmp_path / "cache", dpo(pretrained, backbone, **options), pairs(source, **settings))
    pixels = train(dpo(pretrained, backbone, **options), pairs(source, **settings))
    cached = train(dpo(pretrained, backbone, **options), pairs(source, **settings, cache=str(folder)))
    assert "images" not in cached.batches[0]
    assert_same_run(cached, pixels)


# Measured on these runs, the losses of four steps differ by up to 5e-6 (SD 1.5) and 3e-4 (SDXL) with float16, and by
# 1e-5 and 3e-3 with bfloat16; with float32 by 4e-6.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_half_precision_stays_close(family, dtype, tolerance, source, request, tmp_path):
    pretrained, backbone = request.getfixturevalue(family), FAMILIES[family][0]
    folder = fill(tmp_path / "cache", dpo(pretrained, backbone), pairs(source), dtype=dtype)
    pixels = train(dpo(pretrained, backbone), pairs(source))
    cached = train(dpo(pretrained, backbone), pairs(source, cache=str(folder)))
    assert cached.losses == pytest.approx(pixels.losses, abs=tolerance)
    assert cached.losses != pixels.losses
    assert cached.batches[0]["moments"].dtype == getattr(torch, dtype)
    assert cached.batches[0]["embeddings"][""]["prompt_embeds"].dtype == torch.float32


def test_mixed_precision_trains_from_what_it_would_encode(sd15, source, tmp_path):
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(source), {"precision": "bf16-mixed"})
    pixels = train(dpo(sd15), pairs(source), precision="bf16-mixed")
    cached = train(dpo(sd15), pairs(source, cache=str(folder)), precision="bf16-mixed")
    assert cached.losses == pytest.approx(pixels.losses, abs=1e-3)


CASES = {
    "separate": {},
    "joint": {"augmentation": "joint"},
    "no flips": {"horizontal_flip": False},
    "ties kept": {"ties": "keep"},
    "ties won by the first": {"ties": "first"},
    "ties tossed at every visit": {"ties": "coin"},
    "turned labels": {"label_noise": 0.5},
    "preferred only": {"preferred_only": True},
    "preferred only, joint, ties tossed": {"preferred_only": True, "ties": "coin", "augmentation": "joint"},
    "preferred only, turned labels": {"preferred_only": True, "label_noise": 0.5},
    "workers": {"num_workers": 2},
    "fewer": {"max_train_samples": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_batches_are_those_of_pixels(case, sd15, source, tmp_path):
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(source, **CASES[case]))
    make = (lambda: DiffusionSFT(SD15(str(sd15)))) if "preferred" in case else (lambda: dpo(sd15))
    pixels = train(make(), pairs(source, **CASES[case]), max_steps=6)
    model = make()
    cached = train(model, pairs(source, **CASES[case], cache=str(folder)), max_steps=6)
    for expected, batch in zip(pixels.batches, cached.batches, strict=True):
        assert set(batch) == set(expected) - {"images"} | {"moments", "embeddings"}
        assert (batch["ids"], batch["prompts"]) == (expected["ids"], expected["prompts"])
        for name in {"label", "weight", "original_sizes", "crops"} & set(expected):
            assert torch.equal(batch[name], expected[name])
        torch.testing.assert_close(batch["moments"], model.backbone.encode_moments(expected["images"]))
        assert set(batch["embeddings"]) == {"", *batch["prompts"]}
        for prompt, embedding in batch["embeddings"].items():
            torch.testing.assert_close(embedding, dict(model.backbone.encode_prompts([prompt])))
    crops = torch.cat([batch["crops"] for batch in pixels.batches])
    assert crops.unique(dim=0).tolist() == [[3, 0]]  # 16 x 22 after the resize


def test_flips_move_the_crop_as_with_pixels(sd15, tmp_path):
    wide = [encoded(i, width=58, height=40) for i in range(18)]  # 23 wide after the resize: 7 too many
    file = write_parquet(tmp_path / "train.parquet", 9, jpg_0=wide[:9], jpg_1=wide[9:])
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(file))
    pixels, cached = train(dpo(sd15), pairs(file)), train(dpo(sd15), pairs(file, cache=str(folder)))
    crops = torch.cat([batch["crops"] for batch in cached.batches])
    assert torch.equal(crops, torch.cat([batch["crops"] for batch in pixels.batches]))
    assert len(crops.unique(dim=0)) == 2  # an odd margin is on the left, or mirrored on the right


def test_each_of_several_captions_is_drawn_as_with_pixels(sd15, tmp_path):
    captions = [[f"caption {i}", f"another {i}", "shared"] for i in range(9)]
    file = write_parquet(tmp_path / "train.parquet", 9, caption=captions)
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(file))
    pixels, cached = train(dpo(sd15), pairs(file)), train(dpo(sd15), pairs(file, cache=str(folder)))
    assert [batch["prompts"] for batch in cached.batches] == [batch["prompts"] for batch in pixels.batches]
    assert cached.losses == pytest.approx(pixels.losses, abs=LOSSES)
    assert len(Cache(folder).prompts) == 1 + 6 * 2 + 1  # the empty one; six rows are no ties


@pytest.mark.parametrize("kind", ["jsonl", "folder", "single images", "two folders", "tars", "streamed", "toy"])
def test_other_sources_train_alike(kind, sd15, tmp_path):
    settings = {}
    if kind == "jsonl":
        settings["source"] = write_jsonl_pairs(tmp_path / "jsonl").parent
    elif kind == "folder":
        settings["source"] = write_pair_folder(tmp_path / "folder", ("cat", "dog", "bird"))
    elif kind == "single images":
        columns = pair_columns(6)
        columns = {"caption": columns["caption"], "image": columns["jpg_0"]}
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(columns), tmp_path / "train.parquet")
        settings |= {"source": tmp_path / "train.parquet", "preferred_only": True}
    elif kind == "two folders":  # two rows are train.parquet:0
        settings["source"] = tmp_path / "data"
        for part, seed in (("en", 0), ("fr", 50)):
            images = {f"jpg_{i}": [encoded(seed + 2 * row + i) for row in range(6)] for i in (0, 1)}
            write_parquet(tmp_path / "data/train" / part / "data.parquet", 6, **images)
    elif kind == "streamed":
        for part in (0, 1):
            write_parquet(tmp_path / f"data/train-{part}.parquet", 6)
        settings |= {"source": tmp_path / "data", "streaming": True, "cache_dir": str(tmp_path / "streams")}

    def data(**more):
        if kind == "toy":
            size = {"num_pairs": 8, "num_val_pairs": 2, "batch_size": 2}
            return ToyPairs(source="world", preference="both", folder=str(tmp_path), **size, **more)
        if kind == "tars":
            tars = [str(write_tar(tmp_path / f"{i}.tar", tar_samples(5, 5 * i))) for i in (0, 1)]
            return PickAPicShardsDataModule(tars, cache_dir=str(tmp_path / "tars"), resolution=16, batch_size=2, **more)
        return pairs(**settings, **more)

    def model():
        return DiffusionSFT(SD15(str(sd15))) if kind == "single images" else dpo(sd15)

    folder = fill(tmp_path / "cache", model(), data())
    pixels, cached = train(model(), data()), train(model(), data(cache=str(folder)))
    assert [batch["ids"] for batch in cached.batches] == [batch["ids"] for batch in pixels.batches]
    assert cached.losses == pytest.approx(pixels.losses, abs=LOSSES)


def test_other_methods_train_from_it(sd15, source, filled):
    def orpo():
        adapters = LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian")
        return DiffusionORPO(SD15(str(sd15), lora=adapters), optimizer=lambda p: torch.optim.SGD(p, lr=0.1))

    settings = {"ties": "keep", "validation_split": "validation"}
    cached = train(orpo(), pairs(source, **settings, cache=str(filled)))
    assert_same_run(cached, train(orpo(), pairs(source, **settings)))


def test_encoders_are_not_run_in_training(sd15, source, filled):
    calls = []

    class Spy(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            backbone = pl_module.backbone
            for module in (backbone.vae.encoder, backbone.text_encoder):
                module.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))

    settings = {"validation_split": "validation", "ties": "keep"}
    run = train(dpo(sd15), pairs(source, **settings), callbacks=[Spy()])
    assert {"Encoder", "CLIPTextModel"} <= set(calls)
    calls.clear()
    run = train(dpo(sd15), pairs(source, **settings, cache=str(filled)), callbacks=[Spy()])
    assert run.validation
    assert calls == []


def test_no_image_is_decoded_in_training(sd15, source, filled, monkeypatch):
    monkeypatch.setattr("datamodules.pickapic.decode_image", lambda *_: pytest.fail("decoded an image"))
    assert len(train(dpo(sd15), pairs(source, ties="keep", cache=str(filled))).losses) == 4


def test_cost_of_a_step_is_that_of_latents(sd15, source, filled):
    class Count(pl.Callback):
        def __init__(self):
            self.counts = []

        def on_train_batch_start(self, *_):
            self.counter = FlopCounterMode(display=False)
            self.counter.__enter__()

        def on_train_batch_end(self, *_):
            self.counter.__exit__(None, None, None)
            self.counts.append(self.counter.get_total_flops())

    def cost(**settings):
        count = Count()
        model = dpo(sd15)
        train(model, pairs(source, ties="keep", **settings), callbacks=[count])
        assert len(set(count.counts)) == 1
        return count.counts[0], model.backbone

    pixels, backbone = cost()
    with FlopCounterMode(display=False) as encoders:
        backbone.encode_images(torch.zeros(4, 3, 16, 16))
        backbone.encode_prompts(["a", "b"])
    cached, _ = cost(cache=str(filled))
    assert cached == pixels - encoders.get_total_flops()


def test_cost_at_real_size(tmp_path):
    module = build(save_sd15_configs(tmp_path / "sd15"), lora=True)
    module.log_window = lambda metrics: None
    ones = torch.ones(1, device="meta")
    batch = {"prompts": ["a"], "label": ones, "weight": ones}
    costs = []
    for encoded_or_not in (
        {"images": torch.empty(2, 3, 512, 512, device="meta")},
        {
            "moments": torch.empty(2, 8, 64, 64, device="meta", dtype=torch.float16),
            "embeddings": {prompt: {"prompt_embeds": torch.empty(1, 77, 768, device="meta")} for prompt in ("", "a")},
        },
    ):
        with FlopCounterMode(display=False) as counter:
            module.training_step(batch | encoded_or_not, 0).backward()
        costs.append(counter.get_total_flops() / 1e12)
    assert costs[1] <= 5.1  # as from latents, tests/methods/test_diffusion_dpo_cost.py
    assert costs[0] - costs[1] == pytest.approx(2.24, abs=0.01)  # the VAE, and the text encoder


# ---------------------------------------------------------------------------------------------------- a part of a cache


@pytest.mark.parametrize(
    "settings",
    [{"ties": "drop"}, {"ties": "first"}, {"max_train_samples": 5, "ties": "keep"}, {"horizontal_flip": False}],
    ids=str,
)
def test_a_part_of_a_cache_serves(settings, sd15, source, filled):
    pixels, cached = train(dpo(sd15), pairs(source, **settings)), None
    cached = train(dpo(sd15), pairs(source, **settings, cache=str(filled)))
    assert cached.losses == pytest.approx(pixels.losses, abs=LOSSES)


def test_a_cache_of_pairs_serves_fine_tuning_on_the_preferred(sd15, source, filled):
    def model():
        return DiffusionSFT(SD15(str(sd15)))

    pixels = train(model(), pairs(source, preferred_only=True))
    cached = train(model(), pairs(source, preferred_only=True, cache=str(filled)))
    assert cached.losses == pytest.approx(pixels.losses, abs=LOSSES)


def test_training_and_validating_on_one_split(sd15, source, tmp_path):
    settings = {"validation_split": "train", "max_train_samples": 3, "max_val_samples": 3}
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(source, **settings))
    pixels = train(dpo(sd15), pairs(source, **settings))
    cached = train(dpo(sd15), pairs(source, **settings, cache=str(folder)))
    assert_same_run(cached, pixels)
    (split,) = Cache(folder).header["splits"].values()
    assert 3 <= split["rows"] <= 6


def test_resuming_from_the_cache_is_exact(sd15, source, filled, tmp_path):
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.fit_loop.epoch_loop.total_batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    def data():
        return pairs(source, ties="keep", cache=str(filled), num_workers=2)

    settings = {"max_steps": 4, "accumulate_grad_batches": 2}
    whole = train(dpo(sd15), data(), callbacks=[Save()], **settings)
    resumed = train(dpo(sd15), data(), checkpoint=tmp_path / "middle.ckpt", **settings)
    assert resumed.losses == whole.losses[3:]
    assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items())


def test_a_run_may_go_on_from_the_cache(sd15, source, filled, tmp_path):
    """The order of samples is the same, so that a run that began with pixels continues from the cache."""

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole = train(dpo(sd15), pairs(source, ties="keep"), callbacks=[Save()])
    data = pairs(source, ties="keep", cache=str(filled))
    resumed = train(dpo(sd15), data, checkpoint=tmp_path / "middle.ckpt")
    assert resumed.losses == pytest.approx(whole.losses[2:], abs=LOSSES)


# ------------------------------------------------------------------------------------------------------------- filling


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_finished_cache_is_left_alone(sd15, source, copy, caplog):
    caplog.set_level(logging.INFO)
    before = {file: file.stat().st_mtime_ns for file in copy.iterdir()}
    fill(copy, dpo(sd15), pairs(source, ties="keep", validation_split="validation"))
    assert {file: file.stat().st_mtime_ns for file in copy.iterdir()} == before
    assert "7 shards, of which 7 are there and 0.0 MiB are to be made" in caplog.text


def test_missing_shards_are_made_again_alike(sd15, source, filled, copy):
    for name in ("images-train-00000004-00000007.safetensors", "prompts-00000000-00000003.safetensors"):
        (copy / name).unlink()
    (copy / ".prompts-00000000-00000003.safetensors.17.part").write_bytes(b"half a sh")
    fill(copy, dpo(sd15), pairs(source, ties="keep", validation_split="validation"))
    assert contents(copy) == contents(filled)


@pytest.mark.parametrize("finished", range(5))
def test_killed_before_the_first_shard(finished, sd15, source, filled, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    write, names = cache_filling.write_file, []

    def write_or_die(file, content):
        if len(names) == finished:
            file.with_name(f".{file.name}.17.part").write_bytes(content[:5])
            raise Killed
        names.append(file.name)
        write(file, content)

    data = {"ties": "keep", "validation_split": "validation"}
    monkeypatch.setattr(cache_filling, "write_file", write_or_die)
    with pytest.raises(Killed):
        fill(tmp_path / "cache", dpo(sd15), pairs(source, **data))
    assert names == ["rows-train.json", "rows-validation.json", "prompts.json", "cache.json"][:finished]
    monkeypatch.undo()
    assert contents(fill(tmp_path / "cache", dpo(sd15), pairs(source, **data))) == contents(filled)


def test_workers_fill_alike(sd15, source, filled, tmp_path):
    data = pairs(source, ties="keep", validation_split="validation", num_workers=2)
    assert contents(fill(tmp_path / "cache", dpo(sd15), data)) == contents(filled)


def test_sizes_are_told_beforehand_and_hold(sd15, source, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(source), dtype="float16")
    # 6 rows x 2 images x 2 versions x 8 x 8 x 8 numbers; 7 prompts x 77 x 8
    expected = 2 * (6 * 2 * 2 * 512 + 7 * 77 * 8)
    assert f"{expected / 2**20:.1f} MiB in 4 shards" in caplog.text
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert expected <= size <= expected + 4 * 1000  # checksums, sizes and safetensors' headers


def test_the_denoiser_is_not_needed(sd15, source, tmp_path):
    model = dpo(sd15)
    fill(tmp_path / "cache", model, pairs(source))
    assert sum(p.numel() for p in model.backbone.denoiser.parameters()) == 2
    assert model.backbone.pipeline.unet is None


def test_differences_are_told_by_name():
    before = {"a": 1, "encoders": {"vae": "x", "text": "y"}, "gone": 2}
    now = {"a": 2, "encoders": {"vae": "x", "text": "z"}, "new": 3}
    assert changes(before, now) == ["a 1 -> 2", "encoders text y -> z", "gone 2 -> (none)", "new (none) -> 3"]
    assert changes(before, before) == []


# ---------------------------------------------------------------------------------------------------------- bad inputs


def message(function, *arguments, **settings) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        function(*arguments, **settings)
    return str(caught.value)


def test_random_crops_cannot_be_cached(sd15, source, tmp_path):
    assert "random_crop: true shows another part" in message(pairs, source, random_crop=True, cache="x")
    model, data = dpo(sd15), pairs(source, random_crop=True)
    assert "random_crop: false" in message(fill, tmp_path / "cache", model, data)
    assert not (tmp_path / "cache").exists()
    assert not model.backbone.loaded


# What is changed, and what the message must say; none may be noticed only after the networks have been loaded.
STALE_DATA = {
    "resolution": ({"resolution": 24}, "resolution 16 -> 24"),
    "augmentation": ({"augmentation": "joint"}, "augmentation separate -> joint"),
    "validation": ({"validation_split": "test"}, "holds nothing of the split 'test', only train, validation"),
}


@pytest.mark.parametrize("case", STALE_DATA)
def test_stale_cache_says_what_changed(case, sd15, source, filled, tmp_path):
    shutil.copytree(source, tmp_path / "data")
    write_parquet(tmp_path / "data/test.parquet", 3)
    settings, expected = STALE_DATA[case]
    model = dpo(sd15)
    text = message(train, model, pairs(tmp_path / "data", ties="keep", **settings, cache=str(filled)))
    assert expected in text
    assert "python main.py cache" in text
    assert not model.backbone.loaded


def test_cache_without_flips_does_not_serve_flips(sd15, source, tmp_path):
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(source, horizontal_flip=False))
    text = message(train, dpo(sd15), pairs(source, cache=str(folder)))
    assert "horizontal_flip of split 'train' False -> True" in text


def test_validation_images_do_not_serve_training_with_flips(sd15, source, filled):
    text = message(train, dpo(sd15), pairs(source, split="validation", cache=str(filled)))
    assert "horizontal_flip of split 'validation' False -> True" in text


def test_preferred_images_do_not_serve_pairs(sd15, source, tmp_path):
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(source, preferred_only=True))
    assert "images preferred -> pairs" in message(train, dpo(sd15), pairs(source, cache=str(folder)))


def test_turned_labels_ask_for_images_that_were_not_encoded(sd15, tmp_path):
    file = write_parquet(tmp_path / "train.parquet", 6)
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(file, preferred_only=True))
    write_parquet(file, 6, label_0=[1.0, 0.5, 1.0, 0.0, 0.5, 0.0])
    model = DiffusionSFT(SD15(str(sd15)))
    text = message(train, model, pairs(file, preferred_only=True, cache=str(folder)))
    assert "2 of 4 rows of split 'train' are not in the cache" in text
    assert f"first {file}, row 0" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"pretrained": "sd15_other"}, r"encoders vae \w+ -> \w+; encoders text_encoder \w+ -> \w+"),
        ({"vae": "sd15_other"}, r"encoders vae \w+ -> \w+\. Fill"),
        ({"precision": "bf16-mixed"}, "compute_dtype float32 -> bfloat16"),
        ({"pretrained": "sdxl"}, "family SD15 -> SDXL"),
    ],
    ids=["pipeline", "vae", "precision", "family"],
)
def test_other_encoders_are_refused(change, expected, sd15, source, filled, tmp_path, request):
    from tests.tiny import save_sd15

    folders = {"sd15_other": lambda: save_sd15(tmp_path / "other", seed=1), "sdxl": lambda: sdxl}
    sdxl = request.getfixturevalue("sdxl")
    pretrained = folders[change["pretrained"]]() if "pretrained" in change else sd15
    options = {"vae": str(folders[change["vae"]]())} if "vae" in change else {}
    model = dpo(pretrained, SDXL if pretrained == sdxl else SD15, **options)
    settings = {"precision": change["precision"]} if "precision" in change else {}
    with pytest.raises(ValueError, match=expected):
        train(model, pairs(source, ties="keep", cache=str(filled)), **settings)


def test_other_tokenizer_is_refused(sd15, source, filled, tmp_path):
    pretrained = shutil.copytree(sd15, tmp_path / "sd15")
    file = pretrained / "tokenizer/tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"by other encoders: encoders tokenizer \w+ -> \w+\. Fill"):
        train(dpo(pretrained), pairs(source, ties="keep", cache=str(filled)))


def test_zeroed_empty_prompt_is_another_encoder(sdxl, source, tmp_path):
    folder = fill(tmp_path / "cache", dpo(sdxl, SDXL), pairs(source))
    with pytest.raises(ValueError, match=r"empty_prompt \(none\) -> zeros"):
        train(dpo(sdxl, SDXL, zero_empty_prompt=True), pairs(source, cache=str(folder)))


def test_rows_that_are_not_there_are_counted(sd15, source, tmp_path):
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(source, max_train_samples=4))
    model = dpo(sd15)
    text = message(train, model, pairs(source, cache=str(folder)))
    assert "2 of 6 rows of split 'train' are not in the cache" in text
    assert "which holds 4; first " in text
    assert "train.parquet, row " in text
    assert not model.backbone.loaded


def test_changed_images_are_noticed(sd15, tmp_path):
    file = write_parquet(tmp_path / "train.parquet", 6)
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(file))
    images = pair_columns(6)["jpg_1"]
    write_parquet(file, 6, jpg_1=[*images[:3], encoded(99), *images[4:]])
    text = message(train, dpo(sd15), pairs(file, cache=str(folder)))
    assert f"of other images: 1 images of split 'train', first 'jpg_1' of {file}, row 3: " in text
    assert " bytes" in text


def test_changed_streamed_files_are_noticed(sd15, tmp_path):
    """What lies in their images is not looked at; that the files are others, is."""
    file, settings = write_parquet(tmp_path / "data/train.parquet", 6), {"streaming": True}
    settings |= {"cache_dir": str(tmp_path / "streams")}
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(file.parent, **settings))
    write_parquet(file, 6, label_0=[1.0] * 6)
    text = message(train, dpo(sd15), pairs(file.parent, **settings, cache=str(folder)))
    assert "is stale, it was made of other data: files of split 'train' " in text


def test_changed_captions_are_noticed(sd15, tmp_path):
    file = write_parquet(tmp_path / "train.parquet", 6)
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(file))
    write_parquet(file, 6, caption=[f"caption {i}" for i in range(3)] + ["new", "new", "newer"])
    text = message(train, dpo(sd15), pairs(file, cache=str(folder)))
    assert "2 of 4 captions of split 'train' are not in the cache" in text
    assert "first 'new'" in text


SHARD = "images-train-00000004-00000007.safetensors"
PROMPTS = "prompts-00000000-00000003.safetensors"


def flip_bit(file: Path, place: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


DAMAGE = {
    "truncated shard": (lambda copy: (copy / SHARD).write_bytes((copy / SHARD).read_bytes()[:-9]), "is damaged (Error"),
    "empty shard": (lambda copy: (copy / PROMPTS).write_bytes(b""), "is damaged (Error while deserializing"),
    "shard that is none": (lambda copy: (copy / SHARD).write_bytes(b"no tensors" * 9), "is damaged (Error"),
    "missing shard": (
        lambda copy: (copy / SHARD).unlink(),
        f"1 of the 7 shards of the cache * are missing, first {SHARD}",
    ),
    "shard of another kind": (
        lambda copy: shutil.copy(copy / PROMPTS, copy / SHARD),
        "is damaged (it holds {",
    ),
    "missing rows": (lambda copy: (copy / "rows-train.json").unlink(), "rows-train.json is missing"),
    "damaged rows": (lambda copy: flip_bit(copy / "rows-train.json", 20), "rows-train.json is damaged"),
    "damaged prompts": (lambda copy: flip_bit(copy / "prompts.json", 8), "prompts.json is damaged"),
    "no header": (lambda copy: (copy / "cache.json").unlink(), "There is no cache in "),
    "half a header": (
        lambda copy: (copy / "cache.json").write_text('{"format": 1, '),
        "cache.json is damaged (Expecting",
    ),
    "poor header": (lambda copy: (copy / "cache.json").write_text('{"format": 1}'), "is damaged, or was edited: "),
    "foreign header": (lambda copy: (copy / "cache.json").write_text('["x"]'), "is no header of a cache"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_cache_is_refused_before_the_networks_are_loaded(case, sd15, source, copy):
    damage, expected = DAMAGE[case]
    damage(copy)
    model = dpo(sd15)
    text = message(train, model, pairs(source, ties="keep", cache=str(copy)))
    for part in expected.split("*"):
        assert part in text
    assert "python main.py cache" in text
    assert not model.backbone.loaded


def edit_header(folder: Path, **changed) -> None:
    file = folder / "cache.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def test_header_of_a_newer_format_is_refused(sd15, source, copy):
    edit_header(copy, format=2)
    for text in (
        message(train, dpo(sd15), pairs(source, cache=str(copy))),
        message(fill, copy, dpo(sd15), pairs(source, ties="keep", validation_split="validation")),
    ):
        assert "has format 2, this version reads format 1" in text


def test_edited_header_is_refused(sd15, source, copy):
    edit_header(copy, compute_dtype="bfloat16")
    text = message(train, dpo(sd15), pairs(source, cache=str(copy)))
    assert "cache.json is damaged, or was edited: its checksum does not agree" in text


def test_no_flipped_bit_of_the_header_is_overlooked(copy):
    file = copy / "cache.json"
    content, expected = file.read_bytes(), read_header(copy)
    for place in range(0, 8 * len(content), 11):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        found = None
        with contextlib.suppress(ValueError):
            found = read_header(copy)
        assert found in (None, expected)  # the same after a bit of a blank


def test_shard_of_another_cache_is_refused(sd15, source, copy, tmp_path):
    other = fill(tmp_path / "other", dpo(sd15), pairs(source))
    shutil.copy(other / PROMPTS, copy / PROMPTS)
    text = message(train, dpo(sd15), pairs(source, cache=str(copy)))
    assert f"{PROMPTS} belongs to another cache than cache.json beside it" in text


@pytest.mark.parametrize(("name", "place"), [(SHARD, -700), (PROMPTS, -700)])
def test_flipped_bit_is_noticed_where_it_is_read(name, place, sd15, source, copy):
    flip_bit(copy / name, place)
    text = message(train, dpo(sd15), pairs(source, ties="keep", cache=str(copy)), max_steps=9)
    assert f"{name} is damaged (the checksum of" in text
    assert "Delete this file and run `python main.py cache`" in text


@pytest.mark.parametrize(
    ("settings", "options", "expected"),
    [
        ({"resolution": 24}, {}, "views resolution 16 -> 24"),
        ({"augmentation": "joint"}, {}, "views augmentation separate -> joint"),
        ({"horizontal_flip": False}, {}, "splits train flips True -> False"),
        ({"ties": "drop"}, {}, "splits train rows 9 -> 6"),
        ({"validation_split": None}, {}, "splits validation {"),
        ({}, {"dtype": "float16"}, "dtype float32 -> float16"),
        ({}, {"rows_per_shard": 5}, "rows_per_shard 4 -> 5"),
    ],
    ids=str,
)
def test_cache_of_something_else_is_not_continued(settings, options, expected, sd15, source, copy):
    data = pairs(source, **{"ties": "keep", "validation_split": "validation"} | settings)
    before, model = contents(copy), dpo(sd15)
    text = message(fill, copy, model, data, **options)
    assert "holds a cache of something else: " in text
    assert expected in text
    assert not model.backbone.loaded
    assert contents(copy) == before


def test_cache_of_other_encoders_is_not_continued(source, copy, tmp_path):
    from tests.tiny import save_sd15

    data = pairs(source, ties="keep", validation_split="validation")
    text = message(fill, copy, dpo(save_sd15(tmp_path / "other", seed=1)), data)
    assert "holds a cache of something else: encoders vae" in text


def test_folder_of_other_things_is_not_filled(sd15, source, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_bytes(b"")
    assert "holds other things (cat.png) and no cache" in message(fill, tmp_path / "photos", dpo(sd15), pairs(source))
    assert "is a file; expected a folder" in message(fill, tmp_path / "photos/cat.png", dpo(sd15), pairs(source))


def test_scores_may_be_there_first(sd15, source, tmp_path):
    (tmp_path / "cache/scores/pickscore").mkdir(parents=True)
    fill(tmp_path / "cache", dpo(sd15), pairs(source))


def test_no_folder_to_fill(sd15, source):
    with pytest.raises(ValueError, match="There is no folder to fill: give `--folder`"):
        CachingTrainer(**QUIET).cache(dpo(sd15), pairs(source))


def test_folder_in_the_config_is_filled(sd15, source, tmp_path):
    CachingTrainer(**QUIET).cache(dpo(sd15), pairs(source, cache=str(tmp_path / "cache")))
    assert len(train(dpo(sd15), pairs(source, cache=str(tmp_path / "cache"))).losses) == 4


def test_folder_that_cannot_be_written(sd15, source):
    text = message(fill, Path("/proc/cache"), dpo(sd15), pairs(source))  # permission bits do not hold for root
    assert "The cache /proc/cache cannot be written" in text
    assert "`--folder`" in text


def test_disk_without_room_is_refused_before_anything_is_encoded(sd15, source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10, 10, 1000)
    monkeypatch.setattr(cache_filling.shutil, "disk_usage", lambda folder: usage)
    text = message(fill, tmp_path / "cache", dpo(sd15), pairs(source))
    assert "has 0.0 MiB free, but the cache needs another 0.1 MiB" in text
    assert list((tmp_path / "cache").iterdir()) == []


def test_disk_that_fills_up_keeps_what_is_finished(sd15, source, filled, tmp_path, monkeypatch):
    write, count = cache_filling.write_file, []

    def write_or_fail(file, content):
        count.append(file)
        if len(count) == 7:
            raise OSError(28, "No space left on device")
        write(file, content)

    data = {"ties": "keep", "validation_split": "validation"}
    monkeypatch.setattr(cache_filling, "write_file", write_or_fail)
    text = message(fill, tmp_path / "cache", dpo(sd15), pairs(source, **data))
    assert "could not be written: No space left on device. Finished shards are kept" in text
    assert len(contents(tmp_path / "cache")) == 6
    monkeypatch.undo()
    assert contents(fill(tmp_path / "cache", dpo(sd15), pairs(source, **data))) == contents(filled)


def test_numbers_that_do_not_fit_are_an_error(sd15, source, tmp_path):
    model = dpo(sd15)
    model.backbone.encode_moments = lambda images: torch.full((len(images), 8, 8, 8), 1e6)
    text = message(fill, tmp_path / "cache", model, pairs(source), dtype="float16")
    assert "train.parquet, row 0: the moments are not finite in float16. Store them with `--dtype bfloat16`" in text
    fill(tmp_path / "wide", model, pairs(source), dtype="bfloat16")


def test_damaged_image_is_named_while_filling(sd15, tmp_path):
    images = [encoded(i) for i in range(6)]
    file = write_parquet(tmp_path / "train.parquet", 6, jpg_0=[*images[:3], images[3][:99], *images[4:]])
    assert "row 3 (prompt 'caption 3'): 'jpg_0' is a damaged image" in message(
        fill, tmp_path / "cache", dpo(sd15), pairs(file)
    )


@pytest.mark.parametrize("number", [0, -1])
def test_shards_hold_at_least_a_row(number, sd15, source, tmp_path):
    text = message(fill, tmp_path / "cache", dpo(sd15), pairs(source), rows_per_shard=number)
    assert f"rows_per_shard is {number}; expected 1 or more" in text


def test_what_cannot_be_cached_says_so(sd15, source, tmp_path):
    trainer = CachingTrainer(**QUIET)
    assert "RandomPairs cannot be cached" in message(trainer.cache, dpo(sd15), RandomPairs(), "x")
    assert "BoringModel has no backbone" in message(trainer.cache, BoringModel(), pairs(source), "x")
    assert "no checkpoint holds encoders" in message(trainer.cache, dpo(sd15), pairs(source), "x", ckpt_path="last")
