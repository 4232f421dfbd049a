"""Suites: found or listed, chosen from, carried out, resumed; `conan eval` from end to end with an encoder of words."""

import gzip
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from typer import Typer
from typer.testing import CliRunner

from conan_jax import config, figures
from conan_jax.cli import tables
from conan_jax.cli.eval import evaluate as command
from conan_jax.errors import ConfigError, DataError
from conan_jax.eval import clustering, mkqa
from conan_jax.eval.counts import count
from conan_jax.eval.results import key_of, run_suite, score_set
from conan_jax.eval.suite import files_of, read_suite, select, with_prompts
from conan_jax.folder_lock import FolderInUseError, FolderLock
from conan_jax.inference.encoder import Encoder
from conan_jax.train import evaluation_page
from conan_jax.train.evaluation_page import write_page
from tests.eval.fakes import WordEncoder
from tests.eval.test_retrieval import doc, write_beir
from tests.test_report import Page

WORDS = "open file close socket read rose ruby sea sky".split()


class Words(WordEncoder):
    dimension = len(WORDS)

    def __init__(self, weight=1.0):
        super().__init__(WORDS, "words")
        self.identity = {**self.identity, "weights_sha256": f"{weight:064.0f}"}
        self.prompts = {"query": "Q: ", "document": "", "colours": "Colour: "}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(clustering, "SAMPLES", 20)
    made = tmp_path / "data"
    documents = [doc(0, "open file"), doc(1, "close socket"), doc(2, "read socket")]
    queries = [{"_id": "a", "text": "open", "lang": "en"}, {"_id": "b", "text": "close", "lang": "de"}]
    write_beir(made / "search/dev", documents, queries, [("a", "d0", 1), ("b", "d2", 1)], zipped=True)
    labelled = [{"text": t, "label": label} for t, label in (("rose", "red"), ("ruby", "red"), ("sea", "blue"), ("sky", "blue"))]
    put(made / "colours/train.jsonl", labelled * 3)
    put(made / "colours/test.jsonl", labelled[:3])
    put(made / "colours/valid.jsonl", labelled)
    put(made / "topics/colours_nc.jsonl.gz", labelled)
    pairs = [{"sentence1": "rose", "sentence2": s, "score": g} for s, g in (("rose", 5), ("rose sea", 2), ("sea", 0))]
    put(made / "sts/pairs.en.dev.jsonl.gz", pairs)
    put(made / "sts/pairs.en.train.jsonl.gz", pairs)
    put(made / "bitext.jsonl", [{"lang": lang, "sentence1": w, "sentence2": w} for lang in ("de", "fr") for w in WORDS[:4]])
    put(made / "mkqa/corpus.jsonl", documents)
    put(made / "mkqa/mkqa.jsonl", [{"_id": "1", "text": "open", "lang": "de", "answers": ["file"]}])
    put(made / "text/lm.jsonl", [{"text": "no label"}])
    (made / "README.md").write_text("not a set")
    return made


def put(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(r) + "\n" for r in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def test_layouts_are_recognised_and_training_files_left_alone(folder):
    suite = read_suite(folder)
    assert {e.name: e.kind for e in suite.sets} == {
        "bitext": "bitext", "colours": "classification", "mkqa": "mkqa", "search/dev": "retrieval", "sts/pairs.en.dev": "sts",
        "topics/colours_nc": "clustering"}
    colours = next(e for e in suite.sets if e.name == "colours")
    assert colours.path.endswith("test.jsonl") and colours.train_path.endswith("train.jsonl")
    assert [f.name for f in files_of(suite.sets[3])] == ["corpus.jsonl.gz", "queries.jsonl.gz", "dev.tsv"]
    assert [f.name for f in files_of(colours)] == ["test.jsonl", "train.jsonl"]


def test_a_folder_that_is_one_set_and_one_with_two_splits(folder):
    assert [e.name for e in read_suite(folder / "search/dev").sets] == ["dev"]
    shutil.copy(folder / "search/dev/qrels/dev.tsv", folder / "search/dev/qrels/test.tsv")
    shutil.copy(folder / "search/dev/qrels/dev.tsv", folder / "search/dev/qrels/train.tsv")
    found = [(e.name, e.split) for e in read_suite(folder).sets if e.kind == "retrieval"]
    assert found == [("search/dev.dev", "dev"), ("search/dev.test", "test")]


def test_sets_are_chosen_by_name_pattern_or_kind_and_bounded(folder):
    suite = read_suite(folder)
    assert [e.name for e in select(suite, ["s*", "bitext"]).sets] == ["bitext", "search/dev", "sts/pairs.en.dev"]
    assert [e.name for e in select(suite, ["classification"]).sets] == ["colours"]
    assert {e.max_queries for e in select(suite, max_queries=3).sets} == {3}


@pytest.mark.parametrize("wanted, nearest", [
    ("sst", "sts/pairs.en.dev"), ("colour", "colours"), ("Dev", "search/dev"), ("cluster", "topics/colours_nc")])
def test_a_name_that_fits_no_set_is_answered_by_the_nearest_a_line_each(folder, wanted, nearest):
    suite = read_suite(folder)
    with pytest.raises(ConfigError, match=f"no set of the suite is called '{wanted}'") as raised:
        select(suite, [wanted])
    lines = str(raised.value).splitlines()
    assert [line.split()[0] for line in lines[1:]][0] == nearest and max(map(len, lines)) < 100
    assert sorted(line.split()[0] for line in lines[1:]) == [e.name for e in suite.sets]


def test_languages_keep_what_speaks_them_and_what_says_nothing(folder):
    chosen = select(read_suite(folder), languages=["fr", "en"])
    assert {e.name: e.languages for e in chosen.sets} == {
        "bitext": ("fr",), "colours": (), "search/dev": ("en",), "sts/pairs.en.dev": (), "topics/colours_nc": ()}
    with pytest.raises(ConfigError, match="no set has the language 'nl'; there are de, en, fr"):
        select(read_suite(folder), languages=["nl"])


def test_found_sets_take_the_prompt_of_their_name():
    prompts = {"query": "Q: ", "document": "", "banking77": "B: "}
    assert [with_prompts(config.Evaluation(n, k, "x", train_path="y" if k == "classification" else None), prompts).prompt_name for n, k in
            (("clr/dev", "retrieval"), ("classification/banking77", "classification"), ("sts/x", "sts"))] == ["query", "banking77", None]


LISTED = """
sets:
  - {name: similar, kind: sts, path: sts/pairs.en.dev.jsonl.gz, instruction: Compare, max_length: 9}
  - {name: hues, kind: classification, path: colours/test.jsonl, train_path: colours/train.jsonl, prompt_name: colours}
"""


def test_a_listed_suite_is_read_as_it_says(folder):
    (folder / "suite.yaml").write_text(LISTED)
    suite = read_suite(folder)
    assert suite.listed and [e.name for e in suite.sets] == ["similar", "hues"]
    assert suite.sets[0].path == str(folder / "sts/pairs.en.dev.jsonl.gz") and suite.sets[0].max_length == 9
    encoder = Words()
    run_suite(encoder, suite, folder / "out", [9])
    assert {(prompt, length) for _, prompt, length in encoder.calls} == {("Instruct: Compare\nQuery: ", 9), ("Colour: ", 256)}


@pytest.mark.parametrize("text, message", [
    ("sets: [", "suite.yaml is not YAML"),
    ("- a", "must hold one key, sets"),
    ("sets: []\nmore: 1", "must hold one key, sets"),
    ("sets:\n - {name: a, kind: sts, pth: x}", "suite.yaml: sets.a.*|unknown key 'pth'"),
    ("sets:\n - {name: a, kind: stss, path: x}", r"suite.yaml: sets.a.kind = 'stss'.*did you mean 'sts'"),
    ("sets:\n - {name: a, kind: sts}", "suite.yaml: sets.a"),
    ("sets:\n - {name: a, kind: classification, path: x}", "'a' needs train_path"),
    ("sets:\n - {name: a, kind: sts, path: x}\n - {name: a, kind: sts, path: y}", "two sets are called 'a'"),
    ("sets:\n - {name: a, kind: sts, path: x, max_length: long}", "suite.yaml: sets.a.max_length"),
    ("sets: []", "holds no evaluation set"),
    ("sets: !!python/object/apply:os.system [ls]", "is not YAML"),
])
def test_a_wrong_suite_is_refused_by_its_key(folder, text, message):
    (folder / "suite.yaml").write_text(text)
    with pytest.raises((ConfigError, DataError), match=message):
        read_suite(folder)


def test_a_folder_without_sets_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no evaluation set"):
        read_suite(tmp_path)
    with pytest.raises(DataError, match="is not a folder"):
        read_suite(tmp_path / "none")


def test_a_suite_is_carried_out_and_goes_on_where_it_stopped(folder):
    encoder, out, seen = Words(), folder.parent / "out", []

    def stop(name, result, computed):
        seen.append((name, computed))
        if name == "mkqa":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_suite(encoder, read_suite(folder), out, [4, 9], finished=stop)
    assert seen == [("bitext", True), ("colours", True), ("mkqa", True)]
    seen.clear()
    results = run_suite(encoder, read_suite(folder), out, [4, 9], finished=lambda *a: seen.append((a[0], a[2])))
    assert seen[:3] == [("bitext", False), ("colours", False), ("mkqa", False)] and all(computed for _, computed in seen[3:])
    assert results == json.loads((out / "results.json").read_text())
    found = results["sets"]["search/dev"]
    assert found["main"] == "ndcg@10" and found["figures"]["ndcg@10/en"] == 1 and found["texts"] == 5
    assert found["settings"]["prompt_name"] == "query"
    assert results["encoder"]["run"] == "words" and len(results["encoder"]["weights_sha256"]) == 64 and "scipy" in results["versions"]
    assert set(json.loads((out / "diagnostics.json").read_text())) == set(results["sets"])
    calls = len(encoder.calls)
    run_suite(encoder, read_suite(folder), out, [4, 9])
    assert len(encoder.calls) == calls


@pytest.mark.parametrize("what", ["weights", "data", "settings", "fresh"])
def test_what_has_changed_is_computed_again(folder, what):
    out, encoder, suite = folder.parent / "out", Words(), select(read_suite(folder), ["sts", "bitext"])
    run_suite(encoder, suite, out, [9])
    encoder, seen = Words(2.0 if what == "weights" else 1.0), []
    if what == "data":
        put(folder / "bitext.jsonl", [{"lang": "de", "sentence1": w, "sentence2": w} for w in WORDS])
    if what == "settings":
        suite = select(suite, max_queries=2)
    run_suite(encoder, suite, out, [9], fresh=what == "fresh", finished=lambda *a: seen.append(a[2]))
    assert seen == ([True, False] if what == "data" else [True, True])


def test_keys_are_equal_exactly_when_scores_must_be(folder, tmp_path):
    evaluation, identity = read_suite(folder).sets[0], Words().identity
    key = key_of(evaluation, identity)
    shutil.copytree(folder, tmp_path / "moved")
    moved = next(e for e in read_suite(tmp_path / "moved").sets if e.name == evaluation.name)
    assert key == key_of(moved, identity) == json.loads(json.dumps(key))
    assert key != key_of(evaluation, Words(2.0).identity)
    assert key != key_of(replace(evaluation, max_length=9), identity)
    assert key != key_of(replace(evaluation, instruction="Compare"), identity)
    put(folder / "bitext.jsonl", [{"lang": "de", "sentence1": w, "sentence2": w} for w in WORDS])
    assert key != key_of(evaluation, identity)


def test_a_score_says_what_was_read_and_pictures_are_made_where_wanted(folder):
    search = next(e for e in read_suite(folder).sets if e.kind == "retrieval")
    found, pictures = score_set(Words(), replace(search, prompt_name="query", max_length=7), [9], diagnosed=lambda figures: False)
    assert pictures is None and found["main"] == "ndcg@10" and found["counts"]["all"] == 2
    assert found["input"] == {"max_length": 7, "prompt": "Q: ", "document_prompt": "", "texts": 5, "cut": 0}
    assert score_set(Words(), search, [9])[1].keys() >= {"alignment", "dimensions"}


def test_a_folder_in_use_is_refused_and_its_scores_stay(folder):
    out = folder.parent / "out"
    run_suite(Words(), select(read_suite(folder), ["bitext"]), out, [9])
    before = (out / "results.json").read_bytes()
    with FolderLock(out, "another"), pytest.raises(FolderInUseError):
        run_suite(Words(), select(read_suite(folder), ["sts"]), out, [9])
    assert (out / "results.json").read_bytes() == before
    run_suite(Words(), select(read_suite(folder), ["sts"]), out, [9])
    assert set(json.loads((out / "results.json").read_text())["sets"]) == {"bitext", "sts/pairs.en.dev"}


def test_the_page_shows_every_set_and_fetches_nothing(folder):
    out = folder.parent / "out"
    run_suite(Words(), read_suite(folder), out, [4, 9])
    html = write_page(out).read_text()
    page = Page(html)
    for shown in ("Retrieval", "MKQA", "Bitext mining", "Clustering", "search/dev", "sts/pairs.en.dev", "search/dev by language",
                  "weights_sha256",
                  "bitext: languages", "bitext: between languages", "colours: cosines", "Spearman by dimension".split()[0]):
        assert shown in page.text, shown
    assert not {"script", "link", "iframe", "img"} & set(page.tags) and "default-src 'none'" in html
    assert write_page(out).read_text() == html
    with pytest.raises(DataError, match="holds no results.json"):
        write_page(folder)


def test_names_of_figures_are_taken_apart_in_one_place():
    named = {"f1": 0.4, "f1/de": 0.3, "f1/a/b": 0.5, "recall@20/de": 0.2}
    assert figures.by_language(named) == {"de": {"f1": 0.3, "recall@20": 0.2}, "a/b": {"f1": 0.5}}
    assert tables.by_language is evaluation_page.by_language is mkqa.by_language is figures.by_language


def test_names_are_escaped(folder):
    evil = '<script>alert("x")</script>&$x^2$'
    suite = read_suite(folder)
    out = folder.parent / "out"
    results = run_suite(Words(), suite, out, [9])
    results["sets"][evil] = results["sets"].pop("search/dev") | {"figures": {"ndcg@10": 0.5, f"ndcg@10/{evil}": 0.5}}
    (out / "results.json").write_text(json.dumps(results))
    page = Page(write_page(out).read_text())
    assert "script" not in page.tags and evil in page.text


@pytest.fixture
def conan(monkeypatch):
    monkeypatch.setattr(Encoder, "load", classmethod(lambda cls, folder: Words()))
    app = Typer()
    app.command()(command)
    app.command("other")(lambda: None)
    return lambda *arguments: CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_the_command_prints_a_table_for_each_kind_and_language(folder, conan):
    model = folder.parent / "run"
    result = conan(model, "--suite", folder)
    assert result.exit_code == 0, result.output
    for shown in ("search/dev  ndcg@10", "retrieval", "search/dev, by language", "classification", "clustering", "mkqa", "bitext",
                  "spearman"):
        assert shown in result.output, shown
    assert (model / "eval/data/results.json").is_file() and (model / "eval/data/report.html").is_file()
    again = conan(model, "--suite", folder, "--json")
    assert set(json.loads(again.stdout)["sets"]) >= {"bitext", "search/dev"} and "kept" in again.stderr


def text_of(table):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table)
    return " ".join(console.export_text().split())


@pytest.mark.parametrize("bound, cells, capped", [(2, "2 of 4", 4), (9, "4", 0), (None, "4", 0)])
def test_a_figure_stands_beside_what_it_is_of(folder, conan, bound, cells, capped):
    model = folder.parent / "run"
    result = conan(model, "--suite", folder, "--only", "bitext", "--json", *(("--max-queries", bound) if bound else ()))
    found = json.loads(result.stdout)
    part = {"used": min(bound or 4, 4), "all": 4}
    assert found["sets"]["bitext"]["counts"] == {
        "unit": "pairs", "used": 2 * part["used"], "all": 8, "capped": bool(capped), "languages": {"de": part, "fr": part}}
    assert found == json.loads((model / "eval/data/results.json").read_text())
    warning = "Capped by max_queries: 4 of 8 pairs."
    shown = [text_of(table) for table in tables.suite_tables(found)]
    page = Page((model / "eval/data/report.html").read_text()).text
    assert len(shown) == 2 and all("pairs" in text and (warning in text) == bool(capped) for text in shown)
    assert f"de \u2502 {cells} \u2502" in shown[1] and f"fr \u2502 {cells} \u2502" in shown[1]
    assert page.count(warning) == (2 if capped else 0) and f"de {cells} " in page and ("1 set, capped" in page) == bool(capped)


def test_what_was_kept_keeps_its_count_and_what_is_bounded_anew_is_counted_anew(folder, conan):
    model, again = folder.parent / "run", ("--suite", folder, "--only", "bitext,sts", "--json")
    conan(model, *again, "--max-queries", 2)
    kept = json.loads(conan(model, *again, "--max-queries", 2).stdout)["sets"]
    assert {name: found["counts"]["used"] for name, found in kept.items()} == {"bitext": 4, "sts/pairs.en.dev": 2}
    whole = json.loads(conan(model, *again).stdout)["sets"]
    assert {name: found["counts"]["used"] for name, found in whole.items()} == {"bitext": 8, "sts/pairs.en.dev": 3}


def test_counts_are_those_of_every_kind(folder):
    suite = select(read_suite(folder), max_queries=1)
    assert {e.name: [count(e)[key] for key in ("unit", "used", "all")] for e in suite.sets} == {
        "bitext": ["pairs", 2, 8], "colours": ["texts", 1, 3], "mkqa": ["questions", 1, 1], "search/dev": ["queries", 1, 2],
        "sts/pairs.en.dev": ["pairs", 1, 3], "topics/colours_nc": ["texts", 1, 4]}
    german = next(e for e in select(read_suite(folder), ["search/dev"], languages=["de"]).sets)
    assert count(german)["all"] == 1 and count(german)["languages"] == {"de": {"used": 1, "all": 1}}


def test_several_capped_sets_are_summed_up_and_unknown_counts_say_nothing():
    some = [{"unit": "pairs", "used": 2, "all": 1000, "capped": True}, {"unit": "pairs", "used": 7, "all": 7, "capped": False}, {}]
    assert figures.cap_of(some).startswith("Capped by max_queries: 2 of 1,000 pairs in 1 of 3 sets.")
    assert figures.cap_of(some[1:]) == figures.cap_of([]) == figures.how_many({}) == ""


def test_an_export_is_left_as_it_is(folder, conan):
    export = folder.parent / "export"
    export.mkdir()
    (export / "manifest.json").write_text("{}")
    assert conan(export, "--suite", folder, "--only", "sts").exit_code == 0
    assert [p.name for p in export.iterdir()] == ["manifest.json"] and (folder.parent / "export.eval/data/results.json").is_file()


@pytest.mark.parametrize("arguments", [(), ("--suite", "a", "--mteb", "b")])
def test_one_of_suite_and_mteb_is_named(folder, conan, arguments):
    assert "either a folder of sets with --suite or tasks with --mteb" in str(conan(folder, *arguments).exception)


def test_a_wrong_name_ends_with_the_error(folder, conan):
    result = conan(folder.parent / "run", "--suite", folder, "--only", "nothing")
    assert isinstance(result.exception, ConfigError)
