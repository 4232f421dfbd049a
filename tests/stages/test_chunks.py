"""Chunks change nothing: GradCache's vectors and gradients, and dropout, are those of all texts at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conan_jax import config, sharding
from conan_jax.model import Bidirectional, Embedder, SoftMask
from conan_jax.stages import chunks, make_stage
from conan_jax.stages.encode import encode_all
from tests.stages import examples

FAST = {"xla_backend_optimization_level": 0}
MESHES = {"one device": None, "8 devices": (2, 4, 1), "4 x 2": (1, 4, 2)}


def on_mesh(sizes, function, *arguments):
    """`function(*arguments)` compiled for a mesh of fake devices, or for one device without a mesh."""
    compiled = jax.jit(function, compiler_options=FAST)
    if sizes is None:
        return jax.device_get(compiled(*arguments))
    mesh = sharding.make_mesh(config.Mesh(*sizes))
    with sharding.activate(mesh):
        return jax.device_get(compiled(*arguments))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(rows=st.integers(1, 40), size=st.integers(1, 50), width=st.integers(1, 3), mesh=st.sampled_from(sorted(MESHES)))
def test_rows_come_back_in_order_from_chunks_of_equal_devices(rows, size, width, mesh):
    x = np.arange(1, rows * width + 1, dtype=np.int32).reshape(rows, width)

    def there_and_back(x):
        by_device = chunks.by_device(x)
        n = by_device.shape[1]
        count = chunks.count_chunks(n, size)
        parts = chunks.split(by_device, count)
        assert parts.shape[1] <= size * by_device.shape[0] and count == -(-n // size)
        return parts, chunks.from_device(chunks.join(parts, n), rows)

    with sharding.activate(sharding.make_mesh(config.Mesh(*MESHES[mesh]))) if MESHES[mesh] else jax.set_mesh(jax.make_mesh((1,), ("x",))):
        parts, back = there_and_back(jnp.asarray(x))
    np.testing.assert_array_equal(back, x)
    assert np.count_nonzero(parts) == x.size  # the rest are zeros


def gradients(stage_config, sizes=None, dropout=0.0, rows=examples.B):
    """(loss, metrics, gradients, carry) of one update of a stage on the first `rows` examples of a random batch."""
    embedder, params = examples.embedder_and_params()
    embedder = Embedder(dataclasses.replace(embedder.config, hidden_dropout=dropout))
    stage = make_stage(stage_config, embedder)
    carry = stage.init_carry(examples.EXAMPLES)
    batch = jax.tree.map(lambda x: x[:rows], examples.batch_of(stage_config.name))

    def update(params, carry, batch):
        both = jax.value_and_grad(stage.loss, has_aux=True)
        (loss, (carry, metrics)), gradient = both(params, carry, batch, jnp.int32(4), jax.random.key(3))
        return loss, metrics, gradient, carry

    if sizes is not None:
        batch = sharding.global_batch(batch, sharding.make_mesh(config.Mesh(*sizes)))
    return on_mesh(sizes, update, params, carry, batch)


@functools.cache
def at_once(kind, dropout=0.0, sizes=None):
    return gradients(STAGES[kind], sizes, dropout)


STAGES = {  # false-negative masks by score and by hash, hard negatives, MRL, two widths of rows
    "weak": dataclasses.replace(examples.STAGES["weak"], matryoshka=config.Matryoshka(dims=(8, 16)), contrastive=config.Contrastive(
        temperature=0.2, false_negative_margin=0.05, query_query=True, passage_passage=True, symmetric=True)),
    "supervised": dataclasses.replace(examples.STAGES["supervised"],
                                      contrastive=config.Contrastive(temperature=0.2, false_negative_margin=0.05)),
}


def agree(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


@settings(max_examples=3, deadline=None, derandomize=True)
@given(size=st.integers(1, 15))
def test_gradients_of_weak_equal_those_of_all_texts_at_once(size):
    agree(gradients(dataclasses.replace(STAGES["weak"], encode_chunk_size=size)), at_once("weak"))


@settings(max_examples=2, deadline=None, derandomize=True)
@given(size=st.integers(1, 60))
def test_gradients_of_supervised_equal_those_of_all_texts_at_once(size):
    agree(gradients(dataclasses.replace(STAGES["supervised"], encode_chunk_size=size)), at_once("supervised"))


@pytest.mark.parametrize(("kind", "sizes", "chunk"), [
    ("weak", (2, 4, 1), 1), ("supervised", (2, 2, 2), 2)])
def test_on_a_mesh_too(kind, sizes, chunk):
    agree(gradients(dataclasses.replace(STAGES[kind], encode_chunk_size=chunk), sizes), at_once(kind))


@pytest.mark.parametrize(("kind", "sizes", "chunk"), [("sft", (2, 4, 1), None), ("supervised", (1, 4, 2), 2)])
def test_rows_that_the_devices_do_not_divide_are_spread_over_all_of_them(kind, sizes, chunk):
    """6 rows on 8 or 4 devices; in `supervised` the 12 hard negatives do not divide either."""
    stage = STAGES.get(kind) or examples.STAGES[kind]
    stage = stage if chunk is None else dataclasses.replace(stage, encode_chunk_size=chunk)
    agree(gradients(stage, sizes, rows=6), of_six(kind))


@functools.cache
def of_six(kind):
    return gradients(STAGES.get(kind) or examples.STAGES[kind], rows=6)


def test_the_work_on_few_rows_is_even():
    """10 texts on 8 devices are encoded two a device, not ten on each."""
    seen = []

    class Watched:
        def embed(self, params, text, mask, keys):
            jax.debug.inspect_array_sharding(text["tokens"], callback=lambda s: seen.append(s.shard_shape(text["tokens"].shape)))
            return jnp.sum(text["tokens"], axis=1, keepdims=True).astype(jnp.float32)

    r = np.random.default_rng(0)
    texts = {"a": examples.texts(r, 6, prompt=1), "b": examples.texts(r, 2, 2)}
    vectors = on_mesh((2, 4, 1), lambda texts: encode_all(Watched(), None, texts, Bidirectional()), texts)
    assert seen == [(2, examples.L)]
    for name, text in texts.items():
        np.testing.assert_array_equal(vectors[name], text["tokens"].sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(("sizes", "chunk"), [(None, 3), ((2, 4, 1), 1)])
def test_dropout_is_replayed_whatever_the_chunks_and_the_mesh(sizes, chunk):
    dropped = gradients(dataclasses.replace(STAGES["weak"], encode_chunk_size=chunk), sizes, dropout=0.3)
    agree(dropped, at_once("weak", 0.3))
    assert abs(dropped[0] - at_once("weak")[0]) > 1e-3


def test_equal_texts_are_dropped_differently():
    embedder, params = examples.embedder_and_params()
    embedder = Embedder(dataclasses.replace(embedder.config, hidden_dropout=0.3))
    text = {name: np.repeat(x, 2, axis=0) for name, x in examples.texts(np.random.default_rng(0), 1).items()}
    vectors = encode_all(embedder, params, {"a": text, "b": text}, Bidirectional(), rng=jax.random.key(0))
    four = np.concatenate([vectors["a"], vectors["b"]])
    assert all(np.abs(four[i] - four[j]).max() > 1e-3 for i in range(4) for j in range(i))


def test_a_chunk_is_all_that_is_held():
    """Temporary memory of the gradient of 256 texts, against that of 16 at a time: what remains are vectors."""
    embedder, params = examples.embedder_and_params()
    text = examples.texts(np.random.default_rng(0), 256, prompt=1)

    def total(params, chunk_size):
        vectors = encode_all(embedder, params, {"a": text}, Bidirectional(), chunk_size=chunk_size)["a"]
        return jnp.sum((vectors @ vectors.T) ** 2)

    def temporary(chunk_size):
        return jax.jit(jax.grad(total), static_argnums=1).lower(params, chunk_size).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) < temporary(None) / 3


def test_a_traced_mask_reaches_every_chunk():
    embedder, params = examples.embedder_and_params()
    text = examples.texts(np.random.default_rng(0), 8)
    encode = jax.jit(lambda alpha, size: encode_all(embedder, params, {"a": text}, SoftMask(alpha), chunk_size=size)["a"], static_argnums=1)
    for alpha in (0.0, 0.7):
        np.testing.assert_allclose(encode(alpha, 3), encode(alpha, None), atol=1e-6)
    assert not np.allclose(encode(0.0, 3), encode(0.7, 3), atol=1e-3)
