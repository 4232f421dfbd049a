"""Shapes from a configuration alone are those of the arrays that the pipeline makes."""

import dataclasses

import jax
import pytest

from conan_jax import config as c
from conan_jax.data.shapes import batch_shapes
from conan_jax.errors import ConfigError
from tests.data.test_pipeline import CLASSES, GRADED, LM, RETRIEVAL, pipeline, supervised, weak

CUSTOM = c.CustomStage(name="own", kind="some.module:Stage", steps=4, datasets=(c.Mix("pairs"),),
                       options={"global_batch_size": 8, "query_length": 12, "passage_length": 20})


@pytest.mark.parametrize("stage", [LM, weak(c.Mix("pairs")), supervised(RETRIEVAL, CLASSES, GRADED), CUSTOM], ids=lambda s: s.kind)
def test_shapes_are_those_of_the_batches(stage):
    shapes, batch = batch_shapes(stage), pipeline(stage).batch(0)
    assert jax.tree.structure(shapes) == jax.tree.structure(batch)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes) == jax.tree.map(lambda a: (a.shape, a.dtype), batch)


def test_of_several_buckets_the_longest_unless_one_is_named():
    stage = weak(c.Mix("pairs"), buckets=(c.Bucket(7, 16), c.Bucket(16, 48), c.Bucket(60, 2)))
    assert batch_shapes(stage)["positive"]["tokens"].shape == (8, 48)
    assert batch_shapes(stage, stage.buckets[0])["query"]["tokens"].shape == (8, 7)


def test_a_stage_from_outside_without_sizes_is_told_which():
    with pytest.raises(ConfigError, match="own.*query_length"):
        batch_shapes(dataclasses.replace(CUSTOM, options={"global_batch_size": 8}))
