"""Figures of an evaluation by name: `ndcg@10` of the whole set, `ndcg@10/de` of one of its languages."""

from __future__ import annotations

from collections.abc import Mapping

Figures = dict[str, float]


def by_language(figures: Mapping[str, float]) -> dict[str, Figures]:
    """`{"de": {"ndcg@10": ...}}` out of the keys `ndcg@10/de`; what stands for the whole is left out."""
    table: dict[str, Figures] = {}
    for key, value in figures.items():
        name, slash, language = key.partition("/")
        if slash:
            table.setdefault(language, {})[name] = value
    return table
