"""What kind of device the program being traced is for."""

from __future__ import annotations

import jax


def platform() -> str:
    """"cpu", "gpu" or "tpu": that of the current mesh, which may be one to compile for only, else of the default backend."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = getattr(device, "platform", None) or getattr(device, "device_kind", None) or jax.default_backend()
    name = str(name).lower()
    return "tpu" if name.startswith("tpu") else "cpu" if name.startswith("cpu") else "gpu"


def one_cpu() -> bool:
    """Whether a single CPU device computes everything, so that cutting a batch up moves nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    return platform() == "cpu" and (mesh.empty or mesh.size == 1)
