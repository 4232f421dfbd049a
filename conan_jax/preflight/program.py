"""The step of a stage as a compiled program, and what its compiler says of memory."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies

from conan_jax import config, sharding
from conan_jax.data.shapes import batch_shapes
from conan_jax.errors import ConfigError
from conan_jax.hardware import Accelerator
from conan_jax.model import Embedder
from conan_jax.stages import make_stage
from conan_jax.train import optimizer, state
from conan_jax.train.abstract import abstract_batch, lower_step, topology_devices

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Two ways in which XLA refuses a program that is too large; either number counts arguments and results as well.
_REFUSALS = (re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm"),
             re.compile(r"memory required[^(]*\(([\d.]+)([KMGT]?)\) exceeds"))


@dataclass(frozen=True)
class Compiled:
    """`text` is None when the program was refused, in so many words (`refused`).

    `peak`: bytes that one device holds at most, arguments included; `arguments`: those of them that the step is given, as the
    compiler lays them out.
    """

    text: str | None
    peak: int
    arguments: int | None
    seconds: float
    refused: str | None = None


@dataclass(frozen=True)
class Placed:
    """A stage laid over a mesh, without arrays: `state` and `batch` are `ShapeDtypeStruct`s with shardings."""

    mesh: jax.sharding.Mesh
    state: state.TrainState
    batch: Any
    axes: Any
    embedder: Embedder


def devices_of(accelerator: Accelerator, slices: int) -> list[Any]:
    """The devices to compile for.

    Raises `ConfigError` for a GPU, for several slices of what has none, or when this process has too few CPU devices.
    """
    platform, needed = accelerator.chip.platform, accelerator.chips * slices
    if platform == "tpu":
        if slices == 1:
            return topology_devices(f"{accelerator.chip.name}:{accelerator.topology}")
        topology_devices(f"{accelerator.chip.name}:{accelerator.topology}")  # its errors say what is missing
        name = f"{accelerator.chip.name}:{accelerator.topology}"
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, num_slices=slices).devices)
    if platform == "gpu":
        raise ConfigError(f"{accelerator.name} can be compiled for on itself only; cpu:{accelerator.chips} gives the mesh, the collectives "
                          f"and a bound of the memory (--hbm-gib {(accelerator.chip.hbm_bytes or 0) // 2**30} for its limit)")
    if slices > 1:
        raise ConfigError(f"{accelerator.name} has no slices: only TPUs do")
    found = jax.devices("cpu")
    if len(found) < needed:
        raise ConfigError(f"{accelerator.name} needs {needed} CPU devices and this process has {len(found)}; jax makes them when it "
                          f"starts, with XLA_FLAGS=--xla_force_host_platform_device_count={needed} (`conan preflight` sets that itself)")
    return found[:needed]


def place(run: config.Run, stage_config: config.AnyStage, num_examples: dict[str, int], devices: list[Any]) -> Placed:
    """The stage over the mesh that training would choose. Raises `ConfigError` where the two do not go together."""
    embedder, mesh = Embedder(run.model), sharding.make_mesh(run.mesh, devices)
    if mesh.devices.size != len(devices):
        sizes = ", ".join(f"mesh.{axis}={size}" for axis, size in mesh.shape.items())
        raise ConfigError(f"{sizes} leaves {len(devices) - mesh.devices.size} of {len(devices)} devices idle; set one of mesh.data, "
                          "mesh.fsdp, mesh.tensor to -1")
    updates = optimizer.make_optimizer(stage_config.optimizer, stage_config.steps, embedder.axes())
    abstract = state.abstract_state(embedder, make_stage(stage_config, embedder), updates, num_examples, mesh)
    return Placed(mesh, abstract, abstract_batch(batch_shapes(stage_config), mesh), embedder.axes(), embedder)


def compile_step(
    run: config.Run, stage_config: config.AnyStage, num_examples: dict[str, int], placed: Placed, full_effort: bool = True
) -> Compiled:
    """The update of a stage, compiled for the devices of its mesh.

    Without `full_effort` a TPU's compiler overlaps and unrolls less, which takes it about half of the time and memory: the same
    collectives, a somewhat smaller peak (by 8 % and 23 % where both were tried). On a TPU the peak is the one its compiler plans and
    holds against the memory. A CPU has no such plan: what is given and returned, plus all temporary arrays.
    """
    began = time.perf_counter()
    lowered = lower_step(run, stage_config, stage=make_stage(stage_config, placed.embedder), embedder=placed.embedder,
                         batch=batch_shapes(stage_config), num_examples=num_examples, mesh=placed.mesh)
    # No CPU program made here is ever run: its memory is planned before the machine code, which need not be good.
    options = {"xla_backend_optimization_level": 0} if placed.mesh.devices.flat[0].platform == "cpu" else {}
    options |= {} if full_effort else {"exec_time_optimization_effort": -1.0}
    try:
        compiled = lowered.compile(compiler_options=options or None)
    except jax.errors.JaxRuntimeError as error:
        needed = refused_bytes(str(error))
        if needed is None:
            raise
        return Compiled(None, needed, None, time.perf_counter() - began, str(error).strip().splitlines()[0])
    seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
    peak = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.temp_size_in_bytes
    if placed.mesh.devices.flat[0].platform == "tpu":
        peak = memory.peak_memory_in_bytes
    return Compiled(compiled.as_text(), peak, memory.argument_size_in_bytes, seconds)


def refused_bytes(message: str) -> int | None:
    """What a program that was refused for its size would need, from the compiler's message; None when it is about something else."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in _REFUSALS:
        found = pattern.search(message)
        if found:
            return int(float(found[1]) * _UNITS[found[2]])
    return None


def saved_bytes(tree: Any) -> tuple[int, int]:
    """(bytes of all arrays once, bytes of them that the busiest host writes): each piece is written by the first device that holds it."""
    total, by_host = 0, {}
    for leaf in jax.tree.leaves(tree):
        piece = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        written = set()
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            where = tuple((part.start, part.stop) for part in index)
            if where not in written:
                written.add(where)
                by_host[device.process_index] = by_host.get(device.process_index, 0) + piece
        total += math.prod(leaf.shape) * leaf.dtype.itemsize
    return total, max(by_host.values(), default=0)
