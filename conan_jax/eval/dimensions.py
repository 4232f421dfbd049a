"""The widths at which a model's vectors are looked at."""

from __future__ import annotations

from pathlib import Path

from conan_jax import config, config_io
from conan_jax.errors import ConfigError
from conan_jax.files import read_json
from conan_jax.hf.manifest import OURS

SMALLEST = 16


def dimensions_of(folder: Path, width: int) -> list[int]:
    """The Matryoshka dimensions that the model in `folder` (a run, a stage, an export) was trained at, and its whole width; rising.

    Where its recipe names none, or is not there: the width, its half, its quarter ... down to 16.
    """
    exported = read_json(folder / OURS, {})
    if len(exported.get("dims", ())) > 1:
        return sorted(exported["dims"])
    for place in (folder, folder.parent):
        found = read_json(place / "config.json", {})
        if "stages" in found:
            try:
                return dimensions_of_run(config_io.from_dict(found))
            except ConfigError:  # a recipe of another version: its weights can still be scored
                break
    return halvings(width)


def dimensions_of_run(run: config.Run) -> list[int]:
    """As `dimensions_of`, of a recipe: its last stage with Matryoshka dimensions counts."""
    trained = [stage.matryoshka.dims for stage in run.stages if getattr(stage, "matryoshka", config.Matryoshka()).dims]
    return sorted({*trained[-1], run.model.hidden_size}) if trained else halvings(run.model.hidden_size)


def halvings(width: int) -> list[int]:
    """`width`, its half, its quarter ... down to 16, rising; whole numbers only."""
    found = [width]
    while found[0] % 2 == 0 and found[0] // 2 >= SMALLEST:
        found.insert(0, found[0] // 2)
    return found
