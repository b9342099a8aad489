"""What the pages say is true: commands parse, paths exist, the option map agrees with the recipes."""

import ast
import functools
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from lightning_modules.cli.parser import LimelightParser
from lightning_modules.cli.schema import import_rooms

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DPO_PAGE = ROOT / "cli_configs/dpo/README.md"
ORPO_PAGE = ROOT / "cli_configs/orpo/README.md"
DMDR_PAGE = ROOT / "cli_configs/dmdr/README.md"
SPM_PAGE = ROOT / "cli_configs/spm/README.md"
SPO_PAGE = ROOT / "cli_configs/spo/README.md"
PAGES = [README, *sorted(ROOT.glob("cli_configs/*/*.md"))]
RECIPES = sorted(ROOT.glob("cli_configs/**/*.yaml"))
ROOMS = ("lightning_modules", "datamodules", "callbacks", "cli_configs")

# Every argument of the authors' train.py, in its order.
PUBLISHED = """
input_perturbation pretrained_model_name_or_path revision dataset_name dataset_config_name train_data_dir image_column
caption_column max_train_samples output_dir cache_dir seed resolution random_crop no_hflip train_batch_size
num_train_epochs max_train_steps gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler
lr_warmup_steps use_adafactor allow_tf32 dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay adam_epsilon
max_grad_norm hub_model_id logging_dir mixed_precision report_to local_rank checkpointing_steps resume_from_checkpoint
noise_offset tracker_project_name pretrained_vae_model_name_or_path sdxl sft beta_dpo hard_skip_resume unet_init
proportion_empty_prompts split choice_model dreamlike_pairs_only
"""
# What the arguments of the diffusers LoRA examples have beyond these.
PUBLISHED_LORA = """
rank loss_type lr_num_cycles lr_power use_8bit_adam dataset_split_name vae_encode_batch_size variant run_validation
validation_steps checkpoints_total_limit enable_xformers_memory_efficient_attention prior_generation_precision
push_to_hub hub_token tracker_name is_turbo
"""
# Every argument of the published ORPO script, and what those of the shard script have beyond them.
PUBLISHED_ORPO = """
pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant cache_dir dataset_name
dataset_split_name max_train_samples run_validation validation_steps output_dir seed resolution vae_encode_batch_size
no_hflip random_crop train_batch_size num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit
resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing beta_orpo learning_rate scale_lr lr_scheduler
lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay
adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir report_to allow_tf32 mixed_precision
prior_generation_precision local_rank enable_xformers_memory_efficient_attention rank tracker_name
"""
PUBLISHED_SHARDS = "dataset_path num_train_examples per_gpu_batch_size global_batch_size"
# Every key of the published SPO configs; the type names of functions and classes left out.
PUBLISHED_SPO = """
seed num_checkpoint_limit allow_tf32 use_xformers use_checkpointing pretrained.model pretrained.vae_model_name_or_path
use_lora lora_rank preference_model_func_cfg.model_pretrained_model_name_or_path
preference_model_func_cfg.processor_pretrained_model_name_or_path preference_model_func_cfg.ckpt_path
compare_func_cfg.threshold dataset_cfg.meta_json_path dataset_cfg.pretrained_tokenzier_path dataloader_num_workers
dataloader_shuffle dataloader_pin_memory dataloader_drop_last num_epochs resume_from sample.num_steps sample.eta
sample.guidance_scale sample.sample_batch_size sample.num_sample_each_step sample.num_inner_step train.train_batch_size
train.use_8bit_adam train.learning_rate train.adam_beta1 train.adam_beta2 train.adam_weight_decay train.adam_epsilon
train.gradient_accumulation_steps train.max_grad_norm train.cfg train.divert_start_step train.beta train.eps
validation_prompts num_validation_images eval_interval run_name wandb_project_name wandb_entity_name logdir
save_interval
"""


class Parsed(Exception):
    """Carries the config out of a command line that parsed."""


class ParseOnly(LimelightParser):
    """The command line's parser, without the run."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        super().parse_arguments(parser, args)
        raise Parsed(self.config)


@functools.cache
def parse(arguments: str) -> Namespace:
    """The config of a command line, given without the program's name; a mistake in it fails the test."""
    words = [recipe_of_run(word) for word in shlex.split(arguments)]
    import_rooms()  # as main.py does, so that a class is found by its short name
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr("sys.argv", ["main.py"])
        try:
            ParseOnly(words)
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit as stopped:
            if stopped.code == 0:  # --help, --print_config
                return Namespace()
    pytest.fail(f"`main.py {arguments}` does not parse")


def recipe_of_run(word: str) -> str:
    """runs/dpo-sd15/version_0/config.yaml is what cli_configs/dpo/sd15.yaml leaves behind."""
    return re.sub(r"^runs/(\w+)-(\w+)/version_0/config\.yaml$", r"cli_configs/\1/\2.yaml", word)


def commands(text: str) -> list[str]:
    """The arguments of every `main.py` command in a text, continuation lines joined."""
    text = re.sub(r"\\\n[#\s]*", "", text)
    launch = r"(?:python|srun python|torchrun [^\n`]*?) main\.py "
    found = re.findall(launch + r"((?:fit|validate|test|predict|cache|--)[^\n`#]*)", text)
    return [arguments.split("&&")[0].strip() for arguments in found]


def header(recipe: Path) -> str:
    """The comment at the top of a YAML."""
    lines = recipe.read_text().splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ------------------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_a_recipes_header_holds_the_command_that_runs_it(recipe):
    own = [arguments for arguments in commands(header(recipe)) if f"--config {name(recipe)}" in arguments]
    assert own, f"{name(recipe)} does not say how it is run"
    for arguments in commands(header(recipe)):
        parse(arguments)


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_options_that_a_header_proposes_are_accepted(recipe):
    proposed = re.findall(r"^#\s+(--.*)$", header(recipe), re.MULTILINE)
    if proposed:
        parse(f"fit --config {name(recipe)} {' '.join(proposed)}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_and_options_of_a_page_are_accepted(page):
    found = commands(page.read_text())
    assert found
    for arguments in found:
        parse(arguments)
    for option in re.findall(r"`(--(?:model|data|trainer)\.[^`]+)`", page.read_text()):
        if " " in option:
            recipes = {ORPO_PAGE: "orpo/sdxl_lora", SPM_PAGE: "spm/sd15", SPO_PAGE: "spo/sd15"}
            recipe = recipes.get(page, "dpo/sd15")
            parse(f"fit --config cli_configs/{recipe}.yaml {option}")


def test_the_readme_names_the_test_command_that_ci_runs():
    lines = [line.strip() for line in (ROOT / ".ci/run").read_text().splitlines() if not line.lstrip().startswith("#")]
    ci = [line for line in lines if "pytest" in line]
    readme = re.findall(r"^    (?:pip install uv && )?(.*pytest.*)$", README.read_text(), re.MULTILINE)
    assert readme == ci


# --------------------------------------------------------------------------------------------------- paths and names


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_that_a_page_mentions_exists(page):
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(rf"\b((?:{'|'.join(ROOMS)}|tests|\.ci)/[\w./]*\w)", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_function_that_a_page_names_exists(page):
    for path in re.findall(rf"`((?:{'|'.join(ROOMS[:3])})(?:\.\w+)+)`", page.read_text()):
        module, attributes = path, []
        while not (ROOT / f"{module.replace('.', '/')}.py").exists():
            module, _, attribute = module.rpartition(".")
            assert module, path
            attributes.insert(0, attribute)
        functools.reduce(getattr, attributes, importlib.import_module(module))


def test_the_readmes_tree_holds_every_file():
    tree = README.read_text().split("```text\n")[1].split("```")[0]
    listed, room = set(), ""
    for line in tree.splitlines():
        files = [part for part in re.split(" {2,}", line.strip()) if " " not in part]  # the rest says what they are
        room = room if line.startswith(" ") else files[0]
        listed |= {room + file for file in files} if line.startswith(" ") else {room}
    for path in listed:
        assert (ROOT / path).exists(), path
    for folder in ROOMS:
        for file in (ROOT / folder).rglob("*"):
            if file.suffix in (".py", ".yaml") and file.name != "__init__.py":
                assert name(file) in listed, f"{name(file)} is missing from the README's file tree"


# ---------------------------------------------------------------------------------------------------- the option map


def option_maps(page: Path) -> list[list[list[str]]]:
    """The tables of a page's option map: of the first script, and what another one has beyond it."""
    section = page.read_text().split("## Every option of the published script")[1].split("\n## ")[0]
    return [table(part) for part in section.split("\n### Further options")]


def table(section: str, columns: int = 5) -> list[list[str]]:
    """The cells of a Markdown table's rows, heading and rule left out."""
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert all(len(row) == columns for row in rows)
    return rows


def look_up(config: Namespace, path: str) -> Any:
    """The value of `model.optimizer.lr`, through the init_args between; KeyError if there is no such option."""
    first, *rest = path.split(".")
    if first[0].isupper():
        node = next(c for c in config.trainer.callbacks if c.class_path.endswith(f".{first}"))
    else:
        node = vars(config)[first]
    for key in rest:
        node = vars(node.get("init_args", node))[key]
    return node


def value_of(cell: str) -> Any:
    if cell in ("null", "true", "false"):
        return {"null": None, "true": True, "false": False}[cell]
    try:
        return ast.literal_eval(cell)
    except (ValueError, SyntaxError):
        return cell


def test_the_map_holds_every_published_argument():
    full, lora = option_maps(DPO_PAGE)
    assert sorted(row[0] for row in full) == sorted(f"`--{argument}`" for argument in PUBLISHED.split())
    assert {f"`--{argument}`" for argument in PUBLISHED_LORA.split()} <= {row[0] for row in lora}
    full, shards = option_maps(ORPO_PAGE)
    options = [row[0] for row in full if row[0].startswith("`")]
    assert sorted(options) == sorted(f"`--{argument}`" for argument in PUBLISHED_ORPO.split())
    assert {f"`--{argument}`" for argument in PUBLISHED_SHARDS.split()} <= {row[0] for row in shards}


@pytest.mark.parametrize(
    ("page", "which", "recipe"),
    [
        (DPO_PAGE, 0, "dpo/sd15"),
        (DPO_PAGE, 1, "dpo/sd15_lora"),
        (ORPO_PAGE, 0, "orpo/sdxl_lora"),
        (ORPO_PAGE, 1, "orpo/sdxl_lora_shards"),
        (SPM_PAGE, 0, "spm/sd15"),
    ],
)
def test_the_map_names_options_that_exist_with_the_recipes_values(page, which, recipe):
    config = parse(f"fit --config cli_configs/{recipe}.yaml").fit
    for there, _, here, value, why in option_maps(page)[which]:
        for option in re.findall(r"`((?:model|data|trainer)(?:\.\w+)+|[A-Z]\w+\.\w+)`", f"{here} {why}"):
            look_up(config, option)
        if here == "none":
            assert value == "", there
            continue
        found = look_up(config, here.strip("`"))
        if isinstance(found, Namespace):  # a class
            found = found.class_path
            assert found.endswith(value), there
        elif value and (" " not in value or value.startswith("(")):  # else in words
            assert found == value_of(value), there


def test_options_that_the_page_of_dmdr_names_exist():
    config = parse("fit --config cli_configs/toy/dmdr_refl.yaml").fit
    options = re.findall(r"`((?:model|data|trainer|backbone)(?:\.\w+)+|[A-Z]\w+\.\w+)`", DMDR_PAGE.read_text())
    assert len(options) > 40
    for option in options:
        look_up(config, re.sub("^backbone", "model.backbone", option))


@pytest.mark.parametrize(("which", "recipe"), [(0, "dpo/sdxl"), (1, "dpo/sdxl_turbo")])
def test_the_map_of_sdxl_has_the_recipes_values(which, recipe):
    config = parse(f"fit --config cli_configs/{recipe}.yaml").fit
    for there, _, here, values, _ in table(DPO_PAGE.read_text().split("\n## SDXL and SDXL-Turbo")[1].split("\n## ")[0]):
        if here == "none":
            assert values == "", there
            continue
        found, value = look_up(config, here.strip("`")), values.split("; ")[which]
        assert found.class_path.endswith(value) if isinstance(found, Namespace) else found == value_of(value), there


def test_the_map_of_spo_holds_every_published_key():
    rows = table(SPO_PAGE.read_text().split("## Every option of the published configs")[1].split("\n## ")[0])
    assert sorted(row[0] for row in rows) == sorted(f"`{key}`" for key in PUBLISHED_SPO.split())


@pytest.mark.parametrize(("which", "recipe"), [(0, "spo/sd15"), (-1, "spo/sdxl")])
def test_the_map_of_spo_has_the_recipes_values(which, recipe):
    config = parse(f"fit --config cli_configs/{recipe}.yaml").fit
    section = SPO_PAGE.read_text().split("## Every option of the published configs")[1].split("\n## ")[0]
    for there, _, here, values, why in table(section):
        for option in re.findall(r"`((?:model|data|trainer)(?:\.\w+)+)`", why):
            look_up(config, option)
        if here == "none":
            assert values == "", there
            continue
        found, value = look_up(config, here.strip("`")), values.split("; ")[which]
        if value and not value.startswith("from "):  # else in words
            name = type(found).__name__ if not isinstance(found, Namespace) else str(found.get("class_path", value))
            assert found == value_of(value) or name.endswith(value), there


@pytest.mark.parametrize(
    ("page", "recipes"),
    [
        (SPO_PAGE, ["spo/sd15", "spo/sdxl"]),
        (DPO_PAGE, ["dpo/sd15", "dpo/sdxl"]),
        (ORPO_PAGE, ["orpo/sdxl_lora"]),
        (ORPO_PAGE, ["orpo/sdxl_lora_shards"]),
        (SPM_PAGE, ["spm/sd15", "spm/sdxl"]),
    ],
)
def test_every_switch_that_the_table_of_traps_names_exists(page, recipes):
    configs = [parse(f"fit --config cli_configs/{recipe}.yaml").fit for recipe in recipes]
    section = page.read_text().split("## Traps of the published code")[1].split("\n## ")[0]
    switches = re.findall(r"`([\w.]+)`", " ".join(row[2] for row in table(section, 4)))
    assert switches
    for switch in switches:
        assert any(is_option(config, switch) for config in configs), switch


def is_option(config: Namespace, path: str) -> bool:
    try:
        look_up(config, path)
    except (KeyError, StopIteration):
        return False
    return True
