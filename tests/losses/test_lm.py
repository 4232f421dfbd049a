"""Chunked cross-entropy against the formula in float64 NumPy, and the promise that no [T, V] array exists."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp, softmax

from conan_jax.losses import lm
from conan_jax.losses.lm import chunked_cross_entropy

T, D, V = 37, 6, 50


@pytest.fixture(scope="module")
def problem():
    r = np.random.default_rng(0)
    weights = np.where(r.random(T) < 0.3, 0.0, r.random(T)).astype(np.float32)
    hidden, table = r.normal(size=(T, D)).astype(np.float32), r.normal(size=(V, D)).astype(np.float32)
    return hidden, table, r.integers(0, V, T).astype(np.int32), weights


def oracle(hidden, table, targets, weights, z=0.0):
    """Value and gradients (hidden, table, weights) of sum_t w_t (-log p_t[y_t] + z * Z_t^2), float64."""
    hidden, table = hidden.astype(np.float64), table.astype(np.float64)
    logits = hidden @ table.T
    normaliser = logsumexp(logits, axis=1)
    losses = -log_softmax(logits, axis=1)[np.arange(len(targets)), targets] + z * normaliser**2
    gradient = softmax(logits, axis=1) * (1 + 2 * z * normaliser)[:, None]
    gradient[np.arange(len(targets)), targets] -= 1
    gradient *= weights[:, None]
    return np.sum(weights * losses), gradient @ table, gradient.T @ hidden, losses


@pytest.mark.parametrize("chunk, z", [(8, 0.0), (37, 0.0), (1000, 0.1), (5, 0.01), (1, 0.1)])
@pytest.mark.parametrize("words_at_once", [2048, 16])
def test_value_and_gradients_are_those_of_the_formula(problem, chunk, z, words_at_once, monkeypatch):
    monkeypatch.setattr(lm, "WORDS_AT_ONCE", words_at_once)  # 50 words in 4 parts of 13, the last of 11
    hidden, table, targets, weights = problem
    value = jax.jit(lambda h, e, w: chunked_cross_entropy(h, e, targets, w, chunk, z)[0])
    loss, gradients = jax.value_and_grad(lambda *a: 3.0 * value(*a), argnums=(0, 1, 2))(hidden, table, weights)
    expected, *expected_gradients = oracle(*problem, z)
    np.testing.assert_allclose(loss, 3 * expected, rtol=1e-5)
    np.testing.assert_allclose(value(hidden, table, weights), expected, rtol=1e-5)
    for got, want in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, 3 * want, atol=1e-5 * max(1, np.abs(want).max()), rtol=1e-5)


def test_weight_sum_and_all_weights_zero(problem):
    hidden, table, targets, weights = problem
    assert float(chunked_cross_entropy(hidden, table, targets, weights, 8)[1]) == pytest.approx(weights.sum(), rel=1e-6)
    mean = lambda h: (lambda s, n: s / jnp.maximum(n, 1))(*chunked_cross_entropy(h, table, targets, jnp.zeros(T), 8, 0.1))
    loss, gradient = jax.value_and_grad(mean)(hidden)
    assert loss == 0 and np.all(gradient == 0)


def test_bfloat16_states_with_a_float32_table_accumulate_in_float32(problem):
    hidden, table, targets, weights = problem
    hidden, table = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(table)
    loss, (dh, de) = jax.value_and_grad(lambda h, e: chunked_cross_entropy(h, e, targets, weights, 8)[0], argnums=(0, 1))(hidden, table)
    rounded = np.asarray(table.astype(jnp.bfloat16).astype(jnp.float32))
    expected, dh_expected, de_expected, _ = oracle(np.asarray(hidden.astype(jnp.float32)), rounded, targets, weights)
    assert (loss.dtype, dh.dtype, de.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # the products are exact, only sums round
    np.testing.assert_allclose(dh.astype(jnp.float32), dh_expected, atol=2e-2)
    np.testing.assert_allclose(de, de_expected, atol=2e-2)


def sizes(jaxpr):
    """Number of elements of every array in a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (math.prod(v.aval.shape) for v in equation.outvars if hasattr(v.aval, "shape"))
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_no_array_of_tokens_times_vocabulary_exists():
    tokens, width, vocabulary, chunk = 256, 4, 128, 32
    shapes = [jax.ShapeDtypeStruct((tokens, width), jnp.float32), jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
              jax.ShapeDtypeStruct((tokens,), jnp.int32), jax.ShapeDtypeStruct((tokens,), jnp.float32)]
    value = lambda *a: chunked_cross_entropy(*a, chunk)[0]
    for function in (value, jax.grad(value, argnums=(0, 1))):
        found = list(sizes(jax.make_jaxpr(function)(*shapes).jaxpr))
        assert max(found) == chunk * vocabulary < tokens * vocabulary  # the logits of one chunk are seen, and nothing larger


def test_value_alone_forms_no_gradient_and_a_gradient_forms_logits_once():
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in [((64, 4), "float32"), ((32, 4), "float32"), ((64,), "int32"), ((64,), "float32")]]
    products = lambda f: str(jax.make_jaxpr(f)(*shapes)).count("dot_general")
    value = lambda *a: chunked_cross_entropy(*a, 16)[0]
    assert products(value) == 1
    assert products(jax.grad(value, argnums=(0, 1))) == 3


def test_bad_arguments_are_refused(problem):
    for chunk, groups in [(0, 1), (8, 2), (8, 0)]:
        with pytest.raises(ValueError, match="chunk_size"):
            chunked_cross_entropy(*problem, chunk, groups=groups)
    with pytest.raises(ValueError, match="groups = 37, but .* into 1 parts"):
        chunked_cross_entropy(*problem, 8, groups=37)
