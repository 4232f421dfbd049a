"""Addresses of prepared data under `run.data_dir`, and the fingerprints that they are made of.

Nothing there is changed after it was made: a changed recipe makes new folders beside the old ones. Earlier versions kept one folder
for each name (`DATASET/`, `tokenizer/`, `packed/STAGE/DATASET/`); such folders are read, and never written.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from conan_jax import config
from conan_jax.data.manifest import MANIFEST, Manifest

_DIGITS = 12  # of a fingerprint in a name


def dataset_folder(data_dir: Path, manifest: Manifest) -> Path:
    """The address of a built dataset: its name, and a fingerprint of settings, source bytes and records."""
    mark = fingerprint(settings=manifest.settings, content=content_fingerprint(manifest), sources=[file.sha256 for file in manifest.files],
                       tfds=manifest.source if "tfds:" in manifest.source else None)
    return data_dir / f"{manifest.name}-{mark[:_DIGITS]}"


def dataset_folders(data_dir: Path, name: str) -> list[Path]:
    """Every folder that may hold a build of the dataset, the newest first, then that of earlier versions."""
    address = re.compile(rf"{re.escape(name)}-[0-9a-f]{{{_DIGITS}}}")
    found = [path.parent for path in data_dir.glob(f"*/{MANIFEST}") if address.fullmatch(path.parent.name)]
    return [*sorted(found, key=lambda folder: (-(folder / MANIFEST).stat().st_mtime_ns, folder.name)), data_dir / name]


def tokenizer_folder(data_dir: Path, mark: str) -> Path:
    """The address of a tokenizer, `mark` being the fingerprint of its settings and texts."""
    return data_dir / "tokenizers" / mark[:_DIGITS]


def tokenizer_folders(data_dir: Path) -> list[Path]:
    """Every folder that may hold a tokenizer: that of earlier versions, then all addresses."""
    return [data_dir / "tokenizer", *sorted(path for path in (data_dir / "tokenizers").glob("*") if not path.name.startswith("."))]


def packed_folder(data_dir: Path, dataset: str, mark: str) -> Path:
    """The address of packed rows, `mark` being the fingerprint of records, tokenizer and length."""
    return data_dir / "packed" / f"{dataset}-{mark[:_DIGITS]}"


def earlier_packed_folder(data_dir: Path, stage: str, dataset: str) -> Path:
    """Where earlier versions kept the packed rows of a stage."""
    return data_dir / "packed" / stage / dataset


def corpus_folder(data_dir: Path, mark: str) -> Path:
    """The address of the corpus made of the installed packages' documentation."""
    return data_dir / "docstrings" / mark[:_DIGITS]


def index_file(run: config.Run, dataset: str, what: str, fingerprint: str) -> Path:
    """A cached index of one dataset; the name holds what it depends on."""
    return Path(run.data_dir) / "indexes" / f"{dataset}-{what}-{fingerprint[:16]}.npz"


def fingerprint(**parts: object) -> str:
    """sha256 of any JSON values, by name: equal exactly when all of them are equal."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def content_fingerprint(manifest: Manifest) -> str:
    """What the records of a built dataset are: their kind and the sha256 of every shard."""
    return fingerprint(kind=manifest.kind, shards=[shard.sha256 for shard in manifest.shards])
