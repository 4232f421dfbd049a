"""A model with an output table of its own: its loss, its gradients, its place on many devices, what does not decay."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from conan_jax import config, sharding
from conan_jax.config import LMStage, Mix
from conan_jax.model import Causal, Layout, num_params
from conan_jax.stages import make_stage
from conan_jax.train.optimizer import decay_mask
from tests.model.models import TINY, hidden_of, params_of, variant

SETTINGS = {"tie_word_embeddings": False, "attention_bias": True, "attention_output_bias": True, "attention_head_dim": 12}
EMBEDDER = variant(**SETTINGS)
STAGE = LMStage(name="pretrain", kind="pretrain", steps=1, datasets=(Mix("d"),), global_batch_size=8, sequence_length=9, loss_chunk_size=5)
TOKENS = jnp.asarray(np.random.default_rng(5).integers(4, 48, (8, 9)))
BATCH = {"tokens": TOKENS, "segment_ids": jnp.ones_like(TOKENS), "positions": jnp.broadcast_to(jnp.arange(9), (8, 9)),
         "loss_mask": jnp.ones((8, 9), jnp.float32), "ids": jnp.arange(8)}


def stage_loss(params):
    return make_stage(STAGE, EMBEDDER).loss(params, {}, BATCH, 0, jax.random.key(0))[0]


def test_the_loss_is_that_of_the_output_table():
    params = params_of(EMBEDDER)
    hidden = hidden_of(EMBEDDER, params, TOKENS, Layout.from_lengths(jnp.full(8, 9), 9), Causal())
    scores = np.asarray(hidden, np.float64) @ np.float64(params["output_embedding"]).T
    scores = scores[:, :-1] - scores[:, :-1].max(-1, keepdims=True)
    chosen = np.take_along_axis(scores, np.asarray(TOKENS)[:, 1:, None], -1)[..., 0]
    expected = np.mean(np.log(np.exp(scores).sum(-1)) - chosen)
    value, gradient = jax.jit(jax.value_and_grad(stage_loss))(params)
    assert float(value) == pytest.approx(expected, rel=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))  # every parameter is used, biases and both tables
    unused = sorted(set(range(48)) - set(np.asarray(TOKENS).ravel().tolist()))
    assert (np.asarray(gradient["embedding"])[unused] == 0).all() and (np.asarray(gradient["output_embedding"])[unused] != 0).any()


@pytest.mark.parametrize("sizes", [config.Mesh(data=2, fsdp=4, tensor=1), config.Mesh(data=1, fsdp=2, tensor=4)], ids=["fsdp", "tensor"])
def test_eight_devices_equal_one(sizes):
    params = params_of(EMBEDDER)
    single = jax.jit(jax.value_and_grad(stage_loss))(params)
    mesh = sharding.make_mesh(sizes)
    split = jax.device_put(params, sharding.shardings_for(EMBEDDER.axes(), params, mesh))
    with sharding.activate(mesh):
        many = jax.jit(jax.value_and_grad(stage_loss))(split)
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(many)):
        np.testing.assert_allclose(b, a, atol=1e-5 * float(jnp.abs(a).max()) + 1e-6)


def test_neither_biases_nor_the_output_table_decay():
    decays = decay_mask(EMBEDDER.axes())
    attention = decays["layers"]["attention"]
    assert not decays["output_embedding"] and not attention["q_proj"]["bias"] and not attention["o_proj"]["bias"]
    assert attention["q_proj"]["kernel"]


def test_defaults_make_the_tree_they_made_before():
    params = params_of(variant())
    assert set(params) == {"embedding", "final_norm", "layers"} and set(params["layers"]["attention"]["q_proj"]) == {"kernel"}
    more = num_params(EMBEDDER.config) - num_params(dataclasses.replace(TINY, attention_head_dim=12))
    assert more == 48 * 32 + 2 * (12 * (4 + 2 * 2) + 32)
