"""Evaluation files that are damaged, odd or fuzzed: scores, or a `DataError` that names the file and the line."""

import gzip
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conan_jax import config
from conan_jax.errors import ConanError, ConfigError, DataError
from conan_jax.eval import clustering, evaluate
from conan_jax.eval.diagnostics import view_of
from conan_jax.eval.mkqa import read_mkqa
from conan_jax.eval.records import read_records
from conan_jax.eval.results import run_suite
from conan_jax.eval.retrieval import read_beir
from conan_jax.eval.suite import read_suite
from conan_jax.files import check_room
from tests.eval.fakes import WordEncoder

CORPUS = [{"_id": "d0", "title": "", "text": "open file"}, {"_id": "d1", "text": "close"}]
QUERIES = [{"_id": "a", "text": "open"}, {"_id": "b", "text": "close"}]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write(folder, corpus=lines(CORPUS), queries=lines(QUERIES), qrels=b"a\td0\t1\nb\td1\t1\n"):
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_bytes(corpus)
    (folder / "queries.jsonl").write_bytes(queries)
    (folder / "qrels/test.tsv").write_bytes(qrels)
    return folder


@pytest.mark.parametrize("files, place", [
    ({"corpus": lines([CORPUS[0], {"_id": "d1", "title": 1984, "text": "x"}])}, r"corpus\.jsonl:2 .*title"),
    ({"corpus": lines([*CORPUS, CORPUS[0]])}, r"corpus\.jsonl:3 .*d0"),
    ({"corpus": b""}, r"corpus\.jsonl"),
    ({"queries": b"3\n"}, r"queries\.jsonl:1 "),
    ({"queries": lines([{"_id": True, "text": "x"}])}, r"queries\.jsonl:1 .*_id"),
    ({"queries": lines([{"_id": "a", "text": "x", "lang": 3}])}, r"queries\.jsonl:1 .*lang"),
    ({"queries": b"\xff\xfe"}, r"queries\.jsonl"),
    *[({"qrels": f"a\td0\t1\nb\td1\t{grade}\n".encode()}, r"test\.tsv:2 ") for grade in ("1.5", "\u00b2", "--1", "1_0", "", "9" * 5000)],
    ({"qrels": b"a\td0\t1.5\nb\td1\t1\n"}, r"test\.tsv:1 "),  # a grade that is wrong is no header
    ({"qrels": b"a\td0\t1\na\td0\t2\n"}, r"test\.tsv:2 .*d0"),
    ({"qrels": b"a\td0\t1\nz\td0\t2\n"}, r"test\.tsv:2 .*z"),
    ({"qrels": b"a\td0\t1\na\td9\t2\n"}, r"test\.tsv:2 .*d9"),
    ({"qrels": b"a\td0\t1\n\xff\td1\t2\n"}, r"test\.tsv:2 ")])
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path, files, place):
    with pytest.raises(DataError, match=place):
        read_beir(write(tmp_path, **files), "test")


def test_a_byte_order_mark_whole_numbers_as_ids_and_a_damaged_gz(tmp_path):
    mark = b"\xef\xbb\xbf"
    folder = write(tmp_path, mark + lines([{"_id": 7, "text": "open"}]), mark + lines([{"_id": 1, "text": "open"}]), mark + b"1\t7\t1\n")
    assert read_beir(folder, "test").qrels == {"1": {"7": 1}}
    packed = bytearray(gzip.compress(lines(CORPUS * 50)))
    packed[20:40] = bytes(20)
    (folder / "corpus.jsonl").unlink()
    (folder / "corpus.jsonl.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"corpus\.jsonl\.gz"):
        read_beir(folder, "test")


def test_a_set_counts_once_whatever_number_of_links_lead_to_it(tmp_path):
    root = tmp_path / "suite"
    write(root / "b")
    os.symlink(root, root / "b2")
    os.symlink(root / "b", root / "a")
    outside = write(tmp_path / "outside")
    os.symlink(outside, root / "c")
    (root / "notes.jsonl").write_text("3\n")
    found = read_suite(root)
    assert [e.name for e in found.sets] == ["b", "c"] and [path.name for path in found.left_out] == ["notes.jsonl"]
    (root / "lost.jsonl").symlink_to(root / "nothing.jsonl")
    with pytest.raises(DataError, match=r"lost\.jsonl"):
        read_suite(root)


def test_results_of_another_run_are_kept(tmp_path):
    suite = read_suite(write(tmp_path / "suite" / "x").parent)
    run_suite(WordEncoder(["open", "close"], "first"), suite, tmp_path / "out", [])
    before = (tmp_path / "out/results.json").read_bytes()
    with pytest.raises(ConfigError, match="first"):
        run_suite(WordEncoder(["open", "close"], "second"), suite, tmp_path / "out", [])
    assert (tmp_path / "out/results.json").read_bytes() == before
    assert run_suite(WordEncoder(["open", "close"], "second"), suite, tmp_path / "out", [], fresh=True)["encoder"]["run"] == "second"


def test_a_disk_without_room_is_told_before_a_text_is_encoded(tmp_path, monkeypatch):
    full = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*full[:4], 0, *full[5:])))
    with pytest.raises(DataError, match="out"):
        check_room(tmp_path / "out", 1)
    encoder = WordEncoder(["open", "close"])
    with pytest.raises(DataError, match="out"):
        run_suite(encoder, read_suite(write(tmp_path / "suite" / "x").parent), tmp_path / "out", [])
    assert not encoder.calls


def test_more_labels_than_drawn_texts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(clustering, "SAMPLES", 3)
    (tmp_path / "c.jsonl").write_bytes(lines([{"text": f"t{i}", "label": i} for i in range(4)]))
    with pytest.raises(DataError, match=r"c\.jsonl"):
        evaluate(WordEncoder(["t0"]), config.Evaluation("c", "clustering", str(tmp_path / "c.jsonl")))


@pytest.mark.parametrize("shift", [0, -5, -9])
def test_pairs_of_high_and_low_score_are_the_same_on_any_scale(tmp_path, shift):
    scores = [0, 1, 4, 5]
    rows = [{"sentence1": f"a{i}", "sentence2": f"b{i}", "score": s + shift} for i, s in enumerate(scores)]
    (tmp_path / "s.jsonl").write_bytes(lines(rows))
    view = view_of(WordEncoder(["a0", "b0"]), config.Evaluation("s", "sts", str(tmp_path / "s.jsonl")))
    assert view.positives.tolist() == [[2, 2], [3, 3]] and view.hard_negatives.tolist() == [[0, 0], [1, 1]]


VALUE = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(["a", "d0", "en", "open", 1]),
                  st.lists(st.sampled_from(["a", None, 1]), max_size=2),
                  st.dictionaries(st.sampled_from(["en", "text"]), st.text(max_size=3), max_size=2))
NAMES = ["_id", "text", "title", "lang", "sentence1", "sentence2", "score", "label", "answers", "queries", "query", "example_id"]
ROW = st.one_of(VALUE, st.dictionaries(st.sampled_from(NAMES), VALUE, max_size=6)).map(lambda row: json.dumps(row).encode())
FILE = st.one_of(st.binary(max_size=60), st.lists(ROW, max_size=4).map(b"\n".join))
CELL = st.sampled_from(["a", "d0", "1", "-1", "1.5", "\u00b2", ""])
QRELS = st.one_of(st.binary(max_size=30),
                  st.lists(st.tuples(CELL, CELL, CELL), max_size=3).map(lambda rows: "\n".join(map("\t".join, rows)).encode()))


@settings(max_examples=150, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(corpus=st.one_of(st.just(lines(CORPUS)), FILE), queries=st.one_of(st.just(lines(QUERIES)), FILE), qrels=QRELS, other=FILE)
def test_no_evaluation_file_ends_in_anything_but_an_error_of_the_project(tmp_path, corpus, queries, qrels, other):
    folder = write(tmp_path / "beir", corpus, queries, qrels)
    for name in ("mkqa.jsonl", "other.jsonl"):
        (folder / name).write_bytes(other)
    for read in (lambda: read_beir(folder, "test"), lambda: read_mkqa(folder), lambda: read_suite(tmp_path),
                 lambda: read_records(str(folder / "other.jsonl"), "sts"), lambda: read_records(str(folder / "other.jsonl"), "labelled")):
        try:
            read()
        except ConanError:
            pass
