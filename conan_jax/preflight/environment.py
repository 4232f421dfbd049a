"""What must stand in the environment before jax starts, so that it compiles for an accelerator that is not here."""

from __future__ import annotations

import os
import re

from conan_jax.hardware import Accelerator

_COUNT = re.compile(r"--xla_force_host_platform_device_count=\S*")


def prepare(accelerator: Accelerator) -> None:
    """Set this process up to compile for `accelerator`. To be called before the first import of jax.

    Arrays stay on the CPU. For a TPU, libtpu is told not to ask the network which TPU this machine is, and to share itself with
    other programs that hold it; for "cpu-256", jax is told to make 256 devices of this one.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if accelerator.chip.platform == "tpu":
        os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        for name, value in {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}.items():
            os.environ.setdefault(name, value)  # silences a complaint that neither is known
    if accelerator.chip.platform == "cpu":
        flags = _COUNT.sub("", os.environ.get("XLA_FLAGS", ""))
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={accelerator.chips}".strip()
