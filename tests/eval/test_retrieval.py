"""Retrieval figures against NumPy oracles, exact search against a full sort, and folders that are not what they must be."""

import gzip
import json
import math

import numpy as np
import pytest

from conan_jax import config
from conan_jax.errors import ConfigError, DataError
from conan_jax.eval import evaluate
from conan_jax.eval.retrieval import evaluate_bm25, read_beir, score
from conan_jax.figures import by_language
from conan_jax.inference.top_k import top_k
from tests.eval.fakes import WordEncoder


def write_beir(folder, documents, queries, qrels, *, split="dev", zipped=False, header=True):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "qrels").mkdir(exist_ok=True)
    for name, rows in (("corpus", documents), ("queries", queries)):
        data = "".join(json.dumps(r) + "\n" for r in rows).encode()
        (folder / f"{name}.jsonl{'.gz' if zipped else ''}").write_bytes(gzip.compress(data) if zipped else data)
    lines = ["query-id\tcorpus-id\tscore"] * header + [f"{q}\t{d}\t{g}" for q, d, g in qrels]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


def doc(i, text="x", **more):
    return {"_id": f"d{i}", "text": text, **more}


def oracle(gains, ranking, k):
    """nDCG@k with gain = grade and log2 discount, recall@k, and reciprocal rank in the first k."""
    dcg = sum(max(gains.get(d, 0), 0) / math.log2(r + 2) for r, d in enumerate(ranking[:k]))
    ideal = sum(g / math.log2(r + 2) for r, g in enumerate(sorted((g for g in gains.values() if g > 0), reverse=True)[:k]))
    relevant = {d for d, g in gains.items() if g > 0}
    recall = len(relevant & set(ranking[:k])) / len(relevant)
    reciprocal = next((1 / (r + 1) for r, d in enumerate(ranking[:k]) if d in relevant), 0.0)
    return dcg / ideal, recall, reciprocal


def test_figures_equal_the_formulas(tmp_path):
    rng = np.random.default_rng(0)
    documents = [doc(i) for i in range(150)]
    qrels = [(f"q{q}", f"d{d}", int(rng.integers(0, 4))) for q in range(20) for d in rng.choice(150, 12, replace=False)]
    qrels += [(f"q{q}", f"d{int(rng.integers(0, 3))}", 1) for q in range(20)]
    qrels = list({(q, d): (q, d, g) for q, d, g in qrels}.values())
    data = read_beir(write_beir(tmp_path, documents, [{"_id": f"q{q}", "text": "x"} for q in range(20)], qrels))
    ranks = np.array([rng.permutation(150)[:100] for _ in range(20)])
    figures = score(data, ranks)
    for k, names in ((10, ("ndcg@10", "recall@10", "mrr@10")), (20, (None, "recall@20", None)), (100, (None, "recall@100", None))):
        per_query = [oracle(data.qrels[q], [f"d{d}" for d in row], k) for q, row in zip(data.query_ids, ranks, strict=True)]
        for name, expected in zip(names, np.mean(per_query, axis=0), strict=True):
            if name:
                assert figures[name] == pytest.approx(expected, abs=1e-9), name


def test_a_query_without_any_ranked_document_counts_as_zero(tmp_path):
    queries = [{"_id": "a", "text": "x"}, {"_id": "b", "text": "y"}]
    data = read_beir(write_beir(tmp_path, [doc(0), doc(1)], queries, [("a", "d0", 1), ("b", "d1", 1)]))
    assert score(data, np.array([[0, -1], [-1, -1]]))["ndcg@10"] == 0.5


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_search_is_exact_and_ties_keep_document_order(block):
    rng = np.random.default_rng(1)
    documents = rng.integers(-2, 3, (200, 3)).astype(np.float32)  # many equal scores
    queries = rng.integers(-2, 3, (9, 3)).astype(np.float32)
    rows, scores = top_k(queries, documents, 12, block=block)
    full = queries @ documents.T
    expected = np.array([sorted(range(200), key=lambda d: (-s[d], d))[:12] for s in full])
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(full, expected, axis=1))


def test_fewer_documents_than_asked_for():
    rows, scores = top_k(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), 10)
    assert rows.tolist() == [[0, 1], [1, 0]] and scores.tolist() == [[1, 0], [1, 0]]


@pytest.mark.parametrize("zipped", [False, True])
def test_an_encoder_and_bm25_are_scored_on_a_folder(tmp_path, zipped):
    documents = [doc(0, "read a file", title="open"), doc(1, "close socket"), doc(2, "read socket")]
    queries = [{"_id": "a", "text": "open file", "lang": "en"}, {"_id": "b", "text": "close", "lang": "de"}, {"_id": "unused", "text": "z"}]
    folder = write_beir(tmp_path, documents, queries, [("a", "d0", 1), ("b", "d2", 1), ("b", "d1", 0)], zipped=zipped, split="test")
    encoder = WordEncoder("open read file close socket".split())
    evaluation = config.Evaluation("e", "retrieval", str(folder), split="test", instruction="find it", max_length=32)
    figures = evaluate(encoder, evaluation)
    assert encoder.calls == [(["open read a file", "close socket", "read socket"], "", 32),
                             (["open file", "close"], "Instruct: find it\nQuery: ", 32)]
    # query a: rank 1; query b: d1 is not relevant (rank 1), then d0, d2 tie at zero in document order: rank 3
    assert figures["ndcg@10"] == pytest.approx((1 + 1 / math.log2(4)) / 2) and figures["mrr@10"] == pytest.approx((1 + 1 / 3) / 2)
    assert by_language(figures)["en"]["ndcg@10"] == 1.0 and by_language(figures)["de"]["mrr@10"] == pytest.approx(1 / 3)
    lexical = evaluate_bm25(evaluation)
    assert lexical["mrr@10"] == 0.5 and set(lexical) == set(figures)  # b never finds d2, which shares no term


def test_queries_are_spread_evenly(tmp_path):
    queries = [{"_id": f"q{i}", "text": f"text {i}"} for i in range(10)]
    folder = write_beir(tmp_path, [doc(0)], queries, [(f"q{i}", "d0", 1) for i in range(10)], header=False)
    assert read_beir(folder, max_queries=4).query_ids == ["q0", "q2", "q5", "q7"]
    assert len(read_beir(folder, max_queries=99).queries) == 10


@pytest.mark.parametrize("file, text, message", [
    ("corpus.jsonl", '{"_id": "d0", "text": "x"}\n{"_id": "d1"\n', "corpus.jsonl:2 is not JSON"),
    ("corpus.jsonl", '{"_id": "d0", "text": "x"}\n{"_id": "d0", "text": "x"}\n', "corpus.jsonl:2 repeats the _id 'd0'"),
    ("queries.jsonl", '{"_id": "a", "text": 3}\n', "queries.jsonl:1 must be an object"),
    ("qrels/dev.tsv", "query-id\tcorpus-id\tscore\na\td0\tyes\n", "dev.tsv:2 must be QUERY_ID"),
    ("qrels/dev.tsv", "a\td9\t1\n", "dev.tsv:1 judges the document 'd9'"),
    ("qrels/dev.tsv", "z\td0\t1\n", "dev.tsv:1 judges the query 'z'"),
    ("qrels/dev.tsv", "a\td0\t0\n", "no query of queries.jsonl has a positive judgement"),
    ("queries.jsonl", None, "queries.jsonl is missing"),
])
def test_a_wrong_folder_is_refused_by_file_and_line(tmp_path, file, text, message):
    folder = write_beir(tmp_path, [doc(0)], [{"_id": "a", "text": "x"}], [("a", "d0", 1)])
    (folder / file).unlink() if text is None else (folder / file).write_text(text)
    with pytest.raises(DataError, match=message):
        read_beir(folder)


def test_a_truncated_gzip_is_refused(tmp_path):
    folder = write_beir(tmp_path, [doc(i, "text " * 50) for i in range(50)], [{"_id": "a", "text": "x"}], [("a", "d0", 1)], zipped=True)
    path = folder / "corpus.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"corpus\.jsonl\.gz"):
        read_beir(folder)


def test_an_unknown_kind_is_refused():
    evaluation = config.Evaluation("e", "retrieval", "x")
    object.__setattr__(evaluation, "kind", "clairvoyance")
    with pytest.raises(ConfigError, match="clairvoyance"):
        evaluate(WordEncoder("a"), evaluation)
