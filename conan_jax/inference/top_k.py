"""Exact nearest documents, a block of documents at a time, on the device."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

LARGEST_BLOCK = 65_536
SCORES = 2**26  # of one block and one group of queries: 256 MiB of float32
QUERIES = 4096  # asked together


def top_k(
    queries: Float[np.ndarray, "Q D"], documents: Float[np.ndarray, "N D"], k: int, block: int | None = None
) -> tuple[Int[np.ndarray, "Q k"], Float32[np.ndarray, "Q k"]]:
    """Exact nearest documents by inner product, best first, ties by document order: (rows of `documents`, scores).

    With fewer than k documents, all of them. `documents` may be any object that gives its rows as float32 when it is sliced, such as
    a memory map: one block is read and scored at a time, float32 throughout, and memory does not grow with N. The numbers must not be NaN.

    Args:
        block: documents scored at once; default: 65,536, or fewer for many queries.
    """
    k = min(k, len(documents))
    groups = (np.asarray(queries[start : start + QUERIES], np.float32) for start in range(0, len(queries), QUERIES))
    found = [_search(group, documents, k, block) for group in groups]
    if not found:
        return np.zeros((0, k), np.int64), np.zeros((0, k), np.float32)
    rows, scores = (np.concatenate(parts) for parts in zip(*found))
    return rows, scores


def _search(queries: np.ndarray, documents: np.ndarray, k: int, block: int | None) -> tuple[np.ndarray, np.ndarray]:
    rows, best = np.zeros((len(queries), k), np.int64), np.full((len(queries), k), -np.inf, np.float32)
    if not k:
        return rows, best
    size = block or min(LARGEST_BLOCK, max(1024, SCORES // len(queries)))
    size = max(k, min(size, len(documents)))
    on_device, running = jnp.asarray(queries), jnp.asarray(best)
    for start in range(0, len(documents), size):
        part = np.asarray(documents[start : start + size], np.float32)
        count = len(part)
        if count < size:  # one shape for all blocks
            part = np.concatenate([part, np.zeros((size - count, part.shape[1]), np.float32)])
        running, picked = _merge(on_device, part, count, running, k)
        # Column i < k of what was merged is what was best before; column k + j is document start + j. Row numbers stay on the host,
        # where they may be larger than 2^31.
        picked = np.asarray(picked, np.int64)
        rows = np.where(picked < k, np.take_along_axis(rows, np.minimum(picked, k - 1), axis=1), picked - k + start)
    return rows, np.asarray(running)


@partial(jax.jit, static_argnums=4)
def _merge(
    queries: Float32[Array, "Q D"], documents: Float32[Array, "N D"], count: Int[Array, ""], running: Float32[Array, "Q k"], k: int
) -> tuple[Float32[Array, "Q k"], Int[Array, "Q k"]]:
    """The k best of `running` and of the scores of the first `count` documents, and their columns in the two side by side.

    `lax.top_k` puts the lower column first among equals, and earlier documents lie in lower columns.
    """
    scores = jnp.matmul(queries, documents.T, precision=jax.lax.Precision.HIGHEST)
    scores = jnp.where(jnp.arange(documents.shape[0]) < count, scores, -jnp.inf)
    return tuple(jax.lax.top_k(jnp.concatenate([running, scores], axis=1), k))
