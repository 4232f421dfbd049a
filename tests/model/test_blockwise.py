"""Blockwise attention: what it must not touch, the two ends of alpha, odd shapes, and a grid against the dense reference."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conan_jax.errors import ConfigError
from conan_jax.model import Bidirectional, Causal, Layout, SoftMask, blockwise, mask_matrix
from conan_jax.model.attention import dense_attention
from conan_jax.model.ranges import all_ones

MASKS = [Causal(), Bidirectional()] + [SoftMask(a, p, x) for a in (0.0, 0.3, 1.0) for p in ("log", "multiply") for x in ("key", "query")]


def arrays(B, L, H=4, K=2, C=8, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(B, L, n, C)), dtype) for n in (H, K, K, H))


def packed(*rows):
    """Rows of segment lengths, cut or filled up with padding to the first row's sum."""
    L = sum(rows[0])
    ids, positions = np.zeros((len(rows), L), int), np.zeros((len(rows), L), int)
    for row, lengths in enumerate(rows):
        start = 0
        for number, n in enumerate(lengths, 1):
            ids[row, start:start + n], positions[row, start:start + n] = number, np.arange(n)
            start += n
    return Layout.from_segments(jnp.asarray(ids), jnp.asarray(positions))


@partial(jax.jit, static_argnames="block")
def run(q, k, v, w, mask, layout, block=None):
    """(o, (dq, dk, dv)) of sum(o * w); dense without a `block`."""
    def f(q, k, v):
        out = blockwise.blockwise_attention(q, k, v, mask, layout, block) if block else dense_attention(q, k, v, mask, layout)
        return jnp.sum(out.astype(jnp.float32) * w), out

    grads, out = jax.grad(f, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return out, grads


def check(actual, expected, tolerance):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, np.abs(b).max()))


# Poison: k and v hold NaN in [bad], so any visit to that block spoils what is `clean`.
@pytest.mark.parametrize(("layout", "mask", "bad", "clean"), [
    (Layout.from_lengths(jnp.array([17, 33]), 64), SoftMask(0.5), slice(48, 64), slice(0, 64)),
    (Layout.from_lengths(jnp.array([17, 33]), 64), SoftMask(0.5, "multiply"), slice(48, 64), slice(0, 64)),
    (packed([32, 32]), Bidirectional(), slice(32, 64), slice(0, 32)),
    (packed([32, 32]), SoftMask(0.7), slice(0, 32), slice(32, 64)),
    (packed([64]), Causal(), slice(32, 64), slice(0, 32)),
    (packed([64], [64]), SoftMask(jnp.float32(0)), slice(32, 64), slice(0, 32)),
])
def test_blocks_without_work_are_not_visited(layout, mask, bad, clean):
    q, k, v, w = arrays(len(layout.lengths), 64)
    expected = run(q, k, v, w, mask, layout, 16)
    out, (dq, dk, dv) = run(q, k.at[:, bad].set(jnp.nan), v.at[:, bad].set(jnp.nan), w, mask, layout, 16)
    check((out[:, clean], dq[:, clean]), (expected[0][:, clean], expected[1][0][:, clean]), 0)
    if clean == slice(0, 64):  # nothing reads the poison, so all of the gradient is clean
        check((dk, dv), expected[1][1:], 0)
    # The same from the other side: queries that see no clean key leave that key's gradient alone.
    if mask.is_causal():
        _, (_, dk, dv) = run(q.at[:, :32].set(jnp.nan), k, v, w, mask, layout, 16)
        check((dk[:, 32:], dv[:, 32:]), (expected[1][1][:, 32:], expected[1][2][:, 32:]), 0)


def test_a_visit_would_spread_the_poison():
    q, k, v, w = arrays(1, 64)
    out, _ = run(q, k, v.at[:, 32:].set(jnp.nan), w, SoftMask(0.01), packed([64]), 16)
    assert np.isnan(np.asarray(out[:, :32])).all()


@pytest.mark.parametrize(("mask", "free"), [(SoftMask(1.0), True), (SoftMask(1.0, "multiply", "query"), True), (Bidirectional(), True),
                                            (SoftMask(0.9), False)])
def test_no_mask_is_computed_where_it_is_all_ones(monkeypatch, mask, free):
    monkeypatch.setattr(blockwise, "_masked", lambda scores, *_: scores * jnp.nan)
    monkeypatch.setattr(blockwise, "_above", lambda rows, columns, mask: jnp.full((1, 16, 16), jnp.nan))
    results = run.__wrapped__(*arrays(1, 64), mask, packed([64]), 16)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(results)) == free


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("block_q", "block_k"), [(4, 4), (3, 5), (8, 2), (16, 16)])
def test_all_ones_is_what_the_mask_written_out_says(mask, block_q, block_k):
    layout = packed([13], [2, 5, 1], [8, 5], [0, 0], [7])
    matrix, real = np.asarray(mask_matrix(mask, layout)), np.asarray(layout.real)
    flags = np.asarray(all_ones(layout, mask, block_q, block_k))
    for b, i, j in np.ndindex(flags.shape):
        queries, keys = slice(i * block_q, (i + 1) * block_q), slice(j * block_k, (j + 1) * block_k)
        whole = (j + 1) * block_k <= 13  # a block that reaches beyond the row holds padding
        rows = matrix[b, queries, keys][real[b, queries]]
        ones = not len(rows) or whole and bool((rows == 1).all())
        # Divided by the query's position, a block on the diagonal may be all ones by turns: weights of the first rows, then below.
        assert flags[b, i, j] == ones or ones and mask.index == "query" and queries.start < keys.stop and keys.start < queries.stop


def test_the_ends_of_alpha():
    """To the bit, outputs and gradients; shapes and dtypes as in the grid, whose programs serve again."""
    args, layout = arrays(3, 33), packed([33], [11, 20], [5])
    causal, bidirectional = run(*args, Causal(), layout, 16), run(*args, Bidirectional(), layout, 16)
    for index in ("key", "query"):
        check(run(*args, SoftMask(jnp.float32(0), "log", index), layout, 16), causal, 0)
        for apply in ("log", "multiply"):
            check(run(*args, SoftMask(jnp.float32(1), apply, index), layout, 16), bidirectional, 0)


@pytest.mark.parametrize(("L", "block"), [(1, 1), (1, 512), (5, 2), (15, 16), (16, 16), (17, 16), (130, 128)])
def test_any_length_with_any_block(L, block):
    args, layout = arrays(1, L, *((3, 1) if L % 2 else (3, 3))), Layout.from_lengths(jnp.array([L]), L)
    check(run(*args, SoftMask(0.4), layout, block), run(*args, SoftMask(0.4), layout), 2e-5)


def test_blocks_share_a_row_evenly(monkeypatch):
    sizes = []
    monkeypatch.setattr(blockwise, "_attend", lambda q, k, v, mask, layout, b: sizes.append(b) or q)
    for L, block in ((1, 512), (500, 512), (512, 512), (513, 512), (600, 512), (2048, 512), (1100, 512), (7, 4), (17, 5)):
        blockwise.blockwise_attention(*[np.zeros((1, L, 1, 1))] * 3, Causal(), None, block)
    assert sizes == [1, 500, 512, 320, 320, 512, 384, 4, 5]


@pytest.mark.parametrize("mask", [Causal(), Bidirectional(), SoftMask(0.3), SoftMask(0.0, "multiply")])
def test_rows_of_padding_are_zero_whatever_arrives_there(mask):
    q, k, v, w = arrays(3, 40)
    layout = Layout.from_lengths(jnp.array([0, 40, 5]), 40)
    w = jnp.where(layout.real[..., None, None], w, jnp.nan)
    for x in jax.tree.leaves(run(q, k, v, w, mask, layout, 16)):
        x = np.asarray(x)
        assert np.isfinite(x).all() and (x[0] == 0).all() and (x[2, 5:] == 0).all() and x[1].any() and x[2, :5].any()


def test_one_program_for_every_alpha_and_every_length():
    f = jax.jit(lambda q, k, v, w, alpha, lengths: run.__wrapped__(q, k, v, w, SoftMask(alpha), Layout.from_lengths(lengths, 40), 16))
    for alpha in (0.0, 0.5, 1.0):
        for lengths in ([40, 40], [1, 0]):
            f(*arrays(2, 40), jnp.float32(alpha), jnp.array(lengths))
    assert f._cache_size() == 1


def test_refuses_blocks_of_nothing():
    with pytest.raises(ConfigError, match="at least 1 token, got block_size 0"):
        blockwise.blockwise_attention(*arrays(1, 4)[:3], Causal(), packed([4]), 0)


@st.composite
def cases(draw):
    L = 33
    rows = np.zeros((3, L), int)
    for row in rows:
        start = 0
        for segment, n in enumerate(draw(st.lists(st.integers(1, L), max_size=4)), 1):
            row[start:start + n] = segment
            start += n
    positions = np.array([[int((row[:i] == s).sum()) if s else 0 for i, s in enumerate(row)] for row in rows])
    mask = draw(st.sampled_from([Causal(), Bidirectional()] + [SoftMask(jnp.float32(0), p, x) for p in ("log", "multiply")
                                                               for x in ("key", "query")]))
    if isinstance(mask, SoftMask):
        mask = SoftMask(jnp.float32(draw(st.sampled_from([0.0, 0.02, 0.3, 0.8, 1.0]))), mask.apply, mask.index)
    dtype = draw(st.sampled_from([jnp.float32, jnp.bfloat16]))
    return rows, positions, mask, dtype, draw(st.integers(0, 99))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_grid_against_dense(case):
    rows, positions, mask, dtype, seed = case
    layout = Layout.from_segments(jnp.asarray(rows), jnp.asarray(positions))
    args = arrays(*rows.shape, dtype=dtype, seed=seed)
    actual = run(*args, mask, layout, 16)
    assert all(x.dtype == dtype for x in jax.tree.leaves(actual))
    exact = run(*(x.astype(jnp.float32) for x in args), mask, layout)
    check(actual, exact, 2e-5 if dtype == jnp.float32 else 2e-2)
