"""Raw records -> validated records -> ArrayRecord shards that TFDS opens, with a manifest and the rejects.

The dataset is written to a hidden folder beside its place and renamed when it is whole, so a process
killed at any moment leaves the old dataset or none, never half of one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

import conan_jax
from conan_jax.config import Dataset
from conan_jax.data import example, readers
from conan_jax.data.manifest import FORMAT, MANIFEST, REJECTS, Manifest, Shard, SourceFile, read_manifest, sha256_of, verify
from conan_jax.data.schema import REASONS, Reject, check_fields, parse
from conan_jax.data.sources import SPLIT
from conan_jax.errors import DataError

SHARD_BYTES = 256 * 2**20  # of records, before compression
_EXCERPT = 500
_HOPELESS = 1000  # a source whose first so many records are all bad is not read to its end
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a build is. `done` of `total` counts bytes on disk; `total` is None where TFDS is read."""

    records: int
    rejected: int
    done: int
    total: int | None


def build_dataset(dataset: Dataset, out_dir: str | os.PathLike[str], *, num_shards: int | None = None, force: bool = False,
                  progress: Callable[[Progress], None] | None = None, tfds_data_dir: str | None = None) -> Manifest:
    """Build `dataset` in `out_dir`, or find that it is already there, and return its manifest.

    Records keep the order of the source: files by name, lines in order. Memory stays bounded whatever the size.

    Args:
        num_shards: the number of ArrayRecord files; None starts a new one every 256 MiB of records.
        force: build even if `out_dir` holds the same dataset from the same source bytes.
        progress: called now and then with a `Progress`.
        tfds_data_dir: where TFDS keeps its datasets (default `$TFDS_DATA_DIR`).

    Raises:
        ConfigError: `dataset.fields` maps a field the kind does not have.
        DataError: nothing to read, an unreadable file, or more than `max_reject_rate` of the records are bad; the
            rejects then lie in `OUT_DIR.rejects.jsonl`, one JSON object a line with place, reason and excerpt.
    """
    check_fields(dataset.kind, dataset.fields)
    out = Path(out_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists() and not (out / MANIFEST).exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out} exists and is not a dataset built by conan; name another folder, or move it away")
    with _locked(out):
        settings = {"kind": dataset.kind, "name": dataset.name, "fields": dict(dataset.fields), "limit": dataset.limit, "num_shards": num_shards}
        built = None if force else _built(out, settings)
        try:
            plan = readers.expand(dataset.source)
        except DataError as error:
            if built is None:
                raise
            _log.warning("%s; using the dataset already built in %s", error, out)
            return built
        if built and built.reject_rate <= dataset.max_reject_rate and _same_source(built, plan):
            return built
        return _build(dataset, plan, out, settings, num_shards, progress, tfds_data_dir)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """One builder at a time for one folder; a second one waits, then finds the work done."""
    with open(out.parent / f".{out.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _built(out: Path, settings: dict[str, Any]) -> Manifest | None:
    """The manifest of a whole dataset in `out` that was built with these settings."""
    try:
        manifest = read_manifest(out)
        verify(out, manifest, hashes=False)
    except DataError:
        return None
    return manifest if manifest.settings == settings else None


def _same_source(built: Manifest, plan: readers.Plan) -> bool:
    """True when the files hold the bytes that `built` was made from; hashed only where size or time differ."""
    tfds_parts = [part for part in plan.parts if isinstance(part, str)]
    if len(built.files) != len(plan.files) or (tfds_parts and built.source != plan.source):
        return False
    for old, file in zip(built.files, plan.files):
        stat = file.stat()
        unmoved = old.path == str(file) and old.mtime_ns == stat.st_mtime_ns
        if stat.st_size != old.bytes or not (unmoved or sha256_of(file) == old.sha256):
            return False
    return True


def _build(dataset: Dataset, plan: readers.Plan, out: Path, settings: dict[str, Any], num_shards: int | None,
           progress: Callable[[Progress], None] | None, tfds_data_dir: str | None) -> Manifest:
    files = tuple(_source_file(file) for file in plan.files)
    temporary = out.parent / f".{out.name}.building"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    read = 0
    rejects: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    dialects: Counter[str] = Counter()
    writer = _ShardWriter(temporary, SHARD_BYTES)
    report = progress or (lambda _: None)
    with open(temporary / REJECTS, "w", encoding="utf-8", errors="backslashreplace") as rejects_file:
        for item in readers.read(plan, dataset.fields, tfds_data_dir=tfds_data_dir):
            read += 1
            try:
                if isinstance(item.raw, Reject):
                    raise item.raw
                parsed = parse(item.raw, dataset.kind, dataset.fields)
            except Reject as reject:
                rejects[reject.reason] += 1
                excerpt = reject.raw or json.dumps(item.raw, ensure_ascii=False, default=repr)
                line = {"location": item.location, "reason": reject.reason, "detail": reject.detail, "raw": excerpt[:_EXCERPT]}
                rejects_file.write(json.dumps(line, ensure_ascii=False) + "\n")
                if read == rejects.total() == _HOPELESS and dataset.max_reject_rate < 1:
                    break
            else:
                writer.write(example.encode(parsed.record, dataset.kind))
                dialects[parsed.dialect] += 1
                dropped += parsed.dropped
            if read % 256 == 0:
                report(Progress(writer.records, rejects.total(), item.done, plan.total_bytes))
            if writer.records == dataset.limit:
                break
    writer.close()
    kept = out.parent / f"{out.name}.{REJECTS}"
    if rejects.total() > dataset.max_reject_rate * read or not writer.records:
        os.replace(temporary / REJECTS, kept)
        shutil.rmtree(temporary)
        raise DataError(_failure(dataset, read, rejects, kept))
    for file in files:
        if (stat := Path(file.path).stat()).st_size != file.bytes or stat.st_mtime_ns != file.mtime_ns:
            raise DataError(f"{file.path} changed while it was being read; build again when it is complete")
    if num_shards:
        writer = _reshard(writer, temporary / "parts", num_shards)
    shards = _finish_shards(temporary, dataset, writer)
    if num_shards:
        (temporary / "parts").rmdir()
    manifest = Manifest(name=dataset.name, kind=dataset.kind, source=dataset.source, records=writer.records, read=read, shards=shards, files=files,
                        settings=settings, rejects=dict(sorted(rejects.items())), dropped=dict(sorted(dropped.items())),
                        dialects=dict(sorted(dialects.items())), version=conan_jax.__version__)
    manifest.write(temporary)
    _move_into_place(temporary, out)
    kept.unlink(missing_ok=True)
    report(Progress(writer.records, rejects.total(), plan.total_bytes or read, plan.total_bytes))
    return manifest


def _source_file(file: Path) -> SourceFile:
    stat = file.stat()
    return SourceFile(str(file), stat.st_size, sha256_of(file), stat.st_mtime_ns)


def _failure(dataset: Dataset, read: int, rejects: Counter[str], kept: Path) -> str:
    if not read:
        return f"{dataset.source} holds no records"
    reasons = "; ".join(f"{count:,} {reason} ({REASONS[reason]})" for reason, count in rejects.most_common())
    return (f"{dataset.name}: {rejects.total():,} of the {read:,} records read from {dataset.source} cannot be used as {dataset.kind}, more than "
            f"max_reject_rate {dataset.max_reject_rate:g} allows: {reasons}. Read {kept}; then fix the source, map its columns with fields, "
            "or raise max_reject_rate")


class _ShardWriter:
    """Records into numbered ArrayRecord files. `group_size:1` makes random access read one record, not a block."""

    def __init__(self, folder: Path, shard_bytes: float) -> None:
        self._folder, self._full = folder, shard_bytes
        self._writer: ArrayRecordWriter | None = None
        self._shard_bytes = 0
        self.parts: list[Path] = []
        self.counts: list[int] = []
        self.records = self.num_bytes = 0

    def write(self, serialized: bytes) -> None:
        if self._writer is None or self._shard_bytes >= self._full:
            self.start_shard()
        self._writer.write(serialized)
        self.counts[-1] += 1
        self.records += 1
        self._shard_bytes += len(serialized)
        self.num_bytes += len(serialized)

    def start_shard(self) -> None:
        self.close()
        self.parts.append(self._folder / f"{len(self.parts):05d}.part")
        self.counts.append(0)
        self._shard_bytes = 0
        self._writer = ArrayRecordWriter(str(self.parts[-1]), "group_size:1")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _reshard(writer: _ShardWriter, folder: Path, num_shards: int) -> _ShardWriter:
    """The same records in the same order in `num_shards` files whose counts differ by at most one."""
    folder.mkdir()
    even = _ShardWriter(folder, math.inf)
    num_shards = min(num_shards, writer.records)
    starts = {writer.records * k // num_shards for k in range(num_shards)}
    for part, count in zip(writer.parts, writer.counts):
        reader = ArrayRecordReader(str(part))
        for first in range(0, count, 1024):
            for serialized in reader.read(first, min(first + 1024, count)):
                if even.records in starts:
                    even.start_shard()
                even.write(serialized)
        reader.close()
        part.unlink()
    even.close()
    return even


def _finish_shards(folder: Path, dataset: Dataset, writer: _ShardWriter) -> tuple[Shard, ...]:
    """Give the shards their TFDS names and write the TFDS metadata beside them."""
    name = re.sub(r"\W", "_", dataset.name)
    name = name if name[0].isalpha() else f"d_{name}"  # TFDS names are Python identifiers that begin with a letter
    shards = []
    for i, (part, count) in enumerate(zip(writer.parts, writer.counts)):
        path = folder / f"{name}-{SPLIT}.array_record-{i:05d}-of-{len(writer.parts):05d}"
        os.replace(part, path)
        shards.append(Shard(path.name, count, path.stat().st_size, sha256_of(path)))
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=writer.counts, num_bytes=writer.num_bytes)
    tfds.folder_dataset.write_metadata(data_dir=folder, features=example.tfds_features(dataset.kind), split_infos=[split], version="1.0.0",
                                       description=f"{dataset.kind} records", check_data=False)
    return tuple(shards)


def _move_into_place(temporary: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(temporary, out)
    shutil.rmtree(old, ignore_errors=True)
