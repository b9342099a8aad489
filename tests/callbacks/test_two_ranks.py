"""Two real ranks, under DDP or FSDP2, leave what one rank leaves: the same pictures, scores, export and tables."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


def run(pipeline: Path, folder: Path, strategy: str) -> Path:
    launcher = [] if strategy == "auto" else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, "-m", "tests.callbacks.two_ranks", pipeline, folder, strategy]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run" / "version_0"


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def one(sd15, tmp_path_factory):
    return run(sd15, tmp_path_factory.mktemp("one"), "auto")


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_ranks_leave_what_one_leaves(sd15, tmp_path, one, strategy):
    two = run(sd15, tmp_path, strategy)
    assert files(one) == files(two)
    assert {"samples/step_000002.png", "samples/step_000003.png", "evaluation/grid.png"} < set(files(one))
    assert {"export/run.safetensors", "export/merged/model_index.json", "hub/README.md"} < set(files(one))

    for name in files(one):
        if name.endswith(".png"):
            first, second = (np.asarray(Image.open(folder / name)).astype(int) for folder in (one, two))
            assert np.abs(first - second).max() <= 1, name
    assert (one / "images/metadata.jsonl").read_text() == (two / "images/metadata.jsonl").read_text()

    results = [json.loads((folder / "evaluation/results.json").read_text()) for folder in (one, two)]
    assert results[0]["rewards"]["red"]["tuned"] == pytest.approx(results[1]["rewards"]["red"]["tuned"], abs=1e-4)
    assert results[0]["rewards"]["red"]["tuned"] != results[0]["rewards"]["red"]["base"]
    assert results[1]["num_images"] == 3
    scores = []
    for folder in (one, two):
        with open(folder / "metrics.csv", newline="") as file:
            scores.append({row["step"]: float(row["val/red"]) for row in csv.DictReader(file) if row["val/red"]})
    assert sorted(scores[0]) == ["2", "3"]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
