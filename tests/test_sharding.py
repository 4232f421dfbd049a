"""The mesh, the table of rules, and global batches, on eight fake devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from conan_jax import config, sharding
from conan_jax.errors import ConfigError
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


def test_a_batch_that_devices_do_not_divide_is_refused_by_name():
    with pytest.raises(ConfigError, match="query.tokens has 6 rows.*multiple of 8"):
        sharding.global_batch({"query": {"tokens": np.zeros((6, 2))}}, sharding.make_mesh(config.Mesh()))


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
