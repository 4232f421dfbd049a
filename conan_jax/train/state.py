"""The train state: everything a step reads and writes, born sharded.

No host ever holds the whole model: shapes come from `eval_shape`, arrays are created by a jitted function
whose `out_shardings` are already final.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from conan_jax import sharding
from conan_jax.stages.base import Carry, Params, Stage


@flax.struct.dataclass
class TrainState:
    """`step` counts finished updates, skipped ones included; `skipped` of them changed nothing, the last `skipped_in_row` together."""

    step: Int[Array, ""]
    params: Params
    opt_state: Any
    carry: Carry
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]


def fresh_state(params: Params, stage: Stage, optimizer: optax.GradientTransformation, num_examples: Mapping[str, int]) -> TrainState:
    """The state before the first update of a stage that begins from `params`."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(step=zero, params=params, opt_state=optimizer.init(params), carry=stage.init_carry(num_examples),
                      skipped=zero, skipped_in_row=zero)


def abstract_state(embedder: Any, stage: Stage, optimizer: optax.GradientTransformation, num_examples: Mapping[str, int],
                   mesh: jax.sharding.Mesh) -> TrainState:
    """The state as `ShapeDtypeStruct`s with their shardings: what to create, restore onto, and pin the step's output to.

    Optimizer moments lie as their parameters do; scalars are replicated.
    """
    shapes = jax.eval_shape(lambda key: fresh_state(embedder.init(key), stage, optimizer, num_examples), jax.random.key(0))
    whole = sharding.replicated(mesh)
    params = sharding.shardings_for(embedder.axes(), shapes.params, mesh)
    placed = TrainState(
        step=whole,
        params=params,
        opt_state=optax.tree_map_params(optimizer, lambda _, place: place, shapes.opt_state, params, transform_non_params=lambda _: whole),
        carry=sharding.shardings_for(stage.carry_axes(shapes.carry), shapes.carry, mesh),
        skipped=whole,
        skipped_in_row=whole,
    )
    return jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes, placed)


def shardings_of(abstract: Any) -> Any:
    """The shardings inside a tree of `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda a: a.sharding, abstract)


def scratch_params(embedder: Any, abstract: TrainState, seed: int) -> Params:
    """New parameters, created where they will live; the same numbers on every mesh."""
    return jax.jit(embedder.init, out_shardings=shardings_of(abstract.params))(jax.random.key(seed))


def begin(params: Params, abstract: TrainState, fresh: Callable[[Params], TrainState]) -> TrainState:
    """`fresh(params)` under the final shardings; `params` is donated."""
    return jax.jit(fresh, out_shardings=shardings_of(abstract), donate_argnums=0)(params)


def count_parameters(params: Params, axes: Any) -> tuple[int, int]:
    """All parameters, and those outside the embedding table (no `vocab` axis). Shapes suffice."""
    sizes = jax.tree.leaves(jax.tree.map(lambda a, names: (a.size, 0 if "vocab" in names else a.size), params, axes),
                            is_leaf=lambda leaf: isinstance(leaf, tuple))
    return sum(size for size, _ in sizes), sum(size for _, size in sizes)
