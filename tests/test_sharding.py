"""The mesh, the table of rules, and global batches, on eight fake devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from conan_jax import config, sharding
from conan_jax.errors import ConfigError
from conan_jax.hardware import accelerator
from conan_jax.model import Embedder


@pytest.mark.parametrize("sizes, shape", [
    ((1, -1, 1), (1, 8, 1)), ((2, -1, 2), (2, 2, 2)), ((-1, 4, 1), (2, 4, 1)), ((1, 2, 1), (1, 2, 1)),
])
def test_mesh_takes_what_remains(sizes, shape):
    mesh = sharding.make_mesh(config.Mesh(*sizes))
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("sizes", [(3, -1, 1), (4, 4, 1), (16, 1, -1)])
def test_a_mesh_that_does_not_fit_is_refused(sizes):
    with pytest.raises(ConfigError, match="mesh.*8 devices|8.*mesh|there are 8"):
        sharding.make_mesh(config.Mesh(*sizes))


class Chip:
    """What the mesh asks of a device."""

    def __init__(self, number, kind, platform="gpu", **where):
        self.id, self.device_kind, self.platform, self.process_index = number, kind, platform, number // 8
        self.__dict__ |= where

    def __repr__(self):
        return f"{self.device_kind} {self.id}"


def pod(slices, chips, kind="TPU v5 lite", side=4):
    """`slices` TPU slices of `chips` chips, a torus of `side` columns each, handed over backwards."""
    found = [Chip(s * chips + i, kind, "tpu", slice_index=s, coords=(i % side, i // side, 0), core_on_chip=0)
             for s in range(slices) for i in range(chips)]
    return found[::-1]


@pytest.mark.parametrize(("devices", "name", "shape"), [
    (pod(1, 16), "v5e-16", (1, 16, 1)),
    (pod(2, 16), "2 x v5e-16", (2, 16, 1)),
    (pod(1, 512, "TPU v5p"), "v5p-1024", (2, 256, 1)),
    (pod(2, 8, "TPU v5p", 2), "2 x v5p-16", (2, 8, 1)),
    ([Chip(i, "NVIDIA H100 80GB HBM3") for i in range(64)], "h100-64", (8, 8, 1)),
    ([Chip(i, "NVIDIA H100 80GB HBM3") for i in range(4)], "h100-4", (1, 4, 1)),
    ([Chip(i, "NVIDIA A100-SXM4-80GB") for i in range(12)], "a100-12", (1, 12, 1)),
    ([Chip(i, "NVIDIA L4") for i in range(6)], "NVIDIA L4-6", (1, 6, 1)),
    ([Chip(i, "cpu", "cpu") for i in range(6)], "cpu-6", (1, 6, 1)),
])
def test_the_name_of_the_hardware_chooses_the_mesh(devices, name, shape):
    assert sharding.hardware_name(devices) == name
    slices = int(name[0]) if " x " in name else 1
    assert sharding.mesh_shape(config.Mesh(), name, len(devices), slices) == shape
    assert sharding.mesh_shape(config.Mesh(data=-1, fsdp=2), name, len(devices), slices) == (len(devices) // 2, 2, 1)  # the recipe's word


def test_slices_lie_along_data_each_on_its_own_torus():
    laid = sharding.arrange((4, 4, 2), pod(2, 16))
    assert laid.shape == (4, 4, 2) and len({d.id for d in laid.flat}) == 32
    np.testing.assert_array_equal(np.vectorize(lambda d: d.slice_index)(laid), np.repeat([0, 0, 1, 1], 8).reshape(4, 4, 2))
    split = sharding.arrange((1, 8, 2), pod(1, 16))  # 8 is no product of the sides of 4 x 4
    assert len({d.id for d in split.flat}) == 16
    with pytest.raises(ConfigError, match="slice 0: 16, slice 1: 3"):
        sharding.arrange((1, 19, 1), [d for d in pod(2, 16) if d.id < 19])


def test_slices_must_divide_data():
    with pytest.raises(ConfigError, match="data=3.*2 slices of 2 x v5e-24.*mesh.data 3"):
        sharding.make_mesh(config.Mesh(3, -1, 1), pod(2, 24))
    assert sharding.mesh_shape(config.Mesh(tensor=4), "2 x v5e-16", 32, 2) == (2, 4, 4)


@pytest.mark.parametrize(("name", "slices"), [
    ("cpu-1", 1), ("cpu-8", 1), ("cpu-256", 1), ("v4-256", 1), ("v5e-4", 1), ("v5e-256", 1), ("v5e-256", 4), ("v5p-256", 1),
    ("v5p-2048", 2), ("v6e-16", 1), ("v6e-256", 2), ("h100-8", 1), ("h100-64", 1), ("h200-256", 1), ("a100-16", 1)])
def test_no_array_of_the_full_recipe_collides_on_any_mesh_of_the_table(name, slices):
    """Parameters and batches, split as far as the table's mesh can; a collision raises."""
    embedder, mesh = Embedder(config.Model()), sharding.abstract_mesh(config.Mesh(), accelerator(name), slices)
    shapes = jax.eval_shape(embedder.init, jax.random.key(0))
    placed = jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), shapes,
                          sharding.shardings_for(embedder.axes(), shapes, mesh))
    assert sharding.undivided(embedder.axes(), shapes, mesh) == []
    norms = (2 * 8 + 1) * 3584  # whole everywhere
    assert sharding.bytes_per_device(placed) == 4 * ((1_502_932_480 - norms) // mesh.shape["fsdp"] + norms)
    for logical in sharding.RULES:
        sharding.partition_spec((logical,), (2**20,), mesh)


def test_rules_name_only_mesh_axes():
    assert {axis for axes in sharding.RULES.values() for axis in axes} <= set(sharding.MESH_AXES)


def test_two_axes_on_one_mesh_axis_collide():
    mesh = sharding.make_mesh(config.Mesh(2, 2, 2))
    with pytest.raises(ConfigError, match="'heads' and 'mlp' both want the mesh axis 'tensor'"):
        sharding.shardings_for({"w": ("heads", "mlp")}, {"w": jnp.zeros((4, 4))}, mesh)
    with pytest.raises(ConfigError, match="w has the logical axis 'widht'"):
        sharding.shardings_for({"w": ("widht",)}, {"w": jnp.zeros((4,))}, mesh)
    with pytest.raises(ConfigError, match="one name"):
        sharding.shardings_for({"w": ("embed",)}, {"w": jnp.zeros((4, 4))}, mesh)


def test_a_dimension_that_does_not_divide_stays_whole_and_is_named():
    mesh = sharding.make_mesh(config.Mesh(1, 4, 2))
    axes, shapes = {"a": {"w": ("embed", "mlp")}, "b": ("embed",)}, {"a": {"w": jnp.zeros((6, 4))}, "b": jnp.zeros((8,))}
    placed = sharding.shardings_for(axes, shapes, mesh)
    assert placed["a"]["w"].spec == PartitionSpec(None, ("tensor",)) and placed["b"].spec == PartitionSpec(("fsdp",))
    assert sharding.undivided(axes, shapes, mesh) == ["a.w (embed 6 over 4)"]


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_the_full_model_is_split_everywhere(sizes):
    """Every matrix of the 1.5B model lies split over all the devices that its axes can use, none whole on each."""
    embedder, mesh = Embedder(config.Model()), sharding.make_mesh(config.Mesh(*sizes))
    shapes = jax.eval_shape(embedder.init, jax.random.key(0))
    placed = sharding.shardings_for(embedder.axes(), shapes, mesh)
    assert sharding.undivided(embedder.axes(), shapes, mesh) == []
    for shape, place in zip(jax.tree.leaves(shapes), jax.tree.leaves(placed)):
        if shape.size > 1e6:
            shard = np.prod(place.shard_shape(shape.shape))
            assert shard == shape.size // (sizes[1] * sizes[2])


def test_global_batch_puts_consecutive_rows_on_consecutive_devices():
    mesh = sharding.make_mesh(config.Mesh(2, 2, 2))
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    batch = sharding.global_batch({"tokens": rows, "deep": {"ids": rows[:, 0]}}, mesh)
    np.testing.assert_array_equal(batch["tokens"], rows)
    assert batch["tokens"].sharding.is_equivalent_to(sharding.batch_sharding(mesh), 2)
    for shard in batch["deep"]["ids"].addressable_shards:
        data, fsdp, _ = np.argwhere(mesh.devices == shard.device)[0]
        np.testing.assert_array_equal(shard.data, rows[2 * (2 * data + fsdp):][:2, 0])


def test_rows_that_devices_do_not_divide_are_whole_on_each():
    mesh = sharding.make_mesh(config.Mesh())
    batch = sharding.global_batch({"few": np.arange(12).reshape(6, 2), "many": np.arange(16)}, mesh)
    assert batch["few"].sharding.is_fully_replicated and not batch["many"].sharding.is_fully_replicated
    np.testing.assert_array_equal(batch["few"], np.arange(12).reshape(6, 2))


def test_logical_constraints_mean_the_table_when_active():
    mesh = sharding.make_mesh(config.Mesh(2, 2, 2))
    seen = []

    @jax.jit
    def f(x):
        y = nn.with_logical_constraint(x * 2, ("tokens", "mlp"))
        jax.debug.inspect_array_sharding(y, callback=seen.append)
        return y

    with sharding.activate(mesh):
        f(jnp.zeros((8, 4))).block_until_ready()
    assert seen and seen[0].is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "tensor")), 2)
