"""The shapes of a stage's batches from its configuration alone: no data, no tokenizer.

What is compiled, checked for memory or exported before any data exists must see the very arrays that the pipeline will
make; tests hold these shapes against its batches (docs/ARCHITECTURE.md, "Batches").
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from conan_jax import config
from conan_jax.errors import ConfigError

Shapes = dict[str, Any]


def batch_shapes(stage: config.AnyStage, bucket: config.Bucket | None = None) -> Shapes:
    """The global batch of `stage` as `jax.ShapeDtypeStruct`s without shardings, leading axis = examples.

    Args:
        bucket: which bucket of a `weak` stage; by default the one with most tokens.

    Raises:
        ConfigError: a stage from outside the package whose `options` do not say how large a batch of pairs is.
    """
    match stage:
        case config.LMStage():
            return _packed(stage.global_batch_size, stage.sequence_length)
        case config.WeakStage():
            return _pairs(stage.global_batch_size, bucket or max(stage.buckets, key=lambda b: b.query_length + b.passage_length))
        case config.SupervisedStage():
            return {task.name: _task(task, stage.hard_negatives.pool_size) for task in stage.tasks}
    options = stage.options
    try:
        return _pairs(options["global_batch_size"], config.Bucket(options["query_length"], options["passage_length"]))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"stage {stage.name!r} of kind {stage.kind!r}: its options must hold the numbers global_batch_size, query_length "
                          f"and passage_length to know its batches ({error})") from error


def token_slots(stage: config.AnyStage) -> int:
    """About the tokens that one update of `stage` encodes, padding included; 1 for a stage from outside that does not say it."""
    try:
        shapes = batch_shapes(stage)
    except ConfigError:
        return 1
    if not isinstance(stage, config.SupervisedStage):
        return _slots(shapes)
    negatives = stage.hard_negatives
    tasks = [_slots({key: shape for key, shape in shapes[task.name].items() if key != "pool"})
             + (task.global_batch_size * negatives.num_negatives * task.bucket.passage_length if "pool" in shapes[task.name] else 0)
             for task in stage.tasks]
    return sum(tasks) // (len(tasks) if stage.update == "one_task" else 1)


def _slots(shapes: Shapes) -> int:
    return sum(_slots(shape) if isinstance(shape, dict) else shape.size for key, shape in shapes.items()
               if isinstance(shape, dict) or key == "tokens")


def _array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _packed(rows: int, length: int) -> Shapes:
    whole = {name: _array(np.int32, rows, length) for name in ("tokens", "segment_ids", "positions")}
    return {"ids": _array(np.int32, rows), **whole, "loss_mask": _array(np.float32, rows, length)}


def _texts(rows: int, length: int) -> Shapes:
    return {"tokens": _array(np.int32, rows, length), "lengths": _array(np.int32, rows), "prompt_lengths": _array(np.int32, rows)}


def _groups(rows: int, size: int, length: int) -> Shapes:
    return {"tokens": _array(np.int32, rows, size, length), "lengths": _array(np.int32, rows, size)}


def _pairs(rows: int, bucket: config.Bucket) -> Shapes:
    return {"ids": _array(np.int32, rows), "query": _texts(rows, bucket.query_length), "positive": _texts(rows, bucket.passage_length),
            "query_hash": _array(np.uint32, rows, 2), "positive_hash": _array(np.uint32, rows, 2)}


def _task(task: config.Task, pool: int) -> Shapes:
    rows, bucket = task.global_batch_size, task.bucket
    if task.kind == "sts":
        return {"ids": _array(np.int32, rows), "sentence1": _texts(rows, bucket.query_length),
                "sentence2": _texts(rows, bucket.passage_length), "score": _array(np.float32, rows)}
    if task.kind == "classification":
        return {**_pairs(rows, bucket), "negatives": _groups(rows, task.num_negatives, bucket.passage_length),
                "negative_mask": _array(np.float32, rows, task.num_negatives)}
    return {**_pairs(rows, bucket), "pool": _groups(rows, pool, bucket.passage_length),
            "pool_hash": _array(np.uint32, rows, pool, 2), "pool_size": _array(np.int32, rows)}
