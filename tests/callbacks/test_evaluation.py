"""Evaluation: the statistics by hand and by other routes, the report, and what it refuses."""

import csv
import json
import math
from pathlib import Path
from statistics import fmean

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from PIL import Image

from callbacks.evaluation import Evaluation, gather_rows, score_images
from callbacks.evaluation_report import markdown
from callbacks.statistics import bootstrap_interval, compare, means_by_group, wins
from datamodules.prompt_sets import hash_of
from datamodules.prompts import PromptDataModule, PromptList
from lightning_modules.rewards.base import Reward
from tests.callbacks.evaluation_run import tuned_module
from tests.callbacks.runs import PROMPTS, Data, Redness, Undefined, logged, make_module, make_trainer

ROLES = ("tuned", "base")


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(5, verbose=False)


def pixels(file: Path) -> torch.Tensor:
    """(3, H, W) in [0, 1] of an image file."""
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def write(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


def redness(file: Path) -> float:
    image = pixels(file)
    return (image[0] - image[1]).mean().item()


# ---------------------------------------------------------------------------------------------------------- statistics


def test_a_win_counts_one_a_tie_one_half():
    tuned, base = torch.tensor([1.0, 2.0, 3.0, float("nan")]), torch.tensor([2.0, 2.0, 2.0, 2.0])
    result = wins(tuned, base)
    assert result[:3].tolist() == [0.0, 0.5, 1.0]
    assert math.isnan(result[3])


def test_means_by_group():
    values, groups = torch.tensor([1.0, 2.0, 5.0, 6.0]), torch.tensor([0, 1, 0, 0])
    assert means_by_group(values, groups).tolist() == [4.0, 2.0]


def test_interval_of_two_values_spans_them():
    # The mean of a resample of (0, 1) is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    assert bootstrap_interval(torch.tensor([0.0, 1.0])) == (0.0, 1.0)


def test_interval_of_a_rate_has_the_binomial_quantiles():
    # The mean of a resample of 100 zeros and ones is binomial: its 2.5 % and 97.5 % quantiles are known exactly.
    for ones in (50, 90):
        values = torch.tensor([1.0] * ones + [0.0] * (100 - ones))
        mass = [math.comb(100, k) * (ones / 100) ** k * (1 - ones / 100) ** (100 - k) for k in range(101)]
        cumulated = np.cumsum(mass)
        exact = [int(np.searchsorted(cumulated, q)) / 100 for q in (0.025, 0.975)]
        assert bootstrap_interval(values) == pytest.approx(exact, abs=0.0101)


def test_interval_agrees_with_an_independent_bootstrap():
    values = torch.randn(60, generator=torch.Generator().manual_seed(1)) ** 3
    random = np.random.default_rng(7)
    means = [random.choice(values.numpy(), size=60).mean() for _ in range(10_000)]
    expected = np.percentile(means, [2.5, 97.5])
    # Each end is known to about its Monte-Carlo error: 0.2 of the mean's standard error at 10,000 resamples.
    assert bootstrap_interval(values) == pytest.approx(expected, abs=0.1 * values.std().item() / math.sqrt(60))


def test_interval_is_repeatable_and_also_for_more_values_than_fit_at_once():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    low, high = bootstrap_interval(values, resamples=2000)
    assert (low, high) == bootstrap_interval(values, resamples=2000)
    error = values.std().item() / math.sqrt(5000)
    assert low == pytest.approx(values.mean().item() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean().item() + 1.96 * error, abs=0.15 * error)


def test_comparison_by_hand():
    result = compare(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 4.0, 0.0]), list("abcd"))
    assert result["base"] == 1.5
    assert result["tuned"] == 2.5
    assert result["difference"] == 1.0  # 1, 0, -1, 4
    assert result["win_rate"] == 0.625  # win, tie, loss, win
    low, high = result["difference_interval"]
    assert -1.0 <= low < 1.0 < high <= 4.0


def test_images_of_one_prompt_are_averaged_before_prompts_are_resampled():
    tuned, base = torch.tensor([4.0, 2.0, 0.0]), torch.tensor([0.0, 0.0, 1.0])
    result = compare(tuned, base, ["a", "a", "b"])
    assert result["difference"] == 1.0  # a: 3, b: -1
    assert result["win_rate"] == 0.5
    assert result["difference_interval"] == (-1.0, 3.0)


def test_all_ties():
    result = compare(torch.ones(5), torch.ones(5), list("abcde"))
    assert (result["difference"], result["win_rate"]) == (0.0, 0.5)
    assert (result["difference_interval"], result["win_rate_interval"]) == ((0.0, 0.0), (0.5, 0.5))


def test_ties_are_counted():
    result = compare(torch.tensor([1.0, 2.0, 3.0, 3.0]), torch.tensor([1.0, 2.0, 0.0, 4.0]), ["a", "a", "b", "c"])
    assert result["ties"] == pytest.approx(1 / 3)  # of three prompts
    assert result["win_rate"] == 0.5  # tie, win, loss


def test_without_a_baseline_there_is_a_mean_with_its_interval():
    result = compare(torch.tensor([4.0, 2.0, 0.0]), None, ["a", "a", "b"])
    assert result == {"tuned": 1.5, "tuned_interval": (0.0, 3.0)}


def test_one_prompt_has_no_interval():
    result = compare(torch.tensor([2.0]), torch.tensor([1.0]), ["a"])
    assert (result["difference"], result["win_rate"]) == (1.0, 1.0)
    assert result["difference_interval"] is result["win_rate_interval"] is None


def test_rows_are_sorted_and_repeated_ones_dropped():
    rows = [{"index": index, "prompt": prompt} for index, prompt in ((2, "c"), (0, "a"), (1, "b"), (0, "a"))]
    assert [row["prompt"] for row in gather_rows(rows, world_size=1)] == ["a", "b", "c"]


def test_a_reward_must_give_one_score_per_image():
    class Single(Reward):
        def forward(self, images, prompts):
            return images.mean()[None]

    with pytest.raises(ValueError, match=r"reward 'single' returned .* \(1,\) for 3 images; expected .* \(3,\)"):
        score_images({"single": Single()}, torch.zeros(3, 3, 4, 4), PROMPTS, 8, torch.device("cpu"))


def test_markdown_cells_hold_any_prompt():
    assert markdown("a | b\n`c`\t*d* <e> [f](g) \\") == r"a \| b \`c\` \*d\* \<e\> \[f\](g) \\"


# -------------------------------------------------------------------------------------------------------- a whole test


@pytest.fixture(scope="module")
def tested(sd15, tmp_path_factory):
    """A trainer that has tested a trained LoRA on four prompts, one of them hostile."""
    prompts = [*PROMPTS, '../../x | `y`\n<b>, "z"']
    pl.seed_everything(5, verbose=False)
    module, data = make_module(sd15, lr=0.1), Data(prompts)
    evaluation = Evaluation({"red": Redness()}, grid_rows=3, save_images=True)
    trainer = make_trainer(tmp_path_factory.mktemp("tested"), [evaluation])
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    return trainer, module, prompts


def test_results_are_those_of_the_saved_images(tested):
    trainer, module, prompts = tested
    folder = Path(trainer.log_dir) / "evaluation"
    results = json.loads((folder / "results.json").read_text())
    red = results["rewards"]["red"]

    tuned, base = ([redness(folder / f"images/{index:05d}_{role}.png") for index in range(4)] for role in ROLES)
    assert red["tuned"] == pytest.approx(fmean(tuned), abs=1e-6)
    assert red["base"] == pytest.approx(fmean(base), abs=1e-6)
    assert red["difference"] == pytest.approx(fmean(tuned) - fmean(base), abs=1e-6)
    assert red["win_rate"] == sum(a > b for a, b in zip(tuned, base, strict=True)) / 4
    assert red["difference_interval"][0] <= red["difference"] <= red["difference_interval"][1]
    assert (results["num_prompts"], results["num_images"]) == (4, 4)
    assert results["seeds"] == {"number": 4, "first": 10, "last": 13}
    settings = [results[key] for key in ("num_inference_steps", "sampler", "guidance_scale", "pretrained")]
    assert settings == [2, "PNDMScheduler", 7.5, module.backbone.pretrained]

    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == prompts
    assert [float(row["red_tuned"]) for row in rows] == pytest.approx(tuned, abs=1e-6)
    assert [float(row["red_base"]) for row in rows] == pytest.approx(base, abs=1e-6)
    assert logged(trainer, "test/red_win_rate") == {4: red["win_rate"]}


def test_every_image_is_saved_under_its_index(tested):
    trainer, module, prompts = tested
    folder = Path(trainer.log_dir) / "evaluation" / "images"
    names = [f"{index:05d}_{role}.png" for index in range(4) for role in ("base", "tuned")]
    assert sorted(path.name for path in folder.iterdir()) == names
    expected = module.backbone.generate(prompts[3:], [13])[0]
    torch.testing.assert_close(pixels(folder / "00003_tuned.png"), expected, rtol=0, atol=0.5 / 255 + 1e-5)
    with module.backbone.reference():
        expected = module.backbone.generate(prompts[3:], [13])[0]
    torch.testing.assert_close(pixels(folder / "00003_base.png"), expected, rtol=0, atol=0.5 / 255 + 1e-5)


def test_the_page_and_the_grid_show_the_first_prompts(tested):
    trainer, _, prompts = tested
    folder = Path(trainer.log_dir) / "evaluation"
    page = (folder / "results.md").read_text(encoding="utf-8")
    assert "| reward | base | tuned | difference | win rate |" in page
    assert "4 prompts, 4 images, 4 seeds (10 to 13), 2 steps of PNDMScheduler, guidance 7.5" in page
    assert all(f"| {prompt} |" in page for prompt in prompts[:3])
    assert prompts[3] not in page
    with Image.open(folder / "grid.png") as grid:
        assert grid.size[0] == 2 * 160 + 3 * 8
        assert grid.size[1] > 3 * 160


def test_a_hostile_prompt_keeps_the_table_whole(sd15, tmp_path):
    prompt = "a | b\n| c ` d"
    trainer = make_trainer(tmp_path, [Evaluation({"red": Redness()})])
    trainer.test(make_module(sd15), datamodule=Data([prompt]), verbose=False)
    lines = (Path(trainer.log_dir) / "evaluation/results.md").read_text().splitlines()
    row = next(line for line in lines if line.startswith("| a"))
    assert row.startswith(r"| a \| b \| c \` d | 10 | ")
    assert row.replace(r"\|", "").count("|") == 4


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_the_last_line_printed_is_the_path_of_the_grid(sd15, tmp_path, capsys, bar):
    trainer = make_trainer(tmp_path, [Evaluation({"red": Redness()}), bar()], enable_progress_bar=True)
    trainer.test(make_module(sd15), datamodule=Data())
    printed = capsys.readouterr().out
    assert printed.endswith(f"{trainer.log_dir}/evaluation/grid.png\n")
    table = printed[printed.index("Base against tuned") :]
    assert "50.0 % [50.0, 50.0]" in table
    assert "3 prompts, 3 images" in table


def test_an_untrained_adapter_ties_with_its_base_on_every_prompt(sd15, tmp_path):
    trainer = make_trainer(tmp_path, [Evaluation({"red": Redness()})])
    trainer.test(make_module(sd15), datamodule=Data(), verbose=False)
    red = json.loads((Path(trainer.log_dir) / "evaluation/results.json").read_text())["rewards"]["red"]
    assert (red["difference"], red["win_rate"], red["win_rate_interval"]) == (0.0, 0.5, [0.5, 0.5])


def test_one_prompt_is_reported_without_interval(sd15, tmp_path):
    trainer = make_trainer(tmp_path, [Evaluation({"red": Redness()})])
    trainer.test(make_module(sd15), datamodule=Data(PROMPTS[:1]), verbose=False)
    folder = Path(trainer.log_dir) / "evaluation"
    assert json.loads((folder / "results.json").read_text())["rewards"]["red"]["win_rate_interval"] is None
    assert "| +0.0000 | 50.0 % |" in (folder / "results.md").read_text()


def test_a_score_that_is_no_number_stops_the_test_and_names_the_prompt(sd15, tmp_path):
    trainer = make_trainer(tmp_path, [Evaluation({"bad": Undefined(PROMPTS[1])})])
    with pytest.raises(ValueError, match="reward 'bad' scored an image of prompt 'a blue square' as nan"):
        trainer.test(make_module(sd15), datamodule=Data(), verbose=False)
    assert not (Path(trainer.log_dir) / "evaluation/results.json").exists()


class Odd(Reward):
    """Scores of the wrong kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def score(self, images, prompts):
        if self.kind == "raises":
            raise ValueError("the scorer is ill")
        return {
            "infinite": torch.full((len(prompts),), float("-inf")),
            "one": torch.zeros(1),
            "square": torch.zeros(len(prompts), 2),
        }[self.kind]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("infinite", "reward 'odd' scored an image of prompt 'a red circle' as -inf"),
        ("one", r"reward 'odd' returned scores of shape \(1,\) for 2 images; expected .* \(2,\)"),
        ("square", r"reward 'odd' returned scores of shape \(2, 2\) for 2 images"),
        ("raises", "the scorer is ill"),
    ],
)
def test_scores_of_another_kind_stop_the_test_at_the_first_batch(sd15, tmp_path, kind, message):
    trainer = make_trainer(tmp_path, [Evaluation({"red": Redness(), "odd": Odd(kind)})])
    with pytest.raises(ValueError, match=message):
        trainer.test(make_module(sd15), datamodule=Data(), verbose=False)
    assert len(list((tmp_path / "run" / "images").glob("*/*.png"))) == 4  # a batch of two, by base and tuned
    assert not list((tmp_path / "run").glob("*/evaluation/*.*"))


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="rewards: there is none"):
        Evaluation({})
    with pytest.raises(ValueError, match="grid_rows is 0"):
        Evaluation({"red": Redness()}, grid_rows=0)


# ------------------------------------------------------------------------------------------------- lists with groups


@pytest.fixture(scope="module")
def sorted_test(sd15, tmp_path_factory):
    """An evaluation of six prompts sorted in two ways, two images each: its folder, and its rows."""
    folder = tmp_path_factory.mktemp("sorted")
    rows = ["thing,animals,easy", "beast,animals,hard", "fish,animals,easy", "car,a|b *c*,hard", "bus,a|b *c*,easy"]
    (folder / "p.csv").write_text("\n".join(["prompt,Category,Challenge", *rows, ""]))
    prompts = PromptList(str(folder / "p.csv"), groups=["Category", "Challenge"], images_per_prompt=2, batch_size=3)
    trainer = make_trainer(folder, [Evaluation({"red": Redness()}, save_images=True)])
    trainer.test(tuned_module(sd15), PromptDataModule(prompts), verbose=False)
    return Path(trainer.log_dir) / "evaluation", [row.split(",") for row in rows]


def test_groups_have_tables_of_their_own(sorted_test):
    folder, rows = sorted_test
    results = json.loads((folder / "results.json").read_text())
    for name, column in (("Category", 1), ("Challenge", 2)):
        groups = results["groups"][name]
        assert list(groups) == list(dict.fromkeys(row[column] for row in rows))
        for group, found in groups.items():
            members = [i for i, row in enumerate(rows) if row[column] == group]
            assert found["num_prompts"] == len(members)
            scores = {
                role: [fmean(redness(folder / f"images/{2 * i + k:05d}_{role}.png") for k in (0, 1)) for i in members]
                for role in ROLES
            }
            for role in ROLES:
                assert found["rewards"]["red"][role] == pytest.approx(fmean(scores[role]), abs=1e-6)
    page = (folder / "results.md").read_text()
    assert "## red by Category" in page
    assert r"| a\|b \*c\* | 2 | " in page
    assert page.count("| Challenge | prompts | base | tuned | difference | win rate |") == 1
    with open(folder / "scores.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["group_Category"] for row in table[6:]] == ["a|b *c*"] * 4


def test_results_say_which_list_it_was(sorted_test):
    folder, rows = sorted_test
    results = json.loads((folder / "results.json").read_text())
    assert results["prompts"]["count"] == results["prompts"]["used"] == results["num_prompts"] == 5
    assert results["prompts"]["sha256"] == hash_of([row[0] for row in rows])
    assert results["num_images"] == 10
    assert results["seeds"] == {"number": 10, "first": 0, "last": 1_000_004}
    assert f"5 prompts (SHA-256 {results['prompts']['sha256'][:16]})" in (folder / "results.md").read_text()


def test_precisions_make_images_of_their_own(sd15, tmp_path):
    data = PromptDataModule(PromptList(str(write(tmp_path / "p.txt", "a\nb\n"))))
    policies = []
    for precision in ("32-true", "bf16-mixed"):
        trainer = make_trainer(tmp_path, [Evaluation({"red": Redness()})], precision=precision)
        trainer.test(make_module(sd15), data, verbose=False)
        policies.append(json.loads((Path(trainer.log_dir) / "evaluation/results.json").read_text())["policy"])
    assert policies[0] != policies[1]
    assert len(list((tmp_path / "run" / "images").glob("*/*.png"))) == 8
