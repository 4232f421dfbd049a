"""Every package the code imports by name is declared: what another package happens to bring may go with its next release."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
PINNED = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
OURS = {"conan_jax", "tests", "benchmarks", "configs"} | {file.stem for file in (ROOT / "benchmarks").glob("*.py")}


def normal(requirement: str) -> str:
    """The name in "Name[extra]>=1  # why", as package indexes compare names."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


DECLARED = {normal(r) for r in PROJECT["dependencies"]}
FOR_TESTS = DECLARED | {normal(r) for r in PROJECT["optional-dependencies"]["test"]}


def imported(folder: str) -> set[str]:
    """Top-level names of the foreign modules that files under `folder` import."""
    names: set[str] = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    return names - OURS - set(sys.stdlib_module_names)


def undeclared(names: set[str], declared: set[str]) -> set[str]:
    owners = packages_distributions()
    return {name for name in names if not {normal(d) for d in owners.get(name, [name])} & declared}


@pytest.mark.parametrize(("folder", "declared"), [
    ("conan_jax", DECLARED), ("configs", DECLARED), ("benchmarks", DECLARED), ("tests", FOR_TESTS)])
def test_imports_are_declared(folder, declared):
    assert undeclared(imported(folder), declared) == set()


def test_an_undeclared_import_is_seen():
    assert undeclared({"yaml", "sklearn", "markupsafe"}, DECLARED - {"markupsafe"}) == {"markupsafe"}


def test_what_is_declared_is_pinned():
    pinned = {normal(line) for line in PINNED if line and not line.startswith("#")}
    assert FOR_TESTS - pinned == set()
