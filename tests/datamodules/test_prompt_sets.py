"""Published prompt sets: read in their layouts, counted, hashed, sorted."""

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.prompt_sets import SETS, hash_of
from datamodules.prompts import PromptList

COUNTS = {"pickapic_validation_unique": 500, "hpdv2": 3200, "partiprompts": 1632, "drawbench": 200}
STYLES = ("anime", "concept-art", "paintings", "photo")


def save_hpdv2(folder: Path, per_style: int = 800) -> Path:
    folder.mkdir(parents=True)
    for style in STYLES:
        (folder / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(per_style)]))
    return folder


def save_partiprompts(folder: Path, number: int = 1632) -> Path:
    rows = [f'"thing" {i}\tcategory {i % 12}\tchallenge {i % 11}\t' for i in range(number)]
    file = folder / "PartiPrompts.tsv"
    file.write_text("\n".join(["Prompt\tCategory\tChallenge\tNote", *rows, ""]))
    return file


def save_drawbench(folder: Path, number: int = 200) -> Path:
    file = folder / "drawbench.csv"
    with file.open("w", newline="") as out:
        csv.writer(out).writerows(
            [["Prompts", "Category"], *([f'"a", {i}', "Gary Marcus et al. "] for i in range(number))]
        )
    return file


def save_pickapic(folder: Path, number: int = 500) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", 7), ("validation_unique", number)):
        table = pa.table({"caption": [f"{split} {i}" for i in range(rows)], "label_0": [1.0] * rows})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_the_counts_are_the_published_ones():
    assert {name: known.count for name, known in SETS.items()} == COUNTS


def test_the_hash_is_that_of_the_lines():
    assert hash_of([" a cat ", "größer"]) == hashlib.sha256("a cat\ngrößer".encode()).hexdigest()


@pytest.mark.parametrize("place", ["", "benchmark"])
def test_hpdv2_is_four_files_sorted_by_style(place, tmp_path):
    save_hpdv2(tmp_path / "hpd" / place)
    prompts = PromptList(str(tmp_path / "hpd"), prompt_set="hpdv2").loaded
    assert prompts.texts[800] == "concept-art 0"
    assert list(prompts.groups) == ["style"]
    assert [prompts.groups["style"].count(style) for style in STYLES] == [800] * 4
    assert prompts.about["as_published"] is None  # nobody knows
    assert prompts.about["sha256"] == hash_of(prompts.texts)


def test_partiprompts_keeps_quotation_marks_and_both_sortings(tmp_path):
    for source in (save_partiprompts(tmp_path), tmp_path):
        prompts = PromptList(str(source), prompt_set="partiprompts").loaded
        assert prompts.texts[7] == '"thing" 7'
        assert {name: len(set(values)) for name, values in prompts.groups.items()} == {"Category": 12, "Challenge": 11}


def test_drawbench_is_a_table_or_a_bare_list(tmp_path):
    prompts = PromptList(str(save_drawbench(tmp_path)), prompt_set="drawbench").loaded
    assert prompts.texts[3] == '"a", 3'
    assert set(prompts.groups["Category"]) == {"Gary Marcus et al."}
    (tmp_path / "drawbench.json").write_text(json.dumps(prompts.texts))
    bare = PromptList(str(tmp_path / "drawbench.json"), prompt_set="drawbench").loaded
    assert (bare.texts, bare.groups) == (prompts.texts, {})
    assert bare.about["sha256"] == prompts.about["sha256"]


def test_pickapic_is_its_own_split_of_a_folder_or_any_list(tmp_path):
    prompts = PromptList(str(save_pickapic(tmp_path / "data")), prompt_set="pickapic_validation_unique").read()
    assert (len(prompts), prompts[0]) == (500, "validation_unique 0")
    file = tmp_path / "data" / "validation_unique-00000-of-00001.parquet"
    assert PromptList(str(file), prompt_set="pickapic_validation_unique").read() == prompts
    (tmp_path / "captions.txt").write_text("\n".join(prompts))
    assert PromptList(str(tmp_path / "captions.txt"), prompt_set="pickapic_validation_unique").read() == prompts


def test_results_know_the_list(tmp_path, monkeypatch, caplog):
    file = save_partiprompts(tmp_path)
    about = PromptList(str(file), prompt_set="partiprompts", max_prompts=10).loaded.about
    assert about == {
        "source": str(file),
        "set": "partiprompts",
        "count": 1632,
        "sha256": hash_of([f'"thing" {i}' for i in range(1632)]),
        "as_published": False,
        "used": 10,
    }
    monkeypatch.setitem(SETS, "partiprompts", replace(SETS["partiprompts"], sha256=about["sha256"]))
    assert PromptList(str(file), prompt_set="partiprompts").loaded.about["as_published"] is True


def test_another_text_is_announced(tmp_path):
    with pytest.warns(UserWarning, match="as many prompts as partiprompts, but their text is not the published one"):
        PromptList(str(save_partiprompts(tmp_path)), prompt_set="partiprompts").read()


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("hpdv2", lambda folder: save_hpdv2(folder / "hpd", 799)),
        ("partiprompts", lambda folder: save_partiprompts(folder, 1631)),
        ("drawbench", lambda folder: save_drawbench(folder, 201)),
        ("pickapic_validation_unique", lambda folder: save_pickapic(folder / "p", 499)),
    ],
)
def test_another_count_is_refused_unless_asked_for(name, save, tmp_path):
    source = str(save(tmp_path))
    with pytest.raises(ValueError, match=rf"holds \d+ prompts, but {name} has {COUNTS[name]}.*allow_other_count: true"):
        PromptList(source, prompt_set=name).read()
    with pytest.warns(UserWarning, match="it is taken as it is"):
        about = PromptList(source, prompt_set=name, allow_other_count=True).loaded.about
    assert about["set"] == name
    assert about["count"] != COUNTS[name]


def test_a_style_that_is_missing_is_named(tmp_path):
    (save_hpdv2(tmp_path / "hpd") / "photo.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"photo\.json does not exist"):
        PromptList(str(tmp_path / "hpd"), prompt_set="hpdv2").read()


def test_a_name_that_no_set_has_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="no prompt set of that name; the known ones are pickapic.*drawbench"):
        PromptList("partipromts").read()


@pytest.mark.parametrize("name", COUNTS)
def test_a_name_alone_means_the_hub_and_without_one_the_way_out_is_told(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=f"{name} is not in the cache of the hub.*`prompt_set: {name}`"):
        PromptList(name).read()


def test_a_file_of_that_name_comes_before_the_hub(tmp_path, monkeypatch):
    save_hpdv2(tmp_path / "hpdv2")
    monkeypatch.chdir(tmp_path)
    assert len(PromptList("hpdv2", prompt_set="hpdv2").read()) == 3200


def test_a_set_is_read_from_the_hubs_cache(tmp_path, monkeypatch):
    asked = []

    def download(repo: str, file: str, repo_type: str) -> str:
        asked.append((repo, file, repo_type))
        return str(tmp_path / "hpd" / Path(file).name)

    save_hpdv2(tmp_path / "hpd")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    prompts = PromptList("hpdv2").loaded
    assert asked == [("zhwang/HPDv2", f"benchmark/{style}.json", "dataset") for style in STYLES]
    assert (prompts.about["set"], prompts.about["count"]) == ("hpdv2", 3200)
