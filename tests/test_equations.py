"""docs/EQUATIONS.md names functions that exist, and no loss or stage is missing from it."""

import functools
import importlib
import re
from pathlib import Path

import pytest

from conan_jax.losses import LOSSES
from conan_jax.stages import STAGES

TEXT = (Path(__file__).parent.parent / "docs" / "EQUATIONS.md").read_text(encoding="utf-8")
ROWS = [re.split(r"(?<!\\)\|", line)[1:-1] for line in TEXT.splitlines() if line.startswith("|") and not line.startswith(("|---", "| equation"))]
NAMES = sorted({row[2].strip().strip("`") for row in ROWS})


def found(name):
    module, attribute = name.split(":")
    return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))


@pytest.mark.parametrize("name", NAMES)
def test_the_function_of_each_equation_exists(name):
    assert callable(found(name))


def test_every_row_has_an_equation_a_formula_and_a_function():
    assert len(ROWS) > 30
    for row in ROWS:
        assert len(row) == 3 and all(cell.strip() for cell in row) and re.fullmatch(r" `conan_jax(\.\w+)+:\w+(\.\w+)?` ", row[2]), row


def test_every_loss_and_every_stage_has_a_row():
    named = [found(name) for name in NAMES]
    assert all(loss in named for loss in LOSSES.values())
    assert all(stage.loss in named for stage in STAGES.values())
