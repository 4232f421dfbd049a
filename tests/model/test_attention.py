"""Both attention paths against a per-token NumPy oracle, and against each other in value and gradient."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conan_jax.errors import ConfigError
from conan_jax.model import Bidirectional, Causal, Layout, SoftMask, attention
from tests.model import oracle

MASKS = {"causal": (lambda a: Causal(), "log", lambda a, n: np.tri(n)),
         "bidirectional": (lambda a: Bidirectional(), "log", lambda a, n: np.ones((n, n)))}
for _apply in ("log", "multiply"):
    for _index in ("key", "query"):
        MASKS[f"{_apply}-{_index}"] = (partial(lambda a, apply, index: SoftMask(jnp.float32(a), apply, index), apply=_apply, index=_index),
                                       _apply, partial(lambda a, n, index: oracle.soft_mask(a, index, n), index=_index))

ROWS = {7: [[1] * 3 + [2] * 3 + [0], [0] * 7, [1] * 7], 16: [[1] * 5 + [2] * 1 + [3] * 8 + [0] * 2, [1] * 16, [1] * 3 + [0] * 13]}


def layout_of(rows):
    rows = np.asarray(rows)
    positions = np.array([[int((row[:i] == s).sum()) if s else 0 for i, s in enumerate(row)] for row in rows])
    return Layout.from_segments(jnp.asarray(rows), jnp.asarray(positions))


def arrays(seed, B, L, H=4, K=2, C=6, scale=1.5):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(B, L, n, C)) * scale, jnp.float32) for n in (H, K, K, H))


@partial(jax.jit, static_argnames=("implementation", "block_size"))
def value_and_grads(q, k, v, w, mask, layout, implementation, block_size=4):
    """The output and the gradient of sum(output * w) in q, k, v."""
    def f(q, k, v):
        out = attention(q, k, v, mask, layout, implementation=implementation, block_size=block_size)
        return jnp.sum(out.astype(jnp.float32) * w), out

    grads, out = jax.grad(f, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, grads


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("name", MASKS)
def test_against_numpy(name, implementation):
    make, apply, matrix = MASKS[name]
    for alpha in (0.0, 0.3, 1.0):
        q, k, v, w = arrays(1, 3, 7)
        out, _ = value_and_grads(q, k, v, w, make(alpha), layout_of(ROWS[7]), implementation)
        expected = oracle.attention_rows(q, k, v, ROWS[7], partial(matrix, alpha), apply)
        np.testing.assert_allclose(out, expected, atol=1e-5)


@st.composite
def packed_rows(draw):
    L = draw(st.sampled_from([7, 16]))
    rows = np.zeros((3, L), int)
    for row in rows:
        start, segment = 0, 1
        for n in draw(st.lists(st.integers(1, L), max_size=4)):
            row[start:start + n], start, segment = segment, start + n, segment + 1
    return rows


@pytest.mark.parametrize("name", MASKS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(rows=packed_rows(), alpha=st.sampled_from([0.0, 0.01, 0.3, 0.8, 1.0]), seed=st.integers(0, 1000))
def test_blockwise_equals_dense_with_gradients(name, rows, alpha, seed):
    mask, layout = MASKS[name][0](alpha), layout_of(rows)
    args = arrays(seed, *rows.shape)
    dense, blockwise = (value_and_grads(*args, mask, layout, impl) for impl in ("dense", "blockwise"))
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(blockwise)):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=2e-5)
    padding = rows == 0
    for leaf in jax.tree.leaves((dense, blockwise)):
        assert (np.asarray(leaf)[padding] == 0).all()


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
def test_head_groups(heads):
    args, layout = arrays(3, 3, 16, *heads), layout_of(ROWS[16])
    mask = SoftMask(jnp.float32(0.4))
    dense, blockwise = (value_and_grads(*args, mask, layout, impl, block) for impl, block in (("dense", 4), ("blockwise", 5)))
    expected = oracle.attention_rows(*args[:3], ROWS[16], lambda n: oracle.soft_mask(0.4, "key", n))
    np.testing.assert_allclose(dense[0], expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(blockwise)):
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("apply", ["log", "multiply"])
def test_bfloat16_against_float32(apply):
    layout, mask = layout_of(ROWS[16]), SoftMask(jnp.float32(0.4), apply)
    args = [x.astype(jnp.bfloat16) for x in arrays(5, 3, 16, scale=0.5)]
    exact = value_and_grads(*(x.astype(jnp.float32) for x in args), mask, layout, "dense")
    for implementation in ("dense", "blockwise"):
        for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(value_and_grads(*args, mask, layout, implementation))):
            assert b.dtype == jnp.bfloat16
            np.testing.assert_allclose(b.astype(np.float32), a, atol=2e-2)


@pytest.mark.parametrize("mask, skips", [(Causal(), True), (SoftMask(jnp.float32(0)), True), (SoftMask(jnp.float32(0.1)), False),
                                         (SoftMask(jnp.float32(0), "multiply"), False), (Bidirectional(), False)])
def test_blocks_above_the_diagonal_are_not_visited_when_causal(mask, skips):
    """A NaN in the last block of v reaches the first block's output and gradient only through a visit."""
    q, k, v, w = arrays(8, 3, 16)
    out, (dq, _, _) = value_and_grads(q, k, v.at[:, 12:].set(jnp.nan), w, mask, layout_of(np.ones((3, 16), int)), "blockwise")
    for x in (out, dq):
        assert np.isfinite(x[:, :12]).all() == skips


def test_no_array_grows_with_the_square_of_the_length():
    L = 4096
    shapes = [jax.ShapeDtypeStruct((1, L, n, 4), jnp.float32) for n in (2, 1, 1, 2)]
    layout = Layout.from_lengths(jnp.array([L - 3]), L)

    def largest(jaxpr):
        sizes = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars if hasattr(v.aval, "size")]
        inner = [sub for eqn in jaxpr.eqns for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr) if is_jaxpr(sub)]
        return max(sizes + [largest(getattr(sub, "jaxpr", sub)) for sub in inner], default=0)

    def is_jaxpr(x):
        return hasattr(getattr(x, "jaxpr", x), "eqns")

    def grown(implementation):
        f = partial(value_and_grads, implementation=implementation, block_size=64)
        return largest(jax.make_jaxpr(f)(*shapes, SoftMask(jnp.float32(0.5)), layout).jaxpr)

    assert grown("blockwise") < L * L / 100
    assert grown("auto") == grown("blockwise") and grown("dense") >= L * L


def test_refusals():
    q, k, v, _ = arrays(0, 3, 7, H=3, K=2)
    layout = layout_of(ROWS[7])
    with pytest.raises(ConfigError, match="3 query heads cannot share 2"):
        attention(q, k, v, Causal(), layout)
    with pytest.raises(ConfigError, match="'flash' is not known; use auto, dense, blockwise or pallas_tpu"):
        attention(q[:, :, :2], k, v, Causal(), layout, implementation="flash")


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("apply", ["log", "multiply"])
def test_alpha_is_a_schedule_and_gets_no_gradient(implementation, apply):
    q, k, v, w = arrays(3, 1, 7)

    def total(alpha):
        return jnp.sum(attention(q, k, v, SoftMask(alpha, apply), layout_of(ROWS[7][2:]), implementation=implementation, block_size=4) * w)

    assert jax.grad(total)(0.3) == 0
    assert total(0.3) != total(0.4)


def test_lengths_beyond_the_row_are_those_of_the_row():
    long, whole = (Layout.from_lengths(jnp.array([n, 3]), 7) for n in (75, 7))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(long), jax.tree.leaves(whole), strict=True))


@pytest.mark.parametrize("length", [5, 128, 150])
def test_rows_of_one_text_without_a_mask_are_the_same_with_one(length):
    """Where only padding is masked the L x L mask is left out; the same rows as packed ones take the general way."""
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(rng.normal(size=(3, length, heads, 8)), jnp.float32) for heads in (4, 2, 2))
    single = Layout.from_lengths(jnp.array([length, 3, 0]), length)
    packed = Layout.from_segments(single.segment_ids, single.positions)
    assert single.alone and not packed.alone

    def attended(q, k, v, layout):
        return attention(q, k, v, Bidirectional(), layout, implementation="dense")

    def total(*arguments):
        return jnp.sum(jnp.sin(attended(*arguments)))

    np.testing.assert_allclose(attended(q, k, v, single), attended(q, k, v, packed), atol=1e-6)
    for ours, theirs in zip(*(jax.grad(total, argnums=(0, 1, 2))(q, k, v, layout) for layout in (single, packed)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
