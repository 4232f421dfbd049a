"""Prepared data that runs share and that checkpoints depend on: made at once by several, compared before anything is built."""

import dataclasses
import errno
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conan_jax import config as c
from conan_jax.config_io import start_from, to_dict
from conan_jax.data import artifacts
from conan_jax.data.pipeline import Pipeline
from conan_jax.data.prepare import prepare
from conan_jax.data.prepared import Prepared
from conan_jax.errors import ConfigError
from tests.data.test_prepare import LINES, run, snapshot, write  # noqa: F401 - `run` is a fixture

BEGUN = ("pretrain", "sft", "weak")


def contents(run):
    """Bytes of every prepared file but the descriptions, which hold times."""
    return {str(path.relative_to(run.data_dir)): path.read_bytes() for path in Path(run.data_dir).rglob("*")
            if path.is_file() and path.name not in ("manifest.json", "dataset_info.json") and not path.name.endswith(".lock")}


@pytest.mark.parametrize("locks", [True, False])
def test_many_prepare_at_once_in_one_place(run, tmp_path, monkeypatch, locks):  # noqa: F811
    """Threads have equal process ids; two recipes, each by two of them, with and without locks of the file system."""
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if not locks:
        monkeypatch.setattr(artifacts.fcntl, "flock", no_locks)
    other = dataclasses.replace(run, tokenizer=c.Tokenizer(vocab_size=480, datasets=("docs", "chat")))
    recipes = [dataclasses.replace(recipe, output_dir=str(tmp_path / f"run{i}")) for i, recipe in enumerate((run, other, run, other))]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(prepare, recipes))
    assert [m.tokenizer.sha256 for m in made[:2]] == [m.tokenizer.sha256 for m in made[2:]]
    assert [(m.datasets, m.packed) for m in made[:2]] == [(m.datasets, m.packed) for m in made[2:]]
    alone = dataclasses.replace(run, data_dir=str(tmp_path / "alone"))
    for recipe in (alone, dataclasses.replace(other, data_dir=alone.data_dir)):
        prepare(recipe)
    assert contents(run) == contents(alone)


@pytest.mark.parametrize("change, named", [
    ("records", "'docs'"), ("limit", "'chat'"), ("vocabulary", "vocab_size"), ("rows", "sequence_length"),
])
def test_what_begun_stages_depend_on_is_compared_before_anything_is_built(run, tmp_path, change, named):  # noqa: F811
    prepare(run)
    before, record = snapshot(run), (tmp_path / "run" / "prepared.json").read_bytes()
    changed = {
        "records": run,
        "limit": dataclasses.replace(run, datasets=tuple(dataclasses.replace(d, limit=30) if d.name == "chat" else d for d in run.datasets)),
        "vocabulary": dataclasses.replace(run, tokenizer=dataclasses.replace(run.tokenizer, vocab_size=480)),
        "rows": dataclasses.replace(run, stages=(dataclasses.replace(run.stages[0], sequence_length=48), *run.stages[1:])),
    }[change]
    kept = (tmp_path / "raw" / "docs.jsonl").read_bytes()
    if change == "records":
        write(tmp_path / "raw" / "docs.jsonl", [{"text": line.upper()} for line in LINES])
    with pytest.raises(ConfigError, match=named):
        prepare(changed, begun=BEGUN)
    assert snapshot(run) == before and (tmp_path / "run" / "prepared.json").read_bytes() == record
    elsewhere = dataclasses.replace(changed, output_dir=str(tmp_path / "second"))
    prepare(elsewhere)  # the remedies of the message: another run in the same data_dir, and the data put back
    (tmp_path / "raw" / "docs.jsonl").write_bytes(kept)
    prepare(run, begun=BEGUN)
    assert json.loads((tmp_path / "run" / "prepared.json").read_bytes()) == json.loads(record)


def test_only_the_stages_that_run_are_prepared(run):  # noqa: F811
    made = prepare(run, stages=["weak"])
    assert set(made.datasets) == {"docs", "pairs"} and not made.packed  # docs: the tokenizer learns from it
    prepare(run, begun=["weak"], stages=["sft"])
    loaded = Prepared.load(run)
    assert set(loaded.datasets) == {"docs", "pairs", "chat"} and set(loaded.packed) == {("sft", "chat")}


def test_a_run_of_an_earlier_version_goes_on(run, tmp_path):  # noqa: F811
    """One folder for each name, and no prepared.json."""
    made, data = prepare(run), Path(run.data_dir)
    for name, folder in made.datasets.items():
        folder.rename(data / name)
    for (stage, name), folder in made.packed.items():
        (data / "packed" / stage).mkdir()
        folder.rename(data / "packed" / stage / name)
    [tokenizer] = (data / "tokenizers").glob("[0-9a-f]*")
    tokenizer.rename(data / "tokenizer")
    (tmp_path / "run" / "prepared.json").unlink()
    before = snapshot(run)
    again = prepare(run, begun=BEGUN)
    assert snapshot(run) == before and again.datasets["docs"] == data / "docs" and again.packed["sft", "chat"] == data / "packed/sft/chat"
    write(tmp_path / "raw" / "pairs.jsonl", [{"query": LINES[i], "pos": [LINES[i]]} for i in range(60)])
    with pytest.raises(ConfigError, match="'pairs'"):
        prepare(run, begun=BEGUN)


def test_a_moved_run_finds_its_parts(run, tmp_path):  # noqa: F811
    within = dataclasses.replace(run, data_dir=f"{run.output_dir}/data")
    made = prepare(within)
    (tmp_path / "run" / "config.json").write_text(json.dumps(to_dict(within)))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = dataclasses.replace(within, output_dir=str(tmp_path / "moved"), data_dir=str(tmp_path / "moved" / "data"))
    assert Prepared.load(moved).tokenizer.sha256 == made.tokenizer.sha256
    assert Pipeline(moved, moved.stages[0], made.tokenizer).batch(0)["ids"].shape == (8,)
    started = start_from(within, str(tmp_path / "moved"))
    assert Path(started.tokenizer.path).is_relative_to(tmp_path / "moved")


def test_damaged_shards_of_a_begun_run_are_built_again(run):  # noqa: F811
    made = prepare(run)
    [shard] = made.datasets["pairs"].glob("*.array_record*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert prepare(run, begun=BEGUN).datasets == made.datasets and shard.read_bytes() == whole


def test_a_damaged_index_is_made_again(run):  # noqa: F811
    made = prepare(run)
    [index] = Path(run.data_dir, "indexes").glob("*.npz")
    whole = index.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        index.write_bytes(damaged)
        assert prepare(run).tokenizer.sha256 == made.tokenizer.sha256 and index.stat().st_size == len(whole)
