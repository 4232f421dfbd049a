"""Dropout of what blocks write: how much, scaled how, drawn from a row's own key and from nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conan_jax.model import Bidirectional
from conan_jax.model.transformer import drop
from tests.model.models import params_of, variant

KEYS = jax.random.split(jax.random.key(0), 4)
TEXT = {"tokens": jnp.tile(jnp.arange(4, 10), (4, 1)), "lengths": jnp.full(4, 6), "prompt_lengths": jnp.zeros(4, jnp.int32)}


def test_it_drops_its_share_and_keeps_the_mean():
    x = jnp.full((4 * 100, 64), 2.0)
    dropped = np.asarray(drop(x, KEYS, 0, 0.25)).reshape(4, -1)
    assert set(np.unique(dropped)) == {0.0, np.float32(2.0 / 0.75)}
    np.testing.assert_allclose((dropped == 0).mean(axis=1), 0.25, atol=0.02)
    assert all((dropped[i] != dropped[j]).any() for i in range(4) for j in range(i))
    assert (np.asarray(drop(x, KEYS, 1, 0.25)) != dropped.reshape(x.shape)).any()


@pytest.mark.parametrize("scan", [False, True])
def test_a_row_depends_on_its_own_key_alone(scan):
    embedder = variant(hidden_dropout=0.4, scan_layers=scan, remat="full" if scan else "none")
    embed = jax.jit(lambda keys, text: embedder.embed(params_of(embedder), text, Bidirectional(), keys))
    vectors = np.asarray(embed(KEYS, TEXT))
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-2  # one text, two keys
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(embed(KEYS[order], TEXT), vectors[order], atol=1e-6)
    few = {name: x[:2] for name, x in TEXT.items()}
    np.testing.assert_allclose(embed(KEYS[:2], few), vectors[:2], atol=1e-6)


def test_every_layer_and_each_of_its_two_places_draws_its_own(monkeypatch):
    """Which elements are dropped where, seen by a model of two layers that is traced with the real function and watched."""
    seen = []

    def watched(x, keys, place, rate):
        out = drop(x, keys, place, rate)
        jax.debug.callback(lambda kept: seen.append(np.asarray(kept)), drop(jnp.ones_like(x), keys, place, rate) > 0)
        return out

    monkeypatch.setattr("conan_jax.model.transformer.drop", watched)
    embedder = variant(hidden_dropout=0.4)
    jax.block_until_ready(embedder.embed(params_of(embedder), TEXT, Bidirectional(), KEYS))
    jax.effects_barrier()
    assert len(seen) == 4 and all((seen[i] != seen[j]).any() for i in range(4) for j in range(i))


def test_inference_never_drops_and_a_rate_of_zero_is_no_program_at_all():
    dropping, plain = variant(hidden_dropout=0.4), variant()
    params = params_of(plain)
    np.testing.assert_array_equal(dropping.embed(params, TEXT), plain.embed(params, TEXT))
    with_keys = jax.jit(lambda p, keys: plain.embed(p, TEXT, Bidirectional(), keys)).lower(params, KEYS).as_text()
    without = jax.jit(lambda p, keys: plain.embed(p, TEXT, Bidirectional())).lower(params, KEYS).as_text()
    assert with_keys == without
