"""What a kernel is told besides q, k and v: a few numbers a token and a few a block, nothing of size L x L.

Runs of blocks (`conan_jax.model.ranges`) and what is known of a whole block travel as scalars that a kernel reads before
its vectors arrive, so that alpha, lengths and packing change which blocks are touched and never the compiled program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from conan_jax.model.layout import Layout
from conan_jax.model.ranges import Ranges
from conan_jax.model.softmask import Mask, log_weights

LOG2E = 1.4426950408889634  # the kernels work in powers of two, which is what the hardware computes
QUERY_ROWS = 2048  # query rows (tokens x heads of a group) a block: float32 kernels then stay in 16 MiB of vector memory
ROWS = 8  # rows of `token_rows`: a whole tile of 32-bit numbers, of which three are used


@dataclass(frozen=True)
class Sizes:
    """The static half of a launch: block sizes in tokens, blocks a row, heads and the form of the mask."""

    block_q: int
    block_k: int
    n_q: int
    n_k: int
    groups: int  # query heads that read one key/value head
    scale: float  # of q k^T, natural units
    apply: Literal["log", "multiply"]
    index: Literal["key", "query"]


class Plan(NamedTuple):
    """The traced half: per row of the batch, flattened int32 vectors (two-dimensional ones waste scalar memory).

    `first` and `end` bound the blocks to visit for each outer block (queries, or keys in the gradient of k and v);
    `segment_q` and `segment_k` are the segment that fills the whole block, 0 where there is none; `ones` says that M is 1 for
    the whole block of the side the mask is indexed by.
    """

    first: Int[Array, "B*n"]
    end: Int[Array, "B*n"]
    segment_q: Int[Array, "B*n_q"]
    segment_k: Int[Array, "B*n_k"]
    ones: Int[Array, "B*m"]


def make_plan(ranges: Ranges, mask: Mask, layout: Layout, sizes: Sizes) -> Plan:
    """The scalars of one launch whose outer blocks see `ranges`; `layout` is padded to whole blocks."""
    def whole(x: Array, block: int) -> Array:
        x = x.reshape(x.shape[0], -1, block)
        return jnp.where(x.min(axis=-1) == x.max(axis=-1), x[..., 0], 0).reshape(-1)

    weights = mask.weights(layout.positions, layout.lengths)
    ones = whole((weights >= 1).astype(jnp.int32), sizes.block_k if sizes.index == "key" else sizes.block_q)
    return Plan(ranges.first.reshape(-1), ranges.end.reshape(-1), whole(layout.segment_ids, sizes.block_q),
                whole(layout.segment_ids, sizes.block_k), ones)


def token_rows(mask: Mask, layout: Layout) -> Float[Array, "B 8 L"]:
    """Rows 0, 1, 2: segment, position, M above the diagonal (log2 M for `apply="log"`). Float32, exact up to 2^24 tokens."""
    weights = mask.weights(layout.positions, layout.lengths)
    weights = log_weights(weights) * LOG2E if mask.apply == "log" else weights
    rows = jnp.stack([layout.segment_ids.astype(jnp.float32), layout.positions.astype(jnp.float32), weights], axis=1)
    return jnp.pad(rows, ((0, 0), (0, ROWS - rows.shape[1]), (0, 0)))
