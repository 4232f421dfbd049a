"""Files and folders that are written whole or not at all, and JSON objects read with an error that names the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conan_jax.errors import DataError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. It takes the place of `path` when the block ends well and is removed when it does not.

    A reader, or a restart after a kill, sees the old file or the new one; a power cut does not leave a hole in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replacing_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """A folder beside `out` to write in. It takes the place of `out` when the block ends well and is removed when it does not.

    An empty folder gives way, one that holds anything only by `force`. Raises `DataError` for an `OSError`, the block's own as well.
    """
    partial, old = (out.with_name(f".{out.name}.{what}.{os.getpid()}") for what in ("new", "old"))
    try:
        partial.mkdir(parents=True)
        yield partial
        if force and out.exists():
            os.replace(out, old)
        os.replace(partial, out)
    except OSError as error:
        if old.exists() and not out.exists():
            os.replace(old, out)
        raise DataError(f"{out} cannot be written: {error.strerror or error}; check that the disk has room and that the folder may be "
                        "written") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def write_file(path: Path, content: str | bytes) -> None:
    """Write `content`, text as UTF-8."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Write `value` for people to read."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, default: Any = None, advice: str = "remove it and run the command again") -> Any:
    """The JSON object in a file, `default` where there is no file. Raises `DataError` with `advice` when the file holds anything else."""
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); {advice}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} must hold a JSON object; {advice}")
    return value
