"""An index answers for the encoder that made it, and for no other; damage is named."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from conan_jax.errors import DataError
from conan_jax.inference.search import build_index, search
from tests.eval.fakes import WordEncoder

WORDS = "read file close socket parse date".split()
DOCS = [
    {"id": "io.read", "text": "read file", "summary": "Read [bold]all[/bold] of it."},
    {"id": "net.close", "text": "close socket"},
    {"id": "time.parse", "text": "parse date date"},
]


@pytest.fixture
def index(tmp_path):
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps(d) + "\n" for d in DOCS))
    return build_index(WordEncoder(WORDS), docs, tmp_path / "index")


def test_answers_are_the_nearest_documents_best_first(index):
    answers = search(index, WordEncoder(WORDS), "date file date", 2)
    assert [a["id"] for a in answers] == ["time.parse", "io.read"]
    assert answers[0]["score"] == pytest.approx(4 / 5, abs=1e-4) and answers[0]["text"] == "parse date date"
    assert json.loads(json.dumps(answers)) == answers
    assert len(search(index, WordEncoder(WORDS), "read", 99)) == 3


def test_the_index_is_plain_files(index):
    assert {p.name for p in index.iterdir()} == {"vectors.npy", "docs.jsonl", "meta.json"}
    assert np.load(index / "vectors.npy", allow_pickle=False).dtype == np.float32
    assert json.loads((index / "meta.json").read_text())["count"] == 3


def test_another_model_is_refused(index):
    with pytest.raises(DataError, match="was made by words s step 1 .* not by other s step 1"):
        search(index, WordEncoder(WORDS, name="other"), "read", 1)


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "meta.json").unlink(), "no finished search index"),
    (lambda f: (f / "meta.json").write_text("{"), "is damaged"),
    (lambda f: (f / "meta.json").write_text("{}"), "is damaged"),
    (lambda f: (f / "vectors.npy").write_bytes(b"nonsense"), "is damaged"),
    (lambda f: np.save(f / "vectors.npy", np.zeros((2, 6), np.float32)), "is damaged"),
    (lambda f: np.save(f / "vectors.npy", np.array([{}], dtype=object)), "is damaged"),
    (lambda f: (f / "docs.jsonl").write_text('{"id": "a", "text": "b"}\nnot json\n'), "docs.jsonl: near line 2"),
    (lambda f: (f / "docs.jsonl").unlink(), "docs.jsonl cannot be read"),
])
def test_damage_is_named(index, damage, message):
    damage(index)
    with pytest.raises(DataError, match=message):
        search(index, WordEncoder(WORDS), "read", 1)


def test_an_empty_query_and_wrong_documents_are_refused(index, tmp_path):
    with pytest.raises(DataError, match="query is empty"):
        search(index, WordEncoder(WORDS), "  ", 1)
    (tmp_path / "bad.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match="bad.jsonl:1 must be an object"):
        build_index(WordEncoder(WORDS), tmp_path / "bad.jsonl", tmp_path / "x")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DataError, match="no documents"):
        build_index(WordEncoder(WORDS), tmp_path / "empty.jsonl", tmp_path / "x")


def test_the_command_prints_answers_and_says_what_to_do_without_an_index(index, monkeypatch):
    import conan_jax.inference.encoder
    from conan_jax.cli.main import app

    monkeypatch.setattr(conan_jax.inference.encoder.Encoder, "load", classmethod(lambda cls, folder: WordEncoder(WORDS)))
    shown = CliRunner().invoke(app, ["search", "read a file", "--run", str(index.parent)], env={"COLUMNS": "160"})
    assert shown.exit_code == 0 and "io.read" in shown.output and "Read [bold]all[/bold] of it." in shown.output
    listed = CliRunner().invoke(app, ["search", "read a file", "--run", str(index.parent), "-k", "1", "--json"])
    assert [a["id"] for a in json.loads(listed.output)] == ["io.read"]
    missing = CliRunner().invoke(app, ["search", "x", "--run", str(index.parent / "nowhere")])
    assert isinstance(missing.exception, DataError) and "conan demo" in str(missing.exception)
