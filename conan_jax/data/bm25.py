"""BM25 ranks of texts for texts, by bm25s: hard-negative pools and the lexical baseline of every evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import bm25s
import numpy as np
from jaxtyping import Int

# Scripts without spaces between words are cut into characters, so that BM25 has terms to match there.
_UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
TOKENS = rf"(?u)[{_UNSPACED}]|[^\W{_UNSPACED}]{{2,}}"

logging.getLogger("bm25s").setLevel(logging.WARNING)


def bm25_ranks(
    queries: Sequence[str], documents: Sequence[str], k: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> Int[np.ndarray, "Q k"]:
    """Rows of the k best documents a query, best first, ties by document order; -1 where no further document shares a term.

    Lucene's variant with k1 1.5 and b 0.75, lower case, English stop words, terms by `TOKENS`. `progress(done, total)`
    counts queries.
    """
    index = bm25s.BM25()
    index.index(_terms(documents), show_progress=False)
    k = min(k, len(documents))
    ranks = np.full((len(queries), k), -1, np.int64)
    for i, query in enumerate(_terms(queries)):
        if query:
            scores = index.get_scores(query)
            # Most documents share no term: selecting among the others alone is several times faster.
            matching = np.flatnonzero(scores > 0)
            if len(matching) > k:
                floor = -np.partition(-scores[matching], k - 1)[k - 1]
                matching = matching[scores[matching] >= floor]
            best = matching[np.argsort(-scores[matching], kind="stable")[:k]]
            ranks[i, : len(best)] = best
        progress(i + 1, len(queries))
    return ranks


def _terms(texts: Sequence[str]) -> list[list[str]]:
    return bm25s.tokenize(list(texts), token_pattern=TOKENS, stopwords="en", return_ids=False, show_progress=False)
