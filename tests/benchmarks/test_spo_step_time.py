"""The script that times SPO on a GPU runs, at tiny size on the CPU."""

import json

import pytest

from tests.benchmarks.spo_step_time import main


def test_the_benchmark_of_spo_runs_and_counts(tmp_path):
    main(["--tiny", "--rounds", "1", "--precision", "bf16-mixed", "--output", str(tmp_path / "out.json")])
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert len(run["seconds_per_round"]) == 1
    assert run["valid_share"] == [1.0, 1.0, 1.0]
    assert run["tflop_per_prompt"] > 0
    assert run["prompts_per_second"] == pytest.approx(2 / run["seconds_per_round"][0])
