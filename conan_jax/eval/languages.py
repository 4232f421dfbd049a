"""Sets in several languages: each language is a set of its own, and the figure of the whole is their mean, as in MTEB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from conan_jax.figures import Figures


def split(records: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Records by their `lang`, languages in alphabetical order."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        parts.setdefault(record["lang"], []).append(record)
    return dict(sorted(parts.items()))


def combine(parts: Mapping[str, Figures]) -> Figures:
    """Figures of one language as they are; of several, their means and `NAME/LANG` for each."""
    if len(parts) == 1:
        return dict(next(iter(parts.values())))
    names = dict.fromkeys(name for figures in parts.values() for name in figures)
    means = {name: float(np.mean([figures[name] for figures in parts.values() if name in figures])) for name in names}
    return means | {f"{name}/{language}": value for language, figures in parts.items() for name, value in figures.items()}
