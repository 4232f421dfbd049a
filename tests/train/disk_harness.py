"""`python -m tests.train.disk_harness FOLDER tmpfs|file-size|again`: saves on a disk that fills up; the last line says in JSON how it went.

tmpfs: FOLDER is on a small file system, which fills up after the save has looked for room. file-size: no file may be longer than a limit.
again: the disk has room again, in a new process, as after a restart.
"""

import contextlib
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import jax  # noqa: E402
import numpy as np  # noqa: E402

from conan_jax.errors import CheckpointError  # noqa: E402
from conan_jax.train import checkpoint, step_folders  # noqa: E402
from conan_jax.train.state import TrainState  # noqa: E402
from tests.train.toy_stage import toy_run  # noqa: E402

RUN = toy_run(8)
WEIGHTS = 2**20  # bytes, of noise, which no compression makes smaller


def make_state(step: int, size: int) -> TrainState:
    noise = np.frombuffer(np.random.default_rng(step).bytes(size), np.uint32)
    count = np.int32(step)
    return jax.device_put(TrainState(step=count, params={"w": noise}, opt_state=(), carry={}, skipped=count, skipped_in_row=count))


def save(folder: Path, step: int, size: int = WEIGHTS) -> str:
    """What the save says, "" when it is done."""
    try:
        with contextlib.closing(checkpoint.Checkpoints(folder, 1, checkpoint.make_metadata(RUN, RUN.stages[0], "aaa"))) as checkpoints:
            checkpoints.save(step, make_state(step, size))
            checkpoints.wait()
    except CheckpointError as error:
        return str(error)
    return ""


def is_whole(folder: Path, step: int) -> bool:
    state = make_state(step, WEIGHTS)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    back = checkpoint.restore_state(folder, step, abstract)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(state)))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def fill(folder: Path, kind: str) -> dict[str, Any]:
    said = {"first": save(folder, 4), "too big": save(folder, 5, size=2**26) if kind == "tmpfs" else None}
    look = step_folders.refuse_full_disk

    def look_then_fill(place: Path, needed: int) -> None:
        look(place, needed)
        if kind == "tmpfs":
            (folder / "filler").write_bytes(b"\0" * (shutil.disk_usage(place).free - WEIGHTS // 2))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (WEIGHTS // 2, -1))

    step_folders.refuse_full_disk = look_then_fill
    said["midway"] = save(folder, 6)
    return said | {"left": names(folder), "latest": checkpoint.latest_step(folder), "step 4 is whole": is_whole(folder, 4)}


def again(folder: Path) -> dict[str, Any]:
    (folder / "filler").unlink(missing_ok=True)
    return {"again": save(folder, 6), "left at the end": names(folder), "step 6 is whole": is_whole(folder, 6)}


if __name__ == "__main__":
    print(json.dumps(again(Path(sys.argv[1])) if sys.argv[2] == "again" else fill(Path(sys.argv[1]), sys.argv[2])))
