"""The mesh and the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from conan_jax.config.checks import LARGEST_COUNT, check, check_values, one_of, positive, read_under


@dataclass(frozen=True)
class Mesh:
    """Devices along each mesh axis; -1 takes all that remain (at most one axis may).

    Nothing given: `sharding.MESHES` says what the hardware's name gets. Something given: `data` and `tensor` are 1 where they
    are absent (`data` the number of TPU slices), and `fsdp` takes what remains (1 where another axis is -1).
    """

    data: int | None = None
    fsdp: int | None = None
    tensor: int | None = None

    def __post_init__(self) -> None:
        check_values(self)
        given = [size for size in (self.data, self.fsdp, self.tensor) if size is not None]
        check(all(0 < s <= LARGEST_COUNT or s == -1 for s in given), f"mesh sizes must be positive or -1, got {given}")
        check(given.count(-1) <= 1, f"only one mesh axis may be -1, got data={self.data}, fsdp={self.fsdp}, tensor={self.tensor}")

    @property
    def given(self) -> bool:
        """True when the recipe says something about the mesh."""
        return (self.data, self.fsdp, self.tensor) != (None, None, None)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(data, fsdp, tensor), one of them possibly -1."""
        data, tensor = (1 if size is None else size for size in (self.data, self.tensor))
        rest = 1 if -1 in (data, tensor) else -1
        return data, rest if self.fsdp is None else self.fsdp, tensor


@dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warmup and a decay to `final_fraction` of the peak (METHODS 1.2)."""

    learning_rate: float = 1e-4
    warmup_fraction: float = 0.05
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_fraction: float | None = None  # cosine and linear; 0.1 by default
    weight_decay: float = 1e-3
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        check_values(self)
        positive(self, "learning_rate", "eps", "max_grad_norm")
        one_of("schedule", self.schedule, ("cosine", "linear", "constant"))
        read_under(self, "schedule", self.schedule, {"final_fraction": (("cosine", "linear"), 0.1)})
        for name in ("warmup_fraction", "final_fraction"):
            value = getattr(self, name)
            check(value is None or 0 <= value <= 1, f"optimizer.{name} must lie in [0, 1], got {value}")
        for name in ("b1", "b2"):
            check(0 <= getattr(self, name) < 1, f"optimizer.{name} must lie in [0, 1), got {getattr(self, name)}")
        check(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, got {self.weight_decay}")
