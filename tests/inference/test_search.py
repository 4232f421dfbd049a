"""An index answers for the encoder that made it, and for no other; damage is named."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from conan_jax.errors import DataError
from conan_jax.inference.corpus import Settings, encode_corpus, meta_file
from conan_jax.inference.search import Corpus, build_index, index_documents, search
from conan_jax.inference.source import TextSource
from conan_jax.inference.top_k import top_k
from tests.eval.fakes import WordEncoder

WORDS = "read file close socket parse date".split()
DOCS = [
    {"id": "io.read", "text": "read file", "summary": "Read [bold]all[/bold] of it."},
    {"id": "net.close", "text": "close socket"},
    {"id": "time.parse", "text": "parse date date"},
]


def write_docs(path, docs=DOCS):
    path.write_text("".join(json.dumps(d) + "\n" for d in docs))
    return path


@pytest.fixture
def index(tmp_path):
    return build_index(WordEncoder(WORDS), write_docs(tmp_path / "docs.jsonl"), tmp_path / "index")


def ask(index, encoder, query, k):
    return search(Corpus([index / "vectors.npy"]), encoder, [query], k, documents=index_documents(index))[0]


def test_answers_are_the_nearest_documents_best_first(index):
    answers = ask(index, WordEncoder(WORDS), "date file date", 2)
    assert [a["id"] for a in answers] == ["time.parse", "io.read"]
    assert answers[0]["score"] == pytest.approx(4 / 5, abs=1e-4) and answers[0]["text"] == "parse date date"
    assert json.loads(json.dumps(answers)) == answers
    assert len(ask(index, WordEncoder(WORDS), "read", 99)) == 3


def test_the_index_is_plain_files(index):
    assert {p.name for p in index.iterdir()} == {"vectors.npy", "vectors.npy.json", "vectors.npy.ids.jsonl", "docs.jsonl"}
    assert np.load(index / "vectors.npy", allow_pickle=False).dtype == np.float32
    assert json.loads((index / "vectors.npy.json").read_text())["count"] == 3


def test_another_model_is_refused(index):
    with pytest.raises(DataError, match="was made by words s step 1 .* not by other s step 1"):
        ask(index, WordEncoder(WORDS, name="other"), "read", 1)


class Retrained(WordEncoder):
    """The same names, and weights of its own."""

    def __init__(self, weights):
        super().__init__(WORDS)
        self.identity = {**self.identity, "weights_sha256": weights * 64}


def test_other_weights_of_the_same_names_are_refused_and_an_index_that_does_not_name_its_weights(index, tmp_path):
    made = build_index(Retrained("a"), tmp_path / "docs.jsonl", tmp_path / "made")
    assert ask(made, Retrained("a"), "read", 1)[0]["id"] == "io.read"
    with pytest.raises(DataError, match="weights aaaaaaaaaaaa.*, not by words s step 1 .*weights bbbbbbbbbbbb.*encode the corpus again"):
        ask(made, Retrained("b"), "read", 1)
    with pytest.raises(DataError, match="weights unknown.*, not by .*encode the corpus again"):
        ask(index, Retrained("a"), "read", 1)
    build_index(Retrained("b"), tmp_path / "docs.jsonl", made)  # as the demo does after it was trained again
    assert ask(made, Retrained("b"), "read", 1)[0]["id"] == "io.read"


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "vectors.npy").unlink(), "make it with `conan encode`"),
    (lambda f: (f / "vectors.npy.json").unlink(), "make it with `conan encode`"),
    (lambda f: (f / "vectors.npy.json").write_text("{"), "is not valid JSON"),
    (lambda f: (f / "vectors.npy.json").write_text("{}"), "is damaged"),
    (lambda f: (f / "vectors.npy").write_bytes(b"nonsense"), "is damaged"),
    (lambda f: (f / "vectors.npy").write_bytes((f / "vectors.npy").read_bytes()[:-8]), "is damaged"),
    (lambda f: np.save(f / "vectors.npy", np.zeros((2, 6), np.float32)), "is damaged"),
    (lambda f: np.save(f / "vectors.npy", np.array([{}], dtype=object)), "is damaged"),
    (lambda f: (f / "vectors.npy.ids.jsonl").write_text('"io.read"\n'), "fewer lines"),
    (lambda f: (f / "docs.jsonl").write_text('{"id": "a", "text": "b"}\n'), "is not what .* was encoded from"),
    (lambda f: (f / "docs.jsonl").unlink(), "no file matches"),
])
def test_damage_is_named(index, damage, message):
    damage(index)
    with pytest.raises(DataError, match=message):
        ask(index, WordEncoder(WORDS), "parse", 1)


def test_an_empty_query_and_wrong_documents_are_refused(index, tmp_path):
    with pytest.raises(DataError, match="query is empty"):
        ask(index, WordEncoder(WORDS), "  ", 1)
    (tmp_path / "bad.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match="docs.jsonl:1 has no field 'text'"):
        build_index(WordEncoder(WORDS), tmp_path / "bad.jsonl", tmp_path / "x")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no texts"):
        build_index(WordEncoder(WORDS), tmp_path / "empty.jsonl", tmp_path / "x")


# ----------------------------------------------------------------------------------------- any corpus


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_shards_are_searched_as_one_corpus(tmp_path, suffix):
    rng = np.random.default_rng(0)
    docs = write_docs(tmp_path / "d.jsonl", [{"key": f"k{i}", "body": " ".join(rng.choice(WORDS, 5))} for i in range(50)])
    encoder, source = WordEncoder(WORDS), TextSource(str(docs), "body", "key")
    files = [tmp_path / f"part{i}{suffix}" for i in (1, 2, 3)]
    for i, file in enumerate(files, 1):
        encode_corpus(encoder, source, file, Settings(shard=(i, 3)))
    whole = encoder.encode([t.text for t in source])
    corpus = Corpus(files)
    np.testing.assert_array_equal(corpus[5:45], whole[5:45])
    queries = ["read date", "socket socket file"]
    rows, scores = top_k(encoder.encode(queries), whole, 7)
    for found, expected, score in zip(search(corpus, encoder, queries, 7, documents=source), rows, scores, strict=True):
        assert [a["row"] for a in found] == expected.tolist()
        assert [a["id"] for a in found] == [f"k{i}" for i in expected]
        assert [a["score"] for a in found] == pytest.approx(score.tolist(), abs=1e-4)
        assert found[0]["text"] == found[0]["body"]
    # One shard alone still knows which texts it holds.
    last = search(Corpus(files[2:]), encoder, ["read"], 1, documents=source)[0][0]
    assert last["text"] == [t.text for t in source][33 + last["row"]] and last["id"] == f"k{33 + last['row']}"


def test_parts_of_different_corpora_are_refused(tmp_path):
    docs = TextSource(str(write_docs(tmp_path / "d.jsonl")))
    encode_corpus(WordEncoder(WORDS), docs, tmp_path / "a.npy")
    encode_corpus(WordEncoder(WORDS, name="other"), docs, tmp_path / "b.npy")
    with pytest.raises(DataError, match="are not of one corpus: encoder"):
        Corpus([tmp_path / "a.npy", tmp_path / "b.npy"])


@pytest.mark.parametrize("precision, agreement", [("uint8", 0.98), ("int8", 0.98), ("binary", 0.6), ("ubinary", 0.6)])
def test_quantised_corpora_are_searched_with_the_whole_query(tmp_path, precision, agreement):
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(64)]
    docs = TextSource(str(write_docs(tmp_path / "d.jsonl", [{"text": " ".join(rng.choice(words, 60))} for i in range(300)])))
    vectors = rng.normal(size=(301, 64)).astype(np.float32)

    class Random(WordEncoder):  # signs matter to bits, and counts of words have none
        def encode(self, inputs, *args, **options):
            return vectors[:300] / 8 if len(inputs) == 300 else vectors[300:] / 8

    meta = encode_corpus(Random(words), docs, tmp_path / "c.npy", Settings(precision=precision))
    assert meta["dimension"] == 64 and np.load(tmp_path / "c.npy").dtype.itemsize == 1
    approximate = Corpus([tmp_path / "c.npy"])[0:300] @ vectors[300]
    assert np.corrcoef(approximate, vectors[:300] @ vectors[300])[0, 1] > agreement
    assert search(Corpus([tmp_path / "c.npy"]), Random(words), ["w1"], 1)[0][0]["row"] == int(np.argmax(approximate))


def test_fields_of_a_record_replace_nothing_that_an_answer_says(tmp_path, command):
    rows = [{"key": f"K{i}", "id": 900 + i, "body": body, "text": "<p>", "score": 7, "row": "x", "record": 1, "more": i, "summary": "brief"}
            for i, body in enumerate(["read file", "close socket"])]
    docs, out = write_docs(tmp_path / "d.jsonl", rows), tmp_path / "c.npy"
    encode_corpus(WordEncoder(WORDS), TextSource(str(docs), "body", "key"), out)
    asked = ("socket", "--corpus", out, "--model", "m", "--documents", docs, "--field", "body", "-k", 1)
    answer = json.loads(command(*asked, "--json").output)[0]
    assert answer == {"id": "K1", "row": 1, "score": answer["score"], "text": "close socket", "key": "K1", "body": "close socket", "more": 1,
                      "summary": "brief", "record": {"id": 901, "row": "x", "score": 7, "text": "<p>", "record": 1}}
    assert 0.7 < answer["score"] < 0.71
    shown = command(*asked).output
    assert "K1" in shown and "close socket" in shown and "901" not in shown and "<p>" not in shown and "brief" not in shown


# ----------------------------------------------------------------------------------------- exact search


@pytest.mark.parametrize("block", [None, 13, 64])
@pytest.mark.parametrize("k", [1, 12])
def test_search_on_the_device_is_the_full_sort_ties_included(block, k):
    rng = np.random.default_rng(1)
    documents = rng.integers(-2, 3, (200, 3)).astype(np.float32)  # many equal scores, and sums without rounding
    queries = rng.integers(-2, 3, (9, 3)).astype(np.float32)
    rows, scores = top_k(queries, documents, k, block=block)
    full = queries @ documents.T
    expected = np.array([sorted(range(200), key=lambda d: (-s[d], d))[:k] for s in full])
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_array_equal(scores, np.take_along_axis(full, expected, axis=1))


def test_the_padding_of_the_last_block_is_no_document():
    documents = np.ones((70, 3), np.float32)  # every score is below that of a row of zeros
    rows, scores = top_k(-documents[:2], documents, 5, block=64)
    assert rows.tolist() == [[0, 1, 2, 3, 4]] * 2 and (scores == -3).all()


def test_many_queries_no_queries_and_no_documents(monkeypatch):
    from conan_jax.inference import top_k as module

    rng = np.random.default_rng(2)
    queries, documents = rng.normal(size=(11, 4)).astype(np.float32), rng.normal(size=(30, 4)).astype(np.float32)
    expected = np.argsort(-(queries @ documents.T), axis=1)[:, :5]
    monkeypatch.setattr(module, "QUERIES", 4)
    np.testing.assert_array_equal(top_k(queries, documents, 5)[0], expected)
    assert top_k(queries[:0], documents, 5)[0].shape == (0, 5) and top_k(queries, documents[:0], 5)[0].shape == (11, 0)


def test_only_a_block_of_documents_is_read_at_a_time():
    class Rows:
        reads = []

        def __len__(self):
            return 10_000

        def __getitem__(self, rows):
            self.reads.append(rows.stop - rows.start)
            return np.ones((min(rows.stop, 10_000) - rows.start, 2), np.float32)

    rows, _ = top_k(np.ones((1, 2), np.float32), Rows(), 3, block=512)
    assert rows.tolist() == [[0, 1, 2]] and set(Rows.reads) == {512}


# ----------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(monkeypatch):
    import conan_jax.inference.encoder
    from conan_jax.cli.main import app

    monkeypatch.setattr(conan_jax.inference.encoder.Encoder, "load", classmethod(lambda cls, folder: WordEncoder(WORDS)))
    return lambda *arguments: CliRunner().invoke(app, ["search", *map(str, arguments)], env={"COLUMNS": "160"})


def test_the_command_prints_answers_and_says_what_to_do_without_an_index(index, command):
    shown = command("read a file", "--run", index.parent)
    assert shown.exit_code == 0 and "io.read" in shown.output and "Read [bold]all[/bold] of it." in shown.output
    listed = command("read a file", "--run", index.parent, "-k", "1", "--json")
    assert [a["id"] for a in json.loads(listed.output)] == ["io.read"]
    nothing = command("x", "--run", index)
    assert isinstance(nothing.exception, DataError) and "conan demo" in str(nothing.exception)


def test_the_command_searches_any_corpus_for_many_queries(tmp_path, command):
    docs = write_docs(tmp_path / "d.jsonl")
    encode_corpus(WordEncoder(WORDS), TextSource(str(docs)), tmp_path / "c.npy")
    (tmp_path / "q.txt").write_text("close\n\nparse\n")
    found = command("--queries", tmp_path / "q.txt", "--corpus", tmp_path / "c.npy", "--model", "m", "--json", "-k", 1)
    found = [json.loads(line) for line in found.output.splitlines()]
    assert [(q["query"], [a["id"] for a in q["answers"]]) for q in found] == [("close", ["1"]), ("", []), ("parse", ["2"])]
    listed = command("--queries", tmp_path / "q.txt", "--corpus", tmp_path / "c.npy", "--model", "m")
    assert listed.exit_code == 0 and listed.output.count("score") == 2 and "line 2 of" in listed.output and "is empty" in listed.output
    assert "what it says" not in listed.output  # nothing is known of the texts
    shown = command("date", "--corpus", tmp_path / "c.npy", "--model", "m", "--documents", docs)
    assert shown.exit_code == 0 and "time.parse" in shown.output and "parse date date" in shown.output and "what it says" in shown.output
    either = "either a QUERY or"
    for arguments, message in (((), either), (("x", "--queries", "q"), either), (("x", "--corpus", "c"), "needs --model")):
        assert message in str(command(*arguments).exception)


@pytest.mark.parametrize("content, asked", [
    (b"a\r\n\r\nb\r\n", ["a", "", "b"]), ("\ufeffa\u2028b\x0cc\nd".encode(), ["a\u2028b\x0cc", "d"]), (b" \na\n\n", [" ", "a", ""])])
def test_a_query_is_a_line_and_every_line_is_one(tmp_path, content, asked):
    from conan_jax.cli.search import _queries

    (tmp_path / "q.txt").write_bytes(content)
    assert _queries(None, tmp_path / "q.txt") == asked
    (tmp_path / "q.txt").write_bytes(b"\n \n")
    with pytest.raises(DataError, match="holds no queries"):
        _queries(None, tmp_path / "q.txt")


def test_an_unfinished_corpus_is_told_from_a_missing_one(tmp_path):
    (tmp_path / ".c.npy.partial").mkdir()
    with pytest.raises(DataError, match="is not finished: start its `conan encode` again"):
        Corpus([tmp_path / "c.npy"])
    assert meta_file(tmp_path / "c.npy").name == "c.npy.json"
