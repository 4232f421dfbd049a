"""What a built dataset is: counts and sha256 of each shard, sources, rejects; and the check of it at open.

An ArrayRecord file that was cut short can open with no records and no error, so the counts and
hashes beside it are the only proof that training reads all of what was built.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from conan_jax.config import RecordKind
from conan_jax.errors import DataError

FORMAT = 1  # of the manifest and of the records; a dataset of another format is built anew
MANIFEST, REJECTS = "manifest.json", "rejects.jsonl"


@dataclass(frozen=True)
class SourceFile:
    """A file the records came from. `path` is informative: its bytes are what counts."""

    path: str
    bytes: int
    sha256: str
    mtime_ns: int


@dataclass(frozen=True)
class Shard:
    """One ArrayRecord file of the dataset."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a built dataset. `rejects` and `dropped` count by reason, `dialects` by dialect."""

    name: str
    kind: RecordKind
    source: str
    records: int
    read: int
    shards: tuple[Shard, ...]
    files: tuple[SourceFile, ...]
    settings: dict[str, Any]
    rejects: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    dialects: dict[str, int] = field(default_factory=dict)
    version: str = ""
    format: int = FORMAT

    @property
    def rejected(self) -> int:
        """Records that could not be used."""
        return sum(self.rejects.values())

    @property
    def reject_rate(self) -> float:
        """Rejected records over records read, in [0, 1]."""
        return self.rejected / self.read if self.read else 0.0

    def write(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of the dataset in `folder`. Raises `DataError` when there is none or it cannot be read."""
    path = Path(folder) / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder} is not a built dataset: it has no {MANIFEST}; make one with `conan data build`") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete {folder} and build the dataset again") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise DataError(f"{path} is not of manifest format {FORMAT}; delete {folder} and build the dataset again")
    try:
        data = {f.name: data[f.name] for f in fields(Manifest)}
        data["shards"] = tuple(Shard(**shard) for shard in data["shards"])
        data["files"] = tuple(SourceFile(**file) for file in data["files"])
        return Manifest(**data)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error!r}); delete {folder} and build the dataset again") from None


def manifest_in(folder: Path) -> Manifest | None:
    """The manifest in a folder, None where there is none that can be read."""
    try:
        return read_manifest(folder)
    except DataError:
        return None


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file, read in pieces (about 1.7 GB/s a core)."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_verified: dict[tuple[str, int, int], str] = {}  # (path, bytes, mtime_ns) -> sha256: one hash a file and process


def verify(folder: str | os.PathLike[str], manifest: Manifest, *, hashes: bool = True) -> None:
    """Compare every shard with the manifest: presence and size, and its sha256 unless `hashes` is false.

    Raises:
        DataError: names the first shard that differs, how, and what to do.
    """
    paths = [Path(folder) / shard.file for shard in manifest.shards]
    advice = f"the dataset is damaged: delete {folder} and build it again, or copy that file anew"
    for path, shard in zip(paths, manifest.shards):
        try:
            size = path.stat().st_size
        except OSError:
            raise DataError(f"shard {path} is missing; {advice}") from None
        if size != shard.bytes:
            what = "truncated" if size < shard.bytes else "altered"
            raise DataError(f"shard {path} is {what}: it has {size:,} bytes, the manifest says {shard.bytes:,}; {advice}")
    if not hashes:
        return
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for path, shard, found in zip(paths, manifest.shards, pool.map(_cached_sha256, paths)):
            if found != shard.sha256:
                raise DataError(f"shard {path} is altered: its sha256 begins {found[:12]}, the manifest says {shard.sha256[:12]}; {advice}")


def _cached_sha256(path: Path) -> str:
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _verified:
        _verified[key] = sha256_of(path)
    return _verified[key]
