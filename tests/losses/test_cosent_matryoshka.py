"""CoSENT and MRL against their formulas in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conan_jax.losses import cosent, info_nce, matryoshka
from conan_jax.losses.matryoshka import truncate

B, D = 7, 6


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-9)


@pytest.fixture(scope="module")
def pairs():
    r = np.random.default_rng(3)
    return unit(r.normal(size=(B, D))), unit(r.normal(size=(B, D))), np.array([0, 1, 1, 2.5, 5, 3, 5], np.float32)


def cosent_oracle(a, b, scores, t, rows=range(B)):
    cosines = np.sum(a * b, axis=1)
    terms = [np.exp((cosines[k] - cosines[i]) / t) for i in rows for k in rows if scores[i] > scores[k]]
    return np.log(1 + sum(terms)), np.mean([x < 1 for x in terms]) if terms else 0.0


@pytest.mark.parametrize("t", [0.05, 1.0])
def test_cosent_value_and_gradient(pairs, t):
    a, b, scores = pairs
    (value, metrics), gradient = jax.value_and_grad(lambda x: cosent(x, jnp.asarray(b), scores, temperature=t), has_aux=True)(jnp.asarray(a, jnp.float32))
    expected, ordered = cosent_oracle(a, b, scores, t)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["ordered"], ordered, atol=1e-6)
    np.testing.assert_allclose(metrics["cosine"], np.mean(np.sum(a * b, 1)), atol=1e-6)
    direction = np.random.default_rng(4).normal(size=a.shape)
    at = lambda h: cosent_oracle(a + h * direction, b, scores, t)[0]
    np.testing.assert_allclose(np.sum(gradient * direction), (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-4)


def test_cosent_is_stable_where_the_plain_formula_overflows():
    a = jnp.array([[1.0, 0], [1, 0]])
    b = jnp.array([[-1.0, 0], [1, 0]])
    value, gradient = jax.value_and_grad(lambda x: cosent(x, b, jnp.array([1.0, 0]), temperature=0.01)[0])(a)
    np.testing.assert_allclose(value, 200, rtol=1e-6)  # log(1 + e^200) overflows float32
    assert np.all(np.isfinite(gradient))


def test_cosent_without_an_order_has_no_loss_and_no_gradient(pairs):
    a, b, _ = pairs
    value, gradient = jax.value_and_grad(lambda x: cosent(x, jnp.asarray(b), jnp.ones(B))[0])(jnp.asarray(a))
    assert value == 0 and np.all(gradient == 0)
    assert cosent(a[:1], b[:1], jnp.ones(1))[0] == 0


def test_cosent_leaves_empty_pairs_out(pairs):
    a, b, scores = pairs
    valid = np.arange(B) != 4
    a = np.where(valid[:, None], a, 0)
    value, metrics = cosent(a, b, scores, temperature=0.05, valid=jnp.asarray(valid))
    expected, ordered = cosent_oracle(a, b, scores, 0.05, np.flatnonzero(valid))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["ordered"], ordered, atol=1e-6)


@pytest.mark.parametrize("dims, weights", [((2, 6), ()), ((6, 3, 2), (1.0, 0.3, 0.0))])
def test_matryoshka_is_the_weighted_mean_over_renormalised_prefixes(pairs, dims, weights):
    a, b, scores = pairs
    value, metrics = matryoshka(lambda first, second: cosent(first, second, scores, temperature=0.2), {"first": a, "second": b}, dims, weights)
    each = [cosent_oracle(unit(a[:, :d]), unit(b[:, :d]), scores, 0.2)[0] for d in dims]
    np.testing.assert_allclose(value, np.average(each, weights=weights or None), rtol=1e-5)
    for d, expected in zip(dims, each):
        np.testing.assert_allclose(metrics[f"loss@{d}"], expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["cosine"], np.mean(np.sum(a * b, 1)), atol=1e-6)  # of the widest


def test_matryoshka_cuts_hard_negatives_too_and_no_dims_means_the_loss_itself(pairs):
    a, b, _ = pairs
    negatives = unit(np.random.default_rng(5).normal(size=(B, 2, D)))
    vectors = {"queries": a, "positives": b, "negatives": negatives}
    cut = {name: unit(v[..., :4]) for name, v in vectors.items()}
    np.testing.assert_allclose(matryoshka(info_nce, vectors, (4,))[0], info_nce(**cut)[0], rtol=1e-5)
    assert matryoshka(info_nce, vectors)[0] == info_nce(**vectors)[0]


def test_truncating_a_zero_vector_has_a_zero_gradient():
    value, gradient = jax.value_and_grad(lambda v: jnp.sum(truncate(v, 2)))(jnp.zeros((1, 4)))
    assert value == 0 and np.all(gradient == 0)


def test_matryoshka_refuses_a_width_beyond_the_vectors(pairs):
    with pytest.raises(ValueError, match="9"):
        matryoshka(info_nce, {"queries": pairs[0], "positives": pairs[1]}, (9,))
