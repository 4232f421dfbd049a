"""The one attention entry, and the dense reference: softmax(q k^T / sqrt(C), under a mask object) v."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from conan_jax.errors import ConfigError
from conan_jax.model.blockwise import blockwise_attention, stack_heads, unstack_heads
from conan_jax.model.layout import Layout
from conan_jax.model.softmask import MASKED, Bidirectional, Mask, mask_bias, mask_matrix, same_segment

QUERIES = 64  # whose scores a CPU holds at once in rows of more than 128 tokens, where nothing but padding is masked
KERNEL_BLOCK = 128  # tokens of the smallest block of the TPU kernels


def attention(
    q: Float[Array, "B L H C"],
    k: Float[Array, "B L K C"],
    v: Float[Array, "B L K C"],
    mask: Mask,
    layout: Layout,
    *,
    implementation: Literal["auto", "dense", "blockwise", "pallas_tpu"] = "auto",
    block_size: int = 512,
) -> Float[Array, "B L H C"]:
    """Grouped-query attention inside each segment, under `Causal`, `Bidirectional` or `SoftMask` (METHODS 1.1, 1.3).

    o_i = sum_j p_ij v_j with p = softmax_j(s_ij + log M_ij) and s = q k^T / sqrt(C); for `apply="multiply"`
    p = softmax_j(s_ij * M_ij). Query head h reads key/value head h // (H / K). Scores and softmax are float32, the
    result has the dtype of `v`. Padding rows give zeros and zero gradients; alpha is a schedule and gets none.

    Args:
        implementation: "dense" holds [B, H, L, L] scores, "blockwise" (any platform) and "pallas_tpu" (TPU kernels) never
            do. "auto" is "pallas_tpu" on a TPU for rows of at least 128 tokens, which is the kernels' smallest block. On a CPU
            and on a GPU it is dense up to one block and blockwise beyond; on a GPU that choice rests on no measurement yet.
        block_size: tokens a side of a block, for "blockwise" and for the choice of "auto". The kernels choose their own.

    Raises:
        ConfigError: an unknown implementation, "pallas_tpu" on another platform, or H not a multiple of K.
    """
    if q.shape[2] % k.shape[2]:
        raise ConfigError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key/value heads evenly")
    if implementation == "auto":
        implementation = choose(platform(), q.shape[1], block_size)
    if implementation == "dense":
        return dense_attention(q, k, v, mask, layout)
    if implementation == "blockwise":
        return blockwise_attention(q, k, v, mask, layout, block_size)
    if implementation != "pallas_tpu":
        raise ConfigError(f"attention {implementation!r} is not known; use auto, dense, blockwise or pallas_tpu")
    if platform() != "tpu":
        raise ConfigError(f"attention 'pallas_tpu' runs on a TPU and this program is for a {platform()}; use auto, dense or blockwise")
    from conan_jax.model.kernels import flash_attention  # Pallas takes half a second to import, which only this pays

    return flash_attention(q, k, v, mask, layout)


def choose(device: str, length: int, block_size: int) -> Literal["dense", "blockwise", "pallas_tpu"]:
    """What "auto" means for rows of `length` tokens on "cpu", "gpu" or "tpu"."""
    if device == "tpu":
        return "pallas_tpu" if length >= KERNEL_BLOCK else "dense"
    return "dense" if length <= block_size else "blockwise"


def platform() -> str:
    """"cpu", "gpu" or "tpu": that of the current mesh, which may be one to compile for only, else of the default backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = getattr(device, "platform", None) or getattr(device, "device_kind", None) or jax.default_backend()
    name = str(name).lower()
    return "tpu" if name.startswith("tpu") else "cpu" if name.startswith("cpu") else "gpu"


def dense_attention(
    q: Float[Array, "B L H C"], k: Float[Array, "B L K C"], v: Float[Array, "B L K C"], mask: Mask, layout: Layout
) -> Float[Array, "B L H C"]:
    """The reference: all [B, H, L, L] scores at once."""
    if layout.alone and isinstance(mask, Bidirectional):
        return _padded_attention(q, k, v, layout.real)
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


def _padded_attention(
    q: Float[Array, "B L H C"], k: Float[Array, "B L K C"], v: Float[Array, "B L K C"], real: Bool[Array, "B L"]
) -> Float[Array, "B L H C"]:
    """Every real token sees every real token of its row.

    Padding is one number a key, where other masks add one a pair; the sum of the weights divides the result, not each weight; and a few
    queries at a time keep the scores of long rows in a CPU's caches. Unrolled: XLA's CPU backend runs a loop's body on one core.
    """
    K, C = k.shape[2], q.shape[-1]
    k, v, padding = k.swapaxes(1, 2), v.swapaxes(1, 2), jnp.where(real, 0.0, MASKED)[:, None, None]

    def part(q: Float[Array, "B l H C"]) -> Float[Array, "B l H C"]:
        scores = jnp.einsum("bkrc,bksc->bkrs", stack_heads(q, K), k, preferred_element_type=jnp.float32) * C**-0.5 + padding
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
        out = jnp.einsum("bkrs,bksc->bkrc", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
        return unstack_heads((out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype), q.shape[1])

    step = QUERIES if platform() == "cpu" and q.shape[1] > 128 else q.shape[1]
    parts = [part(q[:, start : start + step]) for start in range(0, q.shape[1], step)]
    return jnp.where(real[:, :, None, None], jnp.concatenate(parts, axis=1), 0)
