"""Semantic textual similarity: does the cosine of two sentences rank pairs as people do?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from conan_jax import config
from conan_jax.errors import DataError
from conan_jax.eval.languages import combine, split
from conan_jax.eval.prompts import prompt_of, usable_length
from conan_jax.eval.records import read_records
from conan_jax.figures import Figures


def evaluate_sts(encoder: Any, evaluation: config.Evaluation) -> Figures:
    """`spearman` (the MTEB main figure) and `pearson` of cos(sentence1, sentence2) against the gold scores.

    Raises `DataError` for a language with fewer than two pairs or equal gold scores: no correlation exists then.
    """
    parts = split(read_records(evaluation.path, "sts", evaluation.max_queries, evaluation.languages))
    for language, part in parts.items():
        different = len({r["score"] for r in part})
        if different < 2:
            where = f" in {language}" if language else ""
            raise DataError(f"{evaluation.path} has {len(part)} pairs with {different} different scores{where}; "
                            "a correlation needs at least two of each")
    ordered = [r for part in parts.values() for r in part]
    vectors = encoder.encode([r["sentence1"] for r in ordered] + [r["sentence2"] for r in ordered],
                             prompt=prompt_of(encoder, evaluation), max_length=usable_length(encoder, evaluation)).astype(np.float64)
    cosine = np.sum(vectors[: len(ordered)] * vectors[len(ordered) :], axis=1)
    figures, start = {}, 0
    for language, part in parts.items():
        figures[language] = correlations(cosine[start : start + len(part)], [r["score"] for r in part])
        if not all(map(math.isfinite, figures[language].values())):
            raise DataError(f"{evaluation.path}: the gold scores{f' in {language}' if language else ''} are too close to each "
                            "other, or too large, for a correlation; bring them to a usual scale, say 0 to 5")
        start += len(part)
    return combine(figures)


def correlations(cosine: Float[np.ndarray, "N"], gold: Sequence[float]) -> Figures:
    """Spearman's and Pearson's; 0 for a model that answers alike for every pair, which ranks nothing."""
    from scipy.stats import pearsonr, spearmanr

    if np.ptp(cosine) == 0:
        return {"spearman": 0.0, "pearson": 0.0}
    return {"spearman": float(spearmanr(cosine, gold).statistic), "pearson": float(pearsonr(cosine, gold).statistic)}
