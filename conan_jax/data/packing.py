"""Language-model text -> rows of fixed length, ahead of time: tokenised, packed, written as a TFDS dataset.

A row holds several segments (documents, or parts of long ones). It is stored as its tokens and, for each segment,
its length and the number of leading tokens that are no targets; segment ids, positions and the loss mask follow
from these when a row is read.
"""

from __future__ import annotations

import json
import operator
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from jaxtyping import Float32, Int32
from tensorflow_datasets.proto import tf_example_pb2

import conan_jax
from conan_jax.data.access import read_records
from conan_jax.data.artifacts import make_once
from conan_jax.data.folders import fingerprint
from conan_jax.data.manifest import Manifest, Shard, read_manifest, sha256_of, verify
from conan_jax.data.shards import SPLIT, as_os_errors, write_tfds_metadata
from conan_jax.data.sources import open_serialized
from conan_jax.data.tokenizer import AnyTokenizer
from conan_jax.data.transforms import as_pair, record_texts
from conan_jax.errors import DataError
from conan_jax.files import replacing, write_json

PackKind = Literal["pretrain", "sft"]
Row = list["Segment"]

_FORMAT = 1
_MIN_SHARD_DOCUMENTS, _MAX_SHARD_DOCUMENTS = 2048, 65_536
_FIELDS = ("tokens", "segment_lengths", "prompt_lengths")


class Segment:
    """Consecutive tokens of one document; the first `prompt` of them (at least one) are not targets."""

    __slots__ = ("prompt", "tokens")

    def __init__(self, tokens: Int32[np.ndarray, "n"], prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt


class PackedRows:
    """Packed rows by number: `{"id", "tokens"[L], "segment_ids"[L], "positions"[L], "loss_mask"[L]}`.

    `segment_ids` counts from 1 (0 is padding), `positions` from 0 in each segment, `loss_mask` is 1 where the token is a
    target. Reading is safe from many threads.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.sequence_length: int = manifest.settings["sequence_length"]
        self._raw = open_serialized(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.records

    def __getitem__(self, index: SupportsIndex) -> dict[str, Any]:
        i = operator.index(index)
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)} in {self.folder}")
        return self._row(i, self._raw[i])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several rows in one call, which reads them in parallel."""
        for i in indices:
            if not 0 <= i < len(self):
                raise IndexError(f"row {i} of {len(self)} in {self.folder}")
        return [self._row(i, serialized) for i, serialized in zip(indices, self._raw.__getitems__(list(indices)))]

    def _row(self, i: int, serialized: bytes) -> dict[str, Any]:
        feature = tf_example_pb2.Example.FromString(serialized).features.feature
        tokens, lengths, prompts = (np.array(feature[name].int64_list.value, np.int32) for name in _FIELDS)
        return {"id": i, **expand_row(tokens, lengths, prompts, self.sequence_length)}


def open_packed(folder: str | os.PathLike[str]) -> PackedRows:
    """Open what `pack` wrote, checked against its manifest. Raises `DataError` when it is missing or damaged."""
    manifest = read_manifest(folder)
    verify(folder, manifest)
    return PackedRows(Path(folder), manifest)


def expand_row(
    tokens: Int32[np.ndarray, "n"], segment_lengths: Int32[np.ndarray, "S"], prompt_lengths: Int32[np.ndarray, "S"], length: int,
) -> dict[str, Int32[np.ndarray, "L"] | Float32[np.ndarray, "L"]]:
    """The arrays of one row from its stored form, padded to `length`."""
    n = len(tokens)
    starts = np.cumsum(segment_lengths) - segment_lengths
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "segment_ids", "positions")}  # segment 0 is padding, whatever its token
    row["tokens"][:n] = tokens
    row["segment_ids"][:n] = np.repeat(np.arange(1, len(segment_lengths) + 1), segment_lengths)
    row["positions"][:n] = np.arange(n) - np.repeat(starts, segment_lengths)
    mask = np.zeros(length, np.float32)
    mask[:n] = row["positions"][:n] >= np.repeat(prompt_lengths, segment_lengths)
    return {**row, "loss_mask": mask}


def split_document(tokens: Sequence[int], length: int, eos: int) -> list[Segment]:
    """A document and its `eos` as segments of at most `length` tokens. A segment of one token has no target and is dropped."""
    ids = np.array([*tokens, eos], np.int32)
    return [Segment(ids[i : i + length], 1) for i in range(0, len(ids), length) if len(ids) - i > 1]


def fit_example(prompt: Sequence[int], separator: Sequence[int], output: Sequence[int], length: int, eos: int) -> Segment:
    """Prompt, separator, output, `eos` in at most `length` tokens; the end of the prompt goes first, at least one token of it stays.

    An output that still does not fit is cut and has no `eos`: it does not end there.
    """
    target = [*output, eos][: length - 1 - len(separator)]
    head = [*prompt[: length - len(separator) - len(target)], *separator]
    return Segment(np.array(head + target, np.int32), len(head))


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the items of each bin, every bin's sum within `capacity`. O(n log n), a tie goes to the newest bin."""
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when a bin with room r exists
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[item]
        wide_enough = rooms >> size
        if wide_enough:
            room = size + (wide_enough & -wide_enough).bit_length() - 1
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
            bins[chosen].append(item)
        else:
            room, chosen = capacity, len(bins)
            bins.append([item])
        if room - size > 0:
            with_room[room - size].append(chosen)
            rooms |= 1 << (room - size)
    return bins


def pack(
    source: Sequence[Any], tokenizer: AnyTokenizer, kind: PackKind, sequence_length: int, out_dir: str | os.PathLike[str], *,
    record_kind: str, content: str, num_workers: int | None = None, progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Pack `source` into rows of `sequence_length` tokens in `out_dir`, or find them already there; returns the manifest.

    Shards of documents are tokenised and packed by threads (the tokenizer releases the interpreter lock), each written
    whole or not at all; after an interruption the finished ones are kept. The rows do not depend on `num_workers`. Processes that
    pack the same rows at once end with the same folder.

    Args:
        kind: `pretrain` learns all text of a record, split where it is longer than a row; `sft` learns the output after the
            prompt (sft, pair and retrieval records), one segment an example.
        record_kind: the kind of the records in `source`.
        content: the fingerprint of the records; with the tokenizer, `kind` and `sequence_length` it decides whether rows fit.
        progress: called with (documents done, documents).

    Raises:
        DataError: `sequence_length` is too short, there is nothing to learn from, or `out_dir` cannot be written.
    """
    out = Path(out_dir)
    separator = tokenizer.encode("\n")
    if sequence_length < len(separator) + 3:
        raise DataError(f"sequence_length {sequence_length} is too short to pack rows; {len(separator) + 3} is the least")
    mark = rows_fingerprint(tokenizer.sha256, kind, sequence_length, record_kind, content)
    work = out.parent / f".{out.name}.{mark[:16]}"  # the same for every process and restart: the finished shards in it are used again

    def make(private: Path) -> Path:
        blocks = _blocks(len(source))

        def work_on(block: range) -> dict[str, int]:
            name = work / f"{block.start:012d}"
            stored = _finished_shard(name)
            if stored is None:
                segments = _segments(read_records(source, block), tokenizer, kind, record_kind, separator, sequence_length)
                bins = best_fit([len(s.tokens) for s in segments], sequence_length)
                stored = _write_shard(name, [[segments[i] for i in members] for members in bins])
            return stored

        shards, documents = [], 0
        pool = ThreadPoolExecutor(num_workers or os.cpu_count() or 1)
        try:
            work.mkdir(exist_ok=True)
            for block, shard in zip(blocks, pool.map(work_on, blocks)):
                shards.append(shard)
                documents += len(block)
                if progress is not None:
                    progress(documents, len(source))
            settings = {"fingerprint": mark, "kind": kind, "sequence_length": sequence_length, "tokenizer": tokenizer.sha256,
                        "documents": len(source), "tokens": sum(s["tokens"] for s in shards), "targets": sum(s["targets"] for s in shards)}
            _finish(work, private, out, blocks, shards, settings)
        except OSError:
            # Without locks another process may have finished the rows meanwhile, and removed the shards that it was done with.
            if packed_manifest(out, mark) is None:
                raise
        finally:
            pool.shutdown(cancel_futures=True)
        return out

    manifest = make_once(out, lambda: packed_manifest(out, mark), make)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def rows_fingerprint(tokenizer_sha256: str, kind: PackKind, sequence_length: int, record_kind: str, content: str) -> str:
    """The fingerprint of packed rows: equal exactly when their bytes are."""
    return fingerprint(format=_FORMAT, tokenizer=tokenizer_sha256, kind=kind, sequence_length=sequence_length, record_kind=record_kind,
                       content=content)


def packed_manifest(folder: str | os.PathLike[str], mark: str) -> Manifest | None:
    """The manifest in `folder` when it is whole and of fingerprint `mark`."""
    try:
        manifest = read_manifest(folder)
        verify(folder, manifest, hashes=False)
    except DataError:
        return None
    return manifest if manifest.settings.get("fingerprint") == mark else None


def _blocks(documents: int) -> list[range]:
    # A function of the number of documents alone, so that the rows are the same on any machine.
    size = min(max(documents // 64, _MIN_SHARD_DOCUMENTS), _MAX_SHARD_DOCUMENTS)
    return [range(start, min(start + size, documents)) for start in range(0, documents, size)]


def _segments(
    records: Sequence[Any], tokenizer: AnyTokenizer, kind: PackKind, record_kind: str, separator: list[int], length: int,
) -> list[Segment]:
    if kind == "pretrain":
        texts = ["\n".join(record_texts(record_kind, record)) for record in records]
        return [segment for ids in tokenizer.encode_batch(texts) for segment in split_document(ids, length, tokenizer.eos_id)]
    pairs = [as_pair(record_kind, record) for record in records]
    prompts, outputs = (tokenizer.encode_batch([pair[side] for pair in pairs]) for side in (0, 1))
    return [fit_example(prompt, separator, output, length, tokenizer.eos_id) for prompt, output in zip(prompts, outputs)]


def _write_shard(name: Path, rows: list[Row]) -> dict[str, int]:
    num_bytes = tokens = targets = 0
    with replacing(name.with_suffix(".part")) as temporary, as_os_errors():
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for row in rows:
            example = tf_example_pb2.Example()
            feature = example.features.feature
            feature["tokens"].int64_list.value.extend(np.concatenate([s.tokens for s in row]).tolist())
            feature["segment_lengths"].int64_list.value.extend(len(s.tokens) for s in row)
            feature["prompt_lengths"].int64_list.value.extend(s.prompt for s in row)
            serialized = example.SerializeToString(deterministic=True)
            writer.write(serialized)
            num_bytes += len(serialized)
            tokens += sum(len(s.tokens) for s in row)
            targets += sum(len(s.tokens) - s.prompt for s in row)
        writer.close()
        size = temporary.stat().st_size
    described = {"rows": len(rows), "num_bytes": num_bytes, "tokens": tokens, "targets": targets, "bytes": size}
    write_json(name.with_suffix(".json"), described)  # after the rows: a shard that is described is whole
    return described


def _finished_shard(name: Path) -> dict[str, int] | None:
    try:
        described = json.loads(name.with_suffix(".json").read_text())
        return described if name.with_suffix(".part").stat().st_size == described["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


def _finish(work: Path, folder: Path, out: Path, blocks: list[range], shards: list[dict[str, int]], settings: dict[str, Any]) -> None:
    """Fill `folder`, which becomes `out`, with the shards in `work` and their description."""
    filled = [(work / f"{block.start:012d}.part", shard) for block, shard in zip(blocks, shards) if shard["rows"]]
    if not filled:
        raise DataError(f"there is nothing to learn from in {settings['documents']:,} records for {out}")
    entries = []
    for i, (part, shard) in enumerate(filled):
        path = folder / f"packed-{SPLIT}.array_record-{i:05d}-of-{len(filled):05d}"
        try:
            os.link(part, path)
        except OSError:  # a file system without hard links
            shutil.copyfile(part, path)
        entries.append(Shard(path.name, shard["rows"], path.stat().st_size, sha256_of(path)))
    features = tfds.features.FeaturesDict({name: tfds.features.Tensor(shape=(None,), dtype=np.int32) for name in _FIELDS})
    write_tfds_metadata(folder, features, [e.records for e in entries], sum(s["num_bytes"] for _, s in filled), "packed rows")
    rows = sum(e.records for e in entries)
    settings = {**settings, "fill": settings["tokens"] / (rows * settings["sequence_length"])}
    manifest = Manifest(name=out.name, kind="packed", source="", records=rows, read=settings["documents"], shards=tuple(entries), files=(),
                        settings=settings, version=conan_jax.__version__)
    manifest.write(folder)
