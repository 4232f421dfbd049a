"""A folder of Hugging Face -> a run: nothing of it is lost, any stage can start from it, and what is not right is refused."""

import json

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from conan_jax import config_io
from conan_jax.cli.main import app
from conan_jax.config import Contrastive, Run, WeakStage
from conan_jax.config import Tokenizer as Settings
from conan_jax.config.data import Bucket, Dataset, Mix
from conan_jax.data.json_tokenizer import JsonTokenizer
from conan_jax.data.tokenizer import Tokenizer, train_tokenizer
from conan_jax.errors import CheckpointError, ConanError, ConfigError, DataError
from conan_jax.hf.importer import import_folder, read_origin
from conan_jax.hf.weights import read_tensors, to_tensors, write_safetensors
from conan_jax.inference.encoder import Encoder
from conan_jax.model import Bidirectional, Causal
from conan_jax.train import checkpoint, start_rule
from tests.hf import folders
from tests.hf.test_weights import same

FREE = {"architectures", "head_dim", "dtype", "torch_dtype", "rope_theta", "rope_scaling", "is_causal", "use_bidirectional_attention"}


@pytest.mark.parametrize("family, dtype, shards, changes", [
    ("llama", "bfloat16", 3, {}), ("mistral", "float32", 1, {"sliding_window": 16}), ("qwen2", "bfloat16", 1, {}),
    ("qwen3", "float32", 2, {}), ("qwen3", "bfloat16", 1, {}), ("mistral", "bfloat16", 3, {}), ("qwen2", "float32", 3, {}),
    ("llama", "float32", 1, {"attention_bias": True, "is_causal": False}),
])
def test_what_was_imported_is_written_again_bit_for_bit(tmp_path, family, dtype, shards, changes):
    folder, tensors = folders.write(tmp_path / "a", family, dtype, shards=shards, **changes)
    made = import_folder(folder, tmp_path / "run")
    origin, (stage, step) = read_origin(tmp_path / "run"), start_rule.locate(tmp_path / "run")
    assert origin == made.origin and (origin.architecture, origin.dtype, origin.causal_form) == (family, dtype, True)
    params = checkpoint.restore_params(stage, step)
    back = to_tensors(params, made.run.model, dtype=origin.dtype, causal=origin.causal_form)
    write_safetensors(tmp_path / "b", back)
    assert same(read_tensors(tmp_path / "b"), tensors)
    source = json.loads((folder / "config.json").read_text())
    written = origin.hf_config(made.run.model)
    assert {key: written[key] for key in source} == source and written.keys() - source.keys() <= FREE
    assert made.run.model.max_length == changes.get("sliding_window", 64) and len(made.notes) == 1 + ("sliding_window" in changes)


def test_a_run_like_any_other(tmp_path):
    folder, _ = folders.write(tmp_path / "a", "qwen2")
    run = import_folder(folder, tmp_path / "my run!").run
    assert run.name == "my-run-" and config_io.from_dict(json.loads((tmp_path / "my run!" / "config.json").read_text())) == run
    encoder = Encoder.load(tmp_path / "my run!")
    assert isinstance(encoder.mask, Causal) and encoder.model == run.model and encoder.model.compute_dtype == "float32"
    vectors = encoder.encode(["the reader", "a file"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert Tokenizer.load(tmp_path / "my run!" / "data" / "tokenizer").eos_id == 1
    (tmp_path / "my run!").rename(tmp_path / "moved")
    np.testing.assert_array_equal(Encoder.load(tmp_path / "moved").encode(["the reader", "a file"]), vectors)


def test_the_mask_and_the_pooling_are_read(tmp_path):
    folder, _ = folders.write(tmp_path / "a", causal=False, is_causal=False)
    for mode, expected, notes in (({"pooling_mode": "lasttoken"}, "last", 0), ({"pooling_mode_mean_tokens": True}, "mean", 0),
                                  ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last", 0),
                                  ({"pooling_mode": "mean_sqrt_len_tokens"}, "mean", 1)):
        folders.sentence_files(folder, pooling=mode)
        made = import_folder(folder, tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        assert made.run.model.pooling == expected and len(made.notes) == notes
    encoder = Encoder.load(made.run.output_dir)
    assert isinstance(encoder.mask, Bidirectional) and encoder.model.tie_word_embeddings and not made.origin.causal_form


def test_a_head_can_be_left_out(tmp_path):
    folder, _ = folders.write(tmp_path / "a", "llama")
    with_head, without = (import_folder(folder, tmp_path / name, head=head).run for name, head in (("with", True), ("without", False)))
    assert not with_head.model.tie_word_embeddings and without.model.tie_word_embeddings
    here = {name: checkpoint.restore_params(start_rule.locate(tmp_path / name)[0]) for name in ("with", "without")}
    assert here["with"].pop("output_embedding").shape == (folders.V, folders.D)
    assert jax.tree.all(jax.tree.map(np.array_equal, here["with"], here["without"]))
    origin = read_origin(tmp_path / "without")
    assert not origin.causal_form and origin.hf_config(without.model)["architectures"] == ["LlamaModel"]
    tied, _ = folders.write(tmp_path / "b", "qwen2")
    assert import_folder(tied, tmp_path / "tied", head=False).origin.causal_form  # there is no head of its own to leave out


def test_a_tokenizer_of_ours_stays_one(tmp_path):
    folder, _ = folders.write(tmp_path / "a")
    ours = train_tokenizer(["the reader reads a file"] * 9, Settings(vocab_size=280), tmp_path / "ours")
    (folder / "tokenizer.model").write_bytes((tmp_path / "ours" / "tokenizer.model").read_bytes())
    made = import_folder(folder, tmp_path / "run")
    assert made.tokenizer.sha256 == ours.sha256 == Encoder.load(tmp_path / "run").tokenizer.sha256
    (folder / "tokenizer.model").write_bytes(b"that of Llama 2")
    assert isinstance(import_folder(folder, tmp_path / "other").tokenizer, JsonTokenizer)


@pytest.mark.parametrize("breakage, error, message", [
    (lambda f: (f / "config.json").unlink(), CheckpointError, "has no config.json"),
    (lambda f: (f / "config.json").write_text("{"), DataError, "not valid JSON"),
    (lambda f: (f / "tokenizer.json").unlink(), DataError, "has no tokenizer.json.*AutoTokenizer"),
    (lambda f: (f / "tokenizer_config.json").write_text("{}") and (f / "config.json").write_text(
        json.dumps({**folders.CONFIGS["llama"], "eos_token_id": None})), DataError, "which token ends a text"),
    (lambda f: (f / "config.json").write_text(json.dumps({**folders.CONFIGS["llama"], "auto_map": {"AutoModel": "x.Y"}})), ConfigError,
     "code of its own"),
    (lambda f: (f / "config.json").write_text(json.dumps({**folders.CONFIGS["llama"], "vocab_size": 200})), DataError, "has 2.. tokens"),
    (lambda f: (f / "config.json").write_text(json.dumps({**folders.CONFIGS["llama"], "num_hidden_layers": 3})), CheckpointError, "lacks"),
    (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), CheckpointError, "pickled"),
])
def test_nothing_is_left_of_an_import_that_failed(tmp_path, breakage, error, message):
    folder, _ = folders.write(tmp_path / "a")
    breakage(folder)
    with pytest.raises(error, match=message):
        import_folder(folder, tmp_path / "runs" / "x")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_what_stands_there_is_not_written_over(tmp_path):
    folder, _ = folders.write(tmp_path / "a")
    (tmp_path / "run").mkdir()
    import_folder(folder, tmp_path / "run")  # an empty folder is no loss
    before = (tmp_path / "run" / "config.json").stat().st_mtime_ns
    with pytest.raises(ConfigError, match="is there already"):
        import_folder(folder, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match="not by its name on a hub"):
        import_folder(tmp_path / "none", tmp_path / "other")


def recipe(tmp_path, pairs, **changes):
    stage = WeakStage(name="weak", steps=2, datasets=(Mix("pairs"),), global_batch_size=8, buckets=(Bucket(16, 16),),
                      contrastive=Contrastive(), log_every=1)
    datasets = (Dataset("pairs", "pair", str(pairs)),)
    return Run(name="tuned", stages=(stage,), datasets=datasets, output_dir=str(tmp_path / "tuned"), **changes)


@pytest.fixture
def imported(tmp_path):
    folder, tensors = folders.write(tmp_path / "a", "qwen3")
    import_folder(folder, tmp_path / "base", head=False)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"query": f"reader {i}", "pos": f"the file {i} sits"}) + "\n" for i in range(40)))
    return tmp_path, pairs, tensors


def test_a_stage_starts_from_it(imported, monkeypatch):
    """Trained at a learning rate of almost nothing, the stage ends where it began."""
    tmp_path, pairs, tensors = imported
    file = tmp_path / "recipe.py"
    file.write_text(f"""
import dataclasses, pathlib
from conan_jax.config import Optimizer
from tests.hf.test_importer import recipe
from conan_jax.config import Model, Tokenizer
def get_config(variant):
    run = recipe(pathlib.Path({str(tmp_path)!r}), {str(pairs)!r}, model=Model(vocab_size=300, hidden_size=16, num_heads=4, num_kv_heads=2,
                 num_layers=1, max_length=64, scan_layers=False, remat="none"), tokenizer=Tokenizer(vocab_size=264))
    return dataclasses.replace(run, stages=(dataclasses.replace(run.stages[0], optimizer=Optimizer(learning_rate=1e-9)),))
""")
    result = CliRunner().invoke(app, ["train", str(file), "--init-from", str(tmp_path / "base")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"start: weights of {tmp_path}/base/imported (step 1), as init_from says" in result.output
    folder, step = start_rule.locate(tmp_path / "tuned")
    assert folder.name == "weak" and step == 2
    params = checkpoint.restore_params(folder)
    np.testing.assert_allclose(params["embedding"], tensors["model.embed_tokens.weight"], atol=1e-6)
    run = config_io.from_dict(json.loads((tmp_path / "tuned" / "config.json").read_text()))
    assert run.init_from == str(tmp_path / "base") and run.model.remat == "none" and run.model.qk_norm and run.model.num_layers == 2
    sha256 = Tokenizer.load(run.tokenizer.path).sha256
    assert start_rule.find_start(folder, None, run.model, sha256, init_from=run.init_from).kind == "resume"


def test_another_model_or_tokenizer_is_refused(imported):
    tmp_path, pairs, _ = imported
    base = str(tmp_path / "base")
    run = config_io.start_from(recipe(tmp_path, pairs), base)
    sha256 = Tokenizer.load(run.tokenizer.path).sha256

    def start(model, sha256=sha256, place=base):
        return start_rule.find_start(tmp_path / "own", None, model, sha256, init_from=place)

    assert start(run.model) == start(run.model, place=base + "/imported@1") == start_rule.Start("initial", tmp_path / "base/imported", 1)
    other = config_io.build(type(run.model), {**config_io.to_dict(run.model), "pooling": "last", "hidden_dropout": 0.1}, "model")
    assert start(other).kind == "initial"
    with pytest.raises(CheckpointError, match="model.rope_theta is 1000000.0 there and 5.0 here.*--init-from"):
        start(config_io.build(type(run.model), {**config_io.to_dict(run.model), "rope_theta": 5.0}, "model"))
    with pytest.raises(CheckpointError, match=f"tokenizer {sha256} and this run has tokenizer bbb"):
        start(run.model, "bbb")
    for place in (base + "@2", str(tmp_path / "nowhere")):
        with pytest.raises(ConanError, match="no complete checkpoint"):
            start(run.model, place=place)
    with pytest.raises(ConfigError, match="there is no run in"):
        config_io.start_from(run, str(tmp_path / "nowhere"))


def test_the_command_says_what_it_made(tmp_path):
    folder, _ = folders.write(tmp_path / "a", "mistral", sliding_window=32)
    result = CliRunner().invoke(app, ["import", "hf", str(folder), "--out", str(tmp_path / "run"), "--json"])
    said = json.loads(result.stdout)
    assert (said["architecture"], said["mask"], said["max_length"], said["tokenizer"]["eos_id"]) == ("mistral", "causal", 32, 1)
    assert "sliding window" in said["notes"][0] and said["tokenizer"]["suffix_ids"] == [1]
    result = CliRunner().invoke(app, ["import", "hf", str(folder), "--out", str(tmp_path / "other")])
    assert "--init-from" in result.output and "mistral" in result.output
