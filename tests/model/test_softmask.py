"""The soft mask equals METHODS 1.3 element by element, and anneals as the schedules say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conan_jax import config
from conan_jax.errors import ConfigError
from conan_jax.model import Bidirectional, Causal, Layout, SoftMask, alpha_at, mask_bias, mask_matrix
from conan_jax.model.softmask import MASKED
from tests.model import oracle

RANKS = {"key": (64, 59, 49, 33, 1), "query": (64, 58, 48, 32, 1)}


@pytest.mark.parametrize("index", RANKS)
def test_rank_falls_as_published(index):
    layout = Layout.from_lengths(jnp.array([64]), 64)
    matrices = [np.asarray(mask_matrix(SoftMask(a, index=index), layout)[0]) for a in (0, 0.1, 0.25, 0.5, 1)]
    assert tuple(int(np.linalg.matrix_rank(m)) for m in matrices) == RANKS[index]


@pytest.mark.parametrize("index", ["key", "query"])
@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.37, 1.0])
def test_matrix_is_the_formula_in_each_segment(alpha, index):
    segments = jnp.array([[1, 1, 1, 2, 2, 2, 2, 2, 0, 0]])
    layout = Layout.from_segments(segments, jnp.array([[0, 1, 2, 0, 1, 2, 3, 4, 0, 0]]))
    expected = np.zeros((10, 10))
    expected[:3, :3] = oracle.soft_mask(alpha, index, 3)
    expected[3:8, 3:8] = oracle.soft_mask(alpha, index, 5)
    np.testing.assert_allclose(mask_matrix(SoftMask(alpha, index=index), layout)[0], expected, atol=1e-6)


def test_ends_are_exact_and_bias_is_finite():
    layout = Layout.from_lengths(jnp.array([5, 0]), 6)
    for index in ("key", "query"):
        np.testing.assert_array_equal(mask_bias(SoftMask(0.0, index=index), layout), mask_bias(Causal(), layout))
        np.testing.assert_array_equal(mask_bias(SoftMask(1.0, index=index), layout), mask_bias(Bidirectional(), layout))
    bias = np.asarray(mask_bias(Causal(), layout))
    assert np.isfinite(bias).all() and np.exp(np.float32(MASKED)) == 0
    assert (bias[0, :5, :5] == np.where(np.tri(5, dtype=bool), 0, np.float32(MASKED))).all() and (bias[1] == np.float32(MASKED)).all()


def test_mask_grows_with_alpha():
    layout = Layout.from_lengths(jnp.array([9]), 9)
    grown = [np.asarray(mask_matrix(SoftMask(a), layout)) for a in np.linspace(0, 1, 8)]
    assert all((late >= early).all() and (late > early).any() for early, late in zip(grown, grown[1:]))


@pytest.mark.parametrize("schedule, expected", [
    ("linear", [0, 0.25, 0.5, 1, 1]), ("accelerate", [0, 0.0625, 0.25, 1, 1]), ("decelerate", [0, 0.4375, 0.75, 1, 1]),
    ("constant", [1] * 5)])
@pytest.mark.parametrize("total, steps", [(8, None), (100, 8)])
def test_schedules(schedule, expected, total, steps):
    soft = config.SoftMask(schedule=schedule, steps=None if schedule == "constant" else steps)
    alphas = [alpha_at(t, total, soft) for t in (0, 2, 4, 8, 50)]
    np.testing.assert_allclose(alphas, expected, atol=1e-7)
    assert all(a.dtype == jnp.float32 and a.shape == () for a in alphas)


def test_alpha_moves_without_recompiling():
    layout, traces = Layout.from_lengths(jnp.array([4]), 4), []

    @jax.jit
    def total(step):
        traces.append(None)
        return mask_matrix(SoftMask(alpha_at(step, 10, config.SoftMask())), layout).sum()

    sums = [float(total(jnp.int32(t))) for t in range(0, 11, 5)]
    assert len(traces) == 1 and sums == sorted(sums) and sums[0] == 10 and sums[-1] == 16


def test_no_two_masks_share_a_program():
    """`jit` finds its program by the structure of the arguments: equal structures would mean one program for two masks."""
    masks = [Causal(), Bidirectional(), *(SoftMask(0.5, apply, index) for apply in ("log", "multiply") for index in ("key", "query"))]
    structures = [jax.tree.structure(mask) for mask in masks]
    assert all((a == b) == (i == j) for i, a in enumerate(structures) for j, b in enumerate(structures))
    assert jax.tree.structure(Causal()) == structures[0] and jax.tree.structure(SoftMask(0.1)) == structures[2]


def test_refusals_name_the_key():
    with pytest.raises(ConfigError, match="at least one step"):
        alpha_at(0, 0, config.SoftMask())
    with pytest.raises(ConfigError, match="schedule 'cubic'.*linear"):
        alpha_at(0, 5, config.SoftMask(schedule="cubic"))


def test_layout_counts_segments():
    rng = np.random.default_rng(0)
    rows, positions, lengths = np.zeros((6, 12), int), np.zeros((6, 12), int), np.zeros((6, 12), int)
    for row in range(5):
        start, segment = 0, 1
        while start < 12 and rng.random() < 0.9:
            n = min(int(rng.integers(1, 6)), 12 - start)
            rows[row, start:start + n], positions[row, start:start + n], lengths[row, start:start + n] = segment, range(n), n
            start, segment = start + n, segment + 1
    layout = Layout.from_segments(jnp.asarray(rows), jnp.asarray(positions))
    np.testing.assert_array_equal(layout.lengths, lengths)
    np.testing.assert_array_equal(layout.real, rows > 0)
    single = Layout.from_lengths(jnp.array([3, 0, 4]), 4)
    np.testing.assert_array_equal(single.segment_ids, [[1, 1, 1, 0], [0] * 4, [1] * 4])
    np.testing.assert_array_equal(single.positions, [[0, 1, 2, 0], [0] * 4, [0, 1, 2, 3]])
    np.testing.assert_array_equal(single.lengths, [[3, 3, 3, 0], [0] * 4, [4] * 4])
