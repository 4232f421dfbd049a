"""Exact nearest documents, a block of documents at a time."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def top_k(
    queries: Float[np.ndarray, "Q D"], documents: Float[np.ndarray, "N D"], k: int, block: int = 65_536
) -> tuple[Int[np.ndarray, "Q k"], Float[np.ndarray, "Q k"]]:
    """Exact nearest documents by inner product, best first, ties by document order: (rows of `documents`, scores).

    At most `block` documents are scored at a time, so memory is Q * (block + k) floats whatever N is.
    """
    k = min(k, len(documents))
    rows = np.zeros((len(queries), 0), np.int64)
    scores = np.zeros((len(queries), 0), np.float32)
    for start in range(0, len(documents), block):
        part = queries @ documents[start : start + block].T
        rows = np.concatenate([rows, np.broadcast_to(np.arange(start, start + part.shape[1]), part.shape)], axis=1)
        scores = np.concatenate([scores, part], axis=1)
        best = _best(scores, min(k, scores.shape[1]))
        rows, scores = np.take_along_axis(rows, best, axis=1), np.take_along_axis(scores, best, axis=1)
    return rows, scores


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest scores of each row, largest first, the earlier column first among equals."""
    if k < scores.shape[1] // 4:
        floor = np.partition(scores, scores.shape[1] - k, axis=1)[:, -k]
        order = np.empty((len(scores), k), np.int64)
        for i, row in enumerate(scores):
            candidates = np.flatnonzero(row >= floor[i])
            order[i] = candidates[np.argsort(-row[candidates], kind="stable")[:k]]
        return order
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]
