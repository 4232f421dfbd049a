"""The step of a stage without its arrays: what it takes to compile it, read its memory or export it, on any mesh."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies

from conan_jax import config, sharding
from conan_jax.errors import ConfigError
from conan_jax.stages.base import Stage
from conan_jax.train import optimizer, state
from conan_jax.train.step import make_train_step
from conan_jax.versions import install_command


def topology_devices(name: str) -> list[Any]:
    """The chips of a TPU pod that is not here, to compile for: "v5e:16x16" has 256. They hold no arrays.

    Needs libtpu and asks no TPU: `TPU_SKIP_MDS_QUERY=1` and, beside other programs that hold it, `ALLOW_MULTIPLE_LIBTPU_LOAD=1`
    in the environment keep it from looking for one.

    Raises:
        ConfigError: libtpu is not installed, or knows no such topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(f"compiling for {name} needs libtpu (1.3 GB), which is not installed. It takes an environment of its own: "
                          f"{install_command(extra='preflight', environment='.venv-tpu')}; then use .venv-tpu/bin/conan preflight")
    # A host has several chips unless it is told otherwise, and a topology must be whole hosts.
    one_chip = {"chips_per_host_bounds": [1, 1, 1]} if set(name.rpartition(":")[2].split("x")) == {"1"} else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **one_chip).devices)
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"no TPU topology {name!r} (there are v5e:2x2, v5e:16x16, v5p:4x4x4, v6e:16x16 and others): {error}") from error


def lower_step(
    run: config.Run, stage_config: config.Stage, *, stage: Stage, embedder: Any, batch: Any, num_examples: Mapping[str, int],
    mesh: jax.sharding.Mesh,
) -> jax.stages.Lowered:
    """The update that `train_stage` runs, lowered for the devices of `mesh`; no parameter is ever made.

    The devices may be a compile-only topology (`jax.experimental.topologies`): `.compile()` then answers for chips that
    are not here whether the step compiles and fits, and `.memory_analysis()` what it takes.

    Args:
        batch: `ShapeDtypeStruct`s of the global batch, as `data.shapes.batch_shapes` gives them.
        num_examples: records of each task, which size the carry.
    """
    axes = embedder.axes()
    updates = optimizer.make_optimizer(stage_config.optimizer, stage_config.steps, axes)
    schedule = optimizer.learning_rate_at(stage_config.optimizer, stage_config.steps)
    # Before the mesh is current: what makes arrays would make them on its devices, and a compile-only device holds none.
    abstract = state.abstract_state(embedder, stage, updates, num_examples, mesh)
    with sharding.activate(mesh):
        return make_train_step(stage, updates, schedule, run.seed, abstract).lower(abstract, abstract_batch(batch, mesh))


def abstract_batch(batch: Any, mesh: jax.sharding.Mesh) -> Any:
    """`batch` laid over `mesh` as `sharding.global_batch` lays real arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding.row_sharding(a.shape[0], mesh)), batch)
