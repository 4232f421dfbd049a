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


EXTRAS = {normal(r) for name in ("torch", "mteb", "faiss", "launch") for r in PROJECT["optional-dependencies"][name]}
BESIDE = {normal(line) for line in (ROOT / "tests/extras/requirements.txt").read_text("utf-8").splitlines() if line and line[0] != "#"}


def imported(folder: str, *, inside: bool | None = None, but: str | None = None) -> set[str]:
    """Top-level names of the foreign modules that files under `folder` import, at the top (`inside` False) or in functions (True).

    `but`: a folder whose files are left out.
    """
    names: set[str] = set()
    for file in (ROOT / folder).rglob("*.py"):
        if but is not None and file.is_relative_to(ROOT / but):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        deep = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(f)}
        for node in ast.walk(tree):
            if inside is not None and (id(node) in deep) != inside:
                continue
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    return names - OURS - set(sys.stdlib_module_names)


def undeclared(names: set[str], declared: set[str]) -> set[str]:
    owners = {"faiss": ["faiss-cpu"]} | packages_distributions()  # the one package that is called otherwise and may not be here
    return {name for name in names if not {normal(d) for d in owners.get(name, [name])} & declared}


@pytest.mark.parametrize(("folder", "declared"), [
    ("conan_jax", DECLARED), ("configs", DECLARED), ("benchmarks", DECLARED), ("tests", FOR_TESTS)])
def test_imports_are_declared(folder, declared):
    assert undeclared(imported(folder, inside=False, but="tests/extras"), declared) == set()


@pytest.mark.parametrize("folder", ["conan_jax", "configs", "benchmarks", "tests"])
def test_what_only_an_extra_brings_is_imported_where_it_is_used(folder):
    assert undeclared(imported(folder, inside=True, but="tests/extras"), FOR_TESTS | EXTRAS) == set()


def test_the_tests_of_extras_name_what_they_need():
    assert undeclared(imported("tests/extras"), FOR_TESTS | EXTRAS | BESIDE) == set()
    assert EXTRAS - BESIDE == set()


def test_an_undeclared_import_is_seen():
    assert undeclared({"yaml", "sklearn", "markupsafe"}, DECLARED - {"markupsafe"}) == {"markupsafe"}


def test_what_is_declared_is_pinned():
    pinned = {normal(line) for line in PINNED if line and not line.startswith("#")}
    assert FOR_TESTS - pinned == set()


def test_the_editable_install_is_found_from_the_folder_above_a_clone():
    """From there a clone named conan_jax is a namespace package, which hides an editable install in setuptools' default mode."""
    installs = [line for line in (ROOT / "Makefile").read_text().splitlines() if line.endswith(" -e .")]
    assert installs and all("--config-settings editable_mode=compat" in line for line in installs)
