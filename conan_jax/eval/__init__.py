"""What a model is worth: an encoder, the evaluations it takes, and semantic search with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from conan_jax import config
from conan_jax.errors import ConfigError
from conan_jax.eval.classification import evaluate_classification
from conan_jax.inference.encoder import Encoder
from conan_jax.eval.retrieval import evaluate_bm25, evaluate_retrieval
from conan_jax.eval.sts import evaluate_sts

EVALUATIONS: dict[str, Callable[[Encoder, config.Evaluation], dict[str, float]]] = {
    "retrieval": evaluate_retrieval,
    "sts": evaluate_sts,
    "classification": evaluate_classification,
}


def evaluate(encoder: Any, evaluation: config.Evaluation) -> dict[str, float]:
    """Figures of `encoder` on one held-out set, by the function that `evaluation.kind` names in EVALUATIONS.

    Raises `ConfigError` for an unknown kind and `DataError` for a set that cannot be read.
    """
    if evaluation.kind not in EVALUATIONS:
        raise ConfigError(f"evaluation {evaluation.name!r}: unknown kind {evaluation.kind!r}; use one of {', '.join(EVALUATIONS)}")
    return EVALUATIONS[evaluation.kind](encoder, evaluation)


__all__ = ["EVALUATIONS", "Encoder", "evaluate", "evaluate_bm25"]
