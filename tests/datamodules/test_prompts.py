import json
import logging
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from lightning.pytorch.strategies import ModelParallelStrategy

from datamodules.prompts import PromptDataModule, PromptList, PromptSamples
from datamodules.sampling import evaluation_loader
from tests.datamodules.stream import Recorder, quiet_trainer


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.txt", "a cat\nein Hund, größer\n"),
        ("p.txt", "\ufeffa cat\r\nein Hund, größer"),
        ("p.json", json.dumps(["a cat", "ein Hund, größer"])),
        ("p.json", json.dumps([{"caption": "a cat", "id": 1}, {"caption": "ein Hund, größer"}])),
        ("p.json", json.dumps([{"prompt": "a cat"}, {"prompt": "ein Hund, größer"}])),
        ("p.jsonl", '{"prompt": "a cat"}\n\n{"prompt": "ein Hund, größer"}\n'),
        ("p.csv", 'n,caption\n1,a cat\n2,"ein Hund, größer"\n'),
        ("p.tsv", "n\tcaption\n1\ta cat\n2\tein Hund, größer\n"),
    ],
)
def test_text_json_jsonl_and_table_lists(name, text, tmp_path):
    assert PromptList(write(tmp_path / name, text)).read() == ["a cat", "ein Hund, größer"]


def test_a_column_of_a_parquet_file_or_folder(tmp_path):
    pq.write_table(pa.table({"Prompt": ["a", "b"], "other": ["x", "y"]}), tmp_path / "train.parquet")
    assert PromptList(str(tmp_path / "train.parquet")).read() == ["a", "b"]
    assert PromptList(str(tmp_path), column="other").read() == ["x", "y"]


def test_the_list_is_cut_and_repeats_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    file = write(tmp_path / "p.txt", "a\nb\na\nc\n")
    assert PromptList(file, max_prompts=3).read() == ["a", "b", "a"]
    assert f"Prompts: 3 from {file}, 1 of them repeats of others" in caplog.text


@pytest.mark.parametrize("run", ["test", "predict"])
def test_every_prompt_comes_once_with_its_own_seed(run, tmp_path):
    file = write(tmp_path / "p.txt", "a\nb\nc\n")
    module = Recorder()
    getattr(quiet_trainer(), run)(module, PromptDataModule(PromptList(file, seed=10, batch_size=2)))
    assert module.validated == [
        {"prompts": ["a", "b"], "seeds": [10, 11], "index": [0, 1]},
        {"prompts": ["c"], "seeds": [12], "index": [2]},
    ]


def test_unicode_separators_may_stand_in_a_prompt(tmp_path):
    assert PromptList(write(tmp_path / "p.txt", "a\u2028b\x0cc\nd\n")).read() == ["a\u2028b\x0cc", "d"]


def test_images_of_a_prompt_have_seeds_of_their_own_that_do_not_depend_on_their_number(tmp_path):
    file = write(tmp_path / "p.csv", "caption,style\na,x\nb,y \n")
    one, two = (
        list(PromptSamples(PromptList(file, groups=["style"]).loaded, images_per_prompt, seed=3))
        for images_per_prompt in (1, 2)
    )
    assert one == [("a", 3, 0, {"style": "x"}), ("b", 4, 1, {"style": "y"})]
    assert two == [
        ("a", 3, 0, {"style": "x"}),
        ("a", 1_000_003, 1, {"style": "x"}),
        ("b", 4, 2, {"style": "y"}),
        ("b", 1_000_004, 3, {"style": "y"}),
    ]


def test_groups_come_with_the_batches(tmp_path):
    file = write(tmp_path / "p.json", '[{"prompt": "a", "style": "x"}, {"prompt": "b", "style": "y"}]')
    module = Recorder()
    quiet_trainer().test(module, PromptDataModule(PromptList(file, groups=["style"], images_per_prompt=2)))
    assert module.validated[0]["groups"] == [{"style": "x"}] * 2 + [{"style": "y"}] * 2
    assert module.validated[0]["index"] == [0, 1, 2, 3]


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl", "csv"])
def test_a_hundred_thousand_prompts_are_read_in_a_few_seconds(suffix, tmp_path):
    prompts = [f"thing number {i}" for i in range(100_000)]
    text = {
        "txt": "\n".join(prompts),
        "json": json.dumps(prompts),
        "jsonl": "\n".join(json.dumps({"prompt": prompt}) for prompt in prompts),
        "csv": "\n".join(["prompt", *prompts]),
    }
    file = write(tmp_path / f"p.{suffix}", text[suffix])
    start = time.process_time()
    samples = PromptSamples(PromptList(file).loaded, 2, 0)
    assert time.process_time() - start < 5  # measured 0.6
    assert len(samples) == 200_000
    assert samples[-1] == ("thing number 99999", 1_099_999, 199_999, {})


def test_fewer_rows_than_devices_are_refused():
    trainer = quiet_trainer(strategy="ddp", devices=2)
    with pytest.raises(ValueError, match="1 rows to evaluate on 2 devices"):
        evaluation_loader(trainer, ["a"], 1, 0, list)


def test_sharded_models_need_as_many_batches_on_every_device():
    rows = list(range(5))
    sharded = quiet_trainer(strategy=ModelParallelStrategy(), devices=2)
    with pytest.raises(ValueError, match=r"5 rows in batches of 2 .* 1 or 2 batches.*multiple of 4"):
        evaluation_loader(sharded, rows, 2, 0, list)
    assert len(evaluation_loader(sharded, rows, 3, 0, list)) == 1
    assert len(evaluation_loader(quiet_trainer(strategy="ddp", devices=2), rows, 2, 0, list)) == 2


@pytest.mark.parametrize(
    ("name", "content", "settings", "message"),
    [
        ("p.txt", b"", {}, r"p\.txt: empty; expected one prompt per line"),
        ("p.txt", b"a\n\nb\n", {}, r"p\.txt, line 2: the prompt is '', expected text"),
        ("p.txt", b"a\n\n\n \nb\n", {}, r"p\.txt, line 2: the prompt is ''.*\(3 entries of 5 are no prompts\.\)"),
        ("p.txt", "größer".encode("latin-1"), {}, r"p\.txt: not UTF-8.*iconv -f LATIN1"),
        ("p.txt", "größer".encode("utf-16"), {}, r"not UTF-8.*begins as UTF-16 does.*iconv -f UTF-16"),
        ("p.txt", "a cat".encode("utf-16-le"), {}, r"p\.txt, line 1: .*holds NUL characters: .*probably UTF-16"),
        ("p.txt", b"a\n", {"groups": ["style"]}, r"p\.txt: a text file has no columns to sort by"),
        ("p.json", b'["a\\ud800"]', {}, r"p\.json, entry 0: .* half of a surrogate pair"),
        ("p.json", b'["a", {"prompt": "b"}, {"prompt": "c", "x": 1}, {"x": 2}]', {}, r"entry 3: no column caption"),
        ("p.json", b'[{"prompt": "b"}, {"caption": "c"}]', {}, r"entry 1: has caption, the entries before prompt"),
        ("p.json", b"[" * 100_000, {}, r"p\.json: not valid JSON"),
        ("p.csv", b"caption\na\n", {"groups": ["style"]}, r"p\.csv: no column style to sort the prompts by"),
        ("p.csv", b"a,b\n", {}, r"p\.csv: expected a line of column names, and at least one prompt"),
        ("p.csv", b"caption,b\nx,1\ny\n", {}, r"p\.csv, line 3: 1 cells, but 2 column names"),
        ("p.csv", b'caption\n"x\n', {}, r"p\.csv, line 2: not a table"),
        ("p.json", b"[]", {}, r"p\.json: expected a list of prompts"),
        ("p.json", b'{"a": 1}', {}, r"p\.json: expected a list of prompts"),
        ("p.json", b"[1, 2", {}, r"p\.json: not valid JSON"),
        ("p.json", b'["a", 7]', {}, r"p\.json, entry 1: the prompt is 7, expected text"),
        ("p.json", b'[{"x": "a"}]', {}, r"entry 0: no column caption or prompt or Prompt or text; found: x"),
        ("p.json", b'[{"x": "a"}]', {"column": "y"}, r"entry 0: no column y; found: x\. Say which one .* `column`"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": \n', {}, r"p\.jsonl, line 2: not valid JSON"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": 3}\n', {}, r"p\.jsonl, line 2: 'prompt' is 3, a number"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": null}\n', {}, r"p\.jsonl, line 2: the prompt is None"),
        ("p.parquet", b"PAR1", {}, r"p\.parquet: not a readable parquet file"),
        ("p.xlsx", b"PK", {}, r"files of type '\.xlsx' are not read"),
    ],
)
def test_bad_prompt_files(name, content, settings, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PromptList(str(tmp_path / name), **settings).read()


def test_a_folder_or_nothing_instead_of_a_prompt_file(tmp_path):
    (tmp_path / "p.txt").mkdir()
    with pytest.raises(ValueError, match=r"p\.txt is a folder, expected a file"):
        PromptList(str(tmp_path / "p.txt")).read()
    with pytest.raises(FileNotFoundError, match=r"q\.txt does not exist"):
        PromptList(str(tmp_path / "q.txt")).read()


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"max_prompts": 0}, {"seed": -1}, {"images_per_prompt": 0}, {"prompt_set": "hpsv2"}],
)
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match=f"Prompts: {next(iter(settings))} is"):
        PromptList("p.txt", **settings)
