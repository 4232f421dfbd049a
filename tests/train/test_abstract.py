"""A step lowered without arrays is the step that trains, on whatever mesh it is asked for."""

import jax
import numpy as np
import pytest

from conan_jax import config, sharding
from conan_jax.errors import ConfigError
from conan_jax.train.abstract import abstract_batch, lower_step, topology_devices
from tests.train.test_step import build
from tests.train.toy_stage import ToyEmbedder, ToyPipeline, ToyStage, toy_run


def shapes_of(batch):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)


@pytest.mark.parametrize(("sizes", "devices"), [((1, 1, 1), 1), ((2, 2, 2), 8)])
def test_it_is_the_step_that_trains(sizes, devices):
    run, batch = toy_run(20), ToyPipeline().batch(0)
    mesh, state, step, *_ = build(ToyStage(), sizes, devices)
    lowered = lower_step(run, run.stages[0], stage=ToyStage(), embedder=ToyEmbedder(), batch=shapes_of(batch),
                         num_examples=ToyPipeline().num_examples, mesh=mesh)
    placed = sharding.global_batch(batch, mesh)
    with sharding.activate(mesh):
        assert lowered.as_text() == step.lower(state, placed).as_text()
        trained, metrics = step(jax.tree.map(lambda a: a.copy(), state), placed)
    compiled_state, compiled_metrics = lowered.compile()(state, placed)
    jax.tree.map(np.testing.assert_array_equal, (compiled_state, compiled_metrics), (trained, metrics))


def test_the_abstract_batch_lies_as_the_real_one():
    mesh = sharding.make_mesh(config.Mesh(2, 2, 2))
    batch = {**ToyPipeline().batch(0), "too few for the devices": np.arange(6, dtype=np.int32)}
    real, abstract = sharding.global_batch(batch, mesh), abstract_batch(shapes_of(batch), mesh)
    for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_a_pod_needs_libtpu(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"v5e:2x2 needs libtpu.*pip install .*\[preflight\]"):
        topology_devices("v5e:2x2")
