"""An export, read back as JAX needs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conan_jax import config, config_io
from conan_jax.data.tokenizer import MODEL_FILE, Tokenizer
from conan_jax.errors import DataError
from conan_jax.export.folder import FORMAT, OURS
from conan_jax.files import read_json
from conan_jax.hf.weights import from_tensors, read_tensors


@dataclass(frozen=True)
class Export:
    """`params`: the Embedder's tree in float32. `dims`: the widths a vector may be cut to, the full one last."""

    kind: str
    dtype: str
    model: config.Model
    params: Any
    tokenizer: Any
    prompts: dict[str, str]
    dims: list[int]
    max_length: int


def read_export(folder: Path) -> Export:
    """Raises `DataError` when `folder` is no export, or one of another format."""
    ours = read_json(folder / OURS)
    if ours is None or ours.get("format") != FORMAT:
        what = f"has no {OURS}" if ours is None else f"has the export format {ours.get('format')!r}, and this version reads {FORMAT}"
        raise DataError(f"{folder} {what}; write one with `conan export RUN {folder}`")
    model = config_io.build(config.Model, ours["model"], "model")
    tokenizer = Tokenizer((folder / MODEL_FILE).read_bytes(), str(folder / MODEL_FILE))
    return Export(ours["kind"], ours["dtype"], model, from_tensors(read_tensors(folder), model, str(folder)), tokenizer, ours["prompts"],
                  ours["dims"], ours["max_length"])
