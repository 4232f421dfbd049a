"""Attention with all [B, H, L, L] scores at once, and a hand-written gradient: what short rows run, and the reference for the rest.

With s' the masked scores and t the row sums of p = exp(s' - max s'),

    o = p v / t,   dv = p^T (do / t),   ds' = p * ((do / t) v^T - rowsum(do * o) / t),
    ds = ds' (apply="log") or ds' * M (apply="multiply"),   dq = ds k / sqrt(C),   dk = ds^T q / sqrt(C).

Autodiff of a softmax keeps the scores, the weights and their sum, and divides each weight; here p alone is kept, in the dtype of `v`,
and the sum divides what has C columns, not L. On a CPU the batch is computed a few rows at a time, so that scores stay in its caches.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from conan_jax.model.blockwise import stack_heads, unstack_heads
from conan_jax.model.layout import Layout
from conan_jax.model.softmask import MASKED, Bidirectional, Mask, mask_bias, mask_matrix, same_segment

PARTS = 8  # of a batch at most: each is a copy of the program
PART_BYTES = 4 << 20  # of float32 scores, which the second-level caches of two cores hold


class Scale(NamedTuple):
    """s' = s * factor + bias. A `bias` of [B, 1, L] is the same for every query; no `factor` is 1."""

    factor: Float[Array, "B L L"] | None
    bias: Float[Array, "B #L L"]


def dense_attention(
    q: Float[Array, "B L H C"], k: Float[Array, "B L K C"], v: Float[Array, "B L K C"], mask: Mask, layout: Layout, parts: int = 1
) -> Float[Array, "B L H C"]:
    """What `attention` computes, holding every score (METHODS 1.3). `parts`: how many pieces of the batch go one after another.

    Float32 scores and softmax; alpha gets no gradient. Padding rows give zeros and zero gradients.
    """
    return _attend(q, k, v, _scale(mask, layout), layout.real, parts)


def parts_of(B: int, L: int, H: int) -> int:
    """Into how many equal parts a CPU divides a batch."""
    wanted = min(PARTS, -(-B * H * L * L * 4 // PART_BYTES))
    return max(n for n in range(1, wanted + 1) if B % n == 0)


def _scale(mask: Mask, layout: Layout) -> Scale:
    if mask.apply == "multiply":
        return Scale(mask_matrix(mask, layout), jnp.where(same_segment(layout), 0.0, MASKED))
    if layout.alone and isinstance(mask, Bidirectional):  # padding is one number a key, not one a pair
        return Scale(None, jnp.where(layout.real, 0.0, MASKED)[:, None])
    return Scale(None, mask_bias(mask, layout))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, scale: Scale, real: Bool[Array, "B L"], parts: int) -> Array:
    return _forward(q, k, v, scale, real, parts)[0]


def _forward(q: Array, k: Array, v: Array, scale: Scale, real: Array, parts: int) -> tuple[Array, tuple]:
    outs, kept = zip(*(_part_forward(*part) for part in _cut((q, k, v, scale), parts)), strict=True)
    out = jnp.where(real[..., None, None], jnp.concatenate(outs), 0)
    return out, (q, k, v, scale.factor, real, out, kept)


def _backward(parts: int, saved: tuple, d_out: Array) -> tuple:
    q, k, v, factor, real, out, kept = saved
    d_out = jnp.where(real[..., None, None], d_out, 0)
    pieces = zip(_cut((q, k, v, factor, out, d_out), parts), kept, strict=True)
    d_q, d_k, d_v = zip(*(_part_backward(*part, *p) for part, p in pieces), strict=True)
    return jnp.concatenate(d_q), jnp.concatenate(d_k), jnp.concatenate(d_v), None, None


_attend.defvjp(_forward, _backward)


def _part_forward(q: Array, k: Array, v: Array, scale: Scale) -> tuple[Array, tuple[Array, Array]]:
    (_, L, H, _), K = q.shape, k.shape[2]
    # The width divides the queries, C numbers each, and not the scores, L each.
    scores = _dot("bkrc,bksc->bkrs", stack_heads(_shrunk(q), K), k.swapaxes(1, 2))
    if scale.factor is not None:
        scores = scores * _stacked(scale.factor, H // K)
    scores = scores + _stacked(scale.bias, H // K)
    p = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = p.sum(axis=-1, keepdims=True)
    p = p.astype(v.dtype)
    out = _dot("bkrs,bksc->bkrc", p, v.swapaxes(1, 2)) / total
    return unstack_heads(out.astype(v.dtype), L), (p, total)


def _part_backward(
    q: Array, k: Array, v: Array, factor: Array | None, out: Array, d_out: Array, p: Float[Array, "B K GL L"],
    total: Float[Array, "B K GL 1"],
) -> tuple[Array, Array, Array]:
    (_, L, H, C), K = q.shape, k.shape[2]
    through_softmax = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    through_softmax = stack_heads(through_softmax, K) / total
    d_rows = (stack_heads(d_out, K) / total).astype(v.dtype)
    ds = p * (_dot("bkrc,bksc->bkrs", d_rows, v.swapaxes(1, 2)) - through_softmax)
    if factor is not None:
        ds = ds * _stacked(factor, H // K)
    ds = ds.astype(q.dtype)
    d_q = unstack_heads(_dot("bkrs,bksc->bkrc", ds, k.swapaxes(1, 2)) * C**-0.5, L)
    # A product that contracts the first axis of both sides runs at half the speed on a CPU: the one with C columns is transposed.
    d_v = _dot("bkrs,bkcr->bkcs", p, d_rows.swapaxes(2, 3)).transpose(0, 3, 1, 2)
    d_k = _dot("bkrs,bkcr->bkcs", ds, stack_heads(_shrunk(q), K).swapaxes(2, 3)).transpose(0, 3, 1, 2)
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


def _stacked(x: Float[Array, "B #L L"], G: int) -> Float[Array, "B 1 #GL L"]:
    """The same for each of the G query heads stacked on rows. With axes of their own for heads, the products below would not be fused."""
    return (x if x.shape[1] == 1 else jnp.tile(x, (1, G, 1)))[:, None]


def _shrunk(q: Array) -> Array:
    """q / sqrt(C)."""
    return (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)


def _cut(arrays: tuple, parts: int) -> list[tuple]:
    """Equal parts of the batch."""
    def part(i: int) -> tuple:
        return jax.tree.map(lambda x: x[i * x.shape[0] // parts : (i + 1) * x.shape[0] // parts], arrays)

    return [part(i) for i in range(parts)] if parts > 1 else [arrays]


def _dot(spec: str, x: Array, y: Array) -> Array:
    return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)
