"""Which blocks of scores hold anything: one answer for attention in plain JAX and for the TPU kernels.

A segment is a run of tokens, so the keys that a block of queries may see form one run of blocks, and so do the queries
that see a block of keys. Everything outside the run is zero: padding, other segments and, while the mask is causal, what
lies above the diagonal. Inside the run, a block whose mask is all ones needs no bias (`all_ones`, for plain JAX; the kernels
tell it from scalars of their own, `kernels/plan.py`). Runs and flags are data, not shapes:
nothing recompiles when alpha or the lengths change.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from conan_jax.model.layout import Layout
from conan_jax.model.softmask import Mask


class Ranges(NamedTuple):
    """Blocks `first` <= x < `end` to visit, by row of the batch; an empty run (a block of padding) is 0, 0. int32."""

    first: Int[Array, "B n"]
    end: Int[Array, "B n"]


def key_ranges(layout: Layout, mask: Mask, block_q: int, block_k: int) -> Ranges:
    """The blocks of `block_k` keys that each block of `block_q` queries sees. L need not be a multiple of either."""
    index, start, stop = _runs(layout)
    return _blocks(start, jnp.where(mask.is_causal(), jnp.minimum(stop, index + 1), stop), layout.real, block_q, block_k)


def query_ranges(layout: Layout, mask: Mask, block_q: int, block_k: int) -> Ranges:
    """The blocks of `block_q` queries that see each block of `block_k` keys."""
    index, start, stop = _runs(layout)
    return _blocks(jnp.where(mask.is_causal(), index, start), stop, layout.real, block_k, block_q)


def all_ones(layout: Layout, mask: Mask, block_q: int, block_k: int) -> Bool[Array, "B n m"]:
    """Blocks (n of queries, m of keys) in which M is 1 for every real query, so that scores stay as they are (METHODS 1.3).

    All keys are tokens of the queries' one segment, and either none is later than any query or the weights above the
    diagonal are all 1. A block of queries that is all padding counts as such: nothing there is read.
    """
    far = layout.positions.shape[1] + 1  # beyond every position and segment number
    segments, positions, weights = layout.segment_ids, layout.positions, mask.weights(layout.positions, layout.lengths)

    def least(x: Array, fill: int, block: int) -> Array:
        return _split(jnp.where(layout.real, x, fill), fill, block).min(axis=-1)

    def most(x: Array, block: int) -> Array:
        return _split(x, 0, block).max(axis=-1)

    first, last = least(segments, far, block_q)[:, :, None], most(segments, block_q)[:, :, None]
    keys = most(segments, block_k)[:, None, :]  # one segment where also the least, padding (0) included, is this one
    one_segment = (_split(segments, 0, block_k).min(axis=-1)[:, None, :] == keys) & (first == keys) & (last == keys)
    below = most(positions, block_k)[:, None, :] <= least(positions, far, block_q)[:, :, None]
    full = least(weights, 1, block_k)[:, None, :] if mask.index == "key" else least(weights, 1, block_q)[:, :, None]
    return (last == 0) | one_segment & (below | (full >= 1))


def _runs(layout: Layout) -> tuple[Int[Array, "B L"], Int[Array, "B L"], Int[Array, "B L"]]:
    """Each token's place in its row, and where its segment starts and stops."""
    index = jnp.broadcast_to(jnp.arange(layout.positions.shape[1], dtype=jnp.int32), layout.positions.shape)
    start = index - layout.positions
    return index, start, start + layout.lengths


def _blocks(start: Int[Array, "B L"], stop: Int[Array, "B L"], real: Bool[Array, "B L"], block: int, other: int) -> Ranges:
    """Tokens `start` <= x < `stop` seen by each real token -> blocks of `other` tokens seen by each block of `block` tokens."""
    L = start.shape[1]
    first = _split(jnp.where(real, start, L), L, block).min(axis=-1)
    end = _split(jnp.where(real, stop, 0), 0, block).max(axis=-1)
    some = first < end
    return Ranges(jnp.where(some, first // other, 0), jnp.where(some, (end + other - 1) // other, 0))


def _split(x: Array, fill: int, block: int) -> Array:
    """[B, L] -> [B, n, block]; the last block is filled up with `fill`."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), constant_values=fill).reshape(x.shape[0], -1, block)
