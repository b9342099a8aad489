"""DMDR on SiT: classes instead of prompts, a classifier as the reward, from the first step to the export."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from peft import LoraConfig
from safetensors.torch import load_file

from callbacks.evaluation import Evaluation
from callbacks.export_pipeline import ExportPipeline
from callbacks.save_adapters import SaveAdapters
from callbacks.write_images import WriteImages
from datamodules.labels import LabelsDataModule
from datamodules.prompts import PromptList
from lightning_modules.backbones.sit import SiT
from lightning_modules.dmdr import DMDR
from lightning_modules.rewards.classifier import DINOv2Score
from tests.rewards.test_classifier import meta_layout
from tests.rewards.tiny import random_weights

CLASSES = 10


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> DINOv2Score:
    folder = tmp_path_factory.mktemp("dinov2")
    torch.save(random_weights(meta_layout(64, 1, 14, 2)), folder / "network.pth")
    torch.save(random_weights({"weight": (CLASSES, 128), "bias": (CLASSES,)}), folder / "head.pth")
    return DINOv2Score(str(folder / "network.pth"), str(folder / "head.pth"), image_size=28)


def build(sit: Path, reward: DINOv2Score | None = None, **settings) -> DMDR:
    """The published setting in small: one step, an update of the student every third inner step."""
    backbone = SiT(str(sit / "sit.pt"), str(sit / "vae"), "T/2", CLASSES, 32, num_inference_steps=3)
    rewards = {} if reward is None else {"rewards": {"dino": reward}, "reward_weights": {"dino": 0.05}, "hinge": None}
    options = {"num_steps": 1, "ratio": 3, "guidance_scale": 1.0, "guidance_jitter": 0.0, "end_time": 0.0}
    return DMDR(
        backbone,
        LoraConfig(r=3, lora_alpha=3),
        teacher_scale=0.75,
        dynamic_steps=4,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        score_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0),
        **(options | rewards | settings),
    )


def fit(module: DMDR, folder: Path, data: LabelsDataModule | None = None, ckpt_path: Path | None = None) -> Path:
    pl.seed_everything(11, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=CSVLogger(folder, name="", version="log"),
        callbacks=[
            ModelCheckpoint(folder / "checkpoints", every_n_train_steps=1, save_top_k=-1, filename="{step}"),
            ExportPipeline(),
            SaveAdapters(),
        ],
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data or LabelsDataModule(CLASSES, 4), ckpt_path=ckpt_path, weights_only=True)
    return Path(trainer.log_dir)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/step=3.ckpt", weights_only=True)["state_dict"]


def test_fit_resumes_exactly_and_leaves_the_published_layout(sit, classifier, tmp_path):
    module = build(sit, classifier)
    run = fit(module, tmp_path / "whole")
    weights = state(tmp_path / "whole")
    published = torch.load(sit / "sit.pt", weights_only=True)
    student = {n.removeprefix("backbone.transformer."): w for n, w in weights.items() if ".transformer." in n}
    assert student.keys() | {"pos_embed"} == {name for name in published if not name.startswith("projectors.")}
    assert all(not torch.equal(w, published[name]) for name, w in student.items() if "embedding_table" not in name)
    assert len([name for name in weights if name.startswith("backbone.score_denoiser.") and ".lora." in name]) == 8
    assert len(weights) == len(student) + 8

    fit(build(sit, classifier), tmp_path / "again", ckpt_path=tmp_path / "whole/checkpoints/step=1.ckpt")
    again = state(tmp_path / "again")
    assert all(torch.equal(again[name], value) for name, value in weights.items())

    exported = load_file(run / "export/model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in student.items())
    opened = SiT(str(run / "export/model.safetensors"), str(sit / "vae"), "T/2", CLASSES, 32)
    opened.load()
    opened.few_step = module.backbone.few_step
    torch.testing.assert_close(opened.generate(["3", "7"], [1, 2]), module.backbone.generate(["3", "7"], [1, 2]))
    assert json.loads((run / "export/sampling.json").read_text()) == {"timesteps": [1.0], "mode": "sde", "end": 0.0}
    assert json.loads((run / "lora_gui/step-000003/scale.json").read_text()) == {"scale": 2.0}
    rows = [json.loads(line) for line in (run / "loss_logs/loss_gen_log.jsonl").read_text().splitlines()]
    assert [row["glo_s"] for row in rows] == [0, 1, 2] or [row["glo_s"] for row in rows] == [1, 2, 3]
    assert all(row["dino"] < 0 for row in rows)


def test_test_and_predict_draw_classes(sit, classifier, tmp_path):
    """The student in one step beside the base in three; classes come from a file with a number per line."""
    (tmp_path / "classes.txt").write_text("3\n7\n0\n")
    pl.seed_everything(11, verbose=False)
    module = build(sit)
    callbacks = [Evaluation(rewards={"dino": classifier}), WriteImages()]
    options = {"logger": CSVLogger(tmp_path, name="", version="log"), "callbacks": callbacks}
    trainer = pl.Trainer(accelerator="cpu", enable_progress_bar=False, **options)
    data = LabelsDataModule(CLASSES, 4, test_prompts=PromptList(str(tmp_path / "classes.txt")))
    trainer.test(module, datamodule=data, verbose=False)
    results = json.loads((tmp_path / "log/evaluation/results.json").read_text())
    assert results["rewards"]["dino"]["difference"] != 0
    trainer.predict(module, datamodule=data, return_predictions=False)
    assert len(list((tmp_path / "log/images").glob("*.png"))) == 3


def test_cold_start_with_guidance_and_two_steps(sit, tmp_path):
    fit(build(sit, num_steps=2, guidance_scale=1.5, guidance_jitter=0.0), tmp_path)
    assert all(value.isfinite().all() for value in state(tmp_path).values())


def test_the_classifier_is_followed(sit, classifier):
    """With the reward alone, the students' images of a class become surer."""
    module = build(sit, classifier, dm_weight=0.0)
    torch.manual_seed(0)
    module.backbone.load()
    module.backbone.add_score(module.score_lora, 2.0)
    student, _ = module.network_parameters()
    optimizer = torch.optim.Adam(student, lr=1e-3)
    labels = ["1", "4", "8", "4"]
    x, t = torch.randn(4, *module.backbone.latent_shape), torch.ones(4)
    condition = module.backbone.encode_prompts(labels)
    scores = []
    for _ in range(8):
        score = module.score_rewards(module.student({"x_in": x, "t": t}, condition), labels)["dino"].mean()
        optimizer.zero_grad()
        (-score).backward()
        optimizer.step()
        scores.append(score.item())
    assert scores[-1] > scores[0] + 0.05


def test_classes_that_do_not_agree_stop_the_run_before_anything_is_loaded(sit, tmp_path):
    module = build(sit)
    with pytest.raises(ValueError, match="labels of 1000 classes, but SiT has 10 classes"):
        fit(module, tmp_path, LabelsDataModule(1000, 4))
    assert not module.backbone.loaded
    (tmp_path / "labels.txt").write_text("3\n12\n")
    with pytest.raises(ValueError, match="line 2 of .*is '12'; expected a class number from 0 to 9"):
        fit(module, tmp_path, LabelsDataModule(CLASSES, 4, str(tmp_path / "labels.txt")))
    assert not module.backbone.loaded


def test_students_start_from_their_own_file_and_score_from_the_base(sit, tmp_path):
    weights = torch.load(sit / "sit.pt", weights_only=True)
    other = {f"module.{n}": w + 0.01 for n, w in weights.items() if not n.startswith("projectors.")}
    torch.save(other, tmp_path / "start.pt")
    module = build(sit, start_weights=str(tmp_path / "start.pt"))
    run = fit(module, tmp_path / "run")
    base = weights["blocks.0.mlp.fc1.weight"]
    assert torch.equal(module.backbone.score_denoiser.blocks[0].mlp.fc1.weight, base)
    moved = load_file(run / "export/model.safetensors")["blocks.0.mlp.fc1.weight"] - base
    assert moved.mean().item() == pytest.approx(0.01, abs=2e-3)
    with pytest.raises(ValueError, match="model.start_weights: there is no file"):
        fit(build(sit, start_weights=str(tmp_path / "gone.pt")), tmp_path / "other")
