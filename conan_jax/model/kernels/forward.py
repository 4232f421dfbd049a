"""Forward kernel: the online softmax of Milakov and Gimelshein (2018) over the blocks that FlashAttention (Dao et al. 2022) visits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from conan_jax.model.kernels.block import TN, Masking, dot, scores, visit_block
from conan_jax.model.kernels.launch import Walk
from conan_jax.model.kernels.plan import Plan, Sizes
from conan_jax.model.softmask import MASKED


def forward(
    plan: Plan, tokens: Float[Array, "B 8 L"], q: Float[Array, "B K G L C"], k: Float[Array, "B K L C"], v: Float[Array, "B K L C"],
    sizes: Sizes, interpret: bool,
) -> tuple[Float[Array, "B K G L C"], Float[Array, "B K G L"]]:
    """o in the dtype of `v` and the logsumexp of the masked scores in base-2 units, float32; both 0 on padding."""
    walk, C = Walk(sizes, "q"), q.shape[-1]
    return walk.call(
        _kernel, "soft_mask_attention_forward", plan,
        [(tokens, walk.tokens("q")), (tokens, walk.tokens("k")), (q, walk.queries(C)), (k, walk.keys(C)), (v, walk.keys(C))],
        [(jax.ShapeDtypeStruct(q.shape, v.dtype), walk.queries(C)), (jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32), walk.query_rows())],
        [(sizes.groups, sizes.block_q), (sizes.groups, sizes.block_q), (sizes.groups, C, sizes.block_q)], 2 * C, interpret)


def _kernel(walk: Walk, plan: Plan, tokens_q, tokens_k, q, k, v, o, logsumexp, top, total, out) -> None:
    sizes, step = walk.sizes, pl.program_id(3)
    batch, i, j, visited = walk.here(plan)
    last = pl.num_programs(3) - 1

    @pl.when(step == 0)
    def _():
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)
        out[...] = jnp.zeros_like(out)

    def visit(masking: Masking) -> None:
        keys, values = k[...], v[...]
        for g in range(sizes.groups):
            s, _ = scores(keys, q[g], sizes, masking)
            old = top[g : g + 1]
            # A row whose first blocks are all masked gathers 2^0 from them; the first real score shrinks that to exactly 0.
            new = jnp.maximum(old, s.max(axis=0, keepdims=True))
            p = jnp.exp2(s - new)
            shrink = jnp.exp2(old - new)
            top[g : g + 1] = new
            total[g : g + 1] = total[g : g + 1] * shrink + p.sum(axis=0, keepdims=True)
            out[g] = out[g] * shrink + dot(values, p.astype(values.dtype), TN)

    visit_block(visit, visited, batch, i, j, tokens_q, tokens_k, plan, sizes)

    @pl.when(step == last)
    def _():
        real = tokens_q[0:1] > 0
        for g in range(sizes.groups):
            sum_ = jnp.where(real, total[g : g + 1], 1.0)
            o[g] = jnp.where(real, out[g] / sum_, 0.0).T.astype(o.dtype)
            logsumexp[g : g + 1] = jnp.where(real, top[g : g + 1] + jnp.log2(sum_), 0.0)
