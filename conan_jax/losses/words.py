"""Which words of the table a device answers for, and how devices complete one another's sums over the vocabulary.

With tokens split over N devices each would hold the whole table and the whole sum of its gradient, 6 bytes x V x D in
bfloat16 and float32: 3.0 GiB of the full model. Instead `share` neighbours split the words among themselves and work on
one another's tokens: table and sum shrink by `share`, and so does what is exchanged for them, while each chunk's states
and their gradients now travel inside that row of neighbours. Bytes received by a device: about 6 D (V / share + t (share - 1))
for t tokens of its own; `share` is chosen to make that least. With V = 151,040 and t = 4096 that is 8, a third of the bytes of
share = 1; value and gradients compiled for 256 v5e devices then peak at 0.77 GiB instead of 4.25. Reducing the sum over the
devices after every chunk would save less and exchange 4 V D bytes a chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int


@dataclass(frozen=True)
class Words:
    """How tokens, words and columns of the table are split over the current mesh. The default is one device, and no mesh.

    The methods are for use inside `jax.shard_map`; where nothing is split they return what they are given.
    """

    tokens: tuple[str, ...] = ()  # mesh axes of the tokens
    words: tuple[str, ...] = ()  # mesh axes of the words; their devices see the same tokens
    columns: tuple[str, ...] = ()  # mesh axes of the table's columns
    share: int = 1  # neighbours along `columns`, which splits the tokens too, that split the words between them

    @property
    def tokens_spec(self) -> PartitionSpec:
        """Of arrays that lead with tokens."""
        return PartitionSpec(self.tokens or None)

    @property
    def table_spec(self) -> PartitionSpec:
        """Of the table and its gradient."""
        return PartitionSpec(self.words or None, self.columns or None)

    def gather_table(self, table: Float[Array, "v d"]) -> Float[Array, "w D"]:
        """All columns of this device's words, from all words of its columns."""
        if self.share > 1:
            table = jax.lax.all_to_all(table, self.columns[0], 0, 1, tiled=True, axis_index_groups=self._rows())
        if self.columns:
            table = jax.lax.all_gather(table, self.columns, axis=1, tiled=True, axis_index_groups=self._across())
        return table

    def scatter_table(self, gradient: Float[Array, "w D"]) -> Float[Array, "v d"]:
        """The sum over all tokens of the table's gradient, laid out as the table is. The transpose of `gather_table`."""
        if self.columns:
            gradient = jax.lax.psum_scatter(gradient, self.columns, scatter_dimension=1, tiled=True, axis_index_groups=self._across())
        if self.share > 1:
            gradient = jax.lax.all_to_all(gradient, self.columns[0], 1, 0, tiled=True, axis_index_groups=self._rows())
        rest = tuple(axis for axis in self.tokens if axis not in self.columns)
        return jax.lax.psum(gradient, rest) if rest else gradient

    def first_word(self, count: int) -> Int[Array, ""] | int:
        """Id of the first of this device's `count` words."""
        part = jax.lax.axis_index(self.words) if self.words else 0
        if self.share > 1:
            part = part * self.share + jax.lax.axis_index(self.columns) % self.share
        return part * count

    def collect(self, x: Array) -> Array:
        """The tokens [c, ...] of each device of the row, [share * c, ...]."""
        return jax.lax.all_gather(x, self.columns[0], tiled=True, axis_index_groups=self._rows()) if self.share > 1 else x

    def own(self, x: Array) -> Array:
        """This device's tokens of [share * c, ...], the same on every device of the row."""
        if self.share == 1:
            return x
        size = x.shape[0] // self.share
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.columns) % self.share * size, size)

    def total(self, x: Array) -> Array:
        """Sum over the devices that hold other words."""
        x = jax.lax.psum(x, self.words) if self.words else x
        return jax.lax.psum(x, self.columns[0], axis_index_groups=self._rows()) if self.share > 1 else x

    def own_total(self, x: Array) -> Array:
        """`own(total(x))`, without the tokens of others."""
        x = jax.lax.psum(x, self.words) if self.words else x
        return jax.lax.psum_scatter(x, self.columns[0], tiled=True, axis_index_groups=self._rows()) if self.share > 1 else x

    def largest(self, x: Array) -> Array:
        """Maximum over the devices that hold other words."""
        x = jax.lax.pmax(x, self.words) if self.words else x
        return jax.lax.pmax(x, self.columns[0], axis_index_groups=self._rows()) if self.share > 1 else x

    def over_tokens(self, x: Array) -> Array:
        """Sum over the devices that hold other tokens."""
        return jax.lax.psum(x, self.tokens) if self.tokens else x

    def _rows(self) -> list[list[int]]:
        size = jax.lax.axis_size(self.columns[0])
        return [list(range(start, start + self.share)) for start in range(0, size, self.share)]

    def _across(self) -> list[list[int]] | None:
        """Devices of the same place in their rows, which hold the same words."""
        if self.share == 1:
            return None
        return [list(range(place, jax.lax.axis_size(self.columns[0]), self.share)) for place in range(self.share)]


def words_on_mesh(tokens: int, table: tuple[int, int], groups: int) -> Words:
    """The split that the current mesh and flax's logical axis rules ask for, of T tokens and a table [V, D].

    Logical axes: `tokens`, and (`vocab`, `embed`) for the table. A dimension that its axes do not divide stays whole.
    `groups` is the number of parts the tokens lie in: all that the mesh makes, or 1 when they are whole on every device.

    Raises:
        ValueError: `groups` is neither.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    split = {name: _axes(name, sizes) for name in ("tokens", "vocab", "embed")}
    parts = {name: math.prod(sizes[axis] for axis in axes) for name, axes in split.items()}
    if groups not in (1, parts["tokens"]):
        raise ValueError(f"groups = {groups}, but the current mesh and its logical axis rules split tokens into {parts['tokens']} parts")
    V, D = table
    words = split["vocab"] if V % parts["vocab"] == 0 else ()
    if groups == 1:
        return Words(words=words)
    columns = split["embed"] if D % parts["embed"] == 0 and set(split["embed"]) <= set(split["tokens"]) else ()
    share = 1
    if len(columns) == 1:
        local_words, local_tokens = V // (parts["vocab"] if words else 1), tokens // groups
        fitting = [s for s in range(1, parts["embed"] + 1) if parts["embed"] % s == 0 and local_words % s == 0]
        share = min(fitting, key=lambda s: local_words / s + local_tokens * (s - 1))
    return Words(split["tokens"], words, columns, share)


def _axes(name: str, sizes: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes of more than one device that the logical axis `name` is split over."""
    entry = nn.logical_to_mesh_axes((name,))[0]
    axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
    return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)
