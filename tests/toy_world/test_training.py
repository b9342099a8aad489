"""The losses and modules that make the parts of the toy pipeline, and the parts that they leave behind."""

import json
import math

import pytest
import torch
from lightning.pytorch import Trainer

from datamodules.toy_world.autoencoder import ToyAutoencoder, autoencoder_loss
from datamodules.toy_world.clip import ToyCLIP, contrastive_loss
from datamodules.toy_world.data import PIPELINE, ToyImages
from datamodules.toy_world.networks import build_tokenizer, build_unet
from datamodules.toy_world.scenes import all_scenes, train_scenes
from datamodules.toy_world.ship import ship


def test_an_error_on_a_grey_pixel_counts_once_and_on_a_saturated_one_six_times():
    grey = torch.zeros(1, 3, 2, 2)
    red = torch.tensor([1.0, -1.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    nothing = torch.zeros(1)
    assert autoencoder_loss(grey + 0.5, grey, nothing).item() == pytest.approx(0.25)
    assert autoencoder_loss(red + 0.5, red, nothing).item() == pytest.approx(6 * 0.25)


def test_the_divergence_is_counted_per_pixel_value():
    images = torch.zeros(1, 3, 2, 2)
    assert autoencoder_loss(images, images, torch.tensor([12.0])).item() == pytest.approx(1e-3)


def test_the_contrastive_loss_of_a_model_that_knows_nothing_counts_the_choices():
    positive = torch.eye(2, 4)
    loss = contrastive_loss(torch.zeros(2, 4), positive)
    # An image chooses among 4 captions, a caption among 2 images.
    torch.testing.assert_close(loss, torch.full((2,), (math.log(4) + math.log(2)) / 2))


def test_the_contrastive_loss_forgives_either_of_two_right_captions():
    similarity = torch.tensor([[9.0, 9.0], [9.0, 9.0]])
    assert contrastive_loss(similarity, torch.ones(2, 2))[0].item() == pytest.approx(math.log(2))
    assert contrastive_loss(similarity * torch.eye(2), torch.eye(2)).max() < 0.01


def test_every_caption_fits_the_tokenizer_and_every_other_text_has_tokens(tmp_path):
    tokenizer = build_tokenizer([scene.caption for scene in train_scenes()], tmp_path)
    for scene in all_scenes():
        tokens = tokenizer(scene.caption).input_ids
        assert len(tokens) <= tokenizer.model_max_length
        assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == scene.caption
    tokens = tokenizer("Zebra, ünïcode!").input_ids
    assert tokens.count(tokenizer.unk_token_id) == 1  # the end


def test_the_tokenizer_is_the_same_at_every_call(tmp_path):
    captions = [scene.caption for scene in train_scenes()]
    vocabularies = [build_tokenizer(captions, tmp_path / str(i)).get_vocab() for i in range(4)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    assert (tmp_path / "0" / "merges.txt").read_text() == (tmp_path / "3" / "merges.txt").read_text()


def test_the_shipped_clip_and_text_encoder_share_their_tokenizer():
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (PIPELINE / "tokenizer" / name).read_bytes() == (PIPELINE.with_name("clip") / name).read_bytes()


def fit_two_steps(module, folder):
    trainer = Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, ToyImages(num_images=16, batch_size=4))
    return trainer.callback_metrics


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """What the first two runs leave behind, after two steps each."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    metrics = fit_two_steps(ToyAutoencoder(output=str(folder / "pipeline")), folder)
    metrics |= fit_two_steps(ToyCLIP(output=str(folder / "clip"), pipeline=str(folder / "pipeline")), folder)
    return folder, metrics


def test_the_two_runs_leave_a_pipeline_that_diffusers_opens_in_full_precision(parts):
    from diffusers import StableDiffusionPipeline

    folder, metrics = parts
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline")
    assert {pipeline.vae.dtype, pipeline.text_encoder.dtype, pipeline.unet.dtype} == {torch.float32}
    assert pipeline.vae.config.scaling_factor == pytest.approx(1 / metrics["val/latent_std"].item(), rel=1e-4)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(["a red circle"], num_inference_steps=2, generator=generator, output_type="pt").images
    assert images.shape == (1, 3, 32, 32)


def test_weights_are_stored_in_half_precision(parts):
    from safetensors.torch import load_file

    folder, _ = parts
    files = list(folder.rglob("*.safetensors"))
    assert len(files) == 4
    assert {tensor.dtype for file in files for tensor in load_file(file).values() if tensor.is_floating_point()} == {
        torch.float16
    }


def test_the_text_encoder_is_the_text_tower_of_the_clip(parts):
    from transformers import CLIPModel, CLIPTextModel

    folder, _ = parts
    clip = CLIPModel.from_pretrained(folder / "clip")
    encoder = CLIPTextModel.from_pretrained(folder / "pipeline" / "text_encoder")
    tokens = torch.tensor([[1, 2, 3, 4]])
    expected = clip.text_model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(encoder(input_ids=tokens).last_hidden_state, expected)


def test_the_clip_processor_sees_the_pixels_that_the_clip_was_trained_on(parts):
    from transformers import CLIPImageProcessor

    folder, _ = parts
    processor = CLIPImageProcessor.from_pretrained(folder / "clip")
    image = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, image.float() / 127.5 - 1, atol=1e-5, rtol=0)


def test_shipping_takes_the_parts_and_the_trained_unet(parts, tmp_path):
    from diffusers import UNet2DConditionModel

    folder, _ = parts
    torch.manual_seed(5)
    trained = build_unet()
    trained.save_pretrained(tmp_path / "trained")
    ship(folder, tmp_path / "trained", tmp_path / "shipped")
    shipped = UNet2DConditionModel.from_pretrained(tmp_path / "shipped" / "pipeline" / "unet")
    for name, weight in trained.state_dict().items():
        assert torch.equal(shipped.state_dict()[name], weight.half().float())
    assert json.loads((tmp_path / "shipped" / "clip" / "config.json").read_text())["model_type"] == "clip"


def test_training_pictures_are_a_function_of_the_seed_and_never_held_out():
    captions = []
    for seed in (0, 0, 1):
        data = ToyImages(num_images=300, seed=seed)
        data.setup("fit")
        captions.append(data._train.captions)
        assert not set(data._train.captions) & set(data._heldout.captions)
    assert captions[0] == captions[1] != captions[2]
