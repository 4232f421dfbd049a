"""The hand-written gradients of a block's maps, against autodiff of the plain formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conan_jax.model.gradients import gated, normalised, product

EPS = 1e-5


def by_hand_and_by_autodiff(written, plain, *arrays):
    """Results and gradients of both, the plain one in float64."""
    def both(f, *args):
        y, pull = jax.vjp(f, *args)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), y.dtype)
        return y, *pull(weights)

    with jax.enable_x64(True):
        expected = jax.jit(lambda *x: both(plain, *x))(*(jnp.asarray(np.asarray(a, np.float64)) for a in arrays))
        expected = [np.asarray(x) for x in expected]
    return jax.jit(lambda *x: both(written, *x))(*arrays), expected


def normal(*shape, scale=1.0, seed=5):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def assert_same(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_gate():
    assert_same(*by_hand_and_by_autodiff(gated, lambda g, u: g / (1 + jnp.exp(-g)) * u, normal(5, 9, scale=4), normal(5, 9, seed=6)))


@pytest.mark.parametrize(("inputs", "outputs"), [(9, 4), (4, 9), (6, 6)])
def test_the_product(inputs, outputs):
    assert_same(*by_hand_and_by_autodiff(product, lambda x, w: jnp.einsum("ti,io->to", x, w), normal(7, inputs), normal(inputs, outputs)))


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 4, 12)])
def test_the_norm(shape):
    def plain(x, scale):
        return x / jnp.sqrt((x * x).sum(-1, keepdims=True) / shape[-1] + EPS) * scale

    x = normal(*shape).at[0].set(0.0)  # a row of zeros, as padding may be: its gradient is large, and finite
    actual, expected = by_hand_and_by_autodiff(lambda x, s: normalised(x, s, EPS), plain, x, 1 + normal(12, scale=0.1, seed=8))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-6)


def test_bfloat16_stays_bfloat16_and_near():
    x, scale = normal(7, 12).astype(jnp.bfloat16), 1 + normal(12, scale=0.1, seed=8)
    actual, expected = by_hand_and_by_autodiff(
        lambda x, s: normalised(x, s, EPS), lambda x, s: x / jnp.sqrt((x * x).mean(-1, keepdims=True) + EPS) * s, x, scale)
    assert [a.dtype for a in actual] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2e-2 * max(1.0, float(np.abs(b).max())))
