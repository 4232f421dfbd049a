"""What a model is worth: the evaluations it takes, suites of them, and what its vectors look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conan_jax import config
from conan_jax.errors import ConfigError
from conan_jax.eval.bitext import evaluate_bitext
from conan_jax.eval.classification import evaluate_classification
from conan_jax.eval.clustering import evaluate_clustering
from conan_jax.eval.mkqa import evaluate_mkqa
from conan_jax.eval.retrieval import evaluate_bm25, evaluate_retrieval
from conan_jax.eval.sts import evaluate_sts
from conan_jax.inference.encoder import Encoder

EVALUATIONS: dict[str, Callable[[Encoder, config.Evaluation], dict[str, float]]] = {
    "retrieval": evaluate_retrieval,
    "mkqa": evaluate_mkqa,
    "sts": evaluate_sts,
    "bitext": evaluate_bitext,
    "classification": evaluate_classification,
    "clustering": evaluate_clustering,
}
MAIN_FIGURES = {"retrieval": "ndcg@10", "mkqa": "recall@100", "sts": "spearman", "bitext": "f1", "classification": "accuracy",
                "clustering": "v_measure"}


def evaluate(encoder: Any, evaluation: config.Evaluation) -> dict[str, float]:
    """Figures of `encoder` on one held-out set, by the function that `evaluation.kind` names in EVALUATIONS.

    Raises `ConfigError` for an unknown kind and `DataError` for a set that cannot be read.
    """
    if evaluation.kind not in EVALUATIONS:
        raise ConfigError(f"evaluation {evaluation.name!r}: unknown kind {evaluation.kind!r}; use one of {', '.join(EVALUATIONS)}")
    return EVALUATIONS[evaluation.kind](encoder, evaluation)


__all__ = ["EVALUATIONS", "MAIN_FIGURES", "Encoder", "evaluate", "evaluate_bm25"]
