"""What an export is known by: conan.json, and the manifest, written last: what was copied badly or changed since is named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conan_jax.data.manifest import sha256_of
from conan_jax.errors import CheckpointError, DataError
from conan_jax.files import read_json, write_json
from conan_jax.hf.weights import DAMAGED

OURS, OURS_FORMAT = "conan.json", 1  # what this package reads of an export
MANIFEST = "manifest.json"  # sha256 of every file
FORMAT = 1


def write(folder: Path) -> None:
    """List every file below `folder` with its bytes and sha256."""
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in _files(folder)}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})


def check(folder: Path) -> int:
    """Compare every file with the manifest; returns their number. Files that the manifest does not list are let be.

    Raises `DataError` naming the first file that is missing or not as it was written, or a manifest that cannot be read.
    """
    listed = read_json(folder / MANIFEST, {})
    if listed.get("format") != FORMAT or not isinstance(listed.get("files"), dict) or not listed["files"]:
        what = f"is not of format {FORMAT}" if listed else "is missing"
        raise DataError(f"{folder / MANIFEST} {what}, so {folder} is no export of `conan export`, or not all of it was copied")
    advice = f"copy {folder} anew, or export the run again with --force"
    for name, recorded in _entries(folder, listed["files"], advice):
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DataError(f"{folder / MANIFEST} lists {name!r}, which lies outside of the export; {advice}")
        if not path.is_file():
            raise DataError(f"{path} is missing; {advice}")
        if path.stat().st_size != recorded["bytes"]:
            raise DataError(f"{path} has {path.stat().st_size:,} bytes and {MANIFEST} says {recorded['bytes']:,}; {advice}")
        if (found := sha256_of(path)) != recorded["sha256"]:
            raise DataError(f"{path} is not as it was exported: its sha256 begins {found[:12]}, "
                            f"{MANIFEST} says {recorded['sha256'][:12]}; {advice}")
    return len(listed["files"])


def refuse_altered(folder: Path, is_read: Callable[[str], bool]) -> None:
    """Compare the files whose names `is_read` picks with the manifest, where there is one.

    Raises `CheckpointError` naming the first that is missing or not as it was written, `DataError` for a manifest that is none.
    """
    for name, recorded in _entries(folder, read_json(folder / MANIFEST, {}, DAMAGED).get("files", {}), DAMAGED):
        path = folder / name
        if is_read(name) and (not path.is_file() or sha256_of(path) != recorded["sha256"]):
            raise CheckpointError(f"{path} is missing or not as it was written; copy the folder anew, or export the run again")


def _entries(folder: Path, files: Any, advice: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, {"bytes", "sha256"}) of each file that a manifest lists."""
    if not isinstance(files, dict):
        raise DataError(f"{folder / MANIFEST} must list `files` by name; {advice}")
    for name, recorded in files.items():
        if not isinstance(recorded, dict) or not isinstance(recorded.get("bytes"), int) or not isinstance(recorded.get("sha256"), str):
            raise DataError(f"{folder / MANIFEST} must give `bytes` and `sha256` of {name!r}; {advice}")
        yield name, recorded


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
