"""How a kernel walks its blocks: outer blocks one by one, and for each the run of inner blocks that the mask leaves.

The grid is (row, key/value head, outer block, step). At step s the inner block is `first + s`; past the run's end the
last block is asked for again, which copies nothing, and nothing is computed. The number of steps is the longest run of
the batch, a traced number: a batch of short rows in a long bucket walks short runs with the same program.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from conan_jax.model.kernels.plan import QUERY_ROWS, ROWS, Plan, Sizes


class Walk:
    """Block specs of one launch. `outer` is "q" or "k"; the other side is walked in runs."""

    def __init__(self, sizes: Sizes, outer: str):
        self.sizes, self.outer = sizes, outer

    def block(self, side: str, b: jax.Array, o: jax.Array, s: jax.Array, plan: Plan) -> jax.Array:
        """Index of the block of `side` at outer block o and step s, clamped into the run."""
        if side == self.outer:
            return o
        at = b * (self.sizes.n_q if self.outer == "q" else self.sizes.n_k) + o
        return jnp.minimum(plan.first[at] + s, jnp.maximum(plan.end[at] - 1, 0))

    def queries(self, C: int) -> pl.BlockSpec:
        """[B, K, G, L, C], the G heads of a group together."""
        return pl.BlockSpec((None, None, self.sizes.groups, self.sizes.block_q, C),
                            lambda b, h, o, s, *plan: (b, h, 0, self.block("q", b, o, s, Plan(*plan)), 0))

    def query_rows(self) -> pl.BlockSpec:
        """One float32 a head and query, [B, K, G, L]."""
        return pl.BlockSpec((None, None, self.sizes.groups, self.sizes.block_q),
                            lambda b, h, o, s, *plan: (b, h, 0, self.block("q", b, o, s, Plan(*plan))))

    def keys(self, C: int) -> pl.BlockSpec:
        """[B, K, L, C]."""
        return pl.BlockSpec((None, None, self.sizes.block_k, C),
                            lambda b, h, o, s, *plan: (b, h, self.block("k", b, o, s, Plan(*plan)), 0))

    def tokens(self, side: str) -> pl.BlockSpec:
        """`token_rows` of the block of one side, [B, 8, L]."""
        return pl.BlockSpec((None, ROWS, self.sizes.block_q if side == "q" else self.sizes.block_k),
                            lambda b, h, o, s, *plan: (b, 0, self.block(side, b, o, s, Plan(*plan))))

    def here(self, plan: Plan) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Inside a kernel: the row of the batch, the query block, the key block, and whether the pair is to be visited."""
        b, o, s = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        at = b * (self.sizes.n_q if self.outer == "q" else self.sizes.n_k) + o
        visited = plan.first[at] + s < plan.end[at]
        return b, self.block("q", b, o, s, plan), self.block("k", b, o, s, plan), visited

    def call(
        self, kernel: Callable, name: str, plan: Plan, operands: Sequence[tuple[jax.Array, pl.BlockSpec]],
        results: Sequence[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]], scratch: Sequence[tuple[int, ...]], multiply_adds: int,
        interpret: bool,
    ) -> tuple[jax.Array, ...]:
        """Run `kernel(walk, plan, *operands, *results, *scratch)`; scratch is float32 and lives through an outer block.

        `multiply_adds` are those of a query, a key and a head; from them the compiler knows what can hide behind the kernel.
        """
        arrays, in_specs = zip(*operands)
        shapes, out_specs = zip(*results)
        B, K = shapes[0].shape[:2]
        steps = jnp.maximum(jnp.max(plan.end - plan.first), 1)  # one at least: an outer block ends with its last step
        pairs = B * K * self.sizes.groups * self.sizes.n_q * self.sizes.block_q * self.sizes.n_k * self.sizes.block_k
        whole = pl.CostEstimate(flops=2 * multiply_adds * pairs, transcendentals=pairs,
                                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)))
        # A block is 128 queries at least. With more than 16 heads a group it outgrows what a kernel may take unasked.
        limit = 2**24 * -(-self.sizes.groups * self.sizes.block_q // QUERY_ROWS)
        grid = (B, K, self.sizes.n_q if self.outer == "q" else self.sizes.n_k, steps)
        body = partial(_split, kernel, self)
        return pl.pallas_call(
            body,
            out_shape=shapes,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(plan), grid=grid, in_specs=in_specs, out_specs=out_specs,
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch]),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
                                                 vmem_limit_bytes=limit if limit > 2**24 else None),
            cost_estimate=whole,
            interpret=interpret,
            name=name,
        )(*plan, *arrays)


def _split(kernel: Callable, walk: Walk, *refs: jax.Ref) -> None:
    n = len(Plan._fields)
    kernel(walk, Plan(*refs[:n]), *refs[n:])
