"""The one contract between the trainer and everything it can train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

Params = Any  # nested dict of float32 arrays
Carry = Any  # pytree of arrays: what a stage remembers between steps
Batch = Mapping[str, Any]
Metrics = dict[str, Any]  # flat, float32 scalars


class Stage(Protocol):
    """A training stage. `train.step` knows this and nothing else about losses.

    Constructed by `stages.make_stage(config, embedder)`.
    """

    def loss(self, params: Params, carry: Carry, batch: Batch, step: Any, rng: Any) -> tuple[Any, tuple[Carry, Metrics]]:
        """Scalar float32 loss of the global batch at the traced int32 `step`, the next carry, and metrics.

        Pure. `metrics["tokens"]` is the number of real tokens in the batch. Randomness comes from `rng`
        alone, which already holds `step`.
        """
        ...

    def init_carry(self, num_examples: Mapping[str, int]) -> Carry:
        """The carry before the first step; `num_examples` holds the records of each task. `{}` if nothing is remembered."""
        ...

    def carry_axes(self, carry: Carry) -> Any:
        """Logical axis names for each array of the carry, as a tree of tuples."""
        ...

    def mask(self, step: Any) -> Any:
        """The attention mask object at `step`; evaluation after the stage uses `mask(config.steps)`."""
        ...

    def describe(self) -> dict[str, str | int | float]:
        """What a person wants to know before the first step: global batch, sub-batches, negatives per query."""
        ...
