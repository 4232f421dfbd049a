"""Whole corpora of vectors: encoded in bounded memory, resumed where a killed run stopped, in shards when there are many machines.

    OUT.npy | OUT.parquet   the vectors: [N, W], or the columns id and embedding
    OUT.json                what they are: model, prompt, precision, width, count, source (`OUT.npy.json`, `OUT.parquet.json`)
    OUT.ids.jsonl           beside .npy, when there are ids: one JSON string a line
    .OUT.partial/           while it goes on: vectors.npy, state.json (the job, and how many rows are done)

Texts are encoded 2,048 at a time, each such chunk from its own texts alone, so a resumed run writes the bytes that one without
interruption would have written.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num

from conan_jax.errors import ConfigError, DataError
from conan_jax.files import check_room, read_json, replacing, write_json
from conan_jax.folder_lock import FolderLock
from conan_jax.inference.identity import described
from conan_jax.inference.precision import DTYPES, Precision, check_precision, checked_ranges, kept_dimensions, quantize, refuse_empty_ranges, width
from conan_jax.inference.source import TextSource

FORMAT = 1
STATE = "state.json"
CHUNK = 2048
SUFFIXES = (".npy", ".parquet")
BLOCK = 16_384  # rows copied at a time

Advance = Callable[[int, int], None]  # rows done, rows in all


@dataclass(frozen=True)
class Settings:
    """How a corpus is encoded; what `Encoder.encode` calls the same is the same. `prompt` is the full string."""

    prompt: str = ""
    batch_size: int = 256
    precision: Precision = "float32"
    truncate_dim: int | None = None
    max_length: int | None = None
    shard: tuple[int, int] = (1, 1)  # this one, of so many

    def __post_init__(self) -> None:
        check_precision(self.precision)
        index, count = self.shard
        if not 1 <= index <= count:
            raise ConfigError(f"shard {index}/{count} must be I/N with 1 <= I <= N")


def shard_rows(total: int, shard: tuple[int, int]) -> range:
    """The rows of shard I of N: as even as they can be, and in order, so the pieces concatenate to the whole."""
    index, count = shard
    return range((index - 1) * total // count, index * total // count)


def meta_file(out: Path) -> Path:
    """Where the description of an encoded corpus lies."""
    return out.with_name(out.name + ".json")


def ids_file(out: Path) -> Path:
    """Where the ids beside an .npy lie."""
    return out.with_name(out.name + ".ids.jsonl")


def encode_corpus(
    encoder: Any, source: TextSource, out: str | os.PathLike[str], settings: Settings = Settings(), *,
    ranges: np.ndarray | None = None, force: bool = False, advance: Advance | None = None, say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Encode `source` to `out` (.npy or .parquet), or go on where an earlier call with the same arguments stopped; returns its description.

    All records are read once before the first is encoded: a bad one is found before hours of work, not after. Nothing holds more
    than a chunk of texts and vectors. int8 and uint8 without `ranges` take those of all vectors, kept in float32 until they are known.
    An `out` that is there already gives way to nothing but `force`; one that these very arguments made is complete and left alone.

    Args:
        encoder: an `Encoder`.
        ranges: Float32[2, W], lowest and highest value of each dimension, for int8 and uint8; needed for a shard, which cannot know
            the others'.
        force: replace an `out` that is there, or what was begun with other arguments.
        advance: called with rows done and rows in all.
        say: told in a line what is found of an earlier call.

    Raises:
        ConfigError: an unknown suffix, a width or ranges that do not fit, something else stands at `out` or was begun there, or it
            cannot be written.
        DataError: a record cannot be encoded, naming file and line, or the source holds nothing.
        FolderInUseError: another process writes the same `out`.
    """
    out, say, advance = Path(out), say or (lambda line: None), advance or (lambda done, total: None)
    check_settings(encoder, out, settings, ranges)
    folder = out.with_name(f".{out.name}.partial")
    begun = read_json(folder / STATE, {}).get("job")
    there = _description(out) if out.exists() and not force else None
    if out.exists() and not force and there is None and begun is None:
        raise ConfigError(f"{out} is there already, and not as `conan encode` left it; name another file, or replace it with --force")
    job = _job(encoder, source, settings, ranges)
    if there is not None and not (differences := _differences(there, job)):
        say(f"{out} is complete already; --force makes it again")
        advance(there["count"], there["count"])
        return there
    if there is not None and begun != job:
        raise ConfigError(f"{out} is there already, made another way ({differences}); replace it with --force, or name another file")
    with FolderLock(folder, "`conan encode`"):
        try:
            meta = _encode(encoder, source, out, folder, job, settings, ranges, force, advance, say)
        except OSError as error:
            raise DataError(f"{out} cannot be written: {error.strerror or error}; check that the disk has room, then start the same "
                            "command again") from error
        shutil.rmtree(folder, ignore_errors=True)
    return meta


def check_settings(encoder: Any, out: Path, settings: Settings, ranges: np.ndarray | None) -> None:
    """Raise `ConfigError` for what can be known to be wrong before a text is read."""
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"{out} must end in {' or '.join(SUFFIXES)}")
    if out.is_dir():
        raise ConfigError(f"{out} is a folder; name another file")
    dimension = kept_dimensions(settings.truncate_dim, encoder.dimension)
    encoder.row_length(settings.max_length)
    quantised = settings.precision.endswith("int8")
    if quantised and ranges is None and settings.shard[1] > 1:
        raise ConfigError(f"{settings.precision} in shards needs ranges that all of them share: encode a sample in float32 and give it as "
                          "--ranges SAMPLE.npy")
    if ranges is not None and not quantised:
        raise ConfigError(f"ranges are for int8 and uint8, not for {settings.precision}")
    if ranges is not None:
        refuse_empty_ranges(checked_ranges(np.asarray(ranges), dimension))


def _description(out: Path) -> dict[str, Any] | None:
    """Of an `out` that an earlier call finished; None when no such call made it, or it was changed since."""
    try:
        meta = read_json(meta_file(out), {})
        rows, columns = meta["count"], width(meta["dimension"], meta["precision"])
        whole = _Vectors(out, rows, columns, DTYPES[meta["precision"]]).holds(rows) if out.suffix == ".npy" else _parquet_rows(out) == rows
    except (DataError, KeyError, TypeError):
        return None
    return meta if whole else None


def _parquet_rows(out: Path) -> int | None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(out).num_rows
    except (pa.ArrowException, OSError):
        return None


def _differences(before: dict[str, Any], job: dict[str, Any]) -> str:
    """In what an earlier call differs from this one, in words; nothing when it does not."""
    said = []
    for key, now in job.items():
        then = before.get(key)
        if then == now or key == "ranges" and job["own_ranges"] and before.get("own_ranges"):
            continue
        if key == "encoder":
            said.append(f"by {described(then or {})}, now by {described(now)}")
        elif key in ("source", "source_count"):
            said.append("of other texts")
        elif key in ("ranges", "own_ranges"):
            said.append("other ranges")
        else:
            said.append(f"{key} {then!r}, now {now!r}"[:160])
    return ", ".join(dict.fromkeys(said))


def _job(encoder: Any, source: TextSource, settings: Settings, ranges: np.ndarray | None) -> dict[str, Any]:
    """Everything the vectors follow from, and `count`, the rows of the whole source."""
    dimension = kept_dimensions(settings.truncate_dim, encoder.dimension)
    count = sum(1 for _ in source)
    if not count:
        raise DataError(f"{source.source} holds no texts")
    given = asdict(settings) | {"shard": list(settings.shard), "max_length": encoder.row_length(settings.max_length)}
    return {"format": FORMAT, "encoder": encoder.identity, **given, "dimension": dimension,
            "own_ranges": settings.precision.endswith("int8") and ranges is None,  # those of all vectors
            "ranges": None if ranges is None else np.asarray(ranges, np.float32).tolist(),
            "field": source.text_field, "id_field": source.id_field, "source": source.identity(), "source_count": count}


def _encode(
    encoder: Any, source: TextSource, out: Path, folder: Path, job: dict[str, Any], settings: Settings, ranges: np.ndarray | None,
    force: bool, advance: Advance, say: Callable[[str], None],
) -> dict[str, Any]:
    rows = shard_rows(job["source_count"], settings.shard)
    late = job["own_ranges"]  # they are known when all vectors are
    stored: Precision = "float32" if late else settings.precision
    vectors = _Vectors(folder / "vectors.npy", len(rows), width(job["dimension"], stored), DTYPES[stored])
    state = read_json(folder / STATE, {})
    begun, done = state.get("job"), state.get("done", 0)
    if begun is not None and begun != job:
        if not force:
            raise ConfigError(f"{done:,} rows of {out} were begun another way ({_differences(begun, job)}); finish them as they were "
                              "begun, name another file, or drop them with --force")
        say("what an earlier run left was made another way; starting anew")
        done = 0
    elif begun is not None and not vectors.holds(done):
        say("what an earlier run left is damaged; starting anew")
        done = 0
    elif done:
        say(f"going on after {done:,} of {len(rows):,} rows")
    left = (len(rows) - done) * vectors.row_bytes
    copied = len(rows) * width(job["dimension"], settings.precision) * np.dtype(DTYPES[settings.precision]).itemsize
    check_room(folder, left + (copied if late or out.suffix == ".parquet" else 0))
    if not done:
        vectors.create()
    advance(done, len(rows))
    for part in _encoded(encoder, source, rows[done:], settings):
        vectors.write(done, quantize(part, stored, ranges))
        done += len(part)
        write_json(folder / STATE, {"job": job, "done": done})
        advance(done, len(rows))
    final = np.load(vectors.path, mmap_mode="r", allow_pickle=False)
    if late:
        ranges = _ranges(final)
    meta = {**job, "count": len(rows), "ranges": None if ranges is None else np.asarray(ranges, np.float32).tolist(),
            "first_row": rows.start}
    _finish(source, rows, out, final, meta, settings.precision if late else None)
    return meta


def _encoded(encoder: Any, source: TextSource, rows: range, settings: Settings) -> Iterator[np.ndarray]:
    """Float32 vectors of `rows`, a chunk at a time. On an accelerator the next chunk is tokenised while this one is computed."""
    def encode(texts: list[str]) -> np.ndarray:
        return encoder.encode(texts, prompt=settings.prompt, batch_size=settings.batch_size, truncate_dim=settings.truncate_dim,
                              max_length=settings.max_length)

    texts = (item.text for item in itertools.islice(source, rows.start, rows.stop))
    chunks = iter(lambda: list(itertools.islice(texts, CHUNK)), [])
    if _on_cpu():
        yield from map(encode, chunks)
        return
    with ThreadPoolExecutor(2, "encode") as pool:
        ahead = deque(pool.submit(encode, chunk) for chunk in itertools.islice(chunks, 2))
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(encode, chunk) for chunk in itertools.islice(chunks, 1))


def _on_cpu() -> bool:
    import jax

    return jax.default_backend() == "cpu"


class _Vectors:
    """An .npy file written from its beginning to its end. Not through a memory map: on a full disk that ends the process."""

    def __init__(self, path: Path, count: int, columns: int, dtype: type) -> None:
        self.path, self.count, self._columns, self._dtype = path, count, columns, np.dtype(dtype)

    def create(self) -> None:
        with open(self.path, "wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False,
                                                        "shape": (self.count, self._columns)})

    def holds(self, rows: Any) -> bool:
        """Whether there is a file with the right header and at least `rows` rows."""
        try:
            with open(self.path, "rb") as file:
                np.lib.format.read_magic(file)
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
                there = os.fstat(file.fileno()).st_size - file.tell()
        except (OSError, ValueError):
            return False
        return (shape, fortran, dtype) == ((self.count, self._columns), False, self._dtype) and there >= rows * self.row_bytes

    def write(self, start: int, rows: Num[np.ndarray, "n W"]) -> None:
        with open(self.path, "r+b") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            file.seek(file.tell() + start * self.row_bytes)
            file.write(np.ascontiguousarray(rows, self._dtype).tobytes())
            file.truncate()
            file.flush()
            os.fsync(file.fileno())

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self._columns * self._dtype.itemsize


def _ranges(vectors: np.ndarray) -> np.ndarray:
    if len(vectors) < 2:
        raise DataError("int8 and uint8 need at least two texts, or --ranges")
    low, high = np.array(vectors[0]), np.array(vectors[0])
    for start in range(0, len(vectors), BLOCK):
        block = vectors[start : start + BLOCK]
        low, high = np.minimum(low, block.min(axis=0)), np.maximum(high, block.max(axis=0))
    return np.stack([low, high])


def _finish(source: TextSource, rows: range, out: Path, vectors: np.memmap, meta: dict[str, Any], precision: Precision | None) -> None:
    """Put vectors, ids and, last, the description where they belong; `precision`: what is still to be made of the vectors."""
    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, len(vectors), BLOCK):
            block = np.asarray(vectors[start : start + BLOCK])
            yield block if precision is None else quantize(block, precision, np.asarray(meta["ranges"], np.float32))

    ids = (item.id for item in itertools.islice(source, rows.start, rows.stop))
    meta_file(out).unlink(missing_ok=True)
    ids_file(out).unlink(missing_ok=True)  # of what stood here before, perhaps
    if out.suffix == ".parquet":
        _write_parquet(out, blocks(), ids, width(meta["dimension"], meta["precision"]), DTYPES[meta["precision"]])
    else:
        if source.id_field is not None:
            with replacing(ids_file(out)) as partial, open(partial, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(name, ensure_ascii=False) + "\n" for name in ids)
        if precision is None:
            os.replace(vectors.filename, out)
        else:
            with replacing(out) as partial:
                smaller = _Vectors(partial, len(vectors), width(meta["dimension"], precision), DTYPES[precision])
                smaller.create()
                for start, block in zip(itertools.count(0, BLOCK), blocks()):
                    smaller.write(start, block)
    write_json(meta_file(out), meta)


def _write_parquet(out: Path, blocks: Iterator[np.ndarray], ids: Iterator[str], columns: int, dtype: type) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.from_numpy_dtype(dtype), columns))])
    with replacing(out) as partial, pq.ParquetWriter(partial, schema) as writer:
        for block in blocks:
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), columns)
            names = pa.array(list(itertools.islice(ids, len(block))), pa.string())
            writer.write_table(pa.Table.from_arrays([names, embedding], schema=schema))
