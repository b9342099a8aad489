"""The arrows of the design, one way only: read from the import lines, without importing anything."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("lightning_modules", "datamodules", "callbacks", "main")
SOURCES = sorted(
    path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in (*ROOMS[:3], "main.py")
)
CONTRACTS = ("lightning_modules.base", "lightning_modules.backbones.base", "lightning_modules.rewards.base")
# First match counts: module or package -> what of ours it may import, besides its own package where that is named.
ARROWS = {
    "main": ("lightning_modules.cli",),
    "lightning_modules.cli": ("lightning_modules.cli", "lightning_modules.base", "lightning_modules.rewards.base"),
    "lightning_modules.functional": ("lightning_modules.functional",),
    "lightning_modules.backbones": (
        "lightning_modules.backbones",
        "lightning_modules.functional",
        "lightning_modules.weight_files",
        "datamodules.batches",
    ),
    "lightning_modules.rewards.toy_oracle": ("lightning_modules.rewards.base", "datamodules.toy_world"),
    "lightning_modules.rewards": (
        "lightning_modules.rewards.base",
        "lightning_modules.rewards.network",
        "lightning_modules.rewards.towers",
        "lightning_modules.weight_files",
        "lightning_modules.rewards.preprocessing",
        "lightning_modules.functional",
    ),
    "lightning_modules.base": (
        "lightning_modules.backbones.base",
        "lightning_modules.functional",
        "datamodules.batches",
    ),
    "lightning_modules.step_preference_model": (
        *CONTRACTS,
        "lightning_modules.functional",
        "lightning_modules.rewards.step_preference",
        "datamodules.batches",
    ),
    "lightning_modules": (*CONTRACTS, "lightning_modules.functional", "datamodules.batches"),
    "datamodules": ("datamodules",),
    "callbacks": (*CONTRACTS, "callbacks", "datamodules.batches"),
}
# Slow to import, and not every run needs them: imported where they are used.
HEAVY = ("diffusers", "transformers", "datasets", "torchvision", "open_clip", "matplotlib", "wandb", "webdataset")


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts)


def imports_of(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def is_below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_all_rooms_are_found():
    assert {path.parts[0] for path in SOURCES} == {"lightning_modules", "datamodules", "callbacks", "main.py"}


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=str)
def test_imports_follow_the_arrows(path: Path):
    name = module_name(path)
    allowed = next(targets for room, targets in ARROWS.items() if is_below(name, room))
    ours = [target for target in imports_of(ast.parse((ROOT / path).read_text())) if target.split(".")[0] in ROOMS]
    assert [target for target in ours if not any(is_below(target, room) for room in allowed)] == []


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name != "__init__.py"], ids=str)
def test_heavy_packages_are_imported_where_they_are_used(path: Path):
    top = ast.parse((ROOT / path).read_text()).body
    names = [name for node in top if isinstance(node, ast.Import | ast.ImportFrom) for name in imports_of(node)]
    assert [name for name in names if name.split(".")[0] in HEAVY] == []


@pytest.mark.parametrize(
    "path", sorted((ROOT / "lightning_modules/functional").glob("*.py")), ids=lambda path: path.name
)
def test_functions_need_torch_only(path: Path):
    packages = {name.split(".")[0] for name in imports_of(ast.parse(path.read_text()))}
    assert packages <= {"torch", "math", "typing", "collections", "dataclasses", "lightning_modules"}


def test_packages_re_export_nothing():
    assert [str(path) for path in SOURCES if path.name == "__init__.py" and (ROOT / path).read_text().strip()] == []


def test_there_is_no_attic():
    assert [str(path) for path in SOURCES if path.stem in ("utils", "util", "helpers", "misc", "common")] == []
