"""What stands for training that happened elsewhere: the stage of a run that `conan import` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from conan_jax.config import CustomStage
from conan_jax.errors import ConfigError
from conan_jax.model import Bidirectional, Causal, Embedder
from conan_jax.stages.base import Batch, Carry, Params

KIND = f"{__name__}:Imported"
MASKS = {"causal": Causal, "bidirectional": Bidirectional}


class Imported:
    """Knows the mask that the weights were trained with, `options["mask"]`, and nothing of the data. Others start from its weights."""

    def __init__(self, config: CustomStage, embedder: Embedder) -> None:
        mask = config.options.get("mask")
        if mask not in MASKS:
            raise ConfigError(f"{config.name}.options.mask must be one of {', '.join(MASKS)}, got {mask!r}")
        self._mask = MASKS[mask]()

    def loss(self, params: Params, carry: Carry, batch: Batch, step: Any, rng: Any) -> NoReturn:
        """Always raises `ConfigError`: there is no objective here."""
        raise ConfigError("imported weights are not trained where they lie; start a recipe from them with init_from")

    def init_carry(self, num_examples: Mapping[str, int]) -> Carry:
        """Nothing is remembered."""
        return {}

    def carry_axes(self, carry: Carry) -> Any:
        """Nothing is remembered."""
        return {}

    def mask(self, step: Any) -> Causal | Bidirectional:
        """That of the imported model."""
        return self._mask

    def describe(self) -> dict[str, str | int | float]:
        """The mask."""
        return {"mask": type(self._mask).__name__.lower()}
