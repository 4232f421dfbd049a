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
    units_per_chip: int = 1  # what an accelerator's name counts
    platform: str = "tpu"


CHIPS = {chip.name: chip for chip in (
    Chip("v4", ("TPU v4",), 275e12, int(31.25 * GIB), 1.23e12, 2.7e11, 3, 6.25e9, units_per_chip=2),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * GIB), 8.2e11, 1.8e11, 2, 3.1e9),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, int(95.7 * GIB), 2.77e12, 5.4e11, 3, 6.25e9, units_per_chip=2),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, int(31.25 * GIB), 1.64e12, 3.6e11, 2, 6.25e9),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, int(79 * GIB), 3.35e12, 4.5e11, 1, 5e10, chips_per_host=8, platform="gpu"),
    Chip("h200", ("NVIDIA H200",), 989e12, int(140 * GIB), 4.8e12, 4.5e11, 1, 5e10, chips_per_host=8, platform="gpu"),
    Chip("a100", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"), 312e12, int(79 * GIB), 2.0e12, 3.0e11, 1, 2.5e10,
         chips_per_host=8, platform="gpu"),
    Chip("cpu", ("cpu",), 1e11, None, chips_per_host=2**16, platform="cpu"),
)}

# Slices that can be rented, by chips.
_TORUS_2D = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_TORUS_3D = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8", 1024: "8x8x16",
             2048: "8x16x16"}
TOPOLOGIES = {"v4": _TORUS_3D, "v5e": _TORUS_2D, "v5p": _TORUS_3D, "v6e": _TORUS_2D}


@dataclass(frozen=True)
class Accelerator:
    """A slice, a set of GPU nodes, or some CPU devices. `topology` ("16x16") is empty off a TPU."""

    name: str
    chip: Chip
    chips: int
    topology: str

    @property
    def hosts(self) -> int:
        """Machines, each of which runs one process."""
        return max(1, self.chips // self.chip.chips_per_host)

    @property
    def chips_per_host(self) -> int:
        """Devices that one process drives."""
        return self.chips // self.hosts


def accelerator(name: str) -> Accelerator:
    """The accelerator of a quota's name ("v5e-256", "h100-8", "cpu-8") or of a topology ("v5e:16x16", "cpu:256").

    Raises `ConfigError` naming those there are.
    """
    kind, _, size = name.replace(":", "-", 1).partition("-")
    chip = CHIPS.get(kind)
    if chip is None:
        raise ConfigError(f"no accelerator {name!r}: the first part must be one of {', '.join(CHIPS)}, as in v5e-256 or v5e:16x16")
    numbers = size.split("x")
    if not all(n.isdecimal() and int(n) for n in numbers) or (":" not in name and len(numbers) > 1):
        raise ConfigError(f"no accelerator {name!r}: write a number ({kind}-{4 * chip.units_per_chip}) or a topology ({kind}:2x2)")
    chips = math.prod(map(int, numbers))
    chips = chips // chip.units_per_chip if ":" not in name else chips
    if chip.platform != "tpu":
        if chips > chip.chips_per_host and chips % chip.chips_per_host:
            raise ConfigError(f"{name}: a node has {chip.chips_per_host} {kind}, so {chips} of them are no whole number of nodes")
        return Accelerator(f"{kind}-{chips}", chip, chips, "")
    topology = TOPOLOGIES[kind].get(chips)
    if topology is None or (":" in name and size != topology):
        known = ", ".join(f"{kind}-{n * chip.units_per_chip} ({kind}:{shape})" for n, shape in TOPOLOGIES[kind].items())
        raise ConfigError(f"no accelerator {name!r}; there are {known}")
    return Accelerator(f"{kind}-{chips * chip.units_per_chip}", chip, chips, topology)


def chip_of(device_kind: str) -> Chip | None:
    """The chip that jax calls `device_kind`, None when it is not in the table."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)
