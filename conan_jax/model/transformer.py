"""The decoder: embedding table, `num_layers` blocks, a final norm, and a pooling beside it (METHODS 1.1)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from conan_jax import config
from conan_jax.model.blockwise import SAVED
from conan_jax.model.layers import RMSNorm, SelfAttention, SwiGLU, constrain, rope_tables
from conan_jax.model.layout import Layout
from conan_jax.model.pooling import make_pooling
from conan_jax.model.softmask import Mask

LOOK_UP_COLUMNS = 1024


class Block(nn.Module):
    """Pre-norm block: x += drop(attention(norm(x))); x += drop(swiglu(norm(x))). `keys`: one a row, None for no dropout."""

    config: config.Model

    @nn.compact
    def __call__(
        self, x: Float[Array, "T D"], rope: tuple[Array, Array], layout: Layout, mask: Mask, keys: Key[Array, " B"] | None
    ) -> tuple[Float[Array, "T D"], None]:
        c = self.config
        x = constrain(x, "tokens", None)
        out = SelfAttention(c, name="attention")(RMSNorm(c.rms_norm_eps, name="attention_norm")(x), rope, layout, mask)
        x = x + drop(out, keys, 0, c.hidden_dropout)
        out = SwiGLU(c, name="mlp")(RMSNorm(c.rms_norm_eps, name="mlp_norm")(x))
        x = x + drop(out, keys, 1, c.hidden_dropout)
        return constrain(x, "tokens", None), None


class Decoder(nn.Module):
    """The parameters and the maps between token ids, hidden states, logits and vectors. `Embedder` is its face."""

    config: config.Model

    def setup(self) -> None:
        c = self.config
        stddev = c.embedding_initializer_range or c.initializer_range
        init = nn.with_logical_partitioning(nn.initializers.normal(stddev), ("vocab", "embed"))
        self.embedding = self.param("embedding", init, (c.vocab_size, c.hidden_size), jnp.float32)
        if not c.tie_word_embeddings:
            self.param("output_embedding", init, (c.vocab_size, c.hidden_size), jnp.float32)
        # Unrolling inside the scan keeps one parameter tree, [layers, ...], whatever `scan_layers` says.
        self.layers = nn.scan(
            _rematerialised(Block, c),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=c.num_layers,
            unroll=1 if c.scan_layers else c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        self.final_norm = RMSNorm(c.rms_norm_eps)
        self.pooling = make_pooling(c)

    def hidden(
        self, inputs: Int[Array, "B L"] | Float[Array, "B L D"], layout: Layout, mask: Mask, keys: Key[Array, " B"] | None = None
    ) -> Float[Array, "B L D"]:
        """Final-norm hidden states in the compute dtype; with `keys`, one a row, under dropout."""
        c = self.config
        B, L = inputs.shape[:2]
        if inputs.ndim == 2:
            x = look_up(self.embedding, inputs, lambda rows: (rows * c.embedding_multiplier).astype(c.compute_dtype))
        else:
            x = inputs
        rope = rope_tables(layout.positions, c.head_dim, c.rope_theta, c.rope_scaling)
        if keys is not None:
            keys = jax.vmap(lambda layer: jax.vmap(lambda key: jax.random.fold_in(key, layer))(keys))(jnp.arange(c.num_layers))
        x, _ = self.layers(x.reshape(B * L, -1).astype(c.compute_dtype), rope, layout, mask, keys)
        return self.final_norm(x).reshape(B, L, -1)

    def pool(self, hidden: Float[Array, "B L D"], lengths: Int[Array, "B"], prompt_lengths: Int[Array, "B"]) -> Float[Array, "B D"]:
        """One float32 vector a row, not normalised."""
        index = jnp.arange(hidden.shape[1])[None]
        real = index < lengths[:, None]
        text = real & (index >= prompt_lengths[:, None])
        # A row that holds its instruction alone still has a meaning: pool that.
        text = jnp.where(text.any(axis=1, keepdims=True), text, real)
        return self.pooling(hidden, real, text)

    def embed(
        self, tokens: Int[Array, "B L"], lengths: Int[Array, "B"], prompt_lengths: Int[Array, "B"], mask: Mask,
        keys: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B D"]:
        """Pooled and L2-normalised; zeros for an empty row."""
        hidden = self.hidden(tokens, Layout.from_lengths(lengths, tokens.shape[1]), mask, keys)
        return l2_normalise(self.pool(hidden, lengths, prompt_lengths))


def drop(x: Float[Array, "T D"], keys: Key[Array, " B"] | None, place: int, rate: float) -> Float[Array, "T D"]:
    """x with each element put to zero with probability `rate` and the rest divided by 1 - rate; x itself without `keys`.

    Each row draws from its own key, so what is dropped of it does not depend on the rows beside it. `place` tells uses of one key apart.
    """
    if keys is None or not rate:
        return x
    shape = (x.shape[0] // keys.shape[0], x.shape[1])
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, place), 1.0 - rate, shape))(keys)
    return jnp.where(constrain(kept.reshape(x.shape), "tokens", None), x / (1.0 - rate), 0).astype(x.dtype)


def look_up(
    table: Float[Array, "V D"], ids: Int[Array, "B L"], finish: Callable[[Array], Array], columns: int = LOOK_UP_COLUMNS
) -> Float[Array, "B L D"]:
    """`finish(table[ids])`, `columns` of L at a time.

    Where devices share the table along D, each looks its few coordinates of every token up and they exchange them. On a
    TPU a row of 14 coordinates takes the room of 128: all tokens of long rows at once would be the largest array of the step.
    """
    B, L = ids.shape

    def part(ids: Array) -> Array:
        return constrain(finish(jnp.take(table, ids, axis=0)), "batch", "length", None)

    if columns >= L:
        return part(ids)
    parts = jnp.pad(ids, ((0, 0), (0, -L % columns))).reshape(B, -1, columns).swapaxes(0, 1)
    return jax.lax.map(part, parts).swapaxes(0, 1).reshape(B, -1, table.shape[1])[:, :L]


def _rematerialised(block: type[nn.Module], c: config.Model) -> type[nn.Module]:
    """`block`, keeping for the gradient everything, the linear maps' and attention's results ("dots"), or its input alone ("full")."""
    if c.remat == "none":
        return block
    policies = jax.checkpoint_policies
    keep_dots = policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED))
    policy = keep_dots if c.remat == "dots" else policies.nothing_saveable
    # A scan keeps forward and backward apart by itself; unrolled, XLA would merge the recomputation away again.
    return nn.remat(block, policy=policy, prevent_cse=not c.scan_layers)


def l2_normalise(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """x / ||x||; a zero vector stays zero and has a zero gradient."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x * jnp.where(squared > 0, jax.lax.rsqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
