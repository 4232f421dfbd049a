"""Where each token of a batch stands: its segment, its position inside it, and the segment's true length."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Layout:
    """What attention and RoPE must know about a row besides its content (METHODS 1.3).

    A row holds one right-padded sequence, or several packed one after another. Segments are contiguous, and
    positions count 0, 1, 2, ... inside each.

    Attributes:
        segment_ids: 1, 2, ... in order of appearance; 0 marks padding. Tokens attend inside their own segment only.
        positions: 0-based position inside the segment.
        lengths: true length of the token's own segment, in tokens; 0 on padding.
        alone: known before anything runs: no row holds more than one segment, so what a token may see depends on padding alone.
    """

    segment_ids: Int[Array, "B L"]
    positions: Int[Array, "B L"]
    lengths: Int[Array, "B L"]
    alone: bool = field(default=False, metadata={"static": True})

    @property
    def real(self) -> Bool[Array, "B L"]:
        """True where a token is not padding."""
        return self.segment_ids > 0

    @classmethod
    def from_lengths(cls, lengths: Int[Array, "B"], L: int) -> Layout:
        """One right-padded sequence a row, `lengths` true tokens each (0 = an empty row, at most L count), rows of `L` tokens."""
        lengths = jnp.minimum(jnp.asarray(lengths, jnp.int32), L)[:, None]
        index = jnp.arange(L, dtype=jnp.int32)[None]
        real = (index < lengths).astype(jnp.int32)
        return cls(segment_ids=real, positions=index * real, lengths=lengths * real, alone=True)

    @classmethod
    def from_segments(cls, segment_ids: Int[Array, "B L"], positions: Int[Array, "B L"]) -> Layout:
        """Packed rows as the data room makes them; each segment's length is counted here, without an L x L array."""
        segment_ids = jnp.asarray(segment_ids, jnp.int32)
        positions = jnp.asarray(positions, jnp.int32)
        L = segment_ids.shape[1]
        index = jnp.broadcast_to(jnp.arange(L, dtype=jnp.int32), segment_ids.shape)
        changes = segment_ids[:, 1:] != segment_ids[:, :-1]
        edge = jnp.ones_like(segment_ids[:, :1], bool)
        first = jax.lax.cummax(jnp.where(jnp.concatenate([edge, changes], 1), index, 0), axis=1)
        last = jax.lax.cummin(jnp.where(jnp.concatenate([changes, edge], 1), index, L), axis=1, reverse=True)
        return cls(segment_ids, positions, jnp.where(segment_ids > 0, last - first + 1, 0))
