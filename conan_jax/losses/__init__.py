"""Losses: pure functions of arrays that know no model.

`LOSSES` names them; `find_loss("package.module:attr")` reaches one from outside the package.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from conan_jax.losses.contrastive import info_nce
from conan_jax.losses.cosent import cosent
from conan_jax.losses.lm import chunked_cross_entropy
from conan_jax.losses.matryoshka import matryoshka

LOSSES: dict[str, Callable] = {
    "cross_entropy": chunked_cross_entropy,
    "info_nce": info_nce,
    "cosent": cosent,
}


def find_loss(name: str) -> Callable:
    """The loss called `name` in `LOSSES`, or the attribute `package.module:attr`. Raises `ValueError` when there is none."""
    if name in LOSSES:
        return LOSSES[name]
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f'no loss {name!r}; known: {", ".join(LOSSES)}, or "package.module:attr"')
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"loss {name!r} cannot be imported: {error}") from error


__all__ = ["LOSSES", "chunked_cross_entropy", "cosent", "find_loss", "info_nce", "matryoshka"]
