"""Clustering, bitext mining and MKQA, against hand-made answers and figures computed another way; languages apart."""

import itertools
import json
import math
import random
import re
import unicodedata

import numpy as np
import pytest

from conan_jax import config
from conan_jax.errors import ConfigError, DataError
from conan_jax.eval import clustering, evaluate
from conan_jax.eval.bitext import score as bitext_score
from conan_jax.eval.classification import sample
from conan_jax.eval.clustering import cluster_and_score
from conan_jax.eval.mkqa import PassageIndex, read_mkqa, words
from tests.eval.fakes import WordEncoder


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def v_measure(labels, clusters):
    """Rosenberg & Hirschberg 2007: the harmonic mean of homogeneity and completeness, from entropies."""
    def entropy(counts):
        return -sum(c / sum(counts) * math.log(c / sum(counts)) for c in counts if c)

    def given(a, b):
        within = {y: [x for x, z in zip(a, b, strict=True) if z == y] for y in set(b)}
        return sum(len(part) / len(b) * entropy([part.count(v) for v in set(a)]) for part in within.values())

    h, c = entropy([labels.count(x) for x in set(labels)]), entropy([clusters.count(x) for x in set(clusters)])
    homogeneity = 1 - given(labels, clusters) / h if h else 1.0
    completeness = 1 - given(clusters, labels) / c if c else 1.0
    return 2 * homogeneity * completeness / (homogeneity + completeness)


class Fixed:
    """Clusters by the sign of the first coordinate, in place of k-means."""

    def __init__(self, **options):
        self.options = options
        made.append(options)

    def fit_predict(self, x):
        return (x[:, 0] > 0).astype(int)


made = []


def test_v_measure_of_the_drawn_texts_is_the_published_formula(monkeypatch):
    import sklearn.cluster

    monkeypatch.setattr(sklearn.cluster, "MiniBatchKMeans", Fixed)
    monkeypatch.setattr(clustering, "SAMPLES", 40)
    made.clear()
    x = np.random.default_rng(0).normal(size=(30, 2)).astype(np.float32)
    labels = [str(i % 3) for i in range(30)]
    figures = cluster_and_score(x, labels, random.Random(42))
    rng, expected = random.Random(42), []
    for _ in range(10):
        drawn = rng.choices(range(30), k=40)
        expected.append(v_measure([labels[i] for i in drawn], [int(x[i, 0] > 0) for i in drawn]))
    assert figures["v_measure"] == pytest.approx(np.mean(expected)) and figures["v_measure_std"] == pytest.approx(np.std(expected))
    (options,) = made
    assert options == {"n_clusters": 3, "batch_size": 512, "init": "k-means++", "n_init": 1, "random_state": 42}


def test_texts_of_separate_topics_are_clustered_language_by_language(tmp_path, monkeypatch):
    monkeypatch.setattr(clustering, "SAMPLES", 64)
    rows = [{"text": text, "label": label, "lang": lang} for lang in ("fr", "de") for text, label in
            [("sea", "blue"), ("sea sea", "blue"), ("rose", "red"), ("rose rose", "red")] * 4]
    rows += [{"text": "rose", "label": label, "lang": "xx"} for label in ("blue", "red")]  # nothing to tell them apart by
    evaluation = config.Evaluation("e", "clustering", write(tmp_path / "c.jsonl", rows), instruction="Name the colour")
    encoder = WordEncoder("sky sea rose ruby".split())
    figures = evaluate(encoder, evaluation)
    assert figures["v_measure/de"] == figures["v_measure/fr"] == 1 and figures["v_measure/xx"] == pytest.approx(0, abs=1e-9)
    assert figures["v_measure"] == pytest.approx(2 / 3) and {c[1] for c in encoder.calls} == {"Instruct: Name the colour\nQuery: "}
    one = [{"text": "a", "label": "x", "lang": "de"}] * 3
    with pytest.raises(DataError, match="all 3 texts in de have one label"):
        evaluate(encoder, config.Evaluation("e", "clustering", write(tmp_path / "one.jsonl", one)))


def test_figures_of_a_matching_are_those_of_a_confusion_matrix():
    nearest = [0, 0, 2, 1, 0]
    precision = [(nearest[i] == i) / max(nearest.count(i), 1) for i in range(5)]
    recall = [float(nearest[i] == i) for i in range(5)]
    f1 = [2 * p * r / (p + r) if p + r else 0 for p, r in zip(precision, recall, strict=True)]
    expected = {"precision": np.mean(precision), "recall": np.mean(recall), "f1": np.mean(f1), "accuracy": 2 / 5}
    assert bitext_score(np.array(nearest)) == pytest.approx(expected)


def test_bitext_is_mined_within_a_language(tmp_path):
    rows = [{"lang": "de", "sentence1": "a b", "sentence2": "a"}, {"lang": "de", "sentence1": "c", "sentence2": "c d"},
            {"lang": "fr", "sentence1": "a", "sentence2": "b d"}, {"lang": "fr", "sentence1": "d", "sentence2": "a d d"}]
    encoder = WordEncoder("abcd")
    path = write(tmp_path / "b.jsonl", rows)
    figures = evaluate(encoder, config.Evaluation("e", "bitext", path))
    # de: both right. fr: both are nearest to the second
    assert figures["accuracy/de"] == 1 and figures["accuracy/fr"] == 0.5 and figures["f1/fr"] == pytest.approx((0 + 2 / 3) / 2)
    assert figures["f1"] == pytest.approx((1 + 1 / 3) / 2)
    only = evaluate(encoder, config.Evaluation("e", "bitext", path, languages=("fr",)))
    assert only["f1"] == pytest.approx(1 / 3) and "f1/fr" not in only
    with pytest.raises(DataError, match="no record in 'nl'; its languages are de, fr"):
        evaluate(encoder, config.Evaluation("e", "bitext", path, languages=("nl",)))
    with pytest.raises(DataError, match=r"b2.jsonl.*2.*sentence2"):
        evaluate(encoder, config.Evaluation("e", "bitext", write(tmp_path / "b2.jsonl", [rows[0], {"sentence1": "a"}])))


def test_a_limit_holds_for_each_language_and_is_spread(tmp_path):
    rows = [{"lang": lang, "sentence1": f"{lang}{i}", "sentence2": f"{lang}{i}"} for lang in ("de", "fr") for i in range(10)]
    encoder = WordEncoder([f"{lang}{i}" for lang in ("de", "fr") for i in range(10)])
    evaluate(encoder, config.Evaluation("e", "bitext", write(tmp_path / "b.jsonl", rows), max_queries=2))
    assert encoder.calls[0][0] == ["de0", "de5", "fr0", "fr5"]


def test_classification_and_sts_are_taken_language_by_language(tmp_path):
    train = [{"text": t, "label": label, "lang": lang} for lang, pairs in
             (("de", (("rose", "red"), ("sea", "blue"))), ("fr", (("sea", "red"), ("rose", "blue"))))
             for t, label in pairs for _ in range(9)]
    test = [{"text": "rose", "label": "red", "lang": "de"}, {"text": "sea", "label": "red", "lang": "fr"}]
    paths = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in (("train", train), ("test", test))}
    encoder = WordEncoder(["rose", "sea"])
    figures = evaluate(encoder, config.Evaluation("e", "classification", paths["test"], train_path=paths["train"]))
    assert figures["accuracy"] == figures["accuracy/de"] == figures["accuracy/fr"] == 1
    together = write(tmp_path / "plain.jsonl", [{k: v for k, v in r.items() if k != "lang"} for r in train if r["lang"] == "de"])
    figures = evaluate(encoder, config.Evaluation("e", "classification", paths["test"], train_path=together))
    assert (figures["accuracy/de"], figures["accuracy/fr"]) == (1, 0)
    pairs = [{"sentence1": "rose", "sentence2": s, "score": g if lang == "de" else 5 - g, "lang": lang}
             for lang in ("de", "fr") for s, g in (("rose", 5), ("rose sea", 3), ("sea", 0))]
    figures = evaluate(encoder, config.Evaluation("e", "sts", write(tmp_path / "s.jsonl", pairs)))
    assert [figures[f"spearman{part}"] for part in ("/de", "/fr", "")] == pytest.approx([1, -1, 0])


def test_draws_follow_the_published_scheme():
    """A generator of the same seed shuffles the same order again before each experiment; the first of each label are taken."""
    labels = [0, 1, 0, 1, 0, 1, 0]
    order, expected = list(range(7)), []
    for _ in range(3):
        np.random.RandomState(42).shuffle(order)
        first = [i for i in order if labels[i] == 0][:2] + [i for i in order if labels[i] == 1][:2]
        expected.append([i for i in order if i in first])
    assert sample(labels, 2, 3, 42) == expected and expected[0] != expected[1]


MKQA = [
    {"example_id": 7, "query": "who read the file", "queries": {"de": "wer las", "zh_cn": "谁"},
     "answers": {"en": [{"type": "entity", "text": "Ada Lovelace", "aliases": ["Countess of Lovelace"]}],
                 "de": [{"type": "entity", "text": "x"}]}},
    {"example_id": 8, "query": "is it", "queries": {"de": "ist es"}, "answers": {"en": [{"type": "binary", "text": "yes"}]}},
    {"example_id": 9, "query": "when", "queries": {"de": "wann", "zh_cn": "何时"},
     "answers": {"en": [{"type": "date", "text": "1843-07-10", "aliases": ["10 July 1843"]}]}},
]
PASSAGES = ["nothing here", "By ADA  LOVELACE, in London", "Ada, Lovelace", "published 10 July 1843.", "in 1843"]


def mkqa_folder(tmp_path, questions=MKQA):
    write(tmp_path / "corpus.jsonl", [{"_id": f"p{i}", "title": "", "text": text} for i, text in enumerate(PASSAGES)])
    write(tmp_path / "mkqa.jsonl", questions)
    return tmp_path


def test_questions_of_every_language_ask_for_passages_that_hold_an_answer(tmp_path):
    data = read_mkqa(mkqa_folder(tmp_path))
    assert data.query_ids == ["en:7", "de:7", "zh_cn:7", "en:9", "de:9", "zh_cn:9"] and data.queries[1] == "wer las"
    assert data.qrels["de:7"] == {"p1": 1} and data.qrels["zh_cn:9"] == {"p3": 1}
    assert read_mkqa(tmp_path, languages=("de",)).query_ids == ["de:7", "de:9"]
    assert read_mkqa(tmp_path, max_queries=1).query_ids == ["de:7", "en:7", "zh_cn:7"]
    flat = [{"_id": "a", "text": "qui", "lang": "fr", "answers": ["London"]},
            {"_id": "b", "text": "où", "lang": "fr", "answers": ["Paris"]}]
    data = read_mkqa(mkqa_folder(tmp_path, flat))
    assert data.qrels == {"fr:a": {"p1": 1}, "fr:b": {}}


def test_recall_is_the_share_of_questions_with_a_hit(tmp_path, monkeypatch):
    flat = [{"_id": "a", "text": "1843", "lang": "de", "answers": ["July", "London", "Ada"]},  # p1, p2, p3
            {"_id": "b", "text": "london", "lang": "de", "answers": ["Paris"]},
            {"_id": "c", "text": "london", "lang": "en", "answers": ["London"]}]
    encoder = WordEncoder("1843 London 1843. london".split())
    figures = evaluate(encoder, config.Evaluation("e", "mkqa", str(mkqa_folder(tmp_path, flat))))
    # "1843" finds p4 first ("in 1843"), then the others in their order: p0, p1, p2, p3. Nobody holds Paris; nothing is nearest to "london"
    dcg = sum(1 / math.log2(rank + 1) for rank in (3, 4, 5)) / sum(1 / math.log2(rank + 1) for rank in (1, 2, 3))
    assert figures["recall@20/de"] == 0.5 and figures["recall@20/en"] == 1 and figures["recall@20"] == 0.75
    assert figures["ndcg@10/de"] == pytest.approx(dcg / 2) and figures["ndcg@10/en"] == pytest.approx(1 / math.log2(3))
    assert figures["ndcg@10"] == pytest.approx((figures["ndcg@10/de"] + figures["ndcg@10/en"]) / 2)


def test_one_hit_is_enough_for_recall(tmp_path):
    write(tmp_path / "corpus.jsonl", [{"_id": f"p{i}", "text": "London" if i >= 19 else "Paris"} for i in range(130)])
    write(tmp_path / "mkqa.jsonl", [{"_id": "a", "text": "x", "lang": "en", "answers": ["London"]}])
    figures = evaluate(WordEncoder(["x"]), config.Evaluation("e", "mkqa", str(tmp_path)))  # all alike: passages in their order
    assert figures == {"recall@20": 1, "recall@100": 1, "ndcg@10": 0}


def categories(text):
    """DPR's SimpleTokenizer, character by character."""
    found, run = [], ""
    for character in unicodedata.normalize("NFD", text):
        kind = unicodedata.category(character)[0]
        if kind in "LNM":
            run += character
            continue
        found += [run.lower()] * bool(run) + [character.lower()] * (kind not in "ZC")
        run = ""
    return found + [run.lower()] * bool(run)


@pytest.mark.parametrize("text", [
    "Ada's file_name (v2.0)!", "Crème brûlée № 5", "東京、大阪", "नमस्ते दुनिया", "a\u200bb\tc\u00a0d\x00e", "x²+½ = Ⅳ",
    "😀ok\ue000"])
def test_words_are_those_of_the_published_answer_match(text):
    assert words(text) == categories(text)


def test_a_phrase_is_found_where_its_words_stand_side_by_side():
    rng = np.random.default_rng(0)
    passages = [" ".join(rng.choice(["new", "york", "city", "old"], 6)) for _ in range(60)]
    phrases = [" ".join(p) for n in (1, 2, 3) for p in itertools.product(["new", "york", "city"], repeat=n)]
    found = PassageIndex(passages).holding(phrases)
    for phrase in phrases:
        assert found[phrase] == [i for i, p in enumerate(passages) if re.search(rf"\b{phrase}\b", p)], phrase
    assert PassageIndex(["a. b"]).holding(["a b", "A .", "\u200b"]) == {"a b": [], "A .": [0], "\u200b": []}


@pytest.mark.parametrize("row, message", [
    ({"example_id": 1, "queries": {"de": "x"}, "answers": {"de": []}}, "mkqa.jsonl:1 is no question with answers"),
    ({"_id": "a", "text": "x", "answers": [3]}, "mkqa.jsonl:1 is no question"),
    ({"_id": "a", "text": "x", "answers": None}, "mkqa.jsonl:1 is no question"),
    (MKQA[1], "holds no question with a short answer"),
])
def test_questions_that_are_none_are_refused(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        read_mkqa(mkqa_folder(tmp_path, [row]))


@pytest.mark.parametrize("fields, message", [
    ({"kind": "clairvoyance"}, "unknown kind 'clairvoyance'"),
    ({"kind": "classification"}, "needs train_path"),
    ({"train_path": "x"}, "only classification has a train_path"),
    ({"instruction": "x", "prompt_name": "y"}, "give one of them"),
    ({"max_queries": 0}, "max_queries must be positive"),
    ({"max_length": 1}, "max_length must be at least 2"),
    ({"languages": ("de", "de")}, "languages repeats"),
    ({"name": " "}, "empty name"),
])
def test_a_set_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        config.Evaluation(**{"name": "e", "kind": "sts", "path": "x", **fields})


def test_prompts_by_name(tmp_path):
    encoder = WordEncoder("ab")
    encoder.prompts["sts"] = "Compare: "
    path = write(tmp_path / "s.jsonl", [{"sentence1": "a", "sentence2": s, "score": g} for s, g in (("a", 5), ("b", 0))])
    evaluate(encoder, config.Evaluation("e", "sts", path, prompt_name="sts"))
    assert encoder.calls[-1][1] == "Compare: "
    with pytest.raises(ConfigError, match="no prompt 'other'; it has query, document, sts"):
        evaluate(encoder, config.Evaluation("e", "sts", path, prompt_name="other"))
