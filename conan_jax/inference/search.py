"""Semantic search over encoded corpora: encode once (`inference.corpus`), ask many times."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from conan_jax.errors import DataError
from conan_jax.files import read_json
from conan_jax.inference.corpus import FORMAT, Settings, encode_corpus, ids_file, meta_file
from conan_jax.inference.identity import described
from conan_jax.inference.precision import DTYPES, dequantize, width
from conan_jax.inference.source import Text, TextSource
from conan_jax.inference.top_k import top_k

VECTORS, DOCUMENTS = "vectors.npy", "docs.jsonl"  # of an index folder
RESERVED = ("id", "row", "score", "text", "record")  # fields of an answer that no field of a record replaces

Answer = dict[str, Any]


class Corpus:
    """One encoded corpus, or its shards in order, as float32 rows that are read when they are sliced.

    `meta` is the description of the first part; `len` counts all rows. Raises `DataError` when a part is missing, unfinished or
    damaged, or the parts were not made alike.
    """

    def __init__(self, files: Sequence[str | os.PathLike[str]]) -> None:
        self.files = [Path(file) for file in files]
        metas = [_read_meta(file) for file in self.files]
        self.meta = metas[0]
        self._parts = [_open_part(file, meta) for file, meta in zip(self.files, metas)]
        self._starts = np.cumsum([0, *(len(part) for part in self._parts)])
        self._first_rows = [meta["first_row"] for meta in metas]
        for file, meta in zip(self.files[1:], metas[1:]):
            for key in ("encoder", "prompt", "dimension", "precision", "ranges", "max_length"):
                if meta.get(key) != self.meta.get(key):
                    raise DataError(f"{file} and {self.files[0]} are not of one corpus: {key} is {str(meta.get(key))[:80]} and "
                                    f"{str(self.meta.get(key))[:80]}")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, rows: slice) -> Float32[np.ndarray, "n D"]:
        start, stop, _ = rows.indices(len(self))
        pieces = [part[max(start - first, 0) : stop - first] for part, first, end in zip(self._parts, self._starts, self._starts[1:])
                  if start < end and stop > first]
        vectors = np.concatenate(pieces) if pieces else np.zeros((0, width(self.meta["dimension"], self.meta["precision"])))
        ranges = self.meta["ranges"]
        return dequantize(vectors, self.meta["precision"], self.meta["dimension"], None if ranges is None else np.array(ranges, np.float32))

    def numbers(self, rows: set[int]) -> dict[int, int]:
        """Which text of the source, counted from 0, each of some rows is the vector of."""
        parts = {row: int(np.searchsorted(self._starts, row, side="right")) - 1 for row in rows}
        return {row: self._first_rows[part] + row - int(self._starts[part]) for row, part in parts.items()}

    def ids(self, rows: set[int]) -> dict[int, str]:
        """The ids of some rows; their `numbers` where none were kept."""
        found = {row: str(number) for row, number in self.numbers(rows).items()}
        for file, part, first in zip(self.files, self._parts, self._starts):
            within = {row - int(first) for row in rows if first <= row < first + len(part)}
            if within:
                found |= {int(first) + row: name for row, name in _ids(file, part, within).items()}
        return found

    def check_encoder(self, encoder: Any) -> None:
        """Raise `DataError` unless `encoder` has the weights that made these vectors."""
        if self.meta["encoder"] != encoder.identity:
            raise DataError(f"{self.files[0]} was made by {described(self.meta['encoder'])}, not by {described(encoder.identity)}; "
                            "name that model with --model, or encode the corpus again")


def search(
    corpus: Corpus, encoder: Any, queries: Sequence[str], k: int = 5, *, prompt_name: str | None = None, prompt: str | None = None,
    documents: TextSource | None = None, approximate: bool = False,
) -> list[list[Answer]]:
    """For each query the k nearest texts of the corpus, best first: `id`, `row`, `score` (the cosine) and, with `documents`, `text` (the
    text that was encoded) and the other fields of its record.

    `id` is the one that was kept with the corpus; else the record's own `id`, or its number. Fields of a record that are called `id`,
    `row`, `score` or `text` and hold something else are under `record`.

    Args:
        prompt_name, prompt: as `Encoder.encode_query`.
        documents: what the corpus was encoded from, for the fields of an answer.
        approximate: through a faiss index beside the corpus, made at the first call.

    Raises `DataError` when the corpus was made by another model, a query is blank, or `documents` holds other texts.
    """
    for query in queries:
        if not query.strip():
            raise DataError('a query is empty; ask something, for instance conan search "read a file line by line"')
    corpus.check_encoder(encoder)
    vectors = encoder.encode_query(list(queries), prompt_name, prompt, truncate_dim=corpus.meta["truncate_dim"])
    if approximate:
        from conan_jax.inference.approximate import nearest

        rows, scores = nearest(vectors, corpus, k)
    else:
        rows, scores = top_k(vectors, corpus, k)
    chosen = {int(row) for row in rows.reshape(-1) if row >= 0}
    names = corpus.ids(chosen)
    texts = {} if documents is None else _texts(documents, chosen, corpus)

    def answer(row: int, score: float) -> Answer:
        found = {"id": names[row], "row": row, "score": round(score, 4)}
        if row not in texts:
            return found
        own = texts[row].record
        if corpus.meta.get("id_field") is None and isinstance(own.get("id"), str | int) and not isinstance(own["id"], bool):
            found["id"] = str(own["id"])
        found["text"] = texts[row].text
        taken = {name: own[name] for name in RESERVED if name in own and str(own[name]) != str(found.get(name))}
        return found | {name: value for name, value in own.items() if name not in RESERVED} | ({"record": taken} if taken else {})

    return [[answer(int(row), float(score)) for row, score in zip(*found) if row >= 0] for found in zip(rows, scores)]


def build_index(encoder: Any, documents: str | Path, folder: str | Path, *, max_length: int = 64) -> Path:
    """An index folder: a copy of `documents` (jsonl with `id` and `text`) as docs.jsonl, and its vectors; returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    meta_file(folder / VECTORS).unlink(missing_ok=True)
    (folder / DOCUMENTS).write_bytes(Path(documents).read_bytes())
    encode_corpus(encoder, index_documents(folder), folder / VECTORS, Settings(max_length=min(max_length, encoder.model.max_length)),
                  force=True)
    return folder


def index_documents(folder: Path) -> TextSource:
    """The documents of an index folder."""
    return TextSource(str(folder / DOCUMENTS), id_field="id")


def _read_meta(file: Path) -> dict[str, Any]:
    if not file.is_file() or not meta_file(file).is_file():
        what = "is not finished: start its `conan encode` again" if file.with_name(f".{file.name}.partial").is_dir() else \
            f"is not there, or {meta_file(file).name} beside it is not; make it with `conan encode`"
        raise DataError(f"{file} {what}")
    meta = read_json(meta_file(file))
    known = meta.get("format") == FORMAT and meta.get("precision") in DTYPES
    if not known or not all(isinstance(meta.get(key), int) for key in ("count", "dimension", "first_row")) or "encoder" not in meta:
        raise DataError(f"{meta_file(file)} is damaged, or of another version; encode the corpus again")
    return meta


def _open_part(file: Path, meta: dict[str, Any]) -> Any:
    shape, dtype = (meta["count"], width(meta["dimension"], meta["precision"])), np.dtype(DTYPES[meta["precision"]])
    try:
        part = _Parquet(file, dtype) if file.suffix == ".parquet" else np.load(file, mmap_mode="r", allow_pickle=False)
        found, of = part.shape, part.dtype
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file} is damaged ({error}); encode the corpus again") from error
    if found != shape or of != dtype:
        raise DataError(f"{file} is damaged: it holds {of}{list(found)}, but {meta_file(file).name} says {dtype}{list(shape)}; "
                        "encode the corpus again")
    return part


class _Parquet:
    """The embedding column of a file, read a run of row groups at a time."""

    def __init__(self, file: Path, dtype: np.dtype) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self.file = pq.ParquetFile(file)
            column = self.file.schema_arrow.field("embedding").type
            self.shape, self.dtype = (self.file.metadata.num_rows, column.list_size), np.dtype(column.value_type.to_pandas_dtype())
        except (pa.ArrowException, AttributeError) as error:
            raise ValueError(str(error)) from error
        groups = range(self.file.num_row_groups)
        self._starts = np.cumsum([0, *(self.file.metadata.row_group(i).num_rows for i in groups)])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        first, last = (int(np.searchsorted(self._starts, row, side="right")) - 1 for row in (start, max(stop - 1, start)))
        table = self.file.read_row_groups(list(range(first, last + 1)), columns=["embedding"])
        flat = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return flat.reshape(-1, self.shape[1])[start - self._starts[first] : stop - self._starts[first]]

    def ids(self, rows: set[int]) -> dict[int, str]:
        names, number = {}, 0
        for batch in self.file.iter_batches(columns=["id"]):
            names |= {row: batch.column(0)[row - number].as_py() for row in rows if number <= row < number + len(batch)}
            number += len(batch)
        return names


def _ids(file: Path, part: Any, rows: set[int]) -> dict[int, str]:
    """The ids that were kept with a part."""
    if isinstance(part, _Parquet):
        return part.ids(rows)
    if not ids_file(file).is_file():
        return {}
    with open(ids_file(file), encoding="utf-8") as lines:
        names = {number: json.loads(line) for number, line in enumerate(lines) if number in rows}
    if names.keys() != rows:
        raise DataError(f"{ids_file(file)} has fewer lines than {file.name} has rows; encode the corpus again")
    return names


def _texts(documents: TextSource, rows: set[int], corpus: Corpus) -> dict[int, Text]:
    """The texts of some rows with their records, read in one pass."""
    if corpus.meta["source"] != documents.identity():
        raise DataError(f"{documents.source} is not what {corpus.files[0]} was encoded from; name that with --documents, or encode the "
                        "corpus again")
    wanted: dict[int, list[int]] = {}
    for row, number in corpus.numbers(rows).items():
        wanted.setdefault(number, []).append(row)
    found: dict[int, Text] = {}
    for number, item in enumerate(documents):
        for row in wanted.pop(number, ()):
            found[row] = item
        if not wanted:
            break
    return found
