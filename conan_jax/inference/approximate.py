"""Approximate search through faiss, for corpora of many millions of vectors: an inverted file beside the corpus, made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from conan_jax.errors import ConfigError
from conan_jax.files import replacing, write_file
from conan_jax.versions import install_command

BLOCK = 65_536
SMALLEST = 10_000  # vectors that are worth lists; fewer are searched one by one
PER_LIST = 64  # vectors a list's centre is learnt from
PROBED = 16  # one list of so many is looked into, and no fewer than 8


def nearest(queries: Float32[np.ndarray, "Q D"], corpus: Any, k: int) -> tuple[Int[np.ndarray, "Q k"], Float32[np.ndarray, "Q k"]]:
    """As `top_k`, but of the lists nearest to a query alone; -1 where they hold fewer than k.

    The index lies in CORPUS.faiss and is made anew when the corpus is newer. Raises `ConfigError` when faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ConfigError(f"--faiss needs faiss, which is not installed: {install_command(extra='faiss')}") from error
    index = _index(faiss, corpus)
    scores, rows = index.search(np.ascontiguousarray(queries, np.float32), min(k, len(corpus)))
    return rows, scores


def _index(faiss: Any, corpus: Any) -> Any:
    file = corpus.files[0].with_name(corpus.files[0].name + ".faiss")
    stamp = file.with_name(file.name + ".json")
    made_of = json.dumps([[part.name, part.stat().st_size, part.stat().st_mtime_ns] for part in corpus.files])
    if file.is_file() and stamp.is_file() and stamp.read_text() == made_of:
        return faiss.read_index(str(file))
    index = _trained(faiss, corpus)
    for start in range(0, len(corpus), BLOCK):
        index.add(np.ascontiguousarray(corpus[start : start + BLOCK]))
    stamp.unlink(missing_ok=True)
    with replacing(Path(file)) as partial:
        faiss.write_index(index, str(partial))
    write_file(stamp, made_of)
    return index


def _trained(faiss: Any, corpus: Any) -> Any:
    width = corpus[0:1].shape[1]
    if len(corpus) < SMALLEST:
        return faiss.IndexFlatIP(width)
    lists = int(4 * np.sqrt(len(corpus)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
    # The sample is taken in runs spread over the whole: single rows of a large file would each be a read of their own.
    runs = max(1, min(lists * PER_LIST, len(corpus)) // 1024)
    starts = np.linspace(0, len(corpus) - 1024, runs, dtype=np.int64).tolist()
    index.train(np.concatenate([corpus[start : start + 1024] for start in starts]))
    index.nprobe = max(8, lists // PROBED)
    return index
