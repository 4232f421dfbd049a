"""One block of scores inside a kernel, keys on sublanes and queries on lanes, and whether it needs a mask at all.

Scores stand transposed, [block_k, block_q]: what belongs to a query (running maximum, logsumexp, mask) is then a row
vector that broadcasts for free, and the reductions of the softmax run over sublanes, which is cheaper than over lanes.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from conan_jax.model.kernels.plan import LOG2E, Plan, Sizes
from conan_jax.model.softmask import MASKED

NT = (((1,), (1,)), ((), ()))  # [m, c] x [n, c] -> [m, n]
NN = (((1,), (0,)), ((), ()))
TN = (((0,), (0,)), ((), ()))

# Scores in base-2 units -> masked scores, and d(masked)/d(score) where that is not 1.
Masking = Callable[[Array], tuple[Array, Array | None]]


def dot(x: Array, y: Array, dimensions: tuple) -> Array:
    """Float32 result. Bfloat16 has one precision; float32 operands follow `jax_default_matmul_precision` as everywhere."""
    precision = None if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def scores(k: Float[Array, "k C"], q: Float[Array, "q C"], sizes: Sizes, masking: Masking) -> tuple[Array, Array | None]:
    """Masked scores [block_k, block_q] in base-2 units and the factor of their gradient."""
    return masking(dot(k, q, NT) * (sizes.scale * LOG2E))


def visit_block(
    visit: Callable[[Masking], None], visited: Array, batch: Array, i: Array, j: Array, tokens_q: jax.Ref, tokens_k: jax.Ref,
    plan: Plan, sizes: Sizes,
) -> None:
    """Run `visit` on query block i and key block j if `visited`: bare where one segment fills both and M is 1, else masked."""
    at_q, at_k = batch * sizes.n_q + i, batch * sizes.n_k + j
    segment = plan.segment_q[at_q]
    ones = plan.ones[at_k if sizes.index == "key" else at_q] > 0
    below = (j + 1) * sizes.block_k <= i * sizes.block_q + 1
    bare = (segment > 0) & (segment == plan.segment_k[at_k]) & (ones | below)
    pl.when(visited & bare)(lambda: visit(lambda s: (s, None)))
    pl.when(visited & jnp.logical_not(bare))(lambda: visit(_masking(tokens_q[...], tokens_k[...], sizes)))


def _masking(tokens_q: Float[Array, "8 q"], tokens_k: Float[Array, "8 k"], sizes: Sizes) -> Masking:
    """The mask of one block, computed once for all heads that share it."""
    columns = tokens_k.T
    segment_q = jnp.where(tokens_q[0:1] > 0, tokens_q[0:1], -1.0)  # padding sees nothing, not even padding
    same = columns[:, 0:1] == segment_q
    later = columns[:, 1:2] > tokens_q[1:2]
    above = columns[:, 2:3] if sizes.index == "key" else tokens_q[2:3]
    if sizes.apply == "log":
        bias = jnp.where(same, jnp.where(later, above, 0.0), MASKED)
        return lambda s: (s + bias, None)
    factor = jnp.where(later, above, 1.0)
    return lambda s: (jnp.where(same, s * factor, MASKED), factor)
