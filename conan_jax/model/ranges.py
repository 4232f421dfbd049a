"""Which blocks of scores hold anything: the same answer for every attention that works in blocks.

A segment is a run of tokens, so the keys that a block of queries may see form one run of blocks, and so do the queries
that see a block of keys. Everything outside the run is zero: padding, other segments and, while the mask is causal, what
lies above the diagonal. The runs are data, not shapes: nothing recompiles when alpha or the lengths change.
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


def _runs(layout: Layout) -> tuple[Int[Array, "B L"], Int[Array, "B L"], Int[Array, "B L"]]:
    """Each token's place in its row, and where its segment starts and stops."""
    index = jnp.broadcast_to(jnp.arange(layout.positions.shape[1], dtype=jnp.int32), layout.positions.shape)
    start = index - layout.positions
    return index, start, start + layout.lengths


def _blocks(start: Int[Array, "B L"], stop: Int[Array, "B L"], real: Bool[Array, "B L"], block: int, other: int) -> Ranges:
    """Tokens `start` <= x < `stop` seen by each real token -> blocks of `other` tokens seen by each block of `block` tokens."""
    B, L = start.shape

    def rows(x: Array, fill: int) -> Array:
        x = jnp.where(real, x, fill)
        return jnp.pad(x, ((0, 0), (0, -L % block)), constant_values=fill).reshape(B, -1, block)

    first, end = rows(start, L).min(axis=-1), rows(stop, 0).max(axis=-1)
    some = first < end
    return Ranges(jnp.where(some, first // other, 0), jnp.where(some, (end + other - 1) // other, 0))
