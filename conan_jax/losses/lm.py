"""Next-token cross-entropy over a tied embedding, a few tokens at a time (METHODS 1.1, 1.2).

The logits of one chunk exist at a time, and the gradient of a chunk is formed right there, while they do:
the backward pass only scales what the forward pass left, so logits are neither kept nor computed twice.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def chunked_cross_entropy(
    hidden: Float[Array, "T D"],
    embedding: Float[Array, "V D"],
    targets: Int[Array, " T"],
    weights: Float[Array, " T"],
    chunk_size: int,
    z_loss: float = 0.0,
    groups: int = 1,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sum over tokens of  -log softmax(E h_t)[y_t] + z_loss * logsumexp(E h_t)^2,  and the sum of the weights.

    Args:
        hidden: final hidden states, any float type; the matrix products run in it and accumulate in float32.
        embedding: the tied embedding table E, cast to the type of `hidden` for the products.
        targets: token ids in [0, V); where the weight is 0 any valid id will do.
        weights: float32, 0 where a token is no target.
        chunk_size: tokens of one group whose logits exist at one time.
        z_loss: coefficient of the squared log-normaliser, in nats.
        groups: devices the tokens are spread over, in contiguous blocks. Every group sums its own gradient of E, so
            the devices exchange it once after the loop and not once a chunk. Must divide T.

    Returns:
        (loss_sum, weight_sum), float32 scalars; divide for the mean. Differentiable in hidden, embedding and weights.
        No array of T * V elements exists in either pass, and gradients are formed only when asked for.

    Raises:
        ValueError: `groups` does not divide T, or `chunk_size` is not positive.
    """
    if hidden.shape[0] % groups or chunk_size < 1:
        tokens = hidden.shape[0]
        raise ValueError(f"{tokens} tokens need a chunk_size above 0, got {chunk_size}, and groups that divide them, got {groups}")
    weights = weights.astype(jnp.float32)
    return _loss_sum(hidden, embedding, targets, weights, chunk_size, z_loss, groups), jnp.sum(weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss_sum(hidden, embedding, targets, weights, chunk_size, z_loss, groups):
    table = embedding.astype(hidden.dtype)

    def body(total, chunk):
        states, ids, weight = chunk
        _, _, loss = _token_losses(states, table, ids, z_loss)
        return total + jnp.sum(weight * loss), None

    chunks = tuple(_split(x, chunk_size, groups) for x in (hidden, targets, weights))
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), chunks)[0]


def _forward(hidden, embedding, targets, weights, chunk_size, z_loss, groups):
    table = embedding.astype(hidden.dtype)
    vocabulary = jnp.arange(table.shape[0], dtype=targets.dtype)

    def body(carry, chunk):
        total, table_gradient = carry
        states, ids, weight = chunk
        logits, normaliser, loss = _token_losses(states, table, ids, z_loss)
        probabilities = jnp.exp(logits - normaliser[..., None])
        gradient = probabilities * (1.0 + 2.0 * z_loss * normaliser)[..., None] - (vocabulary == ids[..., None])
        gradient = (gradient * weight[..., None]).astype(states.dtype)
        state_gradient = jnp.einsum("gcv,vd->gcd", gradient, table, preferred_element_type=jnp.float32)
        table_gradient += jnp.einsum("gcv,gcd->gvd", gradient, states, preferred_element_type=jnp.float32)
        return (total + jnp.sum(weight * loss), table_gradient), (state_gradient.astype(states.dtype), loss)

    chunks = tuple(_split(x, chunk_size, groups) for x in (hidden, targets, weights))
    start = (jnp.zeros((), jnp.float32), jnp.zeros((groups, *table.shape), jnp.float32))
    (total, table_gradient), (state_gradient, losses) = jax.lax.scan(body, start, chunks)
    table_gradient = jnp.sum(table_gradient, axis=0).astype(embedding.dtype)
    tokens = hidden.shape[0]
    return total, (_join(state_gradient, tokens), table_gradient, _join(losses, tokens))


def _backward(chunk_size, z_loss, groups, saved, cotangent):
    state_gradient, table_gradient, losses = saved
    no_gradient = np.zeros(losses.shape, jax.dtypes.float0)  # targets are integers
    scaled = (state_gradient * cotangent).astype(state_gradient.dtype)
    return scaled, (table_gradient * cotangent).astype(table_gradient.dtype), no_gradient, losses * cotangent


_loss_sum.defvjp(_forward, _backward)


def _token_losses(states, table, ids, z_loss):
    """Logits [G, c, V], log-normalisers [G, c] and losses [G, c] of one chunk, all float32."""
    logits = jnp.einsum("gcd,vd->gcv", states, table, preferred_element_type=jnp.float32)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    target = jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    return logits, normaliser, normaliser - target + z_loss * jnp.square(normaliser)


def _split(x, chunk_size, groups):
    """[T, ...] -> [chunks, G, c, ...]. Chunks are of equal size c <= chunk_size; zeros fill the last one (weight 0)."""
    per_group = x.shape[0] // groups
    count = -(-per_group // chunk_size)
    size = -(-per_group // count)
    x = x.reshape(groups, per_group, *x.shape[1:])
    x = jnp.pad(x, [(0, 0), (0, count * size - per_group)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(groups, count, size, *x.shape[2:]), 1, 0)


def _join(x, tokens):
    """The inverse of `_split` for results of one chunk loop: [chunks, G, c, ...] -> [T, ...]."""
    x = jnp.moveaxis(x, 0, 1)
    groups = x.shape[0]
    x = x.reshape(groups, -1, *x.shape[3:])[:, : tokens // groups]
    return x.reshape(tokens, *x.shape[2:])
