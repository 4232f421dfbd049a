"""The hand-written gradient of dense attention, against autodiff of the plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conan_jax.model import Bidirectional, Layout
from conan_jax.model.dense import dense_attention, parts_of
from conan_jax.model.softmask import mask_matrix
from tests.model.test_attention import MASKS, ROWS, arrays, layout_of

B, L = 4, 7


def plain(q, k, v, mask, layout):
    """softmax(s * M or s + log M) v, each query head beside its own copy of the keys; 0 on padding."""
    k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("bihc,bjhc->bhij", q, k) / np.sqrt(q.shape[-1])
    M = mask_matrix(mask, layout)[:, None]
    seen = layout.segment_ids[:, None, :, None] == layout.segment_ids[:, None, None, :]
    if mask.apply == "log":
        scores, seen = scores + jnp.log(jnp.where(M > 0, M, 1.0)), seen & (M > 0)
    else:
        scores = scores * M
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.where(layout.real[..., None, None], jnp.einsum("bhij,bjhc->bihc", weights, v), 0)


def results(f, q, k, v, w):
    return f(q, k, v), *jax.grad(lambda *x: jnp.sum(f(*x).astype(jnp.float32) * w), argnums=(0, 1, 2))(q, k, v)


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients_are_those_of_autodiff(name, parts):
    layout = layout_of([*ROWS[L], [1] * 4 + [0] * 3])
    q, k, v, w = arrays(2, B, L)
    mask = MASKS[name][0](0.3)
    expected = jax.jit(lambda *x: results(lambda q, k, v: plain(q, k, v, mask, layout), *x))(q, k, v, w)
    actual = jax.jit(lambda *x: results(lambda q, k, v: dense_attention(q, k, v, mask, layout, parts), *x))(q, k, v, w)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_padding_alone_masks_in_both_passes():
    """Rows of one text each under `Bidirectional` carry one number a key, and no row of masks a query."""
    layout = Layout.from_lengths(jnp.array([7, 3, 0, 1]), L)
    q, k, v, w = arrays(3, B, L)
    expected = jax.jit(lambda *x: results(lambda q, k, v: plain(q, k, v, Bidirectional(), layout), *x))(q, k, v, w)
    actual = jax.jit(lambda *x: results(lambda q, k, v: dense_attention(q, k, v, Bidirectional(), layout, 2), *x))(q, k, v, w)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert not np.asarray(a)[2].any()


def test_bfloat16_gradients_stay_near_those_of_float32():
    layout = Layout.from_lengths(jnp.array([7, 3, 5, 1]), L)
    q, k, v, w = (x * 0.5 for x in arrays(4, B, L))
    low = tuple(x.astype(jnp.bfloat16) for x in (q, k, v))
    for a, b in zip(results(lambda *x: dense_attention(*x, Bidirectional(), layout, 2), *low, w),
                    results(lambda *x: dense_attention(*x, Bidirectional(), layout, 2), q, k, v, w), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=2e-2 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize(("shape", "expected"), [((64, 128, 8), 8), ((1, 512, 8), 1), ((6, 512, 8), 6), ((7, 512, 8), 7), ((2, 16, 4), 1)])
def test_parts_divide_the_batch(shape, expected):
    assert parts_of(*shape) == expected and shape[0] % expected == 0
