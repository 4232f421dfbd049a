"""What a person does to a run folder: one stage alone, anew, stopped from outside. On a recipe of two small stages."""

import dataclasses
import json
import os
import signal
import sys
import textwrap

import pytest
from rich.console import Console

from conan_jax import Encoder, config_io
from conan_jax.cli import main
from conan_jax.cli.recipe import Recipe
from conan_jax.errors import ConfigError

RECIPE = """
from conan_jax.config import *

def get_config(variant):
    pairs = Dataset("p", "pair", {source!r})
    tiny = Model(vocab_size=400, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=1, max_length=32,
                 compute_dtype="float32", scan_layers=False, remat="none")
    def stage(name):
        return WeakStage(name=name, datasets=(Mix("p"),), steps=2, global_batch_size=4, buckets=(Bucket(8, 8),), checkpoint_every=1)
    return Run(name="r", output_dir={out!r}, datasets=(pairs,), model=tiny, tokenizer=Tokenizer(vocab_size=300),
               mesh=Mesh(data=1, fsdp=1), stages=(stage("first"), stage("second"), stage("third")))
"""


@pytest.fixture
def recipe(tmp_path):
    source = tmp_path / "p.jsonl"
    words = "array sum file read write socket tensor gradient parse date sort key".split()
    records = [{"query": f"{a} {b}", "pos": f"how to {b} the {a} {i}"} for i, (a, b) in enumerate(zip(words * 3, words[5:] * 6))]
    source.write_text("\n".join(map(json.dumps, records)))
    file = tmp_path / "recipe.py"
    file.write_text(textwrap.dedent(RECIPE).format(source=str(source), out=str(tmp_path / "run")))
    return file


def conan(monkeypatch, capsys, *arguments):
    """Exit code and output of `conan ARGUMENTS`."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr("sys.argv", ["conan", *map(str, arguments)])
    monkeypatch.setattr("os._exit", sys.exit)
    try:
        with pytest.raises(SystemExit) as stop:
            main.run()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    printed = capsys.readouterr()
    return stop.value.code or 0, printed.out, printed.err


def test_stages_alone_and_anew(recipe, monkeypatch, capsys):
    run = recipe.parent / "run"
    code, _, err = conan(monkeypatch, capsys, "train", recipe, "--stage", "second")
    assert code == 78 and "starts from stage 'first', which has no checkpoint" in err and not (run / "second").exists()

    code, out, _ = conan(monkeypatch, capsys, "train", recipe)
    assert code == 0 and "no evaluations" in out and "Held-out" not in out
    untouched = (run / "first" / "metrics.jsonl").read_bytes()

    # What descends from a stage that is trained anew may not stay as if nothing had happened.
    code, out, _ = conan(monkeypatch, capsys, "train", recipe, "--stage", "second", "--fresh")
    assert code == 0 and "forgotten: second, third" in out and not (run / "third").exists()
    assert (run / "second" / "checkpoints").exists() and (run / "first" / "metrics.jsonl").read_bytes() == untouched


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_outside_a_training_loop_is_resumable(recipe, monkeypatch, capsys, number):
    def prepare(*_, **__):
        try:
            os.kill(os.getpid(), number)
        except Exception:  # noqa: BLE001 - as careless code would
            pytest.fail("the stop was swallowed")

    monkeypatch.setattr("conan_jax.data.prepare.prepare", prepare)
    code, _, err = conan(monkeypatch, capsys, "prepare", recipe)
    assert code == 42 and err.strip() == "conan: stopped; start the same command again to go on"


@pytest.mark.parametrize("name, text, words", [
    ("notes.md", "# notes", "a .py file"),
    ("quits.py", "import sys; sys.exit(5)", "could not be read: SystemExit"),
    ("other.py:", "def get_config(variant): pass", "no variant ''"),
    ("empty.py", "", "get_config"),
])
def test_what_is_no_configuration_is_refused(tmp_path, monkeypatch, capsys, name, text, words):
    (tmp_path / name.rstrip(":")).write_text(text)
    code, _, err = conan(monkeypatch, capsys, "config", "show", tmp_path / name)
    assert code == 78 and words in err


def test_a_run_stays_in_its_folder(recipe, monkeypatch, capsys):
    code, _, err = conan(monkeypatch, capsys, "train", recipe, "--set", "name=../x")
    assert code == 78 and "'../x'" in err


def test_devices_and_batches_that_do_not_fit_are_known_before_the_data_is_prepared(recipe, monkeypatch, capsys):
    code, _, err = conan(monkeypatch, capsys, "train", recipe, "--set", "mesh.fsdp=4096")
    assert code == 78 and "mesh" in err and "devices" in err and not (recipe.parent / "run" / "data").exists()

    run = Recipe(config_io.load_run(str(recipe)), Console(quiet=True))
    with pytest.raises(ConfigError, match=r"first\.global_batch_size: 4 rows .* 3 processes.*=6"):
        run._begin(list(run.run.stages), fresh=False, processes=3)
    assert not (recipe.parent / "run" / "data").exists()


def test_a_stage_alone_may_start_from_named_weights(recipe):
    run = config_io.load_run(str(recipe))
    with pytest.raises(ConfigError, match="--init-from"):
        Recipe(run, Console(quiet=True))._refuse_missing_start(run.stages[1])
    Recipe(dataclasses.replace(run, init_from="runs/base"), Console(quiet=True))._refuse_missing_start(run.stages[1])


def test_a_hugging_face_folder_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}))
    for load in (Encoder.load, lambda folder: config_io.start_from(None, str(folder))):
        with pytest.raises(ConfigError, match="conan import hf"):
            load(tmp_path)
