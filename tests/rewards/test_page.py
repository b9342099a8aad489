"""What the page of the rewards shows works as it stands there."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from lightning_modules.rewards.base import Reward
from lightning_modules.rewards.remote import RemoteReward
from tests.rewards.tiny import random_images

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "cli_configs/evaluation/rewards.md").read_text()


def example(language: str, holds: str) -> str:
    (found,) = [block for block in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if holds in block]
    return found


def test_the_rewards_of_the_page_are_accepted():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=dict[str, Reward])
    rewards = parser.parse_object(yaml.safe_load(example("yaml", "rewards:"))).rewards
    assert set(rewards) == {"pick", "hps21", "dfn5b", "aesthetic", "image_reward", "both"}


def test_every_scorer_has_its_row():
    files = {file.stem for file in (ROOT / "lightning_modules/rewards").glob("*.py")}
    plumbing = {"__init__", "base", "network", "preprocessing", "checkpoints", "towers", "metric"}
    rows = set(re.findall(r"^\| `(\w+)\.\w+` \|", PAGE, re.MULTILINE))
    assert rows == files - plumbing


def test_the_server_of_the_page_serves(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "server.py").write_text(example("python", "HTTPServer"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(tmp_path / "server.py"), str(port)], stderr=subprocess.DEVNULL)
    try:
        images = random_images(5)
        reward = RemoteReward(f"http://127.0.0.1:{port}", batch_size=2, retries=8, pause=0.1)
        scores = reward(images, ["a red circle"] * 5)
        torch.testing.assert_close(scores, images[:, 0].mean((1, 2)), atol=2e-3, rtol=0)
    finally:
        server.kill()
        server.wait()


def test_the_pages_own_reward_scores(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(example("python", "class Contrast"))
    monkeypatch.syspath_prepend(tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    config = {"class_path": "my_rewards.Contrast", "init_args": {"strength": 2.0}}
    reward = parser.instantiate(parser.parse_object({"reward": config})).reward
    images = random_images(3).requires_grad_()
    scores = reward(images, ["x"] * 3)
    assert scores.shape == (3,)
    scores.sum().backward()
    assert images.grad.abs().max() > 0
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        reward(images * 3, ["x"] * 3)
