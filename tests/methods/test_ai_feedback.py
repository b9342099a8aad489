"""AI feedback: a reward decides which image of a pair is preferred, while training or before it."""

import shutil
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from peft import LoraConfig

from datamodules.scores import labels_of
from datamodules.transforms import decode_image
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.cli.app import run
from lightning_modules.diffusion_dpo import DiffusionDPO, second_is_better, swap_pairs
from lightning_modules.rewards.base import Reward, score_each
from lightning_modules.rewards.clip import CLIPScore
from tests.datamodules.caches import dpo, fill, pairs, train
from tests.datamodules.files import encoded, write_parquet
from tests.datamodules.scoring import Redness
from tests.golden_cases import assert_golden, load_case
from tests.pairs import RandomPairs
from tests.rewards.tiny import TOY_CLIP
from tests.test_effects import ROOT, evaluate


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(3, verbose=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Nine pairs, three of them ties, of images of several sizes; and three to validate on."""
    folder = tmp_path_factory.mktemp("pairs")
    sizes = [(40, 56), (56, 40), (40, 56), (64, 48), (48, 48), (40, 56), (56, 40), (40, 40), (40, 56)]
    images = {f"jpg_{k}": [encoded(2 * i + k, "PNG", *sizes[(i + k) % 9]) for i in range(9)] for k in (0, 1)}
    write_parquet(folder / "train.parquet", 9, **images)
    write_parquet(folder / "validation.parquet", 4)
    return folder


# ---------------------------------------------------------------------------------------------------------- the rule


def test_rule_of_the_published_code():
    tensors, _ = load_case("diffusion_dpo", "ai_feedback_relabel")
    scores, pixels = tensors["scores"], tensors["pixels"]
    swap = second_is_better(scores)
    images = torch.cat([pixels[:, :3], pixels[:, 3:]])
    feed = torch.stack(swap_pairs(images, swap).chunk(2), dim=1)
    assert_golden("diffusion_dpo", "ai_feedback_relabel", swap=swap, feed=feed)
    assert np.array_equal(labels_of(scores.numpy()) == 0.0, swap.numpy())


def test_probability_by_the_difference_of_scores():
    # sigmoid(2 (1 - 0.5)) = sigmoid(1), sigmoid(0), and far beyond what exp can hold
    scores = np.array([[1.0, 0.5], [0.3, 0.3], [-1e6, 1e6], [1e6, -1e6]], dtype=np.float32)
    assert labels_of(scores, 2.0) == pytest.approx([0.7310585786, 0.5, 0.0, 1.0])


def test_images_of_several_sizes_are_scored_in_their_order():
    images = [torch.full((3, *size), value, dtype=torch.uint8) for size, value in (((4, 5), 255), ((2, 2), 51))]
    reward = Redness()
    scores = score_each(reward, [*images, images[0] // 5], ["a", "b", "c"])
    assert scores.tolist() == pytest.approx([1.0, 0.2, 0.2])
    assert reward._seen == [((3, 4, 5), "a"), ((3, 4, 5), "c"), ((3, 2, 2), "b")]


# ---------------------------------------------------------------------------------------------- while the model trains


def feedback(sd15: Path, reward: Reward, prompt_dropout: float = 0.3) -> DiffusionDPO:
    """As `dpo`, whose labels people give."""
    lora = LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian")
    return DiffusionDPO(
        SD15(str(sd15), lora=lora, num_inference_steps=2),
        beta=100.0,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        prompt_dropout=prompt_dropout,
        validation_draws=2,
        feedback=reward,
    )


@pytest.mark.parametrize("case", ["pair_preprocess_0", "pair_preprocess_1", "pair_preprocess_2"])
def test_stored_order_is_kept_for_the_scorer(case, tmp_path):
    tensors, params = load_case("diffusion_dpo", case)
    stored = {name: [tensors[name].numpy().tobytes()] for name in ("jpg_0", "jpg_1")}
    path = write_parquet(tmp_path / "train.parquet", 1, **stored, label_0=[0.0])
    data = pairs(path, resolution=params["resolution"], originals=True)
    sample = data._samples("train", data._open("train"), False, False, originals=True)[0]
    assert_golden("diffusion_dpo", case, pixels_label0_ai_feedback=torch.cat([view.pixels for view in sample["views"]]))
    for which, original in enumerate(sample["originals"]):
        assert torch.equal(original.permute(1, 2, 0), tensors[f"jpg_{which}_rgb"])
    assert sample["label"] == 0.0


def test_batches_hold_the_stored_images_in_stored_order(sd15, source):
    run = train(feedback(sd15, Redness()), pairs(source, originals=True, batch_size=3))
    rows = pairs(source)._load_rows("train").dataset
    for batch in run.batches:
        assert len(batch["originals"]) == 6
        for number, name in enumerate(batch["ids"]):
            values = rows[int(name.split(":")[1])]
            assert values["label_0"] == batch["label"][number] != 0.5
            for which in (0, 1):
                expected = np.array(decode_image(values[f"jpg_{which}"], 16))
                assert torch.equal(batch["originals"][number + 3 * which].permute(1, 2, 0), torch.tensor(expected))
    assert len({image.shape for batch in run.batches for image in batch["originals"]}) > 3


def test_pairs_are_put_in_the_order_of_the_scores(sd15):
    module = feedback(sd15, Redness())
    batch = RandomPairs(batch_size=3).make_batch(0)
    red = [0, 255, 50, 255, 0, 50]  # the second is redder, the first is, neither
    batch["originals"] = [torch.full((3, 4 + i, 5), value, dtype=torch.uint8) for i, value in enumerate(red)]
    batch["original_sizes"], batch["crops"] = torch.arange(12).view(6, 2), torch.arange(12).view(6, 2) + 20
    batch["label"] = torch.tensor([1.0, 0.0, 0.5])
    relabelled, agreement = module.relabel(batch)
    order = [3, 1, 2, 0, 4, 5]
    for name in ("images", "original_sizes", "crops"):
        assert torch.equal(relabelled[name], batch[name][order])
    assert relabelled["label"].tolist() == [1.0, 1.0, 1.0]
    assert relabelled["prompts"] == batch["prompts"]
    assert agreement.item() == pytest.approx((0 + 0 + 0.5) / 3)


def test_scorer_sees_whole_images_and_captions_that_are_not_dropped(sd15, source):
    reward = Redness()
    run = train(
        feedback(sd15, reward, prompt_dropout=1.0),
        pairs(source, originals=True, augmentation="joint", random_crop=True, resolution=8),
    )
    seen = {size for size, _ in reward._seen}
    assert seen == {tuple(image.shape) for batch in run.batches for image in batch["originals"]}
    assert {prompt for _, prompt in reward._seen} == {prompt for batch in run.batches for prompt in batch["prompts"]}


def test_labels_of_people_do_not_matter(sd15, source, tmp_path):
    rows = list(pairs(source)._load_rows("train").dataset)
    columns = {name: [row[name] for row in rows] for name in ("caption", "jpg_0", "jpg_1")}
    turned = write_parquet(tmp_path / "train.parquet", 9, **columns, label_0=[1.0 - row["label_0"] for row in rows])
    one = train(feedback(sd15, Redness()), pairs(source, originals=True))
    other = train(feedback(sd15, Redness()), pairs(turned, originals=True))
    assert one.losses == other.losses
    assert train(dpo(sd15), pairs(turned)).losses != train(dpo(sd15), pairs(source)).losses


def test_agreement_with_people_is_logged(sd15, source):
    class Same(Reward):
        def score(self, images, prompts):
            return torch.zeros(len(images))

    logged = []

    class Spy(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged.append((trainer.callback_metrics["train/feedback_agreement"].item(), batch["label"].mean().item()))

    train(feedback(sd15, Same()), pairs(source, originals=True), callbacks=[Spy()])
    assert [share for share, _ in logged] == [people for _, people in logged]  # of equal scores the first is preferred


def test_reward_with_weights_leaves_no_trace_in_checkpoints(sd15, source):
    module = feedback(sd15, CLIPScore(str(TOY_CLIP)))
    train(module, pairs(source, originals=True))
    assert any(name.startswith("feedback.network") for name, _ in module.named_parameters())
    assert not any(name.startswith("feedback") for name in module.trained_parameters())


def test_feedback_without_the_stored_images(sd15, source, monkeypatch):
    monkeypatch.setattr(SD15, "load", lambda *_, **__: pytest.fail("loaded the networks"))
    with pytest.raises(ValueError, match=r"model.feedback judges images as they are stored.*originals: true"):
        train(feedback(sd15, Redness()), pairs(source))


def test_feedback_from_a_cache_of_moments(sd15, source, tmp_path):
    folder = fill(tmp_path / "cache", dpo(sd15), pairs(source))
    with pytest.raises(ValueError, match=r"have them scored once, by `python main.py cache --rewards`.*labels_from"):
        train(feedback(sd15, Redness()), pairs(source, cache=str(folder)))


def test_stored_images_without_feedback(sd15, source):
    with pytest.raises(ValueError, match=r"this DiffusionDPO has none. Set `model.init_args.feedback`"):
        train(dpo(sd15), pairs(source, originals=True))


def test_wrong_weights_of_the_reward_stop_before_the_networks_are_loaded(sd15, source, tmp_path, monkeypatch):
    shutil.copytree(TOY_CLIP, tmp_path / "clip")
    (tmp_path / "clip/model.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(SD15, "load", lambda *_, **__: pytest.fail("loaded the networks"))
    with pytest.raises(ValueError, match=r"CLIPScore.pretrained"):
        train(feedback(sd15, CLIPScore(str(tmp_path / "clip"))), pairs(source, originals=True))


# ------------------------------------------------------------------------------------------------ on the embedded world


@pytest.mark.slow
def test_labels_of_a_reward_teach_what_those_of_the_oracle_do(tmp_path, monkeypatch):
    """Half of the labels are turned round, which teaches nothing; the oracle's vividness puts them right."""
    monkeypatch.chdir(ROOT)
    noise = "--data.init_args.label_noise=0.5"
    config = ["--config", "cli_configs/toy/dpo.yaml", noise]
    vividness = ["--rewards.vividness=ToyOracle", "--rewards.vividness.part=vividness"]
    run(["cache", *config, f"--folder={tmp_path}", "--encode=false", *vividness])
    result = evaluate("dpo", 0, noise, f"--data.init_args.labels_from={tmp_path}/scores/vividness")
    # With the oracle's own labels: 99 % and +0.136 (cli_configs/dpo/README.md).
    assert result["vividness"]["win_rate"] >= 0.95
    assert result["vividness"]["difference"] >= 0.11
    assert result["match"]["difference"] >= -0.02
