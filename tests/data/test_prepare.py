import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conan_jax import config as c
from conan_jax.data import locations
from conan_jax.data.convert import build_dataset, named_dataset
from conan_jax.data.packing import open_packed
from conan_jax.data.pipeline import Pipeline
from conan_jax.data.prepare import prepare, prepare_tokenizer
from conan_jax.data.prepared import Prepared
from conan_jax.data.sources import open_source
from conan_jax.data.tokenizer import Tokenizer
from conan_jax.errors import ConfigError, DataError
from tests.data.corpus import sentences

LINES = sentences(400)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


@pytest.fixture
def run(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    write(raw / "docs.jsonl", [{"text": line} for line in LINES])
    write(raw / "chat.jsonl", [{"instruction": "say", "input": LINES[i], "output": LINES[-1 - i]} for i in range(40)])
    write(raw / "pairs.jsonl", [{"query": LINES[i][:12], "pos": [LINES[i]]} for i in range(60)])
    write(raw / "unused.jsonl", [{"text": "x"}])
    return make_run(raw, tmp_path / "data")


def make_run(raw, data_dir):
    kinds = {"docs": "text", "chat": "sft", "pairs": "pair", "unused": "text"}
    stages = (
        c.LMStage(name="pretrain", kind="pretrain", datasets=(c.Mix("docs"),), steps=2, global_batch_size=8, sequence_length=32),
        c.LMStage(name="sft", kind="sft", datasets=(c.Mix("chat"),), steps=2, global_batch_size=8, sequence_length=64),
        c.WeakStage(name="weak", datasets=(c.Mix("pairs"),), steps=2, global_batch_size=8, buckets=(c.Bucket(8, 24), c.Bucket(16, 64))),
    )
    return c.Run(
        name="t", stages=stages, datasets=tuple(c.Dataset(name, kind, str(raw / f"{name}.jsonl")) for name, kind in kinds.items()),
        model=c.Model(vocab_size=512, hidden_size=32, num_heads=2, num_kv_heads=1, max_length=64),
        tokenizer=c.Tokenizer(vocab_size=500, datasets=("docs",)), data_dir=str(data_dir), output_dir=str(raw.parent / "run"),
    )


def snapshot(run):
    """Every file of the prepared data and when it was written."""
    from pathlib import Path

    return {str(p.relative_to(run.data_dir)): p.stat().st_mtime_ns
            for p in Path(run.data_dir).rglob("*") if p.is_file() and not p.name.endswith(".lock")}


def first_parts(changed):
    """The kinds of parts that changed: a folder of ours, or the name of a dataset."""
    return {re.sub(r"-[0-9a-f]{12}$", "", name.split("/")[0]) for name in changed}


def test_everything_a_run_reads_is_made_once(run):
    made = prepare(run)
    assert set(made.datasets) == {"docs", "chat", "pairs"} and set(made.packed) == {("pretrain", "docs"), ("sft", "chat")}
    assert made.tokenizer.vocab_size == 500
    before = snapshot(run)
    assert first_parts(before) == {"docs", "chat", "pairs", "tokenizers", "packed", "indexes"}
    again = prepare(run)
    assert snapshot(run) == before and again.tokenizer.sha256 == made.tokenizer.sha256
    for stage in run.stages:
        batch = Pipeline(run, stage, made.tokenizer).batch(1)
        assert batch["ids"].shape == (8,)


def test_prepared_and_in_memory_records_give_the_same_batches(run):
    made = prepare(run)
    weak = run.stage("weak")
    records = [{"query": LINES[i][:12], "pos": LINES[i], "instruction": ""} for i in range(60)]
    memory = Pipeline(run, weak, made.tokenizer, sources={"pairs": records})
    prepared = Pipeline(run, weak, made.tokenizer)
    for step in range(4):
        for side in ("query", "positive"):
            np.testing.assert_array_equal(prepared.batch(step)[side]["tokens"], memory.batch(step)[side]["tokens"])


@pytest.mark.parametrize("change, remade", [
    (lambda run: dataclasses.replace(run, tokenizer=c.Tokenizer(vocab_size=480, datasets=("docs",))), {"tokenizers", "packed", "indexes"}),
    (lambda run: dataclasses.replace(run, stages=(dataclasses.replace(run.stages[0], sequence_length=48), *run.stages[1:])), {"packed"}),
    (lambda run: dataclasses.replace(run, seed=5), set()),
])
def test_a_change_makes_what_depends_on_it_beside_what_was_there(run, change, remade):
    prepare(run)
    before = snapshot(run)
    prepare(change(run))
    after = snapshot(run)
    assert first_parts(after.keys() - before.keys()) == remade
    assert before.items() <= after.items()
    prepare(run)
    assert snapshot(run) == after  # both recipes are prepared


def test_changed_records_remake_their_rows(run, tmp_path):
    prepare(run)
    before = open_packed(prepare(run).packed["sft", "chat"]).manifest.settings["fingerprint"]
    tokens = prepare(run).tokenizer.sha256
    write(tmp_path / "raw" / "chat.jsonl", [{"instruction": "say", "input": LINES[i], "output": LINES[i + 1]} for i in range(30)])
    made = prepare(run)
    assert open_packed(made.packed["sft", "chat"]).manifest.settings["fingerprint"] != before
    assert made.tokenizer.sha256 == tokens
    write(tmp_path / "raw" / "docs.jsonl", [{"text": line.upper()} for line in LINES])
    assert prepare(run).tokenizer.sha256 != tokens


def test_a_ready_tokenizer_is_used_as_it_is(run, tmp_path):
    folder, trained = prepare_tokenizer(run)
    ready = c.Tokenizer(path=str(folder))
    other = dataclasses.replace(run, data_dir=str(tmp_path / "other"), tokenizer=ready)
    assert prepare(other).tokenizer.sha256 == trained.sha256
    assert not (tmp_path / "other" / "tokenizers").exists()


def test_a_damaged_tokenizer_is_trained_again(run):
    folder, tokenizer = prepare_tokenizer(run)
    with open(folder / "tokenizer.model", "r+b") as file:
        file.write(b"garbage")
    again, same = prepare_tokenizer(run)
    assert again == folder and same.sha256 == tokenizer.sha256 == Tokenizer.load(folder).sha256


def test_what_cannot_train_is_refused_before_training(run):
    weak = dataclasses.replace(run.stages[2], global_batch_size=64)
    with pytest.raises(DataError, match="'pairs' holds 60 records, fewer than the global batch of 64"):
        prepare(dataclasses.replace(run, stages=(*run.stages[:2], weak)))
    folder, _ = prepare_tokenizer(run)
    big = dataclasses.replace(run, tokenizer=c.Tokenizer(path=str(folder)),
                              model=dataclasses.replace(run.model, vocab_size=490))
    with pytest.raises(ConfigError, match="500 tokens but model.vocab_size is 490"):
        prepare(big)


def test_a_dataset_cannot_have_the_name_of_one_of_our_folders(run):
    datasets = (*run.datasets, c.Dataset("packed", "text", run.datasets[0].source))
    weak = dataclasses.replace(run.stages[0], datasets=(c.Mix("packed"),))
    with pytest.raises(ConfigError, match="'packed'"):
        prepare(dataclasses.replace(run, datasets=datasets, stages=(weak,)))


def test_docstring_sources_look_at_the_corpus_once(run, monkeypatch):
    from conan_jax.data import docstrings

    looked = []

    def installed_corpus(data_dir, _):
        looked.append(data_dir)
        (data_dir / "corpus").mkdir(parents=True)
        write(data_dir / "corpus" / "text.jsonl", [{"text": line} for line in LINES])
        write(data_dir / "corpus" / "pairs.jsonl", [{"query": line[:12], "pos": line} for line in LINES])
        return data_dir / "corpus"

    monkeypatch.setattr(docstrings, "installed_corpus", installed_corpus)
    sources = {"docs": "docstrings:text", "pairs": "docstrings:pairs"}
    datasets = tuple(dataclasses.replace(d, source=sources.get(d.name, d.source)) for d in run.datasets)
    prepare(dataclasses.replace(run, datasets=datasets))
    assert len(looked) == 1


KILLED = """
import pathlib, sys
from conan_jax.data.prepare import prepare
from tests.data.test_prepare import make_run
prepare(make_run(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])))
"""


def test_killed_at_any_moment_the_same_command_ends_in_the_same_data(run, tmp_path):
    whole = prepare(run)
    victim = dataclasses.replace(run, data_dir=str(tmp_path / "victim"))
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    for delay in (0.05, 0.2, 0.5):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "raw"), victim.data_dir], env=environment)
        deadline = time.perf_counter() + 60
        while not os.path.isdir(victim.data_dir) and process.poll() is None and time.perf_counter() < deadline:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    made = prepare(victim)
    assert made.tokenizer.sha256 == whole.tokenizer.sha256
    for key, folder in made.packed.items():
        assert [s.sha256 for s in open_packed(folder).manifest.shards] == [s.sha256 for s in open_packed(whole.packed[key]).manifest.shards]
    hidden = {name for name in snapshot(victim) if "/." in f"/{name}"}
    assert not hidden and first_parts(snapshot(victim)) == first_parts(snapshot(run))


def test_progress_is_shown_only_for_work_done(run):
    from io import StringIO

    from rich.console import Console

    first, second = StringIO(), StringIO()
    prepare(run, console=Console(file=first, width=120))
    prepare(run, console=Console(file=second, width=120))
    assert "packing docs for pretrain" in first.getvalue() and "tokenizer" in first.getvalue() and "100%" in first.getvalue()
    assert second.getvalue() == ""


def test_a_limited_dataset_shows_the_rate_of_what_was_read():
    """A bar that jumps to its end would show the rate of the jump."""
    from io import StringIO

    from rich.console import Console

    from conan_jax.data.prepare import _bar

    with _bar(Console(file=(drawn := StringIO()), width=120, force_terminal=True), "dataset docs", "bytes") as advance:
        for done in (0, 10, 20):
            advance(done, 10**15)
            time.sleep(0.15)
    last = [line for line in drawn.getvalue().splitlines() if "100%" in line][-1]
    assert int(re.search(r"([\d,]+) bytes/s", last)[1].replace(",", "")) < 10**5


@pytest.mark.parametrize("absolute", [False, True])
def test_the_folder_of_a_built_dataset_is_a_source(run, tmp_path, monkeypatch, absolute):
    plain = prepare(run)
    monkeypatch.chdir(tmp_path)
    build_dataset(run.dataset("pairs"), "built/questions")
    place = str(tmp_path / "built/questions") if absolute else "built/questions"
    named = dataclasses.replace(run.dataset("pairs"), source=place)
    datasets = tuple(named if d.name == "pairs" else d for d in run.datasets)
    other = dataclasses.replace(run, datasets=datasets, output_dir=str(tmp_path / "named"))
    prepared = prepare(other)
    ours, theirs = open_source(prepared.dataset("pairs")), open_source(plain.dataset("pairs"))
    assert [ours[i] for i in range(len(ours))] == [theirs[i] for i in range(len(theirs))]
    assert prepared.dataset("pairs").absolute() == tmp_path / "built/questions"
    assert Prepared.load(other).dataset("pairs").absolute() == tmp_path / "built/questions"
    prepare(other, begun=["weak"])  # the same records again
    build_dataset(dataclasses.replace(run.dataset("pairs"), limit=30), "built/questions", force=True)
    with pytest.raises(ConfigError, match="'pairs'"):
        prepare(other, begun=["weak"])


@pytest.mark.parametrize(("change", "named"), [
    ({"kind": "sts"}, "kind"), ({"limit": 3}, "limit"), ({"fields": {"query": "pos"}}, "fields"), ({"clean": "html"}, "clean"),
])
def test_a_built_dataset_as_a_source_is_used_as_it_is(run, tmp_path, change, named):
    build_dataset(run.dataset("pairs"), tmp_path / "built")
    with pytest.raises(ConfigError, match=named):
        named_dataset(dataclasses.replace(run.dataset("pairs"), source=str(tmp_path / "built"), **change))
    two = dataclasses.replace(run.dataset("pairs"), source=f"{tmp_path / 'built'};{run.dataset('pairs').source}")
    for source in (two.source, str(tmp_path / "built")):
        with pytest.raises(DataError, match="built"):
            build_dataset(dataclasses.replace(two, source=source), tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_names_with_signs_of_the_syntax_are_read_where_they_exist(run, tmp_path):
    raw = tmp_path / "a;b$UNSET_HERE.jsonl"
    raw.write_bytes(Path(run.dataset("docs").source).read_bytes())
    docs = dataclasses.replace(run.dataset("docs"), source=str(raw))
    changed = dataclasses.replace(run, datasets=(docs, *run.datasets[1:]), output_dir=str(tmp_path / "other"))
    assert prepare(changed).datasets["docs"] == prepare(run).datasets["docs"]
    with pytest.raises(DataError, match="UNSET_HERE"):
        locations.expand_variables("$UNSET_HERE/x")
