"""The one step: skipping, compiling once, shardings, and eight devices against one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conan_jax import config, sharding
from conan_jax.train import state as states
from conan_jax.train.optimizer import learning_rate_at, make_optimizer
from conan_jax.train.step import make_train_step
from tests.train.toy_stage import ToyEmbedder, ToyPipeline, ToyStage, toy_run

MESHES = ((1, 8, 1), (2, 2, 2))


def build(stage, mesh_sizes=(1, 1, 1), devices=1, steps=20):
    mesh = sharding.make_mesh(config.Mesh(*mesh_sizes), jax.devices()[:devices])
    embedder, pipeline, optimizer = ToyEmbedder(), ToyPipeline(), toy_run(steps).stages[0].optimizer
    schedule, tx = learning_rate_at(optimizer, steps), make_optimizer(optimizer, steps, embedder.axes())
    abstract = states.abstract_state(embedder, stage, tx, pipeline.num_examples, mesh)
    params = states.scratch_params(embedder, abstract, 0)
    begun = states.begin(params, abstract, lambda p: states.fresh_state(p, stage, tx, pipeline.num_examples))
    return mesh, begun, make_train_step(stage, tx, schedule, 0, abstract), abstract, schedule


def run(stage, steps, **where):
    mesh, state, step, abstract, schedule = build(stage, **where)
    history, states_seen = [], []
    with sharding.activate(mesh):
        for t in range(steps):
            state, metrics = step(state, sharding.global_batch(ToyPipeline().batch(t), mesh))
            history.append(jax.device_get(metrics))
            states_seen.append(jax.device_get(state))
    return history, states_seen, step, state, abstract, schedule


@functools.cache
def clean(mesh_sizes=(1, 1, 1), devices=1):
    """Six good steps; every test that only looks shares them."""
    return run(ToyStage(), 6, mesh_sizes=mesh_sizes, devices=devices)


def equal(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_stage_compiles_once_while_step_and_alpha_move():
    history, _, step, *_ = clean()
    assert len({float(m["alpha"]) for m in history}) == 6
    assert step._cache_size() == 1


def test_a_non_finite_loss_changes_nothing_but_the_counters():
    bad = (3, 4)
    history, seen, _, _, _, schedule = run(ToyStage(lambda step: (step == bad[0]) | (step == bad[1])), 7)
    for name in ("params", "opt_state", "carry"):
        before = getattr(seen[2], name)
        assert equal(getattr(seen[3], name), before) and equal(getattr(seen[4], name), before)
        assert not equal(getattr(seen[5], name), before)
    assert [int(m["skipped"]) for m in history] == [0, 0, 0, 1, 2, 2, 2]
    assert [int(m["skipped_in_row"]) for m in history] == [0, 0, 0, 1, 2, 0, 0]
    assert [int(s.step) for s in seen] == list(range(1, 8))
    np.testing.assert_allclose([m["learning_rate"] for m in history], [float(schedule(c)) for c in (0, 1, 2, 3, 3, 3, 4)], rtol=1e-6)
    assert all(np.isfinite(leaf).all() for s in seen for leaf in jax.tree.leaves(s.params))


class InfiniteGradient(ToyStage):
    """A finite loss, sqrt at zero, whose gradient is not."""

    def loss(self, params, carry, batch, step, rng):
        loss, rest = super().loss(params, carry, batch, step, rng)
        return loss + jnp.sqrt(jnp.abs(params["norm"][0] * 0)), rest


def test_a_non_finite_gradient_under_a_finite_loss_is_skipped():
    history, seen, *_ = run(InfiniteGradient(), 1)
    assert np.isfinite(history[0]["loss"]) and not np.isfinite(history[0]["grad_norm"]) and int(history[0]["skipped"]) == 1
    assert equal(seen[0].params, ToyEmbedder().init(jax.random.key(0)))


class Dice(ToyStage):
    """Shows what its rng rolls."""

    def loss(self, params, carry, batch, step, rng):
        loss, (carry, metrics) = super().loss(params, carry, batch, step, rng)
        return loss, (carry, metrics | {"roll": jax.random.uniform(rng)})


def test_randomness_is_the_seed_folded_with_the_step():
    history, *_ = run(Dice(), 3)
    expected = [jax.random.uniform(jax.random.fold_in(jax.random.key(0), t)) for t in range(3)]
    np.testing.assert_allclose([m["roll"] for m in history], expected, rtol=1e-6)


def test_eight_devices_equal_one():
    one, seen_one, *_ = clean()
    for sizes in MESHES:
        many, seen_many, *_ = clean(sizes, 8)
        for a, b in zip(one, many):
            np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-5)
            np.testing.assert_allclose(a["grad_norm"], b["grad_norm"], rtol=1e-5)
        for a, b in zip(jax.tree.leaves(seen_one[-1].params), jax.tree.leaves(seen_many[-1].params)):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_state_stays_where_it_was_born():
    *_, state, abstract, _ = clean((2, 2, 2), 8)
    assert abstract.params["map"].sharding.spec == jax.sharding.PartitionSpec(("fsdp",), ("tensor",))
    moments = [leaf for leaf in jax.tree.leaves(abstract.opt_state) if leaf.shape == (16, 16)]
    assert len(moments) == 2 and all(leaf.sharding == abstract.params["map"].sharding for leaf in moments)
    for leaf, planned in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(planned.sharding, leaf.ndim)


def test_the_step_donates_its_state():
    mesh, state, step, *_ = build(ToyStage())
    with sharding.activate(mesh):
        step(state, sharding.global_batch(ToyPipeline().batch(0), mesh))
    assert state.params["map"].is_deleted()


def test_metrics_are_float32_scalars():
    history, *_ = clean()
    assert {"loss", "grad_norm", "learning_rate", "skipped", "skipped_in_row", "tokens", "alpha"} <= history[0].keys()
    assert all(value.shape == () and value.dtype == np.float32 for value in history[0].values())


@pytest.mark.parametrize("sizes", MESHES)
def test_scratch_parameters_are_the_same_on_every_mesh(sizes):
    abstract = clean(sizes, 8)[4]
    assert equal(jax.device_get(states.scratch_params(ToyEmbedder(), abstract, 0)), ToyEmbedder().init(jax.random.key(0)))
