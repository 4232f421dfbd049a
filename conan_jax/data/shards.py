"""Serialized records into ArrayRecord shards that TFDS opens."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from conan_jax.config import RecordKind
from conan_jax.data import example
from conan_jax.data.manifest import Shard, sha256_of
from conan_jax.errors import DataError

SHARD_BYTES = 256 * 2**20  # of records, before compression
SPLIT = "train"


class ShardWriter:
    """Records into numbered ArrayRecord files. `group_size:1` makes random access read one record, not a block."""

    def __init__(self, folder: Path, shard_bytes: float = SHARD_BYTES) -> None:
        self.folder, self._full = folder, shard_bytes
        self._writer: ArrayRecordWriter | None = None
        self._shard_bytes = 0
        self.parts: list[Path] = []
        self.counts: list[int] = []
        self.records = self.num_bytes = 0

    def write(self, serialized: bytes) -> None:
        if self._writer is None or self._shard_bytes >= self._full:
            self.start_shard()
        with as_os_errors():
            self._writer.write(serialized)
        self.counts[-1] += 1
        self.records += 1
        self._shard_bytes += len(serialized)
        self.num_bytes += len(serialized)

    def start_shard(self) -> None:
        self.close()
        self.parts.append(self.folder / f"{len(self.parts):05d}.part")
        self.counts.append(0)
        self._shard_bytes = 0
        self._writer = ArrayRecordWriter(str(self.parts[-1]), "group_size:1")

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            with as_os_errors():
                writer.close()


@contextmanager
def as_os_errors() -> Iterator[None]:
    """ArrayRecord reports a full disk as RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from None


def reshard(writer: ShardWriter, num_shards: int) -> ShardWriter:
    """The same records in the same order in `num_shards` files whose counts differ by at most one; the old ones go."""
    folder = writer.folder / "even"
    folder.mkdir()
    even = ShardWriter(folder, math.inf)
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


def finish(folder: Path, dataset: str, kind: RecordKind, writer: ShardWriter) -> tuple[Shard, ...]:
    """Move the shards into `folder` under their TFDS names, write the TFDS metadata beside them, and describe them.

    Raises `DataError` when a shard does not hold what was written, as on a full disk.
    """
    name = re.sub(r"\W", "_", dataset)
    name = name if name[0].isalpha() else f"d_{name}"  # TFDS names are Python identifiers that begin with a letter
    shards = []
    for i, (part, count) in enumerate(zip(writer.parts, writer.counts)):
        path = folder / f"{name}-{SPLIT}.array_record-{i:05d}-of-{len(writer.parts):05d}"
        os.replace(part, path)
        if (found := _count(path)) != count:
            raise DataError(f"{path} holds {found:,} of the {count:,} records written to it; is the disk full?")
        shards.append(Shard(path.name, count, path.stat().st_size, sha256_of(path)))
    write_tfds_metadata(folder, example.tfds_features(kind), writer.counts, writer.num_bytes, f"{kind} records")
    if writer.folder != folder:
        writer.folder.rmdir()
    return tuple(shards)


def write_tfds_metadata(
    folder: Path, features: tfds.features.FeaturesDict, shard_lengths: Sequence[int], num_bytes: int, description: str,
) -> None:
    """The files beside the shards that let TFDS open `folder` by itself."""
    split = tfds.core.SplitInfo(name=SPLIT, shard_lengths=list(shard_lengths), num_bytes=num_bytes)
    tfds.folder_dataset.write_metadata(data_dir=folder, features=features, split_infos=[split], version="1.0.0", description=description,
                                       check_data=False)


def _count(path: Path) -> int:
    reader = ArrayRecordReader(str(path))
    try:
        return reader.num_records()
    finally:
        reader.close()
