"""Classification by logistic regression on frozen vectors, as MTEB defines it (Muennighoff et al. 2023, arXiv 2210.07316)."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from conan_jax import config
from conan_jax.data.transforms import query_prompt
from conan_jax.errors import DataError
from conan_jax.eval.records import read_records

SAMPLES_PER_LABEL = 8
EXPERIMENTS = 10
SEED = 42

Figures = dict[str, float]


def evaluate_classification(encoder: Any, evaluation: config.Evaluation) -> Figures:
    """`accuracy` (the MTEB main figure) and macro `f1` on the test file, means over 10 experiments.

    Each experiment draws 8 training texts a label (all where there are fewer) and fits a logistic regression of at most
    100 iterations. `evaluation.max_queries` bounds the test texts. Raises `DataError` when the training file has fewer than
    two labels or lacks one of the test labels.
    """
    if evaluation.train_path is None:
        raise DataError(f"evaluation {evaluation.name!r} needs train_path, the labelled texts to learn from")
    train = read_records(evaluation.train_path, "labelled")
    test = read_records(evaluation.path, "labelled", evaluation.max_queries)
    names = sorted({r["label"] for r in train})
    unknown = sorted({r["label"] for r in test} - set(names))
    if unknown or len(names) < 2:
        raise DataError(f"{evaluation.train_path} has {len(names)} labels, and lacks {unknown[:5]} of {evaluation.path}; "
                        "at least two labels and all of the test's are needed")
    number = {name: i for i, name in enumerate(names)}
    train_labels, test_labels = (np.array([number[r["label"]] for r in part]) for part in (train, test))

    draws = sample(train_labels, SAMPLES_PER_LABEL, EXPERIMENTS, SEED)
    used = np.unique(np.concatenate(draws))  # only what is drawn is encoded
    texts = [train[i]["text"] for i in used] + [r["text"] for r in test]
    vectors = encoder.encode(texts, prompt=query_prompt(evaluation.instruction), max_length=evaluation.max_length)
    place = {int(row): i for i, row in enumerate(used)}
    results = [
        fit_and_score(vectors[[place[int(i)] for i in draw]], train_labels[draw], vectors[len(used) :], test_labels) for draw in draws
    ]
    return {name: float(np.mean([r[name] for r in results])) for name in ("accuracy", "f1")}


def sample(labels: Int[np.ndarray, "N"], per_label: int, experiments: int, seed: int) -> list[Int[np.ndarray, "n"]]:
    """For each experiment, row numbers of `per_label` examples of each label, without repetition."""
    rng = np.random.default_rng(seed)
    draws = []
    for _ in range(experiments):
        order = rng.permutation(len(labels))
        draws.append(np.concatenate([order[labels[order] == label][:per_label] for label in np.unique(labels)]))
    return draws


def fit_and_score(
    train: Float[np.ndarray, "n D"], train_labels: Int[np.ndarray, "n"], test: Float[np.ndarray, "m D"], test_labels: Int[np.ndarray, "m"]
) -> Figures:
    """Accuracy and macro F1 on the test rows of a logistic regression fitted to the training rows."""
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # 100 iterations are the definition
        predicted = LogisticRegression(max_iter=100, random_state=SEED).fit(train, train_labels).predict(test)
    return {"accuracy": float(accuracy_score(test_labels, predicted)), "f1": float(f1_score(test_labels, predicted, average="macro"))}
