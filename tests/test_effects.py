"""What alignment does to the embedded world, over three seeds: the proofs behind the numbers on the pages.

    pytest -m slow tests/test_effects.py

Each run is the recipe of cli_configs/toy with the options named here; about two minutes each on two cores.
"""

import functools
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
    return judged(fit_recipe(recipe, seed, *options))


def fit_recipe(recipe: str, seed: int, *options: str, command: str = "fit") -> Path:
    """Run a recipe and return the folder of the run."""
    name = f"effect-{recipe}-{seed}-{command}-{abs(hash(options)) % 10**8}"
    shutil.rmtree(Path("runs") / name, ignore_errors=True)
    config = f"cli_configs/toy/{recipe}.yaml"
    return Path(
        run([command, "--config", config, f"--name={name}", f"--seed_everything={seed}", *options]).trainer.log_dir
    )


def judged(folder: Path) -> dict[str, dict]:
    """What the evaluation of a run found, by reward."""
    result = json.loads((folder / "evaluation" / "results.json").read_text())["rewards"]
    print(folder, json.dumps(result))
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


@functools.cache
def distilled(seed: int, recipe: str = "dmdr_cold_start") -> tuple[Path, dict[str, dict], dict[str, dict]]:
    """The cold start's checkpoint; student (tuned) and teacher (base); the sampler undistilled, and DDIM in 4 steps."""
    folder = fit_recipe(recipe, seed)
    return (
        folder / "checkpoints" / "last.ckpt",
        judged(folder),
        judged(fit_recipe(recipe, seed, "--model.backbone.num_inference_steps=4", command="test")),
    )


@functools.cache
def rewarded(seed: int, *options: str) -> dict[str, dict]:
    """The second stage from the first one's student."""
    return evaluate("dmdr_refl", seed, f"--model.start_from={distilled(seed)[0]}", *options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_student_reaches_its_teacher_and_a_reward_takes_it_beyond(seed):
    _, cold, undistilled = distilled(seed)
    match = cold["match"]["tuned"]
    assert match >= 0.95 * cold["match"]["base"]
    assert match > undistilled["match"]["base"]  # the base in four DDIM steps, with guidance
    assert match > undistilled["match"]["tuned"]  # the base in the student's own sampler
    assert rewarded(seed)["both"]["difference_interval"][0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_the_students_match_stays_within_0_02_under_the_reward(seed):
    assert rewarded(seed)["match"]["tuned"] >= distilled(seed)[1]["match"]["tuned"] - 0.02


@pytest.mark.slow
def test_a_reward_without_distribution_matching_destroys_the_student():
    alone = rewarded(0, "--model.dm_weight=0", "--model.reward_weights.clip=0")
    assert alone["match"]["tuned"] < distilled(0)[1]["match"]["tuned"] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_one_step_suffices(seed):
    _, cold, undistilled = distilled(seed, "dmdr_one_step")
    assert cold["match"]["tuned"] >= 0.8 * cold["match"]["base"]
    assert cold["match"]["tuned"] > undistilled["match"]["tuned"] + 0.2


# ------------------------------------------------------------------------------------------------------------------ SPO


@functools.cache
def step_aware_judge(seed: int) -> str:
    """A step-aware preference model trained on vividness labels: its checkpoint."""
    return f"{fit_recipe('spm', seed)}/checkpoints/last.ckpt"


def evaluate_spo(seed: int, *options: str) -> dict[str, dict]:
    """SPO judged by the model of the same seed."""
    return evaluate("spo_from_spm", seed, f"--model.judge.weights={step_aware_judge(seed)}", *options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_spo_from_a_trained_judge_raises_vividness_and_keeps_the_match(seed):
    result = evaluate_spo(seed)
    assert result["vividness"]["win_rate"] >= 0.85
    assert result["vividness"]["difference"] >= 0.15
    assert result["match"]["difference"] >= -0.02


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_spo_from_the_oracle_raises_vividness_and_keeps_the_match(seed):
    result = evaluate("spo", seed)
    assert result["vividness"]["win_rate"] >= 0.85
    assert result["vividness"]["difference"] >= 0.10
    assert result["match"]["difference"] >= -0.02


@pytest.mark.slow
def test_spo_from_a_judge_of_the_wrong_sign_loses():
    result = evaluate_spo(0, "--model.judge.class_path=tests.methods.spo_runs.Contrary")
    assert result["vividness"]["win_rate_interval"][1] < 0.5
    assert result["vividness"]["difference"] < 0


@pytest.mark.slow
def test_spo_from_pairs_selected_at_random_does_nothing():
    """A run drifts a little, to one side or the other by chance; the seeds' mean does not."""
    dice = ["--model.judge=tests.methods.spo_runs.Dice", "--model.threshold=0.3"]
    results = [evaluate("spo", seed, *dice) for seed in SEEDS]
    gains = [result["vividness"]["difference"] for result in results]
    assert max(map(abs, gains)) < 0.05
    assert abs(sum(gains)) / len(gains) < 0.02
    assert max(abs(result["match"]["difference"]) for result in results) < 0.03


@pytest.mark.slow
def test_spo_of_a_flow_raises_vividness():
    result = evaluate("spo", 0, "--model.backbone=tests.toy_flow.ToyFlow")
    assert result["vividness"]["win_rate"] >= 0.85
    assert result["vividness"]["difference"] >= 0.10
