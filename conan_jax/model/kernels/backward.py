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


def query_gradient(plan: Plan, operands: tuple[Array, ...], sizes: Sizes, interpret: bool) -> Float[Array, "B K G L C"]:
    """dq in the dtype of q. `operands`: token rows, logsumexp (base 2), t [B K G L], do, q, k, v; `plan` runs over keys."""
    walk, q = Walk(sizes, "q"), operands[4]
    (dq,) = walk.call(_query_kernel, "soft_mask_attention_dq", plan, _operands(walk, operands),
                      [(jax.ShapeDtypeStruct(q.shape, q.dtype), walk.queries(q.shape[-1]))],
                      [(sizes.groups, q.shape[-1], sizes.block_q)], interpret)
    return dq


def key_gradients(
    plan: Plan, operands: tuple[Array, ...], sizes: Sizes, interpret: bool
) -> tuple[Float[Array, "B K L C"], Float[Array, "B K L C"]]:
    """dk and dv in the dtypes of k and v. Operands as for `query_gradient`; `plan` runs over queries."""
    walk, (k, v) = Walk(sizes, "k"), operands[5:]
    return walk.call(_key_kernel, "soft_mask_attention_dkv", plan, _operands(walk, operands),
                     [(jax.ShapeDtypeStruct(x.shape, x.dtype), walk.keys(x.shape[-1])) for x in (k, v)],
                     [(sizes.block_k, x.shape[-1]) for x in (k, v)], interpret)


def _operands(walk: Walk, operands: tuple[Array, ...]) -> list[tuple[Array, pl.BlockSpec]]:
    tokens, logsumexp, through, d_out, q, k, v = operands
    C = q.shape[-1]
    return [(tokens, walk.tokens("q")), (tokens, walk.tokens("k")), (logsumexp, walk.query_rows()), (through, walk.query_rows()),
            (d_out, walk.queries(C)), (q, walk.queries(C)), (k, walk.keys(C)), (v, walk.keys(C))]


def _block_gradients(g: int, logsumexp, through, d_out, q, keys, values, sizes: Sizes, masking: Masking) -> tuple[Array, Array]:
    """p and ds of query head g, both [block_k, block_q] float32; the factor `scale` of ds is left to the end."""
    s, factor = scores(keys, q[g], sizes, masking)
    p = jnp.exp2(s - logsumexp[g : g + 1])
    ds = p * (dot(values, d_out[g], NT) - through[g : g + 1])
    return p, ds if factor is None else ds * factor


def _query_kernel(walk: Walk, plan: Plan, tokens_q, tokens_k, logsumexp, through, d_out, q, k, v, dq, sum_q) -> None:
    sizes, step = walk.sizes, pl.program_id(3)
    batch, i, j, visited = walk.here(plan)
    last = pl.num_programs(3) - 1

    @pl.when(step == 0)
    def _():
        sum_q[...] = jnp.zeros_like(sum_q)

    def visit(masking: Masking) -> None:
        keys, values = k[...], v[...]
        for g in range(sizes.groups):
            _, ds = _block_gradients(g, logsumexp, through, d_out, q, keys, values, sizes, masking)
            sum_q[g] += dot(keys, ds.astype(keys.dtype), TN)

    visit_block(visit, visited, batch, i, j, tokens_q, tokens_k, plan, sizes)

    @pl.when(step == last)
    def _():
        for g in range(sizes.groups):
            dq[g] = (sum_q[g] * sizes.scale).T.astype(dq.dtype)


def _key_kernel(walk: Walk, plan: Plan, tokens_q, tokens_k, logsumexp, through, d_out, q, k, v, dk, dv, sum_k, sum_v) -> None:
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
            p, ds = _block_gradients(g, logsumexp, through, d_out, q, keys, values, sizes, masking)
            sum_v[...] += dot(p.astype(d_out.dtype), d_out[g], NN)
            sum_k[...] += dot(ds.astype(q.dtype), q[g], NN)

    visit_block(visit, visited, batch, i, j, tokens_q, tokens_k, plan, sizes)

    @pl.when(step == last)
    def _():
        dk[...] = (sum_k[...] * sizes.scale).astype(dk.dtype)
        dv[...] = sum_v[...].astype(dv.dtype)
