"""Sharding said once: the mesh, one table of rules, and what follows from them.

Parameters are split over `fsdp` along `embed` and over `tensor` along heads, FFN and vocabulary; a batch and
everything keyed by example is split over `data` and `fsdp` together. Models and stages name *logical* axes only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from conan_jax import config
from conan_jax.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axes. No array may name two axes that land on the same mesh axis.
RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "vocab": ("tensor",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "norm": (),
    "layers": (),
    # activations
    "batch": BATCH_AXES,
    "tokens": BATCH_AXES,
    "length": (),
    # carried state
    "examples": BATCH_AXES,
}


def make_mesh(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Mesh with axes ("data", "fsdp", "tensor") over `devices` (default: all of them).

    -1 takes the devices that remain. With every size given, one process may leave devices unused; several may not.
    Auto axis types: the compiler propagates shardings and linen's logical constraints apply.
    Raises `ConfigError` when the sizes do not fit the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = list(sizes.sizes)
    fixed = math.prod(s for s in shape if s > 0)
    if -1 in shape:
        if len(devices) % fixed:
            raise ConfigError(f"mesh {_pretty(shape)}: {fixed} does not divide the {len(devices)} devices; "
                              "change mesh.data, mesh.fsdp or mesh.tensor")
        shape[shape.index(-1)] = len(devices) // fixed
    needed = math.prod(shape)
    if needed > len(devices) or (needed < len(devices) and jax.process_count() > 1):
        raise ConfigError(f"mesh {_pretty(shape)} needs {needed} devices and there are {len(devices)}; "
                          "set one of mesh.data, mesh.fsdp, mesh.tensor to -1")
    return jax.make_mesh(tuple(shape), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:needed])


@contextlib.contextmanager
def activate(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Make `mesh` and `RULES` current, so that `nn.with_logical_constraint` inside a traced function means them."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple((name, axes or None) for name, axes in RULES.items())):
        yield


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: jax.sharding.Mesh, name: str = "array") -> PartitionSpec:
    """How an array with logical `axes` and `shape` lies on `mesh`.

    A dimension that its mesh axes do not divide stays whole on every device (see `undivided`): small and odd sizes
    must still train. Raises `ConfigError` for an unknown logical axis, a wrong number of axes, or a collision.
    """
    if len(axes) != len(shape):
        raise ConfigError(f"{name} has shape {tuple(shape)} and logical axes {tuple(axes)}: one name (or None) a dimension is needed")
    used: dict[str, str] = {}
    entries: list[tuple[str, ...] | None] = []
    for logical, size in zip(axes, shape):
        if logical is not None and logical not in RULES:
            raise ConfigError(f"{name} has the logical axis {logical!r}, which conan_jax.sharding.RULES does not know ({', '.join(RULES)})")
        mesh_axes = RULES[logical] if logical is not None else ()
        for axis in mesh_axes:
            if axis in used:
                raise ConfigError(f"{name}: logical axes {used[axis]!r} and {logical!r} both want the mesh axis {axis!r}")
            used[axis] = str(logical)
        divides = size % math.prod(mesh.shape[a] for a in mesh_axes) == 0
        entries.append(mesh_axes if mesh_axes and divides else None)
    return PartitionSpec(*entries)


def shardings_for(axes_tree: Any, shapes_tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """`NamedSharding` of every array of `shapes_tree`; `axes_tree` holds a tuple of logical axis names in its place."""
    def one(path: Any, array: Any, axes: Sequence[str | None]) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(axes, array.shape, mesh, _name(path)))

    return jax.tree_util.tree_map_with_path(one, shapes_tree, axes_tree)


def undivided(axes_tree: Any, shapes_tree: Any, mesh: jax.sharding.Mesh) -> list[str]:
    """Names of the arrays that hold a dimension which the mesh should split and cannot."""
    names: list[str] = []

    def one(path: Any, array: Any, axes: Sequence[str | None]) -> None:
        for logical, size in zip(axes, array.shape):
            parts = math.prod(mesh.shape[a] for a in RULES[logical]) if logical is not None else 1
            if size % parts:
                names.append(f"{_name(path)} ({logical} {size} over {parts})")

    jax.tree_util.tree_map_with_path(one, shapes_tree, axes_tree)
    return names


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """The leading axis over ("data", "fsdp"), the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def row_parts() -> int:
    """Parts into which the current mesh splits the rows of a batch; 1 without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape.get(axis, 1) for axis in BATCH_AXES)


def batch_parts(rows: int) -> int:
    """Parts the rows of a batch are split into by the current mesh; 1 without a mesh, or where it does not divide them."""
    return row_parts() if rows % row_parts() == 0 else 1


def split_axis(x: jax.Array, axis: int = 0) -> jax.Array:
    """`x` inside a jitted function, with `axis` split as the rows of a batch are and the rest whole."""
    return _constrain(x, PartitionSpec(*[None] * axis, BATCH_AXES))


def whole(x: jax.Array) -> jax.Array:
    """`x` inside a jitted function, whole on every device."""
    return _constrain(x, PartitionSpec())


def as_parameters(tree: Any, axes_tree: Any) -> Any:
    """`tree` inside a jitted function, laid out by its logical axes: parameters, or gradients that are to lie as they do.

    A gradient that flows back through it takes the same layout: what devices add up for it is scattered at once, not kept whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.shape:
        return tree
    return jax.tree_util.tree_map_with_path(
        lambda path, x, axes: _constrain(x, partition_spec(axes, x.shape, mesh, _name(path))), tree, axes_tree)


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    sizes = jax.sharding.get_abstract_mesh().shape
    return jax.lax.with_sharding_constraint(x, spec) if math.prod(sizes.values()) > 1 else x


def global_batch(local: Any, mesh: jax.sharding.Mesh) -> Any:
    """Device arrays of the global batch from this host's slice of it (a tree of NumPy arrays, leading axis = examples).

    Raises `ConfigError` when the devices do not divide the global batch.
    """
    split, hosts = batch_sharding(mesh), jax.process_count()
    parts = math.prod(mesh.shape[a] for a in BATCH_AXES)

    def put(path: Any, array: np.ndarray) -> jax.Array:
        rows = array.shape[0] * hosts
        if rows % parts:
            raise ConfigError(f"the global batch of {_name(path)} has {rows} rows, which {parts} devices (mesh data x fsdp) do not divide; "
                              f"use a multiple of {parts}, or a smaller mesh (for instance --set mesh.fsdp=1)")
        return jax.make_array_from_process_local_data(split, array)

    return jax.tree_util.tree_map_with_path(put, local)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _pretty(shape: Sequence[int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape))
