"""PushToHub: the folder for the hub holds the model, an honest card and nothing of this machine; no network is used."""

import json
import re
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig

from callbacks.evaluation import Evaluation
from callbacks.export_pipeline import LORA_FILE, ExportPipeline
from callbacks.model_card import hub_id, shown
from callbacks.push_to_hub import PushToHub
from callbacks.sample_images import SampleImages
from lightning_modules.cli.app import run
from tests.callbacks.runs import PROMPTS, Data, Redness, make_module, make_trainer
from tests.test_whole_runs import config, write_config, write_pairs

LORA_FILES = ["README.md", "grid.png", LORA_FILE, "run.safetensors"]


@pytest.fixture(autouse=True)
def _seed():
    pl.seed_everything(5, verbose=False)


class FakeHub:
    """Stands in for HfApi: writes down what it is asked, and fails if told to."""

    calls: list[tuple[str, dict]] = []
    error: Exception | None = None

    def create_repo(self, repo_id: str, **settings) -> None:
        self.calls.append(("create_repo", {"repo_id": repo_id} | settings))

    def upload_folder(self, **settings) -> str:
        folder = Path(settings["folder_path"])
        settings["card"] = (folder / "README.md").read_text()
        self.calls.append(("upload_folder", settings))
        if self.error is not None:
            raise self.error
        return "https://huggingface.co/me/model/commit/1"


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setattr(FakeHub, "calls", [])
    return FakeHub


def fit(tmp_path: Path, base: Path, callbacks: list[pl.Callback], lora=True, test: bool = False, **settings):
    """A short run; gives the module and the run's folder."""
    module, data = make_module(base, lora, lr=0.1, **settings), Data()
    trainer = make_trainer(tmp_path, callbacks, max_steps=2, limit_val_batches=1, val_check_interval=1)
    trainer.fit(module, datamodule=data)
    if test:
        trainer.test(module, datamodule=data, verbose=False)
    return module, Path(trainer.log_dir)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def card(folder: Path) -> tuple[dict, str]:
    """Metadata and page."""
    loaded = ModelCard.load(folder / "hub" / "README.md")
    return loaded.data.to_dict(), loaded.text


def run_snippet(page: str, tmp_path: Path, **replaced: Path) -> torch.Tensor:
    """The image of the card's usage snippet, run on the CPU in float32 with folders in place of hub ids."""
    code = re.search(r"```python\n(.*?)```", page, re.DOTALL).group(1)
    code = code.replace('"cuda"', '"cpu"').replace("float16", "float32")
    code = code.replace(").images[0]", "    output_type='pt').images[0]").replace('image.save("image.png")', "")
    for name, folder in replaced.items():
        assert f"'me/{name}'" in code
        code = code.replace(f"'me/{name}'", repr(str(folder)))
    names: dict = {}
    exec(code, names)
    return names["image"]


# --------------------------------------------------------------------------------------------------------- dry runs


def test_without_push_a_folder_is_written_and_nothing_else_happens(sd15, tmp_path, hub, capsys):
    callbacks = [PushToHub("me/model"), SampleImages(PROMPTS, 2), ExportPipeline(merged=True)]
    module, folder = fit(tmp_path, sd15, callbacks)
    assert hub.calls == []
    assert files(folder / "hub") == LORA_FILES  # no merged pipeline, checkpoints, logs
    assert not list(folder.glob(".hub*"))
    for name in (LORA_FILE, "run.safetensors"):
        assert (folder / "hub" / name).read_bytes() == (folder / "export" / name).read_bytes()
    assert (folder / "hub" / "grid.png").read_bytes() == (folder / "samples" / "step_000002.png").read_bytes()


def test_the_card_tells_what_the_model_is_and_how_it_was_made(sd15, tmp_path):
    lora = LoraConfig(r=3, lora_alpha=5, use_rslora=True)
    callbacks = [ExportPipeline(), PushToHub("me/model", license="openrail++", base_model="me/base")]
    _, folder = fit(tmp_path, sd15, callbacks, lora, chunk_size=3)
    data, page = card(folder)
    assert data == {
        "base_model": "me/base",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "license": "openrail++",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "lora", "preference-alignment", "diffusion-dpo"],
    }
    for line in (
        "# model",
        "| beta | 2000 |",
        "| loss\\_type | sigmoid |",
        "| base model | me/base |",
        "| trained | LoRA on the unet, use\\_rslora |",
        "| rank | 3 |",
        "| alpha | 5 |",
        "| targets | to\\_k, to\\_out.0, to\\_q, to\\_v |",
        "| source | not on the hub |",
        "| optimizer steps | 2 |",
        "| samples per step | 2 |",
        "| learning rate | 0.1 |",
        "| precision | 32-true |",
        "| seed | 5 |",
    ):
        assert line in page.splitlines(), line
    assert re.search(r"^\| val/loss \| [\d.]+ \|$", page.replace("\\", ""), re.MULTILINE)
    assert re.search(r"diffusers \d+\.\d+", page)
    assert "put `run.safetensors` into `models/loras`" in page
    assert "grid.png" not in page


def test_a_test_after_the_fit_brings_its_table_and_its_grid(sd15, tmp_path):
    callbacks = [PushToHub("me/model"), Evaluation({"red": Redness()}, grid_rows=2), ExportPipeline()]
    callbacks.append(SampleImages(["something else"], 2))
    _, folder = fit(tmp_path, sd15, callbacks, test=True)
    _, page = card(folder)
    results = json.loads((folder / "evaluation" / "results.json").read_text())["rewards"]["red"]
    assert f"| red | {results['base']:.4f} | {results['tuned']:.4f} |" in page
    assert "| a red circle | 10 |\n| a blue square | 11 |\n\n" in page
    assert "val/loss" in page.replace("\\", "")
    assert (folder / "hub" / "grid.png").read_bytes() == (folder / "evaluation" / "grid.png").read_bytes()


def test_numbers_of_other_weights_stay_off_the_card(sd15, tmp_path):
    callbacks = [PushToHub("me/model"), Evaluation({"red": Redness()}), ExportPipeline()]
    module, folder = fit(tmp_path, sd15, callbacks, test=True)
    results = folder / "evaluation" / "results.json"
    results.write_text(json.dumps(json.loads(results.read_text()) | {"checkpoint": "elsewhere.ckpt"}))
    callbacks[0].teardown(module.trainer, module, "test")
    assert "| red |" not in card(folder)[1]


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_the_snippet_of_a_lora_draws_the_policys_image(model, tmp_path, request):
    base = request.getfixturevalue(model)
    callbacks = [ExportPipeline(), PushToHub("me/model", base_model="me/base"), SampleImages(PROMPTS, 2, seed=7)]
    module, folder = fit(tmp_path, base, callbacks, LoraConfig(r=2, lora_alpha=6))
    image = run_snippet(card(folder)[1], tmp_path, model=folder / "hub", base=base)
    torch.testing.assert_close(image, module.backbone.generate(PROMPTS[:1], [7])[0], rtol=0, atol=1e-5)


def test_the_snippet_of_a_whole_pipeline_draws_its_image(sd15, tmp_path):
    callbacks = [ExportPipeline(), PushToHub("me/model", base_model="me/base"), SampleImages(PROMPTS, 2)]
    module, folder = fit(tmp_path, sd15, callbacks, lora=False)
    data, page = card(folder)
    assert data["base_model_relation"] == "finetune"
    assert "lora" not in data["tags"]
    assert "ComfyUI" not in page
    assert {"README.md", "grid.png", "model_index.json"} < set(files(folder / "hub"))
    image = run_snippet(page, tmp_path, model=folder / "hub")
    torch.testing.assert_close(image, module.backbone.generate(PROMPTS[:1], [0])[0], rtol=0, atol=1e-5)


def test_other_parts_of_the_pipeline_are_in_the_snippet(sd15, sd21, tmp_path):
    callbacks = [ExportPipeline(), PushToHub("me/model", base_model="me/base")]
    module, folder = fit(tmp_path, sd15, callbacks, vae=str(sd21 / "vae"), denoiser=str(sd21))
    page = card(folder)[1]
    assert "from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel" in page
    assert "vae = AutoencoderKL.from_pretrained('path/to/the/vae', dtype=torch.float16)" in page
    assert "from_pretrained('path/to/the/unet', subfolder='unet', dtype=torch.float16)" in page
    assert "'me/base', dtype=torch.float16, unet=unet, vae=vae)" in page


@pytest.mark.parametrize("lora", [True, False])
def test_nothing_names_a_folder_of_this_machine(sd15, tmp_path, lora, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = Data()
    data.source = str(tmp_path / "pairs.parquet")
    callbacks = [PushToHub("me/model"), Evaluation({"red": Redness()}), ExportPipeline(), SampleImages(PROMPTS, 2)]
    trainer = make_trainer(tmp_path, callbacks, max_steps=1)
    module = make_module(sd15, lora)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    folder = Path(trainer.log_dir) / "hub"
    assert len(files(folder)) >= 4
    for file in files(folder):
        content = (folder / file).read_bytes()
        for private in (str(tmp_path), str(sd15), str(Path.home()), "/tmp", str(Path(__file__).parents[2])):
            assert private.encode() not in content, (file, private)


def test_prompts_and_names_cannot_break_the_page(sd15, tmp_path):
    nasty = [
        "a | b\n\n# c",
        "<script>alert(1)</script> ![x](http://x)",
        "```\n---\nlicense: mit",
        'it\'s "quoted" & `c`',
    ]
    callbacks = [ExportPipeline(), SampleImages(nasty, 2), PushToHub("me/model", base_model="me/base")]
    _, folder = fit(tmp_path, sd15, callbacks)
    data, page = card(folder)
    assert "license" not in data
    assert [line for line in page.splitlines() if line.startswith("#")] == [
        "# model",
        "## Use",
        "## Results",
        "## Training",
    ]
    rows = [line for line in page.splitlines() if re.fullmatch(r"\| .* \| \d \|", line)]
    assert rows[:4] == [
        r"| a \| b \# c | 0 |",
        r"| \<script\>alert(1)\</script\> \!\[x\](http://x) | 1 |",
        r"| \`\`\` --- license: mit | 2 |",
        r"""| it's "quoted" \& \`c\` | 3 |""",
    ]
    compile(re.search(r"```python\n(.*?)\n```\n", page, re.DOTALL).group(1), "snippet", "exec")
    assert "'a | b\\n\\n# c'," in page


# ---------------------------------------------------------------------------------------------------------- uploads


def test_push_uploads_exactly_the_folder_once_after_the_fit(sd15, tmp_path, hub):
    _, folder = fit(tmp_path, sd15, [ExportPipeline(), PushToHub("me/model", push=True), SampleImages(PROMPTS, 2)])
    (_, created), (_, uploaded) = hub.calls
    assert created == {"repo_id": "me/model", "private": True, "exist_ok": True}
    assert uploaded["repo_id"] == "me/model"
    assert uploaded["folder_path"] == folder / "hub"
    assert uploaded["allow_patterns"] == LORA_FILES == files(folder / "hub")
    assert "hf_secret" not in uploaded["card"]


def whole_run(tmp_path: Path, base: Path, monkeypatch, **settings) -> Path:
    """A run from a config, with parquet pairs, prompts and evaluation."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "prompts.txt").write_text("a red circle\n")
    pairs = write_pairs(tmp_path / "data" / "train.parquet", 9)
    callbacks = [
        {"class_path": "callbacks.push_to_hub.PushToHub", "init_args": {"repo_id": "me/model", **settings}},
        {
            "class_path": "callbacks.evaluation.Evaluation",
            "init_args": {"rewards": {"bright": {"class_path": "tests.test_whole_runs.Brightness"}}},
        },
        {"class_path": "callbacks.export_pipeline.ExportPipeline"},
    ]
    content = config(base, pairs, callbacks=callbacks, max_steps=2) | {"evaluate": True}
    content["model"]["init_args"]["loss_type"] = "hinge"
    return Path(run(["fit", "--config", write_config(tmp_path / "c" / "run.yaml", content)]).trainer.log_dir)


def test_with_an_evaluation_to_come_the_upload_waits_for_its_numbers(sd15, tmp_path, hub, monkeypatch):
    folder = whole_run(tmp_path, sd15, monkeypatch, push=True, private=False)
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    assert hub.calls[0][1]["private"] is False
    page = hub.calls[1][1]["card"]
    assert page == (folder / "hub" / "README.md").read_text()
    assert "| bright | " in page
    assert "c-run.safetensors" in files(folder / "hub")


def test_a_run_from_a_config_tells_all_its_settings(sd15, tmp_path, monkeypatch):
    _, page = card(whole_run(tmp_path, sd15, monkeypatch))
    for line in ("| loss\\_type | hinge |", "| ties | drop |", "| split | train |", "| resolution | 16 |"):
        assert line in page.splitlines(), line
    assert "AdamW(lr=0.001, betas=0.9 0.999" in page
    assert "train.parquet" not in page
    assert "num\\_workers" not in page


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("xet: connection reset"), None])
def test_a_failed_upload_keeps_the_export_and_says_the_command(sd15, tmp_path, hub, monkeypatch, error):
    if error is None:
        import httpx2

        request = httpx2.Request("POST", "https://huggingface.co")
        error = HfHubHTTPError("403 Forbidden: token may not write", response=httpx2.Response(403, request=request))
    monkeypatch.setattr(hub, "error", error)
    with pytest.warns(UserWarning, match=r"upload to me/model failed: .* hf upload me/model .*/hub \. --private"):
        _, folder = fit(tmp_path, sd15, [ExportPipeline(), PushToHub("me/model", push=True)])
    assert files(folder / "hub") == ["README.md", LORA_FILE, "run.safetensors"]
    assert files(folder / "export") == [LORA_FILE, "run.safetensors"]


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"repo_id": "model"}, "repo_id is 'model'; expected owner/name.* The owner is missing"),
        ({"repo_id": "me/my model"}, "expected owner/name, such as me/my-lora. Repo id must use alphanumeric"),
        ({"repo_id": "https://huggingface.co/me/model"}, "repo_id is 'https"),
        ({"repo_id": "me/model.git"}, "repo_id is 'me/model.git'"),
        ({"repo_id": ""}, "repo_id is ''"),
        ({"repo_id": "me/model", "base_model": "./base"}, "base_model is './base'"),
        ({"repo_id": "me/model", "license": "MIT License"}, "license is 'MIT License'.* such as openrail"),
    ],
)
def test_names_that_the_hub_would_refuse_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        PushToHub(**settings)


@pytest.mark.parametrize(
    ("callbacks", "offline", "token", "message"),
    [
        ([PushToHub("me/model")], False, "t", "name `class_path: callbacks.export_pipeline.ExportPipeline`"),
        ([PushToHub("me/model", push=True), ExportPipeline()], False, None, "no token .* Run `hf auth login`"),
        ([ExportPipeline(), PushToHub("me/model", push=True)], True, "t", "HF_HUB_OFFLINE=1 forbids the upload"),
    ],
)
def test_what_cannot_be_shared_stops_the_run_before_anything_is_loaded(
    callbacks, offline, token, message, sd15, tmp_path, hub, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    module = make_module(sd15)
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, callbacks).fit(module, datamodule=Data())
    assert not module.backbone.loaded
    assert hub.calls == []


def test_validate_test_and_predict_alone_write_nothing(sd15, tmp_path, hub):
    callbacks = [ExportPipeline(), PushToHub("me/model", push=True), Evaluation({"red": Redness()})]
    trainer = make_trainer(tmp_path, callbacks)
    module = make_module(sd15)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.test(module, datamodule=Data(), verbose=False)
        trainer.predict(module, datamodule=Data())
    assert hub.calls == []
    assert not (Path(trainer.log_dir) / "hub").exists()


# ---------------------------------------------------------------------------------------------------- what can be shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (8, "8"),
        (1e-6, "1e-06"),
        ("drop", "drop"),
        ([0.9, 0.999], "0.9 0.999"),
        (
            {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "amsgrad": False, "fused": None}},
            "AdamW(lr=0.1)",
        ),
        ("me/pairs", "me/pairs"),
        (None, None),
        ("/home/jo/pairs", None),
        ("~/pairs", None),
        ("../pairs", None),
        ("C:\\Users\\jo", None),
        ("s3://bucket/key?token=x", None),
        ("pipe: aws s3 cp s3://b/{0..9}.tar -", None),
        (["a", "/home/jo"], None),
        ({"caption": "text"}, None),
    ],
)
def test_settings_are_shown_unless_they_could_name_a_place(value, text):
    assert shown(value) == text


def test_a_folder_that_looks_like_a_hub_id_is_none(tmp_path, monkeypatch):
    assert hub_id("data/pairs") == "data/pairs"
    (tmp_path / "data" / "pairs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("data/pairs") is None
    assert hub_id("a/b/c") is None
    assert hub_id(["a/b"]) is None


def test_metadata_is_yaml_whatever_it_holds(sd15, tmp_path):
    _, folder = fit(tmp_path, sd15, [ExportPipeline(), PushToHub("me/no", license="other", base_model="null/on")])
    head = (folder / "hub" / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(head)["base_model"] == "null/on"
