"""Flash attention on a TPU under every mask object: the function around the kernels, and its gradient.

Inside, the query heads that share a key/value head stand together, [B, K, G, L, C], so that a block of keys is fetched and
a block of the mask computed once for all of them. L is padded to whole blocks; a head_dim that does not fill the lanes
(112 of 128) stays as it is, for memory holds it padded anyway and the compiler zeroes the rest inside products.
"""

from __future__ import annotations

from functools import partial
from math import lcm

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from conan_jax.errors import ConfigError
from conan_jax.model.blockwise import SAVED
from conan_jax.model.kernels.backward import key_gradients, query_gradient
from conan_jax.model.kernels.forward import forward
from conan_jax.model.kernels.plan import QUERY_ROWS, Sizes, make_plan, token_rows
from conan_jax.model.kernels.sharded import by_device
from conan_jax.model.layout import Layout
from conan_jax.model.ranges import key_ranges, query_ranges
from conan_jax.model.softmask import Mask

LANES = 128
BLOCK = 512


def flash_attention(
    q: Float[Array, "B L H C"],
    k: Float[Array, "B L K C"],
    v: Float[Array, "B L K C"],
    mask: Mask,
    layout: Layout,
    *,
    block_q: int | None = None,
    block_k: int | None = None,
    interpret: bool = False,
) -> Float[Array, "B L H C"]:
    """What `conan_jax.model.attention.attention` computes (METHODS 1.1, 1.3), as Pallas TPU kernels; differentiable in q, k, v.

    Float32 scores, softmax and accumulators; the result has the dtype of `v`. Padding rows give zeros and zero gradients,
    alpha gets none. Blocks that the mask, padding or packing make zero are neither computed nor fetched, and a block inside
    one segment where M is 1 is computed without a mask. Memory grows with L: nothing of size L x L exists. On a mesh each
    device works on its own rows and heads.

    Args:
        q, k, v: bfloat16 or float32, alike; H a multiple of K. Any L; C up to 128 is compiled and tested.
        block_q, block_k: tokens a side of a block, multiples of 128 on a TPU. Default: 512 keys, and 512 queries while at
            most 4 heads share a key/value head, fewer with more. Blocks longer than the row shrink to it.
        interpret: run on any platform, slowly, for tests.

    Raises:
        ConfigError: H is no multiple of K, a block is not positive, or not a multiple of 128 where the kernels are compiled.
    """
    L, H, K = q.shape[1], q.shape[2], k.shape[2]
    if H % K:
        raise ConfigError(f"{H} query heads cannot share {K} key/value heads evenly")
    row = _up(L, LANES)
    block_q = min(_query_block(H // K) if block_q is None else block_q, row)
    block_k = min(BLOCK if block_k is None else block_k, row)
    if block_q < 1 or block_k < 1 or not interpret and (block_q % LANES or block_k % LANES):
        raise ConfigError(f"attention blocks of {block_q} queries and {block_k} keys: a TPU needs positive multiples of {LANES}")
    return _flash(q, k, v, mask, layout, block_q, block_k, interpret)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _flash(q: Array, k: Array, v: Array, mask: Mask, layout: Layout, block_q: int, block_k: int, interpret: bool) -> Array:
    return _forward(q, k, v, mask, layout, block_q, block_k, interpret)[0]


# The gradient is taken around `by_device`, not through it: the transpose of `shard_map` would sum what every device has whole.
_INPUTS = ("tokens by heads",) * 3 + ("shared", "tokens")


def _forward(q: Array, k: Array, v: Array, mask: Mask, layout: Layout, block_q: int, block_k: int, interpret: bool) -> tuple[Array, tuple]:
    def local(q: Array, k: Array, v: Array, mask: Mask, layout: Layout) -> tuple[Array, Array]:
        sizes, layout = _sizes(q, k, mask, block_q, block_k), _padded_layout(layout, block_q, block_k)
        plan = make_plan(key_ranges(layout, mask, block_q, block_k), mask, layout, sizes)
        out, logsumexp = forward(plan, token_rows(mask, layout), _queries(q, sizes), _keys(k, sizes), _keys(v, sizes), sizes, interpret)
        return _from_queries(out, q.shape), logsumexp

    attend = by_device(local, q.shape[0], k.shape[2], _INPUTS, ("tokens by heads", "heads by tokens"))
    out, logsumexp = attend(q, k, v, mask, layout)
    out, logsumexp = checkpoint_name(out, SAVED), checkpoint_name(logsumexp, SAVED)
    return out, (q, k, v, mask, layout, out, logsumexp)


def _backward(block_q: int, block_k: int, interpret: bool, saved: tuple, d_out: Array) -> tuple:
    def local(q: Array, k: Array, v: Array, mask: Mask, layout: Layout, out: Array, logsumexp: Array, d_out: Array) -> tuple[Array, ...]:
        sizes, layout = _sizes(q, k, mask, block_q, block_k), _padded_layout(layout, block_q, block_k)
        saw = make_plan(key_ranges(layout, mask, block_q, block_k), mask, layout, sizes)
        seen = make_plan(query_ranges(layout, mask, block_q, block_k), mask, layout, sizes)
        d_out = jnp.where(layout.real[:, None, None, :, None], _queries(d_out, sizes), 0)
        tokens, inputs = token_rows(mask, layout), (_queries(q, sizes), _keys(k, sizes), _keys(v, sizes))
        dq, through = query_gradient(saw, tokens, *inputs, logsumexp, _queries(out, sizes), d_out, sizes, interpret)
        dk, dv = key_gradients(seen, tokens, *inputs, logsumexp, through, d_out, sizes, interpret)
        return _from_queries(dq, q.shape), _from_keys(dk, k.shape), _from_keys(dv, v.shape)

    (q, k), operands = saved[:2], _INPUTS + ("tokens by heads", "heads by tokens", "tokens by heads")
    differentiate = by_device(local, q.shape[0], k.shape[2], operands, _INPUTS[:3])
    return *differentiate(*saved, d_out), None, None


_flash.defvjp(_forward, _backward)


def _query_block(groups: int) -> int:
    return max(LANES, min(BLOCK, QUERY_ROWS // groups // LANES * LANES))


def _sizes(q: Array, k: Array, mask: Mask, block_q: int, block_k: int) -> Sizes:
    (_, L, H, C), K = q.shape, k.shape[2]
    L = _up(L, lcm(block_q, block_k))
    return Sizes(block_q, block_k, L // block_q, L // block_k, H // K, C**-0.5, mask.apply, mask.index)


def _padded_layout(layout: Layout, block_q: int, block_k: int) -> Layout:
    L = layout.positions.shape[1]
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, _up(L, lcm(block_q, block_k)) - L))), layout)


def _queries(x: Float[Array, "B l H c"], sizes: Sizes) -> Float[Array, "B K G L C"]:
    """Heads of a group together, tokens padded to whole blocks."""
    B, l, _, c = x.shape
    x = x.reshape(B, l, -1, sizes.groups, c).transpose(0, 2, 3, 1, 4)
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, sizes.n_q * sizes.block_q - l), (0, 0)))


def _keys(x: Float[Array, "B l K c"], sizes: Sizes) -> Float[Array, "B K L C"]:
    l = x.shape[1]
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, sizes.n_k * sizes.block_k - l), (0, 0)))


def _from_queries(x: Float[Array, "B K G L C"], shape: tuple[int, ...]) -> Float[Array, "B l H c"]:
    return x[:, :, :, : shape[1]].transpose(0, 3, 1, 2, 4).reshape(shape)


def _from_keys(x: Float[Array, "B K L C"], shape: tuple[int, ...]) -> Float[Array, "B l K c"]:
    return x[:, :, : shape[1]].swapaxes(1, 2)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
