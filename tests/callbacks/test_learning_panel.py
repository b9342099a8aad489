"""The learning panel: its numbers, what it does to a run (nothing), and what it refuses."""

import csv
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import LoraConfig
from PIL import Image
from torch import Tensor

from callbacks.ema import EMA
from callbacks.learning_panel import FACTS, LearningPanel, gradient_norms, panel_metrics, spread, weight_change
from callbacks.panel_picture import Chart, draw_charts, ticks
from lightning_modules.backbones.sd15 import SD15
from lightning_modules.backbones.sdxl import SDXL
from lightning_modules.diffusion_dpo import DiffusionDPO
from lightning_modules.diffusion_orpo import DiffusionORPO
from lightning_modules.diffusion_sft import DiffusionSFT
from lightning_modules.functional.noise import per_sample_mse
from tests.callbacks.runs import make_module, make_trainer
from tests.datamodules.caches import fill, pairs
from tests.datamodules.files import encoded, write_parquet
from tests.pairs import RandomPairs

ROOT = Path(__file__).parents[2]
OPTIONS = {"limit_val_batches": 3, "val_check_interval": 2, "check_val_every_n_epoch": None, "num_sanity_val_steps": 1}


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(5, verbose=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_parquet(folder / "train.parquet", 9)
    write_parquet(folder / "validation.parquet", 9, caption=[f"caption {i % 2}" for i in range(9)])  # three are ties
    return folder


def watch(folder: Path, module: pl.LightningModule, panel: LearningPanel, data=None, **settings) -> pl.Trainer:
    """Train with a panel; its metrics are in `trainer.callback_metrics`."""
    pl.seed_everything(5, verbose=False)
    more = settings.pop("callbacks", [])
    trainer = make_trainer(folder, [panel, *more], **OPTIONS | settings)
    trainer.fit(module, datamodule=data or RandomPairs())
    return trainer


def panel_of(trainer: pl.Trainer) -> dict[str, float]:
    prefix = "val/panel/"
    found = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in found.items()}


def dpo(sd15: Path, loss_type: str = "sigmoid", beta: float = 100.0) -> DiffusionDPO:
    return DiffusionDPO(SD15(str(sd15)), beta=beta, loss_type=loss_type)


def orpo(sd15: Path, lora: bool = True, **settings) -> DiffusionORPO:
    adapters = LoraConfig(r=2, lora_alpha=4) if lora else None
    return DiffusionORPO(SD15(str(sd15), lora=adapters), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), **settings)


# --------------------------------------------------------------------------------------------------------- its numbers


def facts_of(prediction: Tensor, reference: Tensor, target: Tensor) -> dict[str, Tensor]:
    """FACTS of M pairs, (M,), from (2M, ...) tensors."""
    errors = [e for p in (prediction, reference) for e in per_sample_mse(p, target).chunk(2)]
    preferred, rejected = (prediction - target).chunk(2)
    drift = per_sample_mse(prediction, reference).view(2, -1).mean(0)
    between = per_sample_mse(preferred, rejected)
    return dict(zip(FACTS, [*errors, between, drift], strict=True))


METHODS = {
    "dpo": partial(dpo),
    "dpo hinge": partial(dpo, loss_type="hinge"),
    "dpo ipo": partial(dpo, loss_type="ipo"),
    "orpo": partial(orpo, beta=0.3),
    "orpo mapo": partial(orpo, variant="mapo"),
    "orpo odds ratio": partial(orpo, variant="odds_ratio", beta=0.01),
    "sft": lambda sd15: DiffusionSFT(SD15(str(sd15))),
}


@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_that_of_one_prediction_made_twice(method, sd15):
    """As autograd has it, where the two predictions of a pair are one tensor that is compared with two targets."""
    module = METHODS[method](sd15)
    torch.manual_seed(0)
    prediction = torch.randn(5, 4, 3, 3, dtype=torch.float64)
    target = torch.cat([prediction, prediction]) + 0.1 * torch.randn(10, 4, 3, 3, dtype=torch.float64)
    reference = torch.cat([prediction, prediction]) + 0.1 * torch.randn(10, 4, 3, 3, dtype=torch.float64)
    shared = prediction.clone().requires_grad_()
    loss, _ = module.pair_terms(per_sample_mse(torch.cat([shared, shared]), target), per_sample_mse(reference, target))
    expected = torch.autograd.grad(loss.sum(), shared)[0].flatten(1).norm(dim=1) * math.sqrt(36) / 2
    actual = gradient_norms(facts_of(torch.cat([prediction, prediction]), reference, target), module.pair_terms)
    assert actual.tolist() == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-12)


def test_metrics_of_known_errors(sd15):
    """Two pairs, two buckets, one draw; beta / 2 = 50."""
    values = {  # (pair, bucket)
        "error_preferred": [[0.10, 0.20], [0.30, 0.20]],
        "error_rejected": [[0.30, 0.20], [0.20, 0.24]],
        "reference_preferred": [[0.20, 0.20], [0.20, 0.20]],
        "reference_rejected": [[0.20, 0.20], [0.20, 0.20]],
        "between": [[0.36, 0.04], [0.16, 0.09]],
        "drift": [[0.01, 0.02], [0.03, 0.04]],
    }
    facts = {name: torch.tensor(rows, dtype=torch.float64)[..., None] for name, rows in values.items()}
    shares = torch.tensor([0.25, 0.75], dtype=torch.float64)
    metrics = panel_metrics(facts, shares, dpo(sd15).pair_terms)
    # margins: 0.2 and 0; -0.1 and 0.04; together 0.05 and 0.005
    expected = {
        "accuracy": [0.5, 0.75, 1.0],
        "margin": [0.05, 0.02, 0.0275],
        "decision": [2.5, 1.0, 1.375],
        "saturated": [0.5, 0.0, 0.125],  # sigmoid(-50 * 0.2) is below 0.05, sigmoid(-50 * 0.04) is not
        "error_preferred": [0.2, 0.2, 0.2],
        "error_rejected": [0.25, 0.22, 0.2275],
        "change_preferred": [0.0, 0.0, 0.0],
        "change_rejected": [0.05, 0.02, 0.0275],
        "drift": [0.02, 0.03, 0.0275],
    }
    # dL/de = 50 sigmoid(-50 m) for one image and the negative for the other; the norm is that times sqrt(between)
    pull = [[1 / (1 + math.exp(50 * m)) for m in row] for row in ([0.2, 0.0], [-0.1, 0.04])]
    size = [[0.6, 0.2], [0.4, 0.3]]
    mean = [sum(pull[pair][k] * size[pair][k] for pair in (0, 1)) / 2 for k in (0, 1)]
    parts = [0.25 * mean[0], 0.75 * mean[1]]
    expected["gradient_share"] = [part / sum(parts) for part in parts] + [1.0]
    assert set(metrics) == set(expected)
    for name, row in expected.items():
        assert metrics[name].tolist() == pytest.approx(row, abs=1e-9), name


def test_without_a_reference_the_errors_are_compared_with_each_other(sd15):
    facts = {name: torch.full((3, 2, 2), 0.5, dtype=torch.float64) for name in FACTS}
    facts["error_rejected"] = facts["error_rejected"] + torch.tensor([0.1, -0.1, 0.3])[:, None, None]
    for name in ("reference_preferred", "reference_rejected", "drift"):
        facts[name] = torch.full((3, 2, 2), math.nan, dtype=torch.float64)
    metrics = panel_metrics(facts, torch.tensor([0.5, 0.5]), orpo(sd15).pair_terms)
    assert metrics["accuracy"].tolist() == pytest.approx([2 / 3] * 3)
    assert metrics["margin"].tolist() == pytest.approx([0.1] * 3)
    assert not {"drift", "change_preferred", "change_rejected"} & set(metrics)


def test_fine_tuning_has_no_preference_term_to_saturate(sd15):
    facts = {name: torch.full((3, 2, 1), 0.5, dtype=torch.float64) for name in FACTS}
    metrics = panel_metrics(facts, torch.tensor([0.5, 0.5]), DiffusionSFT(SD15(str(sd15))).pair_terms)
    assert not {"decision", "saturated"} & set(metrics)
    assert metrics["gradient_share"].tolist() == pytest.approx([0.5, 0.5, 1.0])


def test_error_that_is_no_number_is_shown_as_such(sd15):
    facts = {name: torch.full((2, 2, 1), 0.5, dtype=torch.float64) for name in FACTS}
    facts["error_preferred"][0, 0] = math.nan
    metrics = panel_metrics(facts, torch.tensor([0.5, 0.5]), dpo(sd15).pair_terms)
    assert metrics["accuracy"].isnan().tolist() == [True, False, True]
    assert "drift" in metrics


def test_indices_are_spread_evenly():
    for number in (1, 7, 50):
        places = spread(number, 1000).sort().values
        assert places.diff().max() <= 3000 / number if number > 1 else True
        assert 0 <= places.min() <= places.max() < 1000
    assert spread(20, 1).tolist() == [0] * 20


def test_weight_change_is_that_of_the_product(sd15):
    module = make_module(sd15)
    module.backbone.load()
    added = total = 0.0
    for name, layer in module.backbone.denoiser.named_modules():
        if hasattr(layer, "lora_A"):
            torch.nn.init.normal_(layer.lora_B["default"].weight)
            added += (2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight).square().sum().item()
            total += layer.base_layer.weight.square().sum().item()
            assert "to_" in name
    assert weight_change(module.backbone).item() == pytest.approx(math.sqrt(added / total), rel=1e-5)
    full = make_module(sd15, lora=False)
    full.backbone.load()
    assert weight_change(full.backbone) is None


# ------------------------------------------------------------------------------------------------------------ in a run


def test_policy_that_is_its_reference_has_learnt_nothing(sd15, tmp_path):
    trainer = watch(tmp_path, make_module(sd15, lr=0.0), LearningPanel(num_pairs=4, num_buckets=2))
    found = panel_of(trainer)
    for name in ("margin", "decision", "saturated", "change_preferred", "change_rejected", "drift", "weight_change"):
        assert found[name] == 0.0
    assert found["accuracy"] == found["accuracy_bucket_1"] == found["accuracy_bucket_2"] == 0.5
    assert found["gradient_share_bucket_1"] + found["gradient_share_bucket_2"] == pytest.approx(1.0)
    assert found["error_preferred"] > 0


def test_training_is_the_same_with_and_without_it(sd15, tmp_path):
    def run(name: str, callbacks: list[pl.Callback]) -> tuple[list[str], dict[str, Tensor], dict[str, float]]:
        pl.seed_everything(5, verbose=False)
        module, trainer = make_module(sd15), make_trainer(tmp_path / name, callbacks, **OPTIONS)
        trainer.fit(module, datamodule=RandomPairs())
        with open(Path(trainer.log_dir) / "metrics.csv", newline="") as file:
            rows = [{k: v for k, v in row.items() if "panel" not in k} for row in csv.DictReader(file)]
        rows = [row for row in rows if any(v for k, v in row.items() if k not in ("epoch", "step"))]
        return rows, module.trained_parameters(), trainer.callback_metrics

    rows, weights, metrics = run("alone", [])
    watched_rows, watched_weights, watched_metrics = run("watched", [LearningPanel(num_pairs=3, num_buckets=3)])
    assert watched_rows == rows
    assert all(torch.equal(watched_weights[name], weight) for name, weight in weights.items())
    assert all(torch.equal(watched_metrics[name], value) for name, value in metrics.items())


def test_one_picture_and_one_row_of_metrics_per_validation(sd15, tmp_path):
    trainer = watch(tmp_path, make_module(sd15), LearningPanel(num_pairs=4, num_buckets=3))
    folder = Path(trainer.log_dir) / "panel"
    assert sorted(file.name for file in folder.iterdir()) == ["step_000002.png", "step_000004.png"]
    with Image.open(folder / "step_000004.png") as picture:
        assert picture.size[0] > 1000
    with open(Path(trainer.log_dir) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/panel/accuracy")]
    assert [int(row["step"]) for row in rows] == [2, 4]
    assert rows[0]["val/panel/error_preferred"] != rows[1]["val/panel/error_preferred"]
    assert all(float(row["val/panel/drift"]) > 0 for row in rows)
    means = [float(rows[1][f"val/panel/error_rejected_bucket_{k}"]) for k in (1, 2, 3)]
    assert float(rows[1]["val/panel/error_rejected"]) == pytest.approx(sum(means) / 3, rel=0.02)


def test_numbers_do_not_depend_on_batches(sd15, tmp_path):
    """Validation pairs in batches of 1 and 3, and the network run on 1, 2 and 8 images at once."""
    found = []
    for batch_size, chunk_size in ((1, 1), (3, 2), (3, 8)):

        class Same(RandomPairs):
            """Validation pair k is the same whatever the size of a batch."""

            def val_dataloader(self, batch_size=batch_size):
                single = RandomPairs(batch_size=1)
                made = [single.make_batch(10**6 + k) for k in range(6)]
                names = ("images", "original_sizes", "crops")
                batches = []
                for start in range(0, 6, batch_size):
                    some = made[start : start + batch_size]
                    batch = {
                        name: torch.cat([pair[name][i : i + 1] for i in (0, 1) for pair in some]) for name in names
                    }
                    batch |= {name: torch.cat([pair[name] for pair in some]) for name in ("label", "weight")}
                    batches.append(batch | {"prompts": [pair["prompts"][0] for pair in some]})
                return torch.utils.data.DataLoader(batches, batch_size=None)

        module = make_module(sd15, chunk_size=chunk_size)
        panel = LearningPanel(num_pairs=5, num_buckets=2, draws=2)
        found.append(panel_of(watch(tmp_path / f"{batch_size}-{chunk_size}", module, panel, Same(), max_steps=2)))
    for other in found[1:]:
        for name, value in found[0].items():
            # A decision is beta/2 times a difference of errors near 1, whose rounding it enlarges.
            rounding = 2e-4 if name.startswith("decision") else 1e-5
            assert other[name] == pytest.approx(value, rel=2e-3, abs=rounding), name


def test_reference_predicts_once(sd15, tmp_path, monkeypatch):
    calls = []
    predictions = LearningPanel.predictions

    def counted(self, backbone):
        calls.append(backbone.pipeline.unet is not backbone.denoiser)
        return predictions(self, backbone)

    monkeypatch.setattr(LearningPanel, "predictions", counted)
    watch(tmp_path, make_module(sd15, lora=False, lr=1e-3), LearningPanel(num_pairs=2, num_buckets=2))
    assert calls == [True, False, False]


def test_average_of_the_weights_is_what_is_looked_at(sd15, tmp_path):
    def run(name: str, callbacks: list[pl.Callback]) -> dict[str, float]:
        panel = LearningPanel(num_pairs=2, num_buckets=2)
        return panel_of(watch(tmp_path / name, make_module(sd15), panel, callbacks=callbacks))

    plain, average, none = run("plain", []), run("average", [EMA(0.5)]), run("none", [EMA(0.0)])
    assert none == pytest.approx(plain, rel=1e-5)
    assert 0 < average["drift"] < plain["drift"]


def test_resumed_run_goes_on_with_its_history(sd15, tmp_path):
    whole = LearningPanel(num_pairs=2, num_buckets=2)
    watch(tmp_path / "whole", make_module(sd15), whole, max_steps=6)
    checkpoint = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3)
    saved = {"callbacks": [checkpoint], "enable_checkpointing": True, "max_steps": 3}
    watch(tmp_path / "first", make_module(sd15), LearningPanel(num_pairs=2, num_buckets=2), **saved)
    resumed = LearningPanel(num_pairs=2, num_buckets=2)
    pl.seed_everything(5, verbose=False)
    trainer = make_trainer(tmp_path / "resumed", [resumed], **OPTIONS, max_steps=6)
    trainer.fit(make_module(sd15), datamodule=RandomPairs(), ckpt_path=tmp_path / "step=3.ckpt", weights_only=True)
    assert resumed.history["step"] == [2, 4, 6]
    assert resumed.history.keys() == whole.history.keys()
    for name, values in whole.history.items():
        assert resumed.history[name] == pytest.approx(values, rel=1e-5), name


def test_fewer_pairs_than_asked_and_no_ties(sd15, source, tmp_path):
    panel = LearningPanel(num_pairs=64, num_buckets=2)
    data = pairs(source, validation_split="validation", ties="keep")
    trainer = watch(tmp_path, make_module(sd15), panel, data, val_check_interval=1, max_steps=1)
    assert len(panel.pairs) == 6
    assert [pair["seed"] for pair in panel.pairs] == [0, 2, 3, 5, 6, 8]
    assert 0 <= panel_of(trainer)["accuracy"] <= 1


def test_cached_moments_are_looked_at(sd15, source, tmp_path):
    settings = {"validation_split": "validation", "horizontal_flip": False}
    cache = fill(tmp_path / "cache", make_module(sd15), pairs(source, **settings))
    found = []
    for name, more in (("pixels", {}), ("cached", {"cache": str(cache)})):
        panel = LearningPanel(num_pairs=4, num_buckets=2)
        data = pairs(source, **settings, **more)
        found.append(panel_of(watch(tmp_path / name, make_module(sd15, lr=0.0), panel, data, max_steps=2)))
    assert found[1] == pytest.approx(found[0], abs=1e-4)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("read_reference", [True, False])
def test_orpo_is_compared_with_its_start_where_that_is_at_hand(lora, read_reference, sd15, tmp_path):
    panel = LearningPanel(num_pairs=2, num_buckets=2, read_reference=read_reference)
    trainer = watch(tmp_path, orpo(sd15, lora), panel)
    found = panel_of(trainer)
    assert ("drift" in found) == ("change_rejected_bucket_2" in found) == (lora or read_reference)
    assert {"accuracy", "decision", "saturated", "gradient_share_bucket_1"} < set(found)
    assert (Path(trainer.log_dir) / "panel/step_000004.png").is_file()


def test_fine_tuning_on_the_preferred_images_is_compared_on_pairs(sd15, source, tmp_path):
    module = DiffusionSFT(SD15(str(sd15), lora=LoraConfig(r=2, lora_alpha=4)))
    data = pairs(source, validation_split="validation", preferred_only=True)
    trainer = watch(tmp_path, module, LearningPanel(num_pairs=4, num_buckets=2), data)
    found = panel_of(trainer)
    assert found["change_preferred"] != found["change_rejected"]
    assert "decision" not in found


def test_timesteps_are_those_of_training(sdxl_turbo, tmp_path):
    """SDXL-Turbo trains on 249, 499 and 749: the last of four parts on none."""
    panel = LearningPanel(num_pairs=2, num_buckets=4)
    trainer = watch(tmp_path, make_module(sdxl_turbo), panel, max_steps=2)
    assert [t.unique().tolist() for t in panel.timesteps] == [[249], [499], [749]]
    assert panel.names == ["0-249", "250-499", "500-749"]
    assert panel.shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.01)
    assert "accuracy_bucket_4" not in panel_of(trainer)
    assert isinstance(trainer.lightning_module.backbone, SDXL)


def test_validation_alone_makes_a_picture(sd15, source, tmp_path):
    trainer = make_trainer(tmp_path, [LearningPanel(num_pairs=2, num_buckets=2)], limit_val_batches=1)
    trainer.validate(make_module(sd15), datamodule=pairs(source, validation_split="validation"), verbose=False)
    assert (Path(trainer.log_dir) / "panel/step_000000.png").is_file()
    assert panel_of(trainer)["accuracy"] == 0.5


@pytest.fixture(scope="module")
def one_rank(sd15, source, tmp_path_factory) -> dict[str, float]:
    return ranks(sd15, source, tmp_path_factory.mktemp("one"), "auto")


def ranks(sd15: Path, source: Path, folder: Path, strategy: str) -> dict[str, float]:
    launcher = [] if strategy == "auto" else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.callbacks.panel_ranks", source, sd15, folder, strategy],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert len(list(folder.glob("run/version_*/panel/*.png"))) == 2
    return json.loads((folder / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_see_what_one_sees(strategy, sd15, source, tmp_path, one_rank):
    """Five of six pairs: one of the ranks has two of them."""
    two = ranks(sd15, source, tmp_path, strategy)
    assert two == pytest.approx(one_rank, rel=1e-3, abs=2e-4)  # beta / 2 times the rounding of an error


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("setting", ["num_pairs", "num_buckets", "draws"])
def test_settings_below_one(setting):
    with pytest.raises(ValueError, match=f"LearningPanel: {setting} is 0; expected 1 or more"):
        LearningPanel(**{setting: 0})


def test_no_validation_is_told_of_before_the_networks_are_loaded(sd15, source, tmp_path, monkeypatch):
    monkeypatch.setattr(SD15, "load", lambda *_, **__: pytest.fail("loaded the networks"))
    with pytest.raises(ValueError, match=r"no validation pairs to look at. Set `data.init_args.validation_split`"):
        watch(tmp_path, make_module(sd15), LearningPanel(), pairs(source))
    with pytest.raises(ValueError, match="no validation pairs to look at"):
        watch(tmp_path, make_module(sd15), LearningPanel(), limit_val_batches=0)


def test_method_without_pairs(sd15, tmp_path):
    class Other(pl.LightningModule):
        pass

    with pytest.raises(ValueError, match="Other does not learn from pairs; expected DiffusionDPO, DiffusionORPO or"):
        LearningPanel().setup(make_trainer(tmp_path, []), Other(), "fit")


def test_single_images_are_no_pairs(sd15, tmp_path):
    module = DiffusionSFT(SD15(str(sd15), lora=LoraConfig(r=2)))
    with pytest.raises(ValueError, match="the validation data are single images; it looks at pairs"):
        watch(tmp_path, module, LearningPanel(), RandomPairs(images_only=True))


def test_rows_of_single_images_are_no_pairs(sd15, tmp_path):
    for split in ("train", "validation"):
        columns = {"caption": ["a", "b"], "image": [encoded(0), encoded(1)]}
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    data = pairs(tmp_path, preferred_only=True, validation_split="validation")
    with pytest.raises(ValueError, match="one image in a row, and no pair to look at"):
        watch(tmp_path, DiffusionSFT(SD15(str(sd15), lora=LoraConfig(r=2))), LearningPanel(), data)


def test_nothing_but_ties(sd15, source, tmp_path):
    write_parquet(tmp_path / "train.parquet", 4)
    write_parquet(tmp_path / "validation.parquet", 3, label_0=[0.5] * 3)
    data = pairs(tmp_path, validation_split="validation", ties="keep")
    with pytest.raises(ValueError, match="1 of 1 devices got no validation pair that is not a tie"):
        watch(tmp_path, make_module(sd15), LearningPanel(), data)


def test_cache_of_preferred_images_holds_no_pairs(sd15, source, tmp_path):
    def module():
        return DiffusionSFT(SD15(str(sd15), lora=LoraConfig(r=2)))

    settings = {"preferred_only": True, "validation_split": "validation"}
    cache = fill(tmp_path / "cache", module(), pairs(source, **settings))
    with pytest.raises(ValueError, match="holds the preferred images only, and no pair to look at"):
        watch(tmp_path, module(), LearningPanel(), pairs(source, **settings, cache=str(cache)))


# --------------------------------------------------------------------------------------------------------- its picture


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-0.3, 2.2, [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5]),
        (0.0, 0.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 3e-7, [0.0, 1e-7, 2e-7, 3e-7]),
        (37.5, 83.0, [30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0]),
    ],
)
def test_axes_have_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_charts_of_nothing_known_are_drawn():
    charts = [
        Chart("bars", "", ["a", "b"], {"x": [math.nan, math.nan]}),
        Chart("line", "", [0], {"x": [math.nan]}, "lines"),
    ]
    charts.append(Chart("both", "", ["a"], {"x": [1e9], "y": [-1e-9]}, level=0.0, band=(0.0, 0.0)))
    assert draw_charts(charts, ["heading"], columns=2).size[0] > 600
