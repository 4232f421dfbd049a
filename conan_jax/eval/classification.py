"""Classification by logistic regression on frozen vectors, as MTEB defines it (Muennighoff et al. 2023, arXiv 2210.07316)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from conan_jax import config
from conan_jax.errors import DataError
from conan_jax.eval.languages import combine, split
from conan_jax.eval.prompts import prompt_of, usable_length
from conan_jax.eval.records import Records, read_records
from conan_jax.figures import Figures

SAMPLES_PER_LABEL = 8
EXPERIMENTS = 10
SEED = 42


def evaluate_classification(encoder: Any, evaluation: config.Evaluation) -> Figures:
    """`accuracy` (the MTEB main figure), macro and weighted F1, macro precision and recall, means over 10 experiments.

    Each experiment draws 8 training texts a label (all where there are fewer) and fits a logistic regression of at most
    100 iterations; draws are MTEB's own. Each language learns from the training texts of its own, or from all of them where
    the training file says no languages. `evaluation.max_queries` bounds the test texts of a language.
    Raises `DataError` when the training texts have fewer than two labels or lack one of the test labels.
    """
    assert evaluation.train_path is not None
    every = read_records(evaluation.train_path, "labelled")
    tests = split(read_records(evaluation.path, "labelled", evaluation.max_queries, evaluation.languages))
    spoken = split(every)
    trains = {language: every if set(spoken) == {""} else spoken.get(language, []) for language in tests}
    number = {name: i for i, name in enumerate(sorted({r["label"] for r in every}))}
    for language, test in tests.items():
        _check_labels(evaluation, language, trains[language], test)
    draws = {language: sample([r["label"] for r in train], SAMPLES_PER_LABEL, EXPERIMENTS, SEED) for language, train in trains.items()}

    texts: list[str] = []  # only what is drawn is encoded
    place: dict[str, dict[int, int]] = {}
    for language, train in trains.items():
        used = sorted({row for draw in draws[language] for row in draw})
        place[language] = {row: len(texts) + i for i, row in enumerate(used)}
        texts += [train[row]["text"] for row in used]
    start = len(texts)
    texts += [r["text"] for test in tests.values() for r in test]
    vectors = encoder.encode(texts, prompt=prompt_of(encoder, evaluation), max_length=usable_length(encoder, evaluation))

    figures = {}
    for language, test in tests.items():
        rows, train = place[language], trains[language]
        gold = np.array([number[r["label"]] for r in test])
        results = [
            fit_and_score(vectors[[rows[i] for i in draw]], np.array([number[train[i]["label"]] for i in draw]),
                          vectors[start : start + len(test)], gold)
            for draw in draws[language]
        ]
        figures[language] = {name: float(np.mean([r[name] for r in results])) for name in results[0]}
        start += len(test)
    return combine(figures)


def sample(labels: Sequence[Any], per_label: int, experiments: int, seed: int) -> list[list[int]]:
    """For each experiment, row numbers of `per_label` examples of each label, without repetition.

    MTEB shuffles one order again and again, each time by a fresh generator of the same seed, and takes the first of each label.
    """
    order = list(range(len(labels)))
    draws = []
    for _ in range(experiments):
        np.random.RandomState(seed).shuffle(order)
        taken: dict[Any, list[int]] = {}
        draw = []
        for row in order:
            mates = taken.setdefault(labels[row], [])
            if len(mates) < per_label:
                mates.append(row)
                draw.append(row)
        draws.append(draw)
    return draws


def fit_and_score(
    train: Float[np.ndarray, "n D"], train_labels: Int[np.ndarray, "n"], test: Float[np.ndarray, "m D"], test_labels: Int[np.ndarray, "m"]
) -> Figures:
    """Figures on the test rows of a logistic regression fitted to the training rows."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support
    from threadpoolctl import threadpool_limits

    with warnings.catch_warnings(), threadpool_limits(1):  # the problem is small: threads would wait for each other
        warnings.simplefilter("ignore", ConvergenceWarning)  # 100 iterations are the definition
        predicted = LogisticRegression(max_iter=100, random_state=SEED).fit(train, train_labels).predict(test)
    precision, recall, f1, _ = precision_recall_fscore_support(test_labels, predicted, average="macro", zero_division=0)
    return {"accuracy": float(accuracy_score(test_labels, predicted)), "f1": float(f1),
            "f1_weighted": float(f1_score(test_labels, predicted, average="weighted", zero_division=0)),
            "precision": float(precision), "recall": float(recall)}


def _check_labels(evaluation: config.Evaluation, language: str, train: Records, test: Records) -> None:
    known = {r["label"] for r in train}
    unknown = sorted({r["label"] for r in test} - known)
    if unknown or len(known) < 2:
        raise DataError(f"{evaluation.train_path} has {len(known)} labels{f' in {language}' if language else ''}, and lacks {unknown[:5]} "
                        f"of {evaluation.path}; at least two labels and all of the test's are needed")
