"""The door: pooling, prompts, empty rows, compilation, sharding, poolings from outside."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from conan_jax import config, sharding
from conan_jax.errors import ConfigError
from conan_jax.model import Bidirectional, Causal, Embedder, Layout, SoftMask, num_params
from tests.model.models import TINY, embed_of, hidden_of, params_of, variant

TOKENS = np.random.default_rng(2).integers(4, 48, (4, 8))
BATCH = {"tokens": jnp.asarray(TOKENS), "lengths": jnp.array([8, 5, 3, 0]), "prompt_lengths": jnp.array([0, 2, 3, 0])}


def unit(x):
    return x / np.linalg.norm(x)


@partial(jax.jit, static_argnums=0)
def cubed_gradient(embedder, params, batch):
    return jax.grad(lambda p: jnp.sum(embedder.embed(p, batch, Bidirectional()) ** 3))(params)


def test_mean_pools_the_text_and_attends_to_the_instruction():
    embedder, mask = variant(), SoftMask(0.5)
    params = params_of(embedder)
    vectors = embed_of(embedder, params, BATCH, mask)
    hidden = np.asarray(hidden_of(embedder, params, BATCH["tokens"], Layout.from_lengths(BATCH["lengths"], 8), mask), np.float64)
    # Row 2 is all instruction, row 3 is empty.
    expected = [unit(hidden[0].mean(0)), unit(hidden[1, 2:5].mean(0)), unit(hidden[2, :3].mean(0)), np.zeros(32)]
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    other_instruction = embed_of(embedder, params, {**BATCH, "tokens": BATCH["tokens"].at[1, 0].add(1)}, mask)
    assert np.abs(other_instruction[1] - vectors[1]).max() > 1e-3
    np.testing.assert_array_equal(other_instruction[0], vectors[0])


def test_last_token_pooling():
    embedder = variant(pooling="last")
    params = params_of(embedder)
    hidden = np.asarray(hidden_of(embedder, params, BATCH["tokens"], Layout.from_lengths(BATCH["lengths"], 8), Causal()), np.float64)
    expected = [unit(hidden[0, 7]), unit(hidden[1, 4]), unit(hidden[2, 2]), np.zeros(32)]
    np.testing.assert_allclose(embed_of(embedder, params, BATCH, Causal()), expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_empty_rows_have_zero_vectors_and_harmless_gradients(pooling):
    embedder = variant(pooling=pooling)
    params = params_of(embedder)
    empty = {**BATCH, "lengths": jnp.zeros(4, int), "prompt_lengths": jnp.array([0, 2, 3, 0])}
    assert (embed_of(embedder, params, empty, Bidirectional()) == 0).all()
    kept, changed = (cubed_gradient(embedder, params, {**BATCH, "tokens": t}) for t in (BATCH["tokens"], BATCH["tokens"].at[3].set(7)))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(changed)):
        assert np.isfinite(a).all() and np.abs(a).max() > 0
        np.testing.assert_array_equal(a, b)


def test_padding_changes_nothing():
    embedder = variant()
    wide = {**BATCH, "tokens": jnp.pad(BATCH["tokens"], ((0, 0), (0, 5)), constant_values=9)}
    narrow, padded = (embed_of(embedder, params_of(embedder), batch, SoftMask(0.4)) for batch in (BATCH, wide))
    np.testing.assert_allclose(padded, narrow, atol=1e-5)


def test_hashable_and_compiled_once():
    assert variant() == Embedder(TINY) and hash(variant()) == hash(Embedder(TINY)) and variant() != variant(pooling="last")
    traces = []

    @partial(jax.jit, static_argnums=0)
    def embed(embedder, params, mask):
        traces.append(embedder)
        return embedder.embed(params, BATCH, mask)

    vectors = [embed(variant(), params_of(variant()), SoftMask(jnp.float32(a))) for a in (0, 0.5, 1)]
    assert len(traces) == 1
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3 and np.abs(vectors[1] - vectors[2]).max() > 1e-3


class WeightedPooling(nn.Module):
    """A pooling with a parameter of its own."""

    config: config.Model

    @nn.compact
    def __call__(self, hidden, real, text):
        init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = self.param("scale", init, (self.config.hidden_size,), jnp.float32)
        return jnp.sum(hidden * scale * text[..., None], axis=1)


def test_pooling_from_outside_may_own_parameters():
    embedder = variant(pooling=f"{__name__}:WeightedPooling")
    params = jax.jit(embedder.init)(jax.random.key(0))
    assert params["pooling"]["scale"].shape == (32,) and embedder.axes()["pooling"]["scale"] == ("norm",)
    assert num_params(embedder.config) == num_params(TINY) + 32
    first = {**params, "pooling": {"scale": jnp.eye(32)[0]}}
    signs = np.sign(embed_of(embedder, params, BATCH, Causal())[:3])
    np.testing.assert_allclose(embed_of(embedder, first, BATCH, Causal())[:3], signs * np.eye(32)[0], atol=1e-6)


@pytest.mark.parametrize("pooling, message", [("maen", "'maen' is not known; use mean, last"), ("no_such_package:X", "cannot be loaded"),
                                              ("conan_jax.model.pooling:X", "cannot be loaded")])
def test_unknown_pooling_is_refused(pooling, message):
    with pytest.raises(ConfigError, match=message):
        num_params(variant(pooling=pooling).config)


@pytest.mark.parametrize("sizes", [config.Mesh(data=2, fsdp=4, tensor=1), config.Mesh(data=1, fsdp=2, tensor=4)], ids=["fsdp", "tensor"])
def test_eight_devices_equal_one(sizes):
    """Two kv heads over four tensor devices do not divide; they stay whole and the values stay right."""
    embedder = variant(scan_layers=True, remat="dots", attention="blockwise")
    params = params_of(embedder)
    batch = jax.tree.map(lambda x: jnp.concatenate([x, x]), BATCH)

    def f(params, batch, alpha):
        vectors = embed_of(embedder, params, batch, SoftMask(alpha))
        return jnp.sum(vectors[:4] @ vectors[4:].T * jnp.arange(4.0)), vectors

    single = jax.jit(jax.value_and_grad(f, has_aux=True))(params, batch, jnp.float32(0.3))
    mesh = sharding.make_mesh(sizes)
    split = jax.device_put(params, sharding.shardings_for(embedder.axes(), params, mesh))
    with sharding.activate(mesh):
        many = jax.jit(jax.value_and_grad(f, has_aux=True))(split, jax.device_put(batch, sharding.batch_sharding(mesh)), jnp.float32(0.3))
    assert not many[0][1].sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec()), 2)
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(many)):
        np.testing.assert_allclose(b, a, atol=1e-5 * float(jnp.abs(a).max()) + 1e-5)
