"""requirements.lock: the versions that the tests last passed with, names and versions only.

uv pip freeze --exclude-editable > requirements.lock
"""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LINES = (ROOT / "requirements.lock").read_text().splitlines()
WANTED = [*PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"]["dev"]]


def test_lines_are_names_and_versions_only():
    assert [line for line in LINES if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line)] == []
    assert len(LINES) > 50


def test_lines_are_sorted_and_unique():
    names = [canonicalize_name(line.split("==")[0]) for line in LINES]
    assert names == sorted(set(names))
    assert "limelight" not in names


@pytest.mark.parametrize("wanted", WANTED)
def test_locked_version_is_in_the_range_of_the_project(wanted: str):
    locked = {canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in LINES)}
    requirement = Requirement(wanted)
    assert locked[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize("wanted", WANTED + sum(PROJECT["project"]["optional-dependencies"].values(), []))
def test_range_has_both_ends(wanted: str):
    operators = {specifier.operator for specifier in Requirement(wanted).specifier}
    assert operators == {">=", "<"}
