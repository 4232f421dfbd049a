"""What a preflight says of one stage on one accelerator. No jax here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Traffic:
    """The collectives of one kind over the same mesh axes, in one step.

    `bytes_per_device` is what one device sends when they run as rings of `members`. `link`: "ici" inside a slice, "dcn" between slices.
    """

    kind: str
    axes: str
    link: str
    members: int
    count: int
    bytes_per_device: int


@dataclass(frozen=True)
class Fix:
    """Overrides, as `--set` takes them. `peak_bytes_per_device` is None until a compilation has proved them."""

    settings: tuple[str, ...]
    why: str
    peak_bytes_per_device: int | None = None


@dataclass(frozen=True)
class Report:
    """All figures are of one step unless they say otherwise; sizes are bytes, times seconds.

    `fits` is None where no limit is known (a CPU without `hbm_bytes`). What needs the compiled program (`collectives`,
    `seconds` and all that follows from it) is None when the compiler refused it; `peak_bytes_per_device` is then what it
    said it would need. `thorough`: compiled with all the effort that training will take.
    """

    stage: str
    kind: str
    accelerator: str
    slices: int
    devices: int
    hosts: int
    mesh: dict[str, int]
    batch: str
    fits: bool | None
    peak_bytes_per_device: int
    hbm_bytes_per_device: int | None
    memory: dict[str, int]
    tokens_per_step: int
    flops_per_step: float
    hardware_flops_per_step: float
    steps: int
    checkpoint_bytes: int
    checkpoint_bytes_per_host: int
    num_examples: dict[str, int]
    compile_seconds: float
    thorough: bool
    collectives: tuple[Traffic, ...] | None = None
    roofline: dict[str, float] | None = None
    seconds: float | None = None
    seconds_range: tuple[float, float] | None = None
    mfu: float | None = None
    mfu_range: tuple[float, float] | None = None
    tokens_per_second: float | None = None
    days: float | None = None
    days_range: tuple[float, float] | None = None
    chip_hours: float | None = None
    notes: tuple[str, ...] = ()
    refused: str | None = None
    helps: tuple[str, ...] = ()
    fix: Fix | None = None
    larger_accelerator: str | None = None
    tried: tuple[Fix, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, ready for JSON."""
        return dataclasses.asdict(self)
