"""Runs that are killed at any point and resumed equal the uninterrupted ones; the harness is kill_matrix.py.

pytest -m slow tests/datamodules/test_kill_matrix.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def assert_equal_to_uninterrupted(*arguments: str) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.datamodules.kill_matrix", *arguments]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-10_000:] + process.stderr[-3000:]


def test_killed_runs_equal_the_uninterrupted_ones():
    assert_equal_to_uninterrupted("--points", "2", "--cells", "parquet/0/2", "streaming/2/1", "shards/2/1")


@pytest.mark.slow
def test_ten_kills_in_every_cell():
    assert_equal_to_uninterrupted("--points", "10")
