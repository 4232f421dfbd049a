"""Bitext mining: is the nearest sentence of the other language the translation? As MTEB defines it (arXiv 2210.07316)."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

from conan_jax import config
from conan_jax.eval.languages import combine, split
from conan_jax.eval.prompts import prompt_of, usable_length
from conan_jax.eval.records import read_bitext
from conan_jax.figures import Figures
from conan_jax.inference.top_k import top_k


def evaluate_bitext(encoder: Any, evaluation: config.Evaluation) -> Figures:
    """`f1` (the MTEB main figure), `precision`, `recall` and `accuracy` of taking the nearest sentence2 of the language for each sentence1.

    Classes are the rows of the file; precision, recall and F1 are weighted means over them. `max_queries` also bounds what is
    searched in, so figures under different bounds do not compare.
    """
    records = read_bitext(evaluation.path, evaluation.max_queries, evaluation.languages)
    parts = split(records)
    ordered = [r for part in parts.values() for r in part]
    options = {"prompt": prompt_of(encoder, evaluation), "max_length": usable_length(encoder, evaluation)}
    left, right = (encoder.encode([r[side] for r in ordered], **options) for side in ("sentence1", "sentence2"))
    figures, start = {}, 0
    for language, part in parts.items():
        rows = slice(start, start + len(part))
        nearest, _ = top_k(left[rows], right[rows], 1)
        figures[language] = score(nearest[:, 0])
        start += len(part)
    return combine(figures)


def score(nearest: Int[np.ndarray, "N"]) -> Figures:
    """Figures of the rows that were found, where row i is right for sentence i."""
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    gold = np.arange(len(nearest))
    precision, recall, f1, _ = precision_recall_fscore_support(gold, nearest, average="weighted", zero_division=0)
    return {"f1": float(f1), "precision": float(precision), "recall": float(recall), "accuracy": float(accuracy_score(gold, nearest))}
