"""The layout of every array of a recipe on an accelerator, as text. No devices, no arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from conan_jax import config, sharding
from conan_jax.data.shapes import batch_shapes
from conan_jax.hardware import accelerator
from conan_jax.model import Embedder
from conan_jax.stages import make_stage
from conan_jax.train.abstract import abstract_batch
from conan_jax.train.optimizer import make_optimizer
from conan_jax.train.state import abstract_state


def render(run: config.Run, name: str) -> str:
    """A line an array: name, shape, dtype, spec, bytes a device. The state of the first stage, then each stage's carry and batches.

    Carries are sized for one epoch, steps x batch.
    """
    mesh = sharding.abstract_mesh(run.mesh, accelerator(name))
    lines = [f"{run.name} on {name}: {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}"]
    for number, stage_config in enumerate(run.stages):
        embedder = Embedder(run.model)
        updates = make_optimizer(stage_config.optimizer, stage_config.steps, embedder.axes())
        examples = {task.name: stage_config.steps * task.global_batch_size for task in getattr(stage_config, "tasks", ())}
        state = abstract_state(embedder, make_stage(stage_config, embedder), updates, examples or {"": 0}, mesh)
        if number == 0:
            lines += table("parameters", state.params) + table("optimizer", state.opt_state)
        if state.carry:
            lines += table(f"{stage_config.name}: carry", state.carry)
        for bucket in getattr(stage_config, "buckets", (None,)):
            title = f"{stage_config.name}: batch" + (f" {bucket.query_length}/{bucket.passage_length}" if bucket else "")
            lines += table(title, abstract_batch(batch_shapes(stage_config, bucket), mesh))
    return "\n".join(lines) + "\n"


def table(title: str, tree: Any) -> list[str]:
    return ["", f"{title}, {sharding.bytes_per_device(tree):,} bytes a device", *_lines(tree)]


def _lines(tree: Any) -> Iterator[str]:
    for path, array in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        axes = ["+".join([part] if isinstance(part, str) else part) if part else "-" for part in array.sharding.spec]
        shape = ", ".join(map(str, array.shape))
        yield f"  {name}  [{shape}]  {array.dtype}  ({', '.join(axes)})  {sharding.bytes_per_device(array):,}"
