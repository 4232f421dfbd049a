"""A build is whole, in order, repeatable, readable by TFDS alone, or it is not there."""

import dataclasses
import fcntl
import gzip
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds

from conan_jax.config import Dataset
from conan_jax.data import convert, shards
from conan_jax.data.convert import build_dataset
from conan_jax.data.manifest import read_manifest
from conan_jax.data.sources import open_source
from conan_jax.data.tfds_reader import open_builder
from conan_jax.errors import ConfigError, DataError

RECORDS = {
    "text": [{"text": "héllo\n世界"}, {"text": "b"}],
    "sft": [{"instruction": "i", "input": "", "output": "o"}, {"instruction": "", "input": "x", "output": "o"}],
    "pair": [{"query": "q", "pos": "p", "instruction": ""}, {"query": "q2", "pos": "p2", "instruction": "find"}],
    "retrieval": [{"query": "q", "pos": ["p", "p2"], "neg": ["n", "m"], "scores": [0.5, 0.25], "instruction": "find"},
                  {"query": "q2", "pos": ["p"], "neg": [], "scores": [], "instruction": ""}],
    "sts": [{"sentence1": "a", "sentence2": "b", "score": 2.5}, {"sentence1": "c", "sentence2": "d", "score": -1.0}],
    "labelled": [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(n):
    return [{"text": f"text {i}"} for i in range(n)]


def built_texts(folder):
    return [record["text"] for record in open_source(folder)]


@pytest.mark.parametrize("kind", RECORDS)
def test_tfds_alone_reads_what_was_built(tmp_path, kind):
    manifest = build_dataset(Dataset("my-set", kind, jsonl(tmp_path / "a.jsonl", RECORDS[kind])), tmp_path / "out")
    builder = tfds.builder_from_directory(tmp_path / "out")
    assert builder.info.splits["train"].num_examples == manifest.records == 2

    def python(value):
        if isinstance(value, bytes):
            return value.decode()
        return [python(v) for v in value] if hasattr(value, "__len__") else float(value)

    decoded = [{name: python(value) for name, value in example.items()} for example in builder.as_data_source("train")]
    assert decoded == RECORDS[kind] == list(open_source(tmp_path / "out"))


def test_manifest_holds_counts_hashes_and_reasons(tmp_path):
    rows = [{"query": "q", "pos": "p"},
            {"anchor": "q", "positive": "p", "negative": ["p", "n"]}, {"query": "q"}, {"query": "q", "pos": " "}]
    source = jsonl(tmp_path / "a.jsonl", rows)
    with open(source, "ab") as file:
        file.write(b'{"query": \n{"query": "\xff", "pos": "p"}\n')
    manifest = build_dataset(Dataset("d", "retrieval", source, max_reject_rate=0.9), tmp_path / "out")
    assert manifest == read_manifest(tmp_path / "out")
    assert (manifest.records, manifest.read, manifest.rejected) == (2, 6, 4)
    assert manifest.rejects == {"broken_json": 1, "empty_text": 1, "invalid_utf8": 1, "missing_field": 1}
    assert manifest.dialects == {"query-pos": 1, "sentence-transformers": 1}
    assert manifest.dropped == {"negative_equals_positive": 1}
    (file,), (shard,) = manifest.files, manifest.shards
    assert file.sha256 == hashlib.sha256((tmp_path / "a.jsonl").read_bytes()).hexdigest() and file.bytes == os.path.getsize(source)
    assert shard.sha256 == hashlib.sha256((tmp_path / "out" / shard.file).read_bytes()).hexdigest() and shard.records == 2
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert [(r["location"], r["reason"]) for r in rejects] == [
        (f"{source}:3", "missing_field"), (f"{source}:4", "empty_text"), (f"{source}:5", "broken_json"), (f"{source}:6", "invalid_utf8")]
    assert rejects[0]["raw"] == '{"query": "q"}' and rejects[2]["raw"] == '{"query": ' and all(r["detail"] for r in rejects)


def test_too_many_rejects_fail_and_leave_the_reasons(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", texts(97) + [{"text": ""}] * 2 + [{"tekst": "x"}])
    with pytest.raises(DataError, match="3 of the 100 ") as caught:
        build_dataset(Dataset("d", "text", source, max_reject_rate=0.02), tmp_path / "out")
    kept = tmp_path / "out.rejects.jsonl"
    said = str(caught.value)
    assert str(kept) in said and len(kept.read_text().splitlines()) == 3 and "--max-reject-rate" in said and "--field" in said
    assert re.search(r"  2 empty_text: .*\n    first at .*a.jsonl:98: text is empty\n"
                     r"  1 missing_field: .*\n    first at .*a.jsonl:100: found tekst", said)
    assert not (tmp_path / "out").exists()
    assert build_dataset(Dataset("d", "text", source, max_reject_rate=0.03), tmp_path / "out").records == 97
    assert not kept.exists()
    with pytest.raises(DataError, match="3 of the 100"):  # an existing build is no way round a lower limit
        build_dataset(Dataset("d", "text", source, max_reject_rate=0.02), tmp_path / "out")


def test_a_source_that_is_all_wrong_is_not_read_to_its_end(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"x": 1}] * 3000)
    with pytest.raises(DataError, match="1,000 of the 1,000 records read"):
        build_dataset(Dataset("d", "text", source), tmp_path / "out")


def test_deeply_nested_records_are_rejects(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ' * 900 + "1" + "}" * 900 + "\n" + '{"text": {"text": {"text": "x"}}}\n' + '{"text": "ok"}\n')
    assert build_dataset(Dataset("d", "text", str(path), max_reject_rate=0.9), tmp_path / "out").rejects == {"wrong_type": 2}


@pytest.mark.parametrize(("rows", "said"), [([], "holds no records"), ([{"text": ""}], "1 of the 1 records")])
def test_a_dataset_is_never_empty(tmp_path, rows, said):
    with pytest.raises(DataError, match=said):
        build_dataset(Dataset("d", "text", jsonl(tmp_path / "a.jsonl", rows), max_reject_rate=1.0), tmp_path / "out")


@pytest.mark.parametrize(("num_shards", "counts"), [(None, [10]), (1, [10]), (3, [3, 3, 4]), (99, [1] * 10)])
def test_shards_keep_the_order_of_the_source(tmp_path, num_shards, counts):
    manifest = build_dataset(Dataset("d", "text", jsonl(tmp_path / "a.jsonl", texts(10))), tmp_path / "out", num_shards=num_shards)
    assert [shard.records for shard in manifest.shards] == counts
    assert built_texts(tmp_path / "out") == [f"text {i}" for i in range(10)]
    assert sorted(os.listdir(tmp_path / "out")) == sorted(
        ["dataset_info.json", "features.json", "manifest.json", "rejects.jsonl", *(shard.file for shard in manifest.shards)])


def test_a_full_shard_starts_another(tmp_path, monkeypatch):
    monkeypatch.setattr(shards.ShardWriter.__init__, "__defaults__", (100,))
    manifest = build_dataset(Dataset("d", "text", jsonl(tmp_path / "a.jsonl", texts(50))), tmp_path / "out")
    assert len(manifest.shards) > 5 and built_texts(tmp_path / "out") == [f"text {i}" for i in range(50)]
    manifest = build_dataset(Dataset("d", "text", str(tmp_path / "a.jsonl")), tmp_path / "out", num_shards=2)
    assert [shard.records for shard in manifest.shards] == [25, 25] and built_texts(tmp_path / "out") == [f"text {i}" for i in range(50)]


def test_files_come_in_the_order_of_their_names_and_twice_gives_the_same_bytes(tmp_path):
    (tmp_path / "in").mkdir()
    jsonl(tmp_path / "in/b.jsonl", [{"text": "b"}])
    jsonl(tmp_path / "in/a.jsonl", [{"text": "a"}])
    (tmp_path / "in/c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "c"}'))
    one = build_dataset(Dataset("d", "text", f"{tmp_path}/in"), tmp_path / "one")
    two = build_dataset(Dataset("d", "text", f"{tmp_path}/in"), tmp_path / "two")
    assert built_texts(tmp_path / "one") == ["a", "b", "c"]
    assert one == two


def test_limit_counts_good_records(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"text": ""}, *texts(10)])
    manifest = build_dataset(Dataset("d", "text", source, limit=4, max_reject_rate=0.5), tmp_path / "out")
    assert (manifest.records, manifest.read) == (4, 5)


def test_built_once_until_something_changes(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", texts(3))
    dataset, out = Dataset("d", "text", source), tmp_path / "out"

    said = []

    def inode():
        return os.stat(out).st_ino

    build_dataset(dataset, out, say=said.append)
    first = inode()
    build_dataset(dataset, out)
    os.utime(source)  # touched, but the same bytes
    build_dataset(dataset, out, say=said.append)
    assert inode() == first and said == []
    build_dataset(dataset, out, force=True)
    assert (second := inode()) != first
    jsonl(tmp_path / "a.jsonl", texts(2) + [{"text": "text X"}])  # the same size
    assert build_dataset(dataset, out, say=said.append).records == 3
    assert "has changed" in said.pop()
    assert (third := inode()) != second and built_texts(out)[-1] == "text X"
    build_dataset(dataclasses.replace(dataset, limit=2), out, say=said.append)
    assert "3 text records" in said.pop()
    assert (fourth := inode()) != third
    (shard,) = read_manifest(out).shards
    (out / shard.file).write_bytes(b"cut")
    build_dataset(dataclasses.replace(dataset, limit=2), out, say=said.append)
    assert "is truncated" in (last := said.pop()) and last.endswith("building it again from its source") and not said
    assert inode() != fourth and built_texts(out) == ["text 0", "text 1"]


def test_a_built_dataset_outlives_its_source(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", texts(3))
    manifest = build_dataset(Dataset("d", "text", source), tmp_path / "out")
    os.unlink(source)
    said = []
    assert build_dataset(Dataset("d", "text", source), tmp_path / "out", say=said.append) == manifest
    assert "no file matches" in said[0] and "already built" in said[0]
    with pytest.raises(DataError, match="no file matches"):
        build_dataset(Dataset("d", "text", source), tmp_path / "out", force=True)
    assert built_texts(tmp_path / "out") == ["text 0", "text 1", "text 2"]


@pytest.mark.parametrize("content", [{"notes.txt": "mine"}, {"manifest.json": '{"name": "a web app"}'}, {"manifest.json": "{"}])
def test_other_peoples_folders_are_left_alone(tmp_path, content):
    (tmp_path / "out").mkdir()
    for name, text in content.items():
        (tmp_path / "out" / name).write_text(text)
    with pytest.raises(DataError, match="not a dataset built by conan"):
        build_dataset(Dataset("d", "text", jsonl(tmp_path / "a.jsonl", texts(1))), tmp_path / "out", force=True)
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == content


def test_fields_that_fit_no_record(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", [{"query": "q", "pos": "p", "neg": ["n"]}])
    with pytest.raises(DataError, match="neg to 'negs', but no record"):
        build_dataset(Dataset("d", "retrieval", source, {"neg": "negs"}), tmp_path / "out")
    with pytest.raises(DataError, match=r"'pos\+body', but no record of \S+ has body"):
        build_dataset(Dataset("d", "pair", source, {"pos": "pos+body"}), tmp_path / "out")
    with pytest.raises(ConfigError, match="fields maps 'negative'"):
        build_dataset(Dataset("d", "retrieval", source, {"negative": "neg"}), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*building*"))


def test_a_source_that_grows_while_it_is_read_is_refused(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", texts(600))

    def grow(_):
        with open(source, "a") as file:
            file.write('{"text": "late"}\n')

    with pytest.raises(DataError, match="changed while it was being read"):
        build_dataset(Dataset("d", "text", source), tmp_path / "out", progress=grow)
    assert not (tmp_path / "out").exists()


def test_progress_reaches_the_end(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", texts(1000))
    seen = []
    build_dataset(Dataset("d", "text", source), tmp_path / "out", progress=seen.append)
    assert len(seen) >= 4 and [p.records for p in seen] == sorted(p.records for p in seen)
    assert seen[-1].records == 1000 and seen[-1].done == seen[-1].total == os.path.getsize(source)


_KILLED = textwrap.dedent("""
    import os, signal, sys
    from conan_jax.config import Dataset
    from conan_jax.data import convert

    source, out, when = sys.argv[1:]
    def die(*_): os.kill(os.getpid(), signal.SIGKILL)
    if when == "reading": progress = die
    else:
        progress = None
        replace, calls = os.replace, []
        def dying(a, b):
            if str(b).startswith(out) and os.path.isdir(a) or str(a) == out:
                calls.append(a)
                if len(calls) == int(when): die()
            replace(a, b)
        convert.os.replace = dying
    convert.build_dataset(Dataset("d", "text", source), out, progress=progress)
    print("finished")
""")


@pytest.mark.parametrize("when", ["reading", "1", "2"])
def test_kill_9_leaves_the_old_dataset_or_none_and_the_next_build_succeeds(tmp_path, when):
    out = tmp_path / "out"
    build_dataset(Dataset("d", "text", jsonl(tmp_path / "a.jsonl", texts(300))), out)
    jsonl(tmp_path / "a.jsonl", texts(600))
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "a.jsonl"), str(out), when], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists() or len(built_texts(out)) == 300
    assert build_dataset(Dataset("d", "text", str(tmp_path / "a.jsonl")), out).records == 600
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "a.jsonl", "out"]


def test_the_old_dataset_comes_back_if_its_replacement_was_killed(tmp_path):
    source = jsonl(tmp_path / "a.jsonl", texts(3))
    build_dataset(Dataset("d", "text", source), tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / ".out.old")
    os.unlink(source)
    assert build_dataset(Dataset("d", "text", source), tmp_path / "out").records == 3


def test_two_builders_of_one_folder_take_turns(tmp_path):
    code = ("import sys; from conan_jax.config import Dataset; from conan_jax.data.convert import build_dataset; "
            "print(build_dataset(Dataset('d', 'text', sys.argv[1]), sys.argv[2]).records)")
    source = jsonl(tmp_path / "a.jsonl", texts(50))
    with open(tmp_path / ".out.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = subprocess.Popen([sys.executable, "-c", code, source, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(4)
        assert not (tmp_path / "out").exists()
    assert other.communicate(timeout=60)[0].strip() == "50"


class Questions(tfds.core.GeneratorBasedBuilder):
    """A TFDS dataset with the features public sets have: nested answers, a class label, a score."""

    VERSION = tfds.core.Version("1.0.0")
    __module__ = "questions"  # TFDS looks for files beside the code of a builder inside a package

    def _info(self):
        f = tfds.features
        return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict({
            "question": f.Text(), "context": np.str_, "answers": f.Sequence({"text": f.Text(), "answer_start": np.int32}),
            "label": f.ClassLabel(names=["no", "yes"]), "score": np.float32}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5), "test": self._generate_examples(2)}

    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"question": f"question {i}?", "context": f"Kontext {i} é", "label": i % 2, "score": i / 2,
                      "answers": [] if i == 4 else {"text": [f"answer {i}", "other"], "answer_start": [0, 3]}}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))  # TFDS leaves a folder there
        Questions(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.mark.parametrize(("kind", "fields", "want"), [
    ("pair", {"query": "question", "pos": "context"}, {"query": "question 3?", "pos": "Kontext 3 é", "instruction": ""}),
    ("labelled", {"text": "question"}, {"text": "question 3?", "label": "yes"}),
    ("sts", {"sentence1": "question", "sentence2": "context"}, {"sentence1": "question 3?", "sentence2": "Kontext 3 é", "score": 1.5})])
def test_tfds_by_name(tmp_path, tfds_dir, kind, fields, want):
    manifest = build_dataset(Dataset("d", kind, "tfds:questions:train", fields), tmp_path / "out", tfds_data_dir=str(tfds_dir))
    source = open_source(tmp_path / "out")
    assert manifest.records == 5 and want in list(source)


def test_tfds_by_folder_with_a_dotted_path(tmp_path, tfds_dir):
    fields = {"query": "question", "pos": "answers.text.0"}
    dataset = Dataset("d", "pair", f"tfds:{tfds_dir}/questions/1.0.0:train", fields, max_reject_rate=0.2)
    manifest = build_dataset(dataset, tmp_path / "out")
    assert manifest.rejects == {"missing_field": 1} and manifest.records == 4
    assert {r["query"]: r["pos"] for r in open_source(tmp_path / "out")} == {f"question {i}?": f"answer {i}" for i in range(4)}
    reject = json.loads((tmp_path / "out/rejects.jsonl").read_text())
    assert reject["location"].startswith(f"tfds:{tfds_dir}/questions/1.0.0:train[") and "question 4?" in reject["raw"]


def test_a_tfds_set_not_yet_prepared_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert not open_builder("questions", str(tmp_path / "data")).is_prepared()
    assert os.listdir(tmp_path) == [] and tempfile.gettempdir() == str(tmp_path)


def test_temporary_files_of_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made, info = [], Questions._info
    monkeypatch.setattr(Questions, "_info", lambda self: made.append(tempfile.mkstemp()[1]) or info(self))
    open_builder("questions", str(tmp_path / "data"))
    assert made and all(os.path.exists(file) for file in made)


@pytest.mark.parametrize(("source", "said"), [
    ("tfds:questions", "must be tfds:NAME"), ("tfds:questions:nosplit", "check the name, the split"),
    ("tfds:no_such_set:train", "check the name"),
    ("tfds:/no/such/dir:train", "check the name")])
def test_tfds_that_is_not_there(tmp_path, tfds_dir, source, said):
    with pytest.raises(DataError, match=said):
        build_dataset(Dataset("d", "text", source), tmp_path / "out", tfds_data_dir=str(tfds_dir))


def test_a_shard_that_lost_records_on_its_way_to_disk_is_noticed(tmp_path, monkeypatch):
    class Lossy(convert.shards.ArrayRecordWriter):
        def write(self, data):
            if b"text 1" not in data:
                super().write(data)

    monkeypatch.setattr(convert.shards, "ArrayRecordWriter", Lossy)
    with pytest.raises(DataError, match="holds 2 of the 3 records"):
        build_dataset(Dataset("d", "text", jsonl(tmp_path / "a.jsonl", texts(3))), tmp_path / "out")


def test_a_full_disk_is_an_error_without_a_traceback(tmp_path, monkeypatch):
    class Full(convert.shards.ArrayRecordWriter):
        def close(self):
            super().close()
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(convert.shards, "ArrayRecordWriter", Full)
    with pytest.raises(DataError, match="No space left on device; check that the disk has room"):
        build_dataset(Dataset("d", "text", jsonl(tmp_path / "a.jsonl", texts(3))), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.lock", "a.jsonl"]
