"""Correlation and logistic regression on frozen vectors, against figures computed another way."""

import json

import numpy as np
import pytest

from conan_jax import config
from conan_jax.errors import DataError
from conan_jax.eval import evaluate
from conan_jax.eval.classification import sample
from tests.eval.fakes import WordEncoder


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def average_ranks(values):
    values = np.asarray(values)
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def test_spearman_is_pearson_of_average_ranks(tmp_path):
    words = "a b c d e f g h".split()
    rng = np.random.default_rng(0)
    pairs = [{"sentence1": " ".join(rng.choice(words, 4)), "sentence2": " ".join(rng.choice(words, 4)), "score": float(rng.integers(0, 6))}
             for _ in range(40)]
    encoder = WordEncoder(words)
    figures = evaluate(encoder, config.Evaluation("e", "sts", write(tmp_path / "s.jsonl", pairs)))
    cosine = [float(encoder.encode([p["sentence1"]])[0].astype(float) @ encoder.encode([p["sentence2"]])[0].astype(float)) for p in pairs]
    gold = [p["score"] for p in pairs]
    assert figures["spearman"] == pytest.approx(np.corrcoef(average_ranks(np.round(cosine, 6)), average_ranks(gold))[0, 1], abs=5e-3)
    assert figures["pearson"] == pytest.approx(np.corrcoef(cosine, gold)[0, 1], abs=1e-5)


def test_a_perfect_order_is_one_and_its_reverse_minus_one(tmp_path):
    pairs = [{"sentence1": "a a a", "sentence2": " ".join("a" * i + "b" * (9 - i)), "score": i / 2} for i in range(1, 9)]
    for sign in (1, -1):
        rows = [{**p, "score": sign * p["score"]} for p in pairs]
        figures = evaluate(WordEncoder("ab"), config.Evaluation("e", "sts", write(tmp_path / "s.jsonl", rows)))
        assert figures["spearman"] == pytest.approx(sign)


def test_a_model_that_answers_alike_scores_zero(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "a a", "score": s} for s in (1, 2, 3)]
    assert evaluate(WordEncoder("a"), config.Evaluation("e", "sts", write(tmp_path / "s.jsonl", rows))) == {"spearman": 0.0, "pearson": 0.0}


@pytest.mark.parametrize("rows, message", [
    ([{"sentence1": "a", "sentence2": "b", "score": 1}], "1 pairs"),
    ([{"sentence1": "a", "sentence2": "b", "score": 1}] * 3, "1 different scores"),
    ([{"sentence1": "a", "sentence2": "b", "score": 1}, {"sentence1": "", "sentence2": "b", "score": 2}], r"s.jsonl.*2"),
    ([], "no records"),
])
def test_pairs_without_a_correlation_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        evaluate(WordEncoder("ab"), config.Evaluation("e", "sts", write(tmp_path / "s.jsonl", rows)))


def labelled(label, texts):
    return [{"text": t, "label": label} for t in texts]


def test_separable_classes_are_learnt_and_f1_is_macro(tmp_path):
    train = labelled("red", ["rose ruby"] * 12) + labelled("blue", ["sky sea"] * 12) + labelled("green", ["leaf moss"] * 3)
    test = labelled("red", ["rose", "ruby", "ruby rose"]) + labelled("blue", ["sea"]) + labelled("green", ["sky sky"])  # the last misleads
    paths = [write(tmp_path / f"{n}.jsonl", rows) for n, rows in (("train", train), ("test", test))]
    encoder = WordEncoder("rose ruby sky sea leaf moss".split())
    figures = evaluate(encoder, config.Evaluation("e", "classification", paths[1], train_path=paths[0], instruction="Name the colour"))
    # red 3/3 and precision 1, blue 1/1 and precision 1/2, green never predicted
    assert figures["accuracy"] == pytest.approx(4 / 5) and figures["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert [c[1] for c in encoder.calls] == ["Instruct: Name the colour\nQuery: "]


def test_draws_are_balanced_without_repetition_and_repeatable():
    labels = np.array([0] * 20 + [1] * 9 + [2] * 3)
    draws = sample(labels, 8, 10, 42)
    assert len(draws) == 10 and len({tuple(sorted(d)) for d in draws}) > 1
    for draw, again in zip(draws, sample(labels, 8, 10, 42), strict=True):
        assert np.bincount(labels[draw]).tolist() == [8, 8, 3] and len(set(draw)) == len(draw) and draw == again


@pytest.mark.parametrize("train, message", [
    (labelled("red", ["rose"] * 3), "1 labels"),
    (labelled("red", ["rose"]) + labelled("green", ["leaf"]), r"lacks \['blue'\]"),
])
def test_labels_that_cannot_be_learnt_are_refused(tmp_path, train, message):
    test = write(tmp_path / "test.jsonl", labelled("red", ["rose"]) + labelled("blue", ["sky"]))
    path = write(tmp_path / "train.jsonl", train)
    with pytest.raises(DataError, match=message):
        evaluate(WordEncoder(["rose", "sky"]), config.Evaluation("e", "classification", test, train_path=path))
