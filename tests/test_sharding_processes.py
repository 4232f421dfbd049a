"""Global batches of two processes: every row arrives once, beside its own number, wherever the mesh puts it."""

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROGRAM = '''
import os, sys

rank, port = int(sys.argv[1]), sys.argv[2]
os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
import jax
import numpy as np

jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jax.experimental.multihost_utils import process_allgather

from conan_jax import config, sharding

cases = [((1, -1, 1), 3, False), ((1, -1, 1), 4, True), ((2, -1, 1), 1, False), ((1, 2, -1), 3, True), ((1, 1, -1), 2, True)]
for sizes, mine, split in cases:
    mesh = sharding.make_mesh(config.Mesh(*sizes))
    rows = np.arange(4 * mine, dtype=np.int32).reshape(2 * mine, 2) + 7
    own = slice(rank * mine, (rank + 1) * mine)
    batch = sharding.global_batch({"ids": np.arange(2 * mine)[own], "text": {"tokens": rows[own]}}, mesh)
    assert batch["ids"].sharding.is_equivalent_to(sharding.batch_sharding(mesh) if split else sharding.replicated(mesh), 1), sizes
    ids, tokens = process_allgather(batch["ids"], tiled=True), process_allgather(batch["text"]["tokens"], tiled=True)
    assert sorted(ids.tolist()) == list(range(2 * mine)), (sizes, ids)
    assert np.array_equal(tokens, rows[ids]), sizes
jax.distributed.shutdown()
'''


def test_two_processes_feed_batches_that_devices_do_not_divide_and_meshes_whose_tensor_axis_spans_them():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [subprocess.Popen([sys.executable, "-c", PROGRAM, str(rank), port], cwd=ROOT, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
