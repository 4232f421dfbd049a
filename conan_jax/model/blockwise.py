"""Attention in blocks, with a hand-written gradient: memory grows with L, not with L x L, under every mask object.

The forward pass is the online softmax of Milakov and Gimelshein (2018) as FlashAttention (Dao et al. 2022) uses it; the
backward pass rebuilds each block of weights from the saved output o and logsumexp. With s' the masked scores,

    p = exp(s' - logsumexp),   dv = p^T do,   ds' = p * (do v^T - rowsum(do * o)),
    ds = ds' (apply="log") or ds' * M (apply="multiply"),   dq = ds k / sqrt(C),   dk = ds^T q / sqrt(C).

The loops have traced bounds: while the mask is causal at run time, blocks above the diagonal are not visited.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from conan_jax.model.layout import Layout
from conan_jax.model.softmask import MASKED, Mask, log_weights

SAVED = "attention"  # the name under which a remat policy may keep the output and the logsumexp


class Tokens(NamedTuple):
    """What a block of scores must know about its rows and columns; n blocks of b tokens."""

    segment_ids: Int[Array, "n B b"]
    positions: Int[Array, "n B b"]
    weights: Float[Array, "n B b"]  # M above the diagonal, or its log, as the mask applies it


def blockwise_attention(
    q: Float[Array, "B L H C"], k: Float[Array, "B L K C"], v: Float[Array, "B L K C"], mask: Mask, layout: Layout, block_size: int
) -> Float[Array, "B L H C"]:
    """What `attention` computes, holding one [block_size, block_size] block of scores a head at a time.

    Any L: rows are padded to whole blocks inside. Float32 scores, softmax and accumulators; alpha gets no gradient.
    """
    B, L, H, C = q.shape
    K = k.shape[2]
    b = min(block_size, L)

    def blocks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -L % b)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, -1, b, *x.shape[2:]).swapaxes(0, 1)

    weights = mask.weights(layout.positions, layout.lengths)
    weights = log_weights(weights) if mask.apply == "log" else weights
    tokens = Tokens(blocks(layout.segment_ids), blocks(layout.positions), blocks(weights))
    queries = blocks(q).reshape(-1, B, b, K, H // K, C).transpose(0, 1, 3, 4, 2, 5).reshape(-1, B, K, H // K * b, C)
    out = _attend(queries, blocks(k).swapaxes(2, 3), blocks(v).swapaxes(2, 3), tokens, mask)
    out = out.reshape(-1, B, K, H // K, b, C).transpose(1, 0, 4, 2, 3, 5).reshape(B, -1, H, C)[:, :L]
    return jnp.where(layout.real[:, :, None, None], out, 0)


@jax.custom_vjp
def _attend(q: Float[Array, "n B K Gb C"], k: Float[Array, "n B K b C"], v: Float[Array, "n B K b C"], tokens: Tokens, mask: Mask) -> Array:
    return _forward(q, k, v, tokens, mask)[0]


def _forward(q: Array, k: Array, v: Array, tokens: Tokens, mask: Mask) -> tuple[Array, tuple]:
    n = q.shape[0]

    def row_of_blocks(i: Array) -> tuple[Array, Array]:
        rows = _at(tokens, i)

        def visit(j: Array, state: tuple) -> tuple:
            top, total, out = state
            scores, _ = _scores(q[i], k[j], rows, _at(tokens, j), mask)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            p = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            out = out * shrink[..., None] + jnp.einsum("bkrs,bksc->bkrc", p.astype(v.dtype), v[j], preferred_element_type=jnp.float32)
            return new_top, total * shrink + p.sum(axis=-1), out

        # A row whose first blocks are all masked gathers exp(0) from them; the first real score shrinks that to exactly 0.
        zero = jnp.zeros(q.shape[1:], jnp.float32)
        start = (jnp.full(zero.shape[:-1], MASKED), zero[..., 0], zero)
        top, total, out = lax.fori_loop(0, jnp.where(mask.is_causal(), i + 1, n), visit, start)
        return (out / total[..., None]).astype(v.dtype), top + jnp.log(total)

    out, logsumexp = lax.map(row_of_blocks, jnp.arange(n))
    out, logsumexp = checkpoint_name(out, SAVED), checkpoint_name(logsumexp, SAVED)
    return out, (q, k, v, tokens, mask, out, logsumexp)


def _backward(saved: tuple, d_out: Array) -> tuple:
    q, k, v, tokens, mask, out, logsumexp = saved
    n = q.shape[0]
    through_softmax = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def column_of_blocks(dq: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        columns = _at(tokens, j)

        def visit(i: Array, state: tuple) -> tuple:
            dq, dk, dv = state
            scores, factor = _scores(q[i], k[j], _at(tokens, i), columns, mask)
            p = jnp.exp(scores - logsumexp[i][..., None])
            dv += jnp.einsum("bkrs,bkrc->bksc", p.astype(v.dtype), d_out[i], preferred_element_type=jnp.float32)
            dp = jnp.einsum("bkrc,bksc->bkrs", d_out[i], v[j], preferred_element_type=jnp.float32)
            ds = (p * (dp - through_softmax[i][..., None]) * factor).astype(q.dtype)
            dk += jnp.einsum("bkrs,bkrc->bksc", ds, q[i], preferred_element_type=jnp.float32)
            dq = dq.at[i].add(jnp.einsum("bkrs,bksc->bkrc", ds, k[j], preferred_element_type=jnp.float32))
            return dq, dk, dv

        zero = jnp.zeros(k.shape[1:], jnp.float32)
        dq, dk, dv = lax.fori_loop(jnp.where(mask.is_causal(), j, 0), n, visit, (dq, zero, zero))
        return dq, (dk, dv)

    dq, (dk, dv) = lax.scan(column_of_blocks, jnp.zeros(q.shape, jnp.float32), jnp.arange(n))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)


def _scores(
    q: Float[Array, "B K Gb C"], k: Float[Array, "B K b C"], rows: Tokens, columns: Tokens, mask: Mask
) -> tuple[Float[Array, "B K Gb b"], Array | float]:
    """One block of masked scores [B, K, Gb, b], float32, and d(scores)/d(q k^T)."""
    scale = q.shape[-1] ** -0.5
    scores = jnp.einsum("bkrc,bksc->bkrs", q, k, preferred_element_type=jnp.float32) * scale
    same = (rows.segment_ids[:, :, None] == columns.segment_ids[:, None, :]) & (columns.segment_ids[:, None, :] > 0)
    later = columns.positions[:, None, :] > rows.positions[:, :, None]
    above = columns.weights[:, None, :] if mask.index == "key" else rows.weights[:, :, None]
    if mask.apply == "log":
        bias = jnp.where(same, jnp.where(later, above, 0.0), MASKED)
        return scores + _over_heads(bias, scores), scale
    factor = _over_heads(jnp.where(later, above, 1.0), scores)
    return jnp.where(_over_heads(same, scores), scores * factor, MASKED), factor * scale


def _over_heads(x: Array, scores: Float[Array, "B K Gb b"]) -> Array:
    """[B, b, b] -> [B, 1, Gb, b]: the same for each of the G query heads stacked on rows."""
    return jnp.tile(x, (1, scores.shape[2] // x.shape[1], 1))[:, None]


def _at(tokens: Tokens, i: Array) -> Tokens:
    return jax.tree.map(lambda x: x[i], tokens)
