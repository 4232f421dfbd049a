"""What a run says of itself before its first step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from conan_jax import config, sharding
from conan_jax.stages.base import Stage
from conan_jax.train import state
from conan_jax.train.state import TrainState


def introduction(
    stage_config: config.Stage, stage: Stage, start: object, abstract: TrainState, axes: Any, mesh: jax.sharding.Mesh,
) -> Iterator[str]:
    """What a person wants to know before the first step, a line each. `axes`: logical axes of the parameters."""
    parameters, body = state.count_parameters(abstract.params, axes)
    undivided = sharding.undivided(axes, abstract.params, mesh)
    sizes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    devices = list(mesh.devices.flat)
    held = {"parameters": abstract.params, "optimizer": abstract.opt_state, "carry": abstract.carry}
    yield f"stage {stage_config.name} ({stage_config.kind}), {stage_config.steps:,} steps"
    facts: dict[str, Any] = {
        "start": start,
        "parameters": f"{parameters:,} ({body:,} outside the embedding table)",
        "mesh": f"{sizes} on {sharding.hardware_name(devices)} ({mesh.devices.size} x {devices[0].device_kind})",
        "memory per device": ", ".join(f"{name} {megabytes(sharding.bytes_per_device(tree))}" for name, tree in held.items()
                                     if jax.tree.leaves(tree)),
        **stage.describe(),
    }
    if undivided:
        facts["replicated on every device"] = ", ".join(undivided)
    for label, value in facts.items():
        yield f"  {label}: {value:,}" if isinstance(value, int) else f"  {label}: {value}"


def megabytes(size: int) -> str:
    """`size` bytes as a person reads them, in units of 2**20."""
    return f"{size / 2**20:,.1f} MiB"
