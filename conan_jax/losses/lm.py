"""Next-token cross-entropy over a tied embedding, a few tokens at a time (METHODS 1.1, 1.2).

The logits of one chunk exist at a time, and the gradient of a chunk is formed right there, while they do:
the backward pass only scales what the forward pass left, so logits are neither kept nor computed twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from conan_jax.losses.words import Words, words_on_mesh

WORDS_AT_ONCE = 2048  # for the gradients' products on a CPU, whose caches then hold what is multiplied


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
        groups: parts the tokens lie in, contiguous, one a device: as many as the current mesh and its logical axis rules
            split `tokens` into, or 1 when every device holds all of them. Must divide T.

    Returns:
        (loss_sum, weight_sum), float32 scalars; divide for the mean. Differentiable in hidden, embedding and weights.
        No array of T * V elements exists in either pass, and gradients are formed only when asked for. Under a mesh a
        device holds logits of its own words only (`words.Words`), and no array of them is exchanged.

    Raises:
        ValueError: `groups` does not divide T or is not what the mesh makes, or `chunk_size` is not positive.
    """
    if groups < 1 or hidden.shape[0] % groups or chunk_size < 1:
        tokens = hidden.shape[0]
        raise ValueError(f"{tokens} tokens need a chunk_size above 0, got {chunk_size}, and groups that divide them, got {groups}")
    weights = weights.astype(jnp.float32)
    return _loss_sum(hidden, embedding, targets, weights, chunk_size, z_loss, groups), jnp.sum(weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss_sum(hidden, embedding, targets, weights, chunk_size, z_loss, groups):
    words = words_on_mesh(hidden.shape[0], embedding.shape, groups)
    value = functools.partial(_value, words, chunk_size, z_loss)
    return _on_devices(words, value, PartitionSpec())(hidden, embedding, targets, weights)


def _forward(hidden, embedding, targets, weights, chunk_size, z_loss, groups):
    words = words_on_mesh(hidden.shape[0], embedding.shape, groups)
    value = functools.partial(_value_and_gradients, words, chunk_size, z_loss)
    saved = (words.tokens_spec, words.table_spec, words.tokens_spec)
    return _on_devices(words, value, (PartitionSpec(), saved))(hidden, embedding, targets, weights)


def _backward(chunk_size, z_loss, groups, saved, cotangent):
    state_gradient, table_gradient, losses = saved
    no_gradient = np.zeros(losses.shape, jax.dtypes.float0)  # targets are integers
    scaled = (state_gradient * cotangent).astype(state_gradient.dtype)
    return scaled, (table_gradient * cotangent).astype(table_gradient.dtype), no_gradient, losses * cotangent


_loss_sum.defvjp(_forward, _backward)


def _on_devices(words: Words, function: Callable, out_specs: Any) -> Callable:
    """`function` of one device's part of (hidden, embedding, targets, weights), as a function of the whole arrays."""
    if words == Words():
        return function
    tokens = words.tokens_spec
    return jax.shard_map(function, in_specs=(tokens, words.table_spec, tokens, tokens), out_specs=out_specs, check_vma=False)


def _value(words, chunk_size, z_loss, hidden, embedding, targets, weights):
    table = words.gather_table(jnp.asarray(embedding, hidden.dtype))

    def body(total, chunk):
        states, ids, weight = map(words.collect, chunk)
        loss = _chunk_losses(words, table, states, ids, z_loss)[0]
        return total + jnp.sum(words.own(weight * loss)), None

    chunks = tuple(_split(x, chunk_size) for x in (hidden, targets, weights))
    return words.over_tokens(jax.lax.scan(body, jnp.zeros((), jnp.float32), chunks)[0])


def _value_and_gradients(words, chunk_size, z_loss, hidden, embedding, targets, weights):
    """The loss, and its gradients in hidden, embedding and weights (which are the losses of the tokens)."""
    table = words.gather_table(jnp.asarray(embedding, hidden.dtype))

    def body(carry, chunk):
        total, table_gradient = carry
        states, ids, weight = map(words.collect, chunk)
        loss, exponentials, mass, normaliser, place = _chunk_losses(words, table, states, ids, z_loss)
        scale = weight * (1.0 + 2.0 * z_loss * normaliser) / mass
        state_gradient, table_gradient = _add_gradients(table_gradient, exponentials, scale, weight, place, states, table)
        loss, weight = words.own(loss), words.own(weight)
        return (total + jnp.sum(weight * loss), table_gradient), (words.own_total(state_gradient).astype(states.dtype), loss)

    chunks = tuple(_split(x, chunk_size) for x in (hidden, targets, weights))
    start = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32))
    (total, table_gradient), (state_gradient, losses) = jax.lax.scan(body, start, chunks)
    table_gradient = words.scatter_table(table_gradient).astype(embedding.dtype)
    tokens = hidden.shape[0]
    return words.over_tokens(total), (_join(state_gradient, tokens), table_gradient, _join(losses, tokens))


def _chunk_losses(words, table, states, ids, z_loss):
    """Of one chunk, in float32: losses, exponentials of the logits [c, w], what sums them up to the softmax, log-normalisers; and
    each target's place among this device's words, which is outside of [0, w) where another device holds it. All but one [c]."""
    place = ids - words.first_word(table.shape[0])
    # The target's logit comes from its own row: read out of the logits it would keep them alive beside their exponentials.
    held = (place >= 0) & (place < table.shape[0])
    row = table[jnp.where(held, place, 0)]
    target = words.total(jnp.where(held, jnp.sum(states.astype(jnp.float32) * row.astype(jnp.float32), axis=1), 0.0))
    logits = jnp.einsum("cd,vd->cv", states, table, preferred_element_type=jnp.float32)
    largest = words.largest(jnp.max(logits, axis=1))
    exponentials = jnp.exp(logits - largest[:, None])
    mass = words.total(jnp.sum(exponentials, axis=1))
    normaliser = largest + jnp.log(mass)
    loss = normaliser - target + z_loss * jnp.square(normaliser)
    return loss, exponentials, mass, normaliser, place


def _add_gradients(table_gradient, exponentials, scale, weight, place, states, table):
    """Gradients of one chunk in its states [c, D] and, added to `table_gradient`, in the table [w, D]; both float32.

    With g_tv = scale_t exp_tv - weight_t [v is t's target]: sum_v g_tv E_v, and sum_t g_tv h_t. A CPU takes the words in
    parts: a matrix product there is made apart from the sum it goes into, and would be as large as `table_gradient`.
    """
    def add(start, size, gradients):
        in_states, in_table = gradients
        part = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        gradient = part(exponentials, axis=1) * scale[:, None]
        is_target = start + jnp.arange(size, dtype=place.dtype) == place[:, None]
        gradient = jnp.where(is_target, gradient - weight[:, None], gradient).astype(states.dtype)
        in_states += jnp.einsum("cv,vd->cd", gradient, part(table), preferred_element_type=jnp.float32)
        more = jnp.einsum("cv,cd->vd", gradient, states, preferred_element_type=jnp.float32)
        return in_states, jax.lax.dynamic_update_slice_in_dim(in_table, part(in_table) + more, start, 0)

    def in_parts(gradients):
        size = -(-count // -(-count // WORDS_AT_ONCE))
        whole, rest = divmod(count, size)
        gradients = jax.lax.fori_loop(0, whole, lambda n, gradients: add(n * size, size, gradients), gradients)
        return add(whole * size, rest, gradients) if rest else gradients

    def at_once(gradients):
        return add(0, count, gradients)

    count, start = table.shape[0], (jnp.zeros(states.shape, jnp.float32), table_gradient)
    if count <= WORDS_AT_ONCE:
        return at_once(start)
    return jax.lax.platform_dependent(start, cpu=in_parts, default=at_once)


def _split(x, chunk_size):
    """[T, ...] -> [chunks, c, ...]. Chunks are of equal size c <= chunk_size; zeros fill the last one (weight 0)."""
    count = -(-x.shape[0] // chunk_size)
    size = -(-x.shape[0] // count)
    x = jnp.pad(x, [(0, count * size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
    return x.reshape(count, size, *x.shape[1:])


def _join(x, tokens):
    """The inverse of `_split`: [chunks, c, ...] -> [T, ...]."""
    return x.reshape(-1, *x.shape[2:])[:tokens]
