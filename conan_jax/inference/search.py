"""Semantic search over a file of documents: encode once, ask many times.

    INDEX/vectors.npy   Float32[N, D], L2-normalised
    INDEX/docs.jsonl    the documents, one line a row of vectors.npy
    INDEX/meta.json     count, dimension, and the identity of the encoder (run, stage, step, tokenizer sha256)
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conan_jax.errors import DataError
from conan_jax.files import replacing, write_file, write_json
from conan_jax.inference.top_k import top_k

VECTORS, DOCUMENTS, META = "vectors.npy", "docs.jsonl", "meta.json"

Answer = dict[str, Any]


def build_index(encoder: Any, docs_jsonl: str | Path, out_dir: str | Path, *, max_length: int = 64, batch_size: int = 64) -> Path:
    """Encode the `text` of every line of `docs_jsonl` (objects with `id` and `text`) and write the index; returns its folder.

    `meta.json` goes last, so a folder that has it is complete. Raises `DataError` naming the line that is no such object.
    """
    docs = list(_read_documents(Path(docs_jsonl)))
    if not docs:
        raise DataError(f"{docs_jsonl} holds no documents")
    longest = min(max_length, encoder.model.max_length)
    vectors = encoder.encode_document([d["text"] for d in docs], max_length=longest, batch_size=batch_size)
    out = Path(out_dir)
    (out / META).unlink(missing_ok=True)
    with replacing(out / VECTORS) as partial, open(partial, "wb") as file:
        np.save(file, vectors, allow_pickle=False)
    write_file(out / DOCUMENTS, "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in docs))
    meta = {"count": len(docs), "dimension": int(vectors.shape[1]), "encoder": encoder.identity}
    write_json(out / META, meta)
    return out


def search(index_dir: str | Path, encoder: Any, query: str, k: int = 5, *, prompt: str | None = None) -> list[Answer]:
    """The k documents nearest to `query`, best first: each as it was indexed, with its cosine as `score`.

    Raises `DataError` when the index is missing, damaged, or was made by another model, or the query is blank.
    """
    if not query.strip():
        raise DataError('the query is empty; ask something, for instance conan search "read a file line by line"')
    vectors, docs = load_index(index_dir, encoder)
    rows, scores = top_k(encoder.encode_query([query], prompt=prompt), vectors, k)
    return [{"score": round(float(s), 4), **docs[int(r)]} for r, s in zip(rows[0], scores[0], strict=True)]


def load_index(index_dir: str | Path, encoder: Any) -> tuple[np.ndarray, list[Answer]]:
    """(vectors Float32[N, D], documents) of an index that `encoder` made. Raises `DataError` as `search`."""
    index = Path(index_dir)
    if not (index / META).is_file():
        raise DataError(f"there is no finished search index in {index}; build it with `conan demo`")
    try:
        meta = json.loads((index / META).read_text(encoding="utf-8"))
        vectors = np.load(index / VECTORS, allow_pickle=False)
        shape = (meta["count"], meta["dimension"])
        made_by = meta["encoder"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the search index in {index} is damaged ({error}); remove the folder and run `conan demo` again") from error
    docs = list(_read_documents(index / DOCUMENTS))
    if vectors.shape != shape or vectors.dtype != np.float32 or len(docs) != shape[0]:
        raise DataError(f"the search index in {index} is damaged: {vectors.dtype}{list(vectors.shape)} and {len(docs)} documents, "
                        f"but {META} says {list(shape)}; remove the folder and run `conan demo` again")
    if made_by != encoder.identity:
        raise DataError(f"the search index in {index} was made by {_name(made_by)}, not by {_name(encoder.identity)}; "
                        "run `conan demo` again to renew it")
    return vectors, docs


def _name(identity: dict[str, Any]) -> str:
    where = " ".join(str(identity[key]) for key in ("run", "stage") if key in identity) or "a model"
    return f"{where} step {identity.get('step', '?')} (tokenizer {str(identity.get('tokenizer_sha256', '?'))[:12]})"


def _read_documents(path: Path) -> Iterator[Answer]:
    number = 0
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                doc = json.loads(line)
                if not isinstance(doc, dict) or not isinstance(doc.get("id"), str) or not isinstance(doc.get("text"), str):
                    raise DataError(f"{path}:{number} must be an object with the strings id and text")
                yield doc
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: near line {number}, not a JSON object in UTF-8: {error}") from error
