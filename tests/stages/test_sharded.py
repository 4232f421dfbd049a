"""Loss, gradients, metrics and carry of every stage on eight devices are those on one, and a stage compiles once."""

import jax
import numpy as np
import pytest

from conan_jax import config, sharding
from conan_jax.stages import make_stage
from tests.stages import examples


def run(kind, devices, steps, batches):
    """Loss, gradients, metrics of each step and the final carry; also how often the stage was compiled."""
    embedder, params = examples.embedder_and_params()
    stage = make_stage(examples.STAGES[kind], embedder)
    mesh = sharding.make_mesh(config.Mesh(data=2 if devices > 2 else 1), jax.devices()[:devices])
    carry = stage.init_carry(examples.EXAMPLES)
    params = jax.device_put(params, sharding.shardings_for(embedder.axes(), params, mesh))
    carry_places = sharding.shardings_for(stage.carry_axes(carry), carry, mesh)
    carry = jax.device_put(carry, carry_places)
    whole = sharding.replicated(mesh)
    places = ((whole, (carry_places, whole)), jax.tree.map(lambda p: p.sharding, params))
    # Half the time to compile, and the promise is about the program, not about its optimisation.
    grad = jax.jit(jax.value_and_grad(stage.loss, has_aux=True), out_shardings=places, compiler_options={"xla_backend_optimization_level": 0})
    results = []
    with sharding.activate(mesh):
        for step, batch in zip(steps, batches, strict=True):
            (loss, (carry, metrics)), gradients = grad(params, carry, sharding.global_batch(batch, mesh), np.int32(step), jax.random.key(step))
            results.append(jax.device_get((loss, gradients, metrics)))
    return results, jax.device_get(carry), grad._cache_size()


@pytest.mark.parametrize("kind", examples.STAGES)
def test_eight_devices_agree_with_one_and_compile_once(kind):
    steps, batches = (0, 1, 7), [examples.batch_of(kind, seed) for seed in (0, 1, 0)]
    one, one_carry, compiled = run(kind, 1, steps, batches)
    eight, eight_carry, compiled_sharded = run(kind, 8, steps, batches)
    assert compiled == compiled_sharded == 1  # alpha, the task in turn and the hard negatives move; the program does not
    for a, b in zip(one, eight, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)
    for task, state in one_carry.items():
        for name in ("slot", "cursor", "replaced_low", "replaced_drop", "exhausted"):
            np.testing.assert_array_equal(state[name], eight_carry[task][name])
        np.testing.assert_allclose(state["s0"], eight_carry[task]["s0"], atol=1e-5)
    assert all(np.linalg.norm(jax.tree.leaves(g)[0]) > 0 for _, g, _ in one)


def test_the_language_model_loss_has_a_group_for_each_part_of_the_batch():
    assert sharding.batch_parts(16) == 1
    with sharding.activate(sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))):
        assert (sharding.batch_parts(16), sharding.batch_parts(6)) == (4, 1)
