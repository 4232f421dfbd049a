"""The kernels really compile for TPUs, alone and over a mesh, and so does a stage's step; no TPU is needed."""

import importlib.util
import os
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from conan_jax import config, sharding
from conan_jax.data.shapes import batch_shapes
from conan_jax.errors import ConfigError
from conan_jax.model import Embedder, SoftMask
from conan_jax.stages import make_stage
from conan_jax.train.abstract import lower_step, topology_devices

os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # libtpu is not to look for a TPU
pytestmark = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                reason="nothing compiles for a TPU without libtpu; `make test-tpu` installs it and runs this")
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from tpu_compile import CHIPS, compile_attention, one_chip  # what is lowered for its peak there is the same


def kernels_in(text):
    return text.count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize("length", [512, 4096, 32_768])
@pytest.mark.parametrize("chip", CHIPS)
def test_forward_and_backward_kernels_compile(chip, length):
    assert kernels_in(compile_attention(one_chip(chip), length).as_text()) == 3


@pytest.mark.parametrize(("mask", "heads", "head_dim", "dtype"), [
    (lambda alpha: SoftMask(alpha, "multiply"), (4, 1), 64, jnp.float32),
    (lambda alpha: SoftMask(alpha, "log", "query"), (2, 2), 128, jnp.bfloat16),
], ids=["multiply, heads of 64, float32", "query index, heads of 128, bfloat16"])
def test_other_masks_sizes_and_types_compile(mask, heads, head_dim, dtype):
    compiled = compile_attention(one_chip("v5e"), 700, mask=mask, heads=heads, head_dim=head_dim, dtype=dtype)
    assert kernels_in(compiled.as_text()) == 3


def test_over_a_mesh_every_device_runs_the_kernels_on_its_own_part():
    text = compile_attention(sharding.make_mesh(config.Mesh(1, 2, 2), topology_devices("v5e:2x2")), 512).as_text()
    assert kernels_in(text) == 3
    assert "all-gather" not in text and "all-to-all" not in text


@pytest.mark.parametrize("kind", ["pretrain", "weak"])
def test_a_step_compiles_for_a_pod_with_the_kernels_in_it(kind):
    model = config.Model(vocab_size=1024, hidden_size=256, intermediate_size=512, num_layers=2, num_heads=4, num_kv_heads=2, max_length=512)
    mix = (config.Mix("d"),)
    stages = {"pretrain": config.LMStage(name="pretrain", kind="pretrain", steps=10, datasets=mix, global_batch_size=8,
                                          sequence_length=512),
              "weak": config.WeakStage(name="weak", steps=10, datasets=mix, global_batch_size=8, buckets=(config.Bucket(128, 256),))}
    run = config.Run(name="r", stages=(stages[kind],), datasets=(config.Dataset("d", "pair", "unused"),), model=model,
                     tokenizer=config.Tokenizer(vocab_size=1000))
    stage, embedder = stages[kind], Embedder(model)
    lowered = lower_step(run, stage, stage=make_stage(stage, embedder), embedder=embedder, batch=batch_shapes(stage),
                         num_examples={"": 100}, mesh=sharding.make_mesh(config.Mesh(2, 2, 2), topology_devices("v6e:2x4")))
    assert kernels_in(lowered.compile().as_text()) >= 3


def test_an_unknown_topology_is_refused_by_name():
    with pytest.raises(ConfigError, match="v9:2x2"):
        topology_devices("v9:2x2")


def test_a_single_chip_is_a_topology_too():
    assert len(topology_devices("v5e:1x1")) == len(topology_devices("v6e:1x1")) == 1
