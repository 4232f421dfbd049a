"""Micro-batches of a language model add up to the gradient of the whole batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conan_jax import config
from conan_jax.errors import ConfigError
from conan_jax.model import Embedder
from conan_jax.stages import make_stage
from conan_jax.stages.accumulate import sum_over
from tests.stages import examples
from tests.stages.test_chunks import agree, on_mesh


@functools.cache
def update(steps, sizes=None, dropout=0.0):
    """(loss, metrics, gradients) of an update in so many micro-batches."""
    embedder, params = examples.embedder_and_params()
    embedder = Embedder(dataclasses.replace(embedder.config, hidden_dropout=dropout))
    stage = make_stage(dataclasses.replace(examples.STAGES["sft"], gradient_accumulation_steps=steps), embedder)

    def both(params, batch):
        (loss, (_, metrics)), gradient = jax.value_and_grad(stage.loss, has_aux=True)(params, {}, batch, jnp.int32(0), jax.random.key(1))
        return loss, metrics, gradient

    return on_mesh(sizes, both, params, examples.batch_of("sft"))


@pytest.mark.parametrize(("steps", "sizes", "dropout"), [
    (2, None, 0.0), (4, (1, 2, 4), 0.3), (4, (2, 4, 1), 0.0)])
def test_micro_batches_give_the_gradient_of_the_whole(steps, sizes, dropout):
    """Segments and loss masks are random, so micro-batches hold different numbers of targets: a mean of means would be wrong."""
    agree(update(steps, sizes, dropout), update(1, None, dropout))


def test_activations_of_one_micro_batch_exist_at_a_time():
    embedder, params = examples.embedder_and_params()
    batch = {name: np.tile(x, (16, *[1] * (x.ndim - 1))) for name, x in examples.batch_of("sft").items()}

    def temporary(steps):
        stage = make_stage(dataclasses.replace(examples.STAGES["sft"], global_batch_size=128, gradient_accumulation_steps=steps), embedder)
        gradient = jax.grad(lambda params, batch: stage.loss(params, {}, batch, 0, jax.random.key(0))[0])
        return jax.jit(gradient).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(16) < temporary(1) / 3


def test_the_gradient_costs_one_pass_and_the_value_alone_none():
    runs = []

    def square(w, x):
        jax.debug.callback(lambda _: runs.append(1), x)
        return jnp.sum(w * x) ** 2

    x = jnp.arange(6.0).reshape(3, 2)
    total = lambda w: 2.0 * sum_over(square, w, x, (None,))
    value, gradient = jax.value_and_grad(total)(jnp.ones(2))
    jax.effects_barrier()
    assert len(runs) == 3
    np.testing.assert_allclose((value, *gradient), (2 * (1 + 25 + 81), *(4 * (x.T @ x.sum(axis=1)))), rtol=1e-6)
    assert total(jnp.ones(2)) == value


def test_micro_batches_divide_the_batch():
    with pytest.raises(ConfigError, match="gradient_accumulation_steps 3 must divide sft.global_batch_size 8"):
        dataclasses.replace(examples.STAGES["sft"], gradient_accumulation_steps=3)
    with pytest.raises(ConfigError, match="encode_chunk_size must be positive, got 0"):
        dataclasses.replace(examples.STAGES["weak"], encode_chunk_size=0)
    with pytest.raises(ConfigError, match="hidden_dropout"):
        config.Model(hidden_dropout=1.0)
