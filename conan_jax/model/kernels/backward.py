"""Backward kernels: one gathers dq over the keys a block of queries sees, one dk and dv over the queries that see a block of keys.

Both rebuild the weights p from the saved logsumexp; with t = rowsum(do * o),

    dv = p^T do,   ds = p * (do v^T - t) * factor,   dq = ds k * scale,   dk = ds^T q * scale,

where factor is M for `apply="multiply"` and 1 otherwise. dk and dv sum over the query heads that share a key/value head.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from conan_jax.model.kernels.block import NN, NT, TN, Masking, dot, scores, visit_block
from conan_jax.model.kernels.launch import Walk
from conan_jax.model.kernels.plan import Plan, Sizes


def query_gradient(
    plan: Plan, tokens: Float[Array, "B 8 L"], q: Float[Array, "B K G L C"], k: Float[Array, "B K L C"], v: Float[Array, "B K L C"],
    logsumexp: Float[Array, "B K G L"], out: Float[Array, "B K G L C"], d_out: Float[Array, "B K G L C"], sizes: Sizes, interpret: bool,
) -> tuple[Float[Array, "B K G L C"], Float[Array, "B K G L"]]:
    """dq in the dtype of q, and t in float32. `logsumexp` is in base-2 units; `plan` runs over keys."""
    walk, queries = Walk(sizes, "q"), Walk(sizes, "q").queries(q.shape[-1])
    operands = [*_operands(walk, tokens, q, k, v, d_out), (logsumexp, walk.query_rows()), (out, queries)]
    results = [(jax.ShapeDtypeStruct(q.shape, q.dtype), queries), (jax.ShapeDtypeStruct(logsumexp.shape, jnp.float32), walk.query_rows())]
    C = q.shape[-1]
    return walk.call(_query_kernel, "soft_mask_attention_dq", plan, operands, results, [(sizes.groups, C, sizes.block_q)], 3 * C, interpret)


def key_gradients(
    plan: Plan, tokens: Float[Array, "B 8 L"], q: Float[Array, "B K G L C"], k: Float[Array, "B K L C"], v: Float[Array, "B K L C"],
    logsumexp: Float[Array, "B K G L"], through: Float[Array, "B K G L"], d_out: Float[Array, "B K G L C"], sizes: Sizes, interpret: bool,
) -> tuple[Float[Array, "B K L C"], Float[Array, "B K L C"]]:
    """dk and dv in the dtypes of k and v; `through` is t, `plan` runs over queries."""
    walk = Walk(sizes, "k")
    operands = [*_operands(walk, tokens, q, k, v, d_out), (logsumexp, walk.query_rows()), (through, walk.query_rows())]
    results = [(jax.ShapeDtypeStruct(x.shape, x.dtype), walk.keys(x.shape[-1])) for x in (k, v)]
    C = q.shape[-1]
    return walk.call(_key_kernel, "soft_mask_attention_dkv", plan, operands, results, [(sizes.block_k, C)] * 2, 4 * C, interpret)


def _operands(walk: Walk, tokens: Array, q: Array, k: Array, v: Array, d_out: Array) -> list[tuple[Array, pl.BlockSpec]]:
    queries, keys = walk.queries(q.shape[-1]), walk.keys(q.shape[-1])
    return [(tokens, walk.tokens("q")), (tokens, walk.tokens("k")), (q, queries), (k, keys), (v, keys), (d_out, queries)]


def _block_gradients(g: int, q, keys, values, d_out, logsumexp, through, sizes: Sizes, masking: Masking) -> tuple[Array, Array]:
    """p and ds of query head g, both [block_k, block_q] float32; the factor `scale` of ds is left to the end."""
    s, factor = scores(keys, q[g], sizes, masking)
    p = jnp.exp2(s - logsumexp[g : g + 1])
    ds = p * (dot(values, d_out[g], NT) - through[g : g + 1])
    return p, ds if factor is None else ds * factor


def _query_kernel(walk: Walk, plan: Plan, tokens_q, tokens_k, q, k, v, d_out, logsumexp, out, dq, through, sum_q) -> None:
    sizes, step = walk.sizes, pl.program_id(3)
    batch, i, j, visited = walk.here(plan)
    last = pl.num_programs(3) - 1

    @pl.when(step == 0)
    def _():
        sum_q[...] = jnp.zeros_like(sum_q)
        for g in range(sizes.groups):
            product = d_out[g].astype(jnp.float32) * out[g].astype(jnp.float32)
            through[g : g + 1] = product.T.sum(axis=0, keepdims=True)

    def visit(masking: Masking) -> None:
        keys, values = k[...], v[...]
        for g in range(sizes.groups):
            _, ds = _block_gradients(g, q, keys, values, d_out, logsumexp, through, sizes, masking)
            sum_q[g] += dot(keys, ds.astype(keys.dtype), TN)

    visit_block(visit, visited, batch, i, j, tokens_q, tokens_k, plan, sizes)

    @pl.when(step == last)
    def _():
        for g in range(sizes.groups):
            dq[g] = (sum_q[g] * sizes.scale).T.astype(dq.dtype)


def _key_kernel(walk: Walk, plan: Plan, tokens_q, tokens_k, q, k, v, d_out, logsumexp, through, dk, dv, sum_k, sum_v) -> None:
    sizes, step = walk.sizes, pl.program_id(3)
    batch, i, j, visited = walk.here(plan)
    last = pl.num_programs(3) - 1

    @pl.when(step == 0)
    def _():
        sum_k[...] = jnp.zeros_like(sum_k)
        sum_v[...] = jnp.zeros_like(sum_v)

    def visit(masking: Masking) -> None:
        keys, values = k[...], v[...]
        for g in range(sizes.groups):
            p, ds = _block_gradients(g, q, keys, values, d_out, logsumexp, through, sizes, masking)
            sum_v[...] += dot(p.astype(d_out.dtype), d_out[g], NN)
            sum_k[...] += dot(ds.astype(q.dtype), q[g], NN)

    visit_block(visit, visited, batch, i, j, tokens_q, tokens_k, plan, sizes)

    @pl.when(step == last)
    def _():
        dk[...] = (sum_k[...] * sizes.scale).astype(dk.dtype)
        dv[...] = sum_v[...].astype(dv.dtype)
