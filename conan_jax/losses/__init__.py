"""Losses: pure functions of arrays that know no model.

`LOSSES` names them: docs/EQUATIONS.md must have a row for each.
"""

from __future__ import annotations

from collections.abc import Callable

from conan_jax.losses.contrastive import info_nce
from conan_jax.losses.cosent import cosent
from conan_jax.losses.lm import chunked_cross_entropy
from conan_jax.losses.matryoshka import matryoshka

LOSSES: dict[str, Callable] = {
    "cross_entropy": chunked_cross_entropy,
    "info_nce": info_nce,
    "cosent": cosent,
}


__all__ = ["LOSSES", "chunked_cross_entropy", "cosent", "info_nce", "matryoshka"]
