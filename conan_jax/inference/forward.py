"""The model for encoding: one layer a program, rows split over the local devices, nothing kept for a gradient.

A program for each layer, instead of one for all, is compiled in a fraction of the time, and needs no copy of a layer's weights cut out
of the stacked tree (on a CPU, as much memory again as the whole model). What it computes is `Embedder.embed`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from conan_jax import config
from conan_jax.model.layers import RMSNorm, rope_tables
from conan_jax.model.layout import Layout
from conan_jax.model.softmask import Mask
from conan_jax.model.transformer import Block, Decoder, l2_normalise, look_up

ROWS, WHOLE = PartitionSpec("rows"), PartitionSpec()


class Forward:
    """Token batches -> unit vectors, rows split over devices of this process.

    Args:
        params: the Embedder's tree; a copy of it, layer by layer, is put on every device at the first call.
        model: its configuration. On a CPU all is computed in float32, which is the fastest there, elsewhere in the model's own
            `compute_dtype`; attention is chosen for the device at hand.
        devices: where to compute; default: all of this process.
    """

    def __init__(self, params: Mapping[str, Any], model: config.Model, mask: Mask, devices: Sequence[jax.Device] | None = None) -> None:
        self._params, self.mask = params, mask
        self.devices = list(devices or jax.local_devices())
        dtype = "float32" if self.devices[0].platform == "cpu" else model.compute_dtype
        self.model = dataclasses.replace(model, compute_dtype=dtype, attention="auto", tie_word_embeddings=True)
        leaves = jax.tree.leaves(params["layers"])
        self.operations_per_token = 2 * sum(leaf.size for leaf in leaves)  # attention aside, which is little in short rows
        self._mesh = Mesh(np.array(self.devices), ("rows",), axis_types=(AxisType.Auto,))

    def __call__(self, tokens: Int[np.ndarray, "B L"], lengths: Int[np.ndarray, " B"], prompt_lengths: Int[np.ndarray, " B"]
                 ) -> Float[Array, "B D"]:
        """Pooled and L2-normalised; zeros for a row of length 0. B must be a multiple of the number of devices. Does not wait."""
        outer, layers = self._placed
        enter, layer, leave = _programs(self.model, self._mesh)
        tokens, lengths, prompt_lengths = jax.device_put((tokens, lengths, prompt_lengths), NamedSharding(self._mesh, ROWS))
        x, rope, layout = enter(outer, tokens, lengths)
        for weights in layers:
            x = layer(weights, x, rope, layout, self.mask)
        return leave(outer, x, lengths, prompt_lengths)

    @cached_property
    def _placed(self) -> tuple[Any, list[Any]]:
        """What stands around the layers, and the weights of each layer, on every device."""
        def put(tree: Any) -> Any:
            # A kernel is cast to the dtype of its input wherever it is used: once is enough.
            cast = jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf.astype(self.model.compute_dtype) if path[-1].key == "kernel" else leaf, tree)
            return jax.device_put(cast, NamedSharding(self._mesh, WHOLE))

        outer = {name: tree for name, tree in self._params.items() if name not in ("layers", "output_embedding")}
        stacked = jax.tree.map(np.asarray, self._params["layers"])
        return put(outer), [put(jax.tree.map(lambda a: a[i], stacked)) for i in range(self.model.num_layers)]


@functools.cache
def _programs(model: config.Model, mesh: Mesh) -> tuple[Callable, Callable, Callable]:
    """Before the layers, one layer, after the layers: compiled for each shape, shared by all encoders of one configuration."""
    def split(f: Callable, arguments: tuple, results: Any, **options: Any) -> Callable:
        if mesh.size > 1:
            f = jax.shard_map(f, mesh=mesh, in_specs=arguments, out_specs=results, check_vma=False)
        return jax.jit(f, **options)

    return (
        split(partial(_enter, model), (WHOLE, ROWS, ROWS), ROWS),
        split(partial(_layer, model), (WHOLE, ROWS, ROWS, ROWS, WHOLE), ROWS, donate_argnums=1),
        split(partial(_leave, model), (WHOLE, ROWS, ROWS, ROWS), ROWS),
    )


def _enter(model: config.Model, outer: Any, tokens: Array, lengths: Array) -> tuple[Array, tuple[Array, Array], Layout]:
    layout = Layout.from_lengths(lengths, tokens.shape[1])
    x = look_up(outer["embedding"], tokens, lambda rows: (rows * model.embedding_multiplier).astype(model.compute_dtype))
    rope = rope_tables(layout.positions, model.head_dim, model.rope_theta, model.rope_scaling)
    return x.reshape(-1, model.hidden_size), rope, layout


def _layer(model: config.Model, weights: Any, x: Array, rope: tuple[Array, Array], layout: Layout, mask: Mask) -> Array:
    return Block(model).apply({"params": weights}, x, rope, layout, mask, None)[0]


def _leave(model: config.Model, outer: Any, x: Array, lengths: Array, prompt_lengths: Array) -> Array:
    hidden = RMSNorm(model.rms_norm_eps).apply({"params": outer["final_norm"]}, x).reshape(len(lengths), -1, model.hidden_size)
    return l2_normalise(Decoder(model).apply({"params": outer}, hidden, lengths, prompt_lengths, method="pool"))
