"""The arithmetic of a step against two other counts of it: XLA's own, and the products in the traced program."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from conan_jax import config
from conan_jax.data.shapes import batch_shapes
from conan_jax.model import Embedder
from conan_jax.preflight import work
from conan_jax.stages import make_stage
from conan_jax.train.metrics import flops_per_token
from conan_jax.train.state import count_parameters

MODEL = config.Model(vocab_size=512, hidden_size=128, intermediate_size=320, num_layers=3, num_heads=4, num_kv_heads=2, max_length=64,
                     compute_dtype="float32", scan_layers=False, remat="none", attention="dense")
MIX = (config.Mix("d"),)
STAGES = {
    "lm": config.LMStage(name="p", kind="pretrain", steps=9, datasets=MIX, global_batch_size=4, sequence_length=64, loss_chunk_size=256),
    "weak": config.WeakStage(name="w", steps=9, datasets=MIX, global_batch_size=8, buckets=(config.Bucket(16, 48),)),
    "supervised": config.SupervisedStage(
        name="s", steps=9, matryoshka=config.Matryoshka((64, 128)), hard_negatives=config.HardNegatives(num_negatives=3, pool_size=4),
        tasks=(config.Task("r", "retrieval", MIX, 4, config.Bucket(16, 32)), config.Task("s", "sts", MIX, 6, config.Bucket(24, 24)),
               config.Task("c", "classification", MIX, 4, config.Bucket(32, 16), in_batch_negatives=False, num_negatives=2))),
}


def body_parameters(model):
    embedder = Embedder(model)
    return count_parameters(jax.eval_shape(embedder.init, jax.random.key(0)), embedder.axes())[1]


def gradient_of(stage_config, model):
    """Loss and gradient of a step on one device, and its abstract arguments."""
    embedder = Embedder(model)
    stage = make_stage(stage_config, embedder)
    carry = jax.eval_shape(lambda: stage.init_carry({task.name: 10 for task in getattr(stage_config, "tasks", ())}))
    params = jax.eval_shape(embedder.init, jax.random.key(0))

    def loss(params, carry, batch):
        return stage.loss(params, carry, batch, np.int32(0), jax.random.key(0))[0]

    return jax.value_and_grad(loss), (params, carry, batch_shapes(stage_config))


def products(jaxpr):
    """FLOPs of every matrix product in a jaxpr, 2 m n k each, as often as the scan around it runs.

    A product with a vector is not one: on a CPU the sums of a norm's gradient take that form (`model/gradients.py`).
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            contracted, batched = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted[0])
            shared = math.prod(eqn.invars[0].aval.shape[axis] for axis in batched[0])
            if min(math.prod(side.aval.shape) for side in eqn.invars) > depth * shared:
                total += 2 * depth * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * products(inner)
    return total


def measured(stage_config, model, devices=1):
    return work.measure(model, stage_config, body_parameters(model), "dense", devices)


@pytest.mark.parametrize("kind", STAGES)
def test_flops_are_those_that_xla_counts(kind):
    """XLA counts elementwise work too: the step of a small model, unrolled and dense, has a little of it."""
    function, arguments = gradient_of(STAGES[kind], MODEL)
    counted = jax.jit(function).lower(*arguments).cost_analysis()["flops"]
    assert 1.0 < counted / measured(STAGES[kind], MODEL).model_flops < 1.03


@pytest.mark.parametrize("kind", STAGES)
def test_flops_are_the_products_of_the_traced_step(kind):
    """To four digits; 6 N counts the scales of the norms as if they were matrices, which is taken off again."""
    done = measured(STAGES[kind], MODEL)
    norms = 6 * (MODEL.num_layers * 2 + 1) * MODEL.hidden_size * done.tokens
    function, arguments = gradient_of(STAGES[kind], MODEL)
    assert products(jax.make_jaxpr(function)(*arguments).jaxpr) == pytest.approx(done.hardware_flops - norms, rel=1e-4)


@pytest.mark.parametrize(("kind", "changed"), [
    ("lm", {}), ("lm", {"gradient_accumulation_steps": 2}), ("weak", {}), ("weak", {"encode_chunk_size": 2}), ("supervised", {})])
def test_recomputation_under_full_remat_and_in_chunks(kind, changed):
    """What is traced is what runs: a loop's products as often as it turns. Scales of norms and the last layer's shortcuts are below 1 %."""
    model, stage_config = dataclasses.replace(MODEL, remat="full", scan_layers=True), dataclasses.replace(STAGES[kind], **changed)
    function, arguments = gradient_of(stage_config, model)
    done = measured(stage_config, model)
    assert done.hardware_flops > 1.2 * done.model_flops
    assert products(jax.make_jaxpr(function)(*arguments).jaxpr) == pytest.approx(done.hardware_flops, rel=0.01)


def test_the_full_model_by_hand():
    """Conan-Embedding-v2 at 16,384 rows of 4096 tokens in 64 micro-batches on 256 devices: one row a device at a time."""
    model = config.Model()
    stage = config.LMStage(name="p", kind="pretrain", steps=1, datasets=MIX, global_batch_size=16_384, gradient_accumulation_steps=64)
    done = work.measure(model, stage, 961_605_120, "pallas_tpu", 256)
    assert done.tokens == 16_384 * 4096
    assert done.model_flops == done.tokens * flops_per_token(model, stage, 961_605_120)
    a_token = 2 * 2 * 961_605_120 - 2 * 8 * 8192 * 3584 + 4 * 961_605_120 + (4 + 4 + 14) * 8 * 32 * 112 * 4096 + 6 * 151_040 * 3584
    assert done.hardware_flops == pytest.approx(done.tokens * a_token, rel=1e-12)
    assert (done.weight_passes, done.token_passes) == (64 * 4, 4 * done.tokens)


def test_chunks_of_texts_of_one_length_together():
    """8 pairs on 2 devices, queries and passages of one length: 8 texts a device in chunks of 3; of two lengths: 4 and 4."""
    weak = dataclasses.replace(STAGES["weak"], encode_chunk_size=3)
    assert work.chunks_of(weak, 2) == {16: 2, 48: 2}
    assert work.chunks_of(dataclasses.replace(weak, buckets=(config.Bucket(32, 32),)), 2) == {32: 3}
    assert work.chunks_of(STAGES["weak"], 2) == {16: 1, 48: 1}


def test_tasks_that_take_turns_are_their_mean():
    together, turns = STAGES["supervised"], dataclasses.replace(STAGES["supervised"], update="one_task")
    assert measured(turns, MODEL).model_flops == pytest.approx(measured(together, MODEL).model_flops / 3)
    assert measured(turns, MODEL).tokens == measured(together, MODEL).tokens / 3


def test_a_stage_from_outside_is_counted_as_pairs():
    outside = config.CustomStage(name="o", kind="a:b", steps=1, datasets=MIX,
                                 options={"global_batch_size": 8, "query_length": 16, "passage_length": 48})
    assert measured(outside, MODEL) == measured(STAGES["weak"], MODEL)
