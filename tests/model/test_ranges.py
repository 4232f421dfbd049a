"""The blocks to visit are exactly those in which the mask, written out, holds something."""

import jax.numpy as jnp
import numpy as np
import pytest

from conan_jax.model import Bidirectional, Causal, Layout, SoftMask, mask_matrix
from conan_jax.model.ranges import key_ranges, query_ranges

LAYOUTS = {
    "padded": Layout.from_lengths(jnp.array([13, 0, 1, 7]), 13),
    "packed": Layout.from_segments(jnp.array([[1, 1, 2, 2, 2, 2, 2, 3, 0, 0, 0, 0, 0], [1] * 9 + [2] * 4]),
                                   jnp.array([[0, 1, 0, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0], [*range(9), *range(4)]])),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask", [Causal(), Bidirectional(), SoftMask(0.0), SoftMask(0.3), SoftMask(1.0), SoftMask(0.0, apply="multiply")])
@pytest.mark.parametrize(("block_q", "block_k"), [(4, 4), (4, 2), (3, 5), (13, 13), (16, 1)])
def test_ranges_are_the_hull_of_what_the_mask_lets_through(layout, mask, block_q, block_k):
    layout = LAYOUTS[layout]
    seen = np.asarray(mask_matrix(SoftMask(0.5) if not mask.is_causal() else mask, layout)) > 0  # multiply: 0 * s still weighs exp(0)
    for ranges, blocks, others, seen in ((key_ranges(layout, mask, block_q, block_k), block_q, block_k, seen),
                                         (query_ranges(layout, mask, block_q, block_k), block_k, block_q, seen.swapaxes(1, 2))):
        for b in range(len(seen)):
            for n in range(-(-13 // blocks)):
                touched = np.flatnonzero(seen[b, n * blocks : (n + 1) * blocks].any(axis=0)) // others
                want = (touched.min(), touched.max() + 1) if touched.size else (0, 0)
                assert (int(ranges.first[b, n]), int(ranges.end[b, n])) == want
