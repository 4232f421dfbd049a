"""An Encoder returns what the Embedder computes for each text alone, whatever the batching, and finds its own way back from disk."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import types
import warnings

import jax
import numpy as np
import pytest

from conan_jax import config, config_io
from conan_jax.data.tokenizer import EOS, train_tokenizer
from conan_jax.errors import CheckpointError, ConfigError, DataError
from conan_jax.inference import encoder as encoder_module
from conan_jax.inference import outputs, tokens
from conan_jax.inference.encoder import Encoder
from conan_jax.inference.identity import weights_sha256
from conan_jax.model import Bidirectional, Causal, Embedder, SoftMask
from conan_jax.train import checkpoint
from conan_jax.train.state import TrainState
from tests.model.models import embed_of, params_of

MODEL = config.Model(vocab_size=400, hidden_size=32, intermediate_size=40, num_layers=2, num_heads=4, num_kv_heads=2, max_length=64,
                     rope_theta=100.0, compute_dtype="float32", scan_layers=False, remat="none")
ONE = jax.devices()[:1]  # what is tested on one device is true on eight, and compiled sooner
WORDS = "array sum file read write socket tensor gradient parse date sort key value thread lock".split()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(WORDS, 330, tmp_path_factory.mktemp("tokenizer"))


def make_tokenizer(words, vocab_size, folder):
    rng = np.random.default_rng(0)
    return train_tokenizer([" ".join(rng.choice(words, 12)) for _ in range(200)], config.Tokenizer(vocab_size=vocab_size), folder)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(params_of(Embedder(MODEL)), MODEL, tokenizer, devices=ONE)


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


def compilations(run):
    """How many programs `run` makes the compiler build."""
    from jax import monitoring

    seen = []
    monitoring.register_event_duration_secs_listener(lambda name, *_, **__: seen.append(name))
    run()
    monitoring.clear_event_listeners()
    return sum(name == "/jax/core/compile/backend_compile_duration" for name in seen)


def test_nothing_is_compiled_twice_and_few_shapes_at_all(tokenizer):
    model = dataclasses.replace(MODEL, rope_theta=123.0)  # programs of its own
    encoder = Encoder(params_of(Embedder(model)), model, tokenizer, devices=ONE)
    given = [" ".join(WORDS[:1 + i % 30]) for i in range(70)]

    def once(texts):
        encoder.encode(texts, batch_size=8)

    first = compilations(lambda: once(given))
    assert 3 <= first <= 3 * 6  # three programs a shape; rows of 16, 32 and 64 tokens
    assert compilations(lambda: once(given)) == 0
    assert compilations(lambda: once(given[::-1])) == 0
    assert compilations(lambda: once(given[20:])) <= 3  # the last batch may have fewer rows
    assert compilations(lambda: [encoder.encode(text) for text in given[:30]]) <= 3 * 3


def test_a_batch_is_what_each_text_is_alone(encoder):
    given = [*texts(40, seed=9), "", " ", "x"]
    alone_each = np.stack([encoder.encode(text) for text in given])
    np.testing.assert_allclose(encoder.encode(given, batch_size=16), alone_each, atol=1e-6)
    np.testing.assert_allclose(encoder.encode(given[::-1], batch_size=2), alone_each[::-1], atol=1e-6)


SCRIPT = """
import sys, numpy as np, jax
from conan_jax import config
from conan_jax.config_io import build
from conan_jax.data.tokenizer import Tokenizer
from conan_jax.inference.encoder import Encoder
import json
folder = sys.argv[1]
model = build(config.Model, json.load(open(folder + "/model.json")), "model")
flat = dict(np.load(folder + "/params.npz"))
params = {}
for path, value in flat.items():
    node = params
    for key in path.split("/")[:-1]:
        node = node.setdefault(key, {})
    node[path.split("/")[-1]] = value
assert len(jax.local_devices()) == int(sys.argv[2])
encoder = Encoder(params, model, Tokenizer.load(folder))
given = json.load(open(folder + "/texts.json"))
np.save(folder + "/vectors.npy", encoder.encode(given, batch_size=4))
layer = encoder._forward._placed[1][0]["mlp"]["up_proj"]["kernel"]
assert len(layer.sharding.device_set) == int(sys.argv[2]) and layer.sharding.is_fully_replicated
"""


def test_four_devices_give_the_vectors_of_one(encoder, tokenizer, tmp_path, devices=4):
    given = [*texts(21, seed=4), ""]
    tokenizer.save(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps(config_io.to_dict(MODEL)))
    (tmp_path / "texts.json").write_text(json.dumps(given))
    leaves = jax.tree_util.tree_flatten_with_path(encoder.params)[0]
    np.savez(tmp_path / "params.npz", **{"/".join(key.key for key in path): leaf for path, leaf in leaves})
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), str(devices)], check=True, env=environment, timeout=300)
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), encoder.encode(given, batch_size=4), atol=1e-6)


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


@pytest.mark.parametrize("options", [{"max_length": 65}, {"max_length": 1}, {"batch_size": 0}, {"truncate_dim": 33}, {"truncate_dim": 0},
                                     {"truncate_dim": 1.5}, {"truncate_dim": True}, {"max_length": 16.5}, {"batch_size": 1.5},
                                     {"precision": "float16"}, {"precision": ["int8"]}, {"prompt": 3}, {"prompt_name": ["query"]}])
def test_wrong_options_are_refused(encoder, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        encoder.encode(["x"], **options)


def test_what_is_no_text_and_a_foreign_tokenizer_are_refused(encoder, tokenizer):
    with pytest.raises(DataError, match="text 1 is NoneType"):
        encoder.encode(["a", None])
    for given in (None, 3, b"bytes", {"text": "a"}):
        with pytest.raises(DataError, match=f"a string or a sequence of strings, got {type(given).__name__}"):
            encoder.encode(given)
    with pytest.raises(ConfigError, match="330 tokens"):
        Encoder(encoder.params, dataclasses.replace(MODEL, vocab_size=300), tokenizer)


def test_prompts_by_name_by_string_and_by_default(tokenizer):
    params = params_of(Embedder(MODEL))
    encoder = Encoder(params, MODEL, tokenizer, devices=ONE, prompts={"query": "Instruct: Find it\nQuery: ", "task": "sort: "})
    asked = alone(encoder, "read file", "Find it")
    for vector in (encoder.encode_query("read file"), encoder.encode("read file", prompt_name="query"),
                   encoder.encode("read file", "task", "Instruct: Find it\nQuery: ")):
        np.testing.assert_allclose(vector, asked, atol=1e-5)
    bare = alone(encoder, "read file")
    for vector in (encoder.encode_document("read file"), encoder.encode("read file"), encoder.encode_query("read file", prompt="")):
        np.testing.assert_allclose(vector, bare, atol=1e-5)
    with pytest.raises(ConfigError, match="no prompt 'nothing'; this model has 'query', 'document', 'task'"):
        encoder.encode("x", prompt_name="nothing")
    with pytest.raises(ConfigError, match="leaves no room"):
        encoder.encode("x", prompt="read file " * 30)


def test_a_prompt_is_tokenised_apart_from_its_text(encoder):
    # "read fi" and "le" end and begin within a word: together they would be other tokens.
    prompt, text = encoder.tokenizer.encode("read fi"), encoder.tokenizer.encode("le")
    assert prompt + text != encoder.tokenizer.encode("read file")
    batch = {"tokens": np.array([[*prompt, *text, EOS]], np.int32), "lengths": np.array([len(prompt + text) + 1]),
             "prompt_lengths": np.array([len(prompt)])}
    expected = np.asarray(embed_of(Embedder(MODEL), encoder.params, batch, encoder.mask))[0]
    np.testing.assert_allclose(encoder.encode("le", prompt="read fi"), expected, atol=1e-5)


def test_truncated_vectors_are_brought_back_to_length_one(encoder):
    given = texts(5)
    whole = encoder.encode(given)
    cut = encoder.encode(given, truncate_dim=8)
    np.testing.assert_allclose(cut, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(encoder.encode(given, truncate_dim=8, normalize_embeddings=False), whole[:, :8], atol=1e-6)
    assert encoder.encode(given[0], truncate_dim=8).shape == (8,)


def test_every_string_has_a_finite_vector_of_length_one(encoder):
    odd = ["", " ", "\n\t  \r", "\0", "a\0b", "\x01\x02\x7f\x9f", "\u200b\u202e\ufeff", "\ud800", "a\udfffb", "\ud83d\ude00", "\u2581",
           "e\u0301" * 500,
           "\U0010ffff", "\ufffe\uffff", "\r\n" * 300]
    vectors = encoder.encode(odd)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(encoder.encode("\ud800"), encoder.encode("\ufffd"))  # what is no Unicode text
    np.testing.assert_array_equal(encoder.encode("a\udfffb"), encoder.encode("a\ufffdb"))
    for one, other in (("a\0b", "ab"), ("\0", ""), (" ", ""), ("\n\t  \r", " ")):  # characters that are read as they are
        assert np.abs(encoder.encode(one) - encoder.encode(other)).max() > 1e-4, (one, other)


@pytest.mark.parametrize("unit", ["read the file ", "數", "x", " ", "aé "])
def test_ten_megabytes_cost_no_more_than_what_is_read_of_them(encoder, unit):
    long = unit * (10_000_000 // len(unit.encode()))
    start = time.process_time()
    vector = encoder.encode(long)
    assert time.process_time() - start < 5  # whole, its tokens alone take this tokenizer longer
    np.testing.assert_allclose(vector, encoder.encode(long[:4000]), atol=1e-6)


def test_rows_of_32768_tokens(tokenizer):
    model = dataclasses.replace(MODEL, num_layers=1, hidden_size=8, intermediate_size=8, num_heads=1, num_kv_heads=1, max_length=32_768)
    encoder = Encoder(params_of(Embedder(model)), model, tokenizer, devices=ONE)
    long = " ".join(np.random.default_rng(0).choice(WORDS, 40_000))
    vector = encoder.encode(long, max_length=32_768)
    assert np.isclose(np.linalg.norm(vector), 1, atol=1e-5) and np.abs(vector - encoder.encode(long, max_length=512)).max() > 1e-6
    assert len(tokens.token_rows(tokenizer, [long], [], 32_768)[0]) == 32_768


def test_what_users_of_sentence_transformers_type(encoder, monkeypatch):
    many, expected = texts(3), encoder.encode(texts(3))
    assert encoder.get_sentence_embedding_dimension() == expected.shape[1] == 32
    options = {"batch_size": 2, "show_progress_bar": None, "convert_to_numpy": True, "normalize_embeddings": True,
               "output_value": "sentence_embedding", "precision": "float32"}
    for given in (many, tuple(many), np.array(many), np.array(many, object)):
        np.testing.assert_allclose(encoder.encode(given, **options), expected, atol=1e-6)
    for one in (many[0], np.array(many[0]), np.str_(many[0])):
        np.testing.assert_allclose(encoder.encode(one, **options), expected[0], atol=1e-6)
    for none in ([], np.array([], str)):
        assert encoder.encode(none, **options).shape == (0, 32)
    for value in ("token_embeddings", None):
        with pytest.raises(ConfigError, match="output_value"):
            encoder.encode(many, output_value=value)
    outputs._warn_of_device.cache_clear()
    with pytest.warns(UserWarning, match="device"):
        encoder.encode(many[:1], device="cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        encoder.encode(many[:1], device="cuda")


def test_tensors_where_torch_is_and_a_refusal_where_it_is_not(encoder, monkeypatch):
    expected = encoder.encode(texts(2))
    fake = types.SimpleNamespace(from_numpy=lambda vectors: ("tensor", vectors))
    monkeypatch.setitem(sys.modules, "torch", fake)
    kind, vectors = encoder.encode(texts(2), convert_to_tensor=True)
    assert kind == "tensor" and np.array_equal(vectors, expected)
    assert encoder.encode(texts(2), convert_to_tensor=True, convert_to_numpy=True)[0] == "tensor"
    assert isinstance(encoder.encode(texts(2), convert_to_numpy=False), list)
    monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
    for options in ({"convert_to_tensor": True}, {"convert_to_numpy": False}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))}.*torch"):
            encoder.encode(texts(2), **options)


def test_the_length_may_be_set(tokenizer, encoder):
    own = Encoder(encoder.params, MODEL, tokenizer, devices=ONE)
    assert own.max_seq_length == 64
    own.max_seq_length = 8
    assert own.max_seq_length == own.row_length() == 8
    long = [" ".join(WORDS)]
    np.testing.assert_array_equal(own.encode(long), encoder.encode(long, max_length=8))
    np.testing.assert_array_equal(own.encode(long, max_length=64), encoder.encode(long))
    for wrong in (65, 1, "8"):
        with pytest.raises(ConfigError, match="max_length"):
            own.max_seq_length = wrong
    assert own.max_seq_length == 8
    own.max_seq_length = None
    assert own.max_seq_length == 64


def test_texts_that_were_cut_are_counted(encoder):
    fits, longest = " ".join(WORDS[:5]), len(encoder.tokenizer.encode(" ".join(WORDS[:5]))) + 1
    for given, length, cut in (([fits], longest, 0), ([fits], longest - 1, 1), ([fits + " sum", fits, ""], longest, 1), ([fits * 999], 64, 1)):
        before = encoder.texts_cut
        encoder.encode(given, max_length=length)
        assert encoder.texts_cut - before == cut, (given, length)


def test_pairs_of_vectors(encoder):
    a, b = encoder.encode(texts(3)), encoder.encode(texts(3, seed=5)) * 3
    np.testing.assert_allclose(Encoder.similarity_pairwise(a, b), np.diag(Encoder.similarity(a, b)), atol=1e-6)
    assert Encoder.similarity(a[0], b).shape == (1, 3)
    with pytest.raises(DataError, match="as many vectors on both sides"):
        Encoder.similarity_pairwise(a, b[:2])
    for compare in (Encoder.similarity, Encoder.similarity_pairwise):
        with pytest.raises(DataError, match="one width, got 32 and 16 numbers"):
            compare(a, b[:, :16])
        for no_vectors in (None, ["a text"], a[None], 3.0):
            with pytest.raises(DataError, match="vectors must be"):
                compare(a, no_vectors)


def test_the_model_of_an_accelerator_is_the_same_in_float32_here(tokenizer):
    recipe_model = dataclasses.replace(MODEL, compute_dtype="bfloat16", attention="pallas_tpu", scan_layers=True, remat="full")
    params = params_of(Embedder(MODEL))
    one, other = (Encoder(params, model, tokenizer, devices=ONE) for model in (recipe_model, MODEL))
    np.testing.assert_array_equal(one.encode("read file"), other.encode("read file"))


@pytest.mark.parametrize("changes, mask", [
    (dict(qk_norm=True, tie_word_embeddings=False), Causal()), (dict(attention_bias=True, pooling="last"), SoftMask(0.3)),
    (dict(embedding_multiplier=3.0, attention_head_dim=6), Bidirectional())])
def test_layer_by_layer_is_the_whole_model(tokenizer, changes, mask):
    model = dataclasses.replace(MODEL, **changes)
    params = params_of(Embedder(model))
    ids = [*tokenizer.encode("read file socket"), EOS]
    batch = {"tokens": np.array([ids], np.int32), "lengths": np.array([len(ids)]), "prompt_lengths": np.array([0])}
    expected = np.asarray(embed_of(Embedder(model), params, batch, mask))[0]
    np.testing.assert_allclose(Encoder(params, model, tokenizer, mask, devices=ONE).encode("read file socket"), expected, atol=1e-5)


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
    names = {"tokenizer_sha256": tokenizer.sha256, "run": "r", "stage": "pretrain", "step": 2}
    assert first.mask == Causal() and first.identity == names | {"weights_sha256": weights_sha256(params_of(Embedder(MODEL)), MODEL)}
    causal = Encoder(params_of(Embedder(MODEL)), MODEL, tokenizer, Causal())
    np.testing.assert_allclose(first.encode("read file"), alone(causal, "read file"), atol=1e-5)

    moved = tmp_path / "moved"
    shutil.move(run_folder(trained), moved)  # a run folder goes where its owner puts it
    last = Encoder.load(moved)
    assert last.identity["stage"] == "weak"
    doubled = jax.tree.map(lambda a: a * 2, params_of(Embedder(MODEL)))
    np.testing.assert_allclose(last.encode("read file"), alone(Encoder(doubled, MODEL, tokenizer, Bidirectional()), "read file"), atol=1e-5)


def test_the_tokenizer_lies_where_a_variable_says(trained, tokenizer, tmp_path, monkeypatch):
    run = dataclasses.replace(trained, tokenizer=config.Tokenizer(path="$PLACE/words"),
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
    for nothing in (None, 3):
        with pytest.raises(ConfigError, match="name the folder of a run, of a stage or of an export, got"):
            Encoder.load(nothing)
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
