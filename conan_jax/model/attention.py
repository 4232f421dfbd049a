"""The one attention entry: softmax(q k^T / sqrt(C), under a mask object) v."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Array, Float

from conan_jax.errors import ConfigError
from conan_jax.model.blockwise import blockwise_attention
from conan_jax.model.dense import dense_attention, parts_of
from conan_jax.model.device import one_cpu, platform
from conan_jax.model.layout import Layout
from conan_jax.model.softmask import Mask

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
        return dense_attention(q, k, v, mask, layout, parts_of(*q.shape[:3]) if one_cpu() else 1)
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
