"""An Encoder returns what the Embedder computes for each text alone, whatever the batching, and finds its own way back from disk."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from conan_jax import config, config_io
from conan_jax.data.tokenizer import EOS, train_tokenizer
from conan_jax.errors import CheckpointError, ConfigError, DataError
from conan_jax.inference import encoder as encoder_module
from conan_jax.inference.encoder import Encoder
from conan_jax.model import Bidirectional, Causal, Embedder
from conan_jax.train import checkpoint
from conan_jax.train.state import TrainState
from tests.model.models import embed_of, params_of

MODEL = config.Model(vocab_size=400, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64,
                     rope_theta=100.0, compute_dtype="float32", scan_layers=False, remat="none")
WORDS = "array sum file read write socket tensor gradient parse date sort key value thread lock".split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(WORDS, 330, tmp_path_factory.mktemp("tokenizer"))


def make_tokenizer(words, vocab_size, folder):
    rng = np.random.default_rng(0)
    return train_tokenizer([" ".join(rng.choice(words, 12)) for _ in range(200)], config.Tokenizer(vocab_size=vocab_size), folder)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(params_of(Embedder(MODEL)), MODEL, tokenizer)


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(n)]


def alone(encoder, text, instruction="", length=64):
    """One text, tokenised and encoded by hand in a row of 64."""
    prompt = encoder.tokenizer.encode(f"Instruct: {instruction}\nQuery: ") if instruction else []
    ids = [*prompt, *encoder.tokenizer.encode(text)][: length - 1] + [EOS]
    tokens, count, prompt_length = (np.array([v], np.int32) for v in (ids + [0] * (64 - len(ids)), len(ids), len(prompt)))
    batch = {"tokens": tokens, "lengths": count, "prompt_lengths": prompt_length}
    return np.asarray(embed_of(Embedder(MODEL), encoder.params, batch, encoder.mask))[0]


def test_batched_vectors_are_those_of_each_text_alone_in_order(encoder):
    given = texts(11)
    vectors = encoder.encode(given, batch_size=4)
    assert vectors.shape == (11, 32) and vectors.dtype == np.float32
    for i in (0, 3, 7, 10):
        np.testing.assert_allclose(vectors[i], alone(encoder, given[i]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(encoder.encode(given, batch_size=3), vectors, atol=1e-5)
    np.testing.assert_array_equal(encoder.encode(given, batch_size=4), vectors)


def test_rounds_are_joined_in_order(encoder, monkeypatch):
    given = texts(9, seed=3)
    whole = encoder.encode(given, batch_size=4)
    monkeypatch.setattr(encoder_module, "TEXTS_PER_ROUND", 5)
    np.testing.assert_allclose(encoder.encode(given, batch_size=4), whole, atol=1e-5)


def test_an_instruction_is_read_and_not_pooled(encoder):
    vector = encoder.encode_query(["read file"], prompt="Instruct: Find it\nQuery: ", batch_size=4)[0]
    np.testing.assert_allclose(vector, alone(encoder, "read file", "Find it"), atol=1e-5)
    assert np.abs(vector - encoder.encode_document(["read file"], batch_size=4)[0]).max() > 1e-3


def test_long_texts_are_cut_and_a_single_string_gives_one_vector(encoder):
    long = " ".join(WORDS * 20)
    np.testing.assert_allclose(encoder.encode(long, max_length=16), alone(encoder, long, length=16), atol=1e-5)
    np.testing.assert_allclose(encoder.encode(long), alone(encoder, long, length=64), atol=1e-5)


def test_an_empty_text_is_its_end_and_no_text_is_no_row(encoder):
    np.testing.assert_allclose(encoder.encode(["", "read"], batch_size=4)[0], alone(encoder, ""), atol=1e-5)
    assert encoder.encode([]).shape == (0, 32)


def test_similarity_is_the_cosine(encoder):
    a, b = encoder.encode(texts(3), batch_size=4), encoder.encode(texts(2, seed=5), batch_size=4)
    expected = [[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in b] for x in a]
    np.testing.assert_allclose(Encoder.similarity(a, b), expected, atol=1e-5)


@pytest.mark.parametrize("options", [{"max_length": 65}, {"max_length": 1}, {"batch_size": 0}])
def test_wrong_options_are_refused(encoder, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        encoder.encode(["x"], **options)


def test_what_is_no_text_and_a_foreign_tokenizer_are_refused(encoder, tokenizer):
    with pytest.raises(DataError, match="text 1 is NoneType"):
        encoder.encode(["a", None])
    with pytest.raises(ConfigError, match="330 tokens"):
        Encoder(encoder.params, dataclasses.replace(MODEL, vocab_size=300), tokenizer)


# ------------------------------------------------------------------------------------------- from disk


def recipe(folder):
    lm = config.LMStage(name="pretrain", kind="pretrain", datasets=(config.Mix("d"),), steps=2, sequence_length=16, global_batch_size=8)
    weak = config.WeakStage(name="weak", datasets=(config.Mix("d"),), steps=3, buckets=(config.Bucket(16, 16),), global_batch_size=8)
    return config.Run(name="r", stages=(lm, weak), datasets=(config.Dataset("d", "pair", "x"),), model=MODEL,
                      tokenizer=config.Tokenizer(vocab_size=330), output_dir=str(folder))


def save(run, stage, params, tokenizer):
    zero = np.int32(stage.steps)
    params = jax.device_put(params, jax.devices()[0])
    state = TrainState(step=zero, params=params, opt_state=(), carry={}, skipped=zero, skipped_in_row=zero)
    writer = checkpoint.Checkpoints(run_folder(run) / stage.name, 1, checkpoint.make_metadata(run, stage, tokenizer.sha256))
    writer.save(stage.steps, state)
    writer.close()


def run_folder(run):
    from pathlib import Path

    return Path(run.output_dir)


@pytest.fixture
def trained(tmp_path, tokenizer):
    run = recipe(tmp_path / "run")
    run_folder(run).mkdir()
    (run_folder(run) / "config.json").write_text(json.dumps(config_io.to_dict(run)))
    tokenizer.save(run_folder(run) / "data" / "tokenizer")
    for i, stage in enumerate(run.stages):
        save(run, stage, jax.tree.map(lambda a: a * (1 + i), params_of(Embedder(MODEL))), tokenizer)
    return run


def test_a_stage_comes_back_with_its_weights_mask_and_identity(trained, tokenizer, tmp_path):
    first = Encoder.load(run_folder(trained) / "pretrain")
    assert first.mask == Causal() and first.identity == {"tokenizer_sha256": tokenizer.sha256, "run": "r", "stage": "pretrain", "step": 2}
    causal = Encoder(params_of(Embedder(MODEL)), MODEL, tokenizer, Causal())
    np.testing.assert_allclose(first.encode("read file"), alone(causal, "read file"), atol=1e-5)

    moved = tmp_path / "moved"
    shutil.move(run_folder(trained), moved)  # a run folder goes where its owner puts it
    last = Encoder.load(moved)
    assert last.identity["stage"] == "weak"
    doubled = jax.tree.map(lambda a: a * 2, params_of(Embedder(MODEL)))
    np.testing.assert_allclose(last.encode("read file"), alone(Encoder(doubled, MODEL, tokenizer, Bidirectional()), "read file"), atol=1e-5)


def test_the_tokenizer_lies_where_a_variable_says(trained, tokenizer, tmp_path, monkeypatch):
    run = dataclasses.replace(trained, tokenizer=config.Tokenizer(vocab_size=330, path="$PLACE/words"),
                              output_dir=str(tmp_path / "other"), data_dir=str(tmp_path / "other/data"))
    save(run, run.stage("weak"), params_of(Embedder(MODEL)), tokenizer)
    monkeypatch.delenv("PLACE", raising=False)
    with pytest.raises(CheckpointError, match="environment variable PLACE, which is not set"):
        Encoder.load(run_folder(run) / "weak")
    tokenizer.save(tmp_path / "words")
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert Encoder.load(run_folder(run) / "weak").tokenizer.sha256 == tokenizer.sha256


def test_what_is_missing_is_named(trained, tmp_path):
    with pytest.raises(CheckpointError, match="no trained model in .*nowhere"):
        Encoder.load(tmp_path / "nowhere")
    settings = run_folder(trained) / "data" / "tokenizer" / "tokenizer.json"
    settings.write_text(settings.read_text().replace(Encoder.load(run_folder(trained)).tokenizer.sha256, "0" * 64))
    with pytest.raises(CheckpointError, match="which is not there"):
        Encoder.load(run_folder(trained))
    for stage in trained.stages:
        shutil.rmtree(run_folder(trained) / stage.name)
    with pytest.raises(CheckpointError, match="no stage of .* has a complete checkpoint"):
        Encoder.load(run_folder(trained))


def test_another_tokenizer_in_the_folder_is_refused(trained, tmp_path):
    make_tokenizer(WORDS[:9], 300, run_folder(trained) / "data" / "tokenizer")
    with pytest.raises(CheckpointError, match="has sha256"):
        Encoder.load(run_folder(trained) / "weak")


def test_the_untrained_model_is_the_run_before_its_first_step(trained, tokenizer):
    encoder = Encoder.untrained(trained, tokenizer)
    assert encoder.mask == Causal() and encoder.identity["stage"] == "untrained"
    expected = Embedder(MODEL).init(jax.random.key(trained.seed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), encoder.params, expected)
