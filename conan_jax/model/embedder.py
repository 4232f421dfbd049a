"""`Embedder`: the one door to the model. Pure functions of a parameter tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from conan_jax import config as configs
from conan_jax.errors import ConfigError
from conan_jax.model.layout import Layout
from conan_jax.model.softmask import Bidirectional, Mask
from conan_jax.model.transformer import Decoder

Params = Any


@dataclass(frozen=True)
class Embedder:
    """The decoder of METHODS 1.1 as pure functions. Hashable by its configuration, so it may be a static argument of `jit`.

    `params` is a nested dict of float32 arrays; the arrays of all layers are stacked, [layers, ...], whether the layers
    run as a scan or unrolled.
    """

    config: configs.Model

    @property
    def _module(self) -> Decoder:
        return Decoder(self.config)

    def init(self, key: Array) -> Params:
        """Fresh float32 parameters: normal(initializer_range), norms 1, maps into the residual stream scaled by 1/sqrt(2 * num_layers)."""
        return nn.meta.unbox(self._boxed(key))

    def axes(self) -> Any:
        """The logical axis names of every parameter: a tree like `init`'s whose leaves are tuples of names."""
        boxed = jax.eval_shape(self._boxed, jax.random.key(0))
        return jax.tree.map(lambda box: tuple(box.names), boxed, is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata))

    def hidden(
        self, params: Params, inputs: Int[Array, "B L"] | Float[Array, "B L D"], layout: Layout, mask: Mask,
        rng: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Final-norm hidden states, in the compute dtype, of token ids or of ready input embeddings.

        Ready embeddings enter the first block as they are; those of token ids are table rows times `embedding_multiplier`.

        Args:
            rng: a key for each row, for training under `model.hidden_dropout`; a row's dropout depends on its key alone. None,
                or a rate of 0: no dropout.

        Raises:
            ConfigError: `inputs` is neither, or does not match `layout` or the model's width.
        """
        ready = jnp.issubdtype(inputs.dtype, jnp.floating)
        expected = (*layout.positions.shape, self.config.hidden_size) if ready else layout.positions.shape
        if inputs.shape != expected:
            raise ConfigError(f"inputs of type {inputs.dtype} have shape {inputs.shape}, but the layout and the model ask for {expected}")
        return self._module.apply({"params": params}, inputs, layout, mask, self._keys(rng), method="hidden")

    def logits(self, params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Next-token scores h E^T through the `output_table` E, float32."""
        table = self.output_table(params).astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)

    def embed(
        self, params: Params, text_batch: Mapping[str, Array], mask: Mask = Bidirectional(), rng: Key[Array, " B"] | None = None
    ) -> Float[Array, "B D"]:
        """One float32 unit vector a text; an empty row gives zeros (METHODS 1.7).

        Args:
            text_batch: `tokens` [B, L], `lengths` [B], `prompt_lengths` [B]; instruction tokens are attended to, not pooled.
                When nothing but the instruction is there, it is pooled.
            rng: as in `hidden`.
        """
        b = text_batch
        return self._module.apply({"params": params}, b["tokens"], b["lengths"], b["prompt_lengths"], mask, self._keys(rng), method="embed")

    def output_table(self, params: Params) -> Float[Array, "V D"]:
        """What logits are made with, float32: the token embeddings, or the table of its own of a model that is not tied."""
        return params["embedding" if self.config.tie_word_embeddings else "output_embedding"]

    def _keys(self, rng: Key[Array, " B"] | None) -> Key[Array, " B"] | None:
        return rng if self.config.hidden_dropout else None

    def _boxed(self, key: Array) -> Any:
        row = jnp.zeros((1, 1), jnp.int32)
        # The tree is the same one unrolled; as a scan it is made with one compiled layer body. Attention has no parameters,
        # and one made for a device that is not here could not look at this row.
        scanned = Decoder(replace(self.config, scan_layers=True, attention="dense"))
        return scanned.init(key, row, row[0] + 1, row[0], Bidirectional(), method="embed")["params"]


def num_params(config: configs.Model) -> int:
    """Parameters of the model, counted from its real shapes without making an array."""
    shapes = jax.eval_shape(Embedder(config).init, jax.random.key(0))
    return sum(prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
