"""Small JSON files of a run folder, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from conan_jax.errors import DataError


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader, or a restart after a kill, sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read_json(path: Path, default: Any = None) -> Any:
    """The file's content, `default` where there is no file; raises `DataError` naming a damaged one."""
    if not path.exists():
        return default
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); remove it and run the command again") from None
