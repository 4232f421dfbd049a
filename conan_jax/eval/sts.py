"""Semantic textual similarity: does the cosine of two sentences rank pairs as people do?"""

from __future__ import annotations

from typing import Any

import numpy as np

from conan_jax import config
from conan_jax.data.transforms import query_prompt
from conan_jax.errors import DataError
from conan_jax.eval.records import read_records

Figures = dict[str, float]


def evaluate_sts(encoder: Any, evaluation: config.Evaluation) -> Figures:
    """`spearman` (the MTEB main figure) and `pearson` of cos(sentence1, sentence2) against the gold scores.

    Raises `DataError` when there are fewer than two pairs or all gold scores are equal: no correlation exists then.
    """
    from scipy.stats import pearsonr, spearmanr

    records = read_records(evaluation.path, "sts", evaluation.max_queries)
    gold = np.array([r["score"] for r in records], np.float64)
    if len(gold) < 2 or np.ptp(gold) == 0:
        raise DataError(f"{evaluation.path} has {len(gold)} pairs with {len(set(gold))} different scores; "
                        "a correlation needs at least two of each")
    texts = [r["sentence1"] for r in records] + [r["sentence2"] for r in records]
    vectors = encoder.encode(texts, prompt=query_prompt(evaluation.instruction), max_length=evaluation.max_length).astype(np.float64)
    left, right = vectors[: len(records)], vectors[len(records) :]
    cosine = np.sum(left * right, axis=1)
    if np.ptp(cosine) == 0:  # a model that answers alike for every pair ranks nothing
        return {"spearman": 0.0, "pearson": 0.0}
    return {"spearman": float(spearmanr(cosine, gold).statistic), "pearson": float(pearsonr(cosine, gold).statistic)}
