"""From hidden states to one vector a row (METHODS 1.7).

A pooling is a linen module built from the model's configuration and called with
`(hidden [B, L, D], real [B, L], text [B, L]) -> [B, D] float32`, where `real` marks tokens that are not padding and
`text` those that are not instruction either. It may own parameters; they live under "pooling" in the tree.
"""

from __future__ import annotations

import importlib

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from conan_jax import config
from conan_jax.errors import ConfigError


class MeanPooling(nn.Module):
    """Mean of the text tokens: instruction tokens are attended to, not pooled. Empty rows give zeros."""

    config: config.Model

    def __call__(self, hidden: Float[Array, "B L D"], real: Bool[Array, "B L"], text: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        weights = text.astype(jnp.float32)
        weights = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1.0)
        return jnp.sum(hidden.astype(jnp.float32) * weights[..., None], axis=1)


class LastTokenPooling(nn.Module):
    """The last real token, which is EOS. Empty rows give zeros."""

    config: config.Model

    def __call__(self, hidden: Float[Array, "B L D"], real: Bool[Array, "B L"], text: Bool[Array, "B L"]) -> Float[Array, "B D"]:
        last = real & (jnp.cumsum(real, axis=1) == real.sum(axis=1, keepdims=True))
        return jnp.sum(hidden.astype(jnp.float32) * last[..., None], axis=1)


POOLINGS: dict[str, type[nn.Module]] = {"mean": MeanPooling, "last": LastTokenPooling}


def make_pooling(c: config.Model) -> nn.Module:
    """The pooling named by `config.pooling`: a key of `POOLINGS`, or "package.module:attr" from outside.

    Raises:
        ConfigError: the name is not known, or the module or attribute does not exist.
    """
    if c.pooling in POOLINGS:
        return POOLINGS[c.pooling](c)
    module, separator, attribute = c.pooling.partition(":")
    if not separator:
        raise ConfigError(f'model.pooling {c.pooling!r} is not known; use {", ".join(POOLINGS)} or "package.module:attr"')
    try:
        return getattr(importlib.import_module(module), attribute)(c)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"model.pooling {c.pooling!r} cannot be loaded: {error}") from error
