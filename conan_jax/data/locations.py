"""Where a source or an evaluation set lies: `$NAME` from the environment, `docstrings:PART` made on the spot."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from conan_jax import config
from conan_jax.data.prepared import recorded_corpus
from conan_jax.errors import DataError

DOCSTRINGS = "docstrings:"


def expand_variables(path: str) -> str:
    """`path` with `$NAME` and `${NAME}` taken from the environment; a path that exists as it is written is taken as it is.

    Raises `DataError` naming a variable that is not set.
    """
    if os.path.exists(path):
        return path

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        if not os.environ.get(name):
            raise DataError(f"{path} needs the environment variable {name}, which is not set; set it to the folder that holds the data, "
                            f"for instance export {name}=/data")
        return os.environ[name]

    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", value, path)


def resolve(run: config.Run, path: str, corpus: Callable[[], Path] | None = None) -> str:
    """The real location of `path` in `run`.

    `docstrings:PART` is a file (or the BEIR folder `eval`) of the corpus made from the documentation of the packages installed here.
    `corpus` gives its folder; by default it is the one that the run was prepared with, or else it is built on first use.
    """
    if not path.startswith(DOCSTRINGS):
        return path if path.startswith("tfds:") else expand_variables(path)
    folder = corpus() if corpus is not None else _corpus(run)
    part = folder / path.removeprefix(DOCSTRINGS)
    for candidate in (part, part.with_name(part.name + ".jsonl")):
        if candidate.exists():
            return str(candidate)
    parts = ", ".join(sorted(p.name.removesuffix(".jsonl") for p in folder.iterdir() if not p.name.startswith(".")))
    raise DataError(f"{path}: the docstring corpus has no part {part.name!r}; it has {parts}")


def _corpus(run: config.Run) -> Path:
    from conan_jax.data.docstrings import installed_corpus

    return recorded_corpus(run) or installed_corpus(Path(run.data_dir))
