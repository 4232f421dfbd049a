"""Sharding said once: the mesh, one table of rules, and what follows from them.

Parameters are split over `fsdp` along `embed` and over `tensor` along heads, FFN and vocabulary; a batch and
everything keyed by example is split over `data` and `fsdp` together. Models and stages name *logical* axes only.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from conan_jax import config, hardware
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


# Hardware by name -> the devices that `fsdp` spans when a recipe names no mesh; `data` counts such groups. The first pattern wins.
MESHES: tuple[tuple[str, str], ...] = (
    ("v[0-9]*", "slice"),  # the chips of a TPU slice share a torus; between slices there is the data-centre network
    ("[ah][0-9]*", "node"),  # the GPUs of a node share NVLink
    ("*", "all"),
)
# Chips of a slice beyond these go to `data`: widths such as 3584 = 14 x 256 are divided no further, and little is left to split.
LARGEST_SPAN = 256


def hardware_name(devices: Sequence[Any]) -> str:
    """What the devices are rented as: "v5e-256", "2 x v5e-256" (slices), "h100-16", "cpu-8"; for others kind and number."""
    count, slices = len(devices), len(_by_slice(devices))
    chip = hardware.chip_of(devices[0].device_kind)
    if chip is None:
        return f"{devices[0].device_kind}-{count}"
    name = f"{chip.name}-{count // slices * chip.units_per_chip}"
    return name if slices == 1 else f"{slices} x {name}"


def mesh_shape(sizes: config.Mesh, name: str, count: int, slices: int = 1) -> tuple[int, int, int]:
    """(data, fsdp, tensor) for `count` devices called `name` (as by `hardware_name`) in so many slices.

    What the recipe gives is kept, -1 takes the devices that remain; a recipe that gives nothing gets what `MESHES` says.
    Raises `ConfigError` when the sizes do not fit the devices, or the slices do not divide `data`.
    """
    if not sizes.given:
        kind = name.rpartition(" x ")[2]
        group = next(group for pattern, group in MESHES if fnmatch(kind, pattern))
        node = hardware.CHIPS[kind.rpartition("-")[0]].chips_per_host if group == "node" else count
        span = math.gcd(count // slices, LARGEST_SPAN) if group == "slice" else node if count % node == 0 else count
        return count // span, span, 1
    shape = [slices if sizes.data is None and slices > 1 else sizes.sizes[0], *sizes.sizes[1:]]
    fixed = math.prod(s for s in shape if s > 0)
    if -1 in shape:
        if count % fixed:
            raise ConfigError(f"mesh {_pretty(shape)}: {fixed} does not divide the {count} devices of {name}; "
                              "change mesh.data, mesh.fsdp or mesh.tensor")
        shape[shape.index(-1)] = count // fixed
    if shape[0] % slices:
        raise ConfigError(f"mesh {_pretty(shape)}: the {slices} slices of {name} do not divide mesh.data {shape[0]}; slices lie along "
                          f"data, whose exchange is the smallest: use a multiple of {slices}")
    if math.prod(shape) > count:
        raise ConfigError(f"mesh {_pretty(shape)} needs {math.prod(shape)} devices and there are {count}; "
                          "set one of mesh.data, mesh.fsdp, mesh.tensor to -1")
    return shape[0], shape[1], shape[2]


def make_mesh(sizes: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Mesh with axes ("data", "fsdp", "tensor") over `devices` (default: all of them), shaped by `mesh_shape`.

    With every size given, one process may leave devices unused; several may not. Slices lie along `data`: the network between
    them then carries nothing but sums over the batch. Auto axis types: the compiler propagates shardings and linen's logical
    constraints apply. Raises `ConfigError` when the sizes do not fit the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(sizes, hardware_name(devices), len(devices), len(_by_slice(devices)))
    needed = math.prod(shape)
    if needed < len(devices) and jax.process_count() > 1:
        raise ConfigError(f"mesh {_pretty(shape)} needs {needed} devices and there are {len(devices)}; with several processes none may "
                          "stay unused: set one of mesh.data, mesh.fsdp, mesh.tensor to -1")
    return jax.sharding.Mesh(arrange(shape, devices[:needed]), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def arrange(shape: tuple[int, int, int], devices: Sequence[Any]) -> np.ndarray:
    """`devices` in the `shape` of the mesh, neighbours in it close in the machine; slices along the first axis.

    Raises `ConfigError` when the slices are of different sizes.
    """
    slices = _by_slice(devices)
    if len({len(group) for group in slices.values()}) > 1:
        sizes = ", ".join(f"slice {index}: {len(group)}" for index, group in sorted(slices.items()))
        raise ConfigError(f"a mesh over slices of different sizes ({sizes}) leaves devices out; use slices of one size")
    inner = (shape[0] // len(slices), *shape[1:])
    try:
        return np.concatenate([mesh_utils.create_device_mesh(inner, slices[index]) for index in sorted(slices)])
    except NotImplementedError:  # no product of the torus's own axes has these sizes: an axis of it must be cut, which costs speed
        return np.concatenate([
            mesh_utils.create_device_mesh(inner, slices[index], allow_split_physical_axes=True) for index in sorted(slices)])


def abstract_mesh(sizes: config.Mesh, accelerator: hardware.Accelerator, slices: int = 1) -> jax.sharding.AbstractMesh:
    """The mesh of `slices` times `accelerator` without any device: enough for `shardings_for` and sizes, not for arrays."""
    name = accelerator.name if slices == 1 else f"{slices} x {accelerator.name}"
    shape = mesh_shape(sizes, name, accelerator.chips * slices, slices)
    return jax.sharding.AbstractMesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _by_slice(devices: Sequence[Any]) -> dict[int, list[Any]]:
    """Devices of each TPU slice; those of other machines are one."""
    groups: dict[int, list[Any]] = {}
    for device in devices:
        index = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        groups.setdefault(index or 0, []).append(device)
    return groups


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


def rows_per_device(rows: int) -> int:
    """Rows of a batch that a device of the current mesh works on, filled up where the devices do not divide them."""
    return -(-rows // row_parts())


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


def row_sharding(rows: int, mesh: jax.sharding.Mesh) -> NamedSharding:
    """How a batch array of so many rows lies: split over ("data", "fsdp"), or whole on every device where they do not divide it."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    return batch_sharding(mesh) if rows % parts == 0 else replicated(mesh)


def global_batch(local: Any, mesh: jax.sharding.Mesh) -> Any:
    """Device arrays of the global batch from this host's slice of it (a tree of NumPy arrays, leading axis = examples).

    Each lies as `row_sharding` says. Every host feeds as many rows, each other ones. With several hosts the order of the rows may
    be another one, the same for all arrays of so many rows: what belongs to one example stays together.
    """
    hosts = jax.process_count()

    def put(array: np.ndarray) -> jax.Array:
        rows = array.shape[0] * hosts
        place = row_sharding(rows, mesh)
        if hosts == 1:
            return jax.device_put(array, place)
        if not place.is_fully_replicated and _hosts_hold_their_own(place, rows, hosts):
            return jax.make_array_from_process_local_data(place, array)
        # Rows go out one or a few to each device, filled up where they do not suffice; then they are collected as they shall lie.
        fill = -array.shape[0] % len(mesh.local_devices)
        spread = NamedSharding(mesh, PartitionSpec(MESH_AXES))
        real = np.arange(array.shape[0] + fill) < array.shape[0]
        padded = np.pad(array, [(0, fill)] + [(0, 0)] * (array.ndim - 1))
        return _collect(rows, place)(*(jax.make_array_from_process_local_data(spread, x) for x in (padded, real)))

    return jax.tree.map(put, local)


def _hosts_hold_their_own(place: NamedSharding, rows: int, hosts: int) -> bool:
    """Whether no two hosts hold the same rows, as they do where `tensor` reaches over hosts."""
    mine = {(index[0].start, index[0].stop) for index in place.addressable_devices_indices_map((rows,)).values()}
    return sum((stop or rows) - (start or 0) for start, stop in mine) * hosts == rows


@functools.cache
def _collect(rows: int, place: NamedSharding) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The real rows of an array that was filled up, laid as `place` says."""
    def collect(padded: jax.Array, real: jax.Array) -> jax.Array:
        return padded if padded.shape[0] == rows else padded[jnp.argsort(~real, stable=True)[:rows]]

    return jax.jit(collect, out_shardings=place)


def bytes_per_device(tree: Any) -> int:
    """What the arrays of `tree` (or `ShapeDtypeStruct`s with shardings) take on one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _pretty(shape: Sequence[int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape))
