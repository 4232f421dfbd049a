"""A sum over micro-batches whose gradient is formed while each of them is there: memory of one, result of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from conan_jax import sharding

MicroSum = Callable[[Any, Any], Float[Array, ""]]


def sum_over(function: MicroSum, params: Any, micro_batches: Any, axes: Any) -> Float[Array, ""]:
    """sum_m function(params, m), m the entries along the leading axis of the arrays of `micro_batches`; float32.

    When a gradient is asked for, the forward pass computes it with each micro-batch and adds it up in float32, laid out as the
    float32 parameters are; the backward pass scales that sum. Nothing is computed twice, and the activations of one micro-batch
    exist at a time. Differentiable in `params` alone.

    Args:
        function: a float32 scalar of parameters and one micro-batch. It may not close over anything that is differentiated.
        axes: logical axes of the parameters.
    """
    def value(params: Any, micro_batches: Any) -> Float[Array, ""]:
        return jax.lax.scan(lambda total, m: (total + function(params, m), None), jnp.zeros((), jnp.float32), micro_batches)[0]

    def forward(params: Any, micro_batches: Any) -> tuple[Float[Array, ""], Any]:
        def add(sums: tuple[Array, Any], m: Any) -> tuple[tuple[Array, Any], None]:
            more, gradient = jax.value_and_grad(function)(params, m)
            total, gradients = sums
            gradient = sharding.as_parameters(gradient, axes)
            return (total + more, jax.tree.map(jnp.add, gradients, gradient)), None

        none = sharding.as_parameters(jax.tree.map(jnp.zeros_like, params), axes)
        sums, _ = jax.lax.scan(add, (jnp.zeros((), jnp.float32), none), micro_batches)
        return sums

    def backward(gradients: Any, cotangent: Float[Array, ""]) -> tuple[Any, None]:
        return jax.tree.map(lambda g: g * cotangent, gradients), None

    total = jax.custom_vjp(value)
    total.defvjp(forward, backward)
    return total(params, micro_batches)
