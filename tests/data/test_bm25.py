"""BM25 ranks against the formula written out in NumPy."""

import math
import re
from collections import Counter

import numpy as np

from conan_jax.data.bm25 import bm25_ranks

WORDS = "array sum file read write socket tensor gradient parse date sort key value thread lock".split()


def oracle(query: str, documents: list[str], k: int) -> list[int]:
    """Lucene's BM25: idf = ln(1 + (N - n + .5)/(n + .5)), tf / (tf + k1 (1 - b + b |d|/avg))."""
    split = [re.findall(r"\w{2,}", d.lower()) for d in documents]
    mean = sum(map(len, split)) / len(split)
    counts = [Counter(words) for words in split]
    scores = []
    for words, count in zip(split, counts, strict=True):
        total = 0.0
        for term in re.findall(r"\w{2,}", query.lower()):
            n = sum(term in c for c in counts)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            total += idf * count[term] / (count[term] + 1.5 * (1 - 0.75 + 0.75 * len(words) / mean))
        scores.append(total)
    order = sorted(range(len(documents)), key=lambda i: (-round(scores[i], 5), i))
    return [i for i in order if scores[i] > 0][:k]


def test_ranks_equal_the_formula():
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(WORDS, rng.integers(3, 12))) for _ in range(40)]
    queries = [" ".join(rng.choice(WORDS, 3, replace=False)) for _ in range(10)]
    ranks = bm25_ranks(queries, documents, 7)
    assert ranks.shape == (10, 7)
    for query, row in zip(queries, ranks, strict=True):
        assert [int(i) for i in row if i >= 0] == oracle(query, documents, 7)


def test_documents_that_share_no_term_are_not_ranked():
    assert bm25_ranks(["tensor", "unknown"], ["a tensor here", "nothing of it", "tensor"], 3).tolist() == [[2, 0, -1], [-1, -1, -1]]


def test_scripts_without_spaces_are_matched_by_character():
    assert bm25_ranks(["北京", "東京タワー"], ["我爱北京天安门", "上海很大", "東京タワーの高さ"], 1).tolist() == [[0], [2]]
