"""The one attention entry, and the dense reference: softmax(q k^T / sqrt(C), under a mask object) v."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from conan_jax.errors import ConfigError
from conan_jax.model.blockwise import blockwise_attention
from conan_jax.model.layout import Layout
from conan_jax.model.softmask import MASKED, Mask, mask_bias, mask_matrix, same_segment


def attention(
    q: Float[Array, "B L H C"],
    k: Float[Array, "B L K C"],
    v: Float[Array, "B L K C"],
    mask: Mask,
    layout: Layout,
    *,
    implementation: Literal["auto", "dense", "blockwise"] = "auto",
    block_size: int = 512,
) -> Float[Array, "B L H C"]:
    """Grouped-query attention inside each segment, under `Causal`, `Bidirectional` or `SoftMask` (METHODS 1.1, 1.3).

    o_i = sum_j p_ij v_j with p = softmax_j(s_ij + log M_ij) and s = q k^T / sqrt(C); for `apply="multiply"`
    p = softmax_j(s_ij * M_ij). Query head h reads key/value head h // (H / K). Scores and softmax are float32, the
    result has the dtype of `v`. Padding rows give zeros and zero gradients.

    Args:
        implementation: "dense" holds [B, H, L, L] scores, "blockwise" never does, "auto" is dense up to one block.
        block_size: tokens a side of a block, for "blockwise" and for the choice of "auto".

    Raises:
        ConfigError: an unknown implementation, or H not a multiple of K.
    """
    if q.shape[2] % k.shape[2]:
        raise ConfigError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key/value heads evenly")
    if implementation == "auto":
        implementation = "dense" if q.shape[1] <= block_size else "blockwise"
    if implementation == "dense":
        return dense_attention(q, k, v, mask, layout)
    if implementation == "blockwise":
        return blockwise_attention(q, k, v, mask, layout, block_size)
    raise ConfigError(f"attention {implementation!r} is not known; use auto, dense or blockwise")


def dense_attention(
    q: Float[Array, "B L H C"], k: Float[Array, "B L K C"], v: Float[Array, "B L K C"], mask: Mask, layout: Layout
) -> Float[Array, "B L H C"]:
    """The reference: all [B, H, L, L] scores at once."""
    B, L, H, C = q.shape
    q, k, v = stack_heads(q, k.shape[2]), k.swapaxes(1, 2), v.swapaxes(1, 2)
    scores = jnp.einsum("bkrc,bksc->bkrs", q, k, preferred_element_type=jnp.float32) * C**-0.5
    scores = scores.reshape(B, k.shape[1], -1, L, L)
    if mask.apply == "log":
        scores = scores + mask_bias(mask, layout)[:, None, None]
    else:
        scores = jnp.where(same_segment(layout)[:, None, None], scores * mask_matrix(mask, layout)[:, None, None], MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, k.shape[1], -1, L)
    out = unstack_heads(jnp.einsum("bkrs,bksc->bkrc", weights, v), L)
    return jnp.where(layout.real[:, :, None, None], out, 0)


def stack_heads(q: Float[Array, "B L H C"], K: int) -> Float[Array, "B K GL C"]:
    """Put the query heads that share a key/value head on rows: one taller matrix product instead of G small ones."""
    B, L, H, C = q.shape
    return q.reshape(B, L, K, H // K, C).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, C)


def unstack_heads(o: Float[Array, "B K GL C"], L: int) -> Float[Array, "B L H C"]:
    """Undo `stack_heads`."""
    B, K, _, C = o.shape
    return o.reshape(B, K, -1, L, C).transpose(0, 3, 1, 2, 4).reshape(B, L, -1, C)
