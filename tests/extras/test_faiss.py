"""The faiss index of a corpus: made once, made anew when the corpus changes, close to the exact search."""

import json

import numpy as np

from conan_jax.inference.approximate import nearest
from conan_jax.inference.corpus import encode_corpus
from conan_jax.inference.search import Corpus
from conan_jax.inference.source import TextSource
from conan_jax.inference.top_k import top_k
from tests.eval.fakes import WordEncoder

COUNT = 12_000


class Numbered(WordEncoder):
    """The text "17" has row 17 of a table."""

    def __init__(self, vectors):
        super().__init__(range(vectors.shape[1]))
        self.vectors = vectors

    def encode(self, inputs, *args, **options):
        return self.vectors[[int(text) for text in inputs]]


def unit(rng, centres):
    vectors = centres[np.arange(COUNT) % len(centres)] + 0.3 * rng.normal(size=(COUNT, centres.shape[1]))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_lists_find_what_the_exact_search_finds(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(COUNT)))
    centres = rng.normal(size=(200, 32))
    index = tmp_path / "c.npy.faiss"
    made = []
    for seed in (0, 0, 1):
        vectors = unit(np.random.default_rng(seed), centres)
        if len(made) != 1:  # the second time nothing has changed
            encode_corpus(Numbered(vectors), TextSource(str(tmp_path / "in.jsonl")), tmp_path / "c.npy", force=True)
        rows, _ = nearest(vectors[:40], Corpus([tmp_path / "c.npy"]), 10)
        exact, _ = top_k(vectors[:40], vectors, 10)
        assert (rows[:, 0] == np.arange(40)).all()
        assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), exact.tolist())]) > 0.9
        made.append(index.stat().st_mtime_ns)
    assert made[0] == made[1] != made[2]
