"""Attention in blocks, with a hand-written gradient: memory grows with L, not with L x L, under every mask object.

The forward pass is the online softmax of Milakov and Gimelshein (2018) as FlashAttention (Dao et al. 2022) uses it; the
backward pass rebuilds each block of weights from the saved output o and logsumexp. With s' the masked scores,

    p = exp(s' - logsumexp),   dv = p^T do,   ds' = p * (do v^T - rowsum(do * o)),
    ds = ds' (apply="log") or ds' * M (apply="multiply"),   dq = ds k / sqrt(C),   dk = ds^T q / sqrt(C).

Both passes go over blocks of queries and, inside, over the run of blocks of keys that `ranges` gives for them: padding, other
segments and, while the mask is causal at run time, what lies above the diagonal are not visited. A block whose mask is all
ones computes no bias. docs/ATTENTION.md explains the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from conan_jax.errors import ConfigError
from conan_jax.model.layout import Layout
from conan_jax.model.ranges import all_ones, key_ranges
from conan_jax.model.softmask import MASKED, Mask, log_weights

SAVED = "attention"  # the name under which a remat policy may keep the output and the logsumexp


class Tokens(NamedTuple):
    """What a block of scores must know about its rows or columns."""

    segment_ids: Int[Array, "B b"]
    positions: Int[Array, "B b"]
    weights: Float[Array, "B b"]  # M above the diagonal, or its log, as the mask applies it


class Plan(NamedTuple):
    """Which blocks of keys each of the n blocks of queries visits, and which of those need no mask.

    One plan for all rows of the batch, which are computed together: a block is left out when no row needs it.
    """

    first: Int[Array, " n"]
    end: Int[Array, " n"]
    bare: Bool[Array, "n n"]


def blockwise_attention(
    q: Float[Array, "B L H C"], k: Float[Array, "B L K C"], v: Float[Array, "B L K C"], mask: Mask, layout: Layout, block_size: int
) -> Float[Array, "B L H C"]:
    """What `attention` computes, holding one [block_size, block_size] block of scores a head at a time (METHODS 1.3).

    Any L: rows are padded to whole blocks inside. Float32 scores, softmax and accumulators; alpha gets no gradient. Padding
    rows give zeros and zero gradients. Saved for the backward pass, besides the arguments: the output and one float32 a
    query and head.

    Raises:
        ConfigError: `block_size` below 1.
    """
    L = q.shape[1]
    if block_size < 1:
        raise ConfigError(f"attention in blocks needs blocks of at least 1 token, got block_size {block_size}")
    # Blocks of equal size: 600 tokens in blocks of 512 are two of 320, not one and a mostly empty one.
    step, even = gcd(block_size, 64), -(-L // -(-L // block_size))
    return _attend(q, k, v, mask, layout, min(-(-even // step) * step, L))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, mask: Mask, layout: Layout, b: int) -> Array:
    return _forward(q, k, v, mask, layout, b)[0]


def _forward(q: Array, k: Array, v: Array, mask: Mask, layout: Layout, b: int) -> tuple[Array, tuple]:
    (B, L, H, C), K = q.shape, k.shape[2]
    plan, tokens = _plan(mask, layout, b), _tokens(mask, layout, b)
    q_blocks, k_blocks, v_blocks = (_whole(x, b) for x in (q, k, v))

    def row_of_blocks(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        outs, logsumexps = state
        rows, queries = _block(tokens, i, b), stack_heads(_block(q_blocks, i, b), K)

        def visit(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, out = state

            def weigh(s: Array) -> tuple[Array, Array, Array]:
                new_top = jnp.maximum(top, s.max(axis=-1))
                p = jnp.exp(s - new_top[..., None])
                return p, p.sum(axis=-1), new_top

            s = _dot("bkrc,bksc->bkrs", queries, stack_heads(_block(k_blocks, j, b), K))
            p, sums, new_top = lax.cond(plan.bare[i, j], lambda s: weigh(s * C**-0.5),
                                        lambda s: weigh(_masked(s * C**-0.5, rows, _block(tokens, j, b), mask)), s)
            shrink = jnp.exp(top - new_top)
            out = out * shrink[..., None] + _dot("bkrs,bksc->bkrc", p.astype(v.dtype), stack_heads(_block(v_blocks, j, b), K))
            return new_top, total * shrink + sums, out

        # A row whose first blocks are all masked gathers exp(0) from them; the first real score shrinks that to exactly 0.
        zero = jnp.zeros(queries.shape, jnp.float32)
        start = (jnp.full(zero.shape[:-1], MASKED), zero[..., 0], zero)
        top, total, out = lax.fori_loop(plan.first[i], plan.end[i], visit, start)
        real = _over_heads(rows.segment_ids > 0, H // K)
        total = jnp.where(real, total, 1.0)  # padding that nothing was visited for has gathered 0
        out = jnp.where(real[..., None], out / total[..., None], 0).astype(v.dtype)
        return _put(outs, unstack_heads(out, b), i, b), logsumexps.at[i].set(top + jnp.log(total))

    n = plan.first.shape[0]
    start = (jnp.zeros(q_blocks.shape, v.dtype), jnp.zeros((n, B, K, H // K * b), jnp.float32))
    out, logsumexp = lax.fori_loop(0, n, row_of_blocks, start)
    out, logsumexp = checkpoint_name(out[:, :L], SAVED), checkpoint_name(logsumexp, SAVED)
    return out, (q, k, v, mask, layout, out, logsumexp)


def _backward(b: int, saved: tuple, d_out: Array) -> tuple:
    q, k, v, mask, layout, out, logsumexp = saved
    (B, L, H, C), K = q.shape, k.shape[2]
    plan, tokens = _plan(mask, layout, b), _tokens(mask, layout, b)
    q_blocks, k_blocks, v_blocks, out_blocks, d_out_blocks = (_whole(x, b) for x in (q, k, v, out, d_out))

    def row_of_blocks(i: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        dqs, dk, dv = state
        rows, queries = _block(tokens, i, b), stack_heads(_block(q_blocks, i, b), K)
        d_rows = jnp.where((rows.segment_ids > 0)[..., None, None], _block(d_out_blocks, i, b), 0)
        product = d_rows.astype(jnp.float32) * _block(out_blocks, i, b).astype(jnp.float32)
        through_softmax = stack_heads(product.sum(axis=-1, keepdims=True), K)
        d_rows = stack_heads(d_rows, K)
        # On a CPU, a product that contracts the first axis of both sides runs at a third of the speed: transposed here, once a row.
        queries_t, d_rows_t = queries.swapaxes(2, 3), d_rows.swapaxes(2, 3)

        def visit(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = state
            keys, columns = stack_heads(_block(k_blocks, j, b), K), _block(tokens, j, b)

            def weigh(s: Array) -> Array:
                return jnp.exp(s - logsumexp[i][..., None])

            s = _dot("bkrc,bksc->bkrs", queries, keys)
            p = lax.cond(plan.bare[i, j], lambda s: weigh(s * C**-0.5), lambda s: weigh(_masked(s * C**-0.5, rows, columns, mask)), s)
            dp = _dot("bkrc,bksc->bkrs", d_rows, stack_heads(_block(v_blocks, j, b), K))
            ds = p * (dp - through_softmax)
            if mask.apply == "multiply":
                ds = lax.cond(plan.bare[i, j], lambda ds: ds, lambda ds: _per_head(jnp.multiply, ds, _above(rows, columns, mask)), ds)
            ds = ds.astype(q.dtype)
            dv = dv.at[j].add(_dot("bkcr,bkrs->bkcs", d_rows_t, p.astype(v.dtype)))
            dk = dk.at[j].add(_dot("bkcr,bkrs->bkcs", queries_t, ds))
            return dq + _dot("bkrs,bksc->bkrc", ds, keys), dk, dv

        dq, dk, dv = lax.fori_loop(plan.first[i], plan.end[i], visit, (jnp.zeros(queries.shape, jnp.float32), dk, dv))
        return _put(dqs, unstack_heads((dq * C**-0.5).astype(q.dtype), b), i, b), dk, dv

    def join(x: Float[Array, "n B K C b"], like: Array) -> Array:
        return x.transpose(1, 0, 4, 2, 3).reshape(B, -1, K, C)[:, :L].astype(like.dtype)

    n = plan.first.shape[0]
    zero = jnp.zeros((n, B, K, C, b), jnp.float32)
    dq, dk, dv = lax.fori_loop(0, n, row_of_blocks, (jnp.zeros(q_blocks.shape, q.dtype), zero, zero))
    return dq[:, :L], join(dk * C**-0.5, k), join(dv, v), None, None


_attend.defvjp(_forward, _backward)


def _plan(mask: Mask, layout: Layout, b: int) -> Plan:
    first, end = key_ranges(layout, mask, b, b)
    some = first < end
    return Plan(jnp.where(some, first, first.shape[1]).min(axis=0), end.max(axis=0), all_ones(layout, mask, b, b).all(axis=0))


def _tokens(mask: Mask, layout: Layout, b: int) -> Tokens:
    weights = mask.weights(layout.positions, layout.lengths)
    weights = log_weights(weights) if mask.apply == "log" else weights
    return Tokens(*(_whole(x, b) for x in (layout.segment_ids, layout.positions, weights)))


def _masked(scores: Float[Array, "B K Gb b"], rows: Tokens, columns: Tokens, mask: Mask) -> Float[Array, "B K Gb b"]:
    """One block of scores under the mask."""
    same = (rows.segment_ids[:, :, None] == columns.segment_ids[:, None, :]) & (columns.segment_ids[:, None, :] > 0)
    above = _above(rows, columns, mask)
    if mask.apply == "log":
        return _per_head(jnp.add, scores, jnp.where(same, above, MASKED))
    return _per_head(lambda s, x: jnp.where(x[0], s * x[1], MASKED), scores, (same, above))


def _above(rows: Tokens, columns: Tokens, mask: Mask) -> Float[Array, "B b b"]:
    """M, or its log, of two blocks of tokens, as if of one segment."""
    weights = columns.weights[:, None, :] if mask.index == "key" else rows.weights[:, :, None]
    return jnp.where(columns.positions[:, None, :] > rows.positions[:, :, None], weights, 0.0 if mask.apply == "log" else 1.0)


def _per_head(apply: Callable, scores: Float[Array, "B K Gb b"], x: Array | tuple) -> Float[Array, "B K Gb b"]:
    """`apply(scores, x)`, x [B, b, b] being the same for every head."""
    B, K, R, b = scores.shape
    return apply(scores.reshape(B, K, -1, b, b), jax.tree.map(lambda a: a[:, None, None], x)).reshape(B, K, R, b)


def _over_heads(x: Array, G: int) -> Array:
    """[B, b] -> [B, 1, Gb]: the same for each of the G query heads stacked on rows."""
    return jnp.tile(x, (1, G))[:, None]


def stack_heads(x: Float[Array, "B b H C"], K: int) -> Float[Array, "B K Gb C"]:
    """Put the query heads that share a key/value head on rows: one taller matrix product instead of G small ones."""
    B, b, H, C = x.shape
    return x.reshape(B, b, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, C)


def unstack_heads(x: Float[Array, "B K Gb C"], b: int) -> Float[Array, "B b H C"]:
    """Undo `stack_heads`."""
    B, K, R, C = x.shape
    return x.reshape(B, K, R // b, b, C).transpose(0, 3, 1, 2, 4).reshape(B, b, -1, C)


def _whole(x: Array, b: int) -> Array:
    """[B, L, ...] -> L a multiple of b, filled up with zeros."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % b)] + [(0, 0)] * (x.ndim - 2)) if x.shape[1] % b else x


def _block(x: Array | Tokens, i: Array, b: int) -> Array | Tokens:
    """Tokens i * b to (i + 1) * b."""
    return jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, i * b, b, axis=1), x)


def _put(x: Array, block: Array, i: Array, b: int) -> Array:
    """`x` with the tokens of block i replaced."""
    return lax.dynamic_update_slice_in_dim(x, block, i * b, axis=1)


def _dot(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)
