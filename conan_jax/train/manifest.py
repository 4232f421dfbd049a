"""What a checkpoint step must consist of: every file with its size and sha256, and whether the files still are that.

    STEP/manifest.json    {"step": 8, "files": {"params/d/0f3a": {"bytes": 4096, "sha256": "..."}, ...}}

It is written last, so a step without one is torn. Orbax restores flipped bytes as wrong numbers without a word: the
sizes and hashes are what notices.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conan_jax.files import write_json

NAME = "manifest.json"
_THREADS = min(8, os.cpu_count() or 1)  # hashlib lets other threads run while it hashes


def write(step_folder: Path, step: int) -> None:
    """Hash every file of a step that is otherwise whole, and write its manifest. Raises `OSError`."""
    names = _files(step_folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        hashes = list(pool.map(lambda name: _sha256(step_folder / name), names))
    files = {name: {"bytes": (step_folder / name).stat().st_size, "sha256": sha256} for name, sha256 in zip(names, hashes)}
    write_json(step_folder / NAME, {"step": step, "files": files})


def is_written(step_folder: Path) -> bool:
    """Whether the step is whole: its manifest comes last."""
    return (step_folder / NAME).is_file()


def sha256(step_folder: Path) -> str:
    """The sha256 of the manifest of a whole step. Raises `OSError`."""
    return _sha256(step_folder / NAME)


def damage(step_folder: Path, step: int, items: Collection[str] | None = None, part: int = 0, parts: int = 1) -> str:
    """What is wrong with the files of a step, the first few by name; "" when all is well.

    Args:
        items: look only at these top-level folders and at the files beside them; by default at everything.
        part, parts: hash only this share of the files (sizes and names are always all compared).
    """
    try:
        manifest = json.loads((step_folder / NAME).read_text(encoding="utf-8"))
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        if manifest["step"] != step:
            raise ValueError(f"it is that of step {manifest['step']}")
        there = _files(step_folder)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} cannot be used ({type(error).__name__}: {error})"
    if items is not None:
        expected = {name: entry for name, entry in expected.items() if _belongs(name, items)}
        there = [name for name in there if _belongs(name, items)]
    missing = [f"{name} is missing" for name in sorted(expected.keys() - set(there))]
    extra = [f"{name} does not belong there" for name in there if name not in expected]
    # The largest first, dealt out in turn: every share is about as many bytes.
    mine = sorted((name for name in there if name in expected), key=lambda name: (-expected[name][0], name))
    with ThreadPoolExecutor(_THREADS) as pool:
        changed = pool.map(lambda name: _changed(step_folder / name, name, *expected[name]), mine[part::parts])
    found = [*missing, *extra, *filter(None, changed)]
    return "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")


def _files(step_folder: Path) -> list[str]:
    """Names of all files below a step, its manifest and what a killed writer of it left aside."""
    files = (path.relative_to(step_folder).as_posix() for path in step_folder.rglob("*") if not path.is_dir())
    return sorted(name for name in files if name != NAME and not name.startswith(f".{NAME}."))


def _belongs(name: str, items: Collection[str]) -> bool:
    return "/" not in name or name.split("/", 1)[0] in items


def _changed(path: Path, name: str, size: int, sha256: str) -> str | None:
    try:
        there = path.stat().st_size
        if there != size:
            return f"{name} is {there:,} bytes long and was {size:,}"
        return None if _sha256(path) == sha256 else f"{name} does not have the sha256 it was written with"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
