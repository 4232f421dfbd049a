"""`python -m tests.train.checkpoint_processes RANK FOLDER PORT`: one of two processes that save, damage, fall back and fail together.

What it finds goes to FOLDER/RANK.json.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from conan_jax import config, sharding  # noqa: E402
from conan_jax.errors import CheckpointError  # noqa: E402
from conan_jax.train import checkpoint, manifest, start_rule, together  # noqa: E402
from conan_jax.train.state import TrainState  # noqa: E402
from tests.train.toy_stage import toy_run  # noqa: E402

RUN = toy_run(8)
WEIGHTS = {"w": ("embed", "mlp")}
AXES = TrainState(step=(), params=WEIGHTS, opt_state=(WEIGHTS, ()), carry={"s0": ("examples",)}, skipped=(), skipped_in_row=())


def values(step: int) -> TrainState:
    weights, moment = np.random.default_rng(step).normal(size=(2, 64, 8)).astype(np.float32)
    return TrainState(step=np.int32(step), params={"w": weights}, opt_state=({"w": moment}, np.int32(step)),
                      carry={"s0": np.arange(16, dtype=np.float32)}, skipped=np.int32(0), skipped_in_row=np.int32(0))


def make_state(step: int) -> TrainState:
    whole, mesh = values(step), sharding.make_mesh(config.Mesh(1, 4, 1))
    return jax.tree.map(lambda a, place: jax.make_array_from_callback(np.shape(a), place, lambda index: np.asarray(a)[index]),
                        whole, sharding.shardings_for(AXES, whole, mesh))


def resumed(folder: Path, step: int, **options: bool) -> str:
    """What the start says, after this process's part of every array was found to be that of `step`."""
    try:
        start = start_rule.find_start(folder, None, RUN.model, "aaa", **options)
    except CheckpointError as error:
        return str(error)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), make_state(0))
    state = start_rule.load_start(start, abstract, None, None)
    for ours, whole in zip(jax.tree.leaves(state), jax.tree.leaves(values(step))):
        for shard in ours.addressable_shards:
            assert np.asarray(shard.data).tobytes() == np.asarray(whole)[shard.index].tobytes()
    return str(start)


def main(rank: int, folder: Path, port: str) -> None:
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_check_proxy_envs", False)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    stage, found = folder / "toy", {}
    metadata = checkpoint.make_metadata(RUN, RUN.stages[0], "aaa")

    checkpoints = checkpoint.Checkpoints(stage, 2, metadata)
    for step in (2, 4, 6):
        checkpoints.save(step, make_state(step))
    checkpoints.wait()
    found["after wait"] = checkpoint.latest_step(stage)
    checkpoints.close()
    found["all is well"] = resumed(stage, 6)
    if rank == 1:  # as an evaluation by one process does
        found["alone"] = np.asarray(checkpoint.restore_params(stage)["w"]).tobytes() == values(6).params["w"].tobytes()
    together.from_process_0(0)
    if rank == 0:
        file = max((stage / "checkpoints" / "6").rglob("d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    together.from_process_0(0)
    found["damaged"] = resumed(stage, 6)
    found["fallback"] = resumed(stage, 4, fallback=True)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    checkpoints = checkpoint.Checkpoints(stage, 2, metadata)
    written, manifest.write = manifest.write, full
    checkpoints.save(6, make_state(6))
    try:
        checkpoints.wait()
    except CheckpointError as error:
        found["failed"] = str(error)
    checkpoints.close()
    manifest.write = written
    found["left"] = resumed(stage, 4)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
