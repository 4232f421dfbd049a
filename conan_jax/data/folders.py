"""Where prepared data lies under `run.data_dir`, and the fingerprints that decide whether it can be used again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from conan_jax import config
from conan_jax.data.manifest import Manifest

RESERVED = frozenset({"tokenizer", "packed", "indexes", "docstrings"})  # names a dataset cannot have


def dataset_folder(run: config.Run, dataset: str) -> Path:
    """The records of one dataset."""
    return Path(run.data_dir) / dataset


def tokenizer_folder(run: config.Run) -> Path:
    """The tokenizer of the run."""
    return Path(run.data_dir) / "tokenizer"


def packed_folder(run: config.Run, stage: str, dataset: str) -> Path:
    """The packed rows of one dataset for one language-model stage."""
    return Path(run.data_dir) / "packed" / stage / dataset


def index_file(run: config.Run, dataset: str, what: str, fingerprint: str) -> Path:
    """A cached index of one dataset; the name holds what it depends on."""
    return Path(run.data_dir) / "indexes" / f"{dataset}-{what}-{fingerprint[:16]}.npz"


def fingerprint(**parts: object) -> str:
    """sha256 of any JSON values, by name: equal exactly when all of them are equal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def content_fingerprint(manifest: Manifest) -> str:
    """What the records of a built dataset are: their kind and the sha256 of every shard."""
    return fingerprint(kind=manifest.kind, shards=[shard.sha256 for shard in manifest.shards])
