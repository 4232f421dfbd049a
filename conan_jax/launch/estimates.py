"""What can be known of a recipe on some hardware without jax: lower bounds for a check that costs no time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conan_jax import config
from conan_jax.launch.spec import LaunchSpec

STATE_BYTES = 12  # a parameter and its two moments, float32: what a checkpoint holds
STEP_BYTES = 16  # and its gradient
SAVE_BYTES_PER_SECOND = 200e6  # of one host, into network storage: assumed, and low
LARGEST_SPAN = 256  # chips of a slice that parameters are split over
SAVE_SECONDS = 30  # to end the step in hand, agree, and write what is small: assumed


def parameters(model: config.Model) -> int:
    """Parameters of a built-in model: V D + layers (2 D + 2 D H C + 2 D K C + 3 D F + 2 C if qk_norm) + D (METHODS 1.1).

    Biases add (H + 2 K) C and D a layer, an output table of its own V D. A pooling from outside may own more.
    """
    d, c = model.hidden_size, model.head_dim
    attention = 2 * d * c * (model.num_heads + model.num_kv_heads) + (2 * c if model.qk_norm else 0)
    biases = model.attention_bias * c * (model.num_heads + 2 * model.num_kv_heads) + model.attention_output_bias * d
    layer = 2 * d + attention + biases + 3 * d * model.intermediate_size
    tables = 1 if model.tie_word_embeddings else 2
    return tables * model.vocab_size * d + model.num_layers * layer + d


@dataclass(frozen=True)
class MeshSizes:
    """Devices along each axis of the mesh."""

    data: int
    fsdp: int
    tensor: int

    def __str__(self) -> str:
        return f"data={self.data} x fsdp={self.fsdp} x tensor={self.tensor}"


def mesh_sizes(mesh: config.Mesh, spec: LaunchSpec) -> MeshSizes | None:
    """The mesh that `sharding.make_mesh` will make on this hardware, None when it cannot use all devices.

    A recipe that says nothing gets its parameters split over the chips of a slice (256 at most), the GPUs of a node or all CPU devices.
    """
    chips, hardware = spec.chips, spec.hardware
    if not mesh.given:
        node = hardware.chip.chips_per_host
        spans = {"tpu": math.gcd(hardware.chips, LARGEST_SPAN), "gpu": node if chips % node == 0 else chips, "cpu": chips}
        span = spans[hardware.chip.platform]
        return MeshSizes(chips // span, span, 1)
    sizes = [spec.slices if mesh.data is None and spec.slices > 1 else mesh.sizes[0], *mesh.sizes[1:]]
    if -1 in sizes:
        sizes[sizes.index(-1)] = chips // math.prod(size for size in sizes if size > 0)
    return MeshSizes(*sizes) if math.prod(sizes) == chips and sizes[0] % spec.slices == 0 else None


def step_bytes(run: config.Run, mesh: MeshSizes) -> float:
    """Least bytes a device needs: parameters, moments and gradients, without a single activation."""
    return STEP_BYTES * parameters(run.model) / (mesh.fsdp * mesh.tensor)


def save_bytes(run: config.Run, spec: LaunchSpec, mesh: MeshSizes) -> float:
    """Bytes that a host writes for a checkpoint: of several copies one is written, by the hosts that hold it."""
    writers = max(1, spec.hosts // mesh.data)
    return STATE_BYTES * parameters(run.model) / writers


def save_seconds(run: config.Run, spec: LaunchSpec, mesh: MeshSizes) -> float:
    """Seconds between SIGTERM and a saved state, at the assumed speeds."""
    return SAVE_SECONDS + save_bytes(run, spec, mesh) / SAVE_BYTES_PER_SECOND


def batches(stage: config.AnyStage) -> dict[str, int]:
    """Key -> rows of every batch that the devices split."""
    if isinstance(stage, config.SupervisedStage):
        return {f"{stage.name}.tasks.{task.name}.global_batch_size": task.global_batch_size for task in stage.tasks}
    rows = getattr(stage, "global_batch_size", None) or getattr(stage, "options", {}).get("global_batch_size")
    return {f"{stage.name}.global_batch_size": rows} if isinstance(rows, int) else {}
