"""What alignment does to the embedded world, over three seeds: the proofs behind the numbers on the pages.

    pytest -m slow tests/test_effects.py

Each run is the recipe of cli_configs/toy with the options named here; about two minutes each on two cores.
"""

import json
import shutil
from pathlib import Path

import pytest

from lightning_modules.cli.app import run

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
# About the match the labels say less: pairs as the evaluation samples them, and more prompts to judge by.
LONGER = [
    "--model.init_args.optimizer.init_args.lr=3e-5",
    "--data.init_args.num_inference_steps=20",
    "--data.init_args.num_test_prompts=200",
    "--trainer.max_steps=200",
    "--trainer.val_check_interval=200",
]
MATCH = ["--data.init_args.preference=match", "--model.init_args.beta=250", *LONGER]
# Differences below the margin are mostly vividness; what remains is also about the match, and needs more pairs.
BOTH = [
    "--data.init_args.preference=both",
    "--data.init_args.num_pairs=2048",
    "--data.init_args.tie_margin=0.15",
    "--model.init_args.beta=1500",
    *LONGER,
]


def evaluate(recipe: str, seed: int, *options: str) -> dict[str, dict]:
    """Fit a recipe and return its evaluation on held-out captions, by reward."""
    name = f"effect-{recipe}-{seed}-{abs(hash(options)) % 10**8}"
    shutil.rmtree(Path("runs") / name, ignore_errors=True)
    config = f"cli_configs/toy/{recipe}.yaml"
    fitted = run(["fit", "--config", config, f"--name={name}", f"--seed_everything={seed}", *options])
    result = json.loads((Path(fitted.trainer.log_dir) / "evaluation" / "results.json").read_text())["rewards"]
    print(recipe, seed, *options, json.dumps(result))
    return result


@pytest.fixture(autouse=True)
def _root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("recipe", ["dpo", "dpo_full"])
def test_vividness_labels_raise_vividness_and_keep_the_match(recipe, seed):
    result = evaluate(recipe, seed)
    assert result["vividness"]["win_rate"] >= 0.90
    assert result["vividness"]["difference"] >= 0.10
    assert result["match"]["difference"] >= -0.02


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_match_labels_raise_the_match(seed):
    result = evaluate("dpo_full", seed, *MATCH)
    assert result["match"]["difference"] >= 0.015
    assert result["match"]["difference_interval"][0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_both_labels_raise_both(seed):
    result = evaluate("dpo_full", seed, *BOTH)
    assert result["match"]["difference"] > 0
    assert result["vividness"]["difference"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_orpo_raises_vividness_more_than_fine_tuning_and_keeps_the_match(seed):
    result, fine_tuned = evaluate("orpo", seed), evaluate("sft", seed)
    assert result["vividness"]["win_rate"] >= 0.90
    assert result["vividness"]["difference"] > 1.5 * fine_tuned["vividness"]["difference"]
    assert result["match"]["difference"] >= -0.02


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_published_sign_undoes_fine_tuning(seed):
    """Without the term, with the published one, and with as much of it as of fine-tuning: the same draws each time."""
    without = evaluate("orpo", seed, "--model.init_args.scale=1", "--model.init_args.beta=1e-6")
    published = ["--model.init_args.variant=reference", "--model.init_args.scale=1"]
    with_term, with_more = evaluate("orpo", seed, *published), evaluate("orpo", seed, *published, "--model.beta=1")
    results = [result["vividness"]["difference"] for result in (without, with_term, with_more)]
    assert results == sorted(results, reverse=True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("options", ["--model.variant=odds_ratio", "--model.variant=mapo"])
def test_the_other_variants_with_the_right_sign_raise_vividness_too(options, seed):
    result = evaluate("orpo", seed, options, "--model.scale=1")
    assert result["vividness"]["win_rate"] >= 0.90
    assert result["match"]["difference"] >= -0.03


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dpo", "dpo_full"])
def test_flipped_labels_lose(recipe):
    result = evaluate(recipe, 0, "--data.init_args.label_noise=1.0")
    assert result["vividness"]["win_rate_interval"][1] < 0.3
