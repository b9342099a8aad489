"""Scorers as a run uses them: from YAML, loaded before the first image, without a trace in the training."""

import lightning.pytorch as pl
import pytest
import torch
import yaml
from jsonargparse import ArgumentParser

from callbacks.evaluation import Evaluation
from callbacks.score_prompts import ScorePrompts
from lightning_modules.rewards.base import Reward
from lightning_modules.rewards.clip import CLIPScore
from lightning_modules.rewards.combine import WeightedSum
from lightning_modules.rewards.hps import HPSv2
from tests.callbacks.runs import PROMPTS, Data, logged, make_module, make_trainer
from tests.rewards.tiny import TOY_CLIP

REWARDS = f"""
rewards:
  clip:
    class_path: lightning_modules.rewards.clip.CLIPScore
    init_args: {{pretrained: {TOY_CLIP}, preprocessing: differentiable, precision: bfloat16}}
  both:
    class_path: lightning_modules.rewards.combine.WeightedSum
    init_args:
      rewards:
        clip:
          class_path: lightning_modules.rewards.clip.CLIPScore
          init_args: {{pretrained: {TOY_CLIP}}}
        match: {{class_path: lightning_modules.rewards.toy_oracle.ToyOracle}}
      weights: {{clip: 0.5, match: 2}}
  remote:
    class_path: lightning_modules.rewards.remote.RemoteReward
    init_args: {{url: "http://localhost:8000/score", timeout: 5}}
"""


def test_rewards_are_made_from_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--rewards", type=dict[str, Reward])
    rewards = parser.instantiate(parser.parse_object(yaml.safe_load(REWARDS))).rewards
    assert [type(reward).__name__ for reward in rewards.values()] == ["CLIPScore", "WeightedSum", "RemoteReward"]
    assert rewards["clip"].differentiable
    assert isinstance(rewards["both"], WeightedSum)
    assert rewards["both"].weights == {"clip": 0.5, "match": 2.0}


def test_scoring_leaves_no_trace_in_training(sd15, tmp_path):
    def run(name: str, callbacks: list[pl.Callback]) -> tuple[dict[int, float], pl.Trainer]:
        pl.seed_everything(5, verbose=False)
        trainer = make_trainer(tmp_path / name, callbacks)
        trainer.fit(make_module(sd15), datamodule=Data())
        return logged(trainer, "train/loss"), trainer

    alone, _ = run("alone", [])
    rewards = {"clip": CLIPScore(str(TOY_CLIP)), "low": CLIPScore(str(TOY_CLIP), precision="bfloat16")}
    watched, trainer = run("watched", [ScorePrompts(rewards, PROMPTS, 2)])
    assert watched == alone
    scores, low = logged(trainer, "val/clip"), logged(trainer, "val/low")
    assert sorted(scores) == [2, 4]
    assert low == pytest.approx(scores, abs=0.02)


@pytest.mark.parametrize("stage", ["fit", "test"])
def test_wrong_weights_stop_a_run_before_the_first_image(sd15, tmp_path, stage, monkeypatch):
    torch.save({"state_dict": {"visual.proj": torch.zeros(2, 2)}}, tmp_path / "HPS_v2_compressed.pt")
    rewards = {"hps": HPSv2(str(tmp_path / "HPS_v2_compressed.pt"))}
    callback = ScorePrompts(rewards, PROMPTS) if stage == "fit" else Evaluation(rewards)
    module, trainer = make_module(sd15), make_trainer(tmp_path, [callback])
    monkeypatch.setattr(module.backbone, "generate", lambda *_, **__: pytest.fail("an image was made"))
    with pytest.raises(ValueError, match=r"HPSv2.weights: .* 685 missing .* 1 of another shape \(visual.proj"):
        getattr(trainer, stage)(module, datamodule=Data())
