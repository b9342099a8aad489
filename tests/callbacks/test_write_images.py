"""WriteImages: files named by index, the list beside them, and nothing overwritten."""

import json
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image

from callbacks.write_images import WriteImages
from tests.callbacks.runs import PROMPTS, Data, make_module, make_trainer


def predict(module: pl.LightningModule, folder: Path, callback: WriteImages, prompts: list[str]) -> pl.Trainer:
    trainer = make_trainer(folder, [callback])
    trainer.predict(module, datamodule=Data(prompts), return_predictions=False)
    return trainer


def test_images_are_listed_with_prompt_and_seed(sd15, tmp_path):
    prompts = [*PROMPTS, "../../escape", 'ein "Größeres"\nViereck']
    module = make_module(sd15)
    trainer = predict(module, tmp_path, WriteImages(), prompts)

    folder = Path(trainer.log_dir) / "images"
    names = [f"0000{index}.png" for index in range(5)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "metadata.jsonl"]
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    expected = zip(names, prompts, range(10, 15), strict=True)
    assert [json.loads(line) for line in lines] == [
        {"file_name": name, "prompt": prompt, "seed": seed} for name, prompt, seed in expected
    ]
    image = module.backbone.generate(prompts[4:], [14])[0]
    with Image.open(folder / names[4]) as file:
        saved = torch.from_numpy(np.array(file)).permute(2, 0, 1) / 255
    torch.testing.assert_close(saved, image, rtol=0, atol=0.5 / 255 + 1e-5)


def test_another_runs_images_are_not_overwritten(sd15, tmp_path):
    module, target = make_module(sd15), tmp_path / "mine"
    predict(module, tmp_path, WriteImages(str(target)), PROMPTS)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    assert len(before) == 4
    with pytest.raises(ValueError, match="'.*mine' is not an empty folder, and nothing is overwritten"):
        predict(module, tmp_path, WriteImages(str(target)), ["something else"])
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


def test_a_file_in_the_folders_place_is_refused(sd15, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="is not an empty folder"):
        predict(make_module(sd15), tmp_path, WriteImages(str(tmp_path / "mine")), PROMPTS)
