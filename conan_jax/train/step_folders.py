"""The steps a stage folder holds, as folders: whole, torn, of an earlier version, removed, set aside."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from conan_jax.errors import CheckpointError
from conan_jax.train import manifest

_TORN = ".orbax-checkpoint-tmp"  # how orbax names what it has not committed


def step_folder(folder: Path, step: int) -> Path:
    """Where a step lies."""
    return folder / "checkpoints" / str(step)


def complete_steps(folder: Path) -> list[int]:
    """Every step that has its manifest, in order. Their files are not looked into."""
    return [step for step in _steps(folder) if manifest.is_written(step_folder(folder, step))]


def newest(folder: Path, below: int | None = None) -> int | None:
    """The newest complete step, before `below` if that is given; None when there is none."""
    return max((step for step in complete_steps(folder) if below is None or step < below), default=None)


def existing(folder: Path, step: int | None) -> int:
    """`step`, by default the newest. Raises `CheckpointError` when there is no such complete step."""
    found = newest(folder) if step is None else step
    if found is None or not manifest.is_written(step_folder(folder, found)):
        there = ", ".join(map(str, complete_steps(folder)))
        raise CheckpointError(f"{folder} holds no complete checkpoint{'' if step is None else f' of step {step}'}; "
                              + (f"it has {there} (`keep_checkpoints` of the stage says how many stay)" if there else "train the stage first"))
    return found


def refuse_damage(folder: Path, step: int, damage: str) -> None:
    """Raises `CheckpointError` unless `damage` (what `manifest.damage` found) is empty."""
    if damage:
        raise CheckpointError(f"step {step} in {folder} is damaged: {damage} (in {step_folder(folder, step)}). Put the files back from a "
                              "copy, or train with --fallback: it sets the step aside and goes on from the newest good one before it")


def keep_newest(folder: Path, keep: int) -> None:
    """Remove the complete steps before the newest `keep`."""
    for step in complete_steps(folder)[:-keep]:
        _remove(step_folder(folder, step))


def clear_torn(folder: Path) -> None:
    """Remove what killed and failed saves left behind, so that their steps can be saved again; make the folder where there is none.

    Raises `CheckpointError` for steps that were whole in an earlier version, which wrote no manifest: nobody meant them to go.
    """
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    torn = [step for step in _steps(folder) if not manifest.is_written(step_folder(folder, step))]
    if older := [step for step in torn if _of_earlier_version(step_folder(folder, step))]:
        raise CheckpointError(f"step {older[-1]} in {folder} is of an earlier version, which wrote no {manifest.NAME}, so nobody can say "
                              "whether it is whole; train anew with --fresh, or use another output_dir")
    for path in (folder / "checkpoints").iterdir():
        if path.name.removesuffix(_TORN).isdecimal() and (path.name.endswith(_TORN) or int(path.name) in torn):
            _remove(path)


def set_aside(folder: Path, steps: Iterable[int]) -> None:
    """Rename steps to `STEP.damaged`, so that nobody takes them for one; nothing is lost."""
    for step in steps:
        place = step_folder(folder, step)
        names = itertools.chain((f"{step}.damaged",), (f"{step}.damaged{i}" for i in itertools.count(2)))
        place.rename(next(aside for name in names if not (aside := place.with_name(name)).exists()))


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Raises `OSError` (no space left) when fewer than `needed` bytes are free."""
    if shutil.disk_usage(folder / "checkpoints").free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def room(folder: Path, step: int, needed: int) -> str:
    """What to know when a step could not be saved: the bytes needed and free, where, and which older steps are intact."""
    try:
        free, steps = shutil.disk_usage(folder).free, complete_steps(folder)
    except OSError as error:
        return f". Step {step} needs {needed:,} bytes, and {folder} cannot be read ({error.strerror})"
    older = ", ".join(str(other) for other in steps if other != step)
    return (f". Step {step} needs {needed:,} bytes and {free:,} are free in {folder / 'checkpoints'}; "
            + (f"the older steps ({older}) are intact. " if older else "there is no older step yet. ")
            + "Make room, or use another output_dir, and start the same command again")


def _steps(folder: Path) -> list[int]:
    """Every step that orbax has committed, in order."""
    checkpoints = folder / "checkpoints"
    return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()) if checkpoints.is_dir() else []


def _of_earlier_version(place: Path) -> bool:
    try:
        return "manifest" not in json.loads((place / "metadata" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _remove(place: Path) -> None:
    """Remove a step. Its manifest goes first: what is left when this is cut short counts as torn."""
    (place / manifest.NAME).unlink(missing_ok=True)
    shutil.rmtree(place)
