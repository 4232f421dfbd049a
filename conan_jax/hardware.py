"""What accelerators are: one table of chips, and of the slices and nodes they are rented in. No jax here.

Names are those of the vendors' quotas: a v5e, v6e or GPU name counts chips ("v5e-256"), a v4 or v5p name counts cores, two to a
chip ("v5p-256" is 128 chips). "cpu-8" is eight devices of one host, for tests and rehearsals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from conan_jax.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One jax device, as its vendor states it.

    `peak_flops`: dense bfloat16 FLOP/s. `hbm_bytes`: what a program may take, after what the system keeps. `hbm_bandwidth`,
    `ici_bandwidth` (all links of a chip together, one way) and `dcn_bandwidth` (a chip's share of its host's network): bytes/s.
    `chips_per_host`: what one machine of a larger slice holds. `units_per_chip`: what an accelerator's name counts.
    `gke_label` is the node label of GKE and `machine` the family of its machine types ("ct5lp-hightpu" of ct5lp-hightpu-4t);
    `tpu_vm` is the family of Cloud TPU's accelerator types ("v5litepod" of v5litepod-256) and `runtime` its software version.
    """

    name: str
    device_kinds: tuple[str, ...]
    peak_flops: float
    hbm_bytes: int | None
    hbm_bandwidth: float | None = None
    ici_bandwidth: float | None = None
    ici_axes: int = 1
    dcn_bandwidth: float | None = None
    chips_per_host: int = 4
    units_per_chip: int = 1
    platform: str = "tpu"
    gke_label: str = ""
    machine: str = ""
    tpu_vm: str = ""
    runtime: str = ""


CHIPS = {chip.name: chip for chip in (
    Chip("v4", ("TPU v4",), 275e12, int(31.25 * GIB), 1.2e12, 3e11, 3, 6.25e9, units_per_chip=2,
         gke_label="tpu-v4-podslice", machine="ct4p-hightpu", tpu_vm="v4", runtime="tpu-ubuntu2204-base"),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * GIB), 8.19e11, 2e11, 2, 3.125e9,
         gke_label="tpu-v5-lite-podslice", machine="ct5lp-hightpu", tpu_vm="v5litepod", runtime="v2-alpha-tpuv5-lite"),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, int(95.7 * GIB), 2.765e12, 6e11, 3, 6.25e9, units_per_chip=2,
         gke_label="tpu-v5p-slice", machine="ct5p-hightpu", tpu_vm="v5p", runtime="v2-alpha-tpuv5"),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, int(31.25 * GIB), 1.638e12, 4e11, 2, 1.25e10,
         gke_label="tpu-v6e-slice", machine="ct6e-standard", tpu_vm="v6e", runtime="v2-alpha-tpuv6e"),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, int(79 * GIB), 3.35e12, 4.5e11, 1, 5e10, chips_per_host=8, platform="gpu",
         gke_label="nvidia-h100-80gb", machine="a3-highgpu"),
    Chip("h200", ("NVIDIA H200",), 989e12, int(140 * GIB), 4.8e12, 4.5e11, 1, 5e10, chips_per_host=8, platform="gpu",
         gke_label="nvidia-h200-141gb", machine="a3-ultragpu"),
    Chip("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, int(79 * GIB), 2.0e12, 3.0e11, 1, 2.5e10, chips_per_host=8, platform="gpu",
         gke_label="nvidia-a100-80gb", machine="a2-ultragpu"),
    Chip("a100_40gb", ("NVIDIA A100-SXM4-40GB",), 312e12, int(39 * GIB), 1.555e12, 3.0e11, 1, 1.25e10, chips_per_host=8, platform="gpu",
         gke_label="nvidia-tesla-a100", machine="a2-highgpu"),
    Chip("cpu", ("cpu",), 1e11, None, chips_per_host=2**16, platform="cpu"),
)}

# Slices that can be rented, by chips.
_TORUS_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_TORUS_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16",
             2048: "8x16x16"}
TOPOLOGIES = {"v4": _TORUS_3D, "v5e": _TORUS_2D, "v5p": _TORUS_3D, "v6e": _TORUS_2D}
# Up to a whole machine of eight, a 2D slice is one host; 2x4 is rented as two hosts of four as well.
_SMALL_2D = {1: (1,), 4: (4,), 8: (8, 4)}


@dataclass(frozen=True)
class Accelerator:
    """A slice, a set of GPU nodes, or some CPU devices. `topology` ("16x16") is empty off a TPU.

    `hosts` machines (virtual ones where several share a board), each with `chips_per_host` chips: `hosts * chips_per_host == chips`.
    """

    name: str
    chip: Chip
    chips: int
    topology: str
    chips_per_host: int

    @property
    def hosts(self) -> int:
        """Machines, each of which runs one process."""
        return self.chips // self.chips_per_host

    @property
    def machine_type(self) -> str:
        """Google Cloud's machine type of one host ("ct6e-standard-4t", "a3-highgpu-8g"), empty for CPUs."""
        return f"{self.chip.machine}-{self.chips_per_host}{'t' if self.topology else 'g'}" if self.chip.machine else ""

    @property
    def tpu_vm_type(self) -> str:
        """Cloud TPU's accelerator type ("v5litepod-256", "v5p-256"), empty off a TPU."""
        return f"{self.chip.tpu_vm}-{self.chips * self.chip.units_per_chip}" if self.chip.tpu_vm else ""


def accelerator(name: str, chips_per_host: int | None = None) -> Accelerator:
    """The accelerator of a quota's name ("v5e-256", "h100-8", "cpu-8") or of a topology ("v5e:16x16", "cpu:256").

    `chips_per_host` chooses where there is a choice: 2x4 slices of v5e and v6e are one host of 8 or two of 4, CPU devices are
    spread over any number of processes. Raises `ConfigError` naming those there are.
    """
    kind, _, size = name.replace(":", "-", 1).partition("-")
    chip = CHIPS.get(kind)
    if chip is None:
        raise ConfigError(f"no accelerator {name!r}: the first part must be one of {', '.join(CHIPS)}, as in v5e-256 or v5e:16x16")
    numbers = size.split("x")
    if not all(n.isascii() and n.isdecimal() and int(n) for n in numbers) or (":" not in name and len(numbers) > 1):
        raise ConfigError(f"no accelerator {name!r}: write a number ({kind}-{4 * chip.units_per_chip}) or a topology ({kind}:2x2)")
    units = math.prod(map(int, numbers))
    chips = units if ":" in name else units // chip.units_per_chip
    topology = TOPOLOGIES[kind].get(chips) if chip.platform == "tpu" else ""
    if topology is None or (":" in name and topology and size != topology) or (":" not in name and units % chip.units_per_chip):
        known = ", ".join(f"{kind}-{n * chip.units_per_chip} ({kind}:{shape})" for n, shape in TOPOLOGIES[kind].items())
        raise ConfigError(f"no accelerator {name!r}; there are {known}")
    choices = _host_shapes(chip, chips, topology)
    if not choices:
        raise ConfigError(f"{name}: a node has {chip.chips_per_host} {kind}, so {chips} of them are no whole number of nodes")
    per_host = choices[0] if chips_per_host is None else chips_per_host
    if per_host not in choices:
        raise ConfigError(f"{name} has no hosts of {chips_per_host} chips; a host has {' or '.join(map(str, choices))}")
    return Accelerator(f"{kind}-{chips * chip.units_per_chip}", chip, chips, topology, per_host)


def _host_shapes(chip: Chip, chips: int, topology: str) -> tuple[int, ...]:
    """Chips that a host of this slice may have, the usual one first; empty when no whole number of hosts makes it."""
    if chip.platform == "cpu":
        return tuple(n for n in range(min(chips, chip.chips_per_host), 0, -1) if chips % n == 0)
    if topology.count("x") == 1 and chips in _SMALL_2D:
        return _SMALL_2D[chips]
    per_host = min(chips, chip.chips_per_host)
    return (per_host,) if chips % per_host == 0 else ()


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`, None when it is not in the table."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
