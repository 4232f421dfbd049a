"""Maps of a block whose gradients are written by hand, in forms that a CPU computes with fewer passes over memory.

`normalised` and `product` take their own form where one CPU device computes, and are left to autodiff elsewhere.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from conan_jax.model.device import one_cpu


def product(x: Float[Array, "T I"], w: Float[Array, "I O"]) -> Float[Array, "T O"]:
    """x W. Its gradient dW = x^T dy sums over tokens, and a CPU is quicker at that with the narrower side on the left."""
    return _narrowing(x, w) if x.shape[1] > w.shape[1] and one_cpu() else x @ w


@jax.custom_vjp
def _narrowing(x: Array, w: Array) -> Array:
    return x @ w


def _narrowing_forward(x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    return x @ w, (x, w)


def _narrowing_backward(saved: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    x, w = saved
    # Without the barrier the compiler turns (dy^T x)^T back into x^T dy.
    return d @ w.T, jax.lax.optimization_barrier(d.T @ x).T


_narrowing.defvjp(_narrowing_forward, _narrowing_backward)


def normalised(x: Float[Array, "... D"], scale: Float[Array, "D"], eps: float) -> Float[Array, "... D"]:
    """x r scale with r = 1 / sqrt(mean(x^2) + eps) over the last axis, in float32; returned in the dtype of `x`.

    With z = dy x: dx = r (dy scale) - x r^3 (z scale) / D, dscale = sum over tokens of r z. Both sums are matrix products with a vector
    on a CPU, whose library is quicker at them than the compiler's reductions.
    """
    return _normalised(x, scale, eps) if one_cpu() else _apply(x, scale, eps)[0]


def _apply(x: Array, scale: Array, eps: float) -> tuple[Array, Float[Array, "... 1"]]:
    y = x.astype(jnp.float32)
    r = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * r * scale).astype(x.dtype), r


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _normalised(x: Array, scale: Array, eps: float) -> Array:
    return _apply(x, scale, eps)[0]


def _normalised_forward(x: Array, scale: Array, eps: float) -> tuple[Array, tuple[Array, Array, Array]]:
    y, r = _apply(x, scale, eps)
    return y, (x, scale, r)


def _normalised_backward(eps: float, saved: tuple[Array, Array, Array], d: Array) -> tuple[Array, Array]:
    x, scale, r = saved
    D = x.shape[-1]
    y, d, r = (a.astype(jnp.float32).reshape(-1, a.shape[-1]) for a in (x, d, r))
    z = jax.lax.optimization_barrier(d * y)  # computed once, for both sums
    along = z @ scale[:, None] / D
    d_x = r * (d * scale) - y * (r**3 * along)
    return d_x.astype(x.dtype).reshape(x.shape), (r.T @ z)[0]


_normalised.defvjp(_normalised_forward, _normalised_backward)


@jax.custom_vjp
def gated(gate: Float[Array, "T F"], up: Float[Array, "T F"]) -> Float[Array, "T F"]:
    """silu(gate) * up. The gradient keeps the two arguments alone, where autodiff would keep sigmoid(gate) and silu(gate) beside them."""
    return gate * jax.nn.sigmoid(gate) * up


def _gated_forward(gate: Array, up: Array) -> tuple[Array, tuple[Array, Array]]:
    return gated(gate, up), (gate, up)


def _gated_backward(saved: tuple[Array, Array], d: Array) -> tuple[Array, Array]:
    # Without the barriers the compiler keeps the sigmoid of the forward pass after all, and writes that of this one out for both results.
    gate, up = jax.lax.optimization_barrier(saved)
    again = jax.lax.optimization_barrier(saved[0])
    weight = jax.nn.sigmoid(gate)
    return d * up * (weight * (1 + gate * (1 - weight))), d * (again * jax.nn.sigmoid(again))


gated.defvjp(_gated_forward, _gated_backward)
