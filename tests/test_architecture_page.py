"""docs/ARCHITECTURE.md names every module and every logical axis, and nothing that is not there."""

import re
from pathlib import Path

import pytest

from conan_jax import sharding
from conan_jax.config.run import RESERVED_DATASETS
from conan_jax.stages.base import Stage

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "conan_jax"
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
MODULES = {str(f.relative_to(PACKAGE)) for f in PACKAGE.rglob("*.py") if f.stat().st_size}


def named(page: str) -> set[str]:
    """The modules of the first column of the table of rooms."""
    rooms = page.split("\n## Rooms\n")[1].split("\n## ")[0]
    return {name for line in rooms.splitlines() for name in re.findall(r"`([\w/]+\.py)`", line.split(" | ")[0])}


def test_every_module_is_named():
    assert MODULES - named(PAGE) == set(), "give it a row in the rooms of docs/ARCHITECTURE.md"


def test_every_named_module_exists():
    assert named(PAGE) - MODULES == set(), "docs/ARCHITECTURE.md names modules that are gone"


@pytest.mark.parametrize("module", ["data/access.py", "stages/base.py"])
def test_the_reader_of_the_page_sees_a_missing_row(module):
    assert MODULES - named(PAGE.replace(f"`{module}`", "")) == {module}


def test_paths_elsewhere_on_the_page_exist():
    for path in re.findall(r"`((?:tests|configs|docs|benchmarks)/[\w./-]+)`", PAGE):
        assert (ROOT / path).exists(), path


def test_the_logical_axes_are_those_of_the_rules():
    line = next(line for line in PAGE.splitlines() if line.startswith("Logical axis names:"))
    assert set(re.findall(r"`(\w+)`", line)) == set(sharding.RULES)


def test_the_contract_of_a_stage_is_the_protocol():
    methods = {name for name, value in vars(Stage).items() if callable(value) and not name.startswith("_")}
    assert set(re.findall(r"^Stage\.(\w+)\(", PAGE, re.MULTILINE)) == methods


def test_the_folders_of_prepared_data_are_named():
    assert {folder for folder in RESERVED_DATASETS if f"runs/NAME/data/{folder}/" not in PAGE} == set()
