"""Named datasets from a YAML file: name -> the fields of `config.Dataset`."""

from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Any, get_args

import yaml

from conan_jax.config import Dataset, RecordKind
from conan_jax.data.schema import check_fields
from conan_jax.errors import ConfigError

_KEYS = {f.name for f in dataclasses.fields(Dataset)} - {"name"}


def load_presets(path: str | os.PathLike[str]) -> dict[str, Dataset]:
    """All presets of a YAML file, in its order.

    Raises:
        ConfigError: the file is missing or not YAML, or an entry has an unknown key or a bad value; names the entry.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"presets file {path} cannot be read: {error.strerror}; give another with --presets") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must map preset names to kind, source and fields")
    return {str(name): _dataset(str(name), entry, path) for name, entry in data.items()}


def find_preset(presets: dict[str, Dataset], name: str) -> Dataset:
    """The preset called `name`; raises `ConfigError` with the nearest known names otherwise."""
    if name not in presets:
        near = difflib.get_close_matches(name, presets) or list(presets)
        raise ConfigError(f"no preset {name!r}; did you mean {', '.join(near)}?")
    return presets[name]


def _dataset(name: str, entry: Any, path: Any) -> Dataset:
    where = f"{path}: preset {name!r}"
    if not isinstance(entry, dict) or not {"kind", "source"} <= set(entry):
        raise ConfigError(f"{where} needs at least kind and source")
    if unknown := set(entry) - _KEYS:
        raise ConfigError(f"{where} has the unknown key {sorted(unknown)[0]!r}; known are {', '.join(sorted(_KEYS))}")
    if entry["kind"] not in get_args(RecordKind):
        raise ConfigError(f"{where} has the unknown kind {entry['kind']!r}; one of {', '.join(get_args(RecordKind))}")
    fields = entry.get("fields", {})
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: fields must map our names to columns")
    try:
        check_fields(entry["kind"], fields)
        return Dataset(name=name, **entry)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from None
