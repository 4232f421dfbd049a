"""The demo's corpus from a made-up environment: what is read, what is held out, what never depends on the machine."""

import json
import os
import random
import re
import time

import pytest

from conan_jax.data.docstring_reader import Doc, find_modules, public_names, read_docstrings
from conan_jax.data.docstring_records import graded_pairs, hard_negative_pools, heading
from conan_jax.data.docstring_selection import balance, deduplicate, evaluation_set, hold_out
from conan_jax.data.docstring_text import plain_text, sentences, shorten, split_docstring, spoken
from conan_jax.data.docstrings import CorpusOptions, build_corpus
from conan_jax.errors import DataError

VERBS = "compute return parse convert remove merge split encode decode open close sort filter count find".split()
NOUNS = "matrix vector file socket header token calendar archive buffer histogram polynomial queue thread widget tree".split()
ADJECTIVES = "sparse dense local remote weighted cumulative binary compressed nested ordered random periodic".split()
KINDS = {"text": "text", "sft": "sft", "pairs": "pair", "names": "pair", "cloze": "pair", "retrieval": "retrieval", "sts": "sts",
         "labelled": "labelled"}
OPTIONS = CorpusOptions(sts_pairs=80, label_size=(5, 20), pools=100, pool_size=6, held_out_percent=25, max_queries=30, max_documents=60)


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def environment(modules=36):
    """`{file: source}` of packages whose texts are all different."""
    rng = random.Random(7)
    files = {}
    for m in range(modules):
        package = f"pack{m % 3}"
        files[f"{package}/__init__.py"] = f'"""Tools of package {package} for every day use."""\n'
        parts = [f'"""Module number {m} about {rng.choice(NOUNS)} handling."""', "class Holder:",
                 f'    """Hold the {rng.choice(NOUNS)} state number {m}."""']
        for f in range(5):
            verb, adjective, noun = rng.choice(VERBS), rng.choice(ADJECTIVES), rng.choice(NOUNS)
            body = (f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)} of step {m} times {f} is visited first. Then the {rng.choice(NOUNS)} "
                    f"follows. It takes a {rng.choice(NOUNS)}. What the {rng.choice(NOUNS)} of part {m} holds is kept as it was before by "
                    f"call {f}, whatever the caller did with it in the meantime.")
            inside = "    " if f % 2 else ""
            self_argument = "self, " if inside else ""
            parts.append(f'{inside}def {verb}_{noun}_{f}({self_argument}{noun}, limit={f}):\n'
                         f'{inside}    """{verb.capitalize()} the {adjective} {noun} in case {m} and {f}.\n\n'
                         f'{inside}    {body}\n{inside}    """')
        methods = [p for p in parts if p.startswith("    def")]
        rest = [p for p in parts if not p.startswith("    def")]
        files[f"{package}/mod{m:02}.py"] = "\n".join(rest[:3] + methods + rest[3:]) + "\n"
    return files


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root, out = tmp_path_factory.mktemp("env"), tmp_path_factory.mktemp("corpus")
    write(root, environment())
    return root, out, build_corpus(out, [root], options=OPTIONS)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("raw, plain", [
    ("Use :class:`~numpy.ndarray` or :func:`sum`.", "Use ndarray or sum."),
    ("See `the guide <http://x.y>`_ and ``axis=0``.", "See the guide and axis=0."),
    ("Parameters\n----------\nx : int\n    The value.", "Parameters\nx : int\nThe value."),
    (".. versionadded:: 1.2\nText.", "Text."),
    (".. note:: Mind the gap.", "Note: Mind the gap."),
    (":param x: the value\n:return: its square", "x: the value\nReturns: its square"),
    ("A\x00b\ud800c", "Abc"),
    (">>> only(1)\n1", ""),
    ("Text.\n\n>>> f(1)\n2", "Text.\n\nf(1)\n2"),
])
def test_markup_is_taken_off(raw, plain):
    assert plain_text(raw) == plain


@pytest.mark.parametrize("text, parts", [
    ("Return the sum.\n\nOver an axis.", ("", "Return the sum.", "Over an axis.")),
    ("Return the sum. Over an\naxis.", ("", "Return the sum.", "Over an\naxis.".replace("\n", " "))),
    ("Use e.g. Numpy arrays here.", ("", "Use e.g. Numpy arrays here.", "")),
    ("add(a, b=(1, 2))\n\nAdd things.\n\nMore.", ("add(a, b=(1, 2))", "Add things.", "More.")),
    ("pop([k]) -> v\nRemove a key.", ("pop([k]) -> v", "Remove a key.", "")),
    ("Parameters\nx : int", ("", "", "Parameters\nx : int")),
    ("word " * 80, ("", "", "word " * 80)),
])
def test_summary_and_body(text, parts):
    assert split_docstring(text) == parts


def test_words_and_cuts():
    assert spoken("numpy.ma.MaskedArray.sort_byHTTPKey") == "numpy ma masked array sort by http key"
    assert shorten("one two three", 8) == "one two" and shorten("one", 8) == "one" and shorten("abcdefghij", 4) == "abcd"
    assert sentences("One is here. Two, i.e. Three, is there! and so on") == ["One is here.", "Two, i.e. Three, is there! and so on"]


# ------------------------------------------------------------------------------------------- reading


def test_what_is_read_and_what_is_skipped(tmp_path):
    doc = '"""Say something useful here."""\n'
    write(tmp_path, {
        "pkg/__init__.py": doc + "from ._impl import run as go\nfrom .stars import *\n",
        "pkg/_impl.py": 'raise SystemExit\n\ndef run(a, /, b: int = 1, *c, d=None, e=[], **f):\n    """Run it."""\n',
        "pkg/stars.py": 'class Star:\n    """A star."""\n    def __init__(self, x): pass\n    def shine(self):\n        """Shine on."""\n',
        "pkg/go.py": '"""A module under the name of a function."""\n',
        "pkg/newdocs.py": "'''Docs.'''\nadd_newdoc('pkg._impl', 'fast', \"\"\"fast(x, y)\n\nBe fast.\"\"\")\n"
                          "add_newdoc('pkg._impl', 'fast', ('size', 'How large it is.'))\n",
        "pkg/tests/test_a.py": doc, "pkg/_vendor/six.py": doc, "pkg/test_b.py": doc, "pkg/bad-name/x.py": doc,
        "pkg/broken.py": "def f(:\n    '''x'''\n", "pkg/latin.py": "", "conan_jax/__init__.py": doc, "__editable___x_finder.py": doc,
        "single.py": "if True:\n    def inner():\n        '''Stand inside a condition.'''\n",
    })
    (tmp_path / "pkg/latin.py").write_bytes(b'"""caf\xe9"""\n')
    assert [m for m, _ in find_modules([tmp_path])] == [
        "pkg", "pkg._impl", "pkg.broken", "pkg.go", "pkg.latin", "pkg.newdocs", "pkg.stars", "single"]
    docs, counts = read_docstrings([tmp_path])
    found = {d.name: d for d in docs}
    assert set(found) == {"pkg", "pkg.go", "pkg.go (module)", "pkg.Star", "pkg.Star.shine", "pkg.newdocs", "pkg._impl.fast",
                          "pkg._impl.fast.size", "single.inner"}
    assert counts == {"files": 8, "unreadable": 2, "docstrings": 9}
    assert found["pkg.go"].signature == "run(a, b=1, *c, d=None, e=..., **f)" and found["pkg.go"].kind == "function"
    assert found["pkg.go"].module == "pkg._impl" and found["pkg.Star"].signature == "Star(x)"
    assert found["pkg.Star.shine"].parent == "pkg.stars:Star"
    assert (found["pkg._impl.fast"].signature, found["pkg._impl.fast"].summary) == ("fast(x, y)", "Be fast.")
    assert heading(found["pkg.Star.shine"]) == "pkg.Star.shine()"
    assert [d for d in docs if not d.is_public] == [found["pkg._impl.fast"], found["pkg._impl.fast.size"]]


def test_a_root_that_is_no_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="nowhere"):
        find_modules([tmp_path / "nowhere"])


def test_the_shallowest_public_name_wins_and_cycles_end():
    docs = {("a._b", "f"): None, ("a.c", "g"): None}
    aliases = [("a.f", "a.x.f"), ("a.x.f", "a._b.f"), ("z.f", "a._b.f"), ("a.l", "a.m"), ("a.m", "a.l"),
               ("a.x.*", "a.x.*"), ("a.d.g", "a.c.g")]
    names = public_names(docs, aliases)
    assert names == {("a._b", "f"): "a.f", ("a.c", "g"): "a.c.g"}


def test_two_processes_read_what_one_reads(tmp_path):
    write(tmp_path, {f"many/m{i:03}.py": f'"""Module number {i} of many."""\n' for i in range(420)})
    one, two = read_docstrings([tmp_path], processes=1), read_docstrings([tmp_path], processes=2)
    assert one == two and len(one[0]) == 420


# ------------------------------------------------------------------------------------------- choosing


def doc(name, summary="Sum of it all here.", body="", module=None):
    module = module or name.rpartition(".")[0]
    return Doc(name, module, name.removeprefix(module + "."), "function", f"{name.rpartition('.')[2]}()", summary, body)


def test_equal_texts_stand_for_the_public_shallow_object():
    kept = deduplicate([doc("p._x.f"), doc("p.y.z.f"), doc("p.y.f"), doc("p.g", "Other text of it."), doc("p.h", "Two words")])
    assert {d.name for d in kept} == {"p.y.f", "p.g"}


def test_large_packages_are_cut_to_those_with_a_body():
    docs = [doc(f"big.f{i}", f"Summary number {i} here.", "A body." if i % 2 else "") for i in range(10)]
    docs.append(doc("small.f", "Small thing is here."))
    kept = balance(docs, 4)
    assert [d for d in docs if d in kept] == kept and sum(d.package == "big" for d in kept) == 4
    assert all(d.body for d in kept if d.package == "big") and kept[-1].package == "small"


def test_near_copies_of_training_texts_are_not_evaluated():
    body = " ".join(f"word{i}" for i in range(40))
    train = [doc("p.a.f", "Train on this thing here.", body)]
    copy = doc("p.b.g", "Ask for another thing here.", body + " and a bit more")
    fresh = doc("p.b.h", "Ask for a new thing here.", " ".join(f"other{i}" for i in range(40)))
    files = evaluation_set(train, [copy, fresh], document_chars=1000, max_queries=10, max_documents=10)
    assert [json.loads(line)["_id"] for line in files["corpus.jsonl"]] == ["p.b.h"]


def test_held_out_and_training_share_no_text(built):
    _, out, counts = built
    norm = lambda text: re.sub(r"\W+", " ", text.lower()).strip()  # noqa: E731
    queries, corpus = rows(out / "eval/queries.jsonl"), rows(out / "eval/corpus.jsonl")
    held = {norm(r["text"]) for r in queries + corpus}
    training = {norm(text) for name in KINDS for r in rows(out / f"{name}.jsonl")
                for value in r.values() for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)}
    assert len(queries) == counts["eval_queries"] > 10 and not held & training
    everything = " | ".join(training)
    assert not [q for q in queries if norm(q["text"]) in everything]


def test_modules_are_held_out_whole():
    docs = [doc(f"p.m{i % 40}.f{i}", f"Summary number {i} of all.", f"Body number {i} of all.") for i in range(400)]
    train, held = hold_out(docs, 25)
    assert not {d.module for d in train} & {d.module for d in held} and len(train) + len(held) == 400
    assert 4 <= len({d.module for d in held}) <= 17
    copy = doc("p.m41.copy", held[0].summary, "Something new entirely.")
    train, again = hold_out([*docs, copy], 25)
    assert copy in again or copy not in train


def test_the_evaluation_folder_is_beir(built):
    from conan_jax.eval.retrieval import read_beir

    _, out, counts = built
    data = read_beir(out / "eval")
    documents = dict(zip(data.document_ids, data.documents, strict=True))
    assert len(data.queries) == counts["eval_queries"] <= 30 and len(documents) == counts["eval_documents"] <= 60
    for query, text in zip(data.query_ids, data.queries, strict=True):
        (answer,) = data.qrels[query]
        assert text.lower().rstrip(".") not in documents[answer].lower()


# ------------------------------------------------------------------------------------------- records


def test_counts_are_those_of_the_files(built):
    _, out, counts = built
    for name in ("text", "sft", "pairs", "names", "cloze", "retrieval", "sts", "labelled", "search"):
        assert counts[name] == len(rows(out / f"{name}.jsonl")) > 0, name


def test_every_record_is_accepted_by_the_schema(built):
    from conan_jax.data.schema import parse

    _, out, _ = built
    for name, kind in KINDS.items():
        for row in rows(out / f"{name}.jsonl"):
            parsed = parse(row, kind)
            assert not parsed.dropped or kind == "retrieval", (name, row, parsed.dropped)


def test_pools_hold_lexical_neighbours_and_no_answer():
    docs = [doc(f"p.m.f{i}", f"Sort the {noun} by its keys now.",
                f"The {noun} is put in order of its keys, smallest first, and number {i} is returned at the end.")
            for i, noun in enumerate(NOUNS)]
    twin = doc("p.n.f0", "Arrange it all in order please.", docs[0].body + " Twin of the same name.")
    records = list(hard_negative_pools([*docs, twin], 100, 4, 500))
    assert len(records) == len(docs) + 1
    for record, d in zip(records, [*docs, twin], strict=True):
        assert record["query"] == d.summary and record["pos"] == [d.body]
        assert 0 < len(record["neg"]) <= 4 and d.body not in record["neg"] and len(set(record["neg"])) == len(record["neg"])
    assert twin.body not in records[0]["neg"]  # an object of the same name answers as well


def test_grades_follow_the_closest_shared_place():
    docs = [Doc(f"p{p}.m{m}.C{c}.f{f}", f"p{p}.m{m}", f"C{c}.f{f}", "method", "f()", f"Text of p{p} m{m} C{c} f{f} here.", "")
            for p in range(3) for m in range(3) for c in range(2) for f in range(3)]
    scores = {"class": 5.0, "module": 3.5, "package": 1.5, "other": 0.0}
    records = list(graded_pairs(docs, 40, scores))
    found = re.compile(r"p(\d) m(\d) C(\d) f(\d)")
    for record in records:
        a, b = (found.search(record[s]).groups() for s in ("sentence1", "sentence2"))
        expected = 5.0 if a[:3] == b[:3] else 3.5 if a[:2] == b[:2] else 1.5 if a[:1] == b[:1] else 0.0
        assert a != b and record["score"] == expected
    assert {s: sum(r["score"] == s for r in records) for s in scores.values()} == dict.fromkeys(scores.values(), 10)


# ------------------------------------------------------------------------------------------- the folder


def test_bytes_do_not_depend_on_place_order_or_compiled_files(built, tmp_path):
    root, out, counts = built
    elsewhere = tmp_path / "quite" / "another" / "place"
    write(elsewhere, dict(reversed(environment().items())))
    (elsewhere / "pack0/__pycache__").mkdir()
    (elsewhere / "pack0/__pycache__/mod00.cpython-311.pyc").write_bytes(b"\0")
    assert build_corpus(tmp_path / "out", [elsewhere], options=OPTIONS) == counts
    assert tree(tmp_path / "out") == tree(out)
    assert not any(str(root).encode() in data for data in tree(out).values())


def test_a_finished_corpus_is_kept_and_a_damaged_one_is_made_again(built, tmp_path):
    root, _, _ = built
    out = tmp_path / "out"
    counts = build_corpus(out, [root], options=OPTIONS)
    before, stamps = tree(out), {p: p.stat().st_mtime_ns for p in out.rglob("*.jsonl")}
    assert build_corpus(out, [root], options=OPTIONS) == counts
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.jsonl")} == stamps
    time.sleep(0.01)
    with open(out / "pairs.jsonl", "ab") as file:
        file.write(b"{}\n")
    assert build_corpus(out, [root], options=OPTIONS) == counts and tree(out) == before
    (out / "corpus.json").unlink()  # a build that was killed
    (out / "sts.jsonl").unlink()
    assert build_corpus(out, [root], options=OPTIONS) == counts and tree(out) == before
    changed = build_corpus(out, [root], options=CorpusOptions(**{**vars(OPTIONS), "max_queries": 5}))
    assert changed["eval_queries"] == 5


def test_too_little_documentation_is_an_error(tmp_path):
    write(tmp_path, {"pkg/__init__.py": '"""Only this one text."""\n'})
    with pytest.raises(DataError, match="too few to hold modules out"):
        build_corpus(tmp_path / "out", [tmp_path], options=OPTIONS)
    assert not os.path.exists(tmp_path / "out" / "corpus.json")
