"""What vectors look like, against numbers computed by hand or by loops."""

import json
import math

import numpy as np
import pytest

from conan_jax import config
from conan_jax.eval import evaluate
from conan_jax.eval.diagnostics import SAMPLE, alignment, diagnose, histogram, language_clusters, uniformity, view_of
from conan_jax.eval.dimensions import dimensions_of, halvings
from conan_jax.eval.memory import Remembering, Truncated
from tests.eval.fakes import WordEncoder
from tests.eval.test_retrieval import doc, write_beir


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def test_alignment_and_uniformity_are_the_published_formulas():
    rng = np.random.default_rng(0)
    x, y = unit(rng, 12, 5), unit(rng, 12, 5)
    distances = [sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for p, q in zip(x, y, strict=True)]
    assert alignment(x, y) == pytest.approx(sum(distances) / 12, rel=1e-5)
    pairs = [math.exp(-2 * sum((float(a) - float(b)) ** 2 for a, b in zip(x[i], x[j], strict=True))) for i in range(12) for j in range(i)]
    assert uniformity(x) == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)
    assert alignment(x, x) == 0 and uniformity(np.repeat(x[:1], 4, axis=0)) == pytest.approx(0, abs=1e-6)
    poles = np.array([[1, 0], [-1, 0]], np.float32)
    assert uniformity(poles) == pytest.approx(-8) and alignment(poles[:1], poles[1:]) == 4


def test_uniformity_of_many_vectors_is_that_of_a_sample():
    x = unit(np.random.default_rng(1), 3 * SAMPLE, 8)
    assert uniformity(x) == pytest.approx(uniformity(x[: SAMPLE]), abs=0.02)


def test_a_search_has_positives_random_and_hard_negatives(tmp_path):
    documents = [doc(0, "open file"), doc(1, "open door"), doc(2, "close socket"), doc(3, "read socket")]
    queries = [{"_id": "a", "text": "open file", "lang": "en"}, {"_id": "b", "text": "close socket", "lang": "de"}]
    folder = write_beir(tmp_path, documents, queries, [("a", "d0", 1), ("a", "d1", 0), ("b", "d2", 2)])
    view = view_of(WordEncoder("open file door close socket read".split()), config.Evaluation("e", "retrieval", str(folder)))
    assert view.positives.tolist() == [[0, 0], [1, 2]] and view.hard_negatives.tolist() == [[0, 1], [1, 3]]
    assert not {(0, 0), (1, 2)} & set(map(tuple, view.negatives.tolist())) and len(view.negatives)
    found = histogram(view)
    assert found["means"]["positives"] == pytest.approx(1) and found["means"]["hard negatives"] == pytest.approx(0.5)
    assert sum(found["counts"]["positives"]) == 2 and found["counts"]["positives"][-1] == 2 and found["counts"]["hard negatives"][37] == 2


def test_scored_pairs_and_labels_have_positives_and_negatives(tmp_path):
    pairs = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": float(i)} for i in range(6)]
    encoder = WordEncoder([f"{x}{i}" for x in "ab" for i in range(6)])
    view = view_of(encoder, config.Evaluation("e", "sts", write(tmp_path / "s.jsonl", pairs)))
    assert view.positives.tolist() == [[4, 4], [5, 5]] and view.hard_negatives.tolist() == [[0, 0], [1, 1]]
    assert all(a != b for a, b in view.negatives)
    texts = [{"text": f"a{i}", "label": str(i % 2)} for i in range(6)]
    view = view_of(encoder, config.Evaluation("e", "clustering", write(tmp_path / "c.jsonl", texts)))
    assert all((a - b) % 2 == 0 and a != b for a, b in view.positives) and all((a - b) % 2 for a, b in view.negatives)


class Placed(WordEncoder):
    """Texts at given places of the sphere."""

    def __init__(self, places):
        super().__init__([])
        self.places = places

    def encode(self, inputs, prompt_name=None, prompt=None, **options):
        vectors = np.array([self.places[t] for t in inputs], np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_languages_apart_and_merged(tmp_path):
    axes = np.eye(6)
    apart = Placed({f"{lang}{i}": 3 * axes[4 + j] + axes[i] for i in range(4) for j, lang in enumerate(("de", "fr"))})
    merged = Placed({f"{lang}{i}": axes[i] + 0.1 * axes[4 + j] for i in range(4) for j, lang in enumerate(("de", "fr"))})
    spoken = {lang: [(str(i), f"{lang}{i}") for i in range(4)] for lang in ("de", "fr")}
    evaluation = config.Evaluation("e", "bitext", "none")
    far, near = (language_clusters(encoder, evaluation, spoken) for encoder in (apart, merged))
    assert far["same_language"] == 1 and near["same_language"] == 0 and far["chance"] == near["chance"] == pytest.approx(3 / 7)
    assert far["translations"] == pytest.approx(0.1) and near["translations"] == pytest.approx(1 / 1.01)
    # texts of one language share 3 of 10 parts of squared length 9; of two languages nothing
    np.testing.assert_allclose(far["similarity"], [[0.9, 0.0], [0.0, 0.9]], atol=1e-4)
    assert [len(points) for points in far["points"].values()] == [4, 4]
    left, right = (np.mean(points, axis=0) for points in far["points"].values())
    assert np.linalg.norm(left - right) > 1


def test_an_encoder_that_remembers_encodes_no_text_twice():
    encoder, seen = WordEncoder(["a", "b"]), []
    remembering = Remembering(encoder, lambda done, total: seen.append((done, total)))
    first = remembering.encode(["a", "b b", "a"], prompt="p", max_length=9)
    np.testing.assert_array_equal(first, encoder.encode(["a", "b b", "a"]))
    encoder.calls.clear()
    np.testing.assert_array_equal(remembering.encode(["a b", "a"], prompt="p", max_length=9), encoder.encode(["a b", "a"]))
    remembering.encode_document(["a"], max_length=9)
    remembering.encode_query(["a"], prompt="p", max_length=9)
    assert [c for c in encoder.calls if c[2] == 9] == [(["a b"], "p", 9), (["a"], "", 9)]
    assert seen == [(2, 2), (3, 3), (4, 4)] and remembering.texts == 4


def test_texts_that_were_cut_are_counted_once():
    class Short(WordEncoder):
        def encode(self, inputs, *arguments, max_length=None, **options):
            self.texts_cut += sum(len(text.split()) > max_length for text in inputs)
            return super().encode(inputs, *arguments, max_length=max_length, **options)

    encoder = Short(["a", "b"])
    remembering = Remembering(encoder)
    for _ in range(2):
        remembering.encode(["a b a", "a b", "b b b"], max_length=2)
    encoder.encode(["a a a"], max_length=1)
    assert (remembering.texts, remembering.cut) == (3, 2)


def test_fewer_dimensions_are_the_first_ones_of_length_one(tmp_path):
    places = {"x": [3, 4, 12], "y": [0, 0, 1], "z": [0, 0, -2], "w": [4, -3, 0]}
    short = Truncated(Remembering(Placed(places)), 2)
    np.testing.assert_allclose(short.encode(["x", "y", "w"]), [[0.6, 0.8], [0, 0], [0.8, -0.6]], atol=1e-6)
    rows = [{"sentence1": "x", "sentence2": s, "score": g} for s, g in (("x", 5), ("y", 3), ("z", 1))]
    evaluation = config.Evaluation("e", "sts", write(tmp_path / "s.jsonl", rows))
    found = diagnose(Remembering(Placed(places)), evaluation, [2, 3], "spearman", evaluate)
    # cosines 1, 12/13, -12/13; at two dimensions 1, 0, 0: a tie that the gold order does not have
    assert found["dimensions"]["3"] == pytest.approx(1) and found["dimensions"]["2"] == pytest.approx(math.sqrt(3) / 2)


def test_dimensions_come_from_the_recipe_or_are_halvings(tmp_path):
    assert halvings(256) == [16, 32, 64, 128, 256] and halvings(3584)[0] == 28 and halvings(9) == [9]
    assert dimensions_of(tmp_path, 64) == [16, 32, 64]
    (tmp_path / "conan.json").write_text('{"dims": [64, 8]}')
    assert dimensions_of(tmp_path, 64) == [8, 64]
